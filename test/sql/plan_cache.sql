-- Plans that are kept, and parallel workers: each execution serves the identity of its moment.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE ROLE regress_kv_app;
CREATE ROLE regress_kv_user;
SELECT keyvault.grant_access('regress_kv_app', 'app'), keyvault.grant_access('regress_kv_user', 'user');
GRANT regress_kv_user TO regress_kv_app;
SELECT count(keyvault.upsert_user('plan_' || u, plan => p)) FROM (VALUES ('a', 'free'), ('b', 'pro')) v (u, p);
SELECT count(keyvault.store_api_key(p, 'sk-regress-of-' || u || '-' || p, user_id => 'plan_' || u))
  FROM (VALUES ('a', 'exa'), ('a', 'openai'), ('b', 'exa')) v (u, p);

CREATE FUNCTION regress_kv_mine() RETURNS text LANGUAGE plpgsql STABLE AS $$
DECLARE
    keys jsonb;
    stored bigint;
    plan text;
BEGIN
    keys := keyvault.user_api_keys();
    SELECT count(*) INTO stored FROM keyvault.api_key_status;
    SELECT c.plan INTO plan FROM keyvault.credit_status c;
    RETURN format('%s: %s, %s stored, plan %s', keyvault.current_user_id(), keys, stored, plan);
END $$;

SET ROLE regress_kv_app;
SET plan_cache_mode = force_generic_plan;
PREPARE every_key AS SELECT keyvault.user_api_keys() AS every_key;
PREPARE one_key AS SELECT keyvault.user_api_key('exa') AS one_key;
PREPARE any_key(text) AS SELECT keyvault.user_api_key($1) AS any_key;
PREPARE stored AS SELECT user_id, provider, hint FROM keyvault.api_key_status ORDER BY 1, 2;
PREPARE credits AS SELECT user_id, plan, credits_remaining FROM keyvault.credit_status;
PREPARE mine AS SELECT regress_kv_mine();
PREPARE who AS SELECT u.user_id, keyvault.current_user_id() = u.user_id AS same FROM keyvault.users u WHERE u.user_id = keyvault.current_user_id();

-- One transaction, several identities: act_as, a savepoint that is rolled back, and nobody.
BEGIN;
SELECT keyvault.act_as('plan_a');
EXECUTE every_key; EXECUTE one_key; EXECUTE any_key('openai'); EXECUTE stored; EXECUTE credits; EXECUTE mine; EXECUTE who;
SELECT keyvault.act_as('plan_b');
EXECUTE every_key; EXECUTE one_key; EXECUTE any_key('openai'); EXECUTE stored; EXECUTE credits; EXECUTE mine; EXECUTE who;
SELECT keyvault.act_as('plan_a');
SAVEPOINT s;
SELECT keyvault.act_as('plan_b');
EXECUTE one_key; EXECUTE stored; EXECUTE mine;
ROLLBACK TO SAVEPOINT s;
EXECUTE every_key; EXECUTE one_key; EXECUTE any_key('exa'); EXECUTE stored; EXECUTE credits; EXECUTE mine; EXECUTE who;
SELECT keyvault.act_as(NULL) IS NULL AS nobody;
EXECUTE stored; EXECUTE credits; EXECUTE who;
SAVEPOINT s;
EXECUTE every_key;
ROLLBACK TO SAVEPOINT s;
EXECUTE one_key;
ROLLBACK;

-- Under another role, and back, in one transaction.
BEGIN;
SELECT keyvault.act_as('plan_a');
EXECUTE one_key; EXECUTE stored;
SET LOCAL ROLE regress_kv_user;
EXECUTE every_key; EXECUTE one_key; EXECUTE stored; EXECUTE credits; EXECUTE mine; EXECUTE who;
SAVEPOINT s;
SELECT keyvault.act_as('plan_b');
ROLLBACK TO SAVEPOINT s;
SET LOCAL ROLE regress_kv_app;
SELECT keyvault.act_as('plan_b');
SET LOCAL ROLE regress_kv_user;
EXECUTE every_key; EXECUTE one_key; EXECUTE any_key('exa'); EXECUTE stored; EXECUTE credits; EXECUTE mine; EXECUTE who;
COMMIT;
-- The next transaction is nobody's, and the one after that another user's.
EXECUTE stored; EXECUTE credits; EXECUTE who;
BEGIN; SET LOCAL ROLE regress_kv_user; EXECUTE one_key; ROLLBACK;
BEGIN; SELECT keyvault.act_as('plan_b'); EXECUTE one_key; EXECUTE mine; COMMIT;
BEGIN; SELECT keyvault.act_as('plan_a'); EXECUTE one_key; EXECUTE mine; COMMIT;
-- The plans are generic, one each, and were used many times.
SELECT name, generic_plans > 3 AS kept, custom_plans FROM pg_prepared_statements ORDER BY 1;
DEALLOCATE ALL;
-- A role that may act for any user, and one that may not, through one plan: the check is of the moment, too.
PREPARE of_b AS SELECT keyvault.user_api_key('exa', 'plan_b');
BEGIN;
SELECT keyvault.act_as('plan_a');
EXECUTE of_b;
SET LOCAL ROLE regress_kv_user;
EXECUTE of_b;
ROLLBACK;
DEALLOCATE ALL;
RESET plan_cache_mode;
RESET ROLE;

