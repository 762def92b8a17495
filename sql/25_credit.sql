-- Balances, periods, holds and the debit.

-- Written by this extension's own functions alone, with amounts that usage_records and
-- credit_holds have checked; see there why no CHECK stands here.
CREATE TABLE keyvault.credit_balances (
    user_id         text COLLATE "C" NOT NULL,
    slot            smallint NOT NULL DEFAULT 0,
    monthly_credits numeric(18,6),
    extra_credits   numeric(18,6) NOT NULL DEFAULT 0,
    credits_used    numeric(18,6) NOT NULL DEFAULT 0,
    credits_held    numeric(18,6) NOT NULL DEFAULT 0,
    period_anchor   timestamptz NOT NULL,
    period_start    timestamptz NOT NULL,
    period_end      timestamptz NOT NULL,
    due_at          timestamptz NOT NULL,
    notice_at       numeric(18,6),
    credits_lent    numeric(18,6) NOT NULL DEFAULT 0,
    credits_covered numeric(18,6) NOT NULL DEFAULT 0,
    extra_spent     numeric(18,6) NOT NULL DEFAULT 0,
    credits_overage numeric(18,6) NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, slot)
) WITH (fillfactor = 70);
COMMENT ON TABLE keyvault.credit_balances IS
    'The hot row of each user''s credits, changed by the debit on usage_records. fillfactor leaves room for heap-only updates.';
COMMENT ON COLUMN keyvault.credit_balances.slot IS
    '0: the balance. Above 0: room that slot 0 lent to a busy user''s further slot, as that slot''s monthly_credits; a user''s credits_used is the sum over slots.';
COMMENT ON COLUMN keyvault.credit_balances.monthly_credits IS 'What may be used in this period before extra credits are: the plan''s credits and credits_covered; NULL is unlimited.';
COMMENT ON COLUMN keyvault.credit_balances.extra_credits IS 'Credits beyond the plan: spent after the monthly ones, kept at a reset.';
COMMENT ON COLUMN keyvault.credit_balances.credits_used IS 'Credits debited since period_start.';
COMMENT ON COLUMN keyvault.credit_balances.credits_held IS 'Sum of credit_holds, expired ones included until credits run short, which sweeps them.';
COMMENT ON COLUMN keyvault.credit_balances.due_at IS
    'When the row has to be looked at before more is debited: at the period''s end, or earlier when a grant expires.';
COMMENT ON COLUMN keyvault.credit_balances.notice_at IS
    'A debit that takes credits_used beyond it goes the slow way: the next threshold to note less one micro-credit; below 0 when every debit has to, of zero credits too, because the user has budgets; NULL: none.';
COMMENT ON COLUMN keyvault.credit_balances.credits_lent IS
    'Room given to further slots; above 0 exactly while there are any, for an unlimited user too, for whom it has no other meaning.';
COMMENT ON COLUMN keyvault.credit_balances.credits_covered IS 'The part of monthly_credits for use that is settled: an earlier, larger plan of the same period paid for it, or it is reported overage.';
COMMENT ON COLUMN keyvault.credit_balances.extra_spent IS 'The part of extra_credits that was taken from grants in this period already.';
COMMENT ON COLUMN keyvault.credit_balances.credits_overage IS
    'Overage of this period that credit_periods has already: a grant or a change of plan came after it.';
COMMENT ON COLUMN keyvault.credit_balances.period_anchor IS 'Period n begins at period_anchor + n months, in UTC.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_balances', '');

-- Not WHERE slot = 0: while the table is new the planner would take it for looking up one balance, and scan it all.
CREATE INDEX credit_balances_due ON keyvault.credit_balances (due_at);
-- A debit looks for slot 0 by its user alone, which is a shorter way than down the primary key.
CREATE INDEX credit_balances_user_id ON keyvault.credit_balances USING hash (user_id) WHERE slot = 0;

