-- The queue's own rules, with no worker to send anything.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE ROLE regress_kv_user;
SELECT keyvault.grant_access('regress_kv_user', 'user');
\set chat '\'{"model": "gpt-5-mini", "max_completion_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}\''

-- Whose key: the user's own, the platform's, or neither.
SELECT keyvault.request('cohere', '{"model": "command-a-03-2025"}', user_id => 'rq_a');
SELECT keyvault.request('cohere', '{"model": "command-a-03-2025"}', user_id => 'rq_a', payer => 'user');
SELECT keyvault.request('cohere', '{"model": "command-a-03-2025"}', user_id => 'rq_a', payer => 'platform');
SELECT keyvault.store_platform_key('cohere', 'regress-platform-cohere') IS NOT NULL AS stored;
SELECT keyvault.request('cohere', :chat, user_id => 'rq_a') AS platform_paid \gset
SELECT keyvault.store_api_key('cohere', 'regress-own-cohere', user_id => 'rq_a') IS NOT NULL AS stored;
SELECT keyvault.request('cohere', :chat, user_id => 'rq_a') AS own_paid \gset
SELECT keyvault.request('cohere', :chat, user_id => 'rq_a', payer => 'platform') IS NOT NULL AS queued;
SELECT keyvault.request('cohere', :chat, user_id => 'rq_a', api_key => 'regress-key-for-one-call') AS one_call \gset
SELECT payer, status, api_key_id IS NULL AS for_one_call, call_key IS NOT NULL AS sealed, position('regress'::bytea IN call_key) AS found, hold_id IS NOT NULL AS held
  FROM keyvault.requests WHERE user_id = 'rq_a' ORDER BY id;

-- Keys for one call have nonces of their own, in one session and the next.
SELECT count(keyvault.request('openai', :chat, user_id => 'rq_nonce', api_key => 'sk-regress-key-for-one-call')) FROM generate_series(1, 25);
\c -
SELECT count(keyvault.request('openai', :chat, user_id => 'rq_nonce', api_key => 'sk-regress-key-for-one-call')) FROM generate_series(1, 25);
SELECT count(*), count(DISTINCT substr(call_key, 2, 12)) AS nonces FROM keyvault.requests WHERE user_id = 'rq_nonce';
SELECT bool_and(keyvault.cancel_request(id)) AS canceled FROM keyvault.requests WHERE user_id = 'rq_nonce';

-- A platform-paid call holds its estimate: 100 output tokens and a third of the body's bytes of gpt-5-mini.
SELECT keyvault.store_platform_key('openai', 'sk-regress-platform') IS NOT NULL AS stored;
SELECT keyvault.request('openai', :chat, user_id => 'rq_hold') AS held \gset
SELECT r.estimated_usd, h.amount, h.amount = r.estimated_usd * 1000 AS at_plan_rate, h.expires_at FROM keyvault.requests r JOIN keyvault.credit_holds h ON h.id = r.hold_id WHERE r.id = :'held';
SELECT credits_held, credits_remaining FROM keyvault.credit_status WHERE user_id = 'rq_hold';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('rq_hold', 999.7);
\set VERBOSITY sqlstate
SELECT keyvault.request('openai', :chat, user_id => 'rq_hold');
\set VERBOSITY terse
-- Canceling gives it back; once.
SELECT keyvault.cancel_request(:'held'), keyvault.cancel_request(:'held');
SELECT status, error FROM keyvault.request_status WHERE id = :'held';
SELECT status, error FROM keyvault.response(:'held');
SELECT credits_held FROM keyvault.credit_status WHERE user_id = 'rq_hold';

-- Idempotency belongs to the user.
SELECT keyvault.request('cohere', :chat, user_id => 'rq_a', idempotency_key => 'once') = keyvault.request('cohere', :chat, user_id => 'rq_a', idempotency_key => 'once') AS same;
SELECT keyvault.request('cohere', :chat, user_id => 'rq_b', idempotency_key => 'once') NOT IN (SELECT id FROM keyvault.requests WHERE user_id = 'rq_a') AS other_user;
SELECT keyvault.request('cohere', '{"model": "gpt-5"}', user_id => 'rq_a', idempotency_key => 'once');

