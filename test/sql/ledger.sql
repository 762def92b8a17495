-- Balances explained, as they were, and proved.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
-- Let a user's period have ended, and grants have expired, as though time had passed.
CREATE FUNCTION pg_temp.month_passes(who text) RETURNS void LANGUAGE sql AS $$
UPDATE keyvault.credit_balances SET period_anchor = now() - interval '1 hour', period_start = period_start - interval '1 month',
       period_end = now() - interval '1 hour', due_at = now() - interval '1 hour' WHERE user_id = who;
$$;
CREATE FUNCTION pg_temp.expires(who text, why text) RETURNS void LANGUAGE sql AS $$
UPDATE keyvault.credit_grants SET expires_at = now() - interval '1 minute' WHERE user_id = who AND reason = why;
UPDATE keyvault.credit_balances SET due_at = now() - interval '1 minute' WHERE user_id = who;
$$;
-- What the proof finds in a user with too many credits, so long after its plan was changed.
CREATE FUNCTION pg_temp.proof_after_change(who text, ago interval) RETURNS TABLE (what text, expected numeric, found numeric) LANGUAGE sql AS $$
UPDATE keyvault.plans SET credits_changed_at = now() - ago WHERE plan = 'free';
UPDATE keyvault.credit_balances SET period_start = now(), monthly_credits = 7000 WHERE user_id = who AND slot = 0;
SELECT v.what, v.expected, v.found FROM keyvault.verify_ledger() v WHERE v.user_id = who;
$$;
CREATE VIEW pg_temp.sums AS
SELECT s.user_id, sum(e.credits) FILTER (WHERE e.item <> 'remaining')::float AS lines, max(e.credits) FILTER (WHERE e.item = 'remaining')::float AS remaining,
       max(e.credits) FILTER (WHERE e.item = 'remaining') = s.credits_remaining AS as_status,
       string_agg(e.item || ' ' || e.credits::float, ', ') FILTER (WHERE e.item <> 'remaining') AS items
  FROM keyvault.credit_status s CROSS JOIN LATERAL keyvault.explain_balance(s.user_id) e
 WHERE s.user_id LIKE 'le\_%' GROUP BY s.user_id, s.credits_remaining ORDER BY 1;

