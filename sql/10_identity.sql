-- Who is asking. The identity is the setting keyvault.user_id, which only
-- these functions, or a role with SET privilege on it, can change.

CREATE FUNCTION keyvault.current_user_id() RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_current_user_id';
COMMENT ON FUNCTION keyvault.current_user_id() IS
    'The user_id this transaction acts as, or NULL when there is none.';

CREATE FUNCTION keyvault.act_as(user_id text) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_act_as';
COMMENT ON FUNCTION keyvault.act_as(text) IS
    'Trusted application: acts as user_id until the transaction or savepoint that called it ends, and returns it; NULL acts as nobody. Errors: 42501 without SET privilege on keyvault.user_id, 22023 for an empty or overlong user_id (255 bytes).';

CREATE FUNCTION keyvault._may_act_for_any_user() RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN pg_catalog.has_parameter_privilege('keyvault.user_id', 'SET');
COMMENT ON FUNCTION keyvault._may_act_for_any_user() IS
    'True when the current role may act for any user: it holds SET privilege on the parameter keyvault.user_id.';

-- EXECUTE on a marker function is the access itself, so that grants stay the one source
-- of truth and pg_dump carries them.
CREATE FUNCTION keyvault._app() RETURNS void LANGUAGE sql IMMUTABLE PARALLEL SAFE BEGIN ATOMIC END;
COMMENT ON FUNCTION keyvault._app() IS 'Does nothing; EXECUTE on it is access app.';
CREATE FUNCTION keyvault._user() RETURNS void LANGUAGE sql IMMUTABLE PARALLEL SAFE BEGIN ATOMIC END;
COMMENT ON FUNCTION keyvault._user() IS 'Does nothing; EXECUTE on it is access user.';
CREATE FUNCTION keyvault._analyst() RETURNS void LANGUAGE sql IMMUTABLE PARALLEL SAFE BEGIN ATOMIC END;
COMMENT ON FUNCTION keyvault._analyst() IS 'Does nothing; EXECUTE on it is access analyst: it reads every user''s usage.';
CREATE FUNCTION keyvault._admin() RETURNS void LANGUAGE sql IMMUTABLE PARALLEL SAFE BEGIN ATOMIC END;
COMMENT ON FUNCTION keyvault._admin() IS 'Does nothing; EXECUTE on it is access admin: it reads every user''s account and the metadata of keys.';

CREATE FUNCTION keyvault._may_administer() RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN pg_catalog.has_function_privilege('keyvault._admin()', 'EXECUTE');
COMMENT ON FUNCTION keyvault._may_administer() IS 'True when the current role has access admin.';

CREATE FUNCTION keyvault._may_read_all_usage() RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN pg_catalog.has_function_privilege('keyvault._analyst()', 'EXECUTE') OR keyvault._may_administer();
COMMENT ON FUNCTION keyvault._may_read_all_usage() IS 'True when the current role has access analyst or admin.';
