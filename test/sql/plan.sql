-- Plans: none that a user is on goes, and no debit goes by one that is not there.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE FUNCTION pg_temp.refusal(statement text) RETURNS TABLE (state text, message text) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE statement;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT;
    RETURN NEXT;
END $$;
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('pl_used', 100), ('pl_unused', 100), ('pl_other', 50);
SELECT keyvault.upsert_user('pl_a', plan => 'pl_used') IS NOT NULL AS made;

-- Neither a statement nor a trigger of another table deletes or renames it; a shipped one neither.
SELECT s.* FROM unnest('{DELETE FROM keyvault.plans WHERE plan = ''pl_used'',UPDATE keyvault.plans SET plan = ''pl_renamed'' WHERE plan = ''pl_used''}'::text[]) q, LATERAL pg_temp.refusal(q) s;
CREATE TABLE pl_table (plan text);
CREATE FUNCTION pl_delete() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN DELETE FROM keyvault.plans p WHERE p.plan = NEW.plan; RETURN NEW; END $$;
CREATE TRIGGER pl_delete BEFORE INSERT ON pl_table FOR EACH ROW EXECUTE FUNCTION pl_delete();
INSERT INTO pl_table VALUES ('pl_used');
SELECT keyvault.upsert_user('pl_b', plan => 'pro') IS NOT NULL AS made;
BEGIN;
ALTER TABLE keyvault.plans DISABLE TRIGGER keep_customized;
UPDATE keyvault.plans SET seeded = true WHERE plan IN ('free', 'pro');
ALTER TABLE keyvault.plans ENABLE TRIGGER keep_customized;
INSERT INTO pl_table VALUES ('pro');
COMMIT;
SELECT count(*) FROM keyvault.plans WHERE plan = 'pro';
INSERT INTO pl_table VALUES ('pl_unused');
BEGIN ISOLATION LEVEL REPEATABLE READ;
DELETE FROM keyvault.plans WHERE plan = 'pl_other';
ROLLBACK;

-- One that is gone past all this stops what goes by it.
SELECT keyvault.upsert_user('pl_c', plan => 'pl_other') IS NOT NULL AS made;
BEGIN;
SET LOCAL session_replication_role = replica;
DELETE FROM keyvault.plans WHERE plan IN ('pl_used', 'free');
SET LOCAL session_replication_role = origin;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pl_a', 1), ('pl_c', 1);
SELECT s.* FROM unnest(ARRAY[$$INSERT INTO keyvault.usage_records (user_id, model, tokens) VALUES ('pl_a', 'gpt-5', 1)$$, $$INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pl_new', 1)$$,
       $$INSERT INTO keyvault.usage_records (user_id, model, tokens) VALUES ('pl_new', 'gpt-5', 1)$$, $$SELECT keyvault._credits_owed('pl_used', 'platform', 1)$$]) q, LATERAL pg_temp.refusal(q) s;
UPDATE keyvault.credit_balances SET period_anchor = period_anchor - interval '2 months', period_start = period_start - interval '2 months', period_end = period_end - interval '2 months' WHERE user_id LIKE 'pl\__';
SELECT * FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('pl_a', 1)$$);
SELECT monthly_credits::float, credits_remaining::float FROM keyvault.credit_status WHERE user_id = 'pl_a';
SELECT keyvault.reset_due_credits() >= 2 AS reset, keyvault.reset_due_credits();
SELECT user_id, monthly_credits::float FROM keyvault.credit_balances WHERE user_id LIKE 'pl\__' AND due_at > now() ORDER BY 1;
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('pl_used', 70);
SELECT keyvault.set_plan('pl_a', 'pl_other');
SELECT monthly_credits::float FROM keyvault.credit_balances WHERE user_id = 'pl_a';
ROLLBACK;

-- An administrator sets plans and prices.
BEGIN;
CREATE ROLE regress_kv_plan_admin;
SELECT keyvault.grant_access('regress_kv_plan_admin', 'admin');
SET ROLE regress_kv_plan_admin;
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('pl_admin', 10);
INSERT INTO keyvault.model_prices (provider, model, input_usd_per_mtok, output_usd_per_mtok, context_tiers) VALUES ('pl_acme', 'm', 1, 2, NULL), ('openai', 'gpt-5', 3, 4, '[{"over": 10, "input": 5}]');
INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, output_usd_per_mtok, context_tiers) VALUES ('pl_admin', 'pl_acme', 'm', 1, 2, '[{"over": 10, "input": 5}]');
UPDATE keyvault.plans SET margin = 0.1, notice_percents = '{90}' WHERE plan = 'pl_admin';
UPDATE keyvault.model_prices SET output_usd_per_mtok = 5, context_tiers = '[{"over": 20, "input": 5}]' WHERE provider = 'pl_acme';
UPDATE keyvault.plan_prices SET usd_per_request = 0.1 WHERE plan = 'pl_admin';
UPDATE keyvault.providers SET usd_per_request = usd_per_request WHERE provider = 'openai';
UPDATE keyvault.model_prices SET context_tiers = '[]' WHERE provider = 'pl_acme';
DELETE FROM keyvault.plan_prices WHERE plan = 'pl_admin';
DELETE FROM keyvault.model_prices WHERE provider = 'pl_acme';
DELETE FROM keyvault.plans WHERE plan = 'pl_admin';
ROLLBACK;

DROP TABLE pl_table;
DROP FUNCTION pl_delete();
SELECT count(keyvault.set_plan(user_id, 'free')) FROM keyvault.users WHERE user_id LIKE 'pl\__';
DELETE FROM keyvault.plans WHERE plan LIKE 'pl\_%';
