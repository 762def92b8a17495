-- The durable queue of provider calls and their answers. The life of a request:
-- queued -> sent -> done | failed | unknown, or queued -> canceled; a retry goes back to queued.

CREATE TABLE keyvault.requests (
    user_id     text COLLATE "C" NOT NULL,
    id          uuid NOT NULL,
    provider    text COLLATE "C" NOT NULL,
    model       text,
    type        text NOT NULL,
    path        text NOT NULL,
    payer       text NOT NULL,
    api_key_id  uuid,
    call_key    bytea,
    status      text NOT NULL DEFAULT 'queued',
    attempts    integer NOT NULL DEFAULT 0,
    timeout_ms  integer NOT NULL,
    hold_id     uuid,
    estimated_usd numeric(18,9) NOT NULL,
    idempotency_key text COLLATE "C",
    queued_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    sent_at     timestamptz,
    finished_at timestamptz,
    error       text,
    metadata    jsonb NOT NULL DEFAULT '{}',
    body        jsonb NOT NULL,
    key_rotated_at timestamptz,
    PRIMARY KEY (user_id, id),
    CONSTRAINT requests_idempotency_key UNIQUE (user_id, idempotency_key)
);
CREATE INDEX requests_open ON keyvault.requests (user_id, id) WHERE status IN ('queued', 'sent');
CREATE INDEX requests_id ON keyvault.requests (id);
COMMENT ON TABLE keyvault.requests IS 'Provider calls: the queue, and what became of each.';
COMMENT ON COLUMN keyvault.requests.status IS 'queued, sent, done, failed, unknown or canceled.';
COMMENT ON COLUMN keyvault.requests.payer IS 'user or platform.';
COMMENT ON COLUMN keyvault.requests.call_key IS 'A key for this call alone, sealed under a key that only this run of the server knows; gone when the request has ended.';
COMMENT ON COLUMN keyvault.requests.key_rotated_at IS 'The key''s rotated_at when the call was sent: its answer tells nothing about a key that has come in its place since.';
COMMENT ON COLUMN keyvault.requests.attempts IS 'How often the call was handed to the network; a late answer of an earlier attempt is not accepted.';
COMMENT ON COLUMN keyvault.requests.estimated_usd IS 'Upper estimate of the cost, held in credits; charged when an answer states no usage.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.requests', '');

CREATE TABLE keyvault.responses (
    user_id       text COLLATE "C" NOT NULL,
    id            uuid NOT NULL,
    status        text NOT NULL,
    status_code   integer,
    body          jsonb,
    error         text,
    model         text,
    input_tokens  bigint,
    cached_tokens bigint,
    output_tokens bigint,
    cost_usd      numeric(18,9) NOT NULL DEFAULT 0,
    credits       numeric(18,6) NOT NULL DEFAULT 0,
    payer         text NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, id)
);
ALTER TABLE keyvault.responses ALTER COLUMN body SET COMPRESSION lz4;
COMMENT ON TABLE keyvault.responses IS 'Answers to requests, written with their usage and debit in one transaction.';
COMMENT ON COLUMN keyvault.responses.id IS 'The request''s id.';
COMMENT ON COLUMN keyvault.responses.status IS 'done: a 2xx answer; failed: an error, or none will come; unknown: the call was sent and its answer lost; canceled: it was never sent.';
COMMENT ON COLUMN keyvault.responses.status_code IS 'HTTP status (RFC 9110), NULL without an answer.';
COMMENT ON COLUMN keyvault.responses.error IS 'What went wrong, for people; the provider''s own words are in body.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.responses', '');

ALTER TABLE keyvault.requests ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.requests FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
ALTER TABLE keyvault.responses ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.responses FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));

