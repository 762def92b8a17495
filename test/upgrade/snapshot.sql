-- What the extension consists of, one fact a line: "object | property | value", in an order that depends on names
-- alone. Two databases with the same lines have the same extension, whichever way they came to it.
-- Run it with psql -AtX in a database that has the extension.
\pset fieldsep ' | '
SET search_path = pg_catalog;

CREATE TEMP TABLE fact (object text NOT NULL, property text NOT NULL, value text);

-- The members, and what hangs on them without being a member: triggers, policies, indexes, constraints, partitions.
CREATE TEMP TABLE member AS
SELECT d.classid, d.objid, i.type, i.type || ' ' || i.identity AS object
  FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'keyvault',
       LATERAL pg_identify_object(d.classid, d.objid, 0) i
 WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e';

-- An access list does not depend on the order in which privileges were given.
CREATE FUNCTION pg_temp.acl(acl aclitem[]) RETURNS text LANGUAGE sql AS $$
    SELECT coalesce(string_agg(format('%s=%s%s/%s', CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END,
                                      a.privilege_type, CASE WHEN a.is_grantable THEN '*' END, a.grantor::regrole),
                               ', ' ORDER BY a.grantee::regrole::text, a.privilege_type), CASE WHEN acl IS NULL THEN 'default' ELSE 'nobody' END)
      FROM aclexplode(acl) a
$$;

INSERT INTO fact
SELECT object, 'member', 'of the extension' FROM member;
INSERT INTO fact
SELECT object, 'comment', obj_description(objid, classid::regclass::text) FROM member;
-- What pg_dump takes as the privileges that CREATE EXTENSION gives: it dumps the difference only.
INSERT INTO fact
SELECT object || coalesce('.' || a.attname, ''), 'initial privileges', pg_temp.acl(p.initprivs)
  FROM member m JOIN pg_init_privs p ON p.objoid = m.objid AND p.classoid = m.classid
  LEFT JOIN pg_attribute a ON p.classoid = 'pg_class'::regclass AND a.attrelid = p.objoid AND a.attnum = p.objsubid AND p.objsubid > 0;

INSERT INTO fact
SELECT 'extension', f.property, f.value
  FROM pg_extension e, LATERAL (VALUES
      ('version', e.extversion), ('schema', e.extnamespace::regnamespace::text), ('relocatable', e.extrelocatable::text),
      ('owner', e.extowner::regrole::text), ('comment', obj_description(e.oid, 'pg_extension'))) f (property, value)
 WHERE e.extname = 'keyvault';
INSERT INTO fact
SELECT 'table ' || c.relation::regclass, 'dumped rows', coalesce(nullif(c.condition, ''), 'all')
  FROM pg_extension e, unnest(e.extconfig, e.extcondition) c (relation, condition) WHERE e.extname = 'keyvault';
INSERT INTO fact
SELECT 'extension', 'requires', string_agg(r.extname, ', ' ORDER BY r.extname COLLATE "C")
  FROM pg_extension e JOIN pg_depend d ON d.objid = e.oid AND d.classid = 'pg_extension'::regclass AND d.refclassid = d.classid
  JOIN pg_extension r ON r.oid = d.refobjid
 WHERE e.extname = 'keyvault';

INSERT INTO fact
SELECT m.object, f.property, f.value
  FROM member m JOIN pg_namespace n ON n.oid = m.objid AND m.classid = 'pg_namespace'::regclass,
       LATERAL (VALUES ('owner', n.nspowner::regrole::text), ('privileges', pg_temp.acl(n.nspacl))) f (property, value);

-- Functions and procedures: the definition has arguments, body, volatility, parallel safety, cost and settings.
INSERT INTO fact
SELECT m.object, f.property, f.value
  FROM member m JOIN pg_proc p ON p.oid = m.objid AND m.classid = 'pg_proc'::regclass,
       LATERAL (VALUES ('definition', CASE WHEN p.prokind <> 'a' THEN pg_get_functiondef(p.oid) END),
                       ('owner', p.proowner::regrole::text), ('privileges', pg_temp.acl(p.proacl)),
                       ('symbol', p.probin || ' ' || p.prosrc)) f (property, value);

-- Relations: members, and their indexes and partitions.
CREATE TEMP TABLE relation AS
SELECT c.*, i.type || ' ' || i.identity AS object FROM pg_class c, LATERAL pg_identify_object('pg_class'::regclass, c.oid, 0) i
 WHERE c.oid IN (SELECT objid FROM member WHERE classid = 'pg_class'::regclass
                 UNION SELECT x.indexrelid FROM pg_index x JOIN member m ON m.objid = x.indrelid AND m.classid = 'pg_class'::regclass);
