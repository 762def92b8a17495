-- What calls are held, charged and believed, with no worker to send anything.
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
-- An answer to a request, as the worker settles it.
CREATE FUNCTION pg_temp.answer(request uuid, model text, input bigint, cached bigint, output bigint, usd numeric = NULL) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    who text;
    told text;
BEGIN
    UPDATE keyvault.requests SET status = 'sent', attempts = 1 WHERE id = request RETURNING user_id INTO who;
    ASSERT keyvault._settle_request(who, request, 1, 'done', 200, '{}', NULL, model, input, cached, output, usd, false, NULL);
    SELECT format('%s: %s (%s cached) + %s = %s tokens, %s USD, %s credits, %s overrun', u.model, u.input_tokens, u.cached_tokens, u.output_tokens, u.tokens, trim_scale(u.cost_usd),
                  trim_scale(u.credits), trim_scale(u.credits_overrun)) INTO STRICT told FROM keyvault.usage_records u WHERE u.request_id = request;
    RETURN told;
END $$;
CREATE VIEW pg_temp.asked AS
SELECT r.user_id, r.provider, r.path, r.model, r.body, trim_scale(r.estimated_usd) AS estimated_usd, trim_scale(h.reserved) AS held, trim_scale(h.cost_usd) AS held_usd
  FROM keyvault.requests r LEFT JOIN keyvault.credit_holds h ON h.user_id = r.user_id AND h.id = r.hold_id WHERE r.user_id LIKE 'rp\_%' ORDER BY r.id;
INSERT INTO keyvault.plans (plan, monthly_credits, unknown_model) VALUES ('rp_plain', NULL, 'charge'), ('rp_strict', NULL, 'refuse'), ('rp_lenient', NULL, 'allow');
SELECT keyvault.upsert_user('rp_a', plan => 'rp_plain') IS NOT NULL AS made, keyvault.upsert_user('rp_s', plan => 'rp_strict') IS NOT NULL,
       keyvault.upsert_user('rp_l', plan => 'rp_lenient') IS NOT NULL;
SELECT count(keyvault.store_platform_key(p, k)) FROM (VALUES ('openai', 'sk-regress-platform'), ('gemini', 'AIza-regress-platform'), ('exa', 'regress-platform-exa')) v(p, k);

-- A model without a price: what the plan says, when the request is queued and when its answer is there.
SELECT keyvault.request('openai', '{"model": "gpt-99", "max_tokens": 1000}', user_id => 'rp_a') AS charged \gset
SELECT keyvault.request('openai', '{"model": "gpt-99", "max_tokens": 1000}', user_id => 'rp_l') AS allowed \gset
SELECT * FROM pg_temp.refusal($$SELECT keyvault.request('openai', '{"model": "gpt-99"}', user_id => 'rp_s')$$);
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_tokens": 1000}', user_id => 'rp_s') AS priced \gset
SELECT user_id, model, estimated_usd, held FROM pg_temp.asked;
SELECT pg_temp.answer(:'charged', 'gpt-99', 10, 0, 990);
SELECT pg_temp.answer(:'allowed', 'gpt-99', 10, 0, 990);
-- one that has lost its price since is not free for it
BEGIN;
DELETE FROM keyvault.model_prices WHERE model = 'gpt-5-mini';
SELECT pg_temp.answer(:'priced', 'gpt-99', 10, 0, 990);
SELECT price FROM keyvault.usage_records WHERE user_id LIKE 'rp\_%' ORDER BY id;
ROLLBACK;
-- an answer may name the model better than the request
SELECT keyvault.request('openai', '{"model": "best-of-today"}', user_id => 'rp_a') AS alias \gset
SELECT pg_temp.answer(:'alias', 'gpt-5-mini-2025-08-07', 1000, 0, 1000);
-- a call that names no model, and one whose provider counts no tokens
SELECT keyvault.request('openai', '{}', user_id => 'rp_s') AS nameless \gset
SELECT keyvault.request('exa', '{"query": "x"}', user_id => 'rp_s') AS search \gset
SELECT keyvault.request('exa', '{"query": "x", "model": "exa-99"}', user_id => 'rp_a') AS named_search \gset
SELECT pg_temp.answer(:'nameless', 'gpt-5-mini', 1000, 0, 1000);
SELECT pg_temp.answer(:'search', NULL, NULL, NULL, NULL), pg_temp.answer(:'named_search', NULL, NULL, NULL, NULL);

