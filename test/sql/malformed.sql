-- What a caller can get wrong in a usage record or an identity: each refused with its SQLSTATE, and nothing debited.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;

-- What a statement fails with.
CREATE FUNCTION pg_temp.refusal(statement text, OUT state text, OUT message text, OUT hinted boolean) LANGUAGE plpgsql AS $$
DECLARE
    hint text;
BEGIN
    EXECUTE statement;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT, hint = PG_EXCEPTION_HINT;
    hinted := hint <> '';
END $$;

SELECT keyvault.upsert_user('mf_a');
SELECT columns, row, r.* FROM (VALUES
    ('type, credits', $$'', 1$$),
    ('type, credits', $$repeat('x', 64), 1$$),
    ('type, credits, payer', $$'chat', 1, 'nobody'$$),
    ('type, credits, payer', $$'chat', 1, 'users'$$),
    ('type, credits, created_at', $$'chat', 1, 'infinity'$$),
    ('type, credits, created_at', $$'chat', 1, '-infinity'$$),
    -- months before, and years of more than four digits, are not what partitions and the roll-up can name
    ('type, credits, created_at', $$'chat', 1, '4714-11-24 00:00+00 BC'$$),
    ('type, credits, created_at', $$'chat', 1, '4000-01-15 00:00+00 BC'$$),
    ('type, credits, created_at', $$'chat', 1, '0001-01-01 00:00+00'$$),
    ('type, credits, created_at', $$'chat', 1, '1969-12-31 23:59:59.999999+00'$$),
    ('type, credits, created_at', $$'chat', 1, '10000-01-01 00:00+00'$$),
    ('type, credits, created_at, debit_tag', $$'chat', 1, '1969-12-31 23:59:59.999999+00', 0$$),
    ('type, credits, tokens', $$'chat', 1, -1$$),
    ('type, credits, input_tokens', $$'chat', 1, -1$$),
    ('type, credits, cached_tokens', $$'chat', 1, -1$$),
    ('type, credits, output_tokens', $$'chat', 1, -1$$),
    ('type, credits, reasoning_tokens', $$'chat', 1, -1$$),
    ('type, credits, units', $$'chat', 1, -0.000001$$),
    ('type, credits, units', $$'chat', 1, 'NaN'$$),
    ('type, credits, units', $$'chat', 1, 'Infinity'$$),
    -- units would discount the tokens, or cost all there is
    ('type, model, input_tokens, units', $$'chat', 'gpt-5', 1000, -1$$),
    ('type, model, input_tokens, units', $$'chat', 'gpt-5', 1000, 'NaN'$$),
    ('type, model, output_tokens, reasoning_tokens', $$'chat', 'gpt-5', 1000, -1$$),
    -- a sum that is out of range, or a name that no index takes, would stop the sums of everybody
    ('type, tokens, credits', $$'chat', 1000000000001, 1$$),
    ('type, cached_tokens, credits', $$'chat', 9223372036854775807, 1$$),
    ('type, model, credits', $$'chat', repeat('m', 256), 1$$),
    ('type, model, credits', $$'chat', (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 1000) i), 1$$),
    ('type, provider, credits', $$'chat', repeat('p', 256), 1$$),
    ('type, credits, cost_usd', $$'chat', 1, -0.000000001$$),
    ('type, credits, cost_usd', $$'chat', 1, 'NaN'$$),
    ('type, credits, cost_usd', $$'chat', 1, 'Infinity'$$),
    ('type, credits', $$'chat', -0.000001$$),
    ('type, credits', $$'chat', 'NaN'$$),
    ('type, credits', $$'chat', '-Infinity'$$),
    ('type, credits', $$'chat', 1000000000000$$)) c (columns, row),
    LATERAL pg_temp.refusal(format('INSERT INTO keyvault.usage_records (user_id, %s) VALUES (%L, %s)', columns, 'mf_a', row)) r;
