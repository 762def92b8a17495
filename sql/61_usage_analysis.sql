-- Usage for people: by day, model, month and payer, what it earns, and what is out of the ordinary. Each view is exact
-- at any time: it reads what is added up already and the records that are not.

-- The collations of 0.1.0: an update cannot replace the view with others.
CREATE VIEW keyvault.usage_by_day WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.day, nullif(u.provider, '') COLLATE "default" AS provider, nullif(u.model, '') COLLATE "default" AS model,
       u.type COLLATE "default" AS type, u.payer COLLATE "default" AS payer,
       sum(u.calls)::bigint AS calls, sum(u.input_tokens)::bigint AS input_tokens, sum(u.cached_tokens)::bigint AS cached_tokens,
       sum(u.output_tokens)::bigint AS output_tokens, sum(u.tokens)::bigint AS tokens,
       sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd, sum(u.credits_overrun) AS credits_overrun
  FROM keyvault._usage u
 GROUP BY u.user_id, u.day, u.provider, u.model, u.type, u.payer;
COMMENT ON VIEW keyvault.usage_by_day IS
    'Usage per user, UTC day, provider, model, type and payer. The acting user''s; every user''s for access analyst or admin.';
COMMENT ON COLUMN keyvault.usage_by_day.user_id IS 'Whose usage.';
COMMENT ON COLUMN keyvault.usage_by_day.day IS 'Date in UTC.';
COMMENT ON COLUMN keyvault.usage_by_day.provider IS 'NULL where the records name none.';
COMMENT ON COLUMN keyvault.usage_by_day.model IS 'NULL where the records name none.';
COMMENT ON COLUMN keyvault.usage_by_day.type IS 'chat, api, automation, or the applications own word.';
COMMENT ON COLUMN keyvault.usage_by_day.payer IS 'Whose key was used: user or platform.';
COMMENT ON COLUMN keyvault.usage_by_day.calls IS 'Usage records.';
COMMENT ON COLUMN keyvault.usage_by_day.input_tokens IS 'Tokens read, cached ones included; NULL where no record states them.';
COMMENT ON COLUMN keyvault.usage_by_day.cached_tokens IS 'The part of input_tokens that came from the providers'' cache; NULL where no record states it.';
COMMENT ON COLUMN keyvault.usage_by_day.output_tokens IS 'Tokens written; NULL where no record states them.';
COMMENT ON COLUMN keyvault.usage_by_day.tokens IS 'All tokens together.';
COMMENT ON COLUMN keyvault.usage_by_day.credits IS 'Credits debited.';
COMMENT ON COLUMN keyvault.usage_by_day.cost_usd IS 'What the providers charge, in USD.';
COMMENT ON COLUMN keyvault.usage_by_day.credits_overrun IS 'Credits beyond what the user had left; not debited.';

CREATE VIEW keyvault.usage_by_model WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, date_trunc('month', u.day::timestamp)::date AS month, nullif(u.provider, '') AS provider, nullif(u.model, '') AS model,
       sum(u.calls)::bigint AS calls, sum(u.input_tokens)::bigint AS input_tokens, sum(u.cached_tokens)::bigint AS cached_tokens,
       sum(u.output_tokens)::bigint AS output_tokens, sum(u.tokens)::bigint AS tokens,
       sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd, sum(u.credits_overrun) AS credits_overrun
  FROM keyvault._usage u
 GROUP BY u.user_id, date_trunc('month', u.day::timestamp)::date, u.provider, u.model;
COMMENT ON VIEW keyvault.usage_by_model IS
    'Usage per user, UTC month, provider and model. The acting user''s; every user''s for access analyst or admin.';
