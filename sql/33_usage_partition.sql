-- Months of usage: partitions made ahead, rows of the default partition given theirs, old months retired.
-- Inserts would have to wait behind whoever waits for a lock that excludes them: so these functions wait for
-- 100 ms at most, and are called again later. DETACH ... CONCURRENTLY is no way: PostgreSQL refuses it for a table
-- that has a default partition.

CREATE FUNCTION keyvault._usage_partition_name(month timestamptz) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 'usage_records_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM');
COMMENT ON FUNCTION keyvault._usage_partition_name(timestamptz) IS 'The name of the partition for the month that contains an instant, in UTC.';

CREATE FUNCTION keyvault._make_usage_partition(month timestamptz) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms'
    -- The bounds go through text, which must not be read with another date order or an abbreviation's other time zone.
    SET datestyle = 'ISO'
    SET timezone = 'UTC'
AS $$
DECLARE
    partition text := keyvault._usage_partition_name(month);
    until timestamptz := keyvault._period_bound(month, 1);
BEGIN
    -- The roll-up must not read usage_records with a plan from before the move and a snapshot from after it.
    PERFORM FROM keyvault.usage_rollup FOR NO KEY UPDATE;
    -- First of all, and not a weaker lock that is raised later, which would be a deadlock with whoever reads and then
    -- inserts. An insert that waits at the default partition already would fail once the month has moved, and a reader
    -- would go by a plan without the new partition: so they wait here.
    LOCK TABLE ONLY keyvault.usage_records IN ACCESS EXCLUSIVE MODE;
    EXECUTE format('CREATE TABLE keyvault.%I (LIKE keyvault.usage_records INCLUDING DEFAULTS, '
                || 'CONSTRAINT this_month CHECK (created_at >= %L AND created_at < %L))', partition, month, until);
    EXECUTE format('REVOKE ALL ON keyvault.%I FROM PUBLIC', partition);
    EXECUTE format('ALTER TABLE keyvault.%I ENABLE ROW LEVEL SECURITY', partition);
    EXECUTE format('COMMENT ON TABLE keyvault.%I IS %L', partition,
                   'Usage of the month that begins at ' || to_char(month AT TIME ZONE 'UTC', 'YYYY-MM-DD') || ' UTC.');
    IF EXISTS (SELECT FROM keyvault.usage_records_default WHERE created_at >= month AND created_at < until) THEN
        -- Rows keep their debit_tag, and no trigger sees them: nothing is debited or counted again.
        ALTER TABLE keyvault.usage_records_default DISABLE TRIGGER refuse_change;
        EXECUTE format('WITH moved AS (DELETE FROM keyvault.usage_records_default WHERE created_at >= %L AND created_at < %L RETURNING *) '
                    || 'INSERT INTO keyvault.%I SELECT * FROM moved', month, until, partition);
        ALTER TABLE keyvault.usage_records_default ENABLE ALWAYS TRIGGER refuse_change;
    END IF;
    -- An insert under way may have chosen the default partition already, and would be refused there: none is, from here on.
    LOCK TABLE ONLY keyvault.usage_records IN SHARE ROW EXCLUSIVE MODE;
    EXECUTE format('ALTER TABLE keyvault.usage_records ATTACH PARTITION keyvault.%I FOR VALUES FROM (%L) TO (%L)', partition, month, until);
    EXECUTE format('ALTER TABLE keyvault.%I DROP CONSTRAINT this_month', partition);
    PERFORM keyvault._guard_partition(format('keyvault.%I', partition)::regclass);
END $$;
COMMENT ON FUNCTION keyvault._make_usage_partition(timestamptz) IS
    'Makes the partition of usage_records for the month that begins at month, and moves its rows there from the default partition. Error: 55P03 when a lock is not to be had within 100 ms.';

CREATE FUNCTION keyvault._make_usage_partitions(ahead integer = 3) RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    month timestamptz;
    this_month timestamptz := date_trunc('month', now(), 'UTC');
    movable constant integer := 10000;
    made integer := 0;
BEGIN
    FOR i IN 0 .. ahead LOOP
        month := keyvault._period_bound(this_month, i);
        -- Inserts wait while rows are moved: more than a few stay where they are while the month is written to.
        IF to_regclass('keyvault.' || keyvault._usage_partition_name(month)) IS NULL
           AND NOT EXISTS (SELECT FROM keyvault.usage_records_default
                            WHERE created_at >= month AND created_at < keyvault._period_bound(month, 1) OFFSET movable)
        THEN
            PERFORM keyvault._make_usage_partition(month);
            made := made + 1;
        END IF;
    END LOOP;
    RETURN made;
END $$;
COMMENT ON FUNCTION keyvault._make_usage_partitions(integer) IS
    'Makes the partitions of usage_records for this month and the months ahead, but for those of which more than 10000 rows are in the default partition already; returns how many were made.';