CREATE FUNCTION keyvault._choose_key(user_id text, provider text, key_name text, INOUT payer text, OUT api_key_id uuid)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    in_env_file boolean := CASE WHEN $3 = 'default' THEN keyvault._env_file_has_key($2) END;
BEGIN
    IF $4 IN ('auto', 'user') AND in_env_file THEN
        payer := 'user';
        RETURN;
    ELSIF $4 IN ('auto', 'user') AND in_env_file IS NULL THEN
        SELECT k.id INTO api_key_id FROM keyvault.api_keys k
         WHERE k.user_id = $1 AND k.provider = $2 AND k.name = $3 AND (k.expires_at IS NULL OR k.expires_at > now());
        IF FOUND THEN
            payer := 'user';
            RETURN;
        END IF;
    END IF;
    IF $4 IN ('auto', 'platform') THEN
        SELECT k.id INTO api_key_id FROM keyvault.api_keys k
         WHERE k.user_id = '' AND k.provider = $2 AND k.name IN ($3, 'default')
           AND (k.expires_at IS NULL OR k.expires_at > now())
         ORDER BY k.name = $3 DESC LIMIT 1;
        IF FOUND THEN
            payer := 'platform';
            RETURN;
        END IF;
    END IF;
    RAISE EXCEPTION 'no API key for provider "%"', $2
        USING ERRCODE = 'KV003',
              DETAIL = CASE $4 WHEN 'user' THEN format('User "%s" has no valid key named "%s".', $1, $3)
                               WHEN 'platform' THEN 'The platform has no valid key.'
                               ELSE format('Neither user "%s" nor the platform has a valid key.', $1) END,
              HINT = CASE $4 WHEN 'platform' THEN 'Store one with keyvault.store_platform_key().'
                             ELSE 'Store one with keyvault.store_api_key().' END;
END $$;
COMMENT ON FUNCTION keyvault._choose_key(text, text, text, text) IS
    'Whose key a call uses, and which: the user''s own, else the platform''s, unless payer forces one. Error: KV003.';

CREATE FUNCTION keyvault._earlier_request(user_id text, idempotency_key text, provider text, path text, body jsonb) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    earlier keyvault.requests;
BEGIN
    SELECT * INTO earlier FROM keyvault.requests r WHERE r.user_id = $1 AND r.idempotency_key = $2;
    IF earlier.provider <> $3 OR earlier.path <> $4 OR earlier.body <> $5 THEN
        RAISE EXCEPTION 'idempotency key was already used for another request'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Use a new idempotency key for each different request.';
    END IF;
    RETURN earlier.id;
END $$;
COMMENT ON FUNCTION keyvault._earlier_request(text, text, text, text, jsonb) IS
    'The request that a user''s idempotency key stands for, NULL for none. Error: 22023 when it was a different one.';

CREATE FUNCTION keyvault._enqueue_request(
    user_id text, request_id uuid, provider text, body jsonb, path text, model text, payer text, call_key bytea,
    key_name text, idempotency_key text, timeout_ms integer, metadata jsonb, may_create boolean) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    p keyvault.providers;
    u keyvault.users;
    earlier uuid;
    address record;
    the_model text;
    the_body jsonb;
    the_path text;
    key record;
    estimate record;
    hold uuid;
