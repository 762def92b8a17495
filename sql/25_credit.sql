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
COMMENT ON COLUMN keyvault.credit_balances.credits_covered IS 'The part of monthly_credits that an earlier, larger plan of the same period paid for.';
COMMENT ON COLUMN keyvault.credit_balances.extra_spent IS 'The part of extra_credits that was taken from grants in this period already.';
COMMENT ON COLUMN keyvault.credit_balances.period_anchor IS 'Period n begins at period_anchor + n months, in UTC.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_balances', '');

CREATE TABLE keyvault.credit_holds (
    user_id    text COLLATE "C" NOT NULL,
    id         uuid NOT NULL DEFAULT keyvault.uuidv7(),
    amount     numeric(18,6) NOT NULL CHECK (amount >= 0 AND amount < 'Infinity'),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (user_id, id)
);
COMMENT ON TABLE keyvault.credit_holds IS 'Credits set aside for calls whose cost is not known yet; a row goes when it is settled or released.';
COMMENT ON COLUMN keyvault.credit_holds.expires_at IS 'From then on the hold no longer counts; infinity while its request is queued or running.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_holds', '');

ALTER TABLE keyvault.credit_balances ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.credit_balances FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.credit_balances FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));
ALTER TABLE keyvault.credit_holds ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.credit_holds FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.credit_holds FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

CREATE FUNCTION keyvault._period_bound(anchor timestamptz, number integer) RETURNS timestamptz
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN ((anchor AT TIME ZONE 'UTC') + make_interval(months => number)) AT TIME ZONE 'UTC';
COMMENT ON FUNCTION keyvault._period_bound(timestamptz, integer) IS
    'When period number begins: anchor + number months in UTC, each computed from the anchor, so that the 31st comes back after a short month.';

CREATE FUNCTION keyvault._period_number(anchor timestamptz, at timestamptz) RETURNS integer
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT m.months - (keyvault._period_bound(anchor, m.months) > at)::integer
      FROM (SELECT ((extract(year FROM at AT TIME ZONE 'UTC') - extract(year FROM anchor AT TIME ZONE 'UTC')) * 12
                   + extract(month FROM at AT TIME ZONE 'UTC') - extract(month FROM anchor AT TIME ZONE 'UTC'))::integer AS months) m;
END;
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
    INSERT INTO keyvault.credit_balances (user_id, monthly_credits, period_anchor, period_start, period_end, due_at)
    SELECT u.user_id, p.monthly_credits, a.anchor, a.anchor, keyvault._period_bound(a.anchor, 1), keyvault._period_bound(a.anchor, 1)
      FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan, date_trunc('day', now(), 'UTC') a(anchor)
     WHERE u.user_id = $1
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        PERFORM keyvault._wake_worker();
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._create_balance(text) IS
    'Gives a user a balance where there is none: the plan''s credits, in periods that begin at midnight UTC today.';

-- plpgsql where SQL would do: it keeps its plans, and these run for every call.

CREATE FUNCTION keyvault._roll_period(user_id text) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances;
BEGIN
    UPDATE keyvault.credit_balances b
       SET extra_credits = CASE WHEN b.monthly_credits IS NULL THEN b.extra_credits
                                ELSE greatest(b.extra_credits - greatest(b.credits_used - b.monthly_credits, 0), 0) END,
           credits_used = 0,
           monthly_credits = p.monthly_credits,
           period_start = keyvault._period_bound(b.period_anchor, keyvault._period_number(b.period_anchor, now())),
           period_end = keyvault._period_bound(b.period_anchor, keyvault._period_number(b.period_anchor, now()) + 1),
           due_at = keyvault._period_bound(b.period_anchor, keyvault._period_number(b.period_anchor, now()) + 1)
      FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan
     WHERE b.user_id = $1 AND b.slot = 0 AND u.user_id = b.user_id
    RETURNING b.* INTO STRICT balance;
    RETURN balance;
END $$;
COMMENT ON FUNCTION keyvault._roll_period(text) IS
    'Begins the period that contains now() and returns the balance: usage starts at zero, extra credits spent beyond the plan are taken off, the plan''s monthly credits are renewed. The caller holds the balance''s row lock, and its period has ended.';