-- The lines of explain_balance add up to what remains.
-- a grant that was spent partly in the period before
SELECT keyvault.grant_credits('le_a', 100, 'bought') IS NOT NULL AS granted;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_a', 1040);
SELECT * FROM pg_temp.sums WHERE user_id = 'le_a';
SELECT pg_temp.month_passes('le_a');
SELECT * FROM pg_temp.sums WHERE user_id = 'le_a';
SELECT keyvault.reset_due_credits() >= 1 AS reset;
SELECT * FROM pg_temp.sums WHERE user_id = 'le_a';
SELECT item, credits::float, regexp_replace(note, '[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{5}', 'TIME', 'g') AS note FROM keyvault.explain_balance('le_a');
-- and partly within this one, noted at a further grant
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_a', 1010);
SELECT keyvault.grant_credits('le_a', 50, 'bought too') IS NOT NULL AS granted;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_a', 5);
SELECT * FROM pg_temp.sums WHERE user_id = 'le_a';
-- a grant that expires before anybody notes it, having paid
SELECT keyvault.grant_credits('le_b', 100, 'expires', now() + interval '1 day') IS NOT NULL AS granted, keyvault.grant_credits('le_b', 10, 'stays') IS NOT NULL;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_b', 1070);
SELECT pg_temp.expires('le_b', 'expires');
SELECT * FROM pg_temp.sums WHERE user_id = 'le_b';
SELECT keyvault.reset_due_credits() >= 1 AS reset;
SELECT * FROM pg_temp.sums WHERE user_id = 'le_b';
-- a refund, and holds
SELECT keyvault.record_usage('chat', 'gpt-5-mini', 10, 20, 42, 'le_c') AS usage \gset
SELECT keyvault.refund_usage(:'usage', 'a bad answer', 'le_c') IS NOT NULL AS refunded, keyvault.reserve_credits(7, '1 hour', 'le_c') IS NOT NULL AS held;
SELECT * FROM pg_temp.sums WHERE user_id = 'le_c';
-- a smaller plan, and one that reports
SELECT keyvault.upsert_user('le_d', plan => 'pro') IS NOT NULL AS made;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_d', 2000);
SELECT keyvault.reserve_credits(1500, '1 hour', 'le_d') IS NOT NULL AS held, keyvault.set_plan('le_d', 'free');
SELECT * FROM pg_temp.sums WHERE user_id = 'le_d';
INSERT INTO keyvault.plans (plan, monthly_credits, overage) VALUES ('le_postpaid', 300, 'report');
SELECT keyvault.upsert_user('le_e', plan => 'le_postpaid') IS NOT NULL AS made, keyvault.grant_credits('le_e', 10, 'bought') IS NOT NULL AS granted;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_e', 400);
SELECT * FROM pg_temp.sums WHERE user_id = 'le_e';
-- Credits that come after reported overage can be used at once, and the overage stays reported, once.
SELECT keyvault.grant_credits('le_e', 50, 'top-up') IS NOT NULL AS granted;
SELECT credits_remaining::float AS remaining, credits_overage::float AS overage, monthly_credits::float AS monthly FROM keyvault.credit_status WHERE user_id = 'le_e';
SELECT * FROM pg_temp.sums WHERE user_id = 'le_e';
SELECT b.credits_used::float AS used, b.credits_remaining::float AS remaining FROM keyvault.balance_at('le_e', now()) b;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_e', 30);
SELECT credits_remaining::float AS remaining, credits_overage::float AS overage FROM keyvault.credit_status WHERE user_id = 'le_e';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_e', 27);
SELECT credits_remaining::float AS remaining, credits_overage::float AS overage FROM keyvault.credit_status WHERE user_id = 'le_e';
SELECT * FROM pg_temp.sums WHERE user_id = 'le_e';
-- a larger plan does not count it as used of its own
BEGIN;
SELECT keyvault.set_plan('le_e', 'free');
SELECT credits_remaining::float AS remaining, credits_overage::float AS overage FROM keyvault.credit_status WHERE user_id = 'le_e';
SELECT * FROM pg_temp.sums WHERE user_id = 'le_e';
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'le\_%';
ROLLBACK;
-- and the period's rows add up to all of it
SELECT pg_temp.month_passes('le_e');
SELECT credits_remaining::float AS remaining, credits_overage::float AS overage FROM keyvault.credit_status WHERE user_id = 'le_e';
SELECT keyvault.reset_due_credits() >= 1 AS reset;
SELECT credits_remaining::float AS remaining, credits_overage::float AS overage FROM keyvault.credit_status WHERE user_id = 'le_e';
SELECT ended_by, credits_used::float AS used, extra_spent::float AS extra, overage::float FROM keyvault.credit_periods WHERE user_id = 'le_e' ORDER BY id;
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'le\_%';

-- History stays when its month is retired, and retiring a month again adds up.
BEGIN;
SELECT keyvault.upsert_user('le_h') IS NOT NULL AS made;
UPDATE keyvault.credit_balances SET period_anchor = '2019-01-15', period_start = '2019-03-15', period_end = '2019-04-15' WHERE user_id = 'le_h';
INSERT INTO keyvault.usage_records (user_id, created_at, credits, debit_tag) VALUES ('le_h', '2019-01-20', 100, 0), ('le_h', '2019-02-10', 7, 0), ('le_h', '2019-02-20', 30, 0);
INSERT INTO keyvault.credit_periods (user_id, ended_by, plan, period_start, period_end, ended_at, monthly_credits, credits_covered, credits_used, extra_spent, overage) VALUES
       ('le_h', 'period', 'free', '2019-01-15', '2019-02-15', '2019-02-15', 1000, 0, 107, 0, 0), ('le_h', 'period', 'free', '2019-02-15', '2019-03-15', '2019-03-15', 1000, 0, 30, 0, 0);