-- The model is named in the body or by the argument; Gemini wants it in the path.
SELECT keyvault.store_platform_key('gemini', 'AIza-regress-platform') IS NOT NULL AS stored;
SELECT keyvault.request('gemini', '{"contents": []}', model => 'gemini-3.5-flash', user_id => 'rq_b') IS NOT NULL AS queued;
SELECT keyvault.request('openai', '{"messages": []}', model => 'gpt-5', user_id => 'rq_b') IS NOT NULL AS queued;
SELECT provider, path, model, body FROM keyvault.requests WHERE user_id = 'rq_b' AND provider IN ('gemini', 'openai') ORDER BY id;
SELECT keyvault.request('gemini', '{"contents": []}', user_id => 'rq_b');
SELECT keyvault.request('gemini', '{"contents": []}', model => '../../v1/files?x=', user_id => 'rq_b');

-- Bad arguments.
SELECT keyvault.request('openia', '{}', user_id => 'rq_b');
SELECT keyvault.request('openai', '[]', user_id => 'rq_b');
SELECT keyvault.request('openai', '{"stream": true}', user_id => 'rq_b');
SELECT keyvault.request('openai', '{}', path => '@evil.example/', user_id => 'rq_b');
SELECT keyvault.request('openai', '{}', path => '/../admin', user_id => 'rq_b');
SELECT keyvault.request('openai', '{"messages": []}', model => repeat('m', 256), user_id => 'rq_b');
SELECT keyvault.request('openai', jsonb_build_object('model', repeat('m', 256)), user_id => 'rq_b');
-- An empty name is no model.
BEGIN;
SELECT count(keyvault.request('openai', body, model => model, user_id => 'rq_b'))
  FROM (VALUES ('{"messages": []}'::jsonb, NULL), ('{"messages": []}', ''), ('{"messages": [], "model": ""}', NULL)) r (body, model);
SELECT model, estimated_usd, count(*) FROM keyvault.requests WHERE user_id = 'rq_b' AND provider = 'openai' AND model IS NULL GROUP BY 1, 2;
ROLLBACK;
SELECT keyvault.request('openai', '{}', path => E'/v1\r\nX-Injected: 1', user_id => 'rq_b');
SELECT keyvault.request('copilotkit', '{}', user_id => 'rq_b');
SELECT keyvault.request('openai', '{}', payer => 'boss', user_id => 'rq_b');
SELECT keyvault.request('openai', '{}', payer => 'platform', api_key => 'sk-regress-key-for-one-call', user_id => 'rq_b');
SELECT keyvault.request('openai', '{}', timeout => '0', user_id => 'rq_b');
SELECT keyvault.request('openai', '{}', timeout => '1 day', user_id => 'rq_b');
SELECT keyvault.request('openai', NULL, user_id => 'rq_b');
SELECT keyvault.request('openai', '{}');
\set VERBOSITY sqlstate
SELECT keyvault.request('openai', '{}', user_id => 'rq_b', api_key => E'two\nlines');
UPDATE keyvault.users SET status = 'suspended' WHERE user_id = 'rq_b';
SELECT keyvault.request('openai', '{}', user_id => 'rq_b');
UPDATE keyvault.users SET status = 'active' WHERE user_id = 'rq_b';

-- Answers are their user's.
\set VERBOSITY terse
SELECT count(*) FROM keyvault.response(:'own_paid');
SELECT keyvault.response('00000000-0000-7000-8000-000000000000');
BEGIN;
SELECT keyvault.act_as('rq_b');
SET LOCAL ROLE regress_kv_user;
SAVEPOINT s;
SELECT keyvault.response(:'own_paid');
ROLLBACK TO s;
SELECT keyvault.wait_response(:'own_paid', '1 ms');
ROLLBACK TO s;
SELECT keyvault.cancel_request(:'own_paid');
ROLLBACK TO s;
SELECT count(*) FROM keyvault.request_status WHERE user_id = 'rq_a';
SELECT call_key FROM keyvault.requests;
ROLLBACK;
SELECT count(*) FROM keyvault.wait_response(:'own_paid', '1 ms');
BEGIN;
SELECT keyvault.wait_response(keyvault.request('openai', '{}', user_id => 'rq_c'));
ROLLBACK;
BEGIN;
CALL keyvault.call('openai', '{}', user_id => 'rq_c');
ROLLBACK;