BEGIN
    SELECT * INTO p FROM keyvault.providers WHERE provider = $3;
    IF NOT FOUND THEN
        PERFORM keyvault._unknown_provider();
    END IF;
    IF jsonb_typeof($4) <> 'object' THEN
        RAISE EXCEPTION 'the body of a request must be a JSON object'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the body that the provider''s API reference describes.';
    END IF;
    IF $4 -> 'stream' = 'true' THEN
        RAISE EXCEPTION 'a request cannot be streamed'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Leave "stream" out of the body: the whole answer is stored when it is there.';
    END IF;
    IF $7 NOT IN ('auto', 'user', 'platform') THEN
        RAISE EXCEPTION 'payer must be auto, user or platform' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'auto uses the user''s own key if there is one, else the platform''s.';
    END IF;
    IF $7 = 'platform' AND $8 IS NOT NULL THEN
        RAISE EXCEPTION 'payer is platform, and the call brings a key of its own' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Leave api_key out for the platform''s key, or payer for the call''s own, which is the user''s.';
    END IF;

    address := keyvault._address_request(p, $5, $6, $4);
    the_path := address.path;
    the_model := address.model;
    IF octet_length(the_model) > 255 THEN
        RAISE EXCEPTION 'model of a request must be at most 255 bytes long' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Pass the name that the provider''s API reference gives the model.';
    END IF;
    the_body := address.body;
    IF octet_length($10) NOT BETWEEN 1 AND 255 THEN
        RAISE EXCEPTION 'idempotency key must be 1 to 255 bytes long' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Leave it out for a request that may be repeated.';
    END IF;
    earlier := keyvault._earlier_request($1, $10, $3, the_path, the_body);
    IF earlier IS NOT NULL THEN
        RETURN earlier;
    END IF;

    PERFORM keyvault._ensure_user($1, $13);
    SELECT * INTO STRICT u FROM keyvault.users WHERE user_id = $1;
    IF u.status <> 'active' THEN
        RAISE EXCEPTION 'user "%" is %', $1, u.status
            USING ERRCODE = 'KV007', HINT = 'keyvault.resume_user() ends a suspension; an erasure has no end.';
    END IF;

    IF $8 IS NOT NULL THEN
        SELECT 'user' AS payer, NULL::uuid AS api_key_id INTO key;
    ELSE
        SELECT * INTO key FROM keyvault._choose_key($1, $3, $9, $7);
    END IF;
    IF key.payer = 'platform' AND p.platform_paths <> '{}'
       AND NOT EXISTS (SELECT FROM unnest(p.platform_paths) allowed
                       WHERE the_path ~ ('^' || replace(replace(allowed, '.', '[.]'), '{model}', '[A-Za-z0-9._-]+') || '$'))
    THEN
        RAISE EXCEPTION 'path is not open to calls with the platform''s key'
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'An administrator opens a path in keyvault.providers.platform_paths; a user''s own key may call any.';
    END IF;
    estimate := keyvault._estimate_request($1, p, the_model, key.payer, the_body);
    -- Without credits to set aside, budgets in USD may still have to be.
    IF estimate.credits > 0 OR EXISTS (SELECT FROM keyvault.credit_budgets g WHERE g.user_id = $1) THEN
        hold := keyvault._hold_credits($1, estimate.credits, 'infinity', false, the_model, estimate.usd);
    END IF;
    INSERT INTO keyvault.requests (user_id, id, provider, model, type, path, payer, api_key_id, call_key, timeout_ms,
                                   hold_id, estimated_usd, idempotency_key, metadata, body)
    VALUES ($1, $2, $3, the_model, CASE p.dialect WHEN 'json' THEN 'api' ELSE 'chat' END, the_path, key.payer, key.api_key_id, $8,
            $11, hold, estimate.usd, $10, coalesce($12, '{}'), the_body)
    ON CONFLICT (user_id, idempotency_key) DO NOTHING;
    IF FOUND THEN
        RETURN $2;
    END IF;
    -- Another session was faster with the same idempotency key.
    PERFORM keyvault._release_hold($1, hold);
    earlier := keyvault._earlier_request($1, $10, $3, the_path, the_body);
    IF earlier IS NULL THEN
        RAISE EXCEPTION 'another transaction is using this idempotency key'
            USING ERRCODE = 'serialization_failure', HINT = 'Retry the transaction.';
    END IF;
    RETURN earlier;
END $$;
COMMENT ON FUNCTION keyvault._enqueue_request(text, uuid, text, jsonb, text, text, text, bytea, text, text, integer, jsonb, boolean) IS
    'request, after its caller was checked. Errors: 22023, 40001, 42501, KV001, KV003, KV007.';