-- What an answer claims is believed as far as the request allows it; the rest is overrun, and noted.
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_tokens": 1000, "n": 2}', user_id => 'rp_a') AS limited \gset
SELECT keyvault.request('openai', '{"model": "gpt-5-mini"}', user_id => 'rp_a') AS unlimited \gset
SELECT keyvault.request('openai', '{"model": "gpt-5-mini"}', user_id => 'rp_a') AS input_only \gset
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_tokens": 1000}', user_id => 'rp_a') AS image \gset
SELECT keyvault.request('openai', '{"model": "gpt-99"}', user_id => 'rp_a') AS unknown \gset
SELECT context_window FROM keyvault.model_prices WHERE provider = 'openai' AND model = 'gpt-5-mini';
SELECT pg_temp.answer(:'limited', NULL, 999999999, 999999999, 999999999);
SELECT pg_temp.answer(:'unlimited', NULL, 999999999, 0, 999999999);
SELECT pg_temp.answer(:'input_only', NULL, 999999999, 0, 0);
SELECT pg_temp.answer(:'image', NULL, 300000, 0, 1000);
SELECT pg_temp.answer(:'unknown', NULL, 999999999, 0, 999999999);
SELECT price -> 'claimed' AS claimed FROM keyvault.usage_records WHERE request_id IN (:'limited', :'unlimited', :'input_only', :'image', :'unknown') ORDER BY id;
SELECT input_tokens, cached_tokens, output_tokens FROM keyvault.responses WHERE id = :'limited';
SELECT keyvault.request('exa', '{"query": "x"}', user_id => 'rp_a') AS dear, keyvault.request('exa', '{"query": "x"}', user_id => 'rp_a') AS hostile,
       keyvault.request('exa', '{"query": "x"}', user_id => 'rp_a') AS free \gset
SELECT pg_temp.answer(:'dear', NULL, NULL, NULL, NULL, 0.5), pg_temp.answer(:'hostile', NULL, NULL, NULL, NULL, 1e30), pg_temp.answer(:'free', NULL, NULL, NULL, NULL, 0);
SELECT price FROM keyvault.usage_records WHERE request_id IN (:'dear', :'hostile', :'free') ORDER BY id;
-- nor does it use up a budget in USD
SELECT keyvault.set_budget('rp_b', 1, 'day', 'usd') IS NOT NULL AS made;
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_tokens": 1000}', user_id => 'rp_b') AS budgeted \gset
SELECT pg_temp.answer(:'budgeted', NULL, 999999999, 0, 999999999);
SELECT trim_scale(spent) AS spent FROM keyvault.budget_status WHERE user_id = 'rp_b';

-- A plan's own price makes the hold, and what an answer without usage costs.
INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, output_usd_per_mtok) VALUES ('rp_plain', 'openai', 'gpt-5-mini', 2.5, 20);
SELECT keyvault.request('openai', '{"model": "gpt-5-mini-2025-08-07", "max_tokens": 1000}', user_id => 'rp_a') AS sold \gset
SELECT model, estimated_usd, held, held_usd FROM pg_temp.asked WHERE user_id = 'rp_a' AND held IS NOT NULL;
SELECT pg_temp.answer(:'sold', NULL, NULL, NULL, NULL);
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_tokens": 1000}', user_id => 'rp_a') AS sold \gset
SELECT pg_temp.answer(:'sold', NULL, 12, 0, 1000);

-- Nor is a stated cost cut where nobody has said what is usual.
BEGIN;
UPDATE keyvault.providers SET usd_per_request = 0 WHERE provider = 'exa';
SELECT pg_temp.answer(keyvault.request('exa', '{"query": "x"}', user_id => 'rp_a'), NULL, NULL, NULL, NULL, 0.007) AS stated;
ROLLBACK;

-- The model that the path names is the one that is called: no other may be priced in its place.
SELECT s.* FROM (VALUES ('{"model": "gemini-2.5-flash-lite"}', '/v1beta/models/gemini-2.5-pro:generateContent', NULL),
                        ('{"model": "models/gemini-2.5-flash-lite"}', '/v1beta/models/gemini-2.5-pro:generateContent', NULL),
                        ('{}', '/v1beta/models/gemini-2.5-pro:generateContent', 'gemini-2.5-flash-lite'),
                        ('{}', '/v1beta/models/gemini-2.5-pr%6F:generateContent', NULL),
                        ('{}', '/v1beta/%6Dodels/gemini-2.5-pro:generateContent', 'gemini-2.5-flash-lite')) c(body, path, model),
       LATERAL pg_temp.refusal(format('SELECT keyvault.request(''gemini'', %L, path => %L, model => %L, user_id => ''rp_g'')', body, path, model)) s;
