-- What is due from time to time. Nothing is wrong before it has run: it makes things sooner, smaller and faster.
-- The worker does it by itself, pg_cron on a schedule, and a superuser with run_maintenance() or CALL maintain().

CREATE VIEW keyvault._maintenance_job WITH (security_invoker = true) AS
SELECT * FROM (VALUES
    (1, 'partitions', '7 * * * *'),
    (2, 'roll-up', '* * * * *'),
    (3, 'retention', '17 * * * *'),
    (4, 'reset', '*/5 * * * *'),
    (5, 'purge', '27 * * * *'),
    (6, 'rotation', '37 * * * *')) j(place, job, schedule);
COMMENT ON VIEW keyvault._maintenance_job IS 'The jobs of maintenance in their order, and when pg_cron runs each.';

CREATE FUNCTION keyvault._purge_aged(batch integer) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    retention constant interval := current_setting('keyvault.response_retention')::interval;
    purged bigint;
BEGIN
    WITH keys AS (
        DELETE FROM keyvault.usage_keys k
         WHERE k.ctid = ANY (ARRAY(SELECT o.ctid FROM keyvault.usage_keys o
                                    WHERE retention > '0' AND o.created_at < now() - retention LIMIT batch FOR UPDATE SKIP LOCKED))
        RETURNING 1
    ), notices AS (
        DELETE FROM keyvault.credit_notices n
         WHERE n.ctid = ANY (ARRAY(SELECT o.ctid FROM keyvault.credit_notices o
                                    WHERE o.noted_at < now() - interval '3 months' LIMIT batch FOR UPDATE SKIP LOCKED))
        RETURNING 1
    ), holds AS (
        DELETE FROM keyvault.credit_holds h
         WHERE h.ctid = ANY (ARRAY(SELECT o.ctid FROM keyvault.credit_holds o
                                    WHERE o.amount = 0 AND o.expires_at <= now() - interval '7 days' LIMIT batch FOR UPDATE SKIP LOCKED))
        RETURNING 1)
    SELECT (SELECT count(*) FROM keys) + (SELECT count(*) FROM notices) + (SELECT count(*) FROM holds) INTO purged;
    RETURN purged;
END $$;
COMMENT ON FUNCTION keyvault._purge_aged(integer) IS
    'Deletes idempotency keys of usage older than keyvault.response_retention, notices of thresholds older than three months, and holds that expired a week ago and set nothing aside any more, up to batch of each; returns how many.';

CREATE FUNCTION keyvault._purge(batch integer, OUT purged bigint, OUT more boolean)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    retention constant interval := current_setting('keyvault.response_retention')::interval;
    kept_from constant timestamptz := now() - retention;
    -- Few at a time: a debit of one of them waits for the batch.
    few constant integer := least(batch, 250);
    holders keyvault.credit_balances[];
    holder keyvault.credit_balances;
    gone bigint;