CREATE FUNCTION keyvault._claim_requests(capacity integer, per_user integer, after_user text)
    RETURNS TABLE (user_id text, id uuid, attempt integer, provider text, dialect text, base_url text, path text,
                   auth_header text, auth_scheme text, headers jsonb, allowed_host text, body text, timeout_ms integer,
                   payer text, api_key_id uuid, call_key bytea)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH RECURSIVE waiting AS (
        (SELECT r.user_id FROM keyvault.requests r
          WHERE r.status = 'queued' AND r.next_attempt_at <= clock_timestamp()
            AND r.user_id > after_user
          ORDER BY r.user_id LIMIT 1)
        UNION ALL
        (SELECT n.user_id FROM waiting w, LATERAL (
            SELECT r.user_id FROM keyvault.requests r
             WHERE r.status = 'queued' AND r.next_attempt_at <= clock_timestamp()
               AND r.user_id > w.user_id
             ORDER BY r.user_id LIMIT 1) n)
    ), turn AS MATERIALIZED (
        -- users who have no room do not take the turn of others
        SELECT w.user_id,
               per_user - (SELECT count(*) FROM keyvault.requests s WHERE s.user_id = w.user_id AND s.status = 'sent') AS room
          FROM waiting w
         WHERE (SELECT count(*) FROM keyvault.requests s WHERE s.user_id = w.user_id AND s.status = 'sent') < per_user
         LIMIT capacity
    ), claimed AS MATERIALIZED (
        SELECT c.user_id, c.id, c.provider
          FROM turn t, LATERAL (
            SELECT r.user_id, r.id, r.provider FROM keyvault.requests r
             WHERE r.user_id = t.user_id AND r.status = 'queued'
               AND r.next_attempt_at <= clock_timestamp()
             ORDER BY r.id
             LIMIT least(greatest(capacity / (SELECT count(*) FROM turn), 1), t.room)
               FOR UPDATE SKIP LOCKED) c
         LIMIT capacity
    )
    UPDATE keyvault.requests r
       SET status = 'sent', attempts = r.attempts + 1, sent_at = clock_timestamp(),
           key_rotated_at = (SELECT k.rotated_at FROM keyvault.api_keys k
                              WHERE k.user_id = CASE r.payer WHEN 'user' THEN r.user_id ELSE '' END AND k.id = r.api_key_id)
      FROM claimed c LEFT JOIN keyvault.providers p ON p.provider = c.provider
     WHERE r.user_id = c.user_id AND r.id = c.id
    RETURNING r.user_id, r.id, r.attempts, r.provider, p.dialect, p.base_url, r.path, p.auth_header, p.auth_scheme,
              p.headers, p.allowed_host, CASE r.type WHEN 'test' THEN NULL ELSE r.body::text END, r.timeout_ms, r.payer, r.api_key_id, r.call_key;
END $$;
COMMENT ON FUNCTION keyvault._claim_requests(integer, integer, text) IS
    'Marks up to capacity due requests as sent and returns what sending them takes: a share for each waiting user after after_user, oldest first, never more than per_user under way for one.';

CREATE FUNCTION keyvault._settle_request(
    user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, model text,
    input_tokens bigint, cached_tokens bigint, output_tokens bigint, stated_usd numeric, key_refused boolean, reasoning_tokens bigint) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
    cost numeric := 0;
    owed numeric := 0;
    charged numeric := 0;
    -- A provider that is in trouble says nothing of the key.
    verdict constant text := CASE WHEN $13 THEN 'failed' WHEN $5 < 500 THEN 'active' END;
    bill record;
    -- The erasure does not see requests of transactions that have yet to end.
    erased constant boolean := EXISTS (SELECT FROM keyvault.users u WHERE u.user_id = $1 AND u.status = 'erased');
BEGIN
    UPDATE keyvault.requests SET status = $4, finished_at = clock_timestamp(), error = $7, call_key = NULL,
           body = CASE WHEN erased THEN '{}' ELSE body END, metadata = CASE WHEN erased THEN '{"erased": true}' ELSE metadata END
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3
    RETURNING * INTO r;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF $4 = 'done' OR $5 BETWEEN 200 AND 299 THEN
        bill := keyvault._bill_request(r, $8, $9, $10, $11, $14, $12);
        cost := bill.cost_usd;
        owed := bill.owed;
    END IF;
    IF $4 = 'unknown' AND r.hold_id IS NOT NULL THEN
        -- The provider may have charged for it: the credits stay set aside for a day, and for a second one where
        -- maintenance is to charge for it then.
        PERFORM keyvault._lock_balance($1, false);
        UPDATE keyvault.credit_holds
           SET expires_at = now() + CASE WHEN (SELECT p.unknown_outcome FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan
                                                WHERE u.user_id = $1) = 'charge' THEN interval '2 days' ELSE interval '1 day' END
         WHERE user_id = $1 AND id = r.hold_id;
    END IF;
    IF owed > 0 OR r.hold_id IS NOT NULL AND $4 <> 'unknown' THEN
        charged := keyvault._settle_hold($1, CASE WHEN $4 <> 'unknown' THEN r.hold_id END, owed);
    END IF;
    IF $4 = 'done' OR cost > 0 THEN
        INSERT INTO keyvault.usage_records (user_id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens,
                                            credits, credits_overrun, cost_usd, request_id, api_key_id, idempotency_key, metadata, hold_id, price,
                                            reasoning_tokens)
        VALUES ($1, r.type, r.provider, coalesce(r.model, $8), r.payer, bill.input_tokens, bill.cached_tokens, bill.output_tokens,
                coalesce(bill.input_tokens, 0) + coalesce(bill.output_tokens, 0), charged, bill.claimed - charged, cost, $2, r.api_key_id,
                r.idempotency_key, r.metadata, coalesce(r.hold_id, $2), bill.price, bill.reasoning_tokens);
    END IF;
    INSERT INTO keyvault.responses (user_id, id, status, status_code, body, error, model, input_tokens, cached_tokens, output_tokens,
                                    cost_usd, credits, payer)
    VALUES ($1, $2, $4, $5, CASE WHEN r.metadata <> '{"erased": true}' THEN $6 END, $7, coalesce($8, r.model), $9, $10, $11, cost, charged,
            r.payer);
    -- One write a minute tells enough about a busy key, and its row is not fought over.
    UPDATE keyvault.api_keys k
       SET last_used_at = now(), status = coalesce(verdict, k.status)
     WHERE k.user_id = CASE r.payer WHEN 'user' THEN $1 ELSE '' END AND k.id = r.api_key_id AND $5 IS NOT NULL AND k.problem IS NULL
       AND k.rotated_at IS NOT DISTINCT FROM r.key_rotated_at
       AND (k.last_used_at IS NULL OR k.last_used_at < now() - interval '1 minute'
            OR k.status <> verdict);
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._settle_request(text, uuid, integer, text, integer, jsonb, text, text, bigint, bigint, bigint, numeric, boolean, bigint) IS
    'Ends a sent request: answer, usage, price, debit and hold in one go. False, and nothing done, when that attempt is no longer the one under way.';

