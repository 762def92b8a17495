-- Many keys at once: taken in, exported for recovery, restored.

CREATE FUNCTION keyvault.store_api_keys(keys jsonb, user_id text = NULL, expires_at timestamptz = NULL) RETURNS TABLE (provider text, id uuid)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_api_keys';
COMMENT ON FUNCTION keyvault.store_api_keys(jsonb, text, timestamptz) IS
    'Encrypts and keeps a user''s keys {"provider": "key", ...} under the name ''default'', all or none; returns their ids. Pass the keys as a bind parameter. Errors: as store_api_key, KV009 naming the provider; 22023 keys is not such an object.';

CREATE FUNCTION keyvault.export_recovery_bundle(public_key text, user_ids text[] = NULL) RETURNS bytea
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_export_recovery_bundle';
COMMENT ON FUNCTION keyvault.export_recovery_bundle(text, text[]) IS
    'The keys of these users, or of all and the platform, as an OpenPGP message (RFC 4880) to an armored public key (RSA or ElGamal): JSON lines {"user_id", "provider", "name", "key", "expires_at"}. A key that cannot be opened is left out with a warning, KV004 or KV005. No access includes it: a superuser, or who was granted EXECUTE. Errors: KV004 and KV005 no key opens, 22023 unknown users, 42501 keyvault.reveal is off, 39000 pgcrypto cannot use the key.';

CREATE FUNCTION keyvault.restore_api_keys(lines text) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_restore_api_keys';
COMMENT ON FUNCTION keyvault.restore_api_keys(text) IS
    'Stores the keys of a decrypted recovery bundle in this vault, replacing those of the same names; returns how many. One that store_api_key would not take, or whose user''s data key cannot be opened, is left out with a warning that names line and, as far as they are known here, user and provider. No access includes it. Errors, after which nothing is stored: 22023 a line is none of a bundle''s, KV004 no master key at all, 40001, 42501.';