-- What a balance was before a period or a plan ended: with it, history can be proved.
CREATE TABLE keyvault.credit_periods (
    user_id         text COLLATE "C" NOT NULL,
    id              uuid NOT NULL DEFAULT keyvault.uuidv7(),
    ended_by        text NOT NULL CHECK (ended_by IN ('period', 'plan', 'grant')),
    plan            text COLLATE "C" NOT NULL,
    period_start    timestamptz NOT NULL,
    period_end      timestamptz NOT NULL,
    ended_at        timestamptz NOT NULL,
    monthly_credits numeric(18,6),
    credits_covered numeric(18,6) NOT NULL,
    credits_used    numeric(18,6) NOT NULL,
    extra_spent     numeric(18,6) NOT NULL,
    overage         numeric(18,6) NOT NULL,
    PRIMARY KEY (user_id, id)
);
COMMENT ON TABLE keyvault.credit_periods IS
    'Append-only history: one row when a period in which credits were used ends, one when a plan changes within a period, and one when a grant comes after overage.';
COMMENT ON COLUMN keyvault.credit_periods.ended_by IS 'period: at period_end; plan: by set_plan within the period; grant: by a grant, which does not pay for the overage before it.';
COMMENT ON COLUMN keyvault.credit_periods.ended_at IS 'Until when the plan and monthly_credits of the row were in force.';
COMMENT ON COLUMN keyvault.credit_periods.monthly_credits IS 'What could be used before grants were, credits_covered among it; NULL was unlimited.';
COMMENT ON COLUMN keyvault.credit_periods.credits_used IS 'Credits debited from period_start to ended_at.';
COMMENT ON COLUMN keyvault.credit_periods.extra_spent IS 'The part of credits_used that grants paid for.';
COMMENT ON COLUMN keyvault.credit_periods.overage IS 'The part of credits_used beyond plan and grants, on a plan with overage report, that no earlier row of the period has: a period''s overage is the sum of its rows.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_periods', '');

CREATE TABLE keyvault.credit_notices (
    user_id       text COLLATE "C" NOT NULL,
    period_start  timestamptz NOT NULL,
    percent       integer NOT NULL,
    credits_used  numeric(18,6) NOT NULL,
    credits_limit numeric(18,6) NOT NULL,
    noted_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, period_start, percent)
);
COMMENT ON TABLE keyvault.credit_notices IS
    'For alerts: which part of a period''s credits was used up when, once each per period, for three months. plans.notice_percents says which parts.';
COMMENT ON COLUMN keyvault.credit_notices.percent IS 'Percent of monthly and extra credits together, of the time when it was reached.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_notices', '');

ALTER TABLE keyvault.credit_balances ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.credit_balances FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.credit_balances FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));
ALTER TABLE keyvault.credit_periods ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.credit_periods FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.credit_periods FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));
ALTER TABLE keyvault.credit_notices ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.credit_notices FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.credit_notices FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

CREATE FUNCTION keyvault._period_bound(anchor timestamptz, number integer) RETURNS timestamptz
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_period_bound';
COMMENT ON FUNCTION keyvault._period_bound(timestamptz, integer) IS
    'When period number begins: anchor + number months in UTC, each computed from the anchor, so that the 31st comes back after a short month.';

CREATE FUNCTION keyvault._period_number(anchor timestamptz, at timestamptz) RETURNS integer
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_period_number';
COMMENT ON FUNCTION keyvault._period_number(timestamptz, timestamptz) IS
    'The number of the period that contains at; 0 begins at the anchor.';

CREATE FUNCTION keyvault._keep_due() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.due_at := least(NEW.due_at, NEW.period_end);
    RETURN NEW;
END $$;
COMMENT ON FUNCTION keyvault._keep_due() IS
    'Trigger of credit_balances: a period that an administrator ends earlier is due earlier. The debit does not fire it.';
CREATE TRIGGER keep_due BEFORE INSERT OR UPDATE OF period_end ON keyvault.credit_balances
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_due();