-- Settlement, as the worker does it: only the attempt under way counts, and only once.
SELECT user_id, attempt, provider, dialect, base_url, path, auth_header, auth_scheme, payer, body FROM keyvault._claim_requests(1, 10, 'rq_a') WHERE user_id = 'rq_b';
SELECT keyvault.request('openai', :chat, user_id => 'rq_s') AS settled \gset
SELECT attempt FROM keyvault._claim_requests(100, 100, 'rq_c');
SELECT keyvault._settle_request('rq_s', :'settled', 2, 'done', 200, '{}', NULL, 'gpt-5-mini', 1, 0, 1, NULL, false, NULL) AS wrong_attempt;
SELECT keyvault._settle_request('rq_s', :'settled', 1, 'done', 200, '{"ok": 1}', NULL, 'gpt-5-mini-2025-08-07', 1000, 400, 200, NULL, false, NULL) AS settled;
SELECT keyvault._settle_request('rq_s', :'settled', 1, 'done', 200, '{}', NULL, 'gpt-5-mini', 1, 0, 1, NULL, false, NULL) AS again;
-- (600 x 0.25 + 400 x 0.025 + 200 x 2) / 1,000,000 USD, 1000 credits each
SELECT payer, model, input_tokens, cached_tokens, output_tokens, tokens, cost_usd, credits, credits_overrun FROM keyvault.usage_records WHERE request_id = :'settled';
SELECT credits_used, credits_held FROM keyvault.credit_balances WHERE user_id = 'rq_s';
SELECT status, status_code, body, cost_usd, credits FROM keyvault.response(:'settled');

-- More than was held, and more than is left: charged up to the limit, the rest recorded as overrun.
SELECT keyvault.request('openai', :chat, user_id => 'rq_o') AS overrun \gset
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('rq_o', 999);
SELECT attempt FROM keyvault._claim_requests(100, 100, 'rq_c');
SELECT keyvault._settle_request('rq_o', :'overrun', 1, 'done', 200, '{}', NULL, NULL, 1000000000, 0, 1000000000, NULL, false, NULL) AS settled;
SELECT credits, credits_overrun, cost_usd FROM keyvault.usage_records WHERE request_id = :'overrun';
SELECT credits_used, credits_held, credits_remaining FROM keyvault.credit_status WHERE user_id = 'rq_o';

-- An answer without usage is charged as estimated, a failure not at all, an unknown outcome stays held for a day.
SELECT keyvault.set_plan('rq_o', 'pro');
SELECT keyvault.request('openai', :chat, user_id => 'rq_o') AS silent, keyvault.request('openai', :chat, user_id => 'rq_o') AS failed, keyvault.request('openai', :chat, user_id => 'rq_o') AS lost \gset
SELECT attempt FROM keyvault._claim_requests(100, 100, 'rq_c');
SELECT keyvault._settle_request('rq_o', :'silent', 1, 'done', 200, '{}', NULL, NULL, NULL, NULL, NULL, NULL, false, NULL),
       keyvault._settle_request('rq_o', :'failed', 1, 'failed', 401, '{}', 'refused', NULL, NULL, NULL, NULL, NULL, true, NULL);
SELECT keyvault._settle_request('rq_o', :'lost', 1, 'unknown', NULL, NULL, 'lost', NULL, NULL, NULL, NULL, NULL, false, NULL);
SELECT r.status, u.credits = r.estimated_usd * 1000 AS as_estimated, h.expires_at BETWEEN now() + interval '23 hours' AND now() + interval '25 hours' AS held_for_a_day
  FROM keyvault.requests r LEFT JOIN keyvault.usage_records u ON u.request_id = r.id LEFT JOIN keyvault.credit_holds h ON h.id = r.hold_id
 WHERE r.id IN (:'silent', :'failed', :'lost') ORDER BY r.id;