COMMENT ON COLUMN keyvault.usage_by_model.user_id IS 'Whose usage.';
COMMENT ON COLUMN keyvault.usage_by_model.month IS 'First day of the month, in UTC.';
COMMENT ON COLUMN keyvault.usage_by_model.provider IS 'NULL where the records name none.';
COMMENT ON COLUMN keyvault.usage_by_model.model IS 'NULL where the records name none.';
COMMENT ON COLUMN keyvault.usage_by_model.calls IS 'Usage records.';
COMMENT ON COLUMN keyvault.usage_by_model.input_tokens IS 'Tokens read, cached ones included; NULL where no record states them.';
COMMENT ON COLUMN keyvault.usage_by_model.cached_tokens IS 'The part of input_tokens that came from the providers'' cache; NULL where no record states it.';
COMMENT ON COLUMN keyvault.usage_by_model.output_tokens IS 'Tokens written; NULL where no record states them.';
COMMENT ON COLUMN keyvault.usage_by_model.tokens IS 'All tokens together.';
COMMENT ON COLUMN keyvault.usage_by_model.credits IS 'Credits debited.';
COMMENT ON COLUMN keyvault.usage_by_model.cost_usd IS 'What the providers charge, in USD.';
COMMENT ON COLUMN keyvault.usage_by_model.credits_overrun IS 'Credits beyond what the user had left; not debited.';

CREATE VIEW keyvault.usage_by_month WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, date_trunc('month', u.day::timestamp)::date AS month,
       sum(u.calls)::bigint AS calls, sum(u.input_tokens)::bigint AS input_tokens, sum(u.cached_tokens)::bigint AS cached_tokens,
       sum(u.output_tokens)::bigint AS output_tokens, sum(u.tokens)::bigint AS tokens,
       sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd, sum(u.credits_overrun) AS credits_overrun
  FROM keyvault._usage u
 GROUP BY u.user_id, date_trunc('month', u.day::timestamp)::date;
COMMENT ON VIEW keyvault.usage_by_month IS
    'Usage per user and UTC month. The acting user''s; every user''s for access analyst or admin.';
COMMENT ON COLUMN keyvault.usage_by_month.user_id IS 'Whose usage.';
COMMENT ON COLUMN keyvault.usage_by_month.month IS 'First day of the month, in UTC.';
COMMENT ON COLUMN keyvault.usage_by_month.calls IS 'Usage records.';
COMMENT ON COLUMN keyvault.usage_by_month.input_tokens IS 'Tokens read, cached ones included; NULL where no record states them.';
COMMENT ON COLUMN keyvault.usage_by_month.cached_tokens IS 'The part of input_tokens that came from the providers'' cache; NULL where no record states it.';
COMMENT ON COLUMN keyvault.usage_by_month.output_tokens IS 'Tokens written; NULL where no record states them.';
COMMENT ON COLUMN keyvault.usage_by_month.tokens IS 'All tokens together.';
COMMENT ON COLUMN keyvault.usage_by_month.credits IS 'Credits debited.';
COMMENT ON COLUMN keyvault.usage_by_month.cost_usd IS 'What the providers charge, in USD.';
COMMENT ON COLUMN keyvault.usage_by_month.credits_overrun IS 'Credits beyond what the user had left; not debited.';

CREATE VIEW keyvault.cost_by_payer WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, date_trunc('month', u.day::timestamp)::date AS month, u.payer, nullif(u.provider, '') AS provider,
       sum(u.calls)::bigint AS calls, sum(u.input_tokens)::bigint AS input_tokens, sum(u.cached_tokens)::bigint AS cached_tokens,
       sum(u.output_tokens)::bigint AS output_tokens, sum(u.tokens)::bigint AS tokens,
       sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd, sum(u.credits_overrun) AS credits_overrun
  FROM keyvault._usage u
 GROUP BY u.user_id, date_trunc('month', u.day::timestamp)::date, u.payer, u.provider;
COMMENT ON VIEW keyvault.cost_by_payer IS
    'Who pays for what: usage per user, UTC month, whose key was used and provider. cost_usd is charged to the owner of the key: the user itself, or the platform. The acting user''s; every user''s for access analyst or admin.';
