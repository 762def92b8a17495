-- Every way to a usage record is debited, and refused at the limit: the table or a partition, as origin or as replica.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
SELECT keyvault._make_usage_partitions() IS NOT NULL AS made;
RESET client_min_messages;
\set VERBOSITY terse
SELECT keyvault.upsert_user('path_a', plan => 'pro') IS NOT NULL AS made;
CREATE TEMPORARY TABLE path (name text, target text, at timestamptz);
INSERT INTO path SELECT 'table', 'keyvault.usage_records', now();
INSERT INTO path SELECT 'partition', c.oid::regclass::text, now() FROM pg_class c
 WHERE c.oid = to_regclass('keyvault.usage_records_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM'));
INSERT INTO path SELECT 'default partition', 'keyvault.usage_records_default', '2001-01-01';
SELECT name FROM path ORDER BY 1;

CREATE FUNCTION pg_temp.take(target text, at timestamptz, way text, credits numeric) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    before numeric := (SELECT sum(credits_used) FROM keyvault.credit_balances WHERE user_id = 'path_a');
BEGIN
    EXECUTE format(CASE way
        WHEN 'INSERT' THEN 'INSERT INTO %1$s (user_id, created_at, credits) VALUES (''path_a'', %2$L, %3$s)'
        WHEN 'CTE' THEN 'WITH made AS (INSERT INTO %1$s (user_id, created_at, credits) VALUES (''path_a'', %2$L, %3$s) RETURNING 1) SELECT FROM made'
        WHEN 'ON CONFLICT' THEN 'INSERT INTO %1$s (user_id, created_at, credits) VALUES (''path_a'', %2$L, %3$s) ON CONFLICT DO NOTHING'
        WHEN 'MERGE' THEN 'MERGE INTO %1$s t USING (SELECT) s ON false WHEN NOT MATCHED THEN INSERT (user_id, created_at, credits) VALUES (''path_a'', %2$L, %3$s)'
        END, target, at, credits);
    RETURN ((SELECT sum(credits_used) FROM keyvault.credit_balances WHERE user_id = 'path_a') - before)::float;
EXCEPTION WHEN OTHERS THEN
    RETURN SQLSTATE;
END $$;

SELECT way, name, pg_temp.take(target, at, way, 7) AS debited, pg_temp.take(target, at, way, 50000) AS too_much
  FROM path, unnest('{CTE, INSERT, MERGE, ON CONFLICT}'::text[]) way ORDER BY 1, 2;
SET session_replication_role = replica;
SELECT way, name, pg_temp.take(target, at, way, 7) AS debited, pg_temp.take(target, at, way, 50000) AS too_much
  FROM path, unnest('{CTE, INSERT, MERGE, ON CONFLICT}'::text[]) way ORDER BY 1, 2;
-- COPY, which cannot be in a function.
SELECT target FROM path WHERE name = 'partition' \gset
COPY :target (user_id, credits) FROM stdin;
path_a	11
\.
COPY keyvault.usage_records (user_id, credits) FROM stdin;
path_a	13
\.
RESET session_replication_role;
COPY :target (user_id, credits) FROM stdin;
path_a	17
\.
SELECT credits_used::float, (SELECT sum(credits)::float FROM keyvault.usage_records WHERE user_id = 'path_a') AS recorded FROM keyvault.credit_status WHERE user_id = 'path_a';
-- Nor does anybody take a record back.
SET session_replication_role = replica;
UPDATE keyvault.usage_records SET credits = 0 WHERE user_id = 'path_a';
DELETE FROM keyvault.usage_records_default WHERE user_id = 'path_a';
TRUNCATE keyvault.usage_records_default;
RESET session_replication_role;
SELECT * FROM keyvault.verify_ledger() WHERE user_id = 'path_a';