-- Parallel workers have the identity, and the right that goes with it, of the statement that they work for.
CREATE TABLE regress_kv_ids WITH (parallel_workers = 2) AS SELECT 'plan_' || CASE WHEN i % 2 = 0 THEN 'a' ELSE 'b' END AS user_id FROM generate_series(1, 200) i;
GRANT SELECT ON regress_kv_ids TO regress_kv_app, regress_kv_user;
-- Of a row: what needs none, PostgreSQL 18 takes out of GROUP BY, and the leader computes it.
CREATE FUNCTION regress_kv_is_worker(of text) RETURNS boolean LANGUAGE sql VOLATILE PARALLEL SAFE
    AS $$SELECT pg_backend_pid()::text <> current_setting('regress_kv.leader') || left(of, 0)$$;
SELECT set_config('regress_kv.leader', pg_backend_pid()::text, false) <> '' AS leader;
SET ROLE regress_kv_app;
SET plan_cache_mode = force_generic_plan;
SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
SET max_parallel_workers_per_gather = 2; SET parallel_leader_participation = off;
SELECT set_config(CASE WHEN current_setting('server_version_num')::integer < 160000 THEN 'force_parallel_mode' ELSE 'debug_parallel_query' END, 'on', false);
PREPARE in_workers AS
    SELECT user_id, regress_kv_is_worker(user_id) AS in_worker, keyvault.current_user_id() || left(user_id, 0) AS identity,
           keyvault.user_api_key('exa', nullif(user_id, user_id)) AS one_key, keyvault.user_api_keys(nullif(user_id, user_id)) AS every_key, count(*)
      FROM regress_kv_ids GROUP BY 1, 2, 3, 4, 5 ORDER BY 1;
PREPARE rows_in_workers AS
    SELECT user_id, regress_kv_is_worker(user_id) AS in_worker, count(*) FROM regress_kv_ids WHERE user_id = keyvault.current_user_id() GROUP BY 1, 2;
BEGIN; SELECT keyvault.act_as('plan_a'); EXECUTE in_workers; EXECUTE rows_in_workers;
SELECT keyvault.act_as('plan_b'); EXECUTE in_workers; EXECUTE rows_in_workers;
SAVEPOINT s; SELECT keyvault.act_as('plan_a'); EXECUTE rows_in_workers; ROLLBACK TO SAVEPOINT s;
EXECUTE rows_in_workers;
SET LOCAL ROLE regress_kv_user; EXECUTE in_workers; EXECUTE rows_in_workers;
COMMIT;
EXECUTE rows_in_workers;
-- Naming users: whoever may act for any reads them all in workers; who may not is refused there.
PREPARE of_others AS SELECT keyvault.user_api_key('exa', user_id) AS one_key, regress_kv_is_worker(user_id) AS in_worker, count(*) FROM regress_kv_ids GROUP BY 1, 2 ORDER BY 1;
EXECUTE of_others;
BEGIN; SELECT keyvault.act_as('plan_a'); SET LOCAL ROLE regress_kv_user; EXECUTE of_others; ROLLBACK;
DEALLOCATE ALL;
RESET ALL;
RESET ROLE;

DROP TABLE regress_kv_ids;
DROP FUNCTION regress_kv_is_worker(text), regress_kv_mine();
SELECT count(keyvault.erase_user(u)) FROM unnest('{plan_a, plan_b}'::text[]) u;
SELECT keyvault.revoke_access('regress_kv_app', 'app'), keyvault.revoke_access('regress_kv_user', 'user');
DROP ROLE regress_kv_app, regress_kv_user;

-- What names a plan's memory, which the server prints when memory is short, shows no key.
PREPARE kept_text AS SELECT 'plan_cache control';
PREPARE kept_key AS SELECT keyvault.store_api_key('exa', 'regress-key-in-a-plan', user_id => 'plan_text') IS NOT NULL AS stored;
EXECUTE kept_key;
SET plan_cache_mode = force_custom_plan;
EXECUTE kept_key;
RESET plan_cache_mode;
PREPARE kept_shape AS SELECT 'sk-ant-regress-key-in-a-plan-0123456789' IS NULL;
CREATE FUNCTION pg_temp.store_one() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM keyvault.store_api_key('exa', 'regress-key-in-a-plan', user_id => 'plan_text');
    EXECUTE 'SELECT keyvault.store_api_key(''exa'', ''regress-key-in-a-plan'', user_id => ''plan_text'')';
    RETURN length('sk-ant-regress-key-in-a-plan-0123456789');
END $$;
SELECT pg_temp.store_one();
SELECT count(*) FILTER (WHERE ident ~ 'key-in-a-pla[n]') AS keys, count(*) FILTER (WHERE ident ~ 'plan_cache contro[l]') AS control,
       count(*) FILTER (WHERE name = 'CachedPlan' AND ident ~ 'withheld') > 0 AS plans, count(*) FILTER (WHERE name = 'CachedPlanSource' AND ident ~ 'withheld') > 2 AS sources
  FROM pg_backend_memory_contexts;
-- made anew after an invalidation
ALTER TABLE keyvault.api_keys SET (fillfactor = 71);
SELECT pg_temp.store_one();
EXECUTE kept_key;
ALTER TABLE keyvault.api_keys SET (fillfactor = 70);
SELECT count(*) FILTER (WHERE ident ~ 'key-in-a-pla[n]') AS keys FROM pg_backend_memory_contexts;
DEALLOCATE ALL;
