-- Credits beyond the plan: what is spent first, what expires, what a reset keeps; refunds; thresholds; overage.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE VIEW pg_temp.status AS
SELECT user_id, monthly_credits::float AS monthly, extra_credits::float AS extra, credits_used::float AS used, credits_held::float AS held,
       credits_remaining::float AS remaining, credits_overage::float AS overage
  FROM keyvault.credit_status WHERE user_id LIKE 'gr\_%' ORDER BY 1;
CREATE VIEW pg_temp.grants AS
SELECT user_id, kind, reason, amount::float, remaining::float, expired::float FROM keyvault.credit_grants WHERE user_id LIKE 'gr\_%' ORDER BY user_id, created_at, id;
-- Let a user's period have ended, and grants have expired, as though time had passed.
CREATE FUNCTION pg_temp.month_passes(who text) RETURNS void LANGUAGE sql AS $$
UPDATE keyvault.credit_balances SET period_anchor = now() - interval '1 hour', period_start = period_start - interval '1 month',
       period_end = now() - interval '1 hour', due_at = now() - interval '1 hour' WHERE user_id = who;
UPDATE keyvault.credit_notices SET period_start = period_start - interval '1 month' WHERE user_id = who;
$$;
CREATE FUNCTION pg_temp.expires(who text, why text) RETURNS void LANGUAGE sql AS $$
UPDATE keyvault.credit_grants SET expires_at = now() - interval '1 minute' WHERE user_id = who AND reason = why;
UPDATE keyvault.credit_balances SET due_at = now() - interval '1 minute' WHERE user_id = who;
$$;
CREATE FUNCTION pg_temp.refusal(statement text) RETURNS TABLE (state text, message text) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE statement;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT;
    RETURN NEXT;
END $$;

-- Monthly credits are spent first, then what expires first, then what is oldest.
SELECT keyvault.grant_credits('gr_a', 100, 'old, for good') IS NOT NULL AS granted, keyvault.grant_credits('gr_a', 100, 'later', now() + interval '20 days') IS NOT NULL,
       keyvault.grant_credits('gr_a', 100, 'soon', now() + interval '10 days') IS NOT NULL, keyvault.grant_credits('gr_a', 100, 'new, for good') IS NOT NULL;
SELECT due_at = (SELECT expires_at FROM keyvault.credit_grants WHERE user_id = 'gr_a' AND reason = 'soon') AS due_at_first_expiry
  FROM keyvault.credit_balances WHERE user_id = 'gr_a';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_a', 1350);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_a';
\set VERBOSITY sqlstate
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_a', 50.000001);
\set VERBOSITY terse
-- a reset keeps what was not spent of them
SELECT pg_temp.month_passes('gr_a');
SELECT * FROM pg_temp.status WHERE user_id = 'gr_a';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_a', 1);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_a';
SELECT reason, remaining FROM pg_temp.grants WHERE user_id = 'gr_a';
SELECT ended_by, plan, credits_used, extra_spent, overage FROM keyvault.credit_periods WHERE user_id = 'gr_a';
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';

-- What expires in the middle of a period is lost; what was spent of it is not asked for again.
SELECT keyvault.grant_credits('gr_b', 300, 'expires') IS NOT NULL AS granted, keyvault.grant_credits('gr_b', 50, 'stays') IS NOT NULL;
UPDATE keyvault.credit_grants SET expires_at = now() + interval '1 day' WHERE user_id = 'gr_b' AND reason = 'expires';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_b', 1100);
SELECT pg_temp.expires('gr_b', 'expires');
SELECT * FROM pg_temp.status WHERE user_id = 'gr_b';
\set VERBOSITY sqlstate
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_b', 50.000001);
\set VERBOSITY terse
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_b', 50);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_b';
SELECT * FROM pg_temp.grants WHERE user_id = 'gr_b';
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';
SELECT pg_temp.month_passes('gr_b');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_b', 1000);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_b';
SELECT * FROM pg_temp.grants WHERE user_id = 'gr_b';
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';

-- Both at once, and long ago: the view says before the roll what the roll makes.
SELECT keyvault.grant_credits('gr_c', 30, 'first') IS NOT NULL AS granted, keyvault.grant_credits('gr_c', 30, 'second') IS NOT NULL, keyvault.grant_credits('gr_c', 30, 'third') IS NOT NULL;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_c', 1040);
SELECT pg_temp.expires('gr_c', 'second');
UPDATE keyvault.credit_balances SET period_anchor = '2019-01-31', period_start = '2020-01-31', period_end = '2020-02-29' WHERE user_id = 'gr_c';
CREATE TEMP TABLE before_roll AS SELECT * FROM keyvault.credit_status WHERE user_id = 'gr_c';
SELECT keyvault.reset_due_credits() >= 1 AS reset;
SELECT before_roll = s AS same FROM before_roll, keyvault.credit_status s WHERE s.user_id = 'gr_c';
SELECT * FROM pg_temp.status WHERE user_id = 'gr_c';
SELECT * FROM pg_temp.grants WHERE user_id = 'gr_c';
SELECT period_start, period_end, ended_at, credits_used, extra_spent FROM keyvault.credit_periods WHERE user_id = 'gr_c';
SELECT keyvault.reset_due_credits(1);
SELECT keyvault.reset_due_credits(0);
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';

