-- Tests of users' keys: a GET of the provider's test_path, which costs nothing.

CREATE FUNCTION keyvault.test_api_key(provider text, name text = 'default', user_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_test_api_key';
COMMENT ON FUNCTION keyvault.test_api_key(text, text, text) IS
    'Queues a test of a user''s key and returns the request''s id; the worker sends it when the transaction commits. A 2xx answer makes the key active, one that refuses the key makes it failed, both set last_verified_at; any other leaves it as it is. Costs no credits. Errors: KV003 no such key, KV007 suspended, 22004, 22023 unknown provider, or one without test_path, 42501.';

CREATE FUNCTION keyvault._enqueue_key_test(user_id text, request_id uuid, provider text, name text) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    test_path text;
    user_status text;
    key record;
BEGIN
    SELECT p.test_path INTO test_path FROM keyvault.providers p WHERE p.provider = $3;
    IF NOT FOUND THEN
        PERFORM keyvault._unknown_provider();
    ELSIF test_path IS NULL THEN
        RAISE EXCEPTION 'keys for provider "%" cannot be tested', $3
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Its row in keyvault.providers has no test_path: the provider has no call that costs nothing. Make a real one with keyvault.request().';
    END IF;
    SELECT * INTO key FROM keyvault._choose_key($1, $3, $4, 'user');
    SELECT u.status INTO user_status FROM keyvault.users u WHERE u.user_id = $1;
    IF user_status <> 'active' THEN
        RAISE EXCEPTION 'user "%" is %', $1, user_status
            USING ERRCODE = 'KV007', HINT = 'keyvault.resume_user() ends a suspension; an erasure has no end.';
    END IF;
    INSERT INTO keyvault.requests (user_id, id, provider, type, path, payer, api_key_id, timeout_ms, estimated_usd, body)
    VALUES ($1, $2, $3, 'test', test_path, 'user', key.api_key_id, 30000, 0, '{}');
    RETURN $2;
END $$;
COMMENT ON FUNCTION keyvault._enqueue_key_test(text, uuid, text, text) IS 'test_api_key, after its caller was checked. Errors: 22023, KV003, KV007.';

CREATE FUNCTION keyvault._settle_key_test(
    user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, key_refused boolean) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
BEGIN
    UPDATE keyvault.requests SET status = $4, finished_at = clock_timestamp(), error = $7
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3
    RETURNING * INTO r;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO keyvault.responses (user_id, id, status, status_code, body, error, payer)
    VALUES ($1, $2, $4, $5, $6, $7, r.payer);
    -- Not when the key was replaced since: the answer is about the one before.
    UPDATE keyvault.api_keys k
       SET last_verified_at = clock_timestamp(), status = CASE WHEN $8 THEN 'failed' ELSE 'active' END
     WHERE k.user_id = $1 AND k.id = r.api_key_id AND ($8 OR $4 = 'done') AND k.problem IS NULL
       AND k.rotated_at IS NOT DISTINCT FROM r.key_rotated_at;
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._settle_key_test(text, uuid, integer, text, integer, jsonb, text, boolean) IS
    'Ends a test of a key: answer and the key''s status. False, and nothing done, when that attempt is no longer the one under way.';