CREATE VIEW pg_temp.was AS
SELECT t, b.credits_used::float AS used, b.credits_remaining::float AS remaining
  FROM unnest('{2019-01-16, 2019-02-09, 2019-02-14, 2019-02-21 12:00+00}'::timestamptz[]) t LEFT JOIN LATERAL keyvault.balance_at('le_h', t) b ON true ORDER BY 1;
SELECT * FROM pg_temp.was;
CREATE TEMP TABLE before AS SELECT * FROM pg_temp.was;
SELECT keyvault._make_usage_partition('2019-01-01 00:00+00'), keyvault._make_usage_partition('2019-02-01 00:00+00');
UPDATE keyvault.credit_balances SET period_start = now(), period_end = now() + interval '1 month', due_at = now() + interval '1 month' WHERE period_start < now() - interval '1 year';
SELECT keyvault._retire_usage('2019-03-01 00:00+00'), keyvault._retire_usage('2019-03-01 00:00+00'), keyvault._retire_usage('2019-03-01 00:00+00');
DROP TABLE keyvault.usage_records_2019_01;
SELECT count(*) FROM keyvault.usage_records WHERE user_id = 'le_h';
SELECT * FROM pg_temp.was EXCEPT SELECT * FROM before;
-- of a day there is one sum: where a time, or a period's start, divides it, that is said
\set VERBOSITY default
SELECT t, b.credits_used::float AS used FROM unnest('{2019-01-20 12:00+00, 2019-01-21 00:00+00, 2019-01-21 12:00+00}'::timestamptz[]) t, keyvault.balance_at('le_h', t) b;
SAVEPOINT a;
UPDATE keyvault.credit_balances SET period_anchor = '2019-01-10 12:00+00' WHERE user_id = 'le_h';
SELECT b.credits_used::float AS used FROM keyvault.balance_at('le_h', '2019-02-10 15:00+00') b;
SELECT b.credits_used::float AS used FROM keyvault.balance_at('le_h', '2019-02-12 00:00+00') b;
-- the day of the time is the period's first
UPDATE keyvault.credit_balances SET period_anchor = '2019-01-10 00:00+00' WHERE user_id = 'le_h';
SELECT t, b.credits_used::float AS used FROM unnest('{2019-02-10 00:00+00, 2019-02-10 15:00+00, 2019-02-11 00:00+00}'::timestamptz[]) t, keyvault.balance_at('le_h', t) b;
ROLLBACK TO a;
\set VERBOSITY terse
SELECT * FROM keyvault.verify_ledger() WHERE user_id = 'le_h';
INSERT INTO keyvault.usage_records (user_id, created_at, credits, debit_tag) VALUES ('le_h', '2019-01-21', 5, 0);
SELECT keyvault._make_usage_partition('2019-01-01 00:00+00');
SELECT keyvault._retire_usage('2019-03-01 00:00+00');
SELECT partition, calls, credits FROM keyvault.usage_archived WHERE user_id = 'le_h' ORDER BY 1;
SELECT used FROM pg_temp.was;
SELECT what, expected::float, found::float FROM keyvault.verify_ledger() WHERE user_id = 'le_h';
ROLLBACK;

