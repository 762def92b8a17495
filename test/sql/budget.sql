-- What budgets say is spent, proved by verify_ledger, for every role that reads it.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE VIEW pg_temp.unsound AS SELECT user_id, what, trim_scale(expected) AS expected, trim_scale(found) AS found FROM keyvault.verify_ledger() WHERE user_id LIKE 'bu\_%' ORDER BY 1, 2;
CREATE VIEW pg_temp.spent AS
SELECT user_id, concat_ws(' ', scope, target, unit, 'per', per) AS budget, trim_scale(amount) AS amount, trim_scale(spent) AS spent FROM keyvault.budget_status WHERE user_id LIKE 'bu\_%' ORDER BY 1, 2;

-- Every kind of budget, made amid use, and every way to use: rows that are late and early, bulk, priced, refunded, held and settled.
SELECT keyvault.upsert_user('bu_a', plan => 'pro') IS NOT NULL AS made;
INSERT INTO keyvault.usage_records (user_id, model, credits, cost_usd, member_id, issued_key_id) VALUES
       ('bu_a', 'gpt-5', 40, 0.25, 'ann', '00000000-0000-7000-8000-0000000000aa'), ('bu_a', 'o3', 7, 0.5, 'bob', NULL);
SELECT count(keyvault.set_budget('bu_a', 10000, per, unit, scope, CASE scope WHEN 'model' THEN 'gpt-5' WHEN 'member' THEN 'ann' WHEN 'issued_key' THEN '00000000-0000-7000-8000-0000000000aa' END))
  FROM unnest('{day, month}'::text[]) per, unnest('{credits, usd}'::text[]) unit, unnest('{user, model, member, issued_key}'::text[]) scope;
TABLE pg_temp.unsound;
INSERT INTO keyvault.usage_records (user_id, model, credits, cost_usd, member_id) VALUES
       ('bu_a', 'gpt-5-2026-01-01', 3, 0.000000001, 'ann'), ('bu_a', 'gpt-5-latest', 0, 0.000000001, 'bob'), ('bu_a', NULL, 1.5, 0, 'ann');
INSERT INTO keyvault.usage_records (user_id, model, credits, member_id, created_at) VALUES
       ('bu_a', 'gpt-5', 11, 'ann', now() - interval '2 days'), ('bu_a', 'gpt-5', 13, 'ann', now() - interval '40 days'), ('bu_a', 'gpt-5', 17, 'ann', now() + interval '1 minute');
INSERT INTO keyvault.usage_records (user_id, model, credits, cost_usd) SELECT 'bu_a', 'gpt-5', 0.1, 0.0000000004 * i FROM generate_series(1, 200) i;
SELECT keyvault.record_usage('chat', 'gpt-5', 100, 200, 5, 'bu_a', member_id => 'ann', cost_usd => 0.002125) AS usage \gset
SELECT keyvault.refund_usage(:'usage', 'a bad answer', 'bu_a') IS NOT NULL AS refunded;
SELECT keyvault.reserve_credits(5, '1 hour', 'bu_a', 'gpt-5', 0.1, member_id => 'ann') AS hold \gset
SELECT keyvault.reserve_credits(9, '1 hour', 'bu_a', 'gpt-5', 0.3) IS NOT NULL AS held;
SELECT keyvault.settle_credits(:'hold', 6) IS NOT NULL AS settled;
BEGIN;
SAVEPOINT a;
INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('bu_a', 'gpt-5', 1000);
ROLLBACK TO a;
INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('bu_a', 'gpt-5', 2);
COMMIT;
SELECT keyvault.set_budget('bu_a', 20000) IS NOT NULL AS changed, keyvault.set_budget('bu_a', 50, 'day', scope => 'model', target => 'o3') IS NOT NULL AS made;
SELECT keyvault.set_budget('bu_a', 5, 'day', scope => 'model', target => repeat('m', 256));
TABLE pg_temp.spent;
TABLE pg_temp.unsound;

-- A refund gives the credits of this day or month back, once, and no USD.
SELECT keyvault.set_budget('bu_r', 10) IS NOT NULL AS made, keyvault.set_budget('bu_r', 10, 'day', scope => 'model', target => 'gpt-5') IS NOT NULL, keyvault.set_budget('bu_r', 10, unit => 'usd') IS NOT NULL,
       keyvault.set_budget('bu_r', 10, scope => 'member', target => 'ann') IS NOT NULL;
