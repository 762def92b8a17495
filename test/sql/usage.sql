-- The views of usage: equal to the plain query at any point, whatever was added up when.
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS keyvault CASCADE;
CREATE EXTENSION keyvault CASCADE;
\set VERBOSITY terse
CREATE VIEW pg_temp.plain AS
SELECT user_id, (created_at AT TIME ZONE 'UTC')::date AS day, provider, model, type, payer, count(*) AS calls,
       sum(input_tokens)::bigint AS input_tokens, sum(cached_tokens)::bigint AS cached_tokens, sum(output_tokens)::bigint AS output_tokens,
       sum(tokens)::bigint AS tokens, sum(credits) AS credits, sum(cost_usd) AS cost_usd, sum(credits_overrun) AS credits_overrun
  FROM keyvault.usage_records WHERE user_id LIKE 'us\_%' GROUP BY 1, 2, 3, 4, 5, 6;
CREATE VIEW pg_temp.seen AS SELECT * FROM keyvault.usage_by_day WHERE user_id LIKE 'us\_%';
CREATE VIEW pg_temp.wrong AS
SELECT user_id, day, calls, credits, 'missing' AS why FROM (TABLE pg_temp.plain EXCEPT TABLE pg_temp.seen) m
UNION ALL SELECT user_id, day, calls, credits, 'too much' FROM (TABLE pg_temp.seen EXCEPT TABLE pg_temp.plain) t;
CREATE VIEW pg_temp.where_counted AS
SELECT (SELECT coalesce(sum(calls), 0) FROM keyvault.usage_daily WHERE user_id LIKE 'us\_%') AS daily,
       (SELECT coalesce(sum(calls), 0) FROM keyvault.usage_late WHERE user_id LIKE 'us\_%') AS late,
       (SELECT coalesce(sum(calls), 0) FROM keyvault.usage_retired WHERE user_id LIKE 'us\_%') AS retired;
-- Adds up what is there: a transaction of the server's own, such as autovacuum's, may hold the roll-up back for a moment.
CREATE FUNCTION pg_temp.roll_up() RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    outcome record;
BEGIN
    LOOP
        SELECT * INTO STRICT outcome FROM keyvault.run_maintenance('roll-up');
        EXIT WHEN NOT EXISTS (SELECT FROM keyvault.usage_records, keyvault.usage_rollup
                               WHERE debit_tag >= rolled_to AND debit_tag < tag_base + pg_current_xact_id()::text::bigint);
        PERFORM pg_sleep(0.01);
    END LOOP;
    RETURN outcome.job || ': ' || outcome.detail;
END $$;
INSERT INTO keyvault.plans (plan, monthly_credits, price_usd) VALUES ('us_free', NULL, 9.50);
SELECT keyvault.upsert_user('us_a', plan => 'us_free'), keyvault.upsert_user('us_b', plan => 'us_free'), keyvault.upsert_user('us_c');

-- Fresh records, of any time.
INSERT INTO keyvault.usage_records (user_id, created_at, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens, credits, cost_usd)
SELECT 'us_' || substr('ab', 1 + i % 2, 1), timestamptz '2021-03-01 00:00+00' + i * interval '7 hours', 'chat', nullif('p' || i % 3, 'p0'), nullif('m' || i % 4, 'm0'),
       CASE i % 5 WHEN 0 THEN 'user' ELSE 'platform' END, nullif(i % 7, 0), nullif(i % 3, 0), NULL, i, i / 8.0, i / 1000.0
  FROM generate_series(1, 300) i;