CREATE FUNCTION keyvault._sweep_holds(user_id text) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances;
BEGIN
    WITH expired AS (
        DELETE FROM keyvault.credit_holds h
         WHERE h.user_id = $1 AND h.expires_at <= now()
        RETURNING h.amount)
    UPDATE keyvault.credit_balances b
       SET credits_held = greatest(b.credits_held - (SELECT coalesce(sum(e.amount), 0) FROM expired e), 0)
     WHERE b.user_id = $1 AND b.slot = 0
    RETURNING b.* INTO STRICT balance;
    RETURN balance;
END $$;
COMMENT ON FUNCTION keyvault._sweep_holds(text) IS
    'Takes a user''s expired holds off the balance, and returns it. The caller holds the balance''s row lock.';

CREATE FUNCTION keyvault._credits_left(balance keyvault.credit_balances) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN balance.monthly_credits + balance.extra_credits - balance.credits_used - balance.credits_held - balance.credits_lent;
COMMENT ON FUNCTION keyvault._credits_left(keyvault.credit_balances) IS
    'Credits neither used nor held, negative after a downgrade; NULL is unlimited.';

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

-- Everything but the fast debit reads and changes a balance through _lock_balance, and so through _gather_slots.

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
        UPDATE keyvault.credit_balances b SET credits_used = b.credits_used + used, credits_lent = 0
         WHERE b.user_id = $1 AND b.slot = 0
        RETURNING b.* INTO balance;
    END IF;
    RETURN balance;
END $$;
COMMENT ON FUNCTION keyvault._gather_slots(text) IS
    'Locks a user''s slots in order, makes them one again, slot 0, and returns it; NULL for a user without a balance.';

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
    END IF;
    IF balance.due_at <= now() THEN
        balance := keyvault._roll_period($1);
    END IF;
    RETURN balance;
END $$;
COMMENT ON FUNCTION keyvault._lock_balance(text, boolean) IS
    'Locks a user''s balance, after making the user where allowed, begins a due period, and returns the row. Error: 22023.';

CREATE FUNCTION keyvault._require_credits(user_id text, amount numeric, may_create boolean) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances := keyvault._lock_balance($1, may_create);
BEGIN
    IF keyvault._credits_left(balance) < amount AND balance.credits_held > 0 THEN
        balance := keyvault._sweep_holds($1);
    END IF;
    IF keyvault._credits_left(balance) < amount THEN
        PERFORM keyvault._refuse_credits(balance, amount);
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._require_credits(text, numeric, boolean) IS
    'Locks a user''s balance and sees that amount is left, with no expired hold in the way. Errors: KV001, 22023.';

CREATE FUNCTION keyvault._debit_slow(user_id text, amount numeric, may_create boolean) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM keyvault._require_credits($1, amount, may_create);
    UPDATE keyvault.credit_balances b SET credits_used = b.credits_used + amount
     WHERE b.user_id = $1 AND b.slot = 0;
END $$;
COMMENT ON FUNCTION keyvault._debit_slow(text, numeric, boolean) IS
    'The debit when one conditional update did not find room: a missing user, an ended period or expired holds are put right first. Errors: KV001, 22023.';

CREATE FUNCTION keyvault._hold_credits(user_id text, amount numeric, expires_at timestamptz, may_create boolean) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    hold uuid := keyvault.uuidv7();
BEGIN
    PERFORM keyvault._require_credits($1, amount, may_create);
    UPDATE keyvault.credit_balances b SET credits_held = b.credits_held + amount
     WHERE b.user_id = $1 AND b.slot = 0;
    INSERT INTO keyvault.credit_holds (user_id, id, amount, expires_at) VALUES ($1, hold, amount, expires_at);
    RETURN hold;
END $$;
COMMENT ON FUNCTION keyvault._hold_credits(text, numeric, timestamptz, boolean) IS
    'Sets credits aside until expires_at and returns the hold''s id. Errors: KV001, 22023.';

CREATE FUNCTION keyvault._release_hold(user_id text, hold uuid) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    released numeric;
BEGIN
    -- The balance is locked before the hold, in the order of every other path.
    PERFORM keyvault._gather_slots($1);
    DELETE FROM keyvault.credit_holds h WHERE h.user_id = $1 AND h.id = hold RETURNING h.amount INTO released;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE keyvault.credit_balances b SET credits_held = greatest(b.credits_held - released, 0)
     WHERE b.user_id = $1 AND b.slot = 0;
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._release_hold(text, uuid) IS 'Gives a hold back to its user''s balance; false when there is no such hold.';