BEGIN
    purged := keyvault._charge_unknown(few);
    WITH expired AS MATERIALIZED (
        SELECT DISTINCT h.user_id FROM keyvault.credit_holds h WHERE h.expires_at <= now() AND h.amount > 0
    ), locked AS MATERIALIZED (
        SELECT b FROM expired e JOIN keyvault.credit_balances b ON b.user_id = e.user_id AND b.slot = 0
         ORDER BY b.user_id LIMIT few FOR NO KEY UPDATE OF b SKIP LOCKED)
    SELECT array_agg(l.b) INTO holders FROM locked l;
    FOREACH holder IN ARRAY coalesce(holders, '{}') LOOP
        IF keyvault._slots_are_free(holder) THEN
            PERFORM keyvault._lock_balance(holder.user_id, false);
            PERFORM keyvault._sweep_holds(holder.user_id);
            purged := purged + 1;
        END IF;
    END LOOP;
    more := purged >= few;
    IF more THEN
        RETURN;
    END IF;
    IF retention > '0' THEN
        -- An id begins with the milliseconds since 1970 at which it was made, so that the index on ids finds the oldest.
        WITH old AS (
            SELECT r.user_id, r.id FROM keyvault.requests r
             WHERE r.id < (lpad(to_hex(floor(extract(epoch FROM kept_from) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
               AND r.finished_at < kept_from AND (r.status <> 'unknown' OR r.finished_at <= now() - interval '1 day')
               -- _charge_unknown has passed over these: their balance was busy.
               AND NOT (r.status = 'unknown' AND r.type <> 'test' AND EXISTS (
                       SELECT FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan
                        WHERE u.user_id = r.user_id AND p.unknown_outcome = 'charge'))
             ORDER BY r.id LIMIT batch FOR UPDATE SKIP LOCKED
        ), answers AS (
            DELETE FROM keyvault.responses a USING old o WHERE a.user_id = o.user_id AND a.id = o.id
        ), gone AS (
            DELETE FROM keyvault.requests r USING old o WHERE r.user_id = o.user_id AND r.id = o.id RETURNING 1)
        SELECT count(*) INTO gone FROM gone;
        purged := purged + gone;
        more := gone >= batch;
    END IF;
    purged := purged + keyvault._forget_sealing_keys();
    gone := keyvault._purge_aged(batch);
    purged := purged + gone;
    more := more OR gone >= batch;
END $$;
COMMENT ON FUNCTION keyvault._purge(integer) IS
    'Charges unknown outcomes that are due, takes the expired holds of users, 250 at most, whose balances nobody else has locked off these, then deletes up to batch requests that ended longer than keyvault.response_retention ago, with their answers, retired sealing keys, and what _purge_aged deletes; returns how many of all, and whether there are more.';

CREATE FUNCTION keyvault._receives(what regclass) RETURNS boolean
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM pg_subscription_rel r WHERE r.srrelid = what);
END;
COMMENT ON FUNCTION keyvault._receives(regclass) IS 'True when a subscription of this database brings a table''s rows.';

CREATE FUNCTION keyvault._maintain(job text, batch integer = 10000, OUT done bigint, OUT more boolean, OUT detail text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    more := false;
    IF job IN ('reset', 'purge') AND keyvault._receives('keyvault.credit_balances')
       OR job = 'rotation' AND keyvault._receives('keyvault.data_keys')
    THEN
        -- What the publisher makes of these rows comes as well.
        done := 0;
        detail := 'left to the publisher';
        RETURN;
    END IF;
    CASE job
        WHEN 'partitions' THEN
            done := keyvault._make_usage_partitions();
            detail := CASE WHEN done > 0 THEN 'partitions made ahead' END;
            IF done = 0 THEN
                detail := 'moved out of the default partition into ' || keyvault._settle_default_partition();
                done := (detail IS NOT NULL)::integer;
            END IF;
            more := done > 0;
        WHEN 'roll-up' THEN
            SELECT r.rolled, r.more INTO done, more FROM keyvault._roll_up_usage(2 * batch) r;
            detail := 'records added to usage_daily';
        WHEN 'retention' THEN
            detail := 'retired ' || keyvault._retire_usage();
            done := (detail IS NOT NULL)::integer;
            IF done = 0 THEN
                done := keyvault._retire_late_usage(batch);
                detail := CASE WHEN done > 0 THEN 'late records retired' END;
            END IF;
            more := done > 0;
        WHEN 'reset' THEN
            -- Few at a time: a debit of one of them waits for the batch, and any debit for its WAL.
            done := keyvault._reset_due_credits(least(batch, 20));
            more := done >= least(batch, 20);
            detail := 'balances whose period ended';
        WHEN 'purge' THEN
            SELECT p.purged, p.more INTO done, more FROM keyvault._purge(batch) p;
            detail := 'old requests and idempotency keys, and expired holds';
        WHEN 'rotation' THEN
            SELECT r.done, r.more INTO done, more FROM keyvault._rotate_due(least(batch, 20)) r;
            detail := 'keys rotated';
    END CASE;
EXCEPTION
    WHEN lock_not_available THEN
        done := 0;
        more := false;
        detail := 'waits for a lock';
END $$;
COMMENT ON FUNCTION keyvault._maintain(text, integer) IS
    'Does one batch of a job of maintenance: how much was done, whether there is more, and in words what; nothing when a lock is in the way, or where a subscription brings what the publisher''s maintenance makes.';

CREATE FUNCTION keyvault._check_maintenance_job(name text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF name IS NOT NULL AND NOT EXISTS (SELECT FROM keyvault._maintenance_job j WHERE j.job = name) THEN
        RAISE EXCEPTION 'there is no such job of maintenance'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = format('Jobs are %s; NULL is all of them.',
                                (SELECT string_agg(j.job, ', ' ORDER BY j.place) FROM keyvault._maintenance_job j));
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._check_maintenance_job(text) IS 'Raises 22023 for a name that is no job of maintenance.';

CREATE FUNCTION keyvault.run_maintenance(name text = NULL) RETURNS TABLE (job text, detail text, count bigint)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    step record;
    place integer;
BEGIN
    PERFORM keyvault._check_maintenance_job(name);
    FOR job, place IN SELECT j.job, j.place FROM keyvault._maintenance_job j WHERE name IS NULL OR j.job = name ORDER BY j.place LOOP
        count := 0;
        detail := NULL;
        LOOP
            step := keyvault._maintain(job);
            count := count + step.done;
            detail := CASE WHEN step.done > 0 OR detail IS NULL THEN coalesce(step.detail, detail) ELSE detail END;
            EXIT WHEN NOT step.more;
        END LOOP;
        RETURN NEXT;
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault.run_maintenance(text) IS
    'Does all that is due, or one job of it, in the caller''s transaction, and returns a row per job: what was done, and how much of it. Again at once it finds little left. CALL maintain() does the same and commits after each batch. A superuser calls it. Errors: 22023, 42501.';

CREATE PROCEDURE keyvault.maintain(name text = NULL)
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_maintain';
COMMENT ON PROCEDURE keyvault.maintain(text) IS
    'Does all that is due, or one job of it, and commits after each batch. A superuser calls it. Errors: 22023, 2D000 inside a transaction block, 42501.';

-- pg_cron's tables are in one database of the cluster, often another one than this.

CREATE FUNCTION keyvault.job_statements() RETURNS SETOF text
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT format('SELECT cron.schedule_in_database(%L, %L, %L, %L);', 'keyvault ' || j.job || ' in ' || current_database(), j.schedule,
                  format('CALL keyvault.maintain(%L)', j.job), current_database())
      FROM keyvault._maintenance_job j ORDER BY j.place;
END;
COMMENT ON FUNCTION keyvault.job_statements() IS
    'The statements that register this database''s maintenance with pg_cron 1.4 or later, to be run in pg_cron''s own database. Run again they change nothing.';

CREATE FUNCTION keyvault._require_cron() RETURNS void
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF to_regprocedure('cron.schedule_in_database(text, text, text, text, text, boolean)') IS NULL THEN
        RAISE EXCEPTION 'pg_cron is not in this database'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  DETAIL = 'The worker of keyvault does the same jobs without it.',
                  HINT = CASE WHEN coalesce(current_setting('cron.database_name', true), current_database()) = current_database()
                              THEN 'Install pg_cron 1.4 or later, and run CREATE EXTENSION pg_cron.'
                              ELSE format('Run what SELECT keyvault.job_statements() returns in database "%s", where pg_cron is.',
                                          current_setting('cron.database_name', true)) END;
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._require_cron() IS 'Raises 55000 where pg_cron is not, and says how to go on.';

CREATE FUNCTION keyvault.schedule_jobs() RETURNS TABLE (job text, schedule text, command text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    statement text;
BEGIN
    PERFORM keyvault._require_cron();
    FOR statement IN SELECT keyvault.job_statements() LOOP
        EXECUTE statement;
    END LOOP;
    RETURN QUERY EXECUTE $sql$SELECT c.jobname::text, c.schedule, c.command FROM cron.job c
                               WHERE c.database = current_database() AND c.jobname ~ '^keyvault .* in ' ORDER BY c.jobid$sql$;
END $$;
COMMENT ON FUNCTION keyvault.schedule_jobs() IS
    'Registers this database''s maintenance with pg_cron, a job for each kind, under the calling role, and returns the jobs; again, it changes nothing. A superuser calls it, in the database that pg_cron is in; for others see job_statements(). Errors: 42501, 55000 where pg_cron is not.';

CREATE FUNCTION keyvault.unschedule_jobs() RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    removed bigint;
BEGIN
    PERFORM keyvault._require_cron();
    EXECUTE $sql$SELECT count(cron.unschedule(c.jobid)) FROM cron.job c
                  WHERE c.database = current_database() AND c.jobname ~ '^keyvault .* in '$sql$ INTO removed;
    RETURN removed;
END $$;
COMMENT ON FUNCTION keyvault.unschedule_jobs() IS
    'Takes this database''s maintenance out of pg_cron, and returns how many jobs there were. Errors: 42501, 55000 where pg_cron is not.';