-- Idempotent by key; another grant under the same key is an error.
SELECT keyvault.grant_credits('gr_d', 10, 'paid', idempotency_key => 'invoice-1') = keyvault.grant_credits('gr_d', 10, 'paid', idempotency_key => 'invoice-1') AS same;
SELECT state, message FROM pg_temp.refusal($$SELECT keyvault.grant_credits('gr_d', 11, 'paid', idempotency_key => 'invoice-1')$$);
SELECT keyvault.grant_credits('gr_e', 11, 'paid', idempotency_key => 'invoice-1') IS NOT NULL AS another_users_key_is_another;
SELECT * FROM pg_temp.grants WHERE user_id = 'gr_d';
SELECT s.* FROM (VALUES (0, 'x', NULL), (-1, 'x', NULL), ('NaN', 'x', NULL), ('Infinity', 'x', NULL), (1e12, 'x', NULL), (0.0000001, 'x', NULL), (NULL, 'x', NULL),
                        (1, NULL, NULL), (1, '', NULL), (1, 'x', '2020-01-01')) v(amount, why, ends),
       LATERAL pg_temp.refusal(format('SELECT keyvault.grant_credits(''gr_d'', %L, %L, %L)', amount, why, ends)) s;
SELECT state, message FROM pg_temp.refusal($$SELECT keyvault.grant_credits(NULL, 1, 'x')$$);

-- Plans: what was used stays used, what a plan or a grant paid for stays paid.
SELECT keyvault.upsert_user('gr_p', plan => 'pro') IS NOT NULL AS made, keyvault.grant_credits('gr_p', 500, 'bought') IS NOT NULL AS granted;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_p', 30000);
SELECT keyvault.set_plan('gr_p', 'free');
SELECT * FROM pg_temp.status WHERE user_id = 'gr_p';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_p', 100);
SELECT keyvault.set_plan('gr_p', 'pro');
SELECT * FROM pg_temp.status WHERE user_id = 'gr_p';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_p', 20000);
SELECT keyvault.set_plan('gr_p', 'enterprise');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_p', 100000);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_p';
SELECT keyvault.set_plan('gr_p', 'free');
SELECT * FROM pg_temp.status WHERE user_id = 'gr_p';
SELECT pg_temp.month_passes('gr_p');
SELECT * FROM pg_temp.status WHERE user_id = 'gr_p';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_p', 1400);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_p';
SELECT ended_by, plan, monthly_credits::float AS monthly, credits_covered::float AS covered, credits_used::float AS used, extra_spent::float AS extra, overage::float
  FROM keyvault.credit_periods WHERE user_id = 'gr_p' ORDER BY id;
-- an amount agreed with one user
SELECT keyvault.set_plan('gr_p', 'enterprise', 123456.5);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_p';
SELECT state FROM pg_temp.refusal($$SELECT keyvault.set_plan('gr_p', 'enterprise', -1)$$);
SELECT pg_temp.month_passes('gr_p');
SELECT monthly, extra, used FROM pg_temp.status WHERE user_id = 'gr_p';
SELECT keyvault.reset_due_credits() >= 1 AS reset;
SELECT monthly, extra, used FROM pg_temp.status WHERE user_id = 'gr_p';
SELECT keyvault.set_plan('gr_p', 'enterprise');
SELECT monthly, extra, used, remaining FROM pg_temp.status WHERE user_id = 'gr_p';
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';

-- Overage that is reported instead of refused.
INSERT INTO keyvault.plans (plan, monthly_credits, overage) VALUES ('gr_postpaid', 100, 'report');
SELECT keyvault.upsert_user('gr_o', plan => 'gr_postpaid') IS NOT NULL AS made, keyvault.grant_credits('gr_o', 10, 'bought') IS NOT NULL AS granted;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_o', 120), ('gr_o', 5);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_o';
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';
SELECT pg_temp.month_passes('gr_o');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_o', 1);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_o';
SELECT credits_used, extra_spent, overage FROM keyvault.credit_periods WHERE user_id = 'gr_o';