COMMENT ON COLUMN keyvault.cost_by_payer.user_id IS 'Whose usage.';
COMMENT ON COLUMN keyvault.cost_by_payer.month IS 'First day of the month, in UTC.';
COMMENT ON COLUMN keyvault.cost_by_payer.payer IS 'Whose key was used: user or platform.';
COMMENT ON COLUMN keyvault.cost_by_payer.provider IS 'NULL where the records name none.';
COMMENT ON COLUMN keyvault.cost_by_payer.calls IS 'Usage records.';
COMMENT ON COLUMN keyvault.cost_by_payer.input_tokens IS 'Tokens read, cached ones included; NULL where no record states them.';
COMMENT ON COLUMN keyvault.cost_by_payer.cached_tokens IS 'The part of input_tokens that came from the providers'' cache; NULL where no record states it.';
COMMENT ON COLUMN keyvault.cost_by_payer.output_tokens IS 'Tokens written; NULL where no record states them.';
COMMENT ON COLUMN keyvault.cost_by_payer.tokens IS 'All tokens together.';
COMMENT ON COLUMN keyvault.cost_by_payer.credits IS 'Credits debited.';
COMMENT ON COLUMN keyvault.cost_by_payer.cost_usd IS 'What the providers charge, in USD.';
COMMENT ON COLUMN keyvault.cost_by_payer.credits_overrun IS 'Credits beyond what the user had left; not debited.';

CREATE VIEW keyvault.revenue_by_user WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, m.month::date AS month, w.plan, r.usd AS revenue_usd, coalesce(c.platform, 0) AS provider_cost_usd,
       r.usd - coalesce(c.platform, 0) AS margin_usd,
       round((r.usd - coalesce(c.platform, 0)) / nullif(r.usd, 0), 4) AS margin,
       coalesce(c.own, 0) AS own_key_cost_usd, coalesce(c.credits, 0) AS credits
  FROM keyvault.users u
  LEFT JOIN (SELECT d.user_id, min(d.day) AS day FROM keyvault._usage d GROUP BY 1) f ON f.user_id = u.user_id
 CROSS JOIN LATERAL generate_series(date_trunc('month', least(u.created_at AT TIME ZONE 'UTC', f.day::timestamp)), now() AT TIME ZONE 'UTC',
                                    '1 month') m(month)
 -- The first change after the month says what was in force when it ended; the plan chosen on the first day is the first.
 CROSS JOIN LATERAL (SELECT coalesce((SELECT e.plan FROM keyvault.credit_periods e
                                       WHERE e.user_id = u.user_id AND e.ended_at >= (m.month + interval '1 month') AT TIME ZONE 'UTC'
                                         AND e.ended_at >= (SELECT b.period_anchor + interval '1 day' FROM keyvault.credit_balances b
                                                             WHERE b.user_id = u.user_id AND b.slot = 0)
                                       ORDER BY e.ended_at, e.id LIMIT 1), u.plan)) w(plan)
  LEFT JOIN keyvault.plans p ON p.plan = w.plan
  LEFT JOIN (SELECT g.user_id, date_trunc('month', g.created_at AT TIME ZONE 'UTC') AS month, sum(g.price_usd) AS usd
               FROM keyvault.credit_grants g WHERE g.price_usd IS NOT NULL GROUP BY 1, 2) g ON g.user_id = u.user_id AND g.month = m.month
 CROSS JOIN LATERAL (SELECT p.price_usd + coalesce(g.usd, 0)) r(usd)
  LEFT JOIN (SELECT d.user_id, date_trunc('month', d.day::timestamp)::date AS month,
                    sum(d.cost_usd) FILTER (WHERE d.payer = 'platform') AS platform,
                    sum(d.cost_usd) FILTER (WHERE d.payer = 'user') AS own, sum(d.credits) AS credits
               FROM keyvault._usage d GROUP BY 1, 2) c ON c.user_id = u.user_id AND c.month = m.month::date;
COMMENT ON VIEW keyvault.revenue_by_user IS
    'What each user brings and costs, per UTC month since it was made or first used something: the price of the plan that the month ended with, and of grants, against what the providers charge the platform. Every user''s, for access analyst or admin.';
