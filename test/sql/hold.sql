-- Holds: reserve, settle, release, expiry; budgets.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE VIEW pg_temp.status AS
SELECT user_id, credits_used::float AS used, credits_held::float AS held, credits_remaining::float AS remaining
  FROM keyvault.credit_status WHERE user_id LIKE 'ho\_%' ORDER BY 1;
CREATE VIEW pg_temp.usage AS
SELECT user_id, type, model, tokens, credits::float, credits_overrun::float AS overrun, hold_id IS NOT NULL AS settled FROM keyvault.usage_records
 WHERE user_id LIKE 'ho\_%' ORDER BY user_id, id;
CREATE VIEW pg_temp.budgets AS
SELECT user_id, scope, target, per, unit, amount::float, spent::float, held::float, remaining::float FROM keyvault.budget_status WHERE user_id LIKE 'ho\_%'
 ORDER BY user_id, scope, target, per, unit;
CREATE FUNCTION pg_temp.refusal(statement text) RETURNS TABLE (state text, message text, detail text, hint text) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE statement;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL, hint = PG_EXCEPTION_HINT;
    hint := regexp_replace(hint, '[0-9]{4}-[0-9]{2}-[0-9]{2} 00:00', 'DATE');
    RETURN NEXT;
END $$;

-- What is held cannot be spent; what was used is charged, less or more than held.
SELECT keyvault.reserve_credits(600, user_id => 'ho_a') AS one \gset
SELECT keyvault.reserve_credits(300, '1 hour', 'ho_a', 'gpt-5-mini') AS two \gset
SELECT * FROM pg_temp.status;
SELECT state FROM pg_temp.refusal($$SELECT keyvault.reserve_credits(100.000001, user_id => 'ho_a')$$);
SELECT state FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ho_a', 100.000001)$$);
SELECT keyvault.settle_credits(:'one', 250, 'chat', 'gpt-5', 100, 50) = :'one' AS settled;
SELECT * FROM pg_temp.status;
SELECT keyvault.settle_credits(:'two', 350) = :'two' AS settled;
SELECT * FROM pg_temp.status;
SELECT * FROM pg_temp.usage;
-- settled once: again with the same amount changes nothing, with another it is an error
SELECT keyvault.settle_credits(:'two', 350, user_id => 'ho_a') = :'two' AS settled;
SELECT state, message FROM pg_temp.refusal(format('SELECT keyvault.settle_credits(%L, 351, user_id => ''ho_a'')', :'two'));
SELECT state, message FROM pg_temp.refusal(format('SELECT keyvault.settle_credits(%L, 1)', keyvault.uuidv7()));
SELECT keyvault.release_credits(:'two'), keyvault.release_credits(keyvault.uuidv7(), 'ho_a'), keyvault.release_credits(keyvault.uuidv7());
SELECT * FROM pg_temp.status;
-- beyond the limit: charged up to it, the rest is recorded
SELECT keyvault.reserve_credits(10, user_id => 'ho_a') AS three \gset
SELECT keyvault.settle_credits(:'three', 1000) IS NOT NULL AS settled;
SELECT credits::float, credits_overrun::float FROM keyvault.usage_records WHERE id = :'three';
SELECT * FROM pg_temp.status;
SELECT state FROM pg_temp.refusal($$SELECT keyvault.reserve_credits(0.000001, user_id => 'ho_a')$$);
SELECT keyvault.reserve_credits(0, user_id => 'ho_a') IS NOT NULL AS nothing_is_always_left;

-- Released, and expired: neither counts any more, and a late settlement is charged all the same.
SELECT keyvault.reserve_credits(1000, user_id => 'ho_b') AS hold \gset
SELECT keyvault.release_credits(:'hold'), keyvault.release_credits(:'hold');
SELECT keyvault.reserve_credits(900, user_id => 'ho_b') AS hold \gset
UPDATE keyvault.credit_holds SET expires_at = now() - interval '1 second' WHERE id = :'hold';
SELECT * FROM pg_temp.status WHERE user_id = 'ho_b';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ho_b', 800);
SELECT credits_held FROM keyvault.credit_balances WHERE user_id = 'ho_b';
SELECT keyvault.settle_credits(:'hold', 300) = :'hold' AS settled;
SELECT credits::float, credits_overrun::float FROM keyvault.usage_records WHERE id = :'hold';
SELECT count(*) FROM keyvault.credit_holds WHERE user_id = 'ho_b';
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'ho\_%';
-- bad arguments
SELECT s.state, s.message FROM unnest('{NULL, -1, NaN, Infinity, 1e12}'::text[]) amount, LATERAL pg_temp.refusal(format('SELECT keyvault.reserve_credits(%L, user_id => ''ho_b'')', amount)) s;
-- a negative estimate would add to a budget, NaN block it
SELECT s.state, s.message FROM unnest('{-1000, -0.000000001, NaN, -Infinity, Infinity, 999999999.9999999999}'::text[]) usd, LATERAL pg_temp.refusal(format('SELECT keyvault.reserve_credits(1, user_id => ''ho_b'', cost_usd => %L)', usd)) s;
SELECT keyvault.release_credits(keyvault.reserve_credits(0, user_id => 'ho_b', cost_usd => 999999999));
SELECT s.state, s.message FROM unnest('{NULL, 0, -1 s, 2 years}'::text[]) ttl, LATERAL pg_temp.refusal(format('SELECT keyvault.reserve_credits(1, %L, ''ho_b'')', ttl)) s;