TABLE pg_temp.wrong;
TABLE pg_temp.where_counted;
SELECT pg_temp.roll_up();
TABLE pg_temp.wrong;
TABLE pg_temp.where_counted;
SELECT count FROM keyvault.run_maintenance('roll-up');
TABLE pg_temp.where_counted;
-- more of the same days, and a record of this transaction, which is not added up before it ends
INSERT INTO keyvault.usage_records (user_id, created_at, type, provider, model, input_tokens, tokens, credits) SELECT 'us_a', timestamptz '2021-03-02 00:00+00', 'chat', 'p1', 'm1', 5, 6, 7 FROM generate_series(1, 3);
BEGIN;
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits) VALUES ('us_a', '2021-03-02', 'chat', 1);
SELECT pg_temp.roll_up();
TABLE pg_temp.wrong;
TABLE pg_temp.where_counted;
ROLLBACK;
TABLE pg_temp.wrong;
SELECT pg_temp.roll_up();
TABLE pg_temp.wrong;

-- Records that another transaction wrote: counted by the statement that brings them, each level of savepoints by itself.
INSERT INTO keyvault.usage_records (user_id, created_at, credits, tokens, debit_tag) SELECT 'us_b', '2021-03-05', 2, 3, i FROM generate_series(1, 4) i;
COPY keyvault.usage_records (user_id, created_at, type, provider, model, tokens, credits, debit_tag) FROM stdin;
us_b	2021-03-05 10:00+00	chat	p1	\N	10	1	17
us_c	2021-03-06 10:00+00	chat	\N	m1	20	2	18
\.
BEGIN;
INSERT INTO keyvault.usage_records (user_id, created_at, credits, debit_tag) VALUES ('us_b', '2021-03-05', 1, 20);
SAVEPOINT a;
INSERT INTO keyvault.usage_records (user_id, created_at, credits, debit_tag) VALUES ('us_b', '2021-03-05', 100, 21);
ROLLBACK TO a;
SAVEPOINT b;
INSERT INTO keyvault.usage_records (user_id, created_at, credits, debit_tag) VALUES ('us_b', '2021-03-05', 4, 22);
RELEASE b;
COMMIT;
CREATE FUNCTION pg_temp.meddle() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.type = 'outer' THEN
        BEGIN
            INSERT INTO keyvault.usage_records (user_id, created_at, type, credits, debit_tag) VALUES (NEW.user_id, NEW.created_at, 'inner', 16, 30);
            RAISE EXCEPTION 'roll the inner row back';
        EXCEPTION WHEN raise_exception THEN
        END;
        INSERT INTO keyvault.usage_records (user_id, created_at, type, credits, debit_tag) VALUES (NEW.user_id, NEW.created_at, 'inner', 32, 31);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER meddle AFTER INSERT ON keyvault.usage_records FOR EACH ROW EXECUTE FUNCTION pg_temp.meddle();
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits, debit_tag) VALUES ('us_c', '2021-03-07', 'outer', 1, 32), ('us_c', '2021-03-07', 'outer', 2, 33);
DROP TRIGGER meddle ON keyvault.usage_records;
-- a partition that lacks the statement trigger
CREATE TABLE keyvault.usage_records_bare (LIKE keyvault.usage_records INCLUDING ALL);
ALTER TABLE keyvault.usage_records ATTACH PARTITION keyvault.usage_records_bare FOR VALUES FROM ('1998-01-01') TO ('1998-02-01');
INSERT INTO keyvault.usage_records_bare (user_id, credits, created_at, debit_tag) VALUES ('us_c', 8, '1998-01-05', 34);
TABLE pg_temp.wrong;
TABLE pg_temp.where_counted;
SELECT pg_temp.roll_up();
TABLE pg_temp.wrong;
TABLE pg_temp.where_counted;
-- Tags of this installation: below the horizon they count as restored, above it the views find them.
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits, debit_tag)
SELECT 'us_c', '1998-01-08', 'tag', 1, tag FROM keyvault.usage_rollup, unnest(ARRAY[tag_base, rolled_to - 1, rolled_to + 1000000, tag_base + (1::bigint << 48) - 1]) tag;
TABLE pg_temp.wrong;
SELECT calls, credits FROM keyvault.usage_late WHERE type = 'tag';
SELECT pg_temp.roll_up();
TABLE pg_temp.wrong;
-- All of it anew.
SELECT keyvault.rebuild_usage_daily() > 0 AS rebuilt;
TABLE pg_temp.wrong;
-- Records that came behind the triggers' back are counted by that alone.
ALTER TABLE keyvault.usage_records_bare DISABLE TRIGGER ALL;
INSERT INTO keyvault.usage_records_bare (user_id, credits, created_at, debit_tag) VALUES ('us_c', 9, '1998-01-06', 35);
ALTER TABLE keyvault.usage_records_bare ENABLE TRIGGER ALL;
TABLE pg_temp.wrong;
SELECT keyvault.rebuild_usage_daily() > 0 AS rebuilt;
TABLE pg_temp.wrong;
-- What makes a lost row again truncates nothing, which a subscriber would carry out.
BEGIN;
CREATE FUNCTION pg_temp.refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION '% of %', TG_OP, TG_TABLE_NAME; END$$;
CREATE TRIGGER refuse BEFORE TRUNCATE ON keyvault.usage_rollup FOR EACH STATEMENT EXECUTE FUNCTION pg_temp.refuse();
DELETE FROM keyvault.usage_rollup;
SELECT keyvault.rebuild_usage_daily() > 0 AS rebuilt;
TABLE pg_temp.wrong;
SELECT count(*) FROM keyvault.usage_rollup;
ROLLBACK;

