-- keyvault 0.1.0 to 0.2.0. Nothing is granted or revoked but on what is new: the privileges that an object has when a script
-- of its extension changes them are no longer dumped, roles' own among them.
\echo Use "ALTER EXTENSION keyvault UPDATE TO '0.2.0'" to load this file. \quit

CREATE FUNCTION keyvault.refresh_access() RETURNS TABLE (role regrole, access text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    FOR role, access IN SELECT DISTINCT a.grantee, substr(p.proname, 2) FROM pg_proc p, aclexplode(p.proacl) a
                         WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname IN ('_app', '_user', '_analyst', '_admin')
                           AND a.grantee NOT IN (0, p.proowner)
                         ORDER BY 1, 2 LOOP
        PERFORM keyvault.grant_access(role, access);
        RETURN NEXT;
    END LOOP;
END $$;
REVOKE ALL ON FUNCTION keyvault.refresh_access() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.refresh_access() IS
    'Gives every role the accesses that it has once more, and returns them: after ALTER EXTENSION keyvault UPDATE, which grants nothing, so that they cover what the update brought. A superuser calls it. Error: 42501.';

ALTER TABLE keyvault.providers RENAME COLUMN env_variable TO env_var;
ALTER TABLE keyvault.providers RENAME CONSTRAINT providers_env_variable_check TO providers_env_var_check;
