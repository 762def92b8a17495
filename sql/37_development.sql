-- Development mode: keys of a .env file.

CREATE FUNCTION keyvault._env_file_has_key(provider text) RETURNS boolean
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_env_file_has_key';
COMMENT ON FUNCTION keyvault._env_file_has_key(text) IS
    'In development mode: has the .env file a key for the provider? NULL in production. Error: 55000 keyvault.env_file is not set.';
