-- Arguments of the meter's functions: at their limits, repeated, and wrong.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
CREATE FUNCTION pg_temp.refusal(statement text, OUT state text, OUT message text, OUT hinted boolean) LANGUAGE plpgsql AS $$
DECLARE
    hint text;
BEGIN
    EXECUTE statement;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
    hinted := hint <> '';
END $$;

-- infinity is no expiry, when a grant is repeated, too
SELECT keyvault.grant_credits('ma_a', 5, 'top-up', 'infinity', 'once') AS first \gset
SELECT keyvault.grant_credits('ma_a', 5, 'top-up', 'infinity', 'once') = :'first' AS same, keyvault.grant_credits('ma_a', 5, 'top-up', idempotency_key => 'once') = :'first' AS same_again;
SELECT state, message FROM pg_temp.refusal($$SELECT keyvault.grant_credits('ma_a', 5, 'top-up', now() + interval '1 day', 'once')$$);
SELECT state, message FROM pg_temp.refusal($$SELECT keyvault.grant_credits('ma_a', 5, 'top-up', '-infinity', 'twice')$$);
SELECT count(*), sum(amount)::float, count(expires_at) AS expire FROM keyvault.credit_grants WHERE user_id = 'ma_a';

-- a ttl of a year, however it is written
SELECT ttl, r.state, r.message FROM unnest('{1 year,12 mons,365 days,8760 hours,1 microsecond,732 days,17568 hours,"1 year 2 days",0,-1 day,178000000 years,-178000000 years,NULL}'::interval[]) ttl,
       LATERAL pg_temp.refusal(format('SELECT keyvault.reserve_credits(0, %L, ''ma_a'')', ttl)) r;

-- as many tokens as integers hold
SELECT keyvault.reserve_credits(10, user_id => 'ma_a') AS hold \gset
SELECT keyvault.settle_credits(:'hold', 10, 'chat', NULL, 2000000000, 2000000000) = :'hold' AS settled, keyvault.record_usage('chat', 'gpt-5', 2000000000, 2000000000, 1, 'ma_a') IS NOT NULL AS recorded;
SELECT credits::float, tokens FROM keyvault.usage_records WHERE user_id = 'ma_a' ORDER BY id;

-- naming the plan that a user is on leaves what was agreed
SELECT keyvault.upsert_user('ma_b', plan => 'pro') IS NOT NULL AS made, keyvault.set_plan('ma_b', 'pro', 70000);
SELECT keyvault.upsert_user('ma_b', 'b@example.com', plan => 'pro') IS NOT NULL AS named;
SELECT plan, monthly_credits::float FROM keyvault.credit_status WHERE user_id = 'ma_b';
SELECT monthly_credits::float FROM keyvault.users WHERE user_id = 'ma_b';
SELECT keyvault.upsert_user('ma_b', plan => 'free') IS NOT NULL AS moved;
SELECT monthly_credits IS NULL AS nothing_agreed FROM keyvault.users WHERE user_id = 'ma_b';

-- budgets: what is wrong is named, and nobody is made to have one removed
SELECT r.* FROM unnest(ARRAY[$$'ma_a', 5, scope => 'issued_key', target => 'zzz'$$, $$'ma_a', 'NaN', unit => 'usd'$$, $$'ma_a', -1$$, $$'ma_nobody', NULL$$]) a, LATERAL pg_temp.refusal('SELECT keyvault.set_budget(' || a || ')') r;
SELECT count(*) FROM keyvault.users WHERE user_id = 'ma_nobody';
SELECT keyvault.set_budget('ma_a', NULL) IS NULL AS none;

-- no time is no time to have a balance at
SELECT r.* FROM unnest('{NULL,infinity}'::timestamptz[]) t, LATERAL pg_temp.refusal(format('SELECT * FROM keyvault.balance_at(''ma_a'', %L)', t)) r;
SELECT count(*) FROM keyvault.balance_at('ma_a', '-infinity');

-- a use that names no model
INSERT INTO keyvault.usage_records (user_id, provider, tokens) VALUES ('ma_b', 'openai', 1), ('ma_b', NULL, 1);
SELECT * FROM keyvault.verify_ledger() WHERE user_id LIKE 'ma\_%';