CREATE FUNCTION keyvault._usage_kept_from() RETURNS timestamptz
    LANGUAGE sql STABLE
    RETURN CASE WHEN current_setting('keyvault.usage_retention')::integer > 0
                THEN keyvault._period_bound(date_trunc('month', now(), 'UTC'), - current_setting('keyvault.usage_retention')::integer)
                ELSE '-infinity'::timestamptz END;
COMMENT ON FUNCTION keyvault._usage_kept_from() IS 'The first month that keyvault.usage_retention keeps; -infinity keeps all.';

CREATE FUNCTION keyvault._settle_default_partition(max_rows bigint = 10000) RETURNS text
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    month timestamptz;
BEGIN
    -- The oldest month first, of those that are over, are kept, and have no table of their own.
    SELECT m.month INTO month
      FROM (SELECT date_trunc('month', d.created_at, 'UTC') AS month FROM keyvault.usage_records_default d
             WHERE d.created_at < date_trunc('month', now(), 'UTC') AND d.created_at >= keyvault._usage_kept_from()
             GROUP BY 1 HAVING max_rows IS NULL OR count(*) <= max_rows) m
     WHERE to_regclass('keyvault.' || keyvault._usage_partition_name(m.month)) IS NULL
     ORDER BY m.month LIMIT 1;
    IF month IS NULL THEN
        RETURN NULL;
    END IF;
    PERFORM keyvault._make_usage_partition(month);
    RETURN keyvault._usage_partition_name(month);
END $$;
COMMENT ON FUNCTION keyvault._settle_default_partition(bigint) IS
    'Gives the oldest ended month that has rows in the default partition, max_rows at most (NULL for any number), a partition of its own, and returns its name; NULL when there is none. Inserts wait meanwhile. Error: 55P03 when a lock is not to be had within 100 ms.';

CREATE FUNCTION keyvault._require_read_committed() RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE EXCEPTION 'usage records are retired at isolation level read committed only'
            USING ERRCODE = 'invalid_transaction_state',
                  DETAIL = 'Records that were committed after the transaction''s snapshot would be left out of the sums.',
                  HINT = 'SET default_transaction_isolation = ''read committed'', or begin the transaction so.';
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._require_read_committed() IS 'Raises 25000 in a transaction that keeps its first snapshot.';

CREATE FUNCTION keyvault._retire_usage(kept_from timestamptz = NULL) RETURNS text
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms'
AS $$
DECLARE
    first_kept constant timestamptz := coalesce(kept_from, keyvault._usage_kept_from());
    partition regclass;
    state keyvault.usage_rollup;
    last_month timestamptz;
    counted boolean;
BEGIN
    PERFORM keyvault._require_read_committed();
    SELECT c.oid, ((to_date(right(c.relname, 7), 'YYYY_MM') + interval '1 month')::timestamp AT TIME ZONE 'UTC')
      INTO partition, last_month
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
     WHERE i.inhparent = 'keyvault.usage_records'::regclass AND c.relname ~ '^usage_records_[0-9]{4}_[0-9]{2}$'
       AND isfinite(first_kept) AND c.relname < keyvault._usage_partition_name(first_kept)
     ORDER BY c.relname LIMIT 1;
    IF partition IS NULL THEN
        RETURN NULL;
    END IF;
    -- A period that is open is proved from its records.
    IF EXISTS (SELECT FROM keyvault.credit_balances b WHERE b.period_start < last_month) THEN
        RETURN NULL;
    END IF;
    SELECT * INTO state FROM keyvault.usage_rollup FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    -- Keeps writers out of this month alone; DETACH takes its lock on all months when the sums are there.
    EXECUTE format('LOCK TABLE %s IN SHARE MODE', partition);
    EXECUTE format('SELECT NOT EXISTS (SELECT FROM %s WHERE debit_tag >= $1 AND debit_tag < $2)', partition)
       INTO counted USING state.rolled_to, state.tag_base + (1::bigint << 48);
    IF NOT counted THEN
        RETURN NULL;
    END IF;
    EXECUTE format($sql$
        WITH days AS MATERIALIZED (
            SELECT r.user_id, (r.created_at AT TIME ZONE 'UTC')::date AS day, left(coalesce(r.provider, ''), 255) AS provider,
                   left(coalesce(r.model, ''), 255) AS model, r.type, r.payer, count(*) AS calls, sum(r.input_tokens) AS input_tokens,
                   sum(r.cached_tokens) AS cached_tokens, sum(r.output_tokens) AS output_tokens, sum(r.tokens) AS tokens,
                   sum(r.credits) AS credits, sum(r.credits_overrun) AS credits_overrun, sum(r.cost_usd) AS cost_usd
              FROM %s r GROUP BY 1, 2, 3, 4, 5, 6
        ), taken AS (
            INSERT INTO keyvault.usage_late
            SELECT d.user_id, d.day, d.provider, d.model, d.type, d.payer, -d.calls, -d.input_tokens, -d.cached_tokens,
                   -d.output_tokens, -d.tokens, -d.credits, -d.credits_overrun, -d.cost_usd FROM days d)
        INSERT INTO keyvault.usage_retired SELECT d.* FROM days d$sql$, partition);
    PERFORM keyvault._archive_usage(partition);
    EXECUTE format('ALTER TABLE keyvault.usage_records DETACH PARTITION %s', partition);
    IF current_setting('keyvault.drop_retired_usage')::boolean THEN
        EXECUTE format('DROP TABLE %s', partition);
    END IF;
    RETURN keyvault._usage_partition_name(last_month - interval '1 day');