SELECT r.* FROM (VALUES (''), (repeat('u', 256))) u (user_id),
    LATERAL pg_temp.refusal(format('INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES (%L, %L, 1)', user_id, 'chat')) r;
SELECT credits_used FROM keyvault.credit_status WHERE user_id = 'mf_a';
SELECT count(*) FROM keyvault.usage_records WHERE user_id = 'mf_a';
-- The longest and the largest that there may be.
BEGIN;
INSERT INTO keyvault.usage_records (user_id, type, provider, model, credits, cost_usd, tokens)
SELECT repeat('u', 255), repeat('x', 63), repeat('p', 255), string_agg(substr(md5(i::text), 1, 17), ''), 0.000001, 999999999, 1000000000000
  FROM generate_series(1, 15) i;
-- Names that are longer still, as version 0.1.0 took them, come by a restore; all are added up.
INSERT INTO keyvault.usage_records (user_id, provider, model, credits, debit_tag)
SELECT 'mf_long', repeat('p', 300), string_agg(md5(i::text), ''), 1, 1 FROM generate_series(1, 200) i;
CREATE TABLE keyvault.usage_records_1975_03 PARTITION OF keyvault.usage_records FOR VALUES FROM ('1975-03-01 00:00+00') TO ('1975-04-01 00:00+00');
INSERT INTO keyvault.usage_records (user_id, provider, model, credits, debit_tag, created_at)
SELECT user_id, provider, model, credits, debit_tag, t FROM keyvault.usage_records, unnest('{1975-03-05 00:00+00,1976-03-05 00:00+00}'::timestamptz[]) t WHERE user_id = 'mf_long';
SELECT 'step' AS step FROM generate_series(1, 50), LATERAL keyvault._roll_up_usage() r WHERE r IS NULL;
SELECT octet_length(provider), octet_length(model), calls FROM keyvault.usage_daily WHERE user_id = 'mf_long';
-- Added up anew, and retired from a month of their own and from the default partition, they are the same.
SELECT keyvault.rebuild_usage_daily() > 0 AS rebuilt;
SELECT keyvault._retire_usage('1980-01-01'), keyvault._retire_late_usage(10000, '1980-01-01');
SELECT 'step' AS step FROM generate_series(1, 50), LATERAL keyvault._roll_up_usage() r WHERE r IS NULL;
SELECT octet_length(provider), octet_length(model), calls FROM keyvault.usage_daily WHERE user_id = 'mf_long';
SELECT octet_length(provider), octet_length(model), calls FROM keyvault.usage_retired WHERE user_id = 'mf_long';
SELECT length(provider), length(model), sum(calls) AS calls FROM keyvault.usage_by_model WHERE user_id = 'mf_long' GROUP BY 1, 2;
INSERT INTO keyvault.usage_records (user_id, created_at, credits) VALUES ('mf_a', '1970-01-01 00:00+00', 1), ('mf_a', '9999-12-31 23:59:59.999999+00', 1);
ROLLBACK;

-- The identity, by each of its ways in.
SELECT r.* FROM (VALUES (''), (repeat('u', 256))) u (user_id), LATERAL pg_temp.refusal(format('SELECT keyvault.act_as(%L)', user_id)) r;
SELECT * FROM pg_temp.refusal(format('SET LOCAL keyvault.user_id = %L', repeat('u', 256)));

-- NaN and Infinity, in every numeric column that an administrator may write: a column that is new is a line of the list.
CREATE ROLE regress_kv_admin;
SELECT keyvault.grant_access('regress_kv_admin', 'admin');
BEGIN;
INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, output_usd_per_mtok) VALUES ('free', 'openai', 'gpt-5-mini', 1, 2);
SELECT c.table_name::text COLLATE "C" AS "table", c.column_name::text COLLATE "C" AS "column", string_agg(coalesce(r.state, v || ' is taken'), ' ' ORDER BY v) AS states
  FROM (SELECT table_name, column_name FROM information_schema.column_privileges
         WHERE table_schema = 'keyvault' AND grantee = 'regress_kv_admin' AND privilege_type IN ('INSERT', 'UPDATE')
        INTERSECT
        SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'keyvault' AND data_type = 'numeric') c,
       unnest('{NaN,Infinity,-Infinity}'::text[]) v,
       LATERAL pg_temp.refusal(format('UPDATE keyvault.%I SET %I = %L', c.table_name, c.column_name, v)) r
 GROUP BY 1, 2 ORDER BY 1, 2;