-- Thresholds are noted once each per period.
SELECT keyvault.upsert_user('gr_n') IS NOT NULL AS made;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_n', 499.999999);
SELECT percent FROM keyvault.credit_notices WHERE user_id = 'gr_n';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_n', 0.000001);
SELECT percent, credits_used, credits_limit FROM keyvault.credit_notices WHERE user_id = 'gr_n';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_n', 500);
SELECT percent, credits_used FROM keyvault.credit_notices WHERE user_id = 'gr_n' ORDER BY 1;
SELECT keyvault.grant_credits('gr_n', 1000, 'bought') IS NOT NULL AS granted;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_n', 1000);
SELECT percent, credits_used FROM keyvault.credit_notices WHERE user_id = 'gr_n' ORDER BY 1;
SELECT pg_temp.month_passes('gr_n');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('gr_n', 900);
SELECT count(DISTINCT period_start) AS periods, array_agg(percent ORDER BY period_start, percent) AS percents FROM keyvault.credit_notices WHERE user_id = 'gr_n';

-- A use is refunded once, as a grant and a row that says why.
SELECT keyvault.record_usage('chat', 'gpt-5-mini', 10, 20, 42, 'gr_r') AS usage \gset
SELECT keyvault.refund_usage(:'usage', 'a bad answer', 'gr_r') AS refund \gset
SELECT keyvault.refund_usage(:'usage', 'a bad answer', 'gr_r') = :'refund' AS same;
SELECT * FROM pg_temp.status WHERE user_id = 'gr_r';
SELECT * FROM pg_temp.grants WHERE user_id = 'gr_r';
SELECT id = :'refund' AS same, type, model, credits, metadata - 'refund_of' AS metadata, metadata ->> 'refund_of' = :'usage' AS of_it
  FROM keyvault.usage_records WHERE user_id = 'gr_r' AND type = 'refund';
SELECT state, message FROM pg_temp.refusal(format('SELECT keyvault.refund_usage(%L, ''no'', ''gr_r'')', :'refund'));
SELECT state, message FROM pg_temp.refusal(format('SELECT keyvault.refund_usage(%L, ''no'', ''gr_n'')', :'usage'));
-- found also where created_at is not the time of the id
INSERT INTO keyvault.usage_records (user_id, created_at, id, credits) VALUES ('gr_r', '2001-02-03', '00000000-0000-4000-8000-000000000001', 7);
SELECT keyvault.refund_usage('00000000-0000-4000-8000-000000000001', 'old', 'gr_r') IS NOT NULL AS refunded;
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';

-- Proof: what was tampered with is found.
BEGIN;
UPDATE keyvault.credit_balances SET credits_used = credits_used - 1, extra_credits = extra_credits + 2, credits_held = 3 WHERE user_id = 'gr_r';
UPDATE keyvault.credit_grants SET remaining = remaining - 1 WHERE user_id = 'gr_d';
SELECT user_id, what, expected::float, found::float FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%' ORDER BY 1, 2;
ROLLBACK;

-- Explained, and as of any time.
SELECT keyvault.reserve_credits(5, '1 hour', 'gr_d') AS hold \gset
SELECT item, credits::float, regexp_replace(note, '[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{5}', 'TIME', 'g') AS note FROM keyvault.explain_balance('gr_d');
SELECT item, credits::float FROM keyvault.explain_balance('gr_p');
SELECT * FROM keyvault.explain_balance('gr_nobody');
INSERT INTO keyvault.users (user_id, plan) VALUES ('gr_h', 'pro');
INSERT INTO keyvault.credit_balances (user_id, monthly_credits, credits_used, extra_credits, extra_spent, period_anchor, period_start, period_end)
VALUES ('gr_h', 50000, 7, 60, 0, '2024-01-31', keyvault._period_bound('2024-01-31', keyvault._period_number('2024-01-31', now())),
        keyvault._period_bound('2024-01-31', keyvault._period_number('2024-01-31', now()) + 1));
INSERT INTO keyvault.credit_grants (user_id, amount, remaining, expired, reason, created_at, expires_at) VALUES
       ('gr_h', 100, 60, 0, 'kept', '2024-02-10', NULL), ('gr_h', 50, 0, 40, 'expired', '2024-02-15', '2024-03-05');
INSERT INTO keyvault.credit_periods (user_id, ended_by, plan, period_start, period_end, ended_at, monthly_credits, credits_covered, credits_used, extra_spent, overage) VALUES
       ('gr_h', 'period', 'free', '2024-01-31', '2024-02-29', '2024-02-29', 1000, 0, 1010, 10, 0),
       ('gr_h', 'plan', 'free', '2024-02-29', '2024-03-31', '2024-03-10', 1000, 0, 1040, 40, 0),
       ('gr_h', 'period', 'pro', '2024-02-29', '2024-03-31', '2024-03-31', 50000, 0, 2000, 40, 0);
