-- Prices: from tokens to USD, from USD to credits; rows without credits; record_usage.
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
INSERT INTO keyvault.plans (plan, monthly_credits, credits_per_usd, own_key_rate, infrastructure_usd, margin) VALUES
       ('pr_plain', NULL, 1000, 0, 0, 0), ('pr_margin', NULL, 1000, 0.1, 0.001, 0.25);
INSERT INTO keyvault.plans (plan, monthly_credits, unknown_model) VALUES ('pr_strict', NULL, 'refuse'), ('pr_lenient', NULL, 'allow');
INSERT INTO keyvault.model_prices (provider, model, input_usd_per_mtok, output_usd_per_mtok, cached_input_usd_per_mtok, reasoning_usd_per_mtok, usd_per_request, usd_per_unit, unit, context_tiers)
VALUES ('acme', 'tiered', 2, 10, 0.5, 20, 0.01, 0.04, 'image', '[{"over": 200000, "input": 4, "output": 15}, {"over": 500000, "input": 8, "cached_input": 2, "output": 30, "reasoning": 60}]'),
       ('zenith', 'tiered', 1, 5, NULL, NULL, 0, 0, NULL, NULL);
INSERT INTO keyvault.model_prices (provider, model, valid_from, input_usd_per_mtok, output_usd_per_mtok) VALUES
       ('acme', 'dated', '2020-01-01', 1, 1), ('acme', 'dated', '2025-01-01', 2, 2), ('acme', 'dated', '2099-01-01', 9, 9), ('acme', 'dated-2025-05-05', '2025-05-05', 5, 5);

-- Each kind of token by its own price, and the tier by all of the input.
SELECT c.input, c.cached, c.output, c.reasoning, c.units, q.usd::float, q.used
  FROM (VALUES (1000000, 0, 0, 0, NULL), (100000, 40000, 1000, 400, NULL), (200000, 0, 0, 0, 3), (200001, 100000, 1000, 500, NULL), (500001, 500001, 1000, 500, 1.5),
               (10, 20, 10, 20, NULL), (0, 0, 0, 0, NULL)) c(input, cached, output, reasoning, units),
       LATERAL keyvault._use_usd(keyvault._find_price('acme', 'tiered', now()), c.input, c.cached, c.output, c.reasoning, c.units) q;
-- The price of the time, and of the model's family.
SELECT t, m, (keyvault._find_price('acme', m, t)).input_usd_per_mtok::float FROM unnest('{2019-01-01,2020-01-01,2024-12-31 23:59:59.999999+00,2025-06-01,2099-01-01}'::timestamptz[]) t,
       unnest('{dated,dated-latest,dated-20251231,dated-2025-05-05,undated}'::text[]) m ORDER BY m, t;
-- Without a provider, the dearest.
SELECT (keyvault._find_price(NULL, 'tiered', now())).provider;

-- A row without credits is priced, and keeps the price it used.
SELECT keyvault.upsert_user('pr_a', plan => 'pr_plain') IS NOT NULL AS made, keyvault.upsert_user('pr_m', plan => 'pr_margin') IS NOT NULL;
INSERT INTO keyvault.usage_records (user_id, type, model, input_tokens, output_tokens) VALUES ('pr_a', 'chat', 'gpt-5-mini', 1000, 500);
INSERT INTO keyvault.usage_records (user_id, type, model, tokens, metadata) VALUES ('pr_a', 'chat', 'gpt-5-mini', 1000, '{}');
INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits, metadata) VALUES ('pr_a', 'chat', 'gpt-5-mini', 1000, NULL, '{}'), ('pr_a', 'chat', 'gpt-5-mini', 1000, 0, '{}');
INSERT INTO keyvault.usage_records (user_id, provider, model, payer, input_tokens, cached_tokens, output_tokens, reasoning_tokens, units) VALUES
       ('pr_m', 'acme', 'tiered', 'platform', 200001, 100000, 1000, 500, 2), ('pr_m', 'acme', 'tiered', 'user', 200001, 100000, 1000, 500, 2);
INSERT INTO keyvault.usage_records (user_id, model, cost_usd) VALUES ('pr_m', 'whatever', 0.5);
INSERT INTO keyvault.usage_records (user_id, type) VALUES ('pr_m', 'nothing');
SELECT user_id, type, provider, model, payer, credits::float, cost_usd::float, price FROM keyvault.usage_records WHERE user_id LIKE 'pr\_%' ORDER BY id;
SELECT user_id, credits_used::float FROM keyvault.credit_status WHERE user_id LIKE 'pr\_%' ORDER BY 1;
-- by every way in
COPY keyvault.usage_records (user_id, model, input_tokens, output_tokens) FROM stdin;
pr_copy	gpt-5-mini	1000	500
\.
INSERT INTO keyvault.usage_records_default (user_id, created_at, model, input_tokens, output_tokens) VALUES ('pr_copy', '2001-01-01', 'gpt-5-mini', 1000, 500);
SET session_replication_role = replica;
INSERT INTO keyvault.usage_records (user_id, model, input_tokens, output_tokens) VALUES ('pr_copy', 'gpt-5-mini', 1000, 500);
RESET session_replication_role;
SELECT credits::float, cost_usd::float FROM keyvault.usage_records WHERE user_id = 'pr_copy';
SELECT state FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, model, input_tokens) VALUES ('pr_limit', 'gpt-5.5-pro', 1000000)$$);

