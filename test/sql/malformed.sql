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
INSERT INTO keyvault.usage_records (user_id, type, credits, cost_usd, tokens) VALUES ('mf_a', repeat('x', 63), 0.000001, 999999999, 9223372036854775807);
INSERT INTO keyvault.usage_records (user_id, created_at, credits) VALUES ('mf_a', '1970-01-01 00:00+00', 1), ('mf_a', '9999-12-31 23:59:59.999999+00', 1);
ROLLBACK;

-- The identity, by each of its ways in.
SELECT r.* FROM (VALUES (''), (repeat('u', 256))) u (user_id), LATERAL pg_temp.refusal(format('SELECT keyvault.act_as(%L)', user_id)) r;
SELECT * FROM pg_temp.refusal(format('SET LOCAL keyvault.user_id = %L', repeat('u', 256)));
