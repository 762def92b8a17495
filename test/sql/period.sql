-- Months by the calendar: 1.4 million bounds and 120,000 numbers, against a model that knows no date but days since 1970.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;

-- The model is integer arithmetic on the proleptic Gregorian calendar: days from the epoch to a civil date and back
-- by eras of 400 years, which begin in March so that the leap day is a year's last.
CREATE TEMP TABLE months AS
SELECT total AS month, (lag(days) OVER (ORDER BY total DESC) - days)::integer AS length, days
  FROM (SELECT total, (y / 400) * 146097 + (y % 400) * 365 + (y % 400) / 4 - (y % 400) / 100 + (153 * m + 2) / 5 - 719468::bigint AS days
          FROM (SELECT total, (total - 2) / 12 AS y, (total - 2) % 12 AS m FROM generate_series(1970 * 12, 2115 * 12) total) t) d;
SELECT count(*), min(length), max(length), sum(length) FILTER (WHERE month / 12 = 2024) AS leap, sum(length) FILTER (WHERE month / 12 = 2100) AS common
  FROM months;
-- Every day of four years, leap day among them, each at another time of day.
CREATE TEMP TABLE anchors AS
SELECT m.month, d AS day, m.length, (m.days + d - 1) * 86400 + (m.days * 7919 + d * 104729) % 86400 AS seconds, (m.days * 7919 + d * 104729) % 86400 AS clock
  FROM months m, generate_series(1, m.length) d WHERE m.month / 12 BETWEEN 2024 AND 2027;
ANALYZE months; ANALYZE anchors;

SET timezone = 'America/New_York';
-- period n begins on the anchor's day, or on the last of a month that is shorter, at the anchor's time
SELECT count(*) AS cases,
       count(*) FILTER (WHERE keyvault._period_bound(to_timestamp(a.seconds), m.month - a.month)
                              <> to_timestamp((m.days + least(a.day, m.length) - 1) * 86400 + a.clock)) AS wrong
  FROM anchors a JOIN months m ON m.month BETWEEN a.month AND a.month + 959;
-- an instant of any day lies in the period that began last; the first and last instants of periods among them
SELECT count(*) AS cases,
       count(*) FILTER (WHERE keyvault._period_number(to_timestamp(a.seconds), to_timestamp(i.seconds))
                              <> i.month - a.month - (i.seconds < (m.days + least(a.day, m.length) - 1) * 86400 + a.clock)::integer) AS wrong
  FROM anchors a
 CROSS JOIN LATERAL (SELECT m.month, m.days, m.length FROM months m WHERE m.month BETWEEN a.month - 6 AND a.month + 21) m
 CROSS JOIN LATERAL (VALUES (m.month, (m.days + least(a.day, m.length) - 1) * 86400 + a.clock),
                            (m.month, (m.days + least(a.day, m.length) - 1) * 86400 + a.clock - CASE WHEN a.day > 1 OR a.clock > 0 THEN 1 ELSE 0 END),
                            (m.month, (m.days + (a.clock + m.days) % m.length) * 86400 + a.clock / 2)) i(month, seconds);
RESET timezone;

-- A clock that goes back leaves the period that has begun; one that goes on by years leads into the one that contains it.
SELECT keyvault.upsert_user('pe_back') IS NOT NULL AS made;
UPDATE keyvault.credit_balances SET credits_used = 5, period_start = keyvault._period_bound(period_anchor, 30), period_end = keyvault._period_bound(period_anchor, 31),
       due_at = keyvault._period_bound(period_anchor, 31) WHERE user_id = 'pe_back';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pe_back', 1);
SELECT credits_used, period_start = keyvault._period_bound(period_anchor, 30) AS kept FROM keyvault.credit_balances WHERE user_id = 'pe_back';
SELECT credits_used, credits_reset_at > now() + interval '2 years' AS later FROM keyvault.credit_status WHERE user_id = 'pe_back';
UPDATE keyvault.credit_balances SET period_anchor = '1999-12-31 12:00+00', period_start = '2000-01-31 12:00+00', period_end = '2000-02-29 12:00+00' WHERE user_id = 'pe_back';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pe_back', 1);
SELECT credits_used, period_start <= now() AND now() < period_end AS current, extract(day FROM period_start AT TIME ZONE 'UTC') >= 28 AS anchored
  FROM keyvault.credit_balances WHERE user_id = 'pe_back';
SELECT count(*), max(period_end) FROM keyvault.credit_periods WHERE user_id = 'pe_back';

-- A debit begins the period of a plain balance without SQL: to the same end as whatever else does. Nothing used, something, beyond the limit,
-- a plan without limit, one without thresholds, credits agreed with the user, a threshold that the debit itself reaches.
INSERT INTO keyvault.plans (plan, monthly_credits, overage, notice_percents) VALUES ('pe_report', 100, 'report', '{50}'), ('pe_silent', 100, 'block', '{}');
CREATE TEMP TABLE renewed (kind text, plan text, agreed numeric, used numeric);
INSERT INTO renewed VALUES ('unused', 'free', NULL, 0), ('used', 'free', NULL, 7.25), ('over', 'pe_report', NULL, 130), ('unlimited', 'enterprise', NULL, 5),
       ('silent', 'pe_silent', NULL, 3), ('agreed', 'free', 40, 3), ('reaches', 'pe_report', NULL, 60);