CREATE FUNCTION keyvault._wake_worker() RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_wake_worker';
COMMENT ON FUNCTION keyvault._wake_worker() IS
    'Has this database''s worker look at its queue, and make the partitions it finds missing, when the transaction commits.';

CREATE FUNCTION keyvault._create_balance(user_id text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO keyvault.credit_balances (user_id, monthly_credits, period_anchor, period_start, period_end, due_at, notice_at)
    SELECT u.user_id, c.monthly, a.anchor, a.anchor, n.ends, n.ends,
           (SELECT min(t.at) - 0.000001 FROM unnest(p.notice_percents) percent, round(c.monthly * percent / 100, 6) t(at) WHERE t.at > 0)
      FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan,
           LATERAL (SELECT coalesce(u.monthly_credits, p.monthly_credits)) c(monthly),
           date_trunc('day', now(), 'UTC') a(anchor), keyvault._period_bound(a.anchor, 1) n(ends)
     WHERE u.user_id = $1
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        PERFORM keyvault._wake_worker();
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._create_balance(text) IS
    'Gives a user a balance where there is none: the plan''s credits, in periods that begin at midnight UTC today.';

-- plpgsql where SQL would do: it keeps its plans, and these run for every call.

CREATE FUNCTION keyvault._credits_left(balance keyvault.credit_balances) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN balance.monthly_credits + balance.extra_credits - balance.credits_used - balance.credits_held - balance.credits_lent;
COMMENT ON FUNCTION keyvault._credits_left(keyvault.credit_balances) IS
    'Credits neither used nor held, negative after a downgrade; NULL is unlimited.';

CREATE FUNCTION keyvault._split_balance(user_id text, amount numeric) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    slots constant integer := 32;
    worthwhile constant integer := 64;
    balance keyvault.credit_balances;
    part numeric(18,6);
BEGIN
    SELECT * INTO balance FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot = 0 FOR NO KEY UPDATE;
    -- No more than what can go before the next threshold, and a quarter stays with slot 0, for holds.
    part := trunc(least(keyvault._credits_left(balance), balance.notice_at - balance.credits_used) * 0.75 / slots, 6);
    IF balance.credits_lent > 0 OR part < worthwhile * amount THEN
        RETURN;
    END IF;
    UPDATE keyvault.credit_balances b
       SET credits_lent = coalesce(part * slots, 1), notice_at = b.notice_at - part * slots
     WHERE b.user_id = $1 AND b.slot = 0;
    INSERT INTO keyvault.credit_balances (user_id, slot, monthly_credits, period_anchor, period_start, period_end, due_at)
    SELECT $1, s, part, balance.period_anchor, balance.period_start, balance.period_end, balance.due_at
      FROM generate_series(1, slots) s;
END $$;
COMMENT ON FUNCTION keyvault._split_balance(text, numeric) IS
    'Lends parts of what a user has left to further slots, so that sessions that debit it at once need not wait for each other''s commit; nothing where the parts would be small beside amount.';

CREATE FUNCTION keyvault._debit_split(user_id text, amount numeric, as_hold boolean = false) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances;
    used numeric;
    parts numeric;
BEGIN
    SELECT * INTO balance FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot = 0 FOR NO KEY UPDATE;
    IF NOT FOUND OR balance.credits_lent = 0 OR balance.due_at <= now() THEN
        RETURN false;
    END IF;
    WITH free AS MATERIALIZED (
        SELECT b.slot FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot > 0 ORDER BY b.slot FOR UPDATE SKIP LOCKED
    ), gathered AS (
        DELETE FROM keyvault.credit_balances b USING free f WHERE b.user_id = $1 AND b.slot = f.slot
        RETURNING b.credits_used, b.monthly_credits)
    SELECT coalesce(sum(g.credits_used), 0), coalesce(sum(g.monthly_credits), 0) INTO used, parts FROM gathered g;
    balance.credits_used := balance.credits_used + used;
    balance.notice_at := balance.notice_at + parts;
    PERFORM FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot > 0;
    balance.credits_lent := CASE WHEN FOUND THEN balance.credits_lent - parts ELSE 0 END;
    IF keyvault._credits_left(balance) < amount OR (NOT as_hold AND balance.credits_used + amount > balance.notice_at) THEN
        amount := NULL;
    END IF;
    UPDATE keyvault.credit_balances b
       SET credits_used = balance.credits_used + CASE WHEN as_hold THEN 0 ELSE coalesce(amount, 0) END,
           credits_held = balance.credits_held + CASE WHEN as_hold THEN coalesce(amount, 0) ELSE 0 END,
           credits_lent = balance.credits_lent, notice_at = balance.notice_at
     WHERE b.user_id = $1 AND b.slot = 0;
    RETURN amount IS NOT NULL;
END $$;
COMMENT ON FUNCTION keyvault._debit_split(text, numeric, boolean) IS
    'Debits slot 0 of a split balance, or adds to what it holds, with the room of the further slots that nobody is changing, which end; false where that does not do. Waits for no further slot, as whoever changes one may be waiting for slot 0.';

-- Everything but the fast debit, and a hold that finds room without, reads and changes a balance through _lock_balance, and so through _gather_slots.

CREATE FUNCTION keyvault._gather_slots(user_id text) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances;
    used numeric;
BEGIN
    SELECT * INTO balance FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot = 0 FOR NO KEY UPDATE;
    IF balance.credits_lent > 0 THEN
        -- A statement of its own: its snapshot sees the slots that were made while this one waited for the lock.
        WITH slots AS MATERIALIZED (
            SELECT b.slot FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot > 0 ORDER BY b.slot FOR UPDATE
        ), gathered AS (
            DELETE FROM keyvault.credit_balances b USING slots s WHERE b.user_id = $1 AND b.slot = s.slot RETURNING b.credits_used)
        SELECT coalesce(sum(g.credits_used), 0) INTO used FROM gathered g;
        UPDATE keyvault.credit_balances b
           SET credits_used = b.credits_used + used, notice_at = b.notice_at + b.credits_lent, credits_lent = 0
         WHERE b.user_id = $1 AND b.slot = 0
        RETURNING b.* INTO balance;
    END IF;
    RETURN balance;
END $$;
COMMENT ON FUNCTION keyvault._gather_slots(text) IS
    'Locks a user''s slots in order, makes them one again, slot 0, and returns it; NULL for a user without a balance.';

CREATE FUNCTION keyvault._slots_are_free(balance keyvault.credit_balances) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF balance.credits_lent > 0 THEN
        PERFORM FROM keyvault.credit_balances b WHERE b.user_id = balance.user_id AND b.slot > 0 ORDER BY b.slot FOR UPDATE NOWAIT;
    END IF;
    RETURN true;
EXCEPTION
    WHEN lock_not_available THEN
        RETURN false;
END $$;
COMMENT ON FUNCTION keyvault._slots_are_free(keyvault.credit_balances) IS
    'Locks the further slots of a balance whose slot 0 is locked, where nobody else is changing one: then _gather_slots does not wait. For whoever holds other users'' balances as well.';

CREATE FUNCTION keyvault._next_notice(balance keyvault.credit_balances) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM keyvault.credit_budgets g WHERE g.user_id = balance.user_id) THEN
        RETURN -1;
    END IF;
    RETURN (SELECT min(t.at) - 0.000001
              FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan, unnest(p.notice_percents) percent,
                   round((balance.monthly_credits + balance.extra_credits) * percent / 100, 6) t(at)
             WHERE u.user_id = balance.user_id AND t.at > balance.credits_used);