-- Late records in the default partition are retired by rows, and the sums stay.
BEGIN;
UPDATE keyvault.credit_balances SET period_start = now() - interval '1 day' WHERE period_start < now() - interval '1 month';
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits, input_tokens, debit_tag)
SELECT 'le_l', '2018-05-01 00:00+00'::timestamptz + i * interval '1 hour', 'chat', 1, nullif(i, 0), 0 FROM generate_series(0, 29) i;
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits) VALUES ('le_l', '2018-05-01 12:00+00', 'chat', 1000);
SELECT what, expected::float, found::float FROM keyvault.verify_ledger() WHERE user_id = 'le_l';
CREATE TEMP TABLE by_day AS SELECT * FROM keyvault.usage_by_day WHERE user_id = 'le_l';
-- what the roll-up has not counted waits for it
SELECT keyvault._retire_late_usage(20, '2018-06-01 00:00+00'), keyvault._retire_late_usage(20, '2018-06-01 00:00+00'), keyvault._retire_late_usage(20, '2018-06-01 00:00+00');
SELECT count(*), sum(credits) FROM keyvault.usage_records WHERE user_id = 'le_l';
SELECT count(*) FROM (TABLE by_day EXCEPT SELECT * FROM keyvault.usage_by_day) d;
SELECT what, expected::float, found::float FROM keyvault.verify_ledger() WHERE user_id = 'le_l';
SELECT partition, calls, credits FROM keyvault.usage_archived WHERE user_id = 'le_l';
DELETE FROM keyvault.usage_records WHERE user_id = 'le_l';
ROLLBACK;
-- nothing while a period is open that they may count in
BEGIN;
INSERT INTO keyvault.usage_records (user_id, created_at, credits, debit_tag) VALUES ('le_a', '2018-05-02', 0, 0);
UPDATE keyvault.credit_balances SET period_start = '2018-05-01', period_end = '2018-06-01' WHERE user_id = 'le_a';
SELECT keyvault._retire_late_usage(20, '2018-06-01 00:00+00');
ROLLBACK;
-- a snapshot from before the lock would leave records out
\set VERBOSITY sqlstate
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT keyvault._retire_usage('2018-06-01 00:00+00');
ROLLBACK;
BEGIN ISOLATION LEVEL SERIALIZABLE;
SELECT keyvault._retire_late_usage(20, '2018-06-01 00:00+00');
ROLLBACK;
\set VERBOSITY terse
-- The month of the first records gets its partition in spite of them.
BEGIN;
CREATE TABLE pg_temp.months AS SELECT keyvault._usage_partition_name(m) AS name, m AS begins, keyvault._period_bound(m, 1) AS ends FROM (SELECT date_trunc('month', now(), 'UTC')) t(m);
DO $$
DECLARE
    name text := (SELECT name FROM pg_temp.months);
BEGIN
    IF to_regclass('keyvault.' || name) IS NOT NULL THEN
        EXECUTE format('ALTER TABLE keyvault.usage_records DETACH PARTITION keyvault.%I', name);
        EXECUTE format('DROP TABLE keyvault.%I', name);
    END IF;
    INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_first', 1);
END $$;
SELECT tableoid::regclass FROM keyvault.usage_records WHERE user_id = 'le_first';
SELECT keyvault._make_usage_partitions(0);
SELECT r.tableoid::regclass::text = 'keyvault.' || m.name AS moved FROM keyvault.usage_records r, pg_temp.months m WHERE user_id = 'le_first';
SELECT count(*) FROM keyvault.usage_records_default r, pg_temp.months m WHERE created_at >= begins AND created_at < ends;
SELECT * FROM keyvault.verify_ledger() WHERE user_id = 'le_first';
ROLLBACK;