SELECT status FROM keyvault.api_keys WHERE user_id = '' AND provider = 'openai';

-- The estimate takes the largest limit, times the answers asked for.
SELECT keyvault._estimate_request('rq_o', p, 'gpt-5-mini', 'platform', '{"max_tokens": 1000, "max_completion_tokens": 1, "n": 3}')
     = keyvault._estimate_request('rq_o', p, 'gpt-5-mini', 'platform', '{"max_tokens": 3000, "max_completion_tokens": 1, "n": 1}') AS same
  FROM keyvault.providers p WHERE provider = 'openai';
-- With the platform's key only paths that an administrator opened; with one's own any.
SELECT keyvault.request('openai', '{}', path => '/v1/files', user_id => 'rq_o');
SELECT keyvault.request('openai', '{}', path => '/v1/embeddings', user_id => 'rq_o') IS NOT NULL AS queued;
SELECT keyvault.request('gemini', '{}', path => '/v1beta/models/{model}:embedContent', model => 'gemini-embedding-001', user_id => 'rq_o') IS NOT NULL AS queued;
SELECT keyvault.request('gemini', '{}', path => '/v1beta/models/gemini-embedding-001:embedContent', model => 'gemini-embedding-001', user_id => 'rq_o') IS NOT NULL AS queued;
SELECT keyvault.request('openai', '{}', path => '/v1/files', user_id => 'rq_o', api_key => 'sk-regress-for-one-call') IS NOT NULL AS queued;
SELECT keyvault.request('openai', '{}', idempotency_key => '', user_id => 'rq_o');
-- A header could be used to smuggle others in.
\set VERBOSITY sqlstate
UPDATE keyvault.providers SET headers = '{"x": "1\r\nAuthorization: mine"}' WHERE provider = 'openai';
UPDATE keyvault.providers SET headers = '{"x y": "1"}' WHERE provider = 'openai';
UPDATE keyvault.providers SET headers = '{"x": 1}' WHERE provider = 'openai';
DELETE FROM keyvault.plans WHERE plan = 'free';
DELETE FROM keyvault.plans WHERE plan = 'pro';
\set VERBOSITY terse
-- standard_conforming_strings of the caller changes nothing.
SET standard_conforming_strings = off;
SELECT keyvault.request('openai', '{}', user_id => 'rq_o') IS NOT NULL AS queued;
RESET standard_conforming_strings;

-- Retries wait, and users take turns.
UPDATE keyvault.requests SET status = 'canceled', call_key = NULL WHERE status = 'queued';
SELECT count(keyvault.request('openai', :chat, user_id => 'rq_turn_' || u)) FROM generate_series(1, 3) u, generate_series(1, 10) i;
SELECT user_id, count(*) FROM keyvault._claim_requests(6, 100, '') GROUP BY 1 ORDER BY 1;
SELECT user_id, count(*) FROM keyvault._claim_requests(100, 4, '') GROUP BY 1 ORDER BY 1;
SELECT user_id, count(*) FROM keyvault._claim_requests(1, 100, 'rq_turn_1') GROUP BY 1;
-- a user who has no room does not take another's turn
SELECT user_id, count(*) FROM keyvault._claim_requests(1, 1, '') GROUP BY 1;
SELECT keyvault.request('openai', :chat, user_id => 'rq_turn_last') IS NOT NULL AS queued;
SELECT user_id, count(*) FROM keyvault._claim_requests(1, 1, '') GROUP BY 1;
SELECT bool_and(keyvault._retry_request(user_id, id, 1, 60000, 'busy')) FROM keyvault.requests WHERE user_id = 'rq_turn_3' AND status = 'sent';
SELECT user_id, count(*) FROM keyvault._claim_requests(100, 100, 'rq_turn_2') GROUP BY 1;

SELECT keyvault.revoke_access('regress_kv_user', 'user');
DROP ROLE regress_kv_user;