-- Identity: a trusted application without user_id acts as its identity; another user's hold is not its to settle.
CREATE ROLE regress_kv_app;
SELECT keyvault.grant_access('regress_kv_app', 'app');
SET ROLE regress_kv_app;
SELECT state FROM pg_temp.refusal('SELECT keyvault.reserve_credits(1)');
BEGIN;
SELECT keyvault.act_as('ho_c');
SELECT keyvault.reserve_credits(5) AS hold \gset
SELECT user_id, amount FROM keyvault.credit_holds;
SELECT keyvault.settle_credits(:'hold', 5) = :'hold' AS settled;
SELECT credits_used FROM keyvault.credit_status;
COMMIT;
RESET ROLE;
SELECT keyvault.revoke_access('regress_kv_app', 'app');
DROP ROLE regress_kv_app;

-- Budgets: of a user, a model, an issued key, a member; in credits or USD; per day or month.
SELECT keyvault.upsert_user('ho_org', plan => 'pro') IS NOT NULL AS made;
INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('ho_org', 'gpt-5', 40), ('ho_org', 'gpt-5', 30), ('ho_org', 'o3', 7);
SELECT keyvault.set_budget('ho_org', 100, scope => 'model', target => 'gpt-5') IS NOT NULL AS made,
       keyvault.set_budget('ho_org', 50, 'day', scope => 'member', target => 'ann') IS NOT NULL,
       keyvault.set_budget('ho_org', 0.5, 'month', 'usd', 'issued_key', '00000000-0000-7000-8000-0000000000AA') IS NOT NULL,
       keyvault.set_budget('ho_org', 200, 'day') IS NOT NULL;
-- what the day or month has seen counts
SELECT * FROM pg_temp.budgets;
INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('ho_org', 'gpt-5', 20), ('ho_org', 'o3', 1);
\x on
SELECT * FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('ho_org', 'o3', 1), ('ho_org', 'gpt-5', 10.000001)$$);
\x off
INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('ho_org', 'gpt-5', 10);
INSERT INTO keyvault.usage_records (user_id, credits, member_id) SELECT 'ho_org', 1, 'ann' FROM generate_series(1, 40);
SELECT state, message FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, credits, member_id) SELECT 'ho_org', 1, 'ann' FROM generate_series(1, 11)$$);
-- USD of provider cost, of a use that costs no credits too
INSERT INTO keyvault.usage_records (user_id, credits, cost_usd, issued_key_id, payer) VALUES ('ho_org', 0, 0.4, '00000000-0000-7000-8000-0000000000aa', 'user');
SELECT state, message FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, credits, cost_usd, issued_key_id) VALUES ('ho_org', 0, 0.11, '00000000-0000-7000-8000-0000000000aa')$$);
SELECT state, message FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ho_org', 60)$$);
SELECT * FROM pg_temp.budgets;
-- holds count while they are open; their settlement is counted, not refused
SELECT keyvault.reserve_credits(5, user_id => 'ho_org', member_id => 'ann') AS hold \gset
SELECT amount::float, spent::float, held::float, remaining::float FROM keyvault.budget_status WHERE user_id = 'ho_org' AND target = 'ann';
SELECT state, message, detail FROM pg_temp.refusal($$SELECT keyvault.reserve_credits(6, user_id => 'ho_org', member_id => 'ann')$$);
SELECT keyvault.settle_credits(:'hold', 30) IS NOT NULL AS settled;
SELECT member_id, credits::float FROM keyvault.usage_records WHERE id = :'hold';
SELECT amount::float, spent::float, held::float, remaining::float FROM keyvault.budget_status WHERE user_id = 'ho_org' AND target = 'ann';
-- through savepoints, a partition by name and other users in between
BEGIN;
SAVEPOINT a;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ho_org', 10);
ROLLBACK TO a;
SAVEPOINT b;
INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('ho_a', 'x', 0), ('ho_org', 'x', 3), ('ho_b', 'x', 0), ('ho_org', 'y', 2);
RELEASE b;
INSERT INTO keyvault.usage_records_default (user_id, credits, created_at) VALUES ('ho_org', 1, '2001-01-01');
COMMIT;
SELECT spent::float FROM keyvault.budget_status WHERE user_id = 'ho_org' AND scope = 'user';
-- what was refused is not counted with what follows it in the transaction
BEGIN;
SELECT state FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ho_org', 60)$$);
SAVEPOINT c;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ho_org', 1);
SELECT spent::float FROM keyvault.budget_status WHERE user_id = 'ho_org' AND scope = 'user';
ROLLBACK;
-- a new day or month begins at nothing
UPDATE keyvault.credit_budgets SET window_start = window_start - interval '40 days' WHERE user_id = 'ho_org';
SELECT * FROM pg_temp.budgets;
INSERT INTO keyvault.usage_records (user_id, model, credits, member_id) VALUES ('ho_org', 'gpt-5', 11, 'ann');
SELECT * FROM pg_temp.budgets;
SELECT scope, resets_at > now() AND resets_at <= now() + CASE per WHEN 'day' THEN interval '1 day' ELSE interval '31 days' END AS resets FROM keyvault.budget_status WHERE user_id = 'ho_org' ORDER BY 1;
-- changed, and removed: then the debit need not look any more
SELECT keyvault.set_budget('ho_org', 12, 'day') IS NOT NULL AS changed;
SELECT state FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ho_org', 2)$$);
SELECT keyvault.set_budget('ho_org', NULL, 'day') IS NOT NULL AS removed, keyvault.set_budget('ho_org', NULL, 'day') IS NOT NULL AS again;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('ho_org', 2);
SELECT notice_at FROM keyvault.credit_balances WHERE user_id = 'ho_org';
SELECT keyvault.set_budget('ho_org', NULL, scope => 'model', target => 'gpt-5') IS NOT NULL, keyvault.set_budget('ho_org', NULL, 'day', scope => 'member', target => 'ann') IS NOT NULL,
       keyvault.set_budget('ho_org', NULL, 'month', 'usd', 'issued_key', '00000000-0000-7000-8000-0000000000aa') IS NOT NULL;