END $$;
COMMENT ON FUNCTION keyvault._next_notice(keyvault.credit_balances) IS
    'credit_balances.notice_at of a balance: just below its next threshold, -1 for a user with budgets, NULL for none.';

CREATE FUNCTION keyvault._note_thresholds(balance keyvault.credit_balances) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO keyvault.credit_notices (user_id, period_start, percent, credits_used, credits_limit)
    SELECT balance.user_id, balance.period_start, percent, balance.credits_used, balance.monthly_credits + balance.extra_credits
      FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan, unnest(p.notice_percents) percent
     WHERE u.user_id = balance.user_id AND balance.credits_used > 0
       AND balance.credits_used >= round((balance.monthly_credits + balance.extra_credits) * percent / 100, 6)
    ON CONFLICT DO NOTHING;
END $$;
COMMENT ON FUNCTION keyvault._note_thresholds(keyvault.credit_balances) IS
    'Notes the thresholds that a balance has reached in its period and that were not noted yet.';

CREATE FUNCTION keyvault._save_balance(balance keyvault.credit_balances) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM keyvault._note_thresholds(balance);
    balance.notice_at := keyvault._next_notice(balance);
    balance.due_at := (SELECT least(balance.period_end, min(g.expires_at))
                         FROM keyvault.credit_grants g WHERE g.user_id = balance.user_id AND g.remaining > 0);
    UPDATE keyvault.credit_balances b
       SET monthly_credits = balance.monthly_credits, extra_credits = balance.extra_credits, credits_used = balance.credits_used,
           credits_held = balance.credits_held, period_start = balance.period_start, period_end = balance.period_end,
           due_at = balance.due_at, notice_at = balance.notice_at, credits_covered = balance.credits_covered,
           extra_spent = balance.extra_spent, credits_overage = balance.credits_overage
     WHERE b.user_id = balance.user_id AND b.slot = 0;
    RETURN balance;
