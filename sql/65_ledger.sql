-- Proof: balances from the rows that they are made of.

-- Partitions of usage that are retired leave what they add up to.
CREATE TABLE keyvault.usage_archived (
    user_id   text COLLATE "C" NOT NULL,
    partition text NOT NULL,
    calls     bigint NOT NULL,
    credits   numeric NOT NULL,
    archived_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, partition)
);
COMMENT ON TABLE keyvault.usage_archived IS
    'What usage records of retired partitions add up to per user, so that verify_ledger stays right without them.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.usage_archived', '');
ALTER TABLE keyvault.usage_archived ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.usage_archived FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.usage_archived FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

CREATE FUNCTION keyvault._archive_usage(partition regclass) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    users bigint;
BEGIN
    EXECUTE format('INSERT INTO keyvault.usage_archived AS a (user_id, partition, calls, credits)
                    SELECT r.user_id, %L, count(*), sum(r.credits) FROM %s r GROUP BY r.user_id
                    ON CONFLICT (user_id, partition) DO UPDATE
                       SET calls = a.calls + excluded.calls, credits = a.credits + excluded.credits, archived_at = now()',
                   partition::text, partition);
    GET DIAGNOSTICS users = ROW_COUNT;
    RETURN users;
END $$;
COMMENT ON FUNCTION keyvault._archive_usage(regclass) IS
    'Keeps in usage_archived what a partition of usage_records adds up to, in the transaction that detaches it, beside what an earlier partition of that name did; returns for how many users.';

CREATE FUNCTION keyvault._ledger() RETURNS TABLE (user_id text, what text, expected numeric, found numeric)
    LANGUAGE sql STABLE