COMMENT ON COLUMN keyvault.revenue_by_user.user_id IS 'Whose plan and usage.';
COMMENT ON COLUMN keyvault.revenue_by_user.month IS 'First day of the month, in UTC; the first one counts whole.';
COMMENT ON COLUMN keyvault.revenue_by_user.plan IS 'The plan that the month ended with, or that the user has now.';
COMMENT ON COLUMN keyvault.revenue_by_user.revenue_usd IS 'Price of the plan for a month, as it is now, and of the month''s grants, in USD; NULL where the plan''s is negotiated.';
COMMENT ON COLUMN keyvault.revenue_by_user.provider_cost_usd IS 'What providers charge the platform for the user''s calls, in USD.';
COMMENT ON COLUMN keyvault.revenue_by_user.margin_usd IS 'revenue_usd less provider_cost_usd; NULL where the price is.';
COMMENT ON COLUMN keyvault.revenue_by_user.margin IS 'margin_usd as a fraction of revenue_usd; NULL for a plan that is free or negotiated.';
COMMENT ON COLUMN keyvault.revenue_by_user.own_key_cost_usd IS 'What providers charge the user itself, for calls with its own keys, in USD.';
COMMENT ON COLUMN keyvault.revenue_by_user.credits IS 'Credits debited.';

CREATE VIEW keyvault.usage_anomalies WITH (security_invoker = true, security_barrier = true) AS
WITH days AS (
    SELECT u.user_id, u.day, sum(u.calls) AS calls, sum(u.tokens) AS tokens, sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd
      FROM keyvault._usage u
     WHERE u.day > (now() AT TIME ZONE 'UTC')::date - 60
     GROUP BY u.user_id, u.day
), known AS (
    SELECT d.user_id, d.day, m.measure, m.value, m.least,
           array_agg(m.value) OVER (PARTITION BY d.user_id, m.measure ORDER BY d.day
                                    RANGE BETWEEN '28 days' PRECEDING AND '1 day' PRECEDING) AS earlier
      FROM days d
     CROSS JOIN LATERAL (VALUES ('calls', d.calls, 1), ('tokens', d.tokens, 1000), ('credits', d.credits, 1), ('cost_usd', d.cost_usd, 0.01)) m(measure, value, least)
), judged AS (
    SELECT k.user_id, k.day, k.measure, k.value, k.least, c.median, d.mad, cardinality(k.earlier) AS baseline_days
      FROM known k
     CROSS JOIN LATERAL (SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY e)::numeric FROM unnest(k.earlier) e) c(median)
     CROSS JOIN LATERAL (SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY abs(e - c.median))::numeric FROM unnest(k.earlier) e) d(mad)
     WHERE cardinality(k.earlier) >= 7 AND k.day > (now() AT TIME ZONE 'UTC')::date - 30
)
SELECT j.user_id, j.day, j.measure, j.value, round(j.median, 6) AS median, round(j.mad, 6) AS mad, s.score, j.baseline_days
  FROM judged j
 CROSS JOIN LATERAL (SELECT round((j.value - j.median) / coalesce(nullif(greatest(1.4826 * j.mad, 0.1 * j.median), 0), j.least), 2)) s(score)
 WHERE s.score >= 3.5 OR (s.score <= -3.5 AND j.day < (now() AT TIME ZONE 'UTC')::date);
COMMENT ON VIEW keyvault.usage_anomalies IS
    'Days of the last 30 on which a user''s usage is far from its own: a robust z-score of 3.5 or more to either side of the median of the days in the 28 before on which there was usage, of which there have to be 7. Today counts as high only, as it is not over. After Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993). The acting user''s; every user''s for access analyst or admin.';
COMMENT ON COLUMN keyvault.usage_anomalies.user_id IS 'Whose usage.';
COMMENT ON COLUMN keyvault.usage_anomalies.day IS 'Date in UTC.';
COMMENT ON COLUMN keyvault.usage_anomalies.measure IS 'calls, tokens, credits or cost_usd; a day may stand out in several.';
COMMENT ON COLUMN keyvault.usage_anomalies.value IS 'The measure on that day; cost_usd in USD.';
COMMENT ON COLUMN keyvault.usage_anomalies.median IS 'Its median on the days before.';
COMMENT ON COLUMN keyvault.usage_anomalies.mad IS 'The median of the absolute deviations from that.';
COMMENT ON COLUMN keyvault.usage_anomalies.score IS 'Deviations from the median, each the larger of 1.4826 mad, which is a standard deviation where values are normally distributed, and a tenth of the median, or where both are 0, one call, 1000 tokens, one credit, 0.01 USD; negative below it.';
COMMENT ON COLUMN keyvault.usage_anomalies.baseline_days IS 'Days that the median is of.';

