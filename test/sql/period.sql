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