BEGIN ATOMIC
    WITH usage AS (
        SELECT r.user_id, sum(r.credits) AS credits, sum(r.recorded) AS recorded
          FROM (SELECT u.user_id, sum(u.credits) AS credits, sum(u.credits) AS recorded FROM keyvault.usage_records u GROUP BY u.user_id
                 UNION ALL
                SELECT a.user_id, a.credits, 0 FROM keyvault.usage_archived a) r
         GROUP BY r.user_id
    ), balance AS (
        SELECT b.user_id, sum(b.credits_used) AS credits_used, sum(b.credits_held) AS credits_held,
               sum(b.extra_credits) FILTER (WHERE b.slot = 0) AS extra_credits,
               sum(b.extra_spent) FILTER (WHERE b.slot = 0) AS extra_spent,
               sum(b.monthly_credits) FILTER (WHERE b.slot = 0) AS monthly_credits,
               sum(b.credits_lent) FILTER (WHERE b.slot = 0) AS credits_lent,
               sum(b.credits_covered) FILTER (WHERE b.slot = 0) AS credits_covered,
               max(b.period_start) FILTER (WHERE b.slot = 0) AS period_start,
               sum(b.monthly_credits) FILTER (WHERE b.slot > 0) AS slots_credits
          FROM keyvault.credit_balances b GROUP BY b.user_id
    ), period AS (
        SELECT p.user_id, sum(p.credits_used) AS credits_used, sum(p.extra_spent) AS extra_spent
          FROM keyvault.credit_periods p WHERE p.ended_by = 'period' GROUP BY p.user_id
    ), grants AS (
        SELECT g.user_id, sum(g.remaining) AS remaining, sum(g.amount - g.remaining - g.expired) AS spent
          FROM keyvault.credit_grants g GROUP BY g.user_id
    ), added_up AS (
        SELECT d.user_id, sum(d.credits) AS credits
          FROM (SELECT v.user_id, v.credits FROM keyvault._usage v UNION ALL SELECT t.user_id, - t.credits FROM keyvault.usage_retired t) d
         GROUP BY d.user_id
    ), hold AS (
        SELECT h.user_id, sum(h.amount) AS amount FROM keyvault.credit_holds h GROUP BY h.user_id
    ), all_users AS (
        SELECT coalesce(u.user_id, b.user_id, g.user_id, h.user_id, p.user_id, d.user_id) AS user_id,
               coalesce(u.credits, 0) AS usage, coalesce(p.credits_used, 0) + coalesce(b.credits_used, 0) AS credits_used,
               coalesce(h.amount, 0) AS holds, coalesce(b.credits_held, 0) AS credits_held,
               coalesce(g.remaining, 0) + coalesce(b.extra_spent, 0) AS extra, coalesce(b.extra_credits, 0) AS extra_credits,
               coalesce(g.spent, 0) AS grants_spent, coalesce(p.extra_spent, 0) + coalesce(b.extra_spent, 0) AS extra_spent,
               CASE WHEN pl.overage = 'block' THEN b.monthly_credits + b.extra_credits END AS credits_limit,
               b.credits_used AS current_used, CASE WHEN b.monthly_credits IS NOT NULL THEN b.credits_lent END AS lent,
               b.slots_credits, coalesce(u.recorded, 0) AS recorded, coalesce(d.credits, 0) AS added_up, b.monthly_credits,
               -- A plan's change reaches a user at the next period; at the one after, if that begins before the change is committed.
               CASE WHEN pl.plan IS NOT NULL AND b.period_start >= coalesce(pl.credits_changed_at + interval '1 day', '-infinity')
                    THEN coalesce(us.monthly_credits, pl.monthly_credits) + b.credits_covered ELSE b.monthly_credits END AS agreed
          FROM usage u
          FULL JOIN balance b ON b.user_id = u.user_id
          FULL JOIN grants g ON g.user_id = coalesce(u.user_id, b.user_id)
          FULL JOIN hold h ON h.user_id = coalesce(u.user_id, b.user_id, g.user_id)
          FULL JOIN period p ON p.user_id = coalesce(u.user_id, b.user_id, g.user_id, h.user_id)
          FULL JOIN added_up d ON d.user_id = coalesce(u.user_id, b.user_id, g.user_id, h.user_id, p.user_id)
          LEFT JOIN keyvault.users us ON us.user_id = b.user_id
          LEFT JOIN keyvault.plans pl ON pl.plan = us.plan
    )
    SELECT a.user_id, c.what, c.expected, c.found
      FROM all_users a
     CROSS JOIN LATERAL (VALUES
           ('credits_used', a.usage, a.credits_used),
           ('credits_held', a.holds, a.credits_held),
           ('extra_credits', a.extra, a.extra_credits),
           ('extra_spent', a.grants_spent, a.extra_spent),
           ('credits_limit', a.current_used, CASE WHEN a.current_used > a.credits_limit THEN a.credits_limit ELSE a.current_used END),
           ('monthly_credits', a.agreed, a.monthly_credits),
           ('usage_daily', a.recorded, a.added_up),
           ('credits_lent', coalesce(a.slots_credits, a.lent), a.lent)) c(what, expected, found)
     WHERE c.expected IS DISTINCT FROM c.found
     UNION ALL
    SELECT NULL, t.what, t.expected, t.found
      FROM (SELECT sum(a.usage), sum(a.credits_used), sum(a.holds), sum(a.credits_held), sum(a.extra), sum(a.extra_credits),
                   sum(a.grants_spent), sum(a.extra_spent) FROM all_users a) s(usage, used, holds, held, extra, extra_credits, spent, extra_spent)
     CROSS JOIN LATERAL (VALUES
           ('total credits_used', s.usage, s.used), ('total credits_held', s.holds, s.held),
           ('total extra_credits', s.extra, s.extra_credits), ('total extra_spent', s.spent, s.extra_spent)) t(what, expected, found)
     WHERE t.expected IS DISTINCT FROM t.found
     UNION ALL
    -- Of a day or month that is over nothing counts any more.
    SELECT g.user_id, concat_ws(' ', 'budget', g.scope, nullif(g.target, ''), g.unit, 'per', g.per), u.amount, g.spent
      FROM keyvault.credit_budgets g
     CROSS JOIN LATERAL (SELECT keyvault._budget_used(g, g.window_start) + g.spent_apart) u(amount)
     WHERE g.window_start = keyvault._budget_window(g) AND u.amount <> g.spent;
END;
COMMENT ON FUNCTION keyvault._ledger() IS 'verify_ledger, as far as row-level security lets its caller read.';

CREATE FUNCTION keyvault.verify_ledger() RETURNS TABLE (user_id text, what text, expected numeric, found numeric)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- Under row-level security a sum over part of the rows would prove nothing.
    IF row_security_active('keyvault.usage_records') AND NOT keyvault._may_read_all_usage() THEN
        RAISE EXCEPTION 'not allowed to read every user''s usage'
            USING ERRCODE = 'insufficient_privilege', HINT = 'keyvault.grant_access(role, ''admin'') or (role, ''analyst'') gives that right.';
    END IF;
    RETURN QUERY SELECT l.user_id, l.what, l.expected, l.found FROM keyvault._ledger() l;
END $$;
COMMENT ON FUNCTION keyvault.verify_ledger() IS
    'Proves every balance, and their totals (user_id NULL), from usage records, grants, holds and closed periods, and what is spent of every budget: what does not agree, expected from the rows and found in the balance or budget. No rows: sound. It reads all usage. Error: 42501 without access admin or analyst.';