SELECT count(keyvault.upsert_user('pe_' || way || '_' || kind)), count(keyvault.set_plan('pe_' || way || '_' || kind, plan, agreed))
  FROM renewed, unnest('{fast,slow}'::text[]) way;
INSERT INTO keyvault.usage_records (user_id, credits) SELECT 'pe_' || way || '_' || kind, used FROM renewed, unnest('{fast,slow}'::text[]) way WHERE used > 0;
DELETE FROM keyvault.credit_periods WHERE user_id LIKE 'pe\_____\_%';
UPDATE keyvault.credit_balances SET period_anchor = '2020-01-31 12:00+00', period_start = '2020-02-29 12:00+00', period_end = '2020-03-31 12:00+00'
 WHERE user_id LIKE 'pe\_____\_%';
SELECT count(keyvault.release_credits(keyvault.reserve_credits(0, user_id => 'pe_slow_' || kind), 'pe_slow_' || kind)) FROM renewed;
-- Two of these debits go the long way: the one that reaches a threshold, for either user.
SET track_functions = 'pl';
BEGIN;
INSERT INTO keyvault.usage_records (user_id, credits) SELECT 'pe_' || way || '_' || kind, CASE kind WHEN 'reaches' THEN 55 ELSE 0.5 END FROM renewed, unnest('{fast,slow}'::text[]) way;
SELECT sum(calls) FROM pg_stat_xact_user_functions WHERE funcname = '_debit_slow';
COMMIT;
RESET track_functions;
CREATE TEMP VIEW outcome AS
SELECT substr(b.user_id, 4, 4) AS way, substr(b.user_id, 9) AS kind, to_jsonb(b) - 'user_id' AS balance, to_jsonb(p) - '{user_id,id}'::text[] AS period,
       (SELECT count(*) FROM keyvault.credit_notices n WHERE n.user_id = b.user_id AND n.period_start = b.period_start) AS notices
  FROM keyvault.credit_balances b LEFT JOIN keyvault.credit_periods p ON p.user_id = b.user_id WHERE b.user_id LIKE 'pe\_____\_%';
SELECT f.kind, f.balance = s.balance AS same_balance, f.period IS NOT DISTINCT FROM s.period AS same_period, f.period IS NOT NULL AS closed, f.notices, s.notices AS of_slow
  FROM outcome f JOIN outcome s USING (kind) WHERE f.way = 'fast' AND s.way = 'slow' ORDER BY 1;
SELECT kind, balance ->> 'monthly_credits' AS monthly, balance ->> 'credits_used' AS used, balance ->> 'notice_at' AS notice_at,
       balance -> 'due_at' = balance -> 'period_end' AS due_at_end, (balance ->> 'period_end')::timestamptz > now() AS current,
       period ->> 'credits_used' AS before, period ->> 'overage' AS overage, period ->> 'plan' AS plan
  FROM outcome WHERE way = 'fast' ORDER BY 1;
SELECT count(*) FROM keyvault.verify_ledger() v WHERE v.user_id LIKE 'pe\_____\_%';

-- With a budget or a grant more is to be done.
SELECT keyvault.set_budget('pe_fast_agreed', 20) IS NOT NULL AS budgeted, keyvault.grant_credits('pe_slow_agreed', 3, 'period') IS NOT NULL AS granted;
UPDATE keyvault.credit_balances SET period_end = now() WHERE user_id IN ('pe_fast_agreed', 'pe_slow_agreed');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pe_fast_agreed', 2), ('pe_slow_agreed', 42);
SELECT user_id, credits_used, extra_credits, notice_at FROM keyvault.credit_balances WHERE user_id IN ('pe_fast_agreed', 'pe_slow_agreed') ORDER BY 1;
SELECT spent::float FROM keyvault.credit_budgets WHERE user_id = 'pe_fast_agreed';
UPDATE keyvault.credit_balances SET period_end = now() WHERE user_id = 'pe_slow_agreed';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pe_slow_agreed', 1);
SELECT credits_used, extra_credits, extra_spent FROM keyvault.credit_balances WHERE user_id = 'pe_slow_agreed';

-- An administrator's trigger sees the period begin; the table's own has nothing to add.
CREATE FUNCTION pg_temp.tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'from % to %', OLD.credits_used, NEW.credits_used; RETURN NEW; END $$;
CREATE TRIGGER tell BEFORE UPDATE OF period_start ON keyvault.credit_balances FOR EACH ROW EXECUTE FUNCTION pg_temp.tell();
UPDATE keyvault.credit_balances SET period_end = now() WHERE user_id = 'pe_fast_used';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pe_fast_used', 2);
DROP TRIGGER tell ON keyvault.credit_balances;
SELECT credits_used FROM keyvault.credit_balances WHERE user_id = 'pe_fast_used';
-- A plan that is not there.
UPDATE keyvault.credit_balances SET period_end = now() WHERE user_id = 'pe_fast_used';
UPDATE keyvault.users SET plan = 'pe_lost' WHERE user_id = 'pe_fast_used';
\set VERBOSITY terse
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pe_fast_used', 2);
\set VERBOSITY default
UPDATE keyvault.users SET plan = 'free' WHERE user_id = 'pe_fast_used';
SELECT count(keyvault.set_plan(user_id, 'free')) FROM keyvault.users WHERE user_id LIKE 'pe\_____\_%';
DELETE FROM keyvault.plans WHERE plan LIKE 'pe\_%';
