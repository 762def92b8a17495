-- keyvault: make concatenates the parts in sql/; edit those, not the result.
\echo Use "CREATE EXTENSION keyvault CASCADE" to load this file. \quit

-- A schema prepared by somebody else could hold operators or functions that the
-- extension would then trust: only an empty one that belongs to the installer is taken.
DO $$
BEGIN
    IF (SELECT n.nspowner OPERATOR(pg_catalog.<>) r.oid
          FROM pg_catalog.pg_namespace n, pg_catalog.pg_roles r
         WHERE n.nspname OPERATOR(pg_catalog.=) 'keyvault'
           AND r.rolname OPERATOR(pg_catalog.=) current_user)
       OR EXISTS (SELECT FROM pg_catalog.pg_depend d, pg_catalog.pg_namespace n
                   WHERE n.nspname OPERATOR(pg_catalog.=) 'keyvault'
                     AND d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass
                     AND d.refobjid OPERATOR(pg_catalog.=) n.oid
                     AND d.classid OPERATOR(pg_catalog.<>) 'pg_catalog.pg_extension'::pg_catalog.regclass
                     AND d.deptype OPERATOR(pg_catalog.=) 'n')
    THEN
        RAISE EXCEPTION 'schema "keyvault" already exists and is not empty, or belongs to another role'
            USING ERRCODE = 'duplicate_schema',
                  HINT = 'Drop or rename it: CREATE EXTENSION makes its own.';
    END IF;
END $$;

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
