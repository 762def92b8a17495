-- Usage added up per day, exactly: a view of usage is what was added up and the rows that were not.
--
-- debit_tag orders rows by the transaction that wrote them. The roll-up counts the rows of transactions that
-- have all ended, rolled_to says up to where, and the views count the rest by themselves: a row that commits
-- late, or has an old created_at, is in neither place twice and never in none. Rows that bring another
-- database's tag, by a restore or a subscription, are counted by their row trigger, into usage_late.

CREATE TABLE keyvault.usage_rollup (
    here      boolean PRIMARY KEY DEFAULT true CHECK (here),
    tag_base  bigint NOT NULL,
    rolled_to bigint NOT NULL,
    tag_span  bigint NOT NULL DEFAULT 65536,
    rolled_at timestamptz
);
COMMENT ON TABLE keyvault.usage_rollup IS 'One row: how far usage_records are added up in usage_daily.';
COMMENT ON COLUMN keyvault.usage_rollup.here IS 'True, so that there is one row.';
COMMENT ON COLUMN keyvault.usage_rollup.tag_base IS
    'The first debit_tag of this installation: a random number of 15 bits above the 48 of a transaction id. Not dumped, so that a restored row is told from one that was written here.';
COMMENT ON COLUMN keyvault.usage_rollup.rolled_to IS 'Rows with a debit_tag of this installation below it are in usage_daily; those from it on are not.';
COMMENT ON COLUMN keyvault.usage_rollup.tag_span IS 'How many transactions the next batch takes, so that it has some ten thousand rows.';
COMMENT ON COLUMN keyvault.usage_rollup.rolled_at IS 'When rolled_to last moved.';

CREATE FUNCTION keyvault._begin_rollup() RETURNS keyvault.usage_rollup
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    state keyvault.usage_rollup;
BEGIN
    -- Who writes records has ended, or has not begun: no record of the tags of before comes after this.
    LOCK TABLE keyvault.usage_records IN SHARE ROW EXCLUSIVE MODE;
    -- There is no row. Processes that know the one of before hear of an ALTER TABLE and read it again; of a TRUNCATE
    -- they would, too, but a subscriber carries that out, and loses its own row.
    LOCK TABLE keyvault.usage_rollup IN ACCESS EXCLUSIVE MODE;
    ALTER TABLE keyvault.usage_rollup RESET (fillfactor);
    INSERT INTO keyvault.usage_rollup (tag_base, rolled_to)
    -- Transactions that have begun already may write records too.
    SELECT b.base, b.base + pg_snapshot_xmin(pg_current_snapshot())::text::bigint
      FROM (SELECT (1 + floor(random() * 32766))::bigint << 48) b(base)
    RETURNING * INTO state;
    RETURN state;
END $$;
COMMENT ON FUNCTION keyvault._begin_rollup() IS
    'Makes the row of usage_rollup, with a new tag_base, and returns it: when the extension is made, and for rebuild_usage_daily, which adds up what has other tags.';
SELECT keyvault._begin_rollup();

CREATE TABLE keyvault.usage_daily (
    user_id         text COLLATE "C" NOT NULL,
    day             date NOT NULL,
    provider        text COLLATE "C" NOT NULL,
    model           text COLLATE "C" NOT NULL,
    type            text COLLATE "C" NOT NULL,
    payer           text COLLATE "C" NOT NULL,
    calls           bigint NOT NULL,
    input_tokens    bigint,
    cached_tokens   bigint,
    output_tokens   bigint,
    tokens          bigint NOT NULL,
    credits         numeric NOT NULL,
    credits_overrun numeric NOT NULL,
    cost_usd        numeric NOT NULL,
    PRIMARY KEY (user_id, day, provider, model, type, payer)
) WITH (fillfactor = 80);
COMMENT ON TABLE keyvault.usage_daily IS
    'Usage added up per user, UTC day, provider, model, type and payer, as far as usage_rollup says. Derived from usage_records: a dump leaves it out, and the restored rows are added up anew. Read the views.';
COMMENT ON COLUMN keyvault.usage_daily.provider IS 'The first 255 characters of the records'' provider, empty where they name none; model likewise. Records cannot have more, but those of version 0.1.0.';
COMMENT ON COLUMN keyvault.usage_daily.calls IS 'Number of usage records.';
CREATE INDEX usage_daily_month ON keyvault.usage_daily ((date_trunc('month', day::timestamp)::date));
CREATE INDEX usage_daily_day ON keyvault.usage_daily (day);

