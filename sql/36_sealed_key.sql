-- The keys that clients seal API keys to.

CREATE TABLE keyvault.sealing_keys (
    key_id     bytea PRIMARY KEY CHECK (octet_length(key_id) = 4),
    id         uuid NOT NULL,
    public_key bytea NOT NULL CHECK (octet_length(public_key) = 65),
    ciphertext bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    retired_at timestamptz NOT NULL
);
COMMENT ON TABLE keyvault.sealing_keys IS 'The vault''s pairs of keys on P-256 to which clients seal API keys; several may be in use at once.';
COMMENT ON COLUMN keyvault.sealing_keys.key_id IS 'The first four bytes of the SHA-256 of public_key.';
COMMENT ON COLUMN keyvault.sealing_keys.public_key IS 'A point on P-256, uncompressed (SEC 1, section 2.3.3).';
COMMENT ON COLUMN keyvault.sealing_keys.ciphertext IS 'The private key, 32 bytes, as a secret record of the platform''s.';
COMMENT ON COLUMN keyvault.sealing_keys.retired_at IS 'Boxes for this key are taken until then.';
-- Clients seal to what stands here: who may write to any table without being a superuser adds nothing.
ALTER TABLE keyvault.sealing_keys ENABLE ROW LEVEL SECURITY;
SELECT pg_catalog.pg_extension_config_dump('keyvault.sealing_keys', '');

CREATE TABLE keyvault.sealed_boxes (
    user_id    text COLLATE "C" NOT NULL,
    digest     bytea NOT NULL CHECK (octet_length(digest) = 32),
    key_id     bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, digest)
);
COMMENT ON TABLE keyvault.sealed_boxes IS 'SHA-256 of the boxes that were taken, so that none is taken twice; forgotten with the sealing key.';
ALTER TABLE keyvault.sealed_boxes ENABLE ROW LEVEL SECURITY;
SELECT pg_catalog.pg_extension_config_dump('keyvault.sealed_boxes', '');

CREATE FUNCTION keyvault._forget_sealing_keys() RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    retired bytea[];
    forgotten bigint;
BEGIN
    -- Who seals a box holds its key until his transaction ends: the next statement sees all boxes of these, but with an old snapshot.
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RETURN 0;
    END IF;
    retired := ARRAY(SELECT s.key_id FROM keyvault.sealing_keys s WHERE s.retired_at <= now() FOR UPDATE SKIP LOCKED);
    IF retired = '{}' THEN
        RETURN 0;
    END IF;
    WITH forgotten AS (
        DELETE FROM keyvault.sealing_keys s
         WHERE s.key_id = ANY (retired)
           AND NOT EXISTS (SELECT FROM keyvault.api_keys k WHERE k.fingerprint IS NULL AND substr(k.ciphertext, 2, 4) = s.key_id)
           AND NOT EXISTS (SELECT FROM keyvault.key_replacements r WHERE r.status = 'waiting' AND substr(r.box, 2, 4) = s.key_id)
           AND NOT EXISTS (SELECT FROM keyvault.requests r
                            WHERE r.status IN ('queued', 'sent') AND substr(r.call_key, 1, 1) = 'B' AND substr(r.call_key, 3, 4) = s.key_id)
        RETURNING s.key_id
    ), digests AS (
        DELETE FROM keyvault.sealed_boxes b USING forgotten f WHERE b.key_id = f.key_id)
    SELECT count(*) INTO forgotten FROM forgotten;
    RETURN forgotten;
END $$;
COMMENT ON FUNCTION keyvault._forget_sealing_keys() IS
    'Deletes sealing keys whose boxes are no longer taken and that no stored box needs, with the digests of their boxes; returns how many. None above READ COMMITTED.';

CREATE FUNCTION keyvault._forget_problem() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.problem := NULL;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION keyvault._forget_problem() IS 'Trigger of api_keys: a new value has not the problem of the one before.';
CREATE TRIGGER forget_problem BEFORE UPDATE OF ciphertext ON keyvault.api_keys
    FOR EACH ROW WHEN (OLD.problem IS NOT NULL) EXECUTE FUNCTION keyvault._forget_problem();

CREATE FUNCTION keyvault._wake_worker_now() RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_wake_worker_now';
COMMENT ON FUNCTION keyvault._wake_worker_now() IS 'Has this database''s worker look at its work at once, before the transaction ends.';

CREATE FUNCTION keyvault._describe_sealing_key(key_id bytea) RETURNS jsonb
    LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT jsonb_build_object(
        'format', 'keyvault/seal/v1',
        'key_id', encode(s.key_id, 'base64'),
        'public_key', replace(encode(s.public_key, 'base64'), chr(10), ''),
        'jwk', jsonb_build_object('kty', 'EC', 'crv', 'P-256', 'use', 'enc', 'kid', encode(s.key_id, 'hex'),
            'x', translate(encode(substr(s.public_key, 2, 32), 'base64'), '+/=', '-_'),
            'y', translate(encode(substr(s.public_key, 34, 32), 'base64'), '+/=', '-_')),
        'vault_id', v.vault_id,
        'curve', 'P-256', 'kdf', 'HKDF-SHA256', 'cipher', 'AES-256-GCM',
        'associated_data', replace(encode(convert_to('keyvault/seal/v1', 'UTF8') || int4send(16) || uuid_send(v.vault_id), 'base64'), chr(10), ''),
        'accepted_until', s.retired_at)
      FROM keyvault.sealing_keys s, keyvault.vault v WHERE s.key_id = $1;
END;
COMMENT ON FUNCTION keyvault._describe_sealing_key(bytea) IS 'What sealing_key() returns, for the sealing key with that id.';

CREATE FUNCTION keyvault.sealing_key() RETURNS jsonb
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_sealing_key';
COMMENT ON FUNCTION keyvault.sealing_key() IS
    'The public key to which a client seals API keys, and what else that takes, bytes in base64: public_key (a point on P-256) and the same as jwk, key_id, associated_data (its beginning), vault_id, accepted_until. Format: "Sealed box" in doc/keyvault.md. Makes the key at first use and when it is older than keyvault.sealing_key_lifetime. Errors: KV004, 25006 there is none yet and the transaction is READ ONLY.';

CREATE FUNCTION keyvault.store_sealed_api_key(provider text, sealed bytea, name text = 'default', user_id text = NULL, expires_at timestamptz = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_sealed_api_key';
COMMENT ON FUNCTION keyvault.store_sealed_api_key(text, bytea, text, text, timestamptz) IS
    'Keeps a key that a client sealed to sealing_key() for this user and provider; returns its id. A box is taken once. With keyvault.reveal off the worker opens it, and a key that it is to replace goes on until then: see api_key_status. Errors: KV004, KV005 it does not open, was sealed for another user or provider, or was stored before, KV009 malformed key, 22004, 22023, 40001, 42501 as store_api_key.';