-- What a plan pays instead makes the credits; the cost stays the provider's.
INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, output_usd_per_mtok) VALUES ('pr_margin', 'openai', 'gpt-5-mini', 10, 20);
INSERT INTO keyvault.usage_records (user_id, model, input_tokens, output_tokens) VALUES ('pr_m', 'gpt-5-mini', 1000, 500);
SELECT credits::float, cost_usd::float, price FROM keyvault.usage_records WHERE user_id = 'pr_m' AND model = 'gpt-5-mini';

-- A model without a price is never silently free: charged with a warning, refused, or allowed with one.
INSERT INTO keyvault.usage_records (user_id, provider, model, tokens) VALUES ('pr_a', 'openai', 'gpt-99', 1000000);
INSERT INTO keyvault.usage_records (user_id, provider, model) VALUES ('pr_a', 'openai', 'gpt-99'), ('pr_a', NULL, 'gpt-99');
SELECT credits::float, cost_usd::float, price FROM keyvault.usage_records WHERE user_id = 'pr_a' AND model = 'gpt-99' ORDER BY id;
SELECT keyvault.upsert_user('pr_s', plan => 'pr_strict') IS NOT NULL AS made, keyvault.upsert_user('pr_l', plan => 'pr_lenient') IS NOT NULL;
SELECT state, message FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, model, tokens) VALUES ('pr_s', 'gpt-99', 1)$$);
INSERT INTO keyvault.usage_records (user_id, model, tokens) VALUES ('pr_l', 'gpt-99', 1);
SELECT credits::float, cost_usd::float, price FROM keyvault.usage_records WHERE user_id = 'pr_l';

-- Nor is a known model whose use states no tokens, though it has a price per request besides; a stated 0 is one. What has a price per unit, and states units, needs none.
INSERT INTO keyvault.usage_records (user_id, type, model) VALUES ('pr_a', 'chat', 'gpt-5');
INSERT INTO keyvault.usage_records (user_id, provider, model, units) VALUES ('pr_a', 'openai', 'gpt-5', 3);
INSERT INTO keyvault.usage_records (user_id, model, input_tokens) VALUES ('pr_a', 'gpt-5', 0);
INSERT INTO keyvault.usage_records (user_id, provider, model) VALUES ('pr_a', 'acme', 'tiered');
INSERT INTO keyvault.usage_records (user_id, provider, model, units) VALUES ('pr_a', 'acme', 'tiered', 2);
INSERT INTO keyvault.usage_records (user_id, model) VALUES ('pr_m', 'gpt-5-mini');
SELECT credits::float, cost_usd::float, price FROM keyvault.usage_records WHERE model = 'gpt-5' AND user_id = 'pr_a' OR model IN ('tiered', 'gpt-5-mini') AND user_id LIKE 'pr\__' AND tokens = 0 AND input_tokens IS NULL ORDER BY id;
INSERT INTO keyvault.usage_records (user_id, model) VALUES ('pr_l', 'gpt-5');
SELECT state, message FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, model) VALUES ('pr_s', 'gpt-5')$$);
INSERT INTO keyvault.usage_records (user_id, model, cost_usd) VALUES ('pr_s', 'gpt-5', 0.1);

-- Tokens of a part are tokens, though neither the whole nor a model is stated.
INSERT INTO keyvault.usage_records (user_id, type, cached_tokens) VALUES ('pr_a', 'parts', 3000);
INSERT INTO keyvault.usage_records (user_id, type, reasoning_tokens) VALUES ('pr_a', 'parts', 5000);
INSERT INTO keyvault.usage_records (user_id, type, model, input_tokens, cached_tokens, output_tokens, reasoning_tokens) VALUES ('pr_a', 'parts', 'gpt-99', 1000, 3000, 2000, 1000);
INSERT INTO keyvault.usage_records (user_id, type, model, cached_tokens) VALUES ('pr_a', 'parts', 'gpt-5', 3000);
INSERT INTO keyvault.usage_records (user_id, type, model, cached_tokens, reasoning_tokens) VALUES ('pr_a', 'parts', 'gpt-5', 3000, 5000);
SELECT state, message FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, cached_tokens) VALUES ('pr_s', 1)$$);
SELECT model, credits::float, cost_usd::float, price ->> 'unknown' AS unknown FROM keyvault.usage_records WHERE user_id = 'pr_a' AND type = 'parts' ORDER BY id;