CREATE FUNCTION keyvault.balance_at(user_id text, at timestamptz)
    RETURNS TABLE (plan text, period_start timestamptz, period_end timestamptz, monthly_credits numeric, extra_credits numeric,
                   credits_used numeric, credits_remaining numeric)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    b keyvault.credit_balances;
    p keyvault.credit_periods;
    covered numeric := 0;
    number integer;
    last_day date := ($2 AT TIME ZONE 'UTC')::date;
    divided record;
BEGIN
    IF $2 IS NULL OR $2 = 'infinity' THEN
        RAISE EXCEPTION 'at must be a time'
            USING ERRCODE = CASE WHEN $2 IS NULL THEN 'null_value_not_allowed' ELSE 'invalid_parameter_value' END, HINT = 'Pass now() for the present.';
    END IF;
    SELECT * INTO b FROM keyvault.credit_balances c WHERE c.user_id = $1 AND c.slot = 0;
    IF NOT FOUND OR $2 < b.period_anchor THEN
        RETURN;
    END IF;
    number := keyvault._period_number(b.period_anchor, $2);
    period_start := keyvault._period_bound(b.period_anchor, number);
    period_end := keyvault._period_bound(b.period_anchor, number + 1);
    -- The first change after that time says what was in force until then.
    SELECT * INTO p FROM keyvault.credit_periods c WHERE c.user_id = $1 AND c.ended_at > $2 ORDER BY c.ended_at, c.id LIMIT 1;
    IF FOUND THEN
        plan := p.plan;
        covered := CASE WHEN p.period_start = period_start THEN p.credits_covered ELSE 0 END;
        monthly_credits := p.monthly_credits - p.credits_covered + covered;
    ELSE
        SELECT u.plan, coalesce(u.monthly_credits, pl.monthly_credits) INTO plan, monthly_credits
          FROM keyvault.users u JOIN keyvault.plans pl ON pl.plan = u.plan WHERE u.user_id = $1;
        IF b.period_start = period_start THEN
            monthly_credits := b.monthly_credits;
            covered := b.credits_covered;
        END IF;
    END IF;
    SELECT coalesce(sum(r.credits), 0) INTO credits_used FROM keyvault.usage_records r
     WHERE r.user_id = $1 AND r.created_at >= period_start AND r.created_at <= $2;
    -- Of records that are gone there are the sums of days; a day counts once it is over.
    SELECT credits_used + coalesce(sum(r.credits), 0) INTO credits_used FROM keyvault.usage_retired r
     WHERE r.user_id = $1 AND r.day >= (period_start AT TIME ZONE 'UTC')::date AND r.day < last_day;
    FOR divided IN SELECT r.day, sum(r.credits) AS credits FROM keyvault.usage_retired r
                    WHERE r.user_id = $1 AND r.day IN ((period_start AT TIME ZONE 'UTC')::date, last_day)
                      AND r.day::timestamp < CASE r.day WHEN last_day THEN $2 ELSE period_start END AT TIME ZONE 'UTC'
                    GROUP BY r.day HAVING sum(r.credits) > 0 ORDER BY r.day LOOP
        RAISE NOTICE 'usage of user "%" on % is a sum of % credits, which %', $1, to_char(divided.day, 'YYYY-MM-DD'), trim_scale(divided.credits),
            CASE divided.day WHEN last_day THEN 'is not counted' ELSE 'is counted whole' END
            USING DETAIL = CASE divided.day WHEN last_day THEN 'The day was not over at that time; its records are retired.'
                                            ELSE 'The period began within that day; its records are retired.' END;
    END LOOP;
    SELECT coalesce(sum(g.amount - CASE WHEN g.expires_at <= $2 THEN g.expired ELSE 0 END), 0) INTO extra_credits
      FROM keyvault.credit_grants g WHERE g.user_id = $1 AND g.created_at <= $2;
    SELECT extra_credits - coalesce(sum(c.extra_spent), 0) INTO extra_credits
      FROM keyvault.credit_periods c WHERE c.user_id = $1 AND c.ended_by = 'period' AND c.ended_at <= $2;
    IF $2 >= b.due_at AND b.due_at <= now() THEN
        -- What is due was not written yet.
        SELECT n.extra_credits INTO extra_credits
          FROM keyvault._balance_now(b, (SELECT sum(c.credits_used) FROM keyvault.credit_balances c WHERE c.user_id = $1)) n;
    END IF;
    credits_remaining := CASE WHEN monthly_credits IS NOT NULL THEN greatest(monthly_credits + extra_credits - credits_used, 0) END;
    monthly_credits := monthly_credits - covered;
    RETURN NEXT;