CREATE FUNCTION keyvault.usage_chart(user_id text = NULL, days integer = 30, measure text = 'credits') RETURNS SETOF text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    width constant integer := 40;
    whose constant text := coalesce(user_id, keyvault.current_user_id());
    today constant date := (now() AT TIME ZONE 'UTC')::date;
    in_blocks constant boolean := getdatabaseencoding() = 'UTF8';
BEGIN
    IF measure IS NULL OR measure NOT IN ('calls', 'tokens', 'input_tokens', 'cached_tokens', 'output_tokens', 'credits', 'cost_usd') THEN
        RAISE EXCEPTION 'there is no such measure of usage'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Measures are calls, tokens, input_tokens, cached_tokens, output_tokens, credits and cost_usd.';
    END IF;
    IF days IS NULL OR days NOT BETWEEN 1 AND 366 THEN
        RAISE EXCEPTION 'days must be between 1 and 366' USING ERRCODE = 'invalid_parameter_value', HINT = 'Leave it out for 30.';
    END IF;
    RETURN QUERY
    WITH used AS (
        SELECT u.day, sum(CASE measure WHEN 'calls' THEN u.calls WHEN 'tokens' THEN u.tokens WHEN 'input_tokens' THEN u.input_tokens
                                       WHEN 'cached_tokens' THEN u.cached_tokens WHEN 'output_tokens' THEN u.output_tokens
                                       WHEN 'credits' THEN u.credits ELSE u.cost_usd END) AS value
          FROM keyvault._usage u
         WHERE (whose IS NULL OR u.user_id = whose) AND u.day > today - days AND u.day <= today
         GROUP BY u.day
    ), shown AS (
        SELECT today - i AS day, coalesce(u.value, 0) AS value,
               coalesce(round(u.value * width * 8 / nullif(max(u.value) OVER (), 0)), 0)::integer AS eighths,
               to_char(coalesce(u.value, 0), CASE WHEN measure = 'cost_usd' THEN 'FM999,999,999,990.0000'
                                                  WHEN measure = 'credits' THEN 'FM999,999,999,999,990.00'
                                                  ELSE 'FM999,999,999,999,999,990' END) AS label
          FROM generate_series(days - 1, 0, -1) i LEFT JOIN used u ON u.day = today - i
    )
    SELECT format('%s per day (UTC), total %s', measure, trim_scale((SELECT coalesce(sum(s.value), 0) FROM shown s)))
    UNION ALL
    SELECT * FROM (
        SELECT format('%s %s %s', to_char(s.day, 'YYYY-MM-DD'),
                      -- U+2588 is a full block, U+2589 to U+258F are seven to one eighths of one.
                      rpad(CASE WHEN NOT in_blocks THEN repeat('#', (s.eighths + 4) / 8)
                                ELSE repeat(chr(9608), s.eighths / 8)
                                     || CASE WHEN s.eighths % 8 > 0 THEN chr(9616 - s.eighths % 8)
                                             WHEN s.eighths = 0 AND s.value > 0 THEN chr(9615) ELSE '' END END, width),
                      lpad(s.label, max(length(s.label)) OVER ()))
          FROM shown s ORDER BY s.day) lines;
END $$;
COMMENT ON FUNCTION keyvault.usage_chart(text, integer, text) IS
    'A bar per day, in text: usage of a user, or of all that the caller may see where neither user_id nor an identity is given, over the last days (1 to 366), of a measure: calls, tokens, input_tokens, cached_tokens, output_tokens, credits or cost_usd. Bars are 40 characters wide, in eighths. Error: 22023.';