CREATE FUNCTION keyvault._retry_request(user_id text, id uuid, attempt integer, delay_ms integer, error text) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE keyvault.requests SET status = 'queued', next_attempt_at = clock_timestamp() + make_interval(secs => $4 / 1000.0), error = $5
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3;
    RETURN FOUND;
END $$;
COMMENT ON FUNCTION keyvault._retry_request(text, uuid, integer, integer, text) IS
    'Puts a sent request back into the queue, due after delay_ms; its hold stays.';

CREATE FUNCTION keyvault._abandon_request(user_id text, id uuid, attempt integer, error text) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE keyvault.requests SET status = 'unknown', finished_at = clock_timestamp(), error = $4, call_key = NULL
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO keyvault.responses (user_id, id, status, error, payer)
    SELECT r.user_id, r.id, r.status, r.error, r.payer FROM keyvault.requests r WHERE r.user_id = $1 AND r.id = $2
    ON CONFLICT DO NOTHING;
    UPDATE keyvault.credit_holds h SET expires_at = now() + interval '1 day'
      FROM keyvault.requests r WHERE r.user_id = $1 AND r.id = $2 AND h.user_id = $1 AND h.id = r.hold_id;
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._abandon_request(text, uuid, integer, text) IS
    'The last resort for a request that cannot be settled, because its user is gone for one: marks it unknown; its hold expires in a day.';

CREATE FUNCTION keyvault.request(
    provider text, body jsonb, path text = NULL, model text = NULL, user_id text = NULL, payer text = 'auto',
    api_key text = NULL, key_name text = 'default', idempotency_key text = NULL, timeout interval = '120 s',
    metadata jsonb = '{}') RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_request';
COMMENT ON FUNCTION keyvault.request(text, jsonb, text, text, text, text, text, text, text, interval, jsonb) IS
    'Queues a call to a provider and returns its id; the worker sends it when the transaction commits. payer: auto uses the user''s own key if there is one, else the platform''s; api_key is a key for this call alone. The same idempotency_key returns the same request. Errors: KV001 credit limit, KV003 no key, KV007 suspended, KV009 malformed api_key, 22004 and 22023 bad argument, 54000 body too large, 40001 the idempotency key is in use, 42501.';

CREATE FUNCTION keyvault.response(request_id uuid) RETURNS SETOF keyvault.responses
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT ROWS 1
    AS 'MODULE_PATHNAME', 'keyvault_response';
COMMENT ON FUNCTION keyvault.response(uuid) IS
    'The answer to a request, or no row while there is none. Errors: 22023 no such request, 42501 it is another user''s.';