SELECT * FROM pg_temp.refusal($$SELECT keyvault.request('exa', '{"model": "dear"}', model => 'cheap', user_id => 'rp_g')$$);
SELECT keyvault.request('gemini', '{}', path => '/v1beta/models/gemini-2.5-pro:generateContent', user_id => 'rp_g') IS NOT NULL AS queued,
       keyvault.request('gemini', '{"model": "models/gemini-2.5-pro"}', path => '/v1beta/models/gemini-2.5-pro:generateContent', user_id => 'rp_g') IS NOT NULL,
       keyvault.request('gemini', '{"model": "models/gemini-2.5-pro"}', user_id => 'rp_g') IS NOT NULL,
       keyvault.request('gemini', '{"model": "gemini-2.5-flash"}', path => '/v1/models/gemini-2.5-flash:generateContent', api_key => 'AIza-regress-one-call', user_id => 'rp_g') IS NOT NULL,
       keyvault.request('openai', '{"model": "gpt-5"}', model => 'gpt-5-mini', user_id => 'rp_g') IS NOT NULL;
SELECT path, model, body, held IS NOT NULL AS held FROM pg_temp.asked WHERE user_id = 'rp_g';

-- An answer that is lost: nothing is charged until somebody says what became of the call, once.
CREATE FUNCTION pg_temp.lose(request uuid) RETURNS uuid LANGUAGE plpgsql AS $$
BEGIN
    UPDATE keyvault.requests SET status = 'sent', attempts = 1 WHERE id = request;
    ASSERT keyvault._settle_request((SELECT user_id FROM keyvault.requests WHERE id = request), request, 1, 'unknown', NULL, NULL, 'lost', NULL, NULL, NULL, NULL, NULL, false, NULL);
    RETURN request;
END $$;
CREATE VIEW pg_temp.outcomes AS
SELECT r.status, r.error, a.status AS answer, trim_scale(a.credits) AS answer_credits, u.input_tokens, u.output_tokens, u.tokens, trim_scale(u.cost_usd) AS cost_usd,
       trim_scale(u.credits) AS credits, trim_scale(u.credits_overrun) AS overrun, u.price, h.id IS NOT NULL AS held
  FROM keyvault.requests r JOIN keyvault.responses a ON a.user_id = r.user_id AND a.id = r.id LEFT JOIN keyvault.usage_records u ON u.request_id = r.id
  LEFT JOIN keyvault.credit_holds h ON h.id = r.hold_id WHERE r.user_id = 'rp_u' ORDER BY r.id;
SELECT pg_temp.lose(keyvault.request('openai', '{"model": "gpt-5", "max_tokens": 1000}', user_id => 'rp_u')) AS released \gset
SELECT pg_temp.lose(keyvault.request('openai', '{"model": "gpt-5", "max_tokens": 1000}', user_id => 'rp_u')) AS estimated \gset
SELECT pg_temp.lose(keyvault.request('openai', '{"model": "gpt-5", "max_tokens": 1000}', user_id => 'rp_u')) AS counted \gset
SELECT pg_temp.lose(keyvault.request('openai', '{"model": "gpt-5", "max_tokens": 1000}', user_id => 'rp_u')) AS stated \gset
SELECT pg_temp.lose(keyvault.request('openai', '{"model": "gpt-5", "max_tokens": 1000}', user_id => 'rp_u')) AS forgotten \gset
SELECT keyvault.request('openai', '{"model": "gpt-5", "max_tokens": 1000}', user_id => 'rp_u') AS queued \gset
SELECT user_id, id = :'released' AS first, provider, model, payer, estimated_usd, credits_held, held_until > now() + interval '23 hours' AS held, finished_at IS NOT NULL AS finished, error
  FROM keyvault.unknown_requests() WHERE user_id = 'rp_u';
SELECT s.* FROM unnest(ARRAY['NULL, ''charge''', '%L, NULL', '%L, ''ignore''', '%L, ''release'', 1', '%L, ''release'', cost_usd => 1', '%L, ''charge'', -1', '%L, ''charge'', 1, -1', '%L, ''charge'', 1, 1, -1',
                              '%L, ''charge'', cost_usd => 0', '%L, ''charge'', cost_usd => ''NaN''', '%L, ''charge'', cost_usd => ''Infinity''', '''00000000-0000-7000-8000-000000000000'', ''charge''']) a,
       LATERAL pg_temp.refusal(format('SELECT keyvault.reconcile_request(' || a || ')', :'released')) s;