-- The other views say the same.
SELECT user_id, month, calls, tokens, credits FROM keyvault.usage_by_month WHERE user_id LIKE 'us\_%' AND month < '2021-04-01' ORDER BY 1, 2;
SELECT user_id, provider, model, calls, credits FROM keyvault.usage_by_model WHERE user_id = 'us_a' AND month = '2021-03-01' ORDER BY 1, 2, 3;
SELECT user_id, payer, provider, calls, cost_usd FROM keyvault.cost_by_payer WHERE user_id = 'us_a' AND month = '2021-03-01' ORDER BY 1, 2, 3;
UPDATE keyvault.users SET created_at = '2021-02-20' WHERE user_id = 'us_a';
SELECT month, plan, revenue_usd, provider_cost_usd, margin_usd, margin, own_key_cost_usd, credits
  FROM keyvault.revenue_by_user WHERE user_id = 'us_a' AND month BETWEEN '2021-01-01' AND '2021-06-01' ORDER BY 1;

-- Months: those that are over move out of the default partition, old ones are retired; nothing of it is seen.
CREATE TABLE pg_temp.before AS TABLE pg_temp.seen;
CREATE VIEW pg_temp.changed AS SELECT * FROM (TABLE pg_temp.before EXCEPT TABLE pg_temp.seen) a UNION ALL (TABLE pg_temp.seen EXCEPT TABLE pg_temp.before);
CREATE VIEW pg_temp.partitions AS
SELECT r.tableoid::regclass AS partition, count(*) FROM keyvault.usage_records r WHERE user_id LIKE 'us\_%' GROUP BY 1 ORDER BY 1::text;
TABLE pg_temp.partitions;
SELECT job, detail, count FROM keyvault.run_maintenance('partitions');
TABLE pg_temp.partitions;
SELECT job, count FROM keyvault.run_maintenance('partitions');
TABLE pg_temp.wrong;
-- a record of a moved month finds its partition, and is debited and counted there
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits) VALUES ('us_b', '2021-03-09', 'chat', 5) ;
UPDATE keyvault.usage_records SET credits = 0 WHERE user_id = 'us_b';
DELETE FROM keyvault.usage_records_2021_03;
TABLE pg_temp.wrong;
DROP TABLE pg_temp.before CASCADE;
CREATE TABLE pg_temp.before AS TABLE pg_temp.seen;
CREATE VIEW pg_temp.changed AS SELECT * FROM (TABLE pg_temp.before EXCEPT TABLE pg_temp.seen) a UNION ALL (TABLE pg_temp.seen EXCEPT TABLE pg_temp.before);