-- What nothing looks for any more is deleted.
BEGIN;
SELECT keyvault.record_usage('chat', 'gpt-5-mini', 10, 20, 1, 'le_k', idempotency_key => k) IS NOT NULL AS recorded FROM unnest('{old, new}'::text[]) k;
UPDATE keyvault.usage_keys SET created_at = now() - interval '31 days' WHERE user_id = 'le_k' AND idempotency_key = 'old';
INSERT INTO keyvault.credit_notices (user_id, period_start, percent, credits_used, credits_limit, noted_at)
SELECT 'le_k', t, 50, 1, 2, t FROM unnest(ARRAY[now() - interval '4 months', now() - interval '2 months']) t;
INSERT INTO keyvault.credit_holds (user_id, amount, expires_at) SELECT 'le_k', a, now() - t FROM unnest('{0, 3}'::int[]) a, unnest('{8 days, 6 days}'::interval[]) t;
UPDATE keyvault.credit_balances SET credits_held = 6 WHERE user_id = 'le_k';
SELECT purged >= 4 AS purged, more FROM keyvault._purge(100);
SELECT idempotency_key FROM keyvault.usage_keys WHERE user_id = 'le_k';
SELECT count(*) FROM keyvault.credit_notices WHERE user_id = 'le_k' AND percent = 50;
SELECT now() - expires_at AS age, count(*), sum(amount) FROM keyvault.credit_holds WHERE user_id = 'le_k' GROUP BY 1 ORDER BY 1;
SELECT * FROM keyvault.verify_ledger() WHERE user_id = 'le_k';
SELECT purged, more FROM keyvault._purge(100);
ROLLBACK;

-- Thresholds of a larger plan are noted in the same period.
SELECT keyvault.upsert_user('le_n') IS NOT NULL AS made;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_n', 810);
SELECT percent, credits_limit::float FROM keyvault.credit_notices WHERE user_id = 'le_n' ORDER BY 1;
SELECT keyvault.set_plan('le_n', 'free', 1500);
SELECT percent, credits_limit::float FROM keyvault.credit_notices WHERE user_id = 'le_n' ORDER BY 1;
SELECT keyvault.set_plan('le_n', 'pro');
SELECT percent, credits_limit::float FROM keyvault.credit_notices WHERE user_id = 'le_n' ORDER BY 1;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_n', 40000);
SELECT percent, credits_used::float, credits_limit::float FROM keyvault.credit_notices WHERE user_id = 'le_n' ORDER BY 1;

-- A jump from nothing is an anomaly, a few more than nothing is none.
BEGIN;
INSERT INTO keyvault.usage_records (user_id, created_at, credits, tokens, cost_usd, debit_tag)
SELECT 'le_z', now() - i * interval '1 day', CASE i WHEN 1 THEN 500 WHEN 2 THEN 3 ELSE 0 END, CASE i WHEN 1 THEN 9000 ELSE 0 END, CASE i WHEN 2 THEN 0.03 ELSE 0 END, 0
  FROM generate_series(1, 9) i;
SELECT (now() AT TIME ZONE 'UTC')::date - day AS days_ago, measure, trim_scale(value) AS value, trim_scale(median) AS median, score FROM keyvault.usage_anomalies WHERE user_id = 'le_z' ORDER BY 1, 2;
ROLLBACK;

-- What a user brings, by the plan of each month and the grants it paid for; usage from before the user was made counts.
BEGIN;
SELECT keyvault.upsert_user('le_m') IS NOT NULL AS made;
UPDATE keyvault.users SET created_at = '2020-02-10' WHERE user_id = 'le_m';
UPDATE keyvault.credit_balances SET period_anchor = '2020-02-10' WHERE user_id = 'le_m';
INSERT INTO keyvault.credit_periods (user_id, ended_by, plan, period_start, period_end, ended_at, monthly_credits, credits_covered, credits_used, extra_spent, overage) VALUES
       ('le_m', 'plan', 'free', '2020-02-10', '2020-03-10', '2020-03-05', 1000, 0, 0, 0, 0), ('le_m', 'plan', 'pro', '2020-03-10', '2020-04-10', '2020-04-20', 50000, 0, 0, 0, 0);
INSERT INTO keyvault.usage_records (user_id, created_at, credits, cost_usd, payer, debit_tag) VALUES
       ('le_m', '2020-01-20', 1, 3, 'platform', 0), ('le_m', '2020-03-20', 2, 5, 'platform', 0), ('le_m', '2020-03-20', 0, 4, 'user', 0);