-- What only the plan has a price for is priced by it, on a plan that refuses what is unknown, too.
INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, output_usd_per_mtok) VALUES ('pr_strict', 'acme', 'own', 10, 40), ('pr_strict', 'zenith', 'own', 5, 20), ('pr_margin', 'acme', 'own', 1, 2);
INSERT INTO keyvault.usage_records (user_id, provider, model, input_tokens, output_tokens) VALUES ('pr_s', 'zenith', 'own-2026-01-01', 1000, 1000), ('pr_s', NULL, 'own', 1000, 1000), ('pr_m', 'acme', 'own', 1000, 1000);
SELECT user_id, provider, model, credits::float, cost_usd::float, price FROM keyvault.usage_records WHERE model LIKE 'own%' AND user_id LIKE 'pr\_%' ORDER BY id;
SELECT state, message FROM pg_temp.refusal($$INSERT INTO keyvault.usage_records (user_id, model) VALUES ('pr_s', 'own')$$);
-- Without a provider, the one that is the dearest now: not one that was, nor one of the family when the model itself has a price.
INSERT INTO keyvault.plan_prices (plan, provider, model, valid_from, input_usd_per_mtok, output_usd_per_mtok) VALUES ('pr_strict', 'acme', 'own', '2020-01-01', 1, 1);
SELECT p, (f).provider, (f).output_usd_per_mtok::float AS output FROM unnest('{NULL, acme, zenith, other}'::text[]) p, keyvault._find_price(p, 'own', now(), 'pr_strict') f;
INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, output_usd_per_mtok) VALUES ('pr_strict', 'acme', 'own-2026-01-01', 2, 2);
SELECT m, (f).provider, (f).output_usd_per_mtok::float AS output FROM unnest('{own, own-2026-01-01, own-latest}'::text[]) m, keyvault._find_price(NULL, m, now(), 'pr_strict') f;
DELETE FROM keyvault.plan_prices WHERE plan = 'pr_strict';

-- A use without tokens costs by the plan's price also where that comes to nothing: the provider's price per request is not the user's.
INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, output_usd_per_mtok) VALUES ('pr_margin', 'acme', 'tiered', 1, 1);
INSERT INTO keyvault.usage_records (user_id, type, provider, model) VALUES ('pr_m', 'sold', 'acme', 'tiered');
SELECT credits::float, cost_usd::float, price FROM keyvault.usage_records WHERE user_id = 'pr_m' AND type = 'sold';

-- record_usage: priced or not, once per idempotency key.
SELECT keyvault.record_usage('chat', 'gpt-5-mini', 1000, 500, user_id => 'pr_r') AS priced \gset
SELECT keyvault.record_usage('chat', 'gpt-5-mini', 1000, 500, 7.5, 'pr_r', 'call-1', '{"a": 1}') AS stated \gset
SELECT keyvault.record_usage('chat', 'gpt-5-mini', 1000, 500, 7.50, 'pr_r', 'call-1', '{"a": 1}') = :'stated' AS same;
SELECT state, message FROM pg_temp.refusal($$SELECT keyvault.record_usage('chat', 'gpt-5-mini', 1000, 500, 8, 'pr_r', 'call-1', '{"a": 1}')$$);
SELECT id = :'priced' AS is_priced, type, provider, model, input_tokens, output_tokens, tokens, credits::float, cost_usd::float, idempotency_key, metadata FROM keyvault.usage_records
 WHERE user_id = 'pr_r' ORDER BY id;
SELECT credits_used::float FROM keyvault.credit_status WHERE user_id = 'pr_r';
SELECT state FROM pg_temp.refusal($$SELECT keyvault.record_usage('chat', 'm', 1, 1, 993, 'pr_r', 'call-2')$$);
SELECT count(*) FROM keyvault.usage_keys WHERE user_id = 'pr_r';
SELECT s.* FROM unnest(ARRAY[$$NULL, 'm', 1, 1, 1, 'pr_r'$$, $$'chat', 'm', -1, 1, 1, 'pr_r'$$, $$'chat', 'm', 1, 1, -1, 'pr_r'$$, $$'chat', 'm', 1, 1, 1, 'pr_r', ''$$, $$'chat', 'm', 1, 1, 1$$]) a,
       LATERAL pg_temp.refusal('SELECT keyvault.record_usage(' || a || ')') s;
SELECT s.state FROM unnest(ARRAY['"a"', '[1]', '[{}]', '[{"over": -1}]', '[{"over": 1, "price": 2}]', '[{"over": "1"}]']) t,
       LATERAL pg_temp.refusal(format('UPDATE keyvault.model_prices SET context_tiers = %L WHERE provider = ''zenith''', t)) s;

SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'pr\_%';
DELETE FROM keyvault.model_prices WHERE provider IN ('acme', 'zenith');
DELETE FROM keyvault.plan_prices WHERE plan = 'pr_margin';
SELECT count(keyvault.set_plan(user_id, 'free')) FROM keyvault.users WHERE plan LIKE 'pr\_%';
DELETE FROM keyvault.plans WHERE plan LIKE 'pr\_%';
