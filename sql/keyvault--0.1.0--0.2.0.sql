-- keyvault 0.1.0 to 0.2.0. Nothing is granted or revoked but on what is new: the privileges that an object has when a script
-- of its extension changes them are no longer dumped, roles' own among them.
\echo Use "ALTER EXTENSION keyvault UPDATE TO '0.2.0'" to load this file. \quit

DROP FUNCTION keyvault._settle_default_partition();

ALTER TABLE keyvault.users ADD COLUMN status_reason text;
ALTER TABLE keyvault.users ADD COLUMN erased_at timestamptz;
ALTER TABLE keyvault.users ADD COLUMN erased_master_key integer;

COMMENT ON COLUMN keyvault.users.status IS 'active; suspended: no calls and no new keys; erased: keys and personal data destroyed.';

COMMENT ON COLUMN keyvault.users.status_reason IS 'Why the user was suspended or erased, as the caller said.';

COMMENT ON COLUMN keyvault.users.erased_master_key IS 'The newest version of the master key that wrapped a data key of an erased user; NULL when there was none.';

CREATE OR REPLACE FUNCTION keyvault._upsert_user(user_id text, email text, name text, image text, plan text) RETURNS text
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO keyvault.users AS u (user_id, email, name, image)
    VALUES ($1, $2, $3, $4)
    ON CONFLICT (user_id) DO UPDATE
       SET email = coalesce($2, u.email), name = coalesce($3, u.name), image = coalesce($4, u.image), updated_at = now()
     WHERE u.status <> 'erased';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'user "%" is erased', $1
            USING ERRCODE = 'KV007', HINT = 'What was erased does not come back; a new user needs another user_id.';
    END IF;
    PERFORM keyvault._create_balance($1);
    IF $5 IS NOT NULL THEN
        PERFORM keyvault._set_plan($1, $5, NULL);
    END IF;
    RETURN $1;
END $$;

