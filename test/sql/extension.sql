-- What the extension brings, and the rules that every member keeps.
SET client_min_messages = warning;
DROP EXTENSION IF EXISTS keyvault;
CREATE EXTENSION keyvault CASCADE;
RESET client_min_messages;

-- Tables and views.
SELECT c.relname, c.relkind FROM pg_class c JOIN pg_depend d ON d.objid = c.oid AND d.deptype = 'e'
  JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'keyvault'
 WHERE d.classid = 'pg_class'::regclass AND c.relkind IN ('r', 'p', 'v', 'm') ORDER BY 1;

-- Public functions.
SELECT p.oid::regprocedure FROM pg_proc p
 WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname !~ '^_' ORDER BY p.proname;

-- Rules, each as a query that finds nothing.
\set members 'FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = ''keyvault'' WHERE d.deptype = ''e'''
-- everything has a comment
SELECT pg_describe_object(d.classid, d.objid, 0) :members
   AND d.classid IN ('pg_class'::regclass, 'pg_proc'::regclass)
   AND obj_description(d.objid, d.classid::regclass::text) IS NULL ORDER BY 1;
-- and so has every column that people read
SELECT c.oid::regclass, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE c.relnamespace = 'keyvault'::regnamespace AND (c.relkind IN ('v', 'm') AND c.relname !~ '^_' OR c.oid = 'keyvault.usage_records'::regclass)
   AND col_description(c.oid, a.attnum) IS NULL;
-- nothing is granted to PUBLIC
SELECT p.oid::regprocedure FROM pg_proc p
 WHERE p.pronamespace = 'keyvault'::regnamespace AND EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0);
SELECT c.oid::regclass FROM pg_class c
 WHERE c.relnamespace = 'keyvault'::regnamespace AND EXISTS (SELECT FROM aclexplode(c.relacl) a WHERE a.grantee = 0);
SELECT nspname FROM pg_namespace n WHERE nspname = 'keyvault' AND EXISTS (SELECT FROM aclexplode(n.nspacl) a WHERE a.grantee = 0);
-- plpgsql functions, which resolve names when they run, fix search_path
SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
 WHERE p.pronamespace = 'keyvault'::regnamespace AND l.lanname = 'plpgsql'
   AND NOT coalesce(p.proconfig @> '{"search_path=pg_catalog, pg_temp"}', false);
-- SQL functions are parsed when they are made
SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
 WHERE p.pronamespace = 'keyvault'::regnamespace AND l.lanname = 'sql' AND p.prosqlbody IS NULL;
-- no function runs with its owner's rights
SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'keyvault'::regnamespace AND p.prosecdef;
-- nothing written in C could be folded into a plan or an index
SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
 WHERE p.pronamespace = 'keyvault'::regnamespace AND l.lanname = 'c' AND p.provolatile = 'i';
-- tables with a user_id have row-level security, and user_id leads their primary key and unique constraints
PREPARE without_row_security AS SELECT c.oid::regclass FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'user_id'
 WHERE c.relnamespace = 'keyvault'::regnamespace AND c.relkind IN ('r', 'p', 'm') AND NOT c.relrowsecurity;
EXECUTE without_row_security;
SELECT i.indexrelid::regclass FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'user_id'
 WHERE c.relnamespace = 'keyvault'::regnamespace AND i.indisunique AND i.indkey[0] <> a.attnum;
-- and their foreign keys, which would tell that another user's row exists
SELECT k.conrelid::regclass, k.conname FROM pg_constraint k
 WHERE k.connamespace = 'keyvault'::regnamespace AND k.contype = 'f'
   AND (SELECT attname FROM pg_attribute WHERE attrelid = k.conrelid AND attnum = k.conkey[1]) <> 'user_id';
SELECT a.attrelid::regclass FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_collation l ON l.oid = a.attcollation
 WHERE c.relnamespace = 'keyvault'::regnamespace AND c.relkind IN ('r', 'p') AND a.attname = 'user_id' AND l.collname <> 'C';
-- views respect the rights of who reads them, and none opens a key
SELECT c.oid::regclass FROM pg_class c WHERE c.relnamespace = 'keyvault'::regnamespace AND c.relkind IN ('v', 'm')
   AND (NOT coalesce(c.reloptions @> '{security_invoker=true}', false) OR pg_get_viewdef(c.oid) ~ 'user_api_key|ciphertext');
-- every table's contents go into a dump, but for what is derived from usage_records
SELECT c.oid::regclass FROM pg_class c JOIN pg_depend d ON d.objid = c.oid AND d.deptype = 'e', pg_extension e
 WHERE e.extname = 'keyvault' AND d.refobjid = e.oid AND c.relkind = 'r' AND NOT c.oid = ANY (e.extconfig)
   AND c.oid NOT IN ('keyvault.usage_rollup'::regclass, 'keyvault.usage_daily'::regclass, 'keyvault.usage_late'::regclass);
-- Settings, and who may change them.
SELECT name, context FROM pg_settings WHERE name LIKE 'keyvault.%' ORDER BY name COLLATE "C";

-- columns that C reads by their number
SELECT attrelid::regclass, string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute
 WHERE attrelid IN ('keyvault.api_keys'::regclass, 'keyvault.data_keys'::regclass, 'keyvault.vault'::regclass, 'keyvault.users'::regclass) AND attnum > 0
 GROUP BY 1 ORDER BY 1;

-- Seeds.
SELECT plan, monthly_credits, credits_per_usd, own_key_rate FROM keyvault.plans ORDER BY plan;
SELECT provider, dialect, env_var FROM keyvault.providers ORDER BY provider;
SELECT provider, count(*), bool_and(source <> '') FROM keyvault.model_prices GROUP BY provider ORDER BY provider;

-- A seed that is changed, or replaced by an insert as pg_restore does, is the administrator's own.
BEGIN;
UPDATE keyvault.plans SET monthly_credits = 2000 WHERE plan = 'free';
INSERT INTO keyvault.plans (plan, monthly_credits, seeded) VALUES ('pro', 60000, true);
SELECT plan, monthly_credits, seeded FROM keyvault.plans ORDER BY plan;
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('free', 3000);
ROLLBACK;

-- uuidv7: version, variant, time and order.
SELECT substr(u::text, 15, 1) AS version, substr(u::text, 20, 1) IN ('8', '9', 'a', 'b') AS variant,
       abs(extract(epoch FROM clock_timestamp()) * 1000 - ('x' || translate(substr(u::text, 1, 13), '-', ''))::bit(48)::bigint) < 60000 AS now
  FROM keyvault.uuidv7() u;
SELECT count(*) AS out_of_order FROM (SELECT u, lag(u) OVER (ORDER BY i) AS earlier FROM (SELECT i, keyvault.uuidv7() AS u FROM generate_series(1, 10000) i OFFSET 0) m) o WHERE earlier >= u;

-- DROP EXTENSION removes everything, partitions made meanwhile too.
SELECT keyvault._make_usage_partitions() > 0 AS made;
EXECUTE without_row_security;
DROP EXTENSION keyvault;
SELECT count(*) FROM pg_namespace WHERE nspname = 'keyvault';

-- A schema that somebody prepared is not taken over.
\set VERBOSITY terse
CREATE SCHEMA keyvault;
CREATE FUNCTION keyvault.trap() RETURNS int LANGUAGE sql AS 'SELECT 1';
CREATE EXTENSION keyvault;
DROP SCHEMA keyvault CASCADE;
CREATE EXTENSION keyvault;