INSERT INTO fact
SELECT r.object, f.property, f.value
  FROM relation r LEFT JOIN pg_tablespace t ON t.oid = r.reltablespace LEFT JOIN pg_am a ON a.oid = r.relam, LATERAL (VALUES
      ('owner', r.relowner::regrole::text), ('privileges', pg_temp.acl(r.relacl)), ('options', r.reloptions::text),
      ('persistence', r.relpersistence::text), ('replica identity', r.relreplident::text), ('access method', a.amname::text), ('tablespace', t.spcname::text),
      ('row security', r.relrowsecurity || ', forced ' || r.relforcerowsecurity),
      ('type', CASE WHEN r.reloftype <> 0 THEN r.reloftype::regtype::text END),
      ('partition key', CASE WHEN r.relkind = 'p' THEN pg_get_partkeydef(r.oid) END),
      ('partition bound', pg_get_expr(r.relpartbound, r.oid)),
      ('inherits', (SELECT string_agg(h.inhparent::regclass::text, ', ' ORDER BY h.inhseqno) FROM pg_inherits h WHERE h.inhrelid = r.oid)),
      ('query', CASE WHEN r.relkind IN ('v', 'm') THEN pg_get_viewdef(r.oid) END),
      ('definition', CASE WHEN r.relkind IN ('i', 'I') THEN pg_get_indexdef(r.oid) END)) f (property, value);
INSERT INTO fact
SELECT r.object, 'index', format('valid %s, ready %s, unique %s, primary %s, replica identity %s, clustered %s', x.indisvalid, x.indisready, x.indisunique,
                                 x.indisprimary, x.indisreplident, x.indisclustered)
  FROM relation r JOIN pg_index x ON x.indexrelid = r.oid;
-- The place of a column counts: SELECT * and INSERT without a list see it. Its number counts where C reads by it:
-- there, not even a dropped column may stand before it. pg_attver is PostgreSQL's own mark of a column's making.
INSERT INTO fact
SELECT r.object || '.' || a.attname, f.property, f.value
  FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum, LATERAL (VALUES
      ('place', (SELECT count(*) FROM pg_attribute b WHERE b.attrelid = a.attrelid AND b.attnum BETWEEN 1 AND a.attnum AND NOT b.attisdropped)::text),
      ('number', CASE WHEN r.relname IN ('api_keys', 'credit_balances', 'data_keys', 'usage_rollup', 'users', 'vault') THEN a.attnum::text END), ('type', format_type(a.atttypid, a.atttypmod)), ('collation', nullif(a.attcollation, 0)::regcollation::text),
      ('not null', a.attnotnull::text), ('default', pg_get_expr(d.adbin, d.adrelid)), ('generated', nullif(a.attgenerated, '')::text),
      ('identity', nullif(a.attidentity, '')::text), ('storage', a.attstorage::text), ('compression', nullif(a.attcompression, '')::text),
      ('privileges', CASE WHEN a.attacl IS NOT NULL THEN pg_temp.acl(a.attacl) END), ('options', (SELECT string_agg(o, ', ' ORDER BY o) FROM unnest(a.attoptions) o WHERE o !~ '^pg_attver=')),
      ('inherited', format('local %s, from %s', a.attislocal, a.attinhcount)),
      ('comment', col_description(a.attrelid, a.attnum))) f (property, value)
 WHERE r.relkind NOT IN ('i', 'I');
INSERT INTO fact
SELECT format('constraint %s on %s', c.conname, coalesce(nullif(c.conrelid, 0)::regclass::text, c.contypid::regtype::text)), f.property, f.value
  FROM pg_constraint c, LATERAL (VALUES
      ('definition', pg_get_constraintdef(c.oid)), ('valid', c.convalidated::text), ('inherited', format('local %s, from %s, not inheritable %s', c.conislocal, c.coninhcount, c.connoinherit)),
      ('comment', obj_description(c.oid, 'pg_constraint'))) f (property, value)
 WHERE c.conrelid IN (SELECT oid FROM relation) OR c.contypid IN (SELECT objid FROM member WHERE classid = 'pg_type'::regclass);
INSERT INTO fact
SELECT format('trigger %s on %s', t.tgname, t.tgrelid::regclass), f.property, f.value
  FROM pg_trigger t, LATERAL (VALUES
      ('definition', pg_get_triggerdef(t.oid)), ('enabled', t.tgenabled::text), ('of a parent', (t.tgparentid <> 0)::text),
      ('comment', obj_description(t.oid, 'pg_trigger'))) f (property, value)
 WHERE NOT t.tgisinternal AND t.tgrelid IN (SELECT oid FROM relation);
