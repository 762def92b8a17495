-- Other keys in the place of old ones, and what is due for it.

CREATE VIEW keyvault.master_key_status WITH (security_invoker = true, security_barrier = true) AS
SELECT m.version, encode(m.kek_id, 'hex') AS kek_id, m.status,
       (SELECT count(*) FROM keyvault.data_keys d WHERE substr(d.wrapped, 9, 16) = m.kek_id) AS data_keys,
       m.created_at, m.retired_at
  FROM keyvault.master_keys m;
COMMENT ON VIEW keyvault.master_key_status IS
    'Each master key that this vault has known: its id, its status, and how many data keys it wraps, which is a rotation''s progress. For superusers.';
COMMENT ON COLUMN keyvault.master_key_status.version IS 'Counts the master keys of this vault, in the order they were first used.';
COMMENT ON COLUMN keyvault.master_key_status.kek_id IS 'What the key is known by, in hexadecimal digits.';
COMMENT ON COLUMN keyvault.master_key_status.status IS 'primary wraps, old only opens, retired is given up.';
COMMENT ON COLUMN keyvault.master_key_status.data_keys IS 'How many data keys it wraps: 0 when a rotation from it is complete.';
COMMENT ON COLUMN keyvault.master_key_status.created_at IS 'When this vault first used it.';
COMMENT ON COLUMN keyvault.master_key_status.retired_at IS 'When it wrapped nothing any more and was given up; NULL: not yet.';

CREATE TABLE keyvault.rotation_requests (
    user_id  text COLLATE "C" NOT NULL,
    what     text NOT NULL CHECK (what IN ('master_key', 'data_key')),
    asked_at timestamptz NOT NULL DEFAULT now(),
    batch_size integer NOT NULL CHECK (batch_size BETWEEN 1 AND 100000),
    PRIMARY KEY (user_id, what)
);
COMMENT ON TABLE keyvault.rotation_requests IS
    'Rotations that were asked for while keyvault.reveal was off, until the worker has done them. The user '''' is the platform, and the master key''s.';
COMMENT ON COLUMN keyvault.rotation_requests.batch_size IS 'How many data keys to wrap again in a transaction, for the master key.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.rotation_requests', '');
ALTER TABLE keyvault.rotation_requests ENABLE ROW LEVEL SECURITY;

CREATE FUNCTION keyvault._may_open_keys() RETURNS boolean
    LANGUAGE c STABLE
    AS 'MODULE_PATHNAME', 'keyvault_may_open_keys';
COMMENT ON FUNCTION keyvault._may_open_keys() IS 'True where keys can be opened: in every session, or, with keyvault.reveal off, in the worker alone.';

CREATE FUNCTION keyvault.rotate_master_key() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_rotate_master_key';
COMMENT ON FUNCTION keyvault.rotate_master_key() IS
    'Makes the first of the loaded master keys the one that wraps, wraps every data key of another again, and retires those that wrap nothing any more; returns how many data keys were wrapped; NULL with keyvault.reveal off, when the worker does it. In one transaction, which waits for, and then keeps back, those who store a first key of a user: for large vaults CALL keyvault.rotate_master_key(batch). A superuser calls it. Errors: KV004 a master key is not loaded, 55000 the first one was retired, 25000 isolation level, 42501 keyvault.reveal is off.';

CREATE PROCEDURE keyvault.rotate_master_key(batch integer)
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_rotate_master_key_in_batches';
COMMENT ON PROCEDURE keyvault.rotate_master_key(integer) IS
    'As rotate_master_key(), with a transaction for each batch of 1 to 100000 data keys, NULL for 1000: nobody is kept waiting, and after an interruption another call goes on. Waits once for the transactions that are storing first keys. Not inside a transaction block (2D000). A superuser calls it. Errors: those of rotate_master_key(), 22023.';

CREATE FUNCTION keyvault._rotate_master_key_step(batch integer) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_rotate_master_key_step';
COMMENT ON FUNCTION keyvault._rotate_master_key_step(integer) IS
    'A step of rotate_master_key(batch), which its caller commits: the switch to the first loaded key, or a batch of up to batch data keys, or the end; true with the end. Errors: those of rotate_master_key(), 55P03 the end waits for transactions that store first keys.';

CREATE FUNCTION keyvault.rotate_data_key(user_id text) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_rotate_data_key';
COMMENT ON FUNCTION keyvault.rotate_data_key(text) IS
    'Seals a user''s secrets again, under a new version of the data key, and deletes the version before; returns the new version, NULL for a user without a data key, and with keyvault.reveal off, when the worker does it. The user '''' is the platform. A secret that does not open is left as it is, with a warning, and its data key with it. Access admin. Errors: KV004, KV005 the data key cannot be opened, 22004, 25000 isolation level, 42501.';

CREATE FUNCTION keyvault.rotate_data_keys(older_than interval, batch integer = 100) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_rotate_data_keys';
COMMENT ON FUNCTION keyvault.rotate_data_keys(interval, integer) IS
    'rotate_data_key for up to batch users, 1 to 10000, whose data key is older than older_than, the oldest first; returns how many, 0 when all is done. A user whose data key cannot be opened is passed over with a warning KV005. Access admin. Errors: KV004, 22004, 22023 batch, or a negative older_than, 25000, 42501.';

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
    FOR asked IN SELECT * FROM keyvault.rotation_requests r ORDER BY r.what DESC, r.asked_at, r.user_id LIMIT batch FOR UPDATE SKIP LOCKED LOOP
        BEGIN
            IF asked.what = 'master_key' THEN
                IF NOT keyvault._rotate_master_key_step(asked.batch_size) THEN
                    -- The next step is another transaction, and calls are looked after in between.
                    more := true;
                    RETURN;
                END IF;
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
            WHEN lock_not_available THEN
                NULL;
        END;
    END LOOP;
    IF oldest > '0' AND done < batch THEN
        done := done + keyvault.rotate_data_keys(oldest, batch - done);
    END IF;
    more := done >= batch;
