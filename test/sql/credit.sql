-- The debit: exact, and impossible to get round.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE ROLE regress_kv_app;
SELECT keyvault.grant_access('regress_kv_app', 'app');
CREATE VIEW pg_temp.used AS SELECT user_id, credits_used, credits_held FROM keyvault.credit_balances WHERE user_id LIKE 'cr\_%' ORDER BY 1;

CREATE FUNCTION pg_temp.refusal(statement text) RETURNS TABLE (state text, message text, detail text, hint text) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE statement;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    hint := regexp_replace(hint, '[0-9]{4}-[0-9]{2}-[0-9]{2} 00:00 UTC', 'DATE');
    RETURN NEXT;
END $$;
SELECT keyvault.upsert_user('cr_a'), keyvault.upsert_user('cr_b');
SELECT plan, monthly_credits, credits_used, credits_remaining, credits_reset_at > now() AS renewed_later FROM keyvault.credit_status WHERE user_id = 'cr_a';

-- To the last micro-credit, and no further.
INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits, metadata) VALUES ('cr_a', 'chat', 'gpt-5-mini', 10, 999.999999, '{}');
\x on
SELECT * FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits) VALUES ('cr_a', 'chat', 'gpt-5-mini', 10, 0.000002)$$);
\x off
INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits) VALUES ('cr_a', 'chat', 'gpt-5-mini', 10, 0.000001);
\set VERBOSITY sqlstate
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_a', 0.000001);
\set VERBOSITY terse
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_a', 0);
SELECT * FROM pg_temp.used;
SELECT count(*), sum(credits) FROM keyvault.usage_records WHERE user_id = 'cr_a';

-- Plans: at once, and unlimited.
SELECT keyvault.set_plan('cr_a', 'pro');
SELECT plan, monthly_credits, credits_used, credits_remaining FROM keyvault.credit_status WHERE user_id = 'cr_a';
SELECT keyvault.set_plan('cr_a', 'enterprise');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_a', 100000);
SELECT plan, monthly_credits, credits_used, credits_remaining FROM keyvault.credit_status WHERE user_id = 'cr_a';
SELECT keyvault.set_plan('cr_a', 'free');
SELECT plan, monthly_credits, credits_used, credits_remaining FROM keyvault.credit_status WHERE user_id = 'cr_a';
SELECT keyvault.set_plan('cr_a', 'gold');
-- A customer who pays before the first use.
SELECT keyvault.set_plan('cr_pays', 'pro');
SELECT plan, monthly_credits, credits_used, credits_remaining FROM keyvault.credit_status WHERE user_id = 'cr_pays';
SET keyvault.create_users = off;
SELECT keyvault.set_plan('cr_nobody', 'pro');
RESET keyvault.create_users;
SELECT keyvault.upsert_user('cr_a', plan => 'gold');
SELECT keyvault.upsert_user(NULL);

