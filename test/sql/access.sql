-- What each access gives, and what none gives.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE ROLE regress_kv_app; CREATE ROLE regress_kv_user; CREATE ROLE regress_kv_analyst; CREATE ROLE regress_kv_admin; CREATE ROLE regress_kv_none;
SELECT keyvault.grant_access('regress_kv_app', 'app'), keyvault.grant_access('regress_kv_user', 'user'),
       keyvault.grant_access('regress_kv_analyst', 'analyst'), keyvault.grant_access('regress_kv_admin', 'admin');
SELECT keyvault.grant_access('regress_kv_app', 'root');

-- Functions that each access may call: a literal list, so that no function slips in.
SELECT p.proname, string_agg(substr(r.rolname, 12), ' ' ORDER BY r.rolname) AS access
  FROM pg_proc p, aclexplode(p.proacl) a JOIN pg_roles r ON r.oid = a.grantee
 WHERE p.pronamespace = 'keyvault'::regnamespace AND r.rolname LIKE 'regress\_kv\_%' GROUP BY p.proname ORDER BY 1;
-- Columns: nobody is given a ciphertext, a fingerprint, a wrapped key, a call key or the debit's mark.
SELECT c.relname, a.attname, string_agg(substr(r.rolname, 12) || ' ' || p, ', ' ORDER BY r.rolname, p) AS access
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid, pg_roles r, unnest('{SELECT,INSERT,UPDATE}'::text[]) p
 WHERE c.relnamespace = 'keyvault'::regnamespace AND r.rolname LIKE 'regress\_kv\_%' AND a.attnum > 0
   AND a.attname IN ('ciphertext', 'fingerprint', 'wrapped', 'call_key', 'debit_tag')
   AND has_column_privilege(r.oid, c.oid, a.attname, p) GROUP BY 1, 2;

SELECT keyvault.store_api_key('openai', 'sk-regress-of-user-one', user_id => 'ac_one') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('openai', 'sk-regress-of-user-two', user_id => 'ac_two') IS NOT NULL AS stored;
INSERT INTO keyvault.usage_records (user_id, type, provider, model, credits) VALUES ('ac_one', 'chat', 'openai', 'gpt-5-mini', 1), ('ac_two', 'chat', 'openai', 'gpt-5-mini', 2);

-- No access: nothing.
SET ROLE regress_kv_none;
SELECT keyvault.current_user_id();
SELECT * FROM keyvault.users;
RESET ROLE;

-- A user sees its own rows only, and no identity means no rows.
BEGIN;
SELECT keyvault.act_as('ac_one');
SET LOCAL ROLE regress_kv_user;
SELECT user_id FROM keyvault.users; SELECT user_id, credits_used FROM keyvault.credit_status; SELECT user_id, credits FROM keyvault.usage_by_day;
SELECT user_id, hint FROM keyvault.api_key_status;
SAVEPOINT s;
SELECT ciphertext FROM keyvault.api_keys;
ROLLBACK TO s;
SELECT * FROM keyvault.data_keys;
ROLLBACK TO s;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ac_one', 0);
ROLLBACK TO s;
SELECT keyvault.set_plan('ac_one', 'enterprise');
ROLLBACK TO s;
SELECT keyvault.store_platform_key('openai', 'sk-regress-platform');
ROLLBACK TO s;
SELECT keyvault.delete_platform_key('openai');
ROLLBACK TO s;
UPDATE keyvault.credit_balances SET credits_used = 0;
ROLLBACK;
SET ROLE regress_kv_user;
SELECT count(*) FROM keyvault.users; SELECT count(*) FROM keyvault.usage_records; SELECT count(*) FROM keyvault.api_key_status; SELECT count(*) FROM keyvault.request_status;
RESET ROLE;

-- An analyst sees everyone's usage, no key and no call.
SET ROLE regress_kv_analyst;
SELECT user_id, credits FROM keyvault.usage_by_day WHERE user_id LIKE 'ac\_%' ORDER BY 1;
SELECT user_id, credits_used FROM keyvault.credit_status WHERE user_id LIKE 'ac\_%' ORDER BY 1;
SELECT * FROM keyvault.api_key_status;
SELECT keyvault.user_api_keys('ac_one');
SELECT * FROM keyvault.requests;
RESET ROLE;