ROLLBACK;
SELECT keyvault.revoke_access('regress_kv_admin', 'admin');
DROP ROLE regress_kv_admin;
-- And in every numeric argument of a function.
SELECT keyvault.reserve_credits(1, user_id => 'mf_a') AS hold \gset
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_completion_tokens": 1}', user_id => 'mf_a', api_key => 'sk-regress-key-for-one-call') AS unknown \gset
UPDATE keyvault.requests SET status = 'unknown', finished_at = now() WHERE id = :'unknown';
CREATE TEMP TABLE amount_call (function name, argument text, call text);
INSERT INTO amount_call VALUES
    ('grant_credits', 'amount', $$grant_credits('mf_a', %L, 'top-up')$$),
    ('grant_credits', 'price_usd', $$grant_credits('mf_a', 1, 'top-up', price_usd => %L)$$),
    ('reconcile_request', 'cost_usd', format($$reconcile_request(%L, 'charge', cost_usd => %%L)$$, :'unknown')),
    ('record_usage', 'cost_usd', $$record_usage('chat', 'gpt-5', 1, 1, 1, 'mf_a', cost_usd => %L)$$),
    ('record_usage', 'credits', $$record_usage('chat', 'gpt-5', 1, 1, %L, 'mf_a')$$),
    ('record_usage', 'units', $$record_usage('chat', 'gpt-5', 1, 1, 1, 'mf_a', units => %L)$$),
    ('reserve_credits', 'amount', $$reserve_credits(%L, user_id => 'mf_a')$$),
    ('reserve_credits', 'cost_usd', $$reserve_credits(1, user_id => 'mf_a', cost_usd => %L)$$),
    ('set_budget', 'amount', $$set_budget('mf_a', %L)$$),
    ('set_plan', 'monthly_credits', $$set_plan('mf_a', 'pro', %L)$$),
    ('settle_credits', 'amount', format($$settle_credits(%L, %%L, user_id => 'mf_a')$$, :'hold')),
    ('settle_credits', 'cost_usd', format($$settle_credits(%L, 1, user_id => 'mf_a', cost_usd => %%L)$$, :'hold'));
SELECT a.function, a.argument, string_agg(CASE WHEN call IS NULL THEN 'not tried' ELSE coalesce(r.state, v || ' is taken') END, ' ' ORDER BY v) AS states
  FROM (SELECT p.proname AS function, p.proargnames[n] AS argument FROM pg_proc p, generate_series(1, p.pronargs) n
         WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname !~ '^_' AND p.proargtypes[n - 1] = 'numeric'::regtype) a
  LEFT JOIN amount_call USING (function, argument), unnest('{NaN,Infinity,-Infinity}'::text[]) v,
       LATERAL pg_temp.refusal(format('SELECT keyvault.' || call, v)) r
 GROUP BY 1, 2 ORDER BY 1, 2;
SELECT credits_used, credits_held FROM keyvault.credit_status WHERE user_id = 'mf_a';
-- All credits of a user together are a number of the table, too.
SELECT * FROM pg_temp.refusal($$SELECT keyvault.grant_credits('mf_a', 999999999999, 'too much')$$);
-- Each takes 1.
BEGIN;
SELECT a.function, a.argument, r.* FROM amount_call a, LATERAL pg_temp.refusal(format('SELECT keyvault.' || call, 1)) r WHERE r.state <> '';
ROLLBACK;
