-- Keys that are kept on a Vault server.

CREATE FUNCTION keyvault.store_api_key_reference(provider text, reference text, name text = 'default', user_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_api_key_reference';
COMMENT ON FUNCTION keyvault.store_api_key_reference(text, text, text, text) IS
    'Keeps where a user''s key is instead of the key, vault:mount/path#field (HashiCorp Vault or OpenBao, key/value engine version 2); the worker fetches it for calls. Returns its id. Access app. Errors: 22004, 22023, 42501, KV004, 40001 as store_api_key.';