END $$;
COMMENT ON FUNCTION keyvault._rotate_due(integer) IS
    'Does up to batch of the rotations that were asked for, the master key''s a step at a time, and of data keys older than keyvault.data_key_max_age: how many, and whether there may be more. Nothing where keys cannot be opened.';

CREATE VIEW keyvault.api_keys_due WITH (security_invoker = true, security_barrier = true) AS
SELECT k.provider, k.name, k.user_id, k.expires_at,
       floor(extract(epoch FROM k.expires_at - now()) / 86400)::integer AS days_left, k.hint, k.status
  FROM keyvault.api_keys k
 WHERE k.expires_at < now() + interval '30 days'
 ORDER BY k.expires_at;
COMMENT ON VIEW keyvault.api_keys_due IS
    'The acting user''s provider keys that have to be replaced: they expire within 30 days, or have. days_left is negative for those. Access admin sees every user''s.';
COMMENT ON COLUMN keyvault.api_keys_due.provider IS 'Whose service the key is for.';
COMMENT ON COLUMN keyvault.api_keys_due.name IS 'Tells a user''s keys of a provider apart.';
COMMENT ON COLUMN keyvault.api_keys_due.user_id IS 'Whose key; '''' is the platform.';
COMMENT ON COLUMN keyvault.api_keys_due.expires_at IS 'From then on it is not used.';
COMMENT ON COLUMN keyvault.api_keys_due.days_left IS 'Whole days until then; negative: since.';
COMMENT ON COLUMN keyvault.api_keys_due.hint IS 'How the key begins and ends, for people.';
COMMENT ON COLUMN keyvault.api_keys_due.status IS 'active; failed: the provider refused it, or it came sealed and is none.';

CREATE FUNCTION keyvault._platform_master_key(before integer) RETURNS integer
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT max(m.version) FROM keyvault.data_keys d JOIN keyvault.master_keys m ON m.kek_id = substr(d.wrapped, 9, 16)
     WHERE d.user_id = '' AND d.version < $1;
END;
COMMENT ON FUNCTION keyvault._platform_master_key(integer) IS
    'The newest version of the master key that wraps a data key of the platform''s of an earlier version than that; NULL when there is none.';

CREATE FUNCTION keyvault._note_boxes_destroyed(version integer) RETURNS void
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    UPDATE keyvault.users u
       SET boxes_destroyed_at = clock_timestamp(),
           erased_master_key = greatest(u.erased_master_key, keyvault._platform_master_key($1))
     WHERE u.status = 'erased' AND u.boxes_destroyed_at IS NULL
       AND NOT EXISTS (SELECT FROM keyvault.sealing_keys s WHERE s.created_at <= u.erased_at);
END;
COMMENT ON FUNCTION keyvault._note_boxes_destroyed(integer) IS
    'Notes, before the platform''s data keys of earlier versions are deleted, for which erased users nothing is left here that opens their sealed boxes: those without a sealing key from before the erasure.';

CREATE FUNCTION keyvault.retire_sealing_keys() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_retire_sealing_keys';
COMMENT ON FUNCTION keyvault.retire_sealing_keys() IS
    'Has no more boxes taken for the keys that sealing_key() has given so far, and deletes those that no stored box needs, the others in maintenance when the worker has opened these; returns how many were deleted. The next sealing_key() makes a new one. A step of a complete erasure: see erasure_status. Access admin. Errors: 25000 above READ COMMITTED, 42501.';

CREATE VIEW keyvault.erasure_status WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.erased_at, u.status_reason, e.master_key_version,
       CASE WHEN u.boxes_destroyed_at IS NOT NULL
            THEN (SELECT m.retired_at FROM keyvault.master_keys m WHERE m.version = e.master_key_version) END AS master_key_retired_at,
       u.boxes_destroyed_at
  FROM keyvault.users u,
       LATERAL (SELECT CASE WHEN u.boxes_destroyed_at IS NOT NULL THEN u.erased_master_key
                            ELSE greatest(u.erased_master_key, keyvault._platform_master_key(2147483647)) END AS master_key_version) e
 WHERE u.status = 'erased';
COMMENT ON VIEW keyvault.erasure_status IS
    'Erased users. Copies of their keys in backups and WAL from before erased_at open with the master key of master_key_version, or an earlier one: destroy every copy of those keys, once master_key_retired_at is set, and nothing opens them anywhere. Where a copy may be a sealed box, this database itself holds what opens it until boxes_destroyed_at: retire_sealing_keys(), then rotate_data_key(''''), then rotate the master key. For superusers.';
COMMENT ON COLUMN keyvault.erasure_status.user_id IS 'Who was erased.';
COMMENT ON COLUMN keyvault.erasure_status.erased_at IS 'When.';
COMMENT ON COLUMN keyvault.erasure_status.status_reason IS 'Why, as the caller said.';
COMMENT ON COLUMN keyvault.erasure_status.master_key_version IS 'The newest master key that opens copies of the user''s keys from before; NULL: none does.';
COMMENT ON COLUMN keyvault.erasure_status.master_key_retired_at IS 'When that was retired, from when on destroying every copy of it completes the erasure; NULL: not yet.';
COMMENT ON COLUMN keyvault.erasure_status.boxes_destroyed_at IS 'When the keys were destroyed that sealed boxes of the user open with; NULL: not yet.';