-- An administrator changes plans, users and platform keys, sees metadata, and opens no key.
SET ROLE regress_kv_admin;
SELECT keyvault.set_plan('ac_one', 'pro');
SELECT keyvault.upsert_user('ac_three', name => 'Three');
SELECT keyvault.store_platform_key('openai', 'sk-regress-platform') IS NOT NULL AS stored;
SELECT keyvault.store_platform_key('exa', 'regress-platform-old', 'old') IS NOT NULL AS stored;
SELECT keyvault.delete_platform_key('exa'), keyvault.delete_platform_key('exa', 'old'), keyvault.delete_platform_key('exa', 'old') AS again;
SELECT keyvault.delete_platform_key('exxa');
SELECT keyvault.delete_platform_key(NULL);
SELECT user_id, provider, hint FROM keyvault.api_key_status WHERE user_id LIKE 'ac\_%' ORDER BY 1;
UPDATE keyvault.plans SET price_usd = 19 WHERE plan = 'pro';
UPDATE keyvault.providers SET platform_paths = platform_paths, usd_per_request = usd_per_request WHERE provider = 'exa';
-- Which keys match a pattern tells what they look like.
UPDATE keyvault.providers SET key_pattern = '^regress-s3' WHERE provider = 'exa';
SELECT keyvault.user_api_key('openai', 'ac_one');
SELECT keyvault.act_as('ac_one');
RESET ROLE;
UPDATE keyvault.plans SET price_usd = 20 WHERE plan = 'pro';

-- Revoking one access keeps another whole.
SELECT keyvault.grant_access('regress_kv_analyst', 'admin'), keyvault.revoke_access('regress_kv_analyst', 'admin');
SET ROLE regress_kv_analyst;
SELECT count(*) FROM keyvault.usage_by_day WHERE user_id LIKE 'ac\_%';
SELECT keyvault.set_plan('ac_one', 'free');
RESET ROLE;

-- What an access has gained since it was given, refresh_access gives: here, what was taken by hand.
REVOKE EXECUTE ON FUNCTION keyvault.act_as FROM regress_kv_app;
REVOKE SELECT ON keyvault.credit_status FROM regress_kv_analyst;
SELECT * FROM keyvault.refresh_access() WHERE role::text ~ '^regress_kv_' ORDER BY role::text;
SELECT has_function_privilege('regress_kv_app', 'keyvault.act_as(text)', 'EXECUTE') AS app,
       has_table_privilege('regress_kv_analyst', 'keyvault.credit_status', 'SELECT') AS analyst,
       has_function_privilege('regress_kv_analyst', 'keyvault.act_as(text)', 'EXECUTE') AS too_much;

SELECT keyvault.grant_access(NULL, 'app');
SELECT keyvault.revoke_access(NULL, 'app');

-- Who may write to every table, without being a superuser, does not send keys, or have them sealed, to somebody else.
GRANT pg_write_all_data TO regress_kv_none;
GRANT USAGE ON SCHEMA keyvault TO regress_kv_none;
GRANT EXECUTE ON FUNCTION keyvault._may_administer() TO regress_kv_none;
SET ROLE regress_kv_none;
UPDATE keyvault.providers SET base_url = 'https://evil.example';
INSERT INTO keyvault.providers (provider, base_url) VALUES ('evil', 'https://evil.example');
INSERT INTO keyvault.sealing_keys (key_id, id, public_key, ciphertext, retired_at) VALUES ('\x00000000', gen_random_uuid(), decode(repeat('04', 65), 'hex'), '', 'infinity');
RESET ROLE;
SELECT count(*) FROM keyvault.providers WHERE base_url ~ 'evil';
REVOKE ALL ON FUNCTION keyvault._may_administer() FROM regress_kv_none;
REVOKE ALL ON SCHEMA keyvault FROM regress_kv_none;

-- The planner's estimates know nothing of what stands in others' rows.
BEGIN;
ANALYZE keyvault.users, keyvault.api_keys;
SELECT tablename, attname FROM pg_stats WHERE schemaname = 'keyvault' AND attname IN ('email', 'name', 'image', 'hint', 'problem', 'status_reason', 'stripe_customer_id');
SELECT count(*) FROM pg_stats WHERE schemaname = 'keyvault' AND tablename = 'users' AND attname = 'user_id';
ROLLBACK;

SELECT keyvault.revoke_access('regress_kv_app', 'app'), keyvault.revoke_access('regress_kv_user', 'user'),
       keyvault.revoke_access('regress_kv_analyst', 'analyst'), keyvault.revoke_access('regress_kv_admin', 'admin');
DROP ROLE regress_kv_app, regress_kv_user, regress_kv_analyst, regress_kv_admin, regress_kv_none;