SELECT keyvault.record_usage('chat', 'gpt-5-latest', 1, 1, 8, 'bu_r', cost_usd => 3) AS usage \gset
SELECT keyvault.record_usage('chat', 'o3', 1, 1, 1, 'bu_r', cost_usd => 3) IS NOT NULL AS recorded;
SELECT keyvault.refund_usage(:'usage', 'a bad answer', 'bu_r') = keyvault.refund_usage(:'usage', 'again', 'bu_r') AS refunded;
INSERT INTO keyvault.usage_records (user_id, created_at, id, credits) VALUES ('bu_r', now() - interval '40 days', '00000000-0000-7000-8000-0000000000bb', 6);
SELECT keyvault.refund_usage('00000000-0000-7000-8000-0000000000bb', 'of an earlier month', 'bu_r') IS NOT NULL AS refunded;
SELECT * FROM pg_temp.spent WHERE budget NOT LIKE '%gpt-5 %usd%' AND amount = 10;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bu_r', 3);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bu_r', 0.000001);
TABLE pg_temp.unsound;
UPDATE keyvault.credit_budgets SET window_start = window_start - CASE per WHEN 'day' THEN interval '1 day' ELSE interval '1 month' END WHERE user_id = 'bu_r';
INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('bu_r', 'gpt-5', 1);
TABLE pg_temp.unsound;

-- A refund gives a budget back what it has counted in the day or month under way: not what the one before has, though its created_at is
-- of this one; but what is under a hold's id, or was there when the budget was made.
CREATE FUNCTION pg_temp.id_of(t timestamptz) RETURNS uuid LANGUAGE sql AS $$SELECT (lpad(to_hex((extract(epoch FROM t) * 1000)::bigint), 12, '0') || '70008000000000000000')::uuid$$;
CREATE FUNCTION pg_temp.yesterday() RETURNS timestamptz LANGUAGE sql AS $$SELECT date_trunc('day', now(), 'UTC') - interval '12 hours'$$;
SELECT keyvault.upsert_user('bu_y') IS NOT NULL AS made, keyvault.set_budget('bu_y', 100, 'day') IS NOT NULL AS counts;
INSERT INTO keyvault.usage_records (user_id, id, credits) VALUES ('bu_y', pg_temp.id_of(pg_temp.yesterday()), 8);
UPDATE keyvault.credit_budgets SET created_at = pg_temp.yesterday(), window_start = date_trunc('day', pg_temp.yesterday(), 'UTC') WHERE user_id = 'bu_y';
SELECT keyvault.reserve_credits(5, '1 hour', 'bu_y') AS hold \gset
UPDATE keyvault.credit_holds SET id = pg_temp.id_of(pg_temp.yesterday() + interval '1 hour') WHERE id = :'hold' RETURNING id AS hold \gset
SELECT keyvault.settle_credits(:'hold', 4, user_id => 'bu_y') IS NOT NULL AS settled, keyvault.record_usage('chat', 'm', 1, 1, 2, 'bu_y') IS NOT NULL AS recorded;
SELECT * FROM pg_temp.spent WHERE user_id = 'bu_y';
SELECT keyvault.refund_usage(pg_temp.id_of(pg_temp.yesterday()), 'of the day before', 'bu_y') IS NOT NULL AS refunded;
SELECT * FROM pg_temp.spent WHERE user_id = 'bu_y';
SELECT keyvault.refund_usage(:'hold', 'settled today', 'bu_y') IS NOT NULL AS refunded;
SELECT * FROM pg_temp.spent WHERE user_id = 'bu_y';
SELECT * FROM pg_temp.unsound WHERE user_id = 'bu_y';
INSERT INTO keyvault.usage_records (user_id, id, credits) VALUES ('bu_y', pg_temp.id_of(pg_temp.yesterday() + interval '2 hours'), 16);
SELECT keyvault.set_budget('bu_y', 200) IS NOT NULL AS made;
SELECT * FROM pg_temp.spent WHERE user_id = 'bu_y';
SELECT keyvault.refund_usage(pg_temp.id_of(pg_temp.yesterday() + interval '2 hours'), 'there already', 'bu_y') IS NOT NULL AS refunded;
SELECT * FROM pg_temp.spent WHERE user_id = 'bu_y';
SELECT * FROM pg_temp.unsound WHERE user_id = 'bu_y';
SELECT keyvault.set_budget('bu_y', NULL, 'day') IS NOT NULL AS removed, keyvault.set_budget('bu_y', NULL) IS NOT NULL;