END $$;
COMMENT ON FUNCTION keyvault._save_balance(keyvault.credit_balances) IS
    'Writes a changed balance, whose row the caller has locked, with the thresholds it reached, its due_at and notice_at.';

CREATE FUNCTION keyvault._close_stretch(balance keyvault.credit_balances, plan text, ended_by text, ended_at timestamptz, overage numeric)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    INSERT INTO keyvault.credit_periods (user_id, ended_by, plan, period_start, period_end, ended_at, monthly_credits,
                                         credits_covered, credits_used, extra_spent, overage)
    VALUES (balance.user_id, $3, $2, balance.period_start, balance.period_end, $4, balance.monthly_credits,
            balance.credits_covered, balance.credits_used, balance.extra_spent, $5);
END $$;
COMMENT ON FUNCTION keyvault._close_stretch(keyvault.credit_balances, text, text, timestamptz, numeric) IS
    'Leaves a row in credit_periods. The balance''s grants have paid what they owe.';

CREATE FUNCTION keyvault._overage(balance keyvault.credit_balances) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN coalesce(greatest(balance.credits_used - balance.monthly_credits - balance.extra_spent, 0), 0);
COMMENT ON FUNCTION keyvault._overage(keyvault.credit_balances) IS
    'Credits used beyond plan and grants that credit_periods has not yet, of a balance whose grants have paid what they owe.';

CREATE FUNCTION keyvault._catch_up(balance keyvault.credit_balances) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    u keyvault.users;
    number integer;
BEGIN
    -- Grants pay first, in their order, then expire: nothing was debited since the first of them expired.
    balance := keyvault._expire_grants(keyvault._spend_extra(balance));
    IF balance.period_end <= now() THEN
        SELECT * INTO STRICT u FROM keyvault.users WHERE user_id = balance.user_id;
        IF balance.credits_used > 0 OR balance.extra_spent > 0 THEN
            PERFORM keyvault._close_stretch(balance, u.plan, 'period', balance.period_end, keyvault._overage(balance));
        END IF;
        number := keyvault._period_number(balance.period_anchor, now());
        balance.extra_credits := balance.extra_credits - balance.extra_spent;
        balance.extra_spent := 0;
        balance.credits_used := 0;
        balance.credits_covered := 0;
        balance.credits_overage := 0;
        SELECT coalesce(u.monthly_credits, p.monthly_credits) INTO balance.monthly_credits FROM keyvault.plans p WHERE p.plan = u.plan;
        IF NOT FOUND THEN
            PERFORM keyvault._refuse_missing_plan(u.plan);
        END IF;
        balance.period_start := keyvault._period_bound(balance.period_anchor, number);
        balance.period_end := keyvault._period_bound(balance.period_anchor, number + 1);
    END IF;
    RETURN keyvault._save_balance(balance);