END $$;
COMMENT ON FUNCTION keyvault.balance_at(text, timestamptz) IS
    'A user''s plan, period and credits as of a time, from usage records by created_at, sums of retired days that were over, grants and closed periods; holds of that time are not kept. A NOTICE says so when a retired day was divided by that time, and its sum is not counted, or by the period''s start, and it is counted whole. NULL monthly_credits and credits_remaining were unlimited. No row before the user''s first period. The acting user''s, every user''s for access analyst or admin.';

CREATE FUNCTION keyvault.explain_balance(user_id text = NULL) RETURNS TABLE (item text, credits numeric, note text)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    whose text := coalesce($1, keyvault.current_user_id());
    s record;
    b keyvault.credit_balances;
    c keyvault.credit_balances;
    used_in_slots numeric;
    pending numeric := 0;
    granted numeric := 0;
    beyond numeric;
    g record;
BEGIN
    SELECT v.* INTO s FROM keyvault.credit_status v WHERE v.user_id = whose;
    SELECT v.* INTO b FROM keyvault.credit_balances v WHERE v.user_id = whose AND v.slot = 0;
    IF s.user_id IS NULL THEN
        RETURN;
    END IF;
    SELECT sum(v.credits_used) INTO used_in_slots FROM keyvault.credit_balances v WHERE v.user_id = whose;
    c := keyvault._balance_now(b, used_in_slots);
    RETURN QUERY SELECT 'monthly credits'::text, s.monthly_credits,
        format('plan %s, until %s UTC%s', s.plan, to_char(s.credits_reset_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'),
               CASE WHEN s.monthly_credits IS NULL THEN ', unlimited' ELSE '' END);
    IF c.credits_covered > c.credits_overage THEN
        RETURN QUERY SELECT 'covered by an earlier plan'::text, c.credits_covered - c.credits_overage,
            'used before a smaller plan began in this period'::text;
    END IF;
    IF c.credits_covered > 0 AND c.credits_overage > 0 THEN
        RETURN QUERY SELECT 'reported overage'::text, least(c.credits_overage, c.credits_covered), 'not taken off what came later'::text;
    END IF;
    -- A period that ended and that nobody has closed yet takes its part of the grants first.
    IF b.period_end <= now() THEN
        pending := coalesce(greatest(least(used_in_slots - b.monthly_credits, b.extra_credits) - b.extra_spent, 0), 0);
    END IF;
    FOR g IN SELECT n.*, n.remaining - least(greatest(pending - n.before, 0), n.remaining) AS has
               FROM (SELECT o.*, sum(o.remaining) OVER (ORDER BY o.expires_at, o.created_at, o.id) - o.remaining AS before
                       FROM keyvault.credit_grants o WHERE o.user_id = whose AND o.remaining > 0) n
              ORDER BY n.expires_at, n.created_at, n.id LOOP
        CONTINUE WHEN g.has = 0 OR g.expires_at <= now();
        granted := granted + g.has;
        RETURN QUERY SELECT g.kind, g.has,
            format('%s%s, of %s granted', g.reason,
                   coalesce(', expires ' || to_char(g.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI') || ' UTC', ''), trim_scale(g.amount));
    END LOOP;
    IF c.extra_credits > granted THEN
        RETURN QUERY SELECT 'paid by grants'::text, c.extra_credits - granted, 'of what was used in this period, and taken off the grants already'::text;
    END IF;
    RETURN QUERY SELECT 'used'::text, -s.credits_used,
        format('since %s UTC', to_char(c.period_start AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI'));
    RETURN QUERY SELECT 'held'::text, -h.amount,
        'until ' || CASE h.expires_at WHEN 'infinity' THEN 'its request ends' ELSE to_char(h.expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI') || ' UTC' END
        FROM keyvault.credit_holds h WHERE h.user_id = whose AND h.expires_at > now() AND h.amount > 0 ORDER BY h.id;
    beyond := c.credits_used + s.credits_held - c.monthly_credits - c.extra_credits;
    IF beyond > 0 THEN
        RETURN QUERY SELECT 'beyond the limit'::text, beyond, ''::text;
    END IF;
    RETURN QUERY SELECT 'remaining'::text, s.credits_remaining,
        CASE WHEN s.credits_remaining IS NULL THEN 'unlimited' WHEN s.credits_overage > 0 THEN format('%s beyond the limit', trim_scale(s.credits_overage))
             ELSE '' END;
END $$;
COMMENT ON FUNCTION keyvault.explain_balance(text) IS
    'How a user''s credits_remaining comes about, line by line, in credits: the lines add up to the last one, remaining. Debits are negative. user_id NULL is the identity. The acting user''s, every user''s for access analyst or admin; no rows otherwise.';