INSERT INTO keyvault.usage_records (user_id, created_at, credits, debit_tag) VALUES
       ('gr_h', '2024-02-01', 1000, 0), ('gr_h', '2024-02-20', 10, 0), ('gr_h', '2024-03-02', 1040, 0), ('gr_h', '2024-03-15', 960, 0), ('gr_h', now(), 7, 0);
SELECT t, b.plan, b.period_start::date, b.monthly_credits::float AS monthly, b.extra_credits::float AS extra, b.credits_used::float AS used, b.credits_remaining::float AS remaining
  FROM unnest('{2024-01-01, 2024-02-05, 2024-02-25, 2024-02-29, 2024-03-04, 2024-03-06, 2024-03-11, 2024-03-20, 2024-05-01}'::timestamptz[]) t
  LEFT JOIN LATERAL keyvault.balance_at('gr_h', t) b ON true ORDER BY 1;
SELECT b.plan, b.credits_used::float AS used, b.extra_credits::float AS extra, b.credits_remaining = s.credits_remaining AS as_now
  FROM keyvault.balance_at('gr_h', now()) b, keyvault.credit_status s WHERE s.user_id = 'gr_h';
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';
-- a retired partition leaves its sums
BEGIN;
CREATE TABLE keyvault.usage_records_old (LIKE keyvault.usage_records INCLUDING ALL);
ALTER TABLE keyvault.usage_records_old ENABLE ROW LEVEL SECURITY;
INSERT INTO keyvault.usage_records_old SELECT * FROM keyvault.usage_records WHERE user_id = 'gr_h';
SELECT keyvault._archive_usage('keyvault.usage_records_old');
SELECT what, expected::float, found::float FROM keyvault.verify_ledger() WHERE user_id = 'gr_h';
ROLLBACK;

-- A split balance is gathered by whatever changes it but the debit.
SELECT keyvault.upsert_user('gr_s') IS NOT NULL AS made;
UPDATE keyvault.credit_balances SET credits_lent = 300 WHERE user_id = 'gr_s';
INSERT INTO keyvault.credit_balances (user_id, slot, monthly_credits, credits_used, period_anchor, period_start, period_end)
SELECT user_id, k, 150, 20, period_anchor, period_start, period_end FROM keyvault.credit_balances, generate_series(1, 2) k WHERE user_id = 'gr_s';
INSERT INTO keyvault.usage_records (user_id, credits, debit_tag) VALUES ('gr_s', 40, 0);
SELECT * FROM pg_temp.status WHERE user_id = 'gr_s';
SELECT * FROM keyvault.verify_ledger() WHERE user_id = 'gr_s';
SELECT keyvault.grant_credits('gr_s', 1, 'gathers') IS NOT NULL AS granted;
SELECT slot, credits_used, credits_lent FROM keyvault.credit_balances WHERE user_id = 'gr_s';
SELECT * FROM pg_temp.status WHERE user_id = 'gr_s';

-- Who may: trusted applications and administrators grant, nobody else.
CREATE ROLE regress_kv_user; CREATE ROLE regress_kv_admin; CREATE ROLE regress_kv_app;
SELECT keyvault.grant_access('regress_kv_user', 'user'), keyvault.grant_access('regress_kv_admin', 'admin'), keyvault.grant_access('regress_kv_app', 'app');
SET ROLE regress_kv_user;
SELECT state FROM pg_temp.refusal($$SELECT keyvault.grant_credits('gr_d', 1, 'mine')$$);
SELECT count(*) FROM keyvault.credit_grants;
RESET ROLE;
SET ROLE regress_kv_admin;
SELECT keyvault.grant_credits('gr_d', 1, 'by admin') IS NOT NULL AS granted, keyvault.refund_usage(:'usage', 'again', 'gr_r') = :'refund' AS refunded;
SELECT count(*) FROM keyvault.verify_ledger() WHERE user_id LIKE 'gr\_%';
RESET ROLE;
SET ROLE regress_kv_app;
SELECT keyvault.grant_credits('gr_app', 1, 'by the application') IS NOT NULL AS granted;
SELECT state FROM pg_temp.refusal('SELECT keyvault.reset_due_credits()');
SELECT state FROM pg_temp.refusal('SELECT * FROM keyvault.verify_ledger()');
BEGIN;
SELECT keyvault.act_as('gr_d');
SELECT reason FROM keyvault.credit_grants;
SELECT item, credits::float FROM keyvault.explain_balance();
COMMIT;
RESET ROLE;
SELECT keyvault.revoke_access('regress_kv_user', 'user'), keyvault.revoke_access('regress_kv_admin', 'admin'), keyvault.revoke_access('regress_kv_app', 'app');
DROP ROLE regress_kv_user, regress_kv_admin, regress_kv_app;
SELECT keyvault.set_plan('gr_o', 'free');
DELETE FROM keyvault.plans WHERE plan = 'gr_postpaid';