CREATE FUNCTION keyvault._set_user_status(user_id text, status text, reason text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE keyvault.users u SET status = $2, status_reason = $3, updated_at = now()
     WHERE u.user_id = $1 AND u.status <> 'erased';
    IF FOUND THEN
        RETURN;
    END IF;
    IF EXISTS (SELECT FROM keyvault.users u WHERE u.user_id = $1) THEN
        RAISE EXCEPTION 'user "%" is erased', $1
            USING ERRCODE = 'KV007', HINT = 'What was erased does not come back; a new user needs another user_id.';
    END IF;
    RAISE EXCEPTION 'user "%" does not exist', $1
        USING ERRCODE = 'invalid_parameter_value', HINT = 'Create it with keyvault.upsert_user().';
END $$;
REVOKE ALL ON FUNCTION keyvault._set_user_status(user_id text, status text, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._set_user_status(text, text, text) IS 'suspend_user and resume_user, after their caller was checked.';

CREATE FUNCTION keyvault.suspend_user(user_id text, reason text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_suspend_user';
REVOKE ALL ON FUNCTION keyvault.suspend_user(user_id text, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.suspend_user(text, text) IS
    'Suspends a user: new requests, requests still in the queue and new keys are refused with KV007. Calls under way end; lookups, deletions and usage records go on. reason, which the user can read, is kept in users.status_reason. Errors: 42501, 22023 unknown user, 22004, KV007 erased.';

CREATE FUNCTION keyvault.resume_user(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_resume_user';
REVOKE ALL ON FUNCTION keyvault.resume_user(user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.resume_user(text) IS
    'Ends a suspension. Errors: 42501, 22023 unknown user, 22004, KV007 erased.';

-- One place for all that is destroyed with a user: a part that adds a table of users' secrets or personal data adds it here.
CREATE FUNCTION keyvault._erase_user(user_id text, reason text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    -- Who stores a key holds the row shared: nothing is sealed behind this.
    UPDATE keyvault.users u
       SET status = 'erased', status_reason = $2, email = NULL, name = NULL, image = NULL, email_verified_at = NULL,
           stripe_customer_id = NULL, stripe_subscription_id = NULL, stripe_price_id = NULL, stripe_current_period_end = NULL,
           updated_at = now(), erased_at = coalesce(u.erased_at, now()),
           erased_master_key = coalesce(u.erased_master_key, (
               SELECT max(m.version) FROM keyvault.data_keys d JOIN keyvault.master_keys m ON m.kek_id = substr(d.wrapped, 9, 16)
                WHERE d.user_id = $1))
     WHERE u.user_id = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'user "%" does not exist', $1
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the user_id as it stands in keyvault.users.';
    END IF;
    DELETE FROM keyvault.data_keys d WHERE d.user_id = $1;
    DELETE FROM keyvault.api_keys k WHERE k.user_id = $1;
    DELETE FROM keyvault.sealed_boxes b WHERE b.user_id = $1;

    PERFORM keyvault._cancel_request($1, r.id) FROM keyvault.requests r WHERE r.user_id = $1 AND r.status = 'queued';
    -- Of calls under way the usage is recorded when they end, and the answer dropped.
    UPDATE keyvault.requests r SET body = '{}', metadata = '{"erased": true}' WHERE r.user_id = $1 AND r.status = 'sent';
    DELETE FROM keyvault.responses a WHERE a.user_id = $1;
    DELETE FROM keyvault.requests r WHERE r.user_id = $1 AND r.status <> 'sent';
    UPDATE keyvault.usage_records r SET metadata = '{}' WHERE r.user_id = $1 AND r.metadata <> '{}';
END $$;
REVOKE ALL ON FUNCTION keyvault._erase_user(user_id text, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._erase_user(text, text) IS 'erase_user, after its caller was checked.';

CREATE FUNCTION keyvault.erase_user(user_id text, reason text = NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_erase_user';
REVOKE ALL ON FUNCTION keyvault.erase_user(user_id text, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.erase_user(text, text) IS
    'Destroys a user''s data keys, API keys, requests and answers, clears the personal fields of users and the metadata of usage records, and refuses the user from then on with KV007; usage, credits and the row of users stay. Nothing opens here any more once this is committed. Bytes of deleted rows, all of them encrypted or wrapped where they are keys, leave the disk with VACUUM and the recycling of WAL. Backups and WAL of before open with the master key of their time: for them the erasure is complete when that master key was retired, by rotation, and destroyed: see erasure_status. Errors: 42501, 22023 unknown user, 22004.';

CREATE OR REPLACE FUNCTION keyvault._check_amount(amount numeric, at_least numeric) RETURNS void
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF amount IS NULL OR amount = 'NaN' OR round(amount, 6) < at_least OR amount >= 1e12 THEN
        RAISE EXCEPTION 'amount must be between % and 999999999999 credits', at_least
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Credits have six decimal places.';
    END IF;
END $$;

CREATE OR REPLACE FUNCTION keyvault._refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.metadata = '{}' AND to_jsonb(NEW) - 'metadata' = to_jsonb(OLD) - 'metadata' THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'usage records are append-only'
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = 'Correct a record with a further one; retire old months by detaching their partition.';
END $$;

COMMENT ON FUNCTION keyvault._refuse_change() IS 'Trigger that refuses UPDATE, DELETE and TRUNCATE of usage_records with 55000; only metadata may be emptied, as erase_user does.';

CREATE OR REPLACE FUNCTION keyvault._make_usage_partition(month timestamptz) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms'
AS $$
DECLARE
    partition text := keyvault._usage_partition_name(month);
    until timestamptz := keyvault._period_bound(month, 1);
BEGIN
    -- The roll-up must not read usage_records with a plan from before the move and a snapshot from after it.
    PERFORM FROM keyvault.usage_rollup FOR NO KEY UPDATE;
    -- First of all, and not a weaker lock that is raised later, which would be a deadlock with whoever reads and then
    -- inserts. An insert that waits at the default partition already would fail once the month has moved, and a reader
    -- would go by a plan without the new partition: so they wait here.
    LOCK TABLE ONLY keyvault.usage_records IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('CREATE TABLE keyvault.%I (LIKE keyvault.usage_records INCLUDING DEFAULTS, '
                || 'CONSTRAINT this_month CHECK (created_at >= %L AND created_at < %L))', partition, month, until);
    EXECUTE format('REVOKE ALL ON keyvault.%I FROM PUBLIC', partition);
    EXECUTE format('ALTER TABLE keyvault.%I ENABLE ROW LEVEL SECURITY', partition);
    EXECUTE format('COMMENT ON TABLE keyvault.%I IS %L', partition,
                   'Usage of the month that begins at ' || to_char(month AT TIME ZONE 'UTC', 'YYYY-MM-DD') || ' UTC.');
    IF EXISTS (SELECT FROM keyvault.usage_records_default WHERE created_at >= month AND created_at < until) THEN
        -- Rows keep their debit_tag, and no trigger sees them: nothing is debited or counted again.
        ALTER TABLE keyvault.usage_records_default DISABLE TRIGGER refuse_change;
        EXECUTE format('WITH moved AS (DELETE FROM keyvault.usage_records_default WHERE created_at >= %L AND created_at < %L RETURNING *) '
                    || 'INSERT INTO keyvault.%I SELECT * FROM moved', month, until, partition);
        ALTER TABLE keyvault.usage_records_default ENABLE ALWAYS TRIGGER refuse_change;
    END IF;
    -- An insert under way may have chosen the default partition already, and would be refused there: none is, from here on.
    LOCK TABLE ONLY keyvault.usage_records IN SHARE ROW EXCLUSIVE MODE;
    EXECUTE format('ALTER TABLE keyvault.usage_records ATTACH PARTITION keyvault.%I FOR VALUES FROM (%L) TO (%L)', partition, month, until);
    EXECUTE format('ALTER TABLE keyvault.%I DROP CONSTRAINT this_month', partition);
    PERFORM keyvault._guard_partition(format('keyvault.%I', partition)::regclass);
END $$;

CREATE FUNCTION keyvault._settle_default_partition(max_rows bigint = 50000) RETURNS text
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    month timestamptz;
BEGIN
    -- The oldest month first, of those that are over, are kept, and have no table of their own.
    SELECT m.month INTO month
      FROM (SELECT date_trunc('month', d.created_at, 'UTC') AS month FROM keyvault.usage_records_default d
             WHERE d.created_at < date_trunc('month', now(), 'UTC') AND d.created_at >= keyvault._usage_kept_from()
             GROUP BY 1 HAVING max_rows IS NULL OR count(*) <= max_rows) m
     WHERE to_regclass('keyvault.' || keyvault._usage_partition_name(m.month)) IS NULL
     ORDER BY m.month LIMIT 1;
    IF month IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM keyvault._make_usage_partition(month);
    RETURN keyvault._usage_partition_name(month);
END $$;
REVOKE ALL ON FUNCTION keyvault._settle_default_partition(max_rows bigint) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._settle_default_partition(bigint) IS
    'Gives the oldest ended month that has rows in the default partition, max_rows at most (NULL for any number), a partition of its own, and returns its name; NULL when there is none. Inserts wait meanwhile. Error: 55P03 when a lock is not to be had within 100 ms.';

ALTER TABLE keyvault.api_keys ADD COLUMN use_count bigint NOT NULL DEFAULT 0;

COMMENT ON COLUMN keyvault.api_keys.last_used_at IS 'When the key was last looked up or called with; written within keyvault.key_use_flush_interval.';

COMMENT ON COLUMN keyvault.api_keys.use_count IS 'How often the key was looked up or called with, platform and user alike; written as last_used_at is.';

CREATE OR REPLACE VIEW keyvault.api_key_status WITH (security_invoker = true, security_barrier = true) AS
SELECT k.user_id, k.provider, k.name, k.hint, k.status, k.source, k.id,
       k.expires_at, k.last_used_at, k.last_verified_at, k.rotated_at, k.created_at,
       coalesce(m.calls, 0) AS calls_this_month,
       coalesce(m.cost_usd, 0) AS cost_usd_this_month,
       k.problem, k.use_count
  FROM keyvault.api_keys k
  LEFT JOIN LATERAL (
       SELECT count(*) AS calls, sum(r.cost_usd) AS cost_usd
         FROM keyvault.usage_records r
        WHERE r.user_id = k.user_id AND r.api_key_id = k.id
          AND r.created_at >= date_trunc('month', now(), 'UTC')) m ON true;

CREATE TABLE keyvault.rotation_requests (
    user_id  text COLLATE "C" NOT NULL,
    what     text NOT NULL CHECK (what IN ('master_key', 'data_key')),
    asked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, what)
);

COMMENT ON TABLE keyvault.rotation_requests IS
    'Rotations that were asked for while keyvault.reveal was off, until the worker has done them. The user '''' is the platform, and the master key''s.';

SELECT pg_catalog.pg_extension_config_dump('keyvault.rotation_requests', '');

ALTER TABLE keyvault.rotation_requests ENABLE ROW LEVEL SECURITY;

CREATE FUNCTION keyvault._may_open_keys() RETURNS boolean
    LANGUAGE c STABLE
    AS 'MODULE_PATHNAME', 'keyvault_may_open_keys';
REVOKE ALL ON FUNCTION keyvault._may_open_keys() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._may_open_keys() IS 'True where keys can be opened: in every session, or, with keyvault.reveal off, in the worker alone.';

COMMENT ON FUNCTION keyvault.rotate_master_key() IS
    'Makes the first of the loaded master keys the one that wraps, wraps every data key of another again, and retires those that wrap nothing any more; returns how many data keys were wrapped; NULL with keyvault.reveal off, when the worker does it. In one transaction, which waits for, and then keeps back, those who store a first key of a user: for large vaults CALL keyvault.rotate_master_key(batch). A superuser calls it. Errors: KV004 a master key is not loaded, 55000 the first one was retired, 25000 isolation level, 42501 keyvault.reveal is off.';

CREATE FUNCTION keyvault.rotate_data_key(user_id text) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_rotate_data_key';
REVOKE ALL ON FUNCTION keyvault.rotate_data_key(user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.rotate_data_key(text) IS
    'Seals a user''s secrets again, under a new version of the data key, and deletes the version before; returns the new version, NULL for a user without a data key, and with keyvault.reveal off, when the worker does it. The user '''' is the platform. A secret that does not open is left as it is, with a warning, and its data key with it. Access admin, or the right to act for any user. Errors: KV004, KV005 the data key cannot be opened, 25000 isolation level, 42501.';

CREATE FUNCTION keyvault.rotate_data_keys(older_than interval, batch integer = 100) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_rotate_data_keys';
REVOKE ALL ON FUNCTION keyvault.rotate_data_keys(older_than interval, batch integer) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.rotate_data_keys(interval, integer) IS
    'rotate_data_key for up to batch users, 1 to 10000, whose data key is older than older_than, the oldest first; returns how many, 0 when all is done. A user whose data key cannot be opened is passed over with a warning KV005. Access admin, or the right to act for any user. Errors: KV004, 22023, 25000, 42501.';

CREATE FUNCTION keyvault._rotate_due(batch integer, OUT done integer, OUT more boolean)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    oldest constant interval := current_setting('keyvault.data_key_max_age')::interval;
    asked keyvault.rotation_requests;
BEGIN
    done := 0;
    more := false;
    IF NOT keyvault._may_open_keys() THEN
        RETURN;
    END IF;
    FOR asked IN SELECT * FROM keyvault.rotation_requests r ORDER BY r.asked_at, r.user_id LIMIT batch FOR UPDATE SKIP LOCKED LOOP
        BEGIN
            IF asked.what = 'master_key' THEN
                PERFORM keyvault.rotate_master_key();
            ELSE
                PERFORM keyvault.rotate_data_key(asked.user_id);
            END IF;
            DELETE FROM keyvault.rotation_requests r WHERE r.user_id = asked.user_id AND r.what = asked.what;
            done := done + 1;
        EXCEPTION
            -- One that cannot be done must not hold up the others; it is tried again.
            WHEN SQLSTATE 'KV004' OR SQLSTATE 'KV005' OR object_not_in_prerequisite_state THEN
                RAISE WARNING 'rotation of the % of user "%" failed: %', replace(asked.what, '_', ' '), asked.user_id, SQLERRM
                    USING ERRCODE = SQLSTATE, HINT = 'It is tried again. A superuser gives it up with DELETE FROM keyvault.rotation_requests.';
        END;
    END LOOP;
    IF oldest > '0' AND done < batch THEN
        done := done + keyvault.rotate_data_keys(oldest, batch - done);
    END IF;
    more := done >= batch;
END $$;
REVOKE ALL ON FUNCTION keyvault._rotate_due(batch integer, OUT done integer, OUT more boolean) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._rotate_due(integer) IS
    'Does up to batch of the rotations that were asked for, and of data keys older than keyvault.data_key_max_age: how many, and whether there may be more. Nothing where keys cannot be opened.';

CREATE VIEW keyvault.api_keys_due WITH (security_invoker = true, security_barrier = true) AS
SELECT k.provider, k.name, k.user_id, k.expires_at,
       floor(extract(epoch FROM k.expires_at - now()) / 86400)::integer AS days_left, k.hint, k.status
  FROM keyvault.api_keys k
 WHERE k.expires_at < now() + interval '30 days'
 ORDER BY k.expires_at;
REVOKE ALL ON keyvault.api_keys_due FROM PUBLIC;

COMMENT ON VIEW keyvault.api_keys_due IS
    'The acting user''s provider keys that have to be replaced: they expire within 30 days, or have. days_left is negative for those. Access admin sees every user''s.';

CREATE VIEW keyvault.erasure_status WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.erased_at, u.status_reason, u.erased_master_key AS master_key_version,
       CASE WHEN u.erased_master_key IS NOT NULL
            THEN (SELECT m.retired_at FROM keyvault.master_keys m WHERE m.version = u.erased_master_key) END AS master_key_retired_at
  FROM keyvault.users u WHERE u.status = 'erased';
REVOKE ALL ON keyvault.erasure_status FROM PUBLIC;

COMMENT ON VIEW keyvault.erasure_status IS
    'Erased users. Copies of their keys in backups and WAL from before erased_at open with the master key of master_key_version, or an earlier one: destroy every copy of those keys, once master_key_retired_at is set, and nothing opens them anywhere. For superusers.';

-- When and how often keys are used: noted in shared memory, written in batches.

CREATE FUNCTION keyvault._flush_key_use() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_flush_key_use';
REVOKE ALL ON FUNCTION keyvault._flush_key_use() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._flush_key_use() IS
    'Writes the noted uses of this database''s keys to api_keys (last_used_at, use_count) now; returns for how many keys. Rows that are locked wait for the next flush. The worker does the same by itself.';

CREATE OR REPLACE FUNCTION keyvault._use_usd(price keyvault.model_prices, input_tokens bigint, cached_tokens bigint, output_tokens bigint,
                                  reasoning_tokens bigint, units numeric, OUT usd numeric, OUT used jsonb)
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tier jsonb := (SELECT t FROM jsonb_array_elements(price.context_tiers) t WHERE (t ->> 'over')::numeric < input_tokens
                    ORDER BY (t ->> 'over')::numeric DESC LIMIT 1);
    input_price numeric := coalesce((tier ->> 'input')::numeric, price.input_usd_per_mtok);
    cached_price numeric := coalesce((tier ->> 'cached_input')::numeric, price.cached_input_usd_per_mtok, input_price);
    output_price numeric := coalesce((tier ->> 'output')::numeric, price.output_usd_per_mtok);
    reasoning_price numeric := coalesce((tier ->> 'reasoning')::numeric, price.reasoning_usd_per_mtok, output_price);
    fresh bigint := coalesce(input_tokens, 0) - least(coalesce(cached_tokens, 0), coalesce(input_tokens, 0));
    thought bigint := least(coalesce(reasoning_tokens, 0), coalesce(output_tokens, 0));
BEGIN
    IF price.model IS NULL THEN
        RETURN;
    END IF;
    usd := least(round((fresh * input_price + (coalesce(input_tokens, 0) - fresh) * cached_price
                        + (coalesce(output_tokens, 0) - thought) * output_price + thought * reasoning_price) / 1000000
                       + price.usd_per_request + coalesce(units, 0) * price.usd_per_unit, 9), 999999999);
    used := jsonb_strip_nulls(jsonb_build_object(
        'provider', price.provider, 'model', price.model, 'valid_from', nullif(price.valid_from, '-infinity'),
        'input', trim_scale(input_price), 'cached_input', trim_scale(nullif(cached_price, input_price)),
        'output', trim_scale(output_price), 'reasoning', trim_scale(nullif(reasoning_price, output_price)),
        'per_request', trim_scale(nullif(price.usd_per_request, 0)), 'per_unit', trim_scale(nullif(price.usd_per_unit, 0)),
        'over', tier -> 'over'));
END $$;

CREATE OR REPLACE FUNCTION keyvault._enqueue_request(
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
    the_model text := coalesce($6, $4 ->> 'model');
    the_body jsonb := $4;
    the_path text;
    key record;
    estimate numeric;
    hold uuid;
    owed numeric;
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

    the_path := coalesce($5, p.default_path);
    IF the_path IS NULL OR the_path !~ '^/[!-~]*$' OR the_path ~ '(^|/)[.][.](/|$)|#' OR strpos(the_path, chr(92)) > 0 THEN
        RAISE EXCEPTION 'a request to provider "%" needs a path that begins with "/"', $3
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the path of the provider''s API, without its host.';
    END IF;
    IF the_path LIKE '%{model}%' THEN
        IF the_model IS NULL OR the_model !~ '^[A-Za-z0-9][A-Za-z0-9._-]*$' THEN
            RAISE EXCEPTION 'a request to provider "%" needs a model', $3
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass model => ''name''; letters, digits, ".", "_" and "-".';
        END IF;
        the_path := replace(the_path, '{model}', the_model);
        the_body := the_body - 'model';
    ELSIF $6 IS NOT NULL AND p.dialect <> 'json' THEN
        the_body := the_body || jsonb_build_object('model', $6);
    END IF;

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
    estimate := keyvault._estimate_usd(p, the_model, the_body);
    owed := keyvault._credits_owed(u.plan, key.payer, estimate);
    -- Without credits to set aside, budgets in USD may still have to be.
    IF owed > 0 OR EXISTS (SELECT FROM keyvault.credit_budgets g WHERE g.user_id = $1) THEN
        hold := keyvault._hold_credits($1, owed, 'infinity', false, the_model, estimate);
    END IF;
    INSERT INTO keyvault.requests (user_id, id, provider, model, type, path, payer, api_key_id, call_key, timeout_ms,
                                   hold_id, estimated_usd, idempotency_key, metadata, body)
    VALUES ($1, $2, $3, the_model, CASE p.dialect WHEN 'json' THEN 'api' ELSE 'chat' END, the_path, key.payer, key.api_key_id, $8,
            $11, hold, estimate, $10, coalesce($12, '{}'), the_body)
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

CREATE OR REPLACE FUNCTION keyvault._settle_request(
    user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, model text,
    input_tokens bigint, cached_tokens bigint, output_tokens bigint, stated_usd numeric, key_refused boolean) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
    plan text;
    asked keyvault.model_prices;
    use record;
    sold record;
    cost numeric := 0;
    owed numeric := 0;
    charged numeric := 0;
BEGIN
    UPDATE keyvault.requests SET status = $4, finished_at = clock_timestamp(), error = $7, call_key = NULL
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3
    RETURNING * INTO r;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF $4 = 'done' OR $5 BETWEEN 200 AND 299 THEN
        SELECT u.plan INTO plan FROM keyvault.users u WHERE u.user_id = $1;
        asked := keyvault._find_price(r.provider, r.model, now());
        IF asked.model IS NULL THEN
            asked := keyvault._find_price(r.provider, $8, now());
        END IF;
        SELECT q.usd, q.used INTO use FROM keyvault._use_usd(asked, $9, $10, $11, NULL, NULL) q WHERE $9 IS NOT NULL;
        SELECT q.usd INTO sold
          FROM keyvault._use_usd(keyvault._find_price(r.provider, asked.model, now(), plan), $9, $10, $11, NULL, NULL) q WHERE $9 IS NOT NULL;
        -- An answer that does not say what it used is charged as estimated, never silently free.
        cost := least(coalesce($12, use.usd, r.estimated_usd), 999999999);
        owed := keyvault._credits_owed(plan, r.payer, coalesce(sold.usd, cost));
    END IF;
    IF $4 = 'unknown' AND r.hold_id IS NOT NULL THEN
        -- The provider may have charged for it: the credits stay set aside for a day.
        PERFORM keyvault._lock_balance($1, false);
        UPDATE keyvault.credit_holds SET expires_at = now() + interval '1 day' WHERE user_id = $1 AND id = r.hold_id;
    END IF;
    IF owed > 0 OR r.hold_id IS NOT NULL AND $4 <> 'unknown' THEN
        charged := keyvault._settle_hold($1, CASE WHEN $4 <> 'unknown' THEN r.hold_id END, owed);
    END IF;
    IF $4 = 'done' OR cost > 0 THEN
        INSERT INTO keyvault.usage_records (user_id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens,
                                            credits, credits_overrun, cost_usd, request_id, api_key_id, idempotency_key, metadata, hold_id, price)
        VALUES ($1, r.type, r.provider, coalesce(r.model, $8), r.payer, $9, $10, $11, coalesce($9, 0) + coalesce($11, 0),
                charged, owed - charged, cost, $2, r.api_key_id, r.idempotency_key, r.metadata, coalesce(r.hold_id, $2),
                CASE WHEN $12 IS NULL THEN use.used END);
    END IF;
    INSERT INTO keyvault.responses (user_id, id, status, status_code, body, error, model, input_tokens, cached_tokens, output_tokens,
                                    cost_usd, credits, payer)
    VALUES ($1, $2, $4, $5, CASE WHEN r.metadata <> '{"erased": true}' THEN $6 END, $7, coalesce($8, r.model), $9, $10, $11, cost, charged,
            r.payer);
    -- One write a minute tells enough about a busy key, and its row is not fought over.
    UPDATE keyvault.api_keys k
       SET last_used_at = now(), status = CASE WHEN $13 THEN 'failed' ELSE 'active' END
     WHERE k.user_id = CASE r.payer WHEN 'user' THEN $1 ELSE '' END AND k.id = r.api_key_id AND $5 IS NOT NULL
       AND (k.last_used_at IS NULL OR k.last_used_at < now() - interval '1 minute'
            OR k.status <> CASE WHEN $13 THEN 'failed' ELSE 'active' END);
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION keyvault._maintain(job text, batch integer = 10000, OUT done bigint, OUT more boolean, OUT detail text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    more := false;
    CASE job
        WHEN 'partitions' THEN
            done := keyvault._make_usage_partitions();
            detail := CASE WHEN done > 0 THEN 'partitions made ahead' END;
            IF done = 0 THEN
                detail := 'moved out of the default partition into ' || keyvault._settle_default_partition();
                done := (detail IS NOT NULL)::integer;
            END IF;
            more := done > 0;
        WHEN 'roll-up' THEN
            SELECT r.rolled, r.more INTO done, more FROM keyvault._roll_up_usage(2 * batch) r;
            detail := 'records added to usage_daily';
        WHEN 'retention' THEN
            detail := 'retired ' || keyvault._retire_usage();
            done := (detail IS NOT NULL)::integer;
            more := done > 0;
        WHEN 'reset' THEN
            -- Few at a time: a debit of one of them waits for the batch.
            done := keyvault._reset_due_credits(least(batch, 250));
            more := done >= least(batch, 250);
            detail := 'balances whose period ended';
        WHEN 'purge' THEN
            done := keyvault._purge(batch);
            more := done >= batch;
            detail := 'old requests, and users with expired holds';
        WHEN 'rotation' THEN
            SELECT r.done, r.more INTO done, more FROM keyvault._rotate_due(least(batch, 20)) r;
            detail := 'keys rotated';
    END CASE;
EXCEPTION
    WHEN lock_not_available THEN
        done := 0;
        more := false;
        detail := 'waits for a lock';
END $$;

CREATE PROCEDURE keyvault.maintain(name text = NULL)
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_maintain';
REVOKE ALL ON PROCEDURE keyvault.maintain(name text) FROM PUBLIC;

COMMENT ON PROCEDURE keyvault.maintain(text) IS
    'Does all that is due, or one job of it, and commits after each batch. A superuser calls it. Errors: 22023, 2D000 inside a transaction block, 42501.';

-- pg_cron's tables are in one database of the cluster, often another one than this.

CREATE FUNCTION keyvault.job_statements() RETURNS SETOF text
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT format('SELECT cron.schedule_in_database(%L, %L, %L, %L);', 'keyvault ' || j.job || ' in ' || current_database(), j.schedule,
                  format('CALL keyvault.maintain(%L)', j.job), current_database())
      FROM keyvault._maintenance_job j ORDER BY j.place;
END;
REVOKE ALL ON FUNCTION keyvault.job_statements() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.job_statements() IS
    'The statements that register this database''s maintenance with pg_cron 1.4 or later, to be run in pg_cron''s own database. Run again they change nothing.';

CREATE FUNCTION keyvault._require_cron() RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regprocedure('cron.schedule_in_database(text, text, text, text, text, boolean)') IS NULL THEN
        RAISE EXCEPTION 'pg_cron is not in this database'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = 'The worker of keyvault does the same jobs without it.',
                  HINT = CASE WHEN coalesce(current_setting('cron.database_name', true), current_database()) = current_database()
                              THEN 'Install pg_cron 1.4 or later, and run CREATE EXTENSION pg_cron.'
                              ELSE format('Run what SELECT keyvault.job_statements() returns in database "%s", where pg_cron is.',
                                          current_setting('cron.database_name', true)) END;
    END IF;
END $$;
REVOKE ALL ON FUNCTION keyvault._require_cron() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._require_cron() IS 'Raises 55000 where pg_cron is not, and says how to go on.';

CREATE FUNCTION keyvault.schedule_jobs() RETURNS TABLE (job text, schedule text, command text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    statement text;
BEGIN
    PERFORM keyvault._require_cron();
    FOR statement IN SELECT keyvault.job_statements() LOOP
        EXECUTE statement;
    END LOOP;
    RETURN QUERY EXECUTE $sql$SELECT c.jobname::text, c.schedule, c.command FROM cron.job c
                               WHERE c.database = current_database() AND c.jobname ~ '^keyvault .* in ' ORDER BY c.jobid$sql$;
END $$;
REVOKE ALL ON FUNCTION keyvault.schedule_jobs() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.schedule_jobs() IS
    'Registers this database''s maintenance with pg_cron, a job for each kind, under the calling role, and returns the jobs; again, it changes nothing. A superuser calls it, in the database that pg_cron is in; for others see job_statements(). Errors: 42501, 55000 where pg_cron is not.';

CREATE FUNCTION keyvault.unschedule_jobs() RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    removed bigint;
BEGIN
    PERFORM keyvault._require_cron();
    EXECUTE $sql$SELECT count(cron.unschedule(c.jobid)) FROM cron.job c
                  WHERE c.database = current_database() AND c.jobname ~ '^keyvault .* in '$sql$ INTO removed;
    RETURN removed;
END $$;
REVOKE ALL ON FUNCTION keyvault.unschedule_jobs() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.unschedule_jobs() IS
    'Takes this database''s maintenance out of pg_cron, and returns how many jobs there were. Errors: 42501, 55000 where pg_cron is not.';

-- Every grant of the extension. Nothing is PUBLIC's; access is given by grant_access.

CREATE OR REPLACE FUNCTION keyvault._access_statements(access text) RETURNS SETOF text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    app_functions text[] := '{act_as, store_api_key_reference, upsert_user, set_plan, suspend_user, resume_user, erase_user, uuidv7, _debit_tag}';
    user_functions text[] := '{test_api_key, store_api_key, store_api_keys, sealing_key, store_sealed_api_key, user_api_keys, user_api_key, delete_api_key, request, response, wait_response, call, cancel_request}';
    every_function text[] := '{current_user_id, _may_act_for_any_user, _may_read_all_usage, _may_administer, _period_bound, _period_number, usage_chart}';
    admin_functions text[] := '{upsert_user, set_plan, suspend_user, resume_user, erase_user, rotate_data_key, rotate_data_keys, store_platform_key}';
    credit_functions text[] := CASE access
        WHEN 'app' THEN '{record_usage, reserve_credits, settle_credits, release_credits, grant_credits, refund_usage, set_budget}'
        WHEN 'admin' THEN '{grant_credits, refund_usage, set_budget, reset_due_credits, verify_ledger, _ledger}'
        WHEN 'analyst' THEN '{verify_ledger, _ledger}' END::text[]
        || '{_balance_now, _in_budget, _budget_window, _budget_held, balance_at, explain_balance}'::text[];
    routines text[];
    member text;
BEGIN
    IF access IS NULL OR access NOT IN ('app', 'user', 'analyst', 'admin') THEN
        RAISE EXCEPTION 'access must be app, user, analyst or admin'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'See "Access" in doc/keyvault.md.';
    END IF;
    routines := every_function || credit_functions || ('_' || access) || CASE access
        WHEN 'app' THEN app_functions || user_functions
        WHEN 'user' THEN user_functions
        WHEN 'admin' THEN admin_functions END;
    RETURN NEXT 'USAGE ON SCHEMA keyvault';
    FOR member IN SELECT p.oid::regprocedure::text FROM pg_proc p
                   WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname = ANY (routines) ORDER BY 1 LOOP
        RETURN NEXT 'EXECUTE ON ROUTINE ' || member;
    END LOOP;
    RETURN NEXT 'SELECT ON keyvault.users, keyvault.credit_balances, keyvault.credit_holds, keyvault.plans, keyvault.providers, '
             || 'keyvault.model_prices, keyvault.credit_status, keyvault.usage_records, keyvault.usage_by_day';
    RETURN NEXT 'SELECT ON keyvault.credit_grants, keyvault.credit_periods, keyvault.credit_notices, keyvault.credit_budgets, '
             || 'keyvault.budget_status, keyvault.plan_prices, keyvault.usage_archived';
    RETURN NEXT 'SELECT ON keyvault.usage_by_model, keyvault.usage_by_month, keyvault.cost_by_payer, keyvault.revenue_by_user, '
             || 'keyvault.usage_anomalies, keyvault.usage_daily, keyvault.usage_late, keyvault.usage_retired, keyvault.usage_rollup, keyvault._usage';
    IF access IN ('app', 'user') THEN
        RETURN NEXT 'SELECT (user_id, id, provider, model, type, path, payer, api_key_id, status, attempts, timeout_ms, hold_id, estimated_usd, '
                 || 'idempotency_key, queued_at, next_attempt_at, sent_at, finished_at, error, metadata, body) ON keyvault.requests';
        RETURN NEXT 'SELECT ON keyvault.responses, keyvault.request_status';
    END IF;
    IF access IN ('app', 'user', 'admin') THEN
        RETURN NEXT 'SELECT (user_id, id, provider, name, hint, source, status, expires_at, last_used_at, last_verified_at, rotated_at, '
                 || 'created_at, updated_at, problem, use_count) ON keyvault.api_keys';
        RETURN NEXT 'SELECT ON keyvault.api_key_status, keyvault.api_keys_due';
    END IF;
    IF access = 'app' THEN
        -- debit_tag and hold_id stay out: with them, a writer could pass a row off as debited, or as settled past a budget.
        RETURN NEXT 'INSERT (user_id, created_at, id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens, '
                 || 'credits, cost_usd, request_id, api_key_id, issued_key_id, idempotency_key, metadata, reasoning_tokens, units, member_id) ON keyvault.usage_records';
        RETURN NEXT 'SET ON PARAMETER "keyvault.user_id"';
    END IF;
    IF access = 'admin' THEN
        -- Where a provider is, and how it is given the key, is the superuser's: whoever sets that reads the keys.
        RETURN NEXT 'INSERT, UPDATE, DELETE ON keyvault.plans, keyvault.model_prices, keyvault.plan_prices';
        RETURN NEXT 'UPDATE (key_pattern, platform_paths, usd_per_request) ON keyvault.providers';
    END IF;
END $$;
