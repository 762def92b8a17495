-- The story that script/demo tells. Each step prints the SQL as it stands here, then what comes back.
\set QUIET on
\set SHOW_CONTEXT never
\pset footer off
\pset null '-'
\pset linestyle unicode
\pset border 1
SET client_min_messages = warning;
\getenv provider DEMO_PROVIDER
\getenv model DEMO_MODEL
\getenv body DEMO_BODY
\getenv answer DEMO_ANSWER
\getenv openai_key_a DEMO_KEY_OPENAI
\getenv gemini_key_a DEMO_KEY_GEMINI
\getenv platform_key DEMO_KEY_PLATFORM
\getenv standin DEMO_STANDIN
\getenv url DEMO_URL
-- real keys are shown in part
\if :standin
\set shown 100
\else
\set shown 4
\endif
\set ECHO all

-- ════ 1. Install ════════════════════════════════════════════════════════════════════
-- The library is preloaded, and the master key is in a file outside the data directory.
CREATE EXTENSION keyvault CASCADE;
SHOW keyvault.master_key_file;

\set ECHO none
\if :standin
UPDATE keyvault.providers SET base_url = :'url', allowed_host = '127.0.0.1';
\else
SELECT keyvault.store_api_key(:'provider', :'platform_key', user_id => 'user_clerk_tester_a') \g /dev/null
\endif
\set ECHO all
-- ════ 2. Two users hand over their own provider keys ════════════════════════════════
-- (psql variables stand for the keys, as bind parameters do in an application)
SELECT keyvault.store_api_key('openai', :'openai_key_a', user_id => 'user_clerk_tester_a');
SELECT keyvault.store_api_key('gemini', :'gemini_key_a', user_id => 'user_clerk_tester_a');
SELECT keyvault.store_api_key('exa', 'exa-demo-key-of-tester-a', user_id => 'user_clerk_tester_a');
SELECT keyvault.store_api_key('copilotkit', 'ck-demo-key-of-tester-a', user_id => 'user_clerk_tester_a');
SELECT keyvault.store_api_key('exa', 'exa-demo-key-of-tester-b', user_id => 'user_clerk_tester_b');

-- What the table holds: ciphertext, and a hint for the owner.
SELECT user_id, provider, hint, encode(substr(ciphertext, 1, 16), 'hex') || '...' AS ciphertext FROM keyvault.api_keys ORDER BY user_id, provider;

-- ════ 3. The keys of one user, and of nobody else ═══════════════════════════════════
SELECT provider, left(key, :shown) AS key FROM jsonb_each_text(keyvault.user_api_keys('user_clerk_tester_a')) k(provider, key);

-- User B, acting as itself in a role without rights over others, reads its own keys ...
CREATE ROLE demo_user;
SELECT keyvault.grant_access('demo_user', 'user');
BEGIN;
SELECT keyvault.act_as('user_clerk_tester_b');
SET LOCAL ROLE demo_user;
SELECT keyvault.user_api_keys();
-- ... and is refused A's:
SELECT keyvault.user_api_keys('user_clerk_tester_a');
ROLLBACK;

-- ════ 4. A chat call with A's own key: the worker makes it, no credits are used ═════
SELECT keyvault.request(:'provider', :'body', model => :'model', user_id => 'user_clerk_tester_a') AS request_a \gset
SELECT status, payer, coalesce(body #>> :'answer', error) AS answer, input_tokens, output_tokens, cost_usd, credits
  FROM keyvault.wait_response(:'request_a', '60 s');

-- ════ 5. B brings no key for it: the platform's key is used, and costs credits ══════
SELECT keyvault.store_platform_key(:'provider', :'platform_key');
SELECT keyvault.request(:'provider', :'body', model => :'model', user_id => 'user_clerk_tester_b') AS request_b \gset
SELECT status, payer, coalesce(body #>> :'answer', error) AS answer, input_tokens, output_tokens, cost_usd, credits
  FROM keyvault.wait_response(:'request_b', '60 s');

-- ════ 6. The meter: an INSERT debits in the same transaction ════════════════════════
INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits, metadata, created_at)
SELECT 'user_clerk_tester_b', 'automation', 'nightly-report', 900 * d, 12.5 * d, '{"job": "report"}', now() - d * interval '1 day'
  FROM generate_series(1, 7) d;
SELECT plan, monthly_credits, credits_used, credits_held, credits_remaining, credits_reset_at::date
  FROM keyvault.credit_status WHERE user_id = 'user_clerk_tester_b';

-- ════ 7. The limit ══════════════════════════════════════════════════════════════════
INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits) VALUES ('user_clerk_tester_b', 'automation', 'bulk-import', 100000, 700);
INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits)
SELECT 'user_clerk_tester_b', 'automation', 'bulk-import', 0, credits_remaining FROM keyvault.credit_status WHERE user_id = 'user_clerk_tester_b';
-- With nothing left, a call that the platform would pay for is not even queued:
SELECT keyvault.request(:'provider', :'body', model => :'model', user_id => 'user_clerk_tester_b', payer => 'platform');
-- A larger plan applies at once.
SELECT keyvault.set_plan('user_clerk_tester_b', 'pro');
SELECT plan, credits_remaining FROM keyvault.credit_status WHERE user_id = 'user_clerk_tester_b';

-- ════ 8. What analysts see ══════════════════════════════════════════════════════════
SELECT user_id, payer, provider, model, sum(calls) AS calls, sum(tokens) AS tokens, sum(credits) AS credits, sum(cost_usd) AS cost_usd
  FROM keyvault.usage_by_day GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4;

SELECT day, sum(credits) AS credits, repeat('█', ceil(40 * sum(credits) / max(sum(credits)) OVER ())::int) AS chart
  FROM keyvault.usage_by_day WHERE user_id = 'user_clerk_tester_b' AND model = 'nightly-report'
 GROUP BY day ORDER BY day;

SELECT user_id, provider, status, payer, attempts, queue_time, call_time FROM keyvault.request_status ORDER BY queued_at;
\set ECHO none