INSERT INTO fact
SELECT format('policy %s on %s', p.polname, p.polrelid::regclass), f.property, f.value
  FROM pg_policy p, LATERAL (VALUES
      ('command', p.polcmd::text), ('permissive', p.polpermissive::text), ('using', pg_get_expr(p.polqual, p.polrelid)), ('check', pg_get_expr(p.polwithcheck, p.polrelid)),
      ('roles', (SELECT string_agg(CASE o WHEN 0 THEN 'PUBLIC' ELSE o::regrole::text END, ', ' ORDER BY o::regrole::text) FROM unnest(p.polroles) o)),
      ('comment', obj_description(p.oid, 'pg_policy'))) f (property, value)
 WHERE p.polrelid IN (SELECT oid FROM relation);
INSERT INTO fact
SELECT format('rule %s on %s', w.rulename, w.ev_class::regclass), 'definition', pg_get_ruledef(w.oid)
  FROM pg_rewrite w WHERE w.rulename <> '_RETURN' AND w.ev_class IN (SELECT oid FROM relation);
INSERT INTO fact
SELECT format('statistics %s on %s', s.stxname, s.stxrelid::regclass), 'definition', pg_get_statisticsobjdef(s.oid)
  FROM pg_statistic_ext s WHERE s.stxrelid IN (SELECT oid FROM relation);
INSERT INTO fact
SELECT r.object, 'sequence', format('%s from %s by %s in %s to %s, cache %s, cycle %s', s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle)
  FROM relation r JOIN pg_sequence s ON s.seqrelid = r.oid;

INSERT INTO fact
SELECT m.object, f.property, f.value
  FROM member m JOIN pg_type t ON t.oid = m.objid AND m.classid = 'pg_type'::regclass, LATERAL (VALUES
      ('kind', t.typtype::text), ('base', nullif(t.typbasetype, 0)::regtype::text), ('not null', t.typnotnull::text), ('default', t.typdefault),
      ('owner', t.typowner::regrole::text), ('privileges', pg_temp.acl(t.typacl)),
      ('labels', (SELECT string_agg(l.enumlabel, ', ' ORDER BY l.enumsortorder) FROM pg_enum l WHERE l.enumtypid = t.oid)),
      ('columns', (SELECT string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod), ', ' ORDER BY a.attnum)
                     FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
                    WHERE t.typtype = 'c' AND c.relkind = 'c' AND c.oid = t.typrelid AND NOT a.attisdropped))) f (property, value);

-- The shipped rows; of what each installation makes for itself, how many there are.
DO $$
DECLARE
    relation record;
BEGIN
    FOR relation IN SELECT r.oid::regclass AS name, EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = r.oid AND a.attname = 'seeded') AS shipped,
                           (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY k.place)
                              FROM pg_index x, unnest(x.indkey::int2[]) WITH ORDINALITY k (attnum, place)
                              JOIN pg_attribute a ON a.attnum = k.attnum
                             WHERE x.indrelid = r.oid AND a.attrelid = r.oid AND x.indisprimary) AS key
                      FROM relation r WHERE r.relkind = 'r' LOOP
        IF relation.shipped THEN
            EXECUTE format('INSERT INTO fact SELECT %L || concat_ws('', '', %s), ''shipped'', to_jsonb(t)::text FROM %s t',
                           'row of ' || relation.name || ' ', relation.key, relation.name);
        ELSE
            EXECUTE format('INSERT INTO fact SELECT %L, ''rows'', count(*) FROM %s', 'table ' || relation.name, relation.name);
        END IF;
    END LOOP;
END $$;

-- A kind of member that nothing above describes would differ unseen.
INSERT INTO fact
SELECT object, 'not described', 'teach test/upgrade/snapshot.sql this kind of object'
  FROM member WHERE classid NOT IN ('pg_class'::regclass, 'pg_proc'::regclass, 'pg_namespace'::regclass, 'pg_type'::regclass)
    OR (classid = 'pg_proc'::regclass AND objid IN (SELECT oid FROM pg_proc WHERE prokind = 'a'))
    OR (classid = 'pg_type'::regclass AND objid IN (SELECT oid FROM pg_type WHERE typtype NOT IN ('c', 'd', 'e') AND typelem = 0));

-- A value of several lines stays on one.
SELECT object, property, replace(value, E'\n', '⏎') FROM fact WHERE value IS NOT NULL
 ORDER BY object COLLATE "C", property COLLATE "C", value COLLATE "C";