-- Nothing is retired unless a retention is set, while a period needs it, or while it is not added up.
SELECT job, detail, count FROM keyvault.run_maintenance('retention');
SELECT keyvault._retire_usage('2021-05-01');
UPDATE keyvault.credit_balances SET period_start = '2021-04-30' WHERE user_id LIKE 'us\_%';
SELECT keyvault._retire_usage('2021-05-01');
SELECT pg_temp.roll_up();
SELECT keyvault._retire_usage('2021-05-01'), keyvault._retire_usage('2021-05-01'), keyvault._retire_usage('2021-05-01');
UPDATE keyvault.credit_balances SET period_start = date_trunc('month', now()) WHERE user_id LIKE 'us\_%';
TABLE pg_temp.partitions;
TABLE pg_temp.changed;
TABLE pg_temp.where_counted;
SELECT pg_temp.roll_up();
TABLE pg_temp.where_counted;
TABLE pg_temp.changed;
SELECT count(*) FROM keyvault.usage_daily WHERE calls = 0;
-- a record of a retired month adds to it, and its table is in nobody's way
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits) VALUES ('us_b', '2021-03-09', 'chat', 5);
SELECT user_id, day, type, calls, credits FROM (TABLE pg_temp.seen EXCEPT TABLE pg_temp.before) a;
SELECT job, count FROM keyvault.run_maintenance('partitions');
SELECT keyvault.rebuild_usage_daily() > 0 AS rebuilt;
SELECT user_id, day, type, calls, credits FROM (TABLE pg_temp.seen EXCEPT TABLE pg_temp.before) a;
SELECT count(*), sum(credits) FROM keyvault.usage_records_2021_03;
DROP TABLE keyvault.usage_records_2021_03, keyvault.usage_records_2021_04, keyvault.usage_records_bare;

-- Anomalies: against a user's own days, with usage on 7 of the 28 before.
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits, tokens)
SELECT 'us_x', now() - i * interval '1 day', 'chat', CASE i WHEN 3 THEN 400 WHEN 2 THEN 1 ELSE 10 + i % 3 END, 5 FROM generate_series(2, 20) i;
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits) SELECT 'us_y', now() - i * interval '1 day', 'chat', CASE i WHEN 1 THEN 90 ELSE 1 END FROM generate_series(1, 7) i;
SELECT user_id, (now() AT TIME ZONE 'UTC')::date - day AS days_ago, measure, trim_scale(value) AS value, trim_scale(median) AS median, trim_scale(mad) AS mad, score, baseline_days
  FROM keyvault.usage_anomalies WHERE user_id LIKE 'us\_%' ORDER BY 1, 2 DESC;
INSERT INTO keyvault.usage_records (user_id, created_at, type, credits) SELECT 'us_y', now() - i * interval '1 day', 'chat', 1 FROM generate_series(8, 8) i;
SELECT user_id, (now() AT TIME ZONE 'UTC')::date - day AS days_ago, measure, trim_scale(value) AS value, score, baseline_days FROM keyvault.usage_anomalies WHERE user_id = 'us_y';

-- The chart; dates are the test's own.
SELECT regexp_replace(line, '20[0-9-]{8}', 'DAY') FROM keyvault.usage_chart('us_x', 6) line;
SELECT regexp_replace(line, '20[0-9-]{8}', 'DAY') FROM keyvault.usage_chart('us_nobody', 2, 'calls') line;
SELECT keyvault.usage_chart('us_x', 0);
SELECT keyvault.usage_chart('us_x', measure => 'tears');
BEGIN;
SELECT keyvault.act_as('us_y');
SELECT regexp_replace(line, '20[0-9-]{8}', 'DAY') FROM keyvault.usage_chart(days => 2) line;
COMMIT;
SELECT keyvault.run_maintenance('nonsense');