SELECT keyvault.reconcile_request(:'released', 'release'), keyvault.reconcile_request(:'estimated', 'charge'), keyvault.reconcile_request(:'counted', 'charge', 100, 200, 50),
       keyvault.reconcile_request(:'stated', 'charge', cost_usd => 2), keyvault.reconcile_request(:'stated', 'charge'), keyvault.reconcile_request(:'queued', 'release');
SELECT * FROM pg_temp.outcomes;
SELECT credits_used, credits_held FROM keyvault.credit_status WHERE user_id = 'rp_u';
-- one that nobody reconciles is the plan's to say
UPDATE keyvault.requests SET finished_at = now() - interval '1 day' WHERE id = :'forgotten';
SELECT keyvault._charge_unknown(100);
UPDATE keyvault.plans SET unknown_outcome = 'charge' WHERE plan = 'rp_plain';
SELECT keyvault.set_plan('rp_u', 'rp_plain');
SELECT pg_temp.lose(keyvault.request('openai', '{"model": "gpt-5", "max_tokens": 1000}', user_id => 'rp_u')) AS recent, pg_temp.lose(keyvault.request('openai', '{"model": "gpt-5", "max_tokens": 1000}', user_id => 'rp_u')) AS second \gset
UPDATE keyvault.requests SET finished_at = now() - interval '25 hours' WHERE id = :'second';
-- maintenance charges it while its credits are held
SELECT held_until > now() + interval '47 hours' AS held FROM keyvault.unknown_requests() WHERE id = :'second';
SELECT purged >= 2 AS purged FROM keyvault._purge(100);
SELECT r.id = :'recent' AS recent, r.status, r.error FROM keyvault.requests r WHERE r.id IN (:'forgotten', :'recent', :'second') ORDER BY id;
SELECT credits, cost_usd FROM keyvault.usage_records WHERE request_id IN (:'forgotten', :'second');
-- the test of a key costs nothing, whatever became of it
SELECT keyvault.store_api_key('openai', 'sk-regress-own', user_id => 'rp_u') IS NOT NULL AS stored;
SELECT keyvault.test_api_key('openai', user_id => 'rp_u') AS test \gset
UPDATE keyvault.requests SET status = 'unknown', finished_at = now() - interval '2 days' WHERE id = :'test';
SELECT keyvault._charge_unknown(100), (SELECT count(*) FROM keyvault.unknown_requests() WHERE id = :'test') AS listed, keyvault.reconcile_request(:'test', 'charge', 1000, 1000);
DELETE FROM keyvault.requests WHERE id = :'test';
-- whoever acts for users, and administrators; not the users
CREATE ROLE regress_kv_user;
CREATE ROLE regress_kv_admin;
SELECT keyvault.grant_access('regress_kv_user', 'user'), keyvault.grant_access('regress_kv_admin', 'admin');
SET ROLE regress_kv_user;
SELECT state FROM pg_temp.refusal($$SELECT keyvault.reconcile_request('00000000-0000-7000-8000-000000000000', 'charge')$$);
SELECT state FROM pg_temp.refusal($$SELECT keyvault.unknown_requests()$$);
RESET ROLE;
GRANT EXECUTE ON FUNCTION keyvault.unknown_requests(), keyvault.reconcile_request TO regress_kv_user;
SET ROLE regress_kv_user;
SELECT state, message FROM pg_temp.refusal($$SELECT keyvault.reconcile_request('00000000-0000-7000-8000-000000000000', 'charge')$$);
SELECT state, message FROM pg_temp.refusal($$SELECT keyvault.unknown_requests()$$);
RESET ROLE;
REVOKE EXECUTE ON FUNCTION keyvault.unknown_requests(), keyvault.reconcile_request FROM regress_kv_user;
SET ROLE regress_kv_admin;
SELECT count(*) FROM keyvault.unknown_requests() WHERE user_id = 'rp_u';
SELECT keyvault.reconcile_request(:'recent', 'release');
RESET ROLE;
SELECT keyvault.revoke_access('regress_kv_user', 'user'), keyvault.revoke_access('regress_kv_admin', 'admin');
DROP ROLE regress_kv_user, regress_kv_admin;

SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'rp\_%';
SELECT count(keyvault.cancel_request(id)) FROM keyvault.requests WHERE user_id LIKE 'rp\_%' AND status = 'queued';
DELETE FROM keyvault.api_keys WHERE user_id = '';
SELECT count(keyvault.set_plan(user_id, 'free')) FROM keyvault.users WHERE plan LIKE 'rp\_%';
DELETE FROM keyvault.plan_prices WHERE plan LIKE 'rp\_%';
DELETE FROM keyvault.plans WHERE plan LIKE 'rp\_%';