-- A use of no credits is not refused where no credits are left, but by a budget.
BEGIN;
\set ON_ERROR_ROLLBACK on
SELECT keyvault.upsert_user('bu_z', plan => 'pro') IS NOT NULL AS made;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bu_z', 2000);
SELECT keyvault.set_plan('bu_z', 'free'), keyvault.set_budget('bu_z', 1, unit => 'usd') IS NOT NULL AS made, keyvault.reserve_credits(0, user_id => 'bu_z') IS NOT NULL AS held;
UPDATE keyvault.credit_balances SET monthly_credits = 500, credits_covered = 0 WHERE user_id = 'bu_z';
INSERT INTO keyvault.usage_records (user_id, payer, credits, cost_usd) VALUES ('bu_z', 'user', 0, 0.75);
INSERT INTO keyvault.usage_records (user_id, payer, credits, cost_usd) VALUES ('bu_z', 'user', 0, 0.75);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bu_z', 0.000001);
SELECT spent::float FROM keyvault.budget_status WHERE user_id = 'bu_z';
\set ON_ERROR_ROLLBACK off
ROLLBACK;

-- The next day and month: what comes for the one before, and what came for this one already, have their places.
UPDATE keyvault.credit_budgets SET window_start = window_start - CASE per WHEN 'day' THEN interval '1 day' ELSE interval '1 month' END WHERE user_id = 'bu_a';
TABLE pg_temp.unsound;
INSERT INTO keyvault.usage_records (user_id, model, credits, cost_usd, member_id, issued_key_id, created_at) VALUES
       ('bu_a', 'gpt-5', 21, 0.125, 'ann', '00000000-0000-7000-8000-0000000000aa', now()), ('bu_a', 'gpt-5', 23, 0.125, 'ann', '00000000-0000-7000-8000-0000000000aa', now() - interval '40 days');
INSERT INTO keyvault.usage_records (user_id, model, credits, cost_usd) VALUES ('bu_a', 'gpt-5', 1, 0.5);
TABLE pg_temp.spent;
TABLE pg_temp.unsound;

-- A difference is found, in a budget that is under way.
BEGIN;
UPDATE keyvault.credit_budgets SET spent = spent - 1 WHERE user_id = 'bu_a' AND scope IN ('user', 'member') AND per = 'month' AND unit = 'credits';
UPDATE keyvault.credit_budgets SET spent = spent + 0.000000001 WHERE user_id = 'bu_a' AND scope = 'issued_key' AND per = 'day' AND unit = 'usd';
UPDATE keyvault.credit_budgets SET spent = 5 WHERE user_id = 'bu_a' AND target = 'o3';
TABLE pg_temp.unsound;
SELECT keyvault.set_budget('bu_a', 50, 'day', scope => 'model', target => 'o3') IS NOT NULL AS changed;
SELECT count(*) FROM pg_temp.unsound;
ROLLBACK;
-- Records that nothing counted are found, too.
BEGIN;
INSERT INTO keyvault.usage_records (user_id, model, cost_usd, credits, debit_tag) VALUES ('bu_a', 'o3', 2, 0, 0);
TABLE pg_temp.unsound;
ROLLBACK;

-- USD that are less than a micro-dollar each add up.
SELECT keyvault.upsert_user('bu_b') IS NOT NULL AS made, keyvault.set_budget('bu_b', 0.000001, 'day', 'usd') IS NOT NULL;
INSERT INTO keyvault.usage_records (user_id, credits, cost_usd) VALUES ('bu_b', 0, 0.0000004);
INSERT INTO keyvault.usage_records (user_id, credits, cost_usd) VALUES ('bu_b', 0, 0.0000004);
INSERT INTO keyvault.usage_records (user_id, credits, cost_usd) VALUES ('bu_b', 0, 0.0000004);
SELECT * FROM pg_temp.spent WHERE user_id = 'bu_b';
TABLE pg_temp.unsound;

-- Whoever reads budgets reads what holds and records of a model come to.
CREATE ROLE regress_kv_analyst;
CREATE ROLE regress_kv_user;
SELECT keyvault.grant_access('regress_kv_analyst', 'analyst'), keyvault.grant_access('regress_kv_user', 'user');
SET ROLE regress_kv_analyst;
SELECT trim_scale(held) AS held FROM keyvault.budget_status WHERE user_id = 'bu_a' AND target = 'gpt-5' AND per = 'day' AND unit = 'credits';
SELECT count(*) FROM keyvault.verify_ledger() WHERE user_id LIKE 'bu\_%';
RESET ROLE;
BEGIN;
SET LOCAL keyvault.user_id = 'bu_a';
SET LOCAL ROLE regress_kv_user;
SELECT trim_scale(held) AS held FROM keyvault.budget_status WHERE target = 'gpt-5' AND per = 'day' AND unit = 'credits';
ROLLBACK;
SELECT keyvault.revoke_access('regress_kv_analyst', 'analyst'), keyvault.revoke_access('regress_kv_user', 'user');
DROP ROLE regress_kv_analyst, regress_kv_user;
