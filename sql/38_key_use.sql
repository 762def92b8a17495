-- When and how often keys are used: noted in shared memory, written in batches.

CREATE FUNCTION keyvault._flush_key_use() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_flush_key_use';
COMMENT ON FUNCTION keyvault._flush_key_use() IS
    'Writes the noted uses of this database''s keys to api_keys (last_used_at, use_count) now; returns for how many keys. Rows that are locked wait for the next flush. The worker does the same by itself.';