END $$;
COMMENT ON FUNCTION keyvault._retire_usage(timestamptz) IS
    'Detaches, or drops, the oldest partition before kept_from, by default what keyvault.usage_retention does not keep, after its sums were put into usage_retired; returns its name. NULL when there is none, or its records are still needed: for an open period, or by the roll-up. Errors: 25000 above READ COMMITTED, 55P03 when a lock is not to be had within 100 ms.';

CREATE FUNCTION keyvault._retire_late_usage(batch integer = 10000, kept_from timestamptz = NULL) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '100ms'
AS $$
DECLARE
    first_kept constant timestamptz := coalesce(kept_from, keyvault._usage_kept_from());
    state keyvault.usage_rollup;
    retired bigint;
BEGIN
    PERFORM keyvault._require_read_committed();
    -- A period that is open is proved from its records.
    IF EXISTS (SELECT FROM keyvault.credit_balances b WHERE b.period_start < first_kept)
       OR NOT EXISTS (SELECT FROM keyvault.usage_records_default d WHERE d.created_at < first_kept)
    THEN
        RETURN 0;
    END IF;
    SELECT * INTO state FROM keyvault.usage_rollup FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    -- Keeps writers out of the default partition alone, where the months that are written to have none of their rows.
    ALTER TABLE keyvault.usage_records_default DISABLE TRIGGER refuse_change;
    WITH gone AS MATERIALIZED (
        DELETE FROM keyvault.usage_records_default d
         WHERE d.ctid = ANY (ARRAY(SELECT o.ctid FROM keyvault.usage_records_default o
                                    WHERE o.created_at < first_kept
                                      AND NOT (o.debit_tag >= state.rolled_to AND o.debit_tag < state.tag_base + (1::bigint << 48))
                                    LIMIT batch))
        RETURNING d.*
    ), days AS MATERIALIZED (
        SELECT r.user_id, (r.created_at AT TIME ZONE 'UTC')::date AS day, left(coalesce(r.provider, ''), 255) AS provider,
               left(coalesce(r.model, ''), 255) AS model, r.type, r.payer, count(*) AS calls, sum(r.input_tokens) AS input_tokens,
               sum(r.cached_tokens) AS cached_tokens, sum(r.output_tokens) AS output_tokens, sum(r.tokens) AS tokens,
               sum(r.credits) AS credits, sum(r.credits_overrun) AS credits_overrun, sum(r.cost_usd) AS cost_usd
          FROM gone r GROUP BY 1, 2, 3, 4, 5, 6
    ), taken AS (
        INSERT INTO keyvault.usage_late
        SELECT d.user_id, d.day, d.provider, d.model, d.type, d.payer, -d.calls, -d.input_tokens, -d.cached_tokens,
               -d.output_tokens, -d.tokens, -d.credits, -d.credits_overrun, -d.cost_usd FROM days d
    ), kept AS (
        INSERT INTO keyvault.usage_retired SELECT d.* FROM days d
    ), archived AS (
        INSERT INTO keyvault.usage_archived AS a (user_id, partition, calls, credits)
        SELECT d.user_id, 'keyvault.usage_records_default', sum(d.calls), sum(d.credits) FROM days d GROUP BY d.user_id
        ON CONFLICT (user_id, partition) DO UPDATE
           SET calls = a.calls + excluded.calls, credits = a.credits + excluded.credits, archived_at = now())
    SELECT count(*) INTO retired FROM gone;
    ALTER TABLE keyvault.usage_records_default ENABLE ALWAYS TRIGGER refuse_change;
    RETURN retired;
END $$;
COMMENT ON FUNCTION keyvault._retire_late_usage(integer, timestamptz) IS
    'Deletes up to batch records before kept_from, by default what keyvault.usage_retention does not keep, from the default partition, after their sums were put into usage_retired; returns how many. 0 as well while they are needed: for an open period, or by the roll-up. Errors: 25000 above READ COMMITTED, 55P03 when a lock is not to be had within 100 ms.';