-- Many rows of many users in one statement: one debit each, whichever way they come.
INSERT INTO keyvault.usage_records (user_id, credits) SELECT 'cr_m' || i % 3, 1.5 FROM generate_series(1, 300) i;
COPY keyvault.usage_records (user_id, credits) FROM stdin;
cr_m0	10
cr_m1	20
cr_m0	30
\.
WITH written AS (INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_m0', 1) RETURNING 1) SELECT count(*) FROM written;
MERGE INTO keyvault.usage_records t USING (VALUES ('cr_m1', 2.0)) s(user_id, credits) ON false
  WHEN NOT MATCHED THEN INSERT (user_id, credits) VALUES (s.user_id, s.credits);
INSERT INTO keyvault.usage_records_default (user_id, credits, created_at) VALUES ('cr_m2', 4, '2001-01-01');
-- a partition without the statement trigger is debited before commit
CREATE TABLE keyvault.usage_records_bare (LIKE keyvault.usage_records INCLUDING ALL);
ALTER TABLE keyvault.usage_records ATTACH PARTITION keyvault.usage_records_bare FOR VALUES FROM ('1999-01-01') TO ('1999-02-01');
INSERT INTO keyvault.usage_records_bare (user_id, credits, created_at) VALUES ('cr_m2', 8, '1999-01-05');
SET session_replication_role = replica;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_m2', 16);
RESET session_replication_role;
-- a conflict debits only what was inserted
INSERT INTO keyvault.usage_records (user_id, created_at, id, credits) VALUES ('cr_m2', '2001-02-01', '00000000-0000-7000-8000-000000000001', 32);
INSERT INTO keyvault.usage_records (user_id, created_at, id, credits) VALUES ('cr_m2', '2001-02-01', '00000000-0000-7000-8000-000000000001', 64)
  ON CONFLICT DO NOTHING;
SELECT * FROM pg_temp.used WHERE user_id LIKE 'cr\_m%';
SELECT user_id, sum(credits) FROM keyvault.usage_records WHERE user_id LIKE 'cr\_m%' GROUP BY 1 ORDER BY 1;

-- What is rolled back is not debited, what is not, is; also from inside other triggers.
BEGIN;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_s', 1);
SAVEPOINT a;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_s', 2);
ROLLBACK TO a;
SAVEPOINT b;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_s', 4);
RELEASE b;
COMMIT;
SELECT * FROM pg_temp.used WHERE user_id = 'cr_s';
CREATE FUNCTION pg_temp.meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.type = 'outer' THEN
        BEGIN
            INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES (NEW.user_id, 'inner', 16);
            RAISE EXCEPTION 'roll the inner row back';
        EXCEPTION WHEN raise_exception THEN
        END;
        INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES (NEW.user_id, 'inner', 32);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER meddle AFTER INSERT ON keyvault.usage_records FOR EACH ROW EXECUTE FUNCTION pg_temp.meddle();
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('cr_t', 'outer', 1), ('cr_t', 'outer', 2);
DROP TRIGGER meddle ON keyvault.usage_records;
SELECT * FROM pg_temp.used WHERE user_id = 'cr_t';
SELECT sum(credits) FROM keyvault.usage_records WHERE user_id = 'cr_t';
BEGIN;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_p', 7);
PREPARE TRANSACTION 'regress_kv';
COMMIT PREPARED 'regress_kv';
SELECT * FROM pg_temp.used WHERE user_id = 'cr_p';

-- A refused statement leaves nothing, of other users either.
\set VERBOSITY sqlstate
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_q', 1), ('cr_r', 1001);
\set VERBOSITY terse
SELECT * FROM pg_temp.used WHERE user_id IN ('cr_q', 'cr_r');

-- Bad amounts.
\set VERBOSITY sqlstate
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_b', 'NaN');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_b', 'Infinity');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_b', -1);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_b', 1e12);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('', 1);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES (repeat('x', 256), 1);
-- Records stay as they are.
UPDATE keyvault.usage_records SET credits = 0;
DELETE FROM keyvault.usage_records;
TRUNCATE keyvault.usage_records;
UPDATE keyvault.usage_records_default SET credits = 0;
TRUNCATE keyvault.usage_records_default;
\set VERBOSITY terse

-- A trusted application's insert debits; the tag that marks restored rows is not its to give.
SET ROLE regress_kv_app;
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('cr_app', 'chat', 3);
INSERT INTO keyvault.usage_records (user_id, type, credits, debit_tag) VALUES ('cr_app', 'chat', 3, 0);
INSERT INTO keyvault.usage_records_default (user_id, type, credits) VALUES ('cr_app', 'chat', 3);
COPY keyvault.usage_records FROM stdin;
\.
SET keyvault.create_users = off;
RESET ROLE;
SELECT * FROM pg_temp.used WHERE user_id = 'cr_app';
-- Without create_users a user has to be made first.
SET keyvault.create_users = off;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_unknown', 1);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_unknown', 0);
RESET keyvault.create_users;
-- A row that was debited elsewhere is recognised.
INSERT INTO keyvault.usage_records (user_id, credits, debit_tag) VALUES ('cr_b', 500, 12345);
SELECT * FROM pg_temp.used WHERE user_id = 'cr_b';