END $$;
COMMENT ON FUNCTION keyvault._catch_up(keyvault.credit_balances) IS
    'Does for a locked balance what is due, and returns it: grants that have expired end, and when its period has, the one that contains now() begins: usage at zero, what grants paid for taken off, the monthly credits renewed.';

CREATE FUNCTION keyvault._lock_balance(user_id text, may_create boolean) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances := keyvault._gather_slots($1);
BEGIN
    IF balance.user_id IS NULL THEN
        PERFORM keyvault._ensure_user($1, may_create);
        balance := keyvault._gather_slots($1);
        IF balance.user_id IS NULL THEN
            PERFORM keyvault._refuse_missing_plan(u.plan) FROM keyvault.users u WHERE u.user_id = $1;
        END IF;
    END IF;
    IF balance.due_at <= now() THEN
        balance := keyvault._catch_up(balance);
    END IF;
    RETURN balance;
END $$;
COMMENT ON FUNCTION keyvault._lock_balance(text, boolean) IS
    'Locks a user''s balance, after making the user where allowed, does what is due, and returns the row. Errors: 22023, 42704 a plan that is not there.';

CREATE FUNCTION keyvault._refuse_credits(balance keyvault.credit_balances, amount numeric) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'credit limit reached for user "%"', balance.user_id
        USING ERRCODE = 'KV001',
              DETAIL = format('%s credits asked for; %s left of %s monthly and %s extra, with %s used and %s held.',
                              trim_scale(amount),
                              trim_scale(greatest(keyvault._credits_left(balance), 0)),
                              trim_scale(balance.monthly_credits), trim_scale(balance.extra_credits),
                              trim_scale(balance.credits_used), trim_scale(balance.credits_held)),
              HINT = format('Credits are renewed at %s; a larger plan, set with keyvault.set_plan(), applies at once.',
                            to_char(balance.period_end AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI "UTC"'));
END $$;
COMMENT ON FUNCTION keyvault._refuse_credits(keyvault.credit_balances, numeric) IS 'Raises KV001 with what was asked for, what is left and when credits are renewed.';

CREATE FUNCTION keyvault._require_credits(user_id text, amount numeric, may_create boolean) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances := keyvault._lock_balance($1, may_create);
BEGIN
    -- What costs nothing is not refused, whatever is left.
    IF amount > 0 AND keyvault._credits_left(balance) < amount AND balance.credits_held > 0 THEN
        balance := keyvault._sweep_holds($1);
    END IF;
    IF amount > 0 AND keyvault._credits_left(balance) < amount AND NOT keyvault._reports_overage($1) THEN
        PERFORM keyvault._refuse_credits(balance, amount);
    END IF;
    RETURN balance;
END $$;
COMMENT ON FUNCTION keyvault._require_credits(text, numeric, boolean) IS
    'Locks a user''s balance, sees that amount is left, with no expired hold in the way, or that the plan lets it go beyond, and returns it. Errors: KV001, 22023.';

CREATE FUNCTION keyvault._reports_overage(user_id text) RETURNS boolean
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN EXISTS (SELECT FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan
                    WHERE u.user_id = $1 AND p.overage = 'report');
END $$;
COMMENT ON FUNCTION keyvault._reports_overage(text) IS 'True when a user''s plan debits beyond the limit.';

CREATE FUNCTION keyvault._debit_slow(user_id text, amount numeric, may_create boolean) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances;
BEGIN
    IF keyvault._debit_split($1, amount) THEN
        RETURN;
    END IF;
    balance := keyvault._require_credits($1, amount, may_create);
    IF balance.notice_at < 0 THEN
        PERFORM keyvault._charge_budgets($1);
    END IF;
    balance.credits_used := balance.credits_used + amount;
    IF balance.notice_at < 0 OR balance.credits_used > balance.notice_at THEN
        PERFORM keyvault._save_balance(balance);
    ELSE
        UPDATE keyvault.credit_balances b SET credits_used = balance.credits_used
         WHERE b.user_id = $1 AND b.slot = 0;
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._debit_slow(text, numeric, boolean) IS
    'The debit where one comparison did not do: a missing user, an ended period, expired holds or grants, a threshold, budgets, overage. Errors: KV001, 22023.';

CREATE FUNCTION keyvault._reset_due_credits(batch integer) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    plain keyvault.credit_balances[];
    others keyvault.credit_balances[];
    balance keyvault.credit_balances;
    done bigint;
BEGIN
    IF batch IS NULL OR batch < 1 THEN
        RAISE EXCEPTION 'batch must be 1 or more' USING ERRCODE = 'invalid_parameter_value', HINT = 'Leave it out for 10000.';
    END IF;
    -- Whoever holds a balance does what is due itself. Without slots, grants and budgets that is little.
    SELECT array_agg(d.b) FILTER (WHERE p.is_plain), array_agg(d.b) FILTER (WHERE NOT p.is_plain) INTO plain, others
      FROM (SELECT b FROM keyvault.credit_balances b
             WHERE b.slot = 0 AND b.due_at <= now() AND EXISTS (SELECT FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan WHERE u.user_id = b.user_id)
             ORDER BY b.due_at LIMIT batch FOR NO KEY UPDATE SKIP LOCKED) d
     CROSS JOIN LATERAL (SELECT (d.b).credits_lent = 0 AND (d.b).extra_credits = 0 AND (d.b).extra_spent = 0
                                AND coalesce((d.b).notice_at, 0) >= 0) p(is_plain);
    WITH begun AS MATERIALIZED (
        SELECT d.*, u.plan, keyvault._period_number(d.period_anchor, now()) AS number,
               coalesce(u.monthly_credits, p.monthly_credits) AS renewed, p.notice_percents
          FROM unnest(plain) d JOIN keyvault.users u ON u.user_id = d.user_id JOIN keyvault.plans p ON p.plan = u.plan
    ), closed AS (
        INSERT INTO keyvault.credit_periods (user_id, ended_by, plan, period_start, period_end, ended_at, monthly_credits,
                                             credits_covered, credits_used, extra_spent, overage)
        SELECT n.user_id, 'period', n.plan, n.period_start, n.period_end, n.period_end, n.monthly_credits,
               n.credits_covered, n.credits_used, 0, coalesce(greatest(n.credits_used - n.monthly_credits, 0), 0)
          FROM begun n WHERE n.credits_used > 0)
    UPDATE keyvault.credit_balances b
       SET credits_used = 0, credits_covered = 0, credits_overage = 0, monthly_credits = n.renewed,
           period_start = keyvault._period_bound(n.period_anchor, n.number),
           period_end = keyvault._period_bound(n.period_anchor, n.number + 1),
           due_at = keyvault._period_bound(n.period_anchor, n.number + 1),
           notice_at = (SELECT min(t.at) - 0.000001
                          FROM unnest(n.notice_percents) percent, round(n.renewed * percent / 100, 6) t(at) WHERE t.at > 0)
      FROM begun n
     WHERE b.user_id = n.user_id AND b.slot = 0;
    done := coalesce(cardinality(plain), 0);
    FOREACH balance IN ARRAY coalesce(others, '{}') LOOP
        -- Whoever is changing a slot may be waiting for another balance of this batch: its user's next debit does what is due.
        IF keyvault._slots_are_free(balance) THEN
            PERFORM keyvault._lock_balance(balance.user_id, false);
            done := done + 1;
        END IF;
    END LOOP;
    RETURN done;
END $$;
COMMENT ON FUNCTION keyvault._reset_due_credits(integer) IS 'reset_due_credits, after its caller was checked.';