CREATE TABLE keyvault.usage_late (LIKE keyvault.usage_daily, id uuid NOT NULL DEFAULT keyvault.uuidv7(), PRIMARY KEY (user_id, id));
COMMENT ON TABLE keyvault.usage_late IS
    'What usage_daily is still to be changed by: records that a restore or a subscription brought, added up by the statement that brought them. The roll-up takes the rows away.';

CREATE TABLE keyvault.usage_retired (LIKE keyvault.usage_late INCLUDING DEFAULTS, PRIMARY KEY (user_id, id));
CREATE INDEX usage_retired_month ON keyvault.usage_retired ((date_trunc('month', day::timestamp)::date));
COMMENT ON TABLE keyvault.usage_retired IS
    'Usage of records that are no longer in usage_records, because their month was retired; like usage_daily, and dumped.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.usage_retired', '');

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY '{usage_daily, usage_late, usage_retired}'::text[] LOOP
        EXECUTE format('ALTER TABLE keyvault.%I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('CREATE POLICY own_rows ON keyvault.%I FOR SELECT USING (user_id = (SELECT keyvault.current_user_id()))', name);
        EXECUTE format('CREATE POLICY read_by_access ON keyvault.%I FOR SELECT USING ((SELECT keyvault._may_read_all_usage()))', name);
    END LOOP;
END $$;

-- A subscription to all tables brings its publisher's roll-up as well; a subscriber keeps one of its own.
CREATE FUNCTION keyvault._keep_own_rollup() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_keep_own_rollup';
COMMENT ON FUNCTION keyvault._keep_own_rollup() IS
    'Trigger of usage_daily, usage_late and usage_rollup: passes over what a subscription brings, as it is derived from the publisher''s rows; of usage_records: over deletions, which a publisher''s maintenance makes.';
CREATE TRIGGER keep_own BEFORE INSERT OR UPDATE OR DELETE ON keyvault.usage_rollup
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_own_rollup();
ALTER TABLE keyvault.usage_rollup ENABLE REPLICA TRIGGER keep_own;
CREATE TRIGGER keep_own BEFORE INSERT OR UPDATE OR DELETE ON keyvault.usage_daily
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_own_rollup();
ALTER TABLE keyvault.usage_daily ENABLE REPLICA TRIGGER keep_own;
CREATE TRIGGER keep_own BEFORE INSERT OR UPDATE OR DELETE ON keyvault.usage_late
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_own_rollup();
ALTER TABLE keyvault.usage_late ENABLE REPLICA TRIGGER keep_own;
-- A publisher deletes records where it moves them to their month's partition, or retires them: its subscriber does so itself.
CREATE TRIGGER keep_own BEFORE DELETE ON keyvault.usage_records
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_own_rollup();
ALTER TABLE keyvault.usage_records ENABLE REPLICA TRIGGER keep_own;

CREATE FUNCTION keyvault._fresh_from() RETURNS bigint
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_fresh_from';
COMMENT ON FUNCTION keyvault._fresh_from() IS 'usage_rollup.rolled_to as the query under way sees it: the planner can ask for it.';
CREATE FUNCTION keyvault._fresh_until() RETURNS bigint
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_fresh_until';
COMMENT ON FUNCTION keyvault._fresh_until() IS 'The end of this installation''s debit_tags: the planner can ask for it.';

CREATE VIEW keyvault._usage WITH (security_invoker = true) AS
SELECT user_id, day, provider, model, type, payer,
       calls, input_tokens, cached_tokens, output_tokens, tokens, credits, credits_overrun, cost_usd
  FROM keyvault.usage_daily
UNION ALL
SELECT user_id, day, provider, model, type, payer,
       calls, input_tokens, cached_tokens, output_tokens, tokens, credits, credits_overrun, cost_usd
  FROM keyvault.usage_late
UNION ALL
SELECT user_id, day, provider, model, type, payer,
       calls, input_tokens, cached_tokens, output_tokens, tokens, credits, credits_overrun, cost_usd
  FROM keyvault.usage_retired
UNION ALL
SELECT user_id, (created_at AT TIME ZONE 'UTC')::date, left(coalesce(provider, ''), 255) COLLATE "C", left(coalesce(model, ''), 255) COLLATE "C",
       type COLLATE "C", payer COLLATE "C",
       1::bigint, input_tokens, cached_tokens, output_tokens, tokens, credits::numeric, credits_overrun::numeric, cost_usd::numeric
  FROM keyvault.usage_records
 WHERE debit_tag >= keyvault._fresh_from() AND debit_tag < keyvault._fresh_until();
COMMENT ON VIEW keyvault._usage IS
    'All usage: what is added up already, and the records that are not. Several rows may have the same user, day, provider, model, type and payer; an empty provider or model is none.';

CREATE FUNCTION keyvault._count_restored(
    user_ids text[], created_ats timestamptz[], providers text[], models text[], types text[], payers text[],
    input_tokens bigint[], cached_tokens bigint[], output_tokens bigint[], tokens bigint[],
    credits numeric[], overruns numeric[], costs numeric[], tags bigint[]) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    state keyvault.usage_rollup;
BEGIN
    SELECT * INTO STRICT state FROM keyvault.usage_rollup;
    -- Rows that were written here once: the views and the roll-up count those from rolled_to on, which must not
    -- move before this transaction ends.
    IF EXISTS (SELECT FROM unnest(tags) t WHERE t >= state.tag_base AND t < state.tag_base + (1::bigint << 48)) THEN
        SELECT * INTO STRICT state FROM keyvault.usage_rollup FOR SHARE;
    END IF;
    INSERT INTO keyvault.usage_late (user_id, day, provider, model, type, payer, calls, input_tokens, cached_tokens,
                                     output_tokens, tokens, credits, credits_overrun, cost_usd)
    SELECT r.user_id, (r.created_at AT TIME ZONE 'UTC')::date, left(coalesce(r.provider, ''), 255), left(coalesce(r.model, ''), 255), r.type, r.payer,
           count(*), sum(r.input), sum(r.cached), sum(r.output), sum(r.total), sum(r.credit), sum(r.overrun), sum(r.cost)
      FROM unnest($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
           r(user_id, created_at, provider, model, type, payer, input, cached, output, total, credit, overrun, cost, tag)
     WHERE NOT (r.tag >= state.rolled_to AND r.tag < state.tag_base + (1::bigint << 48))
     GROUP BY 1, 2, 3, 4, 5, 6;
END $$;
COMMENT ON FUNCTION keyvault._count_restored(text[], timestamptz[], text[], text[], text[], text[], bigint[], bigint[], bigint[], bigint[], numeric[], numeric[], numeric[], bigint[]) IS
    'Counts records that bring another transaction''s debit_tag into usage_late, but for those that the views find by their tag; the row trigger of usage_records calls it with an array per column.';

CREATE FUNCTION keyvault._roll_up_usage(batch integer = 20000, OUT rolled bigint, OUT more boolean)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    state keyvault.usage_rollup;
    horizon bigint;
    target bigint;
    folded bigint;
    retired daterange;
BEGIN
    rolled := 0;
    more := false;
    SELECT * INTO state FROM keyvault.usage_rollup FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- Transactions below the horizon have ended, and the statement that follows sees what they wrote.
    horizon := state.tag_base + pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
    target := greatest(least(horizon, state.rolled_to + state.tag_span), state.rolled_to);
    WITH late AS (
        DELETE FROM keyvault.usage_late l
         WHERE l.ctid = ANY (ARRAY(SELECT o.ctid FROM keyvault.usage_late o LIMIT batch FOR UPDATE SKIP LOCKED))
        RETURNING l.*
    ), fresh AS MATERIALIZED (
        SELECT r.user_id, (r.created_at AT TIME ZONE 'UTC')::date AS day, left(coalesce(r.provider, ''), 255) COLLATE "C" AS provider,
               left(coalesce(r.model, ''), 255) COLLATE "C" AS model, r.type COLLATE "C" AS type, r.payer COLLATE "C" AS payer,
               count(*) AS calls, sum(r.input_tokens) AS input_tokens, sum(r.cached_tokens) AS cached_tokens,
               sum(r.output_tokens) AS output_tokens, sum(r.tokens) AS tokens,
               sum(r.credits) AS credits, sum(r.credits_overrun) AS credits_overrun, sum(r.cost_usd) AS cost_usd
          FROM keyvault.usage_records r
         WHERE r.debit_tag >= state.rolled_to AND r.debit_tag < target
         GROUP BY 1, 2, 3, 4, 5, 6
    ), added AS (
        SELECT a.user_id, a.day, a.provider, a.model, a.type, a.payer, sum(a.calls) AS calls, sum(a.input_tokens) AS input_tokens,
               sum(a.cached_tokens) AS cached_tokens, sum(a.output_tokens) AS output_tokens, sum(a.tokens) AS tokens,
               sum(a.credits) AS credits, sum(a.credits_overrun) AS credits_overrun, sum(a.cost_usd) AS cost_usd
          FROM (SELECT f.* FROM fresh f
                UNION ALL
                SELECT l.user_id, l.day, l.provider, l.model, l.type, l.payer, l.calls, l.input_tokens, l.cached_tokens,
                       l.output_tokens, l.tokens, l.credits, l.credits_overrun, l.cost_usd FROM late l) a
         GROUP BY 1, 2, 3, 4, 5, 6
    ), stored AS (
        INSERT INTO keyvault.usage_daily AS d SELECT * FROM added
        ON CONFLICT (user_id, day, provider, model, type, payer) DO UPDATE
           SET calls = d.calls + excluded.calls,
               input_tokens = coalesce(d.input_tokens + excluded.input_tokens, d.input_tokens, excluded.input_tokens),
               cached_tokens = coalesce(d.cached_tokens + excluded.cached_tokens, d.cached_tokens, excluded.cached_tokens),
               output_tokens = coalesce(d.output_tokens + excluded.output_tokens, d.output_tokens, excluded.output_tokens),
               tokens = d.tokens + excluded.tokens,
               credits = d.credits + excluded.credits,
               credits_overrun = d.credits_overrun + excluded.credits_overrun,
               cost_usd = d.cost_usd + excluded.cost_usd)
    SELECT coalesce((SELECT sum(f.calls) FROM fresh f), 0), count(*), daterange(min(l.day) FILTER (WHERE l.calls < 0), max(l.day), '[]')
      INTO rolled, folded, retired FROM late l;
    IF lower(retired) IS NOT NULL THEN
        DELETE FROM keyvault.usage_daily d WHERE d.day >= lower(retired) AND d.day < upper(retired) AND d.calls = 0;
    END IF;
    UPDATE keyvault.usage_rollup
       SET rolled_to = target, rolled_at = now(),
           tag_span = CASE WHEN rolled > 2 * batch THEN greatest(state.tag_span / 2, 1)
                           WHEN rolled < batch / 2 AND target < horizon THEN least(state.tag_span * 2, 1::bigint << 40)
                           ELSE state.tag_span END
     WHERE state.rolled_to <> target OR folded > 0;
    more := target < horizon OR folded >= batch;
    rolled := rolled + folded;
END $$;
COMMENT ON FUNCTION keyvault._roll_up_usage(integer) IS
    'Adds about batch usage records whose transactions have ended to usage_daily; returns how many, and whether there are more. Does nothing while another session does it.';

CREATE FUNCTION keyvault.rebuild_usage_daily() RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    state keyvault.usage_rollup;
    stored bigint;
BEGIN
    SELECT * INTO state FROM keyvault.usage_rollup FOR UPDATE;
    IF NOT FOUND THEN
        state := keyvault._begin_rollup();
    END IF;
    -- Rows that a restore counts while this adds up would be counted twice.
    LOCK TABLE keyvault.usage_late IN SHARE ROW EXCLUSIVE MODE;
    DELETE FROM keyvault.usage_late;
    DELETE FROM keyvault.usage_daily;
    INSERT INTO keyvault.usage_daily
    SELECT r.user_id, (r.created_at AT TIME ZONE 'UTC')::date, left(coalesce(r.provider, ''), 255), left(coalesce(r.model, ''), 255), r.type, r.payer,
           count(*), sum(r.input_tokens), sum(r.cached_tokens), sum(r.output_tokens), sum(r.tokens),
           sum(r.credits), sum(r.credits_overrun), sum(r.cost_usd)
      FROM keyvault.usage_records r
     WHERE NOT (r.debit_tag >= state.rolled_to AND r.debit_tag < state.tag_base + (1::bigint << 48))
     GROUP BY 1, 2, 3, 4, 5, 6;
    GET DIAGNOSTICS stored = ROW_COUNT;
    RETURN stored;
END $$;
COMMENT ON FUNCTION keyvault.rebuild_usage_daily() IS
    'Adds usage up from usage_records anew and returns the number of rows in usage_daily: after records came or went behind the triggers'' back, as by pg_restore --disable-triggers or ATTACH PARTITION of a table with rows, or when usage_rollup has lost its row, which is made again. A superuser calls it, in READ COMMITTED. Error: 42501.';
