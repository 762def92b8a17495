-- What applications and analysts read.

CREATE VIEW keyvault.credit_status WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.plan, (c.monthly_credits - c.credits_covered)::numeric(18,6) AS monthly_credits, c.extra_credits, c.credits_used,
       held.amount AS credits_held,
       CASE WHEN c.monthly_credits IS NOT NULL
            THEN greatest(c.monthly_credits + c.extra_credits - c.credits_used - held.amount, 0) END AS credits_remaining,
       c.period_end AS credits_reset_at,
       (coalesce(greatest(c.credits_used - c.monthly_credits - c.extra_credits, 0), 0) + c.credits_overage)::numeric(18,6) AS credits_overage
  FROM keyvault.users u
  JOIN keyvault.credit_balances b ON b.user_id = u.user_id AND b.slot = 0
 CROSS JOIN LATERAL keyvault._balance_now(b, CASE WHEN b.credits_lent > 0
                                             THEN (SELECT sum(s.credits_used) FROM keyvault.credit_balances s WHERE s.user_id = b.user_id)
                                             ELSE b.credits_used END) c
 CROSS JOIN LATERAL (SELECT coalesce(sum(h.amount), 0)::numeric(18,6) AS amount
                       FROM keyvault.credit_holds h
                      WHERE h.user_id = b.user_id AND h.expires_at > now()) held;
COMMENT ON VIEW keyvault.credit_status IS
    'Plan and credits of the acting user, of every user for access analyst or admin. Right also when a period or a grant has ended and nothing was written yet. NULL monthly_credits and credits_remaining are unlimited; extra_credits are those of the period, spent ones among them; credits_overage is what was used in the period beyond all of them, on a plan with overage report; a later grant does not pay for it.';
COMMENT ON COLUMN keyvault.credit_status.user_id IS 'Whose credits.';
COMMENT ON COLUMN keyvault.credit_status.plan IS 'The plan that the user is on.';
COMMENT ON COLUMN keyvault.credit_status.monthly_credits IS 'Credits of the plan, or agreed with the user, for the period; NULL is unlimited.';
COMMENT ON COLUMN keyvault.credit_status.extra_credits IS 'Credits beyond the plan in this period, those that are spent among them.';
COMMENT ON COLUMN keyvault.credit_status.credits_used IS 'Credits debited since the period began.';
COMMENT ON COLUMN keyvault.credit_status.credits_held IS 'Credits that open holds set aside.';
COMMENT ON COLUMN keyvault.credit_status.credits_remaining IS 'What can be used or held now; NULL is unlimited.';
COMMENT ON COLUMN keyvault.credit_status.credits_reset_at IS 'When the period ends, and the next one begins.';
COMMENT ON COLUMN keyvault.credit_status.credits_overage IS 'Credits used in the period beyond all of them, on a plan with overage report.';