-- Answers are kept as long as the setting says; what has not ended stays, and usage stays.
SELECT keyvault.store_platform_key('openai', 'sk-regress-of-the-platform') IS NOT NULL AS stored;
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "messages": []}', user_id => 'us_c') AS open_request \gset
INSERT INTO keyvault.requests (user_id, id, provider, type, path, payer, status, timeout_ms, estimated_usd, body, finished_at)
SELECT 'us_c', id::uuid, 'openai', 'chat', '/', 'user', 'done', 1, 0, '{}', ended
  FROM (VALUES ('01700000-0000-7000-8000-000000000001', timestamptz '2020-01-01'), ('01700000-0000-7000-8000-000000000002', now()), ('01700000-0000-7000-8000-000000000003', NULL)) r(id, ended);
INSERT INTO keyvault.responses (user_id, id, status, payer) VALUES ('us_c', '01700000-0000-7000-8000-000000000001', 'done', 'user'), ('us_c', '01700000-0000-7000-8000-000000000002', 'done', 'user');
SELECT keyvault._hold_credits('us_c', 5, now() - interval '1 second', false) IS NOT NULL AS held;
SELECT job, detail, count FROM keyvault.run_maintenance('purge');
SELECT right(id::text, 1) AS id, (SELECT count(*) FROM keyvault.responses a WHERE a.id = r.id) AS answers FROM keyvault.requests r WHERE user_id = 'us_c' AND id <> :'open_request' ORDER BY 1;
SELECT count(*) FROM keyvault.requests WHERE id = :'open_request';
SELECT count(*) FROM keyvault.credit_holds WHERE user_id = 'us_c' AND expires_at < now() AND amount > 0;
SELECT keyvault.cancel_request(:'open_request');

-- A month's bounds are the same whatever date order and time zone the session reads and writes.
CREATE FUNCTION pg_temp.bounds(style text, zone text, month timestamptz) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('datestyle', style, true), set_config('timezone', zone, true);
    PERFORM keyvault._make_usage_partition(month);
    PERFORM set_config('datestyle', 'ISO', true), set_config('timezone', 'UTC', true);
    RETURN (SELECT c.relname || ' ' || pg_get_expr(c.relpartbound, c.oid) FROM pg_class c WHERE c.oid = ('keyvault.' || keyvault._usage_partition_name(month))::regclass);
END $$;
BEGIN;
SELECT pg_temp.bounds(style, zone, month) FROM (VALUES
    ('SQL, DMY', 'Asia/Shanghai', timestamptz '2031-02-01 00:00+00'), ('SQL, DMY', 'Asia/Kolkata', '2031-03-01 00:00+00'), ('German', 'America/New_York', '2031-04-01 00:00+00'),
    ('Postgres, MDY', 'Asia/Kolkata', '2031-05-01 00:00+00'), ('ISO', 'America/St_Johns', '2031-06-01 00:00+00')) s(style, zone, month);
ROLLBACK;

-- A month that was detached is whoever's keeps it: emptied, or moved out of the extension's way.
BEGIN;
SELECT keyvault._make_usage_partition('2031-02-01 00:00+00');
INSERT INTO keyvault.usage_records_2031_02 (user_id, created_at, credits) VALUES ('us_c', '2031-02-03', 0);
SAVEPOINT a;
TRUNCATE keyvault.usage_records_2031_02;
ROLLBACK TO a;
ALTER TABLE keyvault.usage_records DETACH PARTITION keyvault.usage_records_2031_02;
TRUNCATE keyvault.usage_records_2031_02;
SELECT count(*) FROM keyvault.usage_records_2031_02;
SAVEPOINT a;
TRUNCATE keyvault.usage_records;
ROLLBACK TO a;
TRUNCATE keyvault.usage_records_default;
ROLLBACK TO a;
CREATE SCHEMA us_archive;
ALTER TABLE keyvault.usage_records_2031_02 SET SCHEMA us_archive;
SET LOCAL client_min_messages = warning;
DROP EXTENSION keyvault CASCADE;
SELECT count(*) FROM us_archive.usage_records_2031_02;
ROLLBACK;
