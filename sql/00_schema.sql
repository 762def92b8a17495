-- keyvault: make concatenates the parts in sql/; edit those, not the result.
\echo Use "CREATE EXTENSION keyvault CASCADE" to load this file. \quit

-- The schema of pgcrypto, which comes with every statement of this script else, may belong to somebody who put operators
-- into it that would be taken for pg_catalog's. It ends with the script.
SET LOCAL search_path = pg_catalog, pg_temp;

-- Made here and not by the control file, so that DROP EXTENSION takes it along, and a schema
-- that somebody else prepared, with operators or functions of his own, is never trusted.
CREATE SCHEMA keyvault;
COMMENT ON SCHEMA keyvault IS 'Vault, meter and gateway for the AI-provider keys of an application''s users.';

CREATE FUNCTION keyvault.uuidv7() RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_uuidv7';
COMMENT ON FUNCTION keyvault.uuidv7() IS
    'A new UUID version 7 (RFC 9562): Unix milliseconds, then a sub-millisecond fraction, then random bits; increasing within a session.';

-- A configuration row shipped with the extension is "seeded". Its first change by an
-- administrator clears the mark, so that pg_dump carries it; and a row that a restore
-- inserts replaces the seed of the same key.
CREATE FUNCTION keyvault._keep_customized() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    key_columns text[] := TG_ARGV[0];
    condition text;
BEGIN
    IF TG_OP = 'UPDATE' THEN
        NEW.seeded := false;
        RETURN NEW;
    END IF;
    SELECT string_agg(format('%1$I = ($1).%1$I', k), ' AND ') INTO condition FROM unnest(key_columns) k;
    EXECUTE format('DELETE FROM %s WHERE seeded AND %s', TG_RELID::regclass, condition) USING NEW;
    NEW.seeded := false;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION keyvault._keep_customized() IS
    'Trigger of configuration tables: marks changed rows as the administrator''s own, and lets an inserted row replace the shipped one of the same key.';