-- Holds count until they are released or expire; an expired one gives way without being swept.
SELECT keyvault._hold_credits('cr_b', 900, 'infinity', false) AS hold \gset
SELECT keyvault._hold_credits('cr_b', 90, now() + interval '1 hour', false) AS expiring \gset
\set VERBOSITY sqlstate
SELECT keyvault._hold_credits('cr_b', 11, 'infinity', false);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_b', 11);
\set VERBOSITY terse
SELECT credits_held, credits_remaining FROM keyvault.credit_status WHERE user_id = 'cr_b';
UPDATE keyvault.credit_holds SET expires_at = now() - interval '1 second' WHERE id = :'expiring';
SELECT credits_held, credits_remaining FROM keyvault.credit_status WHERE user_id = 'cr_b';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_b', 11);
SELECT * FROM pg_temp.used WHERE user_id = 'cr_b';
SELECT keyvault._release_hold('cr_b', :'hold'), keyvault._release_hold('cr_b', :'hold');
SELECT * FROM pg_temp.used WHERE user_id = 'cr_b';

-- Periods: anchor + n months, in UTC, whatever the session's time zone.
SET timezone = 'America/New_York';
SELECT n, keyvault._period_bound('2024-01-31 00:00+00', n) AT TIME ZONE 'UTC' AS bound FROM generate_series(0, 4) n;
RESET timezone;
-- every instant lies in the period of its number, for all anchors and days of nine years, leap years among them
SELECT count(*) AS cases, count(*) FILTER (WHERE NOT (keyvault._period_bound(a, n) <= t AND t < keyvault._period_bound(a, n + 1))) AS wrong
  FROM (SELECT a, t, keyvault._period_number(a, t) AS n
          FROM generate_series('2023-12-27 13:00+00'::timestamptz, '2024-03-02 13:00+00', '1 day') a,
               generate_series('2020-01-01 12:59:59.999999+00'::timestamptz, '2029-01-01', '1 day 1 microsecond') t) c;

-- A period that ended is renewed by the first debit, and seen as renewed before it.
UPDATE keyvault.credit_balances SET credits_used = 1000, extra_credits = 5, period_anchor = '2020-01-31', period_start = '2020-01-31', period_end = '2020-02-29'
 WHERE user_id = 'cr_a';
SELECT credits_used, extra_credits, credits_remaining, credits_reset_at > now() AND credits_reset_at < now() + interval '32 days' AS renewed
  FROM keyvault.credit_status WHERE user_id = 'cr_a';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_a', 10);
SELECT credits_used, extra_credits, period_start <= now() AND period_end > now() AS current, period_anchor = '2020-01-31' AS anchored
  FROM keyvault.credit_balances WHERE user_id = 'cr_a';
-- extra credits are spent after the monthly ones, and what is left of them is kept
UPDATE keyvault.credit_balances SET credits_used = 1003, extra_credits = 5, period_start = '2020-01-31', period_end = '2020-02-29' WHERE user_id = 'cr_a';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_a', 1002);
\set VERBOSITY sqlstate
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('cr_a', 0.000001);
\set VERBOSITY terse
SELECT credits_used, extra_credits FROM keyvault.credit_balances WHERE user_id = 'cr_a';

-- Usage by day.
SELECT day, type, payer, calls, credits FROM keyvault.usage_by_day WHERE user_id = 'cr_m2' AND day < '2010-01-01' ORDER BY 1;

SELECT keyvault.revoke_access('regress_kv_app', 'app');
DROP ROLE regress_kv_app;