CREATE FUNCTION keyvault.wait_response(request_id uuid, timeout interval = '120 s') RETURNS SETOF keyvault.responses
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT ROWS 1
    AS 'MODULE_PATHNAME', 'keyvault_wait_response';
COMMENT ON FUNCTION keyvault.wait_response(uuid, interval) IS
    'Waits for the answer to a committed request and returns it, or no row after timeout. Errors: 22023 no such request, 42501 it is another user''s, 55000 it is not committed.';

CREATE PROCEDURE keyvault.call(
    provider text, body jsonb, INOUT response jsonb = NULL, path text = NULL, model text = NULL, user_id text = NULL, payer text = 'auto',
    api_key text = NULL, key_name text = 'default', idempotency_key text = NULL, timeout interval = '120 s',
    metadata jsonb = '{}')
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_call';
COMMENT ON PROCEDURE keyvault.call(text, jsonb, jsonb, text, text, text, text, text, text, text, interval, jsonb) IS
    'Queues a call, commits, waits for its answer and returns its body in response. Not inside a transaction block (2D000). Errors: KV008 the call failed or did not end in time, and those of request().';

CREATE FUNCTION keyvault.cancel_request(request_id uuid) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_cancel_request';
COMMENT ON FUNCTION keyvault.cancel_request(uuid) IS
    'Takes a request that was not sent yet out of the queue and gives its hold back; false when it is too late. Errors: 22023, 42501.';

CREATE FUNCTION keyvault._cancel_request(user_id text, id uuid) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
BEGIN
    UPDATE keyvault.requests
       SET status = 'canceled', finished_at = clock_timestamp(), call_key = NULL, error = 'canceled before it was sent'
     WHERE user_id = $1 AND id = $2 AND status = 'queued'
    RETURNING * INTO r;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM keyvault._release_hold($1, r.hold_id);
    INSERT INTO keyvault.responses (user_id, id, status, error, payer) VALUES ($1, $2, r.status, r.error, r.payer);
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._cancel_request(text, uuid) IS 'cancel_request, after its caller was checked.';

CREATE VIEW keyvault.request_status WITH (security_invoker = true, security_barrier = true) AS
SELECT r.user_id, r.id, r.provider, r.model, r.payer, r.status, r.attempts,
       r.queued_at, r.sent_at, r.finished_at,
       r.sent_at - r.queued_at AS queue_time, r.finished_at - r.sent_at AS call_time,
       CASE r.status WHEN 'queued' THEN r.next_attempt_at END AS next_attempt_at,
       r.error, r.idempotency_key, r.metadata
  FROM keyvault.requests r;
COMMENT ON VIEW keyvault.request_status IS
    'The acting user''s requests: queued, sent, done, failed, unknown or canceled, with attempts, timings and payer.';
COMMENT ON COLUMN keyvault.request_status.user_id IS 'Whose request.';
COMMENT ON COLUMN keyvault.request_status.id IS 'The id that request() returned.';
COMMENT ON COLUMN keyvault.request_status.provider IS 'Who is called.';
COMMENT ON COLUMN keyvault.request_status.model IS 'The model that is asked for; NULL: none is named.';
COMMENT ON COLUMN keyvault.request_status.payer IS 'Whose key is used: user or platform.';
COMMENT ON COLUMN keyvault.request_status.status IS 'queued, sent, done, failed, unknown or canceled.';
COMMENT ON COLUMN keyvault.request_status.attempts IS 'How often it was sent.';
COMMENT ON COLUMN keyvault.request_status.queued_at IS 'When request() was called.';
COMMENT ON COLUMN keyvault.request_status.sent_at IS 'When it was last sent; NULL: not yet.';
COMMENT ON COLUMN keyvault.request_status.finished_at IS 'When it ended; NULL: not yet.';
COMMENT ON COLUMN keyvault.request_status.queue_time IS 'From queued_at to sent_at.';
COMMENT ON COLUMN keyvault.request_status.call_time IS 'From sent_at to finished_at.';
COMMENT ON COLUMN keyvault.request_status.next_attempt_at IS 'Not sent before, while it is queued.';
COMMENT ON COLUMN keyvault.request_status.error IS 'Why it failed, in words.';
COMMENT ON COLUMN keyvault.request_status.idempotency_key IS 'The caller''s own name for it; NULL: none.';
COMMENT ON COLUMN keyvault.request_status.metadata IS 'The caller''s own notes.';