SELECT notice_at FROM keyvault.credit_balances WHERE user_id = 'ho_org';
-- a settlement that does not state its cost in USD has that of its tokens, else what was reserved
SELECT keyvault.upsert_user('ho_u', plan => 'pro') IS NOT NULL AS made, keyvault.set_budget('ho_u', 10, 'month', 'usd') IS NOT NULL;
SELECT keyvault.settle_credits(keyvault.reserve_credits(100, user_id => 'ho_u', cost_usd => 5), 80) IS NOT NULL AS as_reserved,
       keyvault.settle_credits(keyvault.reserve_credits(100, user_id => 'ho_u', cost_usd => 4, model => 'gpt-5'), 80, input_tokens => 1000000, output_tokens => 10000, cached_tokens => 500000) IS NOT NULL AS by_tokens,
       keyvault.settle_credits(keyvault.reserve_credits(100, user_id => 'ho_u', cost_usd => 1), 80, model => 'gpt-99', input_tokens => 1000) IS NOT NULL AS as_reserved,
       keyvault.settle_credits(keyvault.reserve_credits(100, user_id => 'ho_u', cost_usd => 1), 80, model => 'gpt-5', input_tokens => 1000, cost_usd => 0) IS NOT NULL AS stated;
SELECT keyvault.record_usage('chat', 'gpt-5', 1000000, 0, 1, 'ho_u') IS NOT NULL AS by_tokens, keyvault.record_usage('chat', 'gpt-5', 1000000, 0, 1, 'ho_u', cost_usd => 0) IS NOT NULL AS stated,
       keyvault.record_usage('chat', 'gpt-99', 1000000, 0, 1, 'ho_u') IS NOT NULL AS no_price;
SELECT model, credits::float, cost_usd::float, price FROM keyvault.usage_records WHERE user_id = 'ho_u' ORDER BY id;
SELECT * FROM pg_temp.budgets WHERE user_id = 'ho_u';
-- a model's budget counts its dated names too, as prices do, and no other model
SELECT keyvault.upsert_user('ho_m', plan => 'pro') IS NOT NULL AS made, keyvault.set_budget('ho_m', 10, scope => 'model', target => 'gpt-5') IS NOT NULL;
INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('ho_m', 'gpt-5-2025-08-07', 4), ('ho_m', 'gpt-5-latest', 3), ('ho_m', 'gpt-5-mini', 50), ('ho_m', 'gpt-5.1-20251113', 50);
SELECT * FROM pg_temp.budgets WHERE user_id = 'ho_m';
SELECT state, message FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES ('ho_m', 'gpt-5-20250807', 4)$$);
SELECT state FROM pg_temp.refusal($$SELECT keyvault.reserve_credits(4, user_id => 'ho_m', model => 'gpt-5-2025-08-07')$$);
SELECT s.state FROM (VALUES ('1', 'week', 'credits', 'user', NULL), ('1', 'day', 'eur', 'user', NULL), ('1', 'day', 'usd', 'team', 'x'), ('1', 'day', 'usd', 'user', 'x'),
                            ('1', 'day', 'usd', 'model', NULL), ('-1', 'day', 'usd', 'user', NULL), ('1', NULL, 'usd', 'user', NULL), ('1', 'day', 'usd', 'issued_key', 'x')) v(amount, per, unit, scope, target),
       LATERAL pg_temp.refusal(format('SELECT keyvault.set_budget(''ho_org'', %L, %L, %L, %L, %L)', amount, per, unit, scope, target)) s;
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'ho\_%';