INSERT INTO keyvault.credit_grants (user_id, amount, remaining, reason, created_at, price_usd) VALUES ('le_m', 1, 0, 'paid', '2020-04-02', 9.5), ('le_m', 1, 0, 'a gift', '2020-04-02', NULL);
SELECT month, plan, revenue_usd::float AS revenue, provider_cost_usd::float AS cost, margin_usd::float AS earned, margin, own_key_cost_usd::float AS own, credits::float
  FROM keyvault.revenue_by_user WHERE user_id = 'le_m' AND month < '2020-06-01' ORDER BY 1;
SELECT keyvault.grant_credits('le_m', 10, 'bought', idempotency_key => 'k', price_usd => 2.5) = keyvault.grant_credits('le_m', 10, 'bought', idempotency_key => 'k', price_usd => 2.50) AS same;
SELECT revenue_usd::float AS revenue FROM keyvault.revenue_by_user WHERE user_id = 'le_m' ORDER BY month DESC LIMIT 1;
SAVEPOINT a;
SELECT keyvault.grant_credits('le_m', 10, 'bought', idempotency_key => 'k', price_usd => 3);
ROLLBACK TO a;
SELECT keyvault.grant_credits('le_m', 10, 'bought', price_usd => -1);
ROLLBACK TO a;
SELECT keyvault.grant_credits('le_m', 10, 'bought', price_usd => 'NaN');
ROLLBACK;
SELECT a.access, a.privilege LIKE '%revenue\_by\_user%' AS may FROM (SELECT access, string_agg(s, ' ') AS privilege FROM unnest('{app, user, analyst, admin}'::text[]) access, keyvault._access_statements(access) s GROUP BY 1) a ORDER BY 1;

-- Proof: credits that nobody agreed to, and sums that are not those of the records; a plan that changed within the period is none.
BEGIN;
SELECT keyvault.upsert_user('le_t') IS NOT NULL AS made;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('le_t', 12);
SELECT count(*) FROM keyvault.verify_ledger() WHERE user_id LIKE 'le\_%';
SAVEPOINT a;
UPDATE keyvault.credit_balances SET monthly_credits = 5000 WHERE user_id = 'le_t';
INSERT INTO keyvault.usage_daily (user_id, day, provider, model, type, payer, calls, tokens, credits, credits_overrun, cost_usd) VALUES ('le_t', '2020-01-01', '', '', 'x', 'user', 1, 0, 3, 0, 0);
SELECT user_id, what, expected::float, found::float FROM keyvault.verify_ledger() WHERE user_id LIKE 'le\_%' ORDER BY 2;
ROLLBACK TO a;
UPDATE keyvault.credit_balances SET monthly_credits = NULL WHERE user_id = 'le_t';
SELECT user_id, what, expected::float, found::float FROM keyvault.verify_ledger() WHERE user_id LIKE 'le\_%' ORDER BY 2;
ROLLBACK TO a;
UPDATE keyvault.plans SET monthly_credits = 1200 WHERE plan = 'free';
SELECT count(*) FROM keyvault.verify_ledger() WHERE user_id LIKE 'le\_%';
-- from the next period on it counts
UPDATE keyvault.plans SET credits_changed_at = '2020-01-01' WHERE plan = 'free';
SELECT what, expected::float, found::float FROM keyvault.verify_ledger() WHERE user_id = 'le_t';
SELECT keyvault.set_plan('le_t', 'free');
SELECT what FROM keyvault.verify_ledger() WHERE user_id = 'le_t';
-- from a day after the change on, that is: a period that began earlier may have either
SELECT d, what, expected::float, found::float
  FROM unnest('{2 days, 25 hours, 23 hours}'::interval[]) d
 CROSS JOIN LATERAL pg_temp.proof_after_change('le_t', d) ORDER BY d;
ROLLBACK;
