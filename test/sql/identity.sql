-- Who a transaction acts as, and what no role can do about it.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE ROLE regress_kv_app;
CREATE ROLE regress_kv_user;
SELECT keyvault.grant_access('regress_kv_app', 'app');
SELECT keyvault.grant_access('regress_kv_user', 'user');
GRANT regress_kv_user TO regress_kv_app;

SELECT keyvault.current_user_id() IS NULL AS nobody;
BEGIN;
SELECT keyvault.act_as('alice');
SELECT keyvault.current_user_id();
-- It ends with the savepoint that set it ...
SAVEPOINT s;
SELECT keyvault.act_as('bob');
ROLLBACK TO s;
SELECT keyvault.current_user_id();
SELECT keyvault.act_as(NULL) IS NULL AS nobody, keyvault.current_user_id() IS NULL AS nobody;
SELECT keyvault.act_as('alice');
COMMIT;
-- ... and with the transaction.
SELECT keyvault.current_user_id() IS NULL AS nobody;

SELECT keyvault.act_as('');
SELECT keyvault.act_as(repeat('x', 256));
SELECT length(keyvault.act_as(repeat('x', 255)));

-- A trusted application may; an untrusted role may not, by any way.
SET ROLE regress_kv_app;
SELECT keyvault.act_as('alice');
BEGIN;
SELECT keyvault.act_as('alice');
SET LOCAL ROLE regress_kv_user;
SELECT keyvault.current_user_id();
SAVEPOINT s;
SELECT keyvault.act_as('bob');
ROLLBACK TO s;
SET keyvault.user_id = 'bob';
ROLLBACK TO s;
SET LOCAL keyvault.user_id = 'bob';
ROLLBACK TO s;
SELECT set_config('keyvault.user_id', 'bob', true);
ROLLBACK TO s;
RESET keyvault.user_id;
ROLLBACK TO s;
ALTER ROLE regress_kv_user SET keyvault.user_id = 'bob';
ROLLBACK TO s;
CREATE FUNCTION pg_temp.bob() RETURNS text LANGUAGE sql SET keyvault.user_id = 'bob' AS 'SELECT keyvault.current_user_id()';
ROLLBACK TO s;
SELECT keyvault.current_user_id();
-- RESET ALL ends in no identity, never in another.
RESET ALL;
SELECT keyvault.current_user_id() IS NULL AS nobody;
ROLLBACK;
RESET ROLE;

-- A session's end of a pooled connection forgets.
SET keyvault.user_id = 'alice';
DISCARD ALL;
SELECT keyvault.current_user_id() IS NULL AS nobody;

-- The identity travels to parallel workers.
CREATE TABLE regress_kv_rows AS SELECT g FROM generate_series(1, 1000) g;
BEGIN;
SELECT keyvault.act_as('alice');
SET LOCAL parallel_setup_cost = 0; SET LOCAL parallel_tuple_cost = 0; SET LOCAL min_parallel_table_scan_size = 0;
SET LOCAL max_parallel_workers_per_gather = 2; SET LOCAL parallel_leader_participation = off;
SELECT count(*) FROM regress_kv_rows WHERE keyvault.current_user_id() = 'alice';
COMMIT;
DROP TABLE regress_kv_rows;

-- A plan made for one user does not serve another.
SELECT keyvault.upsert_user('alice', name => 'Alice'), keyvault.upsert_user('bob', name => 'Bob');
SET ROLE regress_kv_app;
SET plan_cache_mode = force_generic_plan;
PREPARE who AS SELECT user_id, name FROM keyvault.users ORDER BY 1;
EXECUTE who;
BEGIN; SELECT keyvault.act_as('alice'); EXECUTE who; COMMIT;
BEGIN; SELECT keyvault.act_as('bob'); EXECUTE who; COMMIT;
EXECUTE who;
DEALLOCATE who;
RESET plan_cache_mode;
RESET ROLE;

-- Naming another user takes the right to act for any.
SET ROLE regress_kv_app;
SELECT keyvault.user_api_keys('alice');
BEGIN;
SELECT keyvault.act_as('bob');
SET LOCAL ROLE regress_kv_user;
SELECT keyvault.user_api_keys();
SELECT keyvault.user_api_keys('bob');
SELECT keyvault.user_api_keys('alice');
ROLLBACK;
BEGIN;
SET LOCAL ROLE regress_kv_user;
SELECT keyvault.user_api_keys();
ROLLBACK;
RESET ROLE;

-- search_path of the caller means nothing to what runs as the owner.
CREATE SCHEMA regress_kv_trap;
GRANT ALL ON SCHEMA regress_kv_trap TO regress_kv_app;
SET ROLE regress_kv_app;
CREATE FUNCTION regress_kv_trap.caught(text, text) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'caught, running as %', current_user; END $$;
CREATE OPERATOR regress_kv_trap.= (LEFTARG = text, RIGHTARG = text, PROCEDURE = regress_kv_trap.caught);
CREATE OPERATOR regress_kv_trap.~ (LEFTARG = text, RIGHTARG = text, PROCEDURE = regress_kv_trap.caught);
SET search_path = regress_kv_trap, pg_catalog;
SELECT keyvault.store_api_key('openai', 'sk-regress-0123456789', user_id => 'alice') IS NOT NULL AS stored;
SELECT keyvault.upsert_user('alice', plan => 'pro');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('alice', 1), ('alice', 2);
SELECT keyvault.user_api_key('openai', 'alice');
SELECT keyvault.delete_api_key('openai', user_id => 'alice');
SHOW search_path;
RESET search_path;
RESET ROLE;
DROP SCHEMA regress_kv_trap CASCADE;

SELECT keyvault.revoke_access('regress_kv_app', 'app'), keyvault.revoke_access('regress_kv_user', 'user');
DROP ROLE regress_kv_app, regress_kv_user;
