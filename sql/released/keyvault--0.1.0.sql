-- keyvault: make concatenates the parts in sql/; edit those, not the result.
\echo Use "CREATE EXTENSION keyvault CASCADE" to load this file. \quit

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
-- Who is asking. The identity is the setting keyvault.user_id, which only
-- these functions, or a role with SET privilege on it, can change.

CREATE FUNCTION keyvault.current_user_id() RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_current_user_id';
COMMENT ON FUNCTION keyvault.current_user_id() IS
    'The user_id this transaction acts as, or NULL when there is none.';

CREATE FUNCTION keyvault.act_as(user_id text) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_act_as';
COMMENT ON FUNCTION keyvault.act_as(text) IS
    'Trusted application: acts as user_id until the transaction or savepoint that called it ends, and returns it; NULL acts as nobody. Errors: 42501 without SET privilege on keyvault.user_id, 22023 for an empty or overlong user_id (255 bytes).';

CREATE FUNCTION keyvault._may_act_for_any_user() RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN pg_catalog.has_parameter_privilege('keyvault.user_id', 'SET');
COMMENT ON FUNCTION keyvault._may_act_for_any_user() IS
    'True when the current role may act for any user: it holds SET privilege on the parameter keyvault.user_id.';

-- EXECUTE on a marker function is the access itself, so that grants stay the one source
-- of truth and pg_dump carries them.
CREATE FUNCTION keyvault._app() RETURNS void LANGUAGE sql IMMUTABLE PARALLEL SAFE BEGIN ATOMIC END;
COMMENT ON FUNCTION keyvault._app() IS 'Does nothing; EXECUTE on it is access app.';
CREATE FUNCTION keyvault._user() RETURNS void LANGUAGE sql IMMUTABLE PARALLEL SAFE BEGIN ATOMIC END;
COMMENT ON FUNCTION keyvault._user() IS 'Does nothing; EXECUTE on it is access user.';
CREATE FUNCTION keyvault._analyst() RETURNS void LANGUAGE sql IMMUTABLE PARALLEL SAFE BEGIN ATOMIC END;
COMMENT ON FUNCTION keyvault._analyst() IS 'Does nothing; EXECUTE on it is access analyst: it reads every user''s usage.';
CREATE FUNCTION keyvault._admin() RETURNS void LANGUAGE sql IMMUTABLE PARALLEL SAFE BEGIN ATOMIC END;
COMMENT ON FUNCTION keyvault._admin() IS 'Does nothing; EXECUTE on it is access admin: it reads every user''s account and the metadata of keys.';

CREATE FUNCTION keyvault._may_administer() RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN pg_catalog.has_function_privilege('keyvault._admin()', 'EXECUTE');
COMMENT ON FUNCTION keyvault._may_administer() IS 'True when the current role has access admin.';

CREATE FUNCTION keyvault._may_read_all_usage() RETURNS boolean
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN pg_catalog.has_function_privilege('keyvault._analyst()', 'EXECUTE') OR keyvault._may_administer();
COMMENT ON FUNCTION keyvault._may_read_all_usage() IS 'True when the current role has access analyst or admin.';
-- Plans and users.

CREATE TABLE keyvault.plans (
    plan            text COLLATE "C" PRIMARY KEY CHECK (plan ~ '^[a-z][a-z0-9_-]{0,62}$'),
    monthly_credits numeric(18,6) CHECK (monthly_credits >= 0 AND monthly_credits < 'Infinity'),
    price_usd       numeric(12,2) CHECK (price_usd >= 0 AND price_usd < 'Infinity'),
    credits_per_usd numeric(18,6) NOT NULL DEFAULT 1000 CHECK (credits_per_usd >= 0 AND credits_per_usd < 'Infinity'),
    own_key_rate    numeric(9,6) NOT NULL DEFAULT 0 CHECK (own_key_rate >= 0 AND own_key_rate < 'Infinity'),
    seeded          boolean NOT NULL DEFAULT false
);
COMMENT ON TABLE keyvault.plans IS 'What a user may spend in a month, and what provider cost is worth in credits.';
COMMENT ON COLUMN keyvault.plans.monthly_credits IS 'Credits per period; NULL is unlimited. A change reaches each user at the next period or set_plan.';
COMMENT ON COLUMN keyvault.plans.price_usd IS 'What the plan costs its user per month, in USD; NULL where it is negotiated.';
COMMENT ON COLUMN keyvault.plans.credits_per_usd IS 'Credits debited per USD of provider cost: cost, infrastructure and margin together.';
COMMENT ON COLUMN keyvault.plans.own_key_rate IS 'Part of those credits debited when the call used the user''s own key; 0 is free.';
COMMENT ON COLUMN keyvault.plans.seeded IS 'Shipped with the extension and not changed since.';

INSERT INTO keyvault.plans (plan, monthly_credits, price_usd, seeded) VALUES
    ('free', 1000, 0, true),
    ('pro', 50000, 20, true),
    ('enterprise', NULL, NULL, true);

CREATE TRIGGER keep_customized BEFORE INSERT OR UPDATE ON keyvault.plans
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_customized('{plan}');
SELECT pg_catalog.pg_extension_config_dump('keyvault.plans', 'WHERE NOT seeded');

CREATE FUNCTION keyvault._keep_used_plan() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- A seed that gives way to an inserted row of the same name is replaced, not deleted.
    IF pg_trigger_depth() > 1 OR (TG_OP = 'UPDATE' AND NEW.plan = OLD.plan) THEN
        RETURN coalesce(NEW, OLD);
    END IF;
    IF OLD.plan = 'free' OR EXISTS (SELECT FROM keyvault.users u WHERE u.plan = OLD.plan) THEN
        RAISE EXCEPTION 'plan "%" is in use', OLD.plan
            USING ERRCODE = 'dependent_objects_still_exist',
                  HINT = 'Move its users with keyvault.set_plan() first; plan free is every new user''s.';
    END IF;
    RETURN coalesce(NEW, OLD);
END $$;
COMMENT ON FUNCTION keyvault._keep_used_plan() IS 'Trigger of plans: refuses with 2BP01 to delete or rename one that users are on.';
CREATE TRIGGER keep_used_plan BEFORE UPDATE OR DELETE ON keyvault.plans
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_used_plan();

CREATE TABLE keyvault.users (
    user_id text COLLATE "C" PRIMARY KEY CHECK (octet_length(user_id) BETWEEN 1 AND 255),
    kind    text NOT NULL DEFAULT 'person' CHECK (kind IN ('person', 'organization')),
    email   text,
    name    text,
    image   text,
    email_verified_at timestamptz,
    plan    text COLLATE "C" NOT NULL DEFAULT 'free',
    status  text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'erased')),
    stripe_customer_id        text,
    stripe_subscription_id    text,
    stripe_price_id           text,
    stripe_current_period_end timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE keyvault.users IS 'Who owns keys and credits: a person or an organization, named by the application.';
COMMENT ON COLUMN keyvault.users.user_id IS 'The application''s own name for the user: 1 to 255 bytes, never changed.';
COMMENT ON COLUMN keyvault.users.status IS 'active; suspended: no calls; erased: keys destroyed.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.users', '');

ALTER TABLE keyvault.users ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_row ON keyvault.users FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.users FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

-- Row locks are taken in one order everywhere: users, then credit_balances, then credit_holds.

CREATE FUNCTION keyvault._ensure_user(user_id text, may_create boolean) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF EXISTS (SELECT FROM keyvault.credit_balances b WHERE b.user_id = $1) THEN
        RETURN;
    END IF;
    IF NOT may_create OR NOT current_setting('keyvault.create_users')::boolean THEN
        RAISE EXCEPTION 'user "%" does not exist', $1
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Create it with keyvault.upsert_user(), or write as a trusted application with keyvault.create_users on.';
    END IF;
    INSERT INTO keyvault.users (user_id) VALUES ($1) ON CONFLICT DO NOTHING;
    PERFORM keyvault._create_balance($1);
END $$;
COMMENT ON FUNCTION keyvault._ensure_user(text, boolean) IS
    'Makes a user that does not exist yet, on plan free, if it may be created. Error: 22023.';

CREATE FUNCTION keyvault._upsert_user(user_id text, email text, name text, image text, plan text) RETURNS text
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO keyvault.users AS u (user_id, email, name, image)
    VALUES ($1, $2, $3, $4)
    ON CONFLICT (user_id) DO UPDATE
       SET email = coalesce($2, u.email), name = coalesce($3, u.name), image = coalesce($4, u.image), updated_at = now();
    PERFORM keyvault._create_balance($1);
    IF $5 IS NOT NULL THEN
        PERFORM keyvault._set_plan($1, $5);
    END IF;
    RETURN $1;
END $$;
COMMENT ON FUNCTION keyvault._upsert_user(text, text, text, text, text) IS 'upsert_user, after its caller was checked.';

CREATE FUNCTION keyvault.upsert_user(user_id text, email text = NULL, name text = NULL, image text = NULL, plan text = NULL) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_upsert_user';
COMMENT ON FUNCTION keyvault.upsert_user(text, text, text, text, text) IS
    'Makes a user, on plan free unless plan names another, or changes the fields given (NULL leaves a field as it is); returns user_id. Errors: 42501 without the right to act for any user or access admin, 22023 for an unknown plan or a bad user_id.';

CREATE FUNCTION keyvault._set_plan(user_id text, plan text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    credits numeric;
BEGIN
    SELECT p.monthly_credits INTO credits FROM keyvault.plans p WHERE p.plan = $2;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown plan "%"', $2
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = format('Known plans: %s. An administrator adds one with INSERT INTO keyvault.plans.',
                                (SELECT string_agg(p.plan, ', ' ORDER BY p.plan) FROM keyvault.plans p));
    END IF;
    UPDATE keyvault.users u SET plan = $2, updated_at = now() WHERE u.user_id = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'user "%" does not exist', $1
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Create it with keyvault.upsert_user().';
    END IF;
    PERFORM keyvault._lock_balance($1, false);
    UPDATE keyvault.credit_balances b SET monthly_credits = credits WHERE b.user_id = $1;
END $$;
COMMENT ON FUNCTION keyvault._set_plan(text, text) IS 'set_plan, after its caller was checked.';

CREATE FUNCTION keyvault.set_plan(user_id text, plan text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_set_plan';
COMMENT ON FUNCTION keyvault.set_plan(text, text) IS
    'Puts a user on a plan at once: its monthly credits count from now, what was used this period stays used. Errors: 42501, 22023 for an unknown user or plan.';
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
    PRIMARY KEY (user_id, slot)
) WITH (fillfactor = 70);
COMMENT ON TABLE keyvault.credit_balances IS
    'The hot row of each user''s credits, changed by the debit on usage_records. fillfactor leaves room for heap-only updates.';
COMMENT ON COLUMN keyvault.credit_balances.slot IS 'Part of the balance; one part, 0, per user.';
COMMENT ON COLUMN keyvault.credit_balances.monthly_credits IS 'The plan''s credits for this period; NULL is unlimited.';
COMMENT ON COLUMN keyvault.credit_balances.extra_credits IS 'Credits beyond the plan: spent after the monthly ones, kept at a reset.';
COMMENT ON COLUMN keyvault.credit_balances.credits_used IS 'Credits debited since period_start.';
COMMENT ON COLUMN keyvault.credit_balances.credits_held IS 'Sum of credit_holds, expired ones included until credits run short, which sweeps them.';
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
    INSERT INTO keyvault.credit_balances (user_id, monthly_credits, period_anchor, period_start, period_end)
    SELECT u.user_id, p.monthly_credits, a.anchor, a.anchor, keyvault._period_bound(a.anchor, 1)
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
           period_end = keyvault._period_bound(b.period_anchor, keyvault._period_number(b.period_anchor, now()) + 1)
      FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan
     WHERE b.user_id = $1 AND u.user_id = b.user_id
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
    RETURN balance.monthly_credits + balance.extra_credits - balance.credits_used - balance.credits_held;
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

CREATE FUNCTION keyvault._lock_balance(user_id text, may_create boolean) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances;
BEGIN
    SELECT * INTO balance FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot = 0 FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM keyvault._ensure_user($1, may_create);
        SELECT * INTO STRICT balance FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot = 0 FOR NO KEY UPDATE;
    END IF;
    IF balance.period_end <= now() THEN
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
    PERFORM FROM keyvault.credit_balances b WHERE b.user_id = $1 AND b.slot = 0 FOR NO KEY UPDATE;
    DELETE FROM keyvault.credit_holds h WHERE h.user_id = $1 AND h.id = hold RETURNING h.amount INTO released;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE keyvault.credit_balances b SET credits_held = greatest(b.credits_held - released, 0)
     WHERE b.user_id = $1 AND b.slot = 0;
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._release_hold(text, uuid) IS 'Gives a hold back to its user''s balance; false when there is no such hold.';
-- What was used. The rows are the truth; balances are proved from them.

CREATE FUNCTION keyvault._debit_tag() RETURNS bigint
    LANGUAGE c STABLE PARALLEL RESTRICTED
    AS 'MODULE_PATHNAME', 'keyvault_debit_tag';
COMMENT ON FUNCTION keyvault._debit_tag() IS
    'A number that names this transaction of this cluster, the default of usage_records.debit_tag.';

-- No CHECK stands here, nor on the other tables that every call writes: PostgreSQL parses and
-- plans each of them anew for each statement, which costs more than the debit. The row
-- trigger checks the same in C, with SQLSTATE 23514.
CREATE TABLE keyvault.usage_records (
    user_id         text COLLATE "C" NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    id              uuid NOT NULL DEFAULT keyvault.uuidv7(),
    type            text NOT NULL DEFAULT 'api',
    provider        text,
    model           text,
    payer           text NOT NULL DEFAULT 'platform',
    input_tokens    bigint,
    cached_tokens   bigint,
    output_tokens   bigint,
    tokens          bigint NOT NULL DEFAULT 0,
    credits         numeric(18,6) NOT NULL DEFAULT 0,
    credits_overrun numeric(18,6) NOT NULL DEFAULT 0,
    cost_usd        numeric(18,9) NOT NULL DEFAULT 0,
    request_id      uuid,
    api_key_id      uuid,
    issued_key_id   uuid,
    idempotency_key text,
    metadata        jsonb NOT NULL DEFAULT '{}',
    debit_tag       bigint NOT NULL DEFAULT keyvault._debit_tag(),
    PRIMARY KEY (user_id, created_at, id)
) PARTITION BY RANGE (created_at);
COMMENT ON TABLE keyvault.usage_records IS
    'One row per use, append-only. An INSERT debits credits from the user''s balance in the same transaction, or fails with KV001. Partitioned by month of created_at, in UTC.';
COMMENT ON COLUMN keyvault.usage_records.type IS 'chat, api, automation, or the application''s own word of 1 to 63 bytes.';
COMMENT ON COLUMN keyvault.usage_records.payer IS 'Whose key was used: user, its own, or platform.';
COMMENT ON COLUMN keyvault.usage_records.input_tokens IS 'Tokens read, cached ones included.';
COMMENT ON COLUMN keyvault.usage_records.cached_tokens IS 'The part of input_tokens that came from the provider''s cache.';
COMMENT ON COLUMN keyvault.usage_records.output_tokens IS 'Tokens written, reasoning included.';
COMMENT ON COLUMN keyvault.usage_records.tokens IS 'All tokens together.';
COMMENT ON COLUMN keyvault.usage_records.credits IS 'Credits debited by this row.';
COMMENT ON COLUMN keyvault.usage_records.credits_overrun IS 'Credits a provider call cost beyond what the user had left; not debited.';
COMMENT ON COLUMN keyvault.usage_records.cost_usd IS 'What the provider charges for it, in USD.';
COMMENT ON COLUMN keyvault.usage_records.debit_tag IS
    'Names the transaction that debited the row. A row that arrives with another transaction''s tag, by pg_restore or logical replication, is not debited again.';

CREATE TABLE keyvault.usage_records_default PARTITION OF keyvault.usage_records DEFAULT;
COMMENT ON TABLE keyvault.usage_records_default IS 'Usage of months that have no partition of their own.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.usage_records_default', '');

ALTER TABLE keyvault.usage_records ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.usage_records FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.usage_records FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));
CREATE POLICY record_for_any_user ON keyvault.usage_records FOR INSERT
    WITH CHECK ((SELECT keyvault._may_act_for_any_user()));
ALTER TABLE keyvault.usage_records_default ENABLE ROW LEVEL SECURITY;

-- The row trigger, which every partition inherits, adds up per user; the statement trigger
-- debits each user once, in user_id order. A partition needs a statement trigger of its own
-- for rows inserted into it by name.
CREATE FUNCTION keyvault._collect_debit() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_collect_debit';
COMMENT ON FUNCTION keyvault._collect_debit() IS 'Row trigger of usage_records: checks the row, and adds its credits to what its statement owes. Error: 23514.';

CREATE FUNCTION keyvault._flush_debits() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_flush_debits';
COMMENT ON FUNCTION keyvault._flush_debits() IS 'Statement trigger of usage_records: debits what its statement owes. Errors: KV001, 22023.';

CREATE FUNCTION keyvault._refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'usage records are append-only'
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = 'Correct a record with a further one; retire old months by detaching their partition.';
END $$;
COMMENT ON FUNCTION keyvault._refuse_change() IS 'Trigger that refuses UPDATE, DELETE and TRUNCATE of usage_records with 55000.';

CREATE TRIGGER collect_debit AFTER INSERT ON keyvault.usage_records
    FOR EACH ROW EXECUTE FUNCTION keyvault._collect_debit();
ALTER TABLE keyvault.usage_records ENABLE ALWAYS TRIGGER collect_debit;
CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE ON keyvault.usage_records
    FOR EACH ROW EXECUTE FUNCTION keyvault._refuse_change();
ALTER TABLE keyvault.usage_records ENABLE ALWAYS TRIGGER refuse_change;

CREATE FUNCTION keyvault._guard_partition(partition regclass) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER flush_debits AFTER INSERT ON %s EXECUTE FUNCTION keyvault._flush_debits()', partition);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER flush_debits', partition);
    EXECUTE format('CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON %s EXECUTE FUNCTION keyvault._refuse_change()', partition);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER refuse_truncate', partition);
END $$;
COMMENT ON FUNCTION keyvault._guard_partition(regclass) IS
    'Gives a table of usage records the statement triggers, which partitions do not inherit.';
SELECT keyvault._guard_partition('keyvault.usage_records');
SELECT keyvault._guard_partition('keyvault.usage_records_default');

CREATE FUNCTION keyvault._make_usage_partitions(ahead integer = 3) RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    month timestamptz;
    partition text;
    made integer := 0;
BEGIN
    FOR i IN 0 .. ahead LOOP
        month := keyvault._period_bound(date_trunc('month', now(), 'UTC'), i);
        partition := 'usage_records_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM');
        -- A month whose first rows are in the default partition stays there.
        IF to_regclass('keyvault.' || partition) IS NULL
           AND NOT EXISTS (SELECT FROM keyvault.usage_records_default
                            WHERE created_at >= month AND created_at < keyvault._period_bound(month, 1))
        THEN
            EXECUTE format('CREATE TABLE keyvault.%I PARTITION OF keyvault.usage_records FOR VALUES FROM (%L) TO (%L)',
                           partition, month, keyvault._period_bound(month, 1));
            EXECUTE format('COMMENT ON TABLE keyvault.%I IS %L', partition,
                           'Usage of the month that begins at ' || to_char(month AT TIME ZONE 'UTC', 'YYYY-MM-DD') || ' UTC.');
            EXECUTE format('ALTER TABLE keyvault.%I ENABLE ROW LEVEL SECURITY', partition);
            EXECUTE format('REVOKE ALL ON keyvault.%I FROM PUBLIC', partition);
            PERFORM keyvault._guard_partition(format('keyvault.%I', partition)::regclass);
            made := made + 1;
        END IF;
    END LOOP;
    RETURN made;
END $$;
COMMENT ON FUNCTION keyvault._make_usage_partitions(integer) IS
    'Makes the partitions of usage_records for this month, where it has no rows yet, and the months ahead; returns how many were made. The worker calls it.';
-- Users' provider keys and what encrypts them.

CREATE TABLE keyvault.vault (
    vault_id   uuid PRIMARY KEY,
    only_row   boolean NOT NULL DEFAULT true UNIQUE CHECK (only_row),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE keyvault.vault IS
    'The vault''s own name, made when the first key is stored and part of every secret''s associated data. One row.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.vault', '');

CREATE TABLE keyvault.master_keys (
    kek_id     bytea PRIMARY KEY CHECK (octet_length(kek_id) = 16),
    version    integer NOT NULL UNIQUE CHECK (version > 0),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE keyvault.master_keys IS
    'Master keys that have wrapped data keys of this vault, known by an id derived from the key, never the key itself.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.master_keys', '');

CREATE TABLE keyvault.data_keys (
    user_id     text COLLATE "C" NOT NULL,
    version     integer NOT NULL CHECK (version > 0),
    data_key_id uuid NOT NULL,
    wrapped     bytea NOT NULL CHECK (octet_length(wrapped) BETWEEN 36 AND 1024),
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, version)
);
ALTER TABLE keyvault.data_keys ALTER COLUMN wrapped SET STORAGE PLAIN;
COMMENT ON TABLE keyvault.data_keys IS 'Each user''s data key, wrapped by a master key. The user '''' is the platform.';
COMMENT ON COLUMN keyvault.data_keys.wrapped IS 'D | 1 | suite | source | master key version (4) | kek_id (16) | nonce (12) | wrapped key (32) | tag (16).';
SELECT pg_catalog.pg_extension_config_dump('keyvault.data_keys', '');

CREATE FUNCTION keyvault._forget_data_keys() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_forget_data_keys';
COMMENT ON FUNCTION keyvault._forget_data_keys() IS
    'Trigger of data_keys: has every process forget the data keys that it keeps unwrapped.';
CREATE TRIGGER forget_data_keys AFTER UPDATE OR DELETE OR TRUNCATE ON keyvault.data_keys
    EXECUTE FUNCTION keyvault._forget_data_keys();
ALTER TABLE keyvault.data_keys ENABLE ALWAYS TRIGGER forget_data_keys;

CREATE TABLE keyvault.api_keys (
    user_id      text COLLATE "C" NOT NULL,
    id           uuid NOT NULL,
    provider     text COLLATE "C" NOT NULL,
    name         text COLLATE "C" NOT NULL DEFAULT 'default' CHECK (octet_length(name) BETWEEN 1 AND 63),
    ciphertext   bytea NOT NULL CHECK (octet_length(ciphertext) BETWEEN 100 AND 8192),
    hint         text NOT NULL,
    fingerprint  bytea NOT NULL CHECK (octet_length(fingerprint) = 16),
    source       text NOT NULL DEFAULT 'user' CHECK (source IN ('user', 'platform')),
    status       text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'failed')),
    expires_at   timestamptz,
    last_used_at timestamptz,
    last_verified_at timestamptz,
    rotated_at   timestamptz,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, id),
    CONSTRAINT api_keys_user_id_provider_name_key UNIQUE (user_id, provider, name)
);
ALTER TABLE keyvault.api_keys ALTER COLUMN ciphertext SET STORAGE EXTERNAL;
COMMENT ON TABLE keyvault.api_keys IS 'Provider keys that users handed over, encrypted. The user '''' is the platform.';
COMMENT ON COLUMN keyvault.api_keys.ciphertext IS 'Secret record: see "Formats" in doc/keyvault.md.';
COMMENT ON COLUMN keyvault.api_keys.hint IS 'Enough of the key for its owner to recognise it: at most three first and four last characters.';
COMMENT ON COLUMN keyvault.api_keys.fingerprint IS 'Keyed hash under the user''s own data key: equal for equal keys of one user and provider, and only there.';
COMMENT ON COLUMN keyvault.api_keys.status IS 'active; failed: the provider refused it when it was last used.';
COMMENT ON COLUMN keyvault.api_keys.rotated_at IS 'When the value last changed.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.api_keys', '');

ALTER TABLE keyvault.vault ENABLE ROW LEVEL SECURITY;
ALTER TABLE keyvault.data_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE keyvault.api_keys ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.api_keys FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.api_keys FOR SELECT
    USING ((SELECT keyvault._may_administer()));

CREATE FUNCTION keyvault.store_api_key(provider text, key text, name text = 'default', user_id text = NULL, expires_at timestamptz = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_api_key';
COMMENT ON FUNCTION keyvault.store_api_key(text, text, text, text, timestamptz) IS
    'Encrypts and keeps a user''s key for a provider, replacing the one of the same name; returns its id. Pass the key as a bind parameter. Errors: KV004 no master key, KV005 the user''s data key cannot be opened, KV009 malformed key, 22004 and 22023 bad argument, 40001 retry, 42501 not allowed to act for user_id.';

CREATE FUNCTION keyvault.store_platform_key(provider text, key text, name text = 'default') RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_platform_key';
COMMENT ON FUNCTION keyvault.store_platform_key(text, text, text) IS
    'Encrypts and keeps the platform''s own key for a provider, used for users who bring none; returns its id. Access admin. Errors: KV004, KV009, 22023.';

CREATE FUNCTION keyvault.user_api_keys(user_id text = NULL) RETURNS jsonb
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_user_api_keys';
COMMENT ON FUNCTION keyvault.user_api_keys(text) IS
    'The user''s keys named ''default'' as {"provider": "key"}, {} when there is none; NULL is the acting user. Expired keys are left out; one that cannot be opened is left out with a warning KV005. Errors: KV004, KV005 the user''s data key cannot be opened, 42501.';

CREATE FUNCTION keyvault.user_api_key(provider text, user_id text = NULL, name text = 'default') RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_user_api_key';
COMMENT ON FUNCTION keyvault.user_api_key(text, text, text) IS
    'The user''s key for a provider, NULL when there is none or it has expired. Errors: KV004, KV005 it cannot be opened, 22023 unknown provider, 42501.';

CREATE FUNCTION keyvault.delete_api_key(provider text, name text = 'default', user_id text = NULL) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_delete_api_key';
COMMENT ON FUNCTION keyvault.delete_api_key(text, text, text) IS
    'Deletes a user''s key; true if there was one. Old row versions leave the disk with VACUUM, WAL and backups with their retention, encrypted all the while. Errors: 22023, 42501.';

CREATE VIEW keyvault.api_key_status WITH (security_invoker = true, security_barrier = true) AS
SELECT k.user_id, k.provider, k.name, k.hint, k.status, k.source, k.id,
       k.expires_at, k.last_used_at, k.last_verified_at, k.rotated_at, k.created_at,
       coalesce(m.calls, 0) AS calls_this_month,
       coalesce(m.cost_usd, 0) AS cost_usd_this_month
  FROM keyvault.api_keys k
  LEFT JOIN LATERAL (
       SELECT count(*) AS calls, sum(r.cost_usd) AS cost_usd
         FROM keyvault.usage_records r
        WHERE r.user_id = k.user_id AND r.api_key_id = k.id
          AND r.created_at >= date_trunc('month', now(), 'UTC')) m ON true;
COMMENT ON VIEW keyvault.api_key_status IS
    'The acting user''s keys without their values: hint, status and this month''s calls (UTC). Access admin sees every user''s.';
-- Providers and what their models cost.

CREATE TABLE keyvault.providers (
    provider     text COLLATE "C" PRIMARY KEY CHECK (provider ~ '^[a-z][a-z0-9_-]{0,62}$'),
    base_url     text NOT NULL CHECK (base_url ~ '^https?://[!-~]+$' AND base_url !~ '[?#@]'),
    dialect      text NOT NULL DEFAULT 'json' CHECK (dialect IN ('openai', 'anthropic', 'gemini', 'json')),
    default_path text CHECK (default_path ~ '^/[!-~]*$'),
    platform_paths text[] NOT NULL DEFAULT '{}',
    auth_header  text NOT NULL DEFAULT 'Authorization' CHECK (auth_header ~ '^[A-Za-z0-9-]{1,64}$'),
    auth_scheme  text CHECK (auth_scheme ~ '^[A-Za-z0-9-]{1,32}$'),
    headers      jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(headers) = 'object' AND NOT jsonb_path_exists(headers,
                 '$.keyvalue() ? (@.value.type() != "string" || !(@.value like_regex "^[ -~]*$") || !(@.key like_regex "^[A-Za-z0-9-]+$"))')),
    env_variable text CHECK (env_variable ~ '^[A-Z][A-Z0-9_]{0,62}$'),
    key_pattern  text,
    test_path    text CHECK (test_path ~ '^/[!-~]*$'),
    allowed_host text,
    usd_per_request numeric(18,9) NOT NULL DEFAULT 0.01 CHECK (usd_per_request >= 0 AND usd_per_request < 'Infinity'),
    seeded       boolean NOT NULL DEFAULT false
);
COMMENT ON TABLE keyvault.providers IS 'How each provider is reached. Add a row for a provider of your own.';
COMMENT ON COLUMN keyvault.providers.dialect IS 'How requests are authenticated and answers read: openai, anthropic, gemini, or json for any JSON API.';
COMMENT ON COLUMN keyvault.providers.default_path IS 'Path of a request that names none; {model} stands for the model.';
COMMENT ON COLUMN keyvault.providers.platform_paths IS
    'Paths that may be called with the platform''s key, {model} standing for the model; empty for any. A user''s own key may call any.';
COMMENT ON COLUMN keyvault.providers.auth_header IS 'The header that carries the key.';
COMMENT ON COLUMN keyvault.providers.auth_scheme IS 'The word before the key in that header, such as Bearer; NULL for the bare key.';
COMMENT ON COLUMN keyvault.providers.headers IS 'Further headers of every request, {"name": "value"}.';
COMMENT ON COLUMN keyvault.providers.env_variable IS 'The environment variable the provider''s own SDK reads its key from.';
COMMENT ON COLUMN keyvault.providers.key_pattern IS 'A regular expression that a key must match, besides 8 to 512 printable ASCII characters.';
COMMENT ON COLUMN keyvault.providers.test_path IS 'A path whose GET answers 200 to a good key and costs nothing.';
COMMENT ON COLUMN keyvault.providers.allowed_host IS
    'An administrator''s exception: this host, or host:port, may be called over plain http and at a private or loopback address.';
COMMENT ON COLUMN keyvault.providers.usd_per_request IS 'Cost of a call for which neither the answer nor model_prices states one, in USD.';

-- key_pattern refuses only what is recognisably another provider's key: no vendor promises a shape for its own.
INSERT INTO keyvault.providers
    (provider, base_url, dialect, default_path, platform_paths, auth_header, auth_scheme, headers, env_variable, key_pattern, test_path, seeded)
VALUES
    ('openai', 'https://api.openai.com', 'openai', '/v1/chat/completions', '{/v1/chat/completions,/v1/responses,/v1/embeddings}', 'Authorization', 'Bearer', '{}',
     'OPENAI_API_KEY', '^(?!sk-ant-|AIza|xai-|gsk_)', '/v1/models', true),
    ('anthropic', 'https://api.anthropic.com', 'anthropic', '/v1/messages', '{/v1/messages}', 'x-api-key', NULL, '{"anthropic-version": "2023-06-01"}',
     'ANTHROPIC_API_KEY', '^(?!sk-proj-|AIza|xai-|gsk_)', '/v1/models', true),
    ('gemini', 'https://generativelanguage.googleapis.com', 'gemini', '/v1beta/models/{model}:generateContent',
     ARRAY['/v1beta/models/{model}:generateContent', '/v1beta/models/{model}:embedContent', '/v1beta/models/{model}:batchEmbedContents'], 'x-goog-api-key', NULL, '{}',
     'GEMINI_API_KEY', '^(?!sk-ant-|sk-proj-|xai-|gsk_)', '/v1beta/models', true),
    ('exa', 'https://api.exa.ai', 'json', '/search', '{/search,/contents,/answer,/findSimilar}', 'x-api-key', NULL, '{}', 'EXA_API_KEY', NULL, NULL, true),
    ('copilotkit', 'https://api.cloud.copilotkit.ai', 'json', NULL, '{}', 'X-CopilotCloud-Public-Api-Key', NULL, '{}',
     'COPILOTKIT_API_KEY', NULL, NULL, true),
    ('mistral', 'https://api.mistral.ai', 'openai', '/v1/chat/completions', '{/v1/chat/completions,/v1/embeddings}', 'Authorization', 'Bearer', '{}',
     'MISTRAL_API_KEY', NULL, '/v1/models', true),
    ('cohere', 'https://api.cohere.ai/compatibility', 'openai', '/v1/chat/completions', '{/v1/chat/completions,/v1/embeddings}', 'Authorization', 'Bearer', '{}',
     'COHERE_API_KEY', NULL, NULL, true),
    ('groq', 'https://api.groq.com/openai', 'openai', '/v1/chat/completions', '{/v1/chat/completions}', 'Authorization', 'Bearer', '{}',
     'GROQ_API_KEY', NULL, '/v1/models', true),
    ('deepseek', 'https://api.deepseek.com', 'openai', '/chat/completions', '{/chat/completions}', 'Authorization', 'Bearer', '{}',
     'DEEPSEEK_API_KEY', NULL, '/models', true),
    ('xai', 'https://api.x.ai', 'openai', '/v1/chat/completions', '{/v1/chat/completions}', 'Authorization', 'Bearer', '{}',
     'XAI_API_KEY', NULL, '/v1/models', true);

CREATE TRIGGER keep_customized BEFORE INSERT OR UPDATE ON keyvault.providers
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_customized('{provider}');
SELECT pg_catalog.pg_extension_config_dump('keyvault.providers', 'WHERE NOT seeded');

CREATE TABLE keyvault.model_prices (
    provider      text COLLATE "C" NOT NULL,
    model         text COLLATE "C" NOT NULL,
    valid_from    timestamptz NOT NULL DEFAULT '-infinity',
    input_usd_per_mtok        numeric(18,9) NOT NULL CHECK (input_usd_per_mtok >= 0 AND input_usd_per_mtok < 'Infinity'),
    output_usd_per_mtok       numeric(18,9) NOT NULL CHECK (output_usd_per_mtok >= 0 AND output_usd_per_mtok < 'Infinity'),
    cached_input_usd_per_mtok numeric(18,9) CHECK (cached_input_usd_per_mtok >= 0 AND cached_input_usd_per_mtok < 'Infinity'),
    context_window integer CHECK (context_window > 0),
    source        text,
    seeded        boolean NOT NULL DEFAULT false,
    PRIMARY KEY (provider, model, valid_from)
);
COMMENT ON TABLE keyvault.model_prices IS 'What providers charge per million tokens, in USD; the row with the latest valid_from that has come counts.';
COMMENT ON COLUMN keyvault.model_prices.cached_input_usd_per_mtok IS 'For input tokens from the provider''s cache; NULL: as fresh ones.';
COMMENT ON COLUMN keyvault.model_prices.source IS 'Where the figures come from.';

INSERT INTO keyvault.model_prices
    (provider, model, input_usd_per_mtok, output_usd_per_mtok, cached_input_usd_per_mtok, context_window, source, seeded)
VALUES
    ('openai', 'gpt-6-astra', 10, 50, 1, 1050000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 271999 tokens', true),
    ('openai', 'gpt-6-sol', 2, 10, 0.2, 1050000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 272000 tokens', true),
    ('openai', 'gpt-6-luna', 0.1, 0.5, 0.01, 1050000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 272000 tokens', true),
    ('openai', 'gpt-5.6-sol', 4, 20, 0.4, 1050000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 271999 tokens', true),
    ('openai', 'gpt-5.6-terra', 2, 12, 0.2, 1050000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 271999 tokens', true),
    ('openai', 'gpt-5.6-luna', 0.2, 1.2, 0.02, 1050000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 271999 tokens', true),
    ('openai', 'gpt-5.5-pro', 30, 180, NULL, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees; long-context tier over 271999 tokens', true),
    ('openai', 'gpt-5.5', 5, 30, 0.5, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees; long-context tier over 271999 tokens', true),
    ('openai', 'gpt-5.4', 2.5, 15, 0.25, 1050000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees; long-context tier over 271999 tokens', true),
    ('openai', 'gpt-5.4-mini', 0.75, 4.5, 0.075, 400000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-5.4-nano', 0.2, 1.25, 0.02, 400000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-5.3-codex', 1.75, 14, 0.175, 400000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-5.2', 1.75, 14, 0.175, 400000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-5.1', 1.25, 10, 0.125, 400000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-5', 1.25, 10, 0.125, 400000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-5-mini', 0.25, 2, 0.025, 400000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-5-nano', 0.05, 0.4, 0.005, 400000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'o3', 2, 8, 0.5, 200000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'o3-mini', 1.1, 4.4, 0.55, 200000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'o4-mini', 1.1, 4.4, 0.275, 200000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-4.1', 2, 8, 0.5, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-4.1-mini', 0.4, 1.6, 0.1, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-4.1-nano', 0.1, 0.4, 0.025, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-4o', 2.5, 10, 1.25, 128000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'gpt-4o-mini', 0.15, 0.6, 0.075, 128000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'text-embedding-3-large', 0.13, 0, NULL, 8192, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('openai', 'text-embedding-3-small', 0.02, 0, NULL, 8192, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-fable-5-1', 10, 50, 0.25, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('anthropic', 'claude-fable-5', 10, 50, 1, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-opus-5-5', 4, 20, 0.2, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('anthropic', 'claude-opus-5', 5, 25, 0.5, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('anthropic', 'claude-sonnet-5', 2, 10, 0.2, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-opus-4-8', 5, 25, 0.5, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-opus-4-7', 5, 25, 0.5, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-opus-4-6', 5, 25, 0.5, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-opus-4-5', 5, 25, 0.5, 200000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-sonnet-4-6', 3, 15, 0.3, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-sonnet-4-5', 3, 15, 0.3, 200000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees; long-context tier over 200000 tokens', true),
    ('anthropic', 'claude-haiku-4-5', 1, 5, 0.1, 200000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('anthropic', 'claude-opus-4-1', 15, 75, 1.5, 200000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('gemini', 'gemini-3.8-flash', 0.75, 3.75, 0.075, 1000000, 'genai-prices 0.1.8 (2026-09-23); changes 2027-01-01', true),
    ('gemini', 'gemini-3.7-flash', 0.75, 3.75, 0.075, 1000000, 'genai-prices 0.1.8 (2026-09-23); changes 2027-01-01', true),
    ('gemini', 'gemini-3.6-flash', 0.75, 3.75, 0.075, 1000000, 'genai-prices 0.1.8 (2026-09-23); changes 2027-01-01', true),
    ('gemini', 'gemini-3.5-flash', 1.5, 9, 0.15, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('gemini', 'gemini-3.5-flash-lite', 0.3, 2.5, 0.03, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('gemini', 'gemini-3.1-pro-preview', 2, 12, 0.2, 1048576, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees; long-context tier over 200000 tokens', true),
    ('gemini', 'gemini-3.1-flash-lite', 0.25, 1.5, 0.025, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('gemini', 'gemini-3-flash-preview', 0.5, 3, 0.05, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('gemini', 'gemini-2.5-pro', 1.25, 10, 0.125, 1048576, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees; long-context tier over 200000 tokens', true),
    ('gemini', 'gemini-2.5-flash', 0.3, 2.5, 0.03, 1048576, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('gemini', 'gemini-2.5-flash-lite', 0.1, 0.4, 0.01, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('gemini', 'gemini-embedding-2', 0.2, 0, NULL, 8192, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('gemini', 'gemini-embedding-001', 0.15, 0, NULL, 2048, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('mistral', 'mistral-large-2512', 0.5, 1.5, 0.05, 262144, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('mistral', 'mistral-medium-3-5', 1.5, 7.5, 0.15, 262144, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('mistral', 'mistral-small-2603', 0.15, 0.6, 0.015, 262144, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('mistral', 'ministral-14b-2512', 0.2, 0.2, 0.02, 262144, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('mistral', 'ministral-8b-2512', 0.15, 0.15, 0.015, 262144, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('mistral', 'ministral-3b-2512', 0.1, 0.1, 0.01, 131072, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('mistral', 'codestral-2508', 0.3, 0.9, 0.03, 256000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('mistral', 'mistral-embed', 0.1, 0, NULL, 8192, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('cohere', 'command-a-03-2025', 2.5, 10, NULL, 256000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('cohere', 'command-r-plus-08-2024', 2.5, 10, NULL, 128000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('cohere', 'command-r-08-2024', 0.15, 0.6, NULL, 128000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('cohere', 'command-r7b-12-2024', 0.0375, 0.15, NULL, 128000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('cohere', 'embed-v4.0', 0.12, 0, NULL, 128000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('groq', 'openai/gpt-oss-120b', 0.15, 0.6, 0.075, 131072, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('groq', 'openai/gpt-oss-20b', 0.075, 0.3, 0.0375, 131072, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('groq', 'llama-3.3-70b-versatile', 0.59, 0.79, NULL, 131072, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('groq', 'llama-3.1-8b-instant', 0.05, 0.08, NULL, 131072, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('groq', 'meta-llama/llama-4-scout-17b-16e-instruct', 0.11, 0.34, NULL, 131072, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('groq', 'qwen/qwen3-32b', 0.29, 0.59, NULL, 131072, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees', true),
    ('deepseek', 'deepseek-v4-pro', 0.66, 1.98, 0.022, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) had 0.435/0.87; peak hours cost more', true),
    ('deepseek', 'deepseek-v4-flash', 0.22, 0.66, 0.007, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) had 0.14/0.28; peak hours cost more', true),
    ('xai', 'grok-4.6', 2, 6, 0.5, 500000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 199999 tokens', true),
    ('xai', 'grok-4.5', 2, 6, 0.3, 500000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 199999 tokens', true),
    ('xai', 'grok-4.3', 1.25, 2.5, 0.2, 1000000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees; long-context tier over 199999 tokens', true),
    ('xai', 'grok-4.20', 1.25, 2.5, 0.2, 1000000, 'genai-prices 0.1.8 (2026-09-23); long-context tier over 199999 tokens', true),
    ('xai', 'grok-build-0.1', 1, 2, 0.2, 256000, 'genai-prices 0.1.8 (2026-09-23); models.dev f3fc69229 (2026-07-02) agrees; long-context tier over 199999 tokens', true);

CREATE TRIGGER keep_customized BEFORE INSERT OR UPDATE ON keyvault.model_prices
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_customized('{provider,model,valid_from}');
SELECT pg_catalog.pg_extension_config_dump('keyvault.model_prices', 'WHERE NOT seeded');

CREATE FUNCTION keyvault._unknown_provider() RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'unknown provider'
        USING ERRCODE = 'invalid_parameter_value',
              HINT = format('Known providers: %s. A superuser adds one with INSERT INTO keyvault.providers (provider, base_url, ...).',
                            (SELECT string_agg(p.provider, ', ' ORDER BY p.provider) FROM keyvault.providers p));
END $$;
COMMENT ON FUNCTION keyvault._unknown_provider() IS
    'Raises 22023 with the providers that are known; what was asked for is not quoted, as it may be a key in the wrong place.';

CREATE FUNCTION keyvault._price_usd(provider text, model text, at timestamptz, input_tokens bigint, cached_tokens bigint, output_tokens bigint) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    family text := regexp_replace($2, '-([0-9]{8}|[0-9]{4}-[0-9]{2}-[0-9]{2}|latest)$', '');
    p keyvault.model_prices;
BEGIN
    SELECT * INTO p FROM keyvault.model_prices m
     WHERE m.provider = $1 AND m.model IN ($2, family) AND m.valid_from <= at
     ORDER BY m.model = $2 DESC, m.valid_from DESC
     LIMIT 1;
    RETURN round(((input_tokens - cached_tokens) * p.input_usd_per_mtok
                  + cached_tokens * coalesce(p.cached_input_usd_per_mtok, p.input_usd_per_mtok)
                  + output_tokens * p.output_usd_per_mtok) / 1000000, 9);
END $$;
COMMENT ON FUNCTION keyvault._price_usd(text, text, timestamptz, bigint, bigint, bigint) IS
    'What a call cost in USD by model_prices, NULL for a model without a price. A dated or "latest" name of a model counts as the model; cached_tokens are part of input_tokens.';
-- The durable queue of provider calls and their answers. The life of a request:
-- queued -> sent -> done | failed | unknown, or queued -> canceled; a retry goes back to queued.

CREATE TABLE keyvault.requests (
    user_id     text COLLATE "C" NOT NULL,
    id          uuid NOT NULL,
    provider    text COLLATE "C" NOT NULL,
    model       text,
    type        text NOT NULL,
    path        text NOT NULL,
    payer       text NOT NULL,
    api_key_id  uuid,
    call_key    bytea,
    status      text NOT NULL DEFAULT 'queued',
    attempts    integer NOT NULL DEFAULT 0,
    timeout_ms  integer NOT NULL,
    hold_id     uuid,
    estimated_usd numeric(18,9) NOT NULL,
    idempotency_key text COLLATE "C",
    queued_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    sent_at     timestamptz,
    finished_at timestamptz,
    error       text,
    metadata    jsonb NOT NULL DEFAULT '{}',
    body        jsonb NOT NULL,
    PRIMARY KEY (user_id, id),
    CONSTRAINT requests_idempotency_key UNIQUE (user_id, idempotency_key)
);
CREATE INDEX requests_open ON keyvault.requests (user_id, id) WHERE status IN ('queued', 'sent');
CREATE INDEX requests_id ON keyvault.requests (id);
COMMENT ON TABLE keyvault.requests IS 'Provider calls: the queue, and what became of each.';
COMMENT ON COLUMN keyvault.requests.status IS 'queued, sent, done, failed, unknown or canceled.';
COMMENT ON COLUMN keyvault.requests.payer IS 'user or platform.';
COMMENT ON COLUMN keyvault.requests.call_key IS 'A key for this call alone, sealed under a key that only this run of the server knows; gone when the request has ended.';
COMMENT ON COLUMN keyvault.requests.attempts IS 'How often the call was handed to the network; a late answer of an earlier attempt is not accepted.';
COMMENT ON COLUMN keyvault.requests.estimated_usd IS 'Upper estimate of the cost, held in credits; charged when an answer states no usage.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.requests', '');

CREATE TABLE keyvault.responses (
    user_id       text COLLATE "C" NOT NULL,
    id            uuid NOT NULL,
    status        text NOT NULL,
    status_code   integer,
    body          jsonb,
    error         text,
    model         text,
    input_tokens  bigint,
    cached_tokens bigint,
    output_tokens bigint,
    cost_usd      numeric(18,9) NOT NULL DEFAULT 0,
    credits       numeric(18,6) NOT NULL DEFAULT 0,
    payer         text NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, id)
);
ALTER TABLE keyvault.responses ALTER COLUMN body SET COMPRESSION lz4;
COMMENT ON TABLE keyvault.responses IS 'Answers to requests, written with their usage and debit in one transaction.';
COMMENT ON COLUMN keyvault.responses.id IS 'The request''s id.';
COMMENT ON COLUMN keyvault.responses.status IS 'done: a 2xx answer; failed: an error, or none will come; unknown: the call was sent and its answer lost; canceled: it was never sent.';
COMMENT ON COLUMN keyvault.responses.status_code IS 'HTTP status (RFC 9110), NULL without an answer.';
COMMENT ON COLUMN keyvault.responses.error IS 'What went wrong, for people; the provider''s own words are in body.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.responses', '');

ALTER TABLE keyvault.requests ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.requests FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
ALTER TABLE keyvault.responses ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.responses FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));

CREATE FUNCTION keyvault._estimate_usd(provider keyvault.providers, model text, body jsonb) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- The largest of what may be meant: which of them a provider heeds is its own affair.
    output_tokens bigint := (
        SELECT max(asked::bigint)
          FROM unnest(ARRAY[body ->> 'max_completion_tokens', body ->> 'max_output_tokens', body ->> 'max_tokens',
                            body #>> '{generationConfig,maxOutputTokens}']) asked
         WHERE asked ~ '^[0-9]{1,9}$');
    answers bigint := (
        SELECT max(asked::bigint)
          FROM unnest(ARRAY[body ->> 'n', body #>> '{generationConfig,candidateCount}']) asked
         WHERE asked ~ '^[0-9]{1,4}$');
BEGIN
    output_tokens := greatest(coalesce(output_tokens, 4096), 1) * greatest(coalesce(answers, 1), 1);
    -- A token is seldom shorter than three bytes of JSON text.
    RETURN coalesce(keyvault._price_usd(provider.provider, model, now(), octet_length(body::text) / 3, 0, output_tokens),
                    provider.usd_per_request);
END $$;
COMMENT ON FUNCTION keyvault._estimate_usd(keyvault.providers, text, jsonb) IS
    'An upper estimate of a call''s cost in USD: the body''s bytes / 3 as input, its output limit (4096 tokens without one) times the answers asked for as output.';

CREATE FUNCTION keyvault._choose_key(user_id text, provider text, key_name text, INOUT payer text, OUT api_key_id uuid)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    IF $4 IN ('auto', 'user') THEN
        SELECT k.id INTO api_key_id FROM keyvault.api_keys k
         WHERE k.user_id = $1 AND k.provider = $2 AND k.name = $3 AND (k.expires_at IS NULL OR k.expires_at > now());
        IF FOUND THEN
            payer := 'user';
            RETURN;
        END IF;
    END IF;
    IF $4 IN ('auto', 'platform') THEN
        SELECT k.id INTO api_key_id FROM keyvault.api_keys k
         WHERE k.user_id = '' AND k.provider = $2 AND k.name IN ($3, 'default')
           AND (k.expires_at IS NULL OR k.expires_at > now())
         ORDER BY k.name = $3 DESC LIMIT 1;
        IF FOUND THEN
            payer := 'platform';
            RETURN;
        END IF;
    END IF;
    RAISE EXCEPTION 'no API key for provider "%"', $2
        USING ERRCODE = 'KV003',
              DETAIL = CASE $4 WHEN 'user' THEN format('User "%s" has no valid key named "%s".', $1, $3)
                               WHEN 'platform' THEN 'The platform has no valid key.'
                               ELSE format('Neither user "%s" nor the platform has a valid key.', $1) END,
              HINT = CASE $4 WHEN 'platform' THEN 'Store one with keyvault.store_platform_key().'
                             ELSE 'Store one with keyvault.store_api_key().' END;
END $$;
COMMENT ON FUNCTION keyvault._choose_key(text, text, text, text) IS
    'Whose key a call uses, and which: the user''s own, else the platform''s, unless payer forces one. Error: KV003.';

CREATE FUNCTION keyvault._earlier_request(user_id text, idempotency_key text, provider text, path text, body jsonb) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    earlier keyvault.requests;
BEGIN
    SELECT * INTO earlier FROM keyvault.requests r WHERE r.user_id = $1 AND r.idempotency_key = $2;
    IF earlier.provider <> $3 OR earlier.path <> $4 OR earlier.body <> $5 THEN
        RAISE EXCEPTION 'idempotency key was already used for another request'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Use a new idempotency key for each different request.';
    END IF;
    RETURN earlier.id;
END $$;
COMMENT ON FUNCTION keyvault._earlier_request(text, text, text, text, jsonb) IS
    'The request that a user''s idempotency key stands for, NULL for none. Error: 22023 when it was a different one.';

CREATE FUNCTION keyvault._enqueue_request(
    user_id text, request_id uuid, provider text, body jsonb, path text, model text, payer text, call_key bytea,
    key_name text, idempotency_key text, timeout_ms integer, metadata jsonb, may_create boolean) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    p keyvault.providers;
    u keyvault.users;
    earlier uuid;
    the_model text := coalesce($6, $4 ->> 'model');
    the_body jsonb := $4;
    the_path text;
    key record;
    estimate numeric;
    hold uuid;
    owed numeric;
BEGIN
    SELECT * INTO p FROM keyvault.providers WHERE provider = $3;
    IF NOT FOUND THEN
        PERFORM keyvault._unknown_provider();
    END IF;
    IF jsonb_typeof($4) <> 'object' THEN
        RAISE EXCEPTION 'the body of a request must be a JSON object'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the body that the provider''s API reference describes.';
    END IF;
    IF $4 -> 'stream' = 'true' THEN
        RAISE EXCEPTION 'a request cannot be streamed'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Leave "stream" out of the body: the whole answer is stored when it is there.';
    END IF;
    IF $7 NOT IN ('auto', 'user', 'platform') THEN
        RAISE EXCEPTION 'payer must be auto, user or platform' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'auto uses the user''s own key if there is one, else the platform''s.';
    END IF;

    the_path := coalesce($5, p.default_path);
    IF the_path IS NULL OR the_path !~ '^/[!-~]*$' OR the_path ~ '(^|/)[.][.](/|$)|#' OR strpos(the_path, chr(92)) > 0 THEN
        RAISE EXCEPTION 'a request to provider "%" needs a path that begins with "/"', $3
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the path of the provider''s API, without its host.';
    END IF;
    IF the_path LIKE '%{model}%' THEN
        IF the_model IS NULL OR the_model !~ '^[A-Za-z0-9][A-Za-z0-9._-]*$' THEN
            RAISE EXCEPTION 'a request to provider "%" needs a model', $3
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass model => ''name''; letters, digits, ".", "_" and "-".';
        END IF;
        the_path := replace(the_path, '{model}', the_model);
        the_body := the_body - 'model';
    ELSIF $6 IS NOT NULL AND p.dialect <> 'json' THEN
        the_body := the_body || jsonb_build_object('model', $6);
    END IF;

    IF octet_length($10) NOT BETWEEN 1 AND 255 THEN
        RAISE EXCEPTION 'idempotency key must be 1 to 255 bytes long' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Leave it out for a request that may be repeated.';
    END IF;
    earlier := keyvault._earlier_request($1, $10, $3, the_path, the_body);
    IF earlier IS NOT NULL THEN
        RETURN earlier;
    END IF;

    PERFORM keyvault._ensure_user($1, $13);
    SELECT * INTO STRICT u FROM keyvault.users WHERE user_id = $1;
    IF u.status <> 'active' THEN
        RAISE EXCEPTION 'user "%" is %', $1, u.status
            USING ERRCODE = 'KV007', HINT = 'A superuser changes keyvault.users.status.';
    END IF;

    IF $8 IS NOT NULL THEN
        SELECT 'user' AS payer, NULL::uuid AS api_key_id INTO key;
    ELSE
        SELECT * INTO key FROM keyvault._choose_key($1, $3, $9, $7);
    END IF;
    IF key.payer = 'platform' AND p.platform_paths <> '{}'
       AND NOT EXISTS (SELECT FROM unnest(p.platform_paths) allowed
                       WHERE the_path ~ ('^' || replace(replace(allowed, '.', '[.]'), '{model}', '[A-Za-z0-9._-]+') || '$'))
    THEN
        RAISE EXCEPTION 'path is not open to calls with the platform''s key'
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'An administrator opens a path in keyvault.providers.platform_paths; a user''s own key may call any.';
    END IF;
    estimate := keyvault._estimate_usd(p, the_model, the_body);
    owed := keyvault._credits_owed(u.plan, key.payer, estimate);
    IF owed > 0 THEN
        hold := keyvault._hold_credits($1, owed, 'infinity', false);
    END IF;
    INSERT INTO keyvault.requests (user_id, id, provider, model, type, path, payer, api_key_id, call_key, timeout_ms,
                                   hold_id, estimated_usd, idempotency_key, metadata, body)
    VALUES ($1, $2, $3, the_model, CASE p.dialect WHEN 'json' THEN 'api' ELSE 'chat' END, the_path, key.payer, key.api_key_id, $8,
            $11, hold, estimate, $10, coalesce($12, '{}'), the_body)
    ON CONFLICT (user_id, idempotency_key) DO NOTHING;
    IF FOUND THEN
        RETURN $2;
    END IF;
    -- Another session was faster with the same idempotency key.
    PERFORM keyvault._release_hold($1, hold);
    earlier := keyvault._earlier_request($1, $10, $3, the_path, the_body);
    IF earlier IS NULL THEN
        RAISE EXCEPTION 'another transaction is using this idempotency key'
            USING ERRCODE = 'serialization_failure', HINT = 'Retry the transaction.';
    END IF;
    RETURN earlier;
END $$;
COMMENT ON FUNCTION keyvault._enqueue_request(text, uuid, text, jsonb, text, text, text, bytea, text, text, integer, jsonb, boolean) IS
    'request, after its caller was checked. Errors: 22023, 40001, 42501, KV001, KV003, KV007.';

CREATE FUNCTION keyvault._credits_owed(plan text, payer text, cost_usd numeric) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    p keyvault.plans;
BEGIN
    SELECT * INTO STRICT p FROM keyvault.plans WHERE plan = $1;
    RETURN least(round(cost_usd * p.credits_per_usd * CASE payer WHEN 'user' THEN p.own_key_rate ELSE 1 END, 6), 999999999999);
END $$;
COMMENT ON FUNCTION keyvault._credits_owed(text, text, numeric) IS 'What a cost in USD is in credits on a plan, by whose key was used.';

CREATE FUNCTION keyvault._claim_requests(capacity integer, per_user integer, after_user text)
    RETURNS TABLE (user_id text, id uuid, attempt integer, provider text, dialect text, base_url text, path text,
                   auth_header text, auth_scheme text, headers jsonb, allowed_host text, body text, timeout_ms integer,
                   payer text, api_key_id uuid, call_key bytea)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH RECURSIVE waiting AS (
        (SELECT r.user_id FROM keyvault.requests r
          WHERE r.status = 'queued' AND r.next_attempt_at <= clock_timestamp()
            AND r.user_id > after_user
          ORDER BY r.user_id LIMIT 1)
        UNION ALL
        (SELECT n.user_id FROM waiting w, LATERAL (
            SELECT r.user_id FROM keyvault.requests r
             WHERE r.status = 'queued' AND r.next_attempt_at <= clock_timestamp()
               AND r.user_id > w.user_id
             ORDER BY r.user_id LIMIT 1) n)
    ), turn AS MATERIALIZED (
        -- users who have no room do not take the turn of others
        SELECT w.user_id,
               per_user - (SELECT count(*) FROM keyvault.requests s WHERE s.user_id = w.user_id AND s.status = 'sent') AS room
          FROM waiting w
         WHERE (SELECT count(*) FROM keyvault.requests s WHERE s.user_id = w.user_id AND s.status = 'sent') < per_user
         LIMIT capacity
    ), claimed AS MATERIALIZED (
        SELECT c.user_id, c.id, c.provider
          FROM turn t, LATERAL (
            SELECT r.user_id, r.id, r.provider FROM keyvault.requests r
             WHERE r.user_id = t.user_id AND r.status = 'queued'
               AND r.next_attempt_at <= clock_timestamp()
             ORDER BY r.id
             LIMIT least(greatest(capacity / (SELECT count(*) FROM turn), 1), t.room)
               FOR UPDATE SKIP LOCKED) c
         LIMIT capacity
    )
    UPDATE keyvault.requests r
       SET status = 'sent', attempts = r.attempts + 1, sent_at = clock_timestamp()
      FROM claimed c LEFT JOIN keyvault.providers p ON p.provider = c.provider
     WHERE r.user_id = c.user_id AND r.id = c.id
    RETURNING r.user_id, r.id, r.attempts, r.provider, p.dialect, p.base_url, r.path, p.auth_header, p.auth_scheme,
              p.headers, p.allowed_host, r.body::text, r.timeout_ms, r.payer, r.api_key_id, r.call_key;
END $$;
COMMENT ON FUNCTION keyvault._claim_requests(integer, integer, text) IS
    'Marks up to capacity due requests as sent and returns what sending them takes: a share for each waiting user after after_user, oldest first, never more than per_user under way for one.';

CREATE FUNCTION keyvault._settle_request(
    user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, model text,
    input_tokens bigint, cached_tokens bigint, output_tokens bigint, stated_usd numeric, key_refused boolean) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
    balance keyvault.credit_balances;
    cost numeric := 0;
    owed numeric := 0;
    charged numeric := 0;
    held numeric;
BEGIN
    UPDATE keyvault.requests SET status = $4, finished_at = clock_timestamp(), error = $7, call_key = NULL
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3
    RETURNING * INTO r;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF $4 = 'done' OR $5 BETWEEN 200 AND 299 THEN
        -- An answer that does not say what it used is charged as estimated, never silently free.
        cost := least(coalesce($12, CASE WHEN $9 IS NOT NULL THEN
                    coalesce(keyvault._price_usd(r.provider, r.model, now(), $9, $10, $11),
                             keyvault._price_usd(r.provider, $8, now(), $9, $10, $11)) END, r.estimated_usd), 999999999);
        SELECT keyvault._credits_owed(u.plan, r.payer, cost) INTO owed FROM keyvault.users u WHERE u.user_id = $1;
    END IF;
    IF owed > 0 OR r.hold_id IS NOT NULL THEN
        balance := keyvault._lock_balance($1, false);
        IF $4 = 'unknown' THEN
            -- The provider may have charged for it: the credits stay set aside for a day.
            UPDATE keyvault.credit_holds SET expires_at = now() + interval '1 day' WHERE user_id = $1 AND id = r.hold_id;
        ELSE
            DELETE FROM keyvault.credit_holds WHERE user_id = $1 AND id = r.hold_id RETURNING amount INTO held;
            IF FOUND THEN
                UPDATE keyvault.credit_balances SET credits_held = greatest(credits_held - held, 0)
                 WHERE user_id = $1 AND slot = 0 RETURNING * INTO balance;
            END IF;
        END IF;
        IF keyvault._credits_left(balance) < owed AND balance.credits_held > 0 THEN
            balance := keyvault._sweep_holds($1);
        END IF;
        charged := least(owed, coalesce(greatest(keyvault._credits_left(balance), 0), owed));
    END IF;
    IF $4 = 'done' OR cost > 0 THEN
        INSERT INTO keyvault.usage_records (user_id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens,
                                            credits, credits_overrun, cost_usd, request_id, api_key_id, idempotency_key, metadata)
        VALUES ($1, r.type, r.provider, coalesce(r.model, $8), r.payer, $9, $10, $11, coalesce($9, 0) + coalesce($11, 0),
                charged, owed - charged, cost, $2, r.api_key_id, r.idempotency_key, r.metadata);
    END IF;
    INSERT INTO keyvault.responses (user_id, id, status, status_code, body, error, model, input_tokens, cached_tokens, output_tokens,
                                    cost_usd, credits, payer)
    VALUES ($1, $2, $4, $5, $6, $7, coalesce($8, r.model), $9, $10, $11, cost, charged, r.payer);
    -- One write a minute tells enough about a busy key, and its row is not fought over.
    UPDATE keyvault.api_keys k
       SET last_used_at = now(), status = CASE WHEN $13 THEN 'failed' ELSE 'active' END
     WHERE k.user_id = CASE r.payer WHEN 'user' THEN $1 ELSE '' END AND k.id = r.api_key_id AND $5 IS NOT NULL
       AND (k.last_used_at IS NULL OR k.last_used_at < now() - interval '1 minute'
            OR k.status <> CASE WHEN $13 THEN 'failed' ELSE 'active' END);
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._settle_request(text, uuid, integer, text, integer, jsonb, text, text, bigint, bigint, bigint, numeric, boolean) IS
    'Ends a sent request: answer, usage, price, debit and hold in one go. False, and nothing done, when that attempt is no longer the one under way.';

CREATE FUNCTION keyvault._retry_request(user_id text, id uuid, attempt integer, delay_ms integer, error text) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE keyvault.requests SET status = 'queued', next_attempt_at = clock_timestamp() + make_interval(secs => $4 / 1000.0), error = $5
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3;
    RETURN FOUND;
END $$;
COMMENT ON FUNCTION keyvault._retry_request(text, uuid, integer, integer, text) IS
    'Puts a sent request back into the queue, due after delay_ms; its hold stays.';

CREATE FUNCTION keyvault._abandon_request(user_id text, id uuid, attempt integer, error text) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE keyvault.requests SET status = 'unknown', finished_at = clock_timestamp(), error = $4, call_key = NULL
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO keyvault.responses (user_id, id, status, error, payer)
    SELECT r.user_id, r.id, r.status, r.error, r.payer FROM keyvault.requests r WHERE r.user_id = $1 AND r.id = $2
    ON CONFLICT DO NOTHING;
    UPDATE keyvault.credit_holds h SET expires_at = now() + interval '1 day'
      FROM keyvault.requests r WHERE r.user_id = $1 AND r.id = $2 AND h.user_id = $1 AND h.id = r.hold_id;
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._abandon_request(text, uuid, integer, text) IS
    'The last resort for a request that cannot be settled, because its user is gone for one: marks it unknown; its hold expires in a day.';

CREATE FUNCTION keyvault.request(
    provider text, body jsonb, path text = NULL, model text = NULL, user_id text = NULL, payer text = 'auto',
    api_key text = NULL, key_name text = 'default', idempotency_key text = NULL, timeout interval = '120 s',
    metadata jsonb = '{}') RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_request';
COMMENT ON FUNCTION keyvault.request(text, jsonb, text, text, text, text, text, text, text, interval, jsonb) IS
    'Queues a call to a provider and returns its id; the worker sends it when the transaction commits. payer: auto uses the user''s own key if there is one, else the platform''s; api_key is a key for this call alone. The same idempotency_key returns the same request. Errors: KV001 credit limit, KV003 no key, KV007 suspended, KV009 malformed api_key, 22004 and 22023 bad argument, 54000 body too large, 40001 the idempotency key is in use, 42501.';

CREATE FUNCTION keyvault.response(request_id uuid) RETURNS SETOF keyvault.responses
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT ROWS 1
    AS 'MODULE_PATHNAME', 'keyvault_response';
COMMENT ON FUNCTION keyvault.response(uuid) IS
    'The answer to a request, or no row while there is none. Errors: 22023 no such request, 42501 it is another user''s.';

CREATE FUNCTION keyvault.wait_response(request_id uuid, timeout interval = '120 s') RETURNS SETOF keyvault.responses
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT ROWS 1
    AS 'MODULE_PATHNAME', 'keyvault_wait_response';
COMMENT ON FUNCTION keyvault.wait_response(uuid, interval) IS
    'Waits for the answer to a committed request and returns it, or no row after timeout. Errors: 22023 no such request, 42501 it is another user''s, 55000 it is not committed.';

CREATE PROCEDURE keyvault.call(
    provider text, body jsonb, INOUT response jsonb = NULL, path text = NULL, model text = NULL, user_id text = NULL, payer text = 'auto',
    api_key text = NULL, key_name text = 'default', idempotency_key text = NULL, timeout interval = '120 s',
    metadata jsonb = '{}')
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_call';
COMMENT ON PROCEDURE keyvault.call(text, jsonb, jsonb, text, text, text, text, text, text, text, interval, jsonb) IS
    'Queues a call, commits, waits for its answer and returns its body in response. Not inside a transaction block (2D000). Errors: KV008 the call failed or did not end in time, and those of request().';

CREATE FUNCTION keyvault.cancel_request(request_id uuid) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_cancel_request';
COMMENT ON FUNCTION keyvault.cancel_request(uuid) IS
    'Takes a request that was not sent yet out of the queue and gives its hold back; false when it is too late. Errors: 22023, 42501.';

CREATE FUNCTION keyvault._cancel_request(user_id text, id uuid) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
BEGIN
    UPDATE keyvault.requests
       SET status = 'canceled', finished_at = clock_timestamp(), call_key = NULL, error = 'canceled before it was sent'
     WHERE user_id = $1 AND id = $2 AND status = 'queued'
    RETURNING * INTO r;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM keyvault._release_hold($1, r.hold_id);
    INSERT INTO keyvault.responses (user_id, id, status, error, payer) VALUES ($1, $2, r.status, r.error, r.payer);
    RETURN true;
END $$;
COMMENT ON FUNCTION keyvault._cancel_request(text, uuid) IS 'cancel_request, after its caller was checked.';

CREATE VIEW keyvault.request_status WITH (security_invoker = true, security_barrier = true) AS
SELECT r.user_id, r.id, r.provider, r.model, r.payer, r.status, r.attempts,
       r.queued_at, r.sent_at, r.finished_at,
       r.sent_at - r.queued_at AS queue_time, r.finished_at - r.sent_at AS call_time,
       CASE r.status WHEN 'queued' THEN r.next_attempt_at END AS next_attempt_at,
       r.error, r.idempotency_key, r.metadata
  FROM keyvault.requests r;
COMMENT ON VIEW keyvault.request_status IS
    'The acting user''s requests: queued, sent, done, failed, unknown or canceled, with attempts, timings and payer.';
-- What applications and analysts read.

CREATE VIEW keyvault.credit_status WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.plan, c.monthly_credits, c.extra_credits, c.credits_used, c.credits_held,
       CASE WHEN c.monthly_credits IS NOT NULL
            THEN greatest(c.monthly_credits + c.extra_credits - c.credits_used - c.credits_held, 0) END AS credits_remaining,
       c.credits_reset_at
  FROM keyvault.users u
  JOIN keyvault.credit_balances b ON b.user_id = u.user_id AND b.slot = 0
  JOIN keyvault.plans p ON p.plan = u.plan
 CROSS JOIN LATERAL (SELECT coalesce(sum(h.amount), 0)::numeric(18,6) AS amount
                       FROM keyvault.credit_holds h
                      WHERE h.user_id = b.user_id AND h.expires_at > now()) held
 CROSS JOIN LATERAL (
       SELECT b.monthly_credits, b.extra_credits, b.credits_used, held.amount AS credits_held, b.period_end AS credits_reset_at
        WHERE b.period_end > now()
        UNION ALL
       SELECT p.monthly_credits,
              (CASE WHEN b.monthly_credits IS NULL THEN b.extra_credits
                    ELSE greatest(b.extra_credits - greatest(b.credits_used - b.monthly_credits, 0), 0) END)::numeric(18,6),
              0::numeric(18,6), held.amount,
              keyvault._period_bound(b.period_anchor, keyvault._period_number(b.period_anchor, now()) + 1)
        WHERE b.period_end <= now()) c;
COMMENT ON VIEW keyvault.credit_status IS
    'Plan and credits of the acting user, of every user for access analyst or admin. Right also for a period that has ended and was not written yet. NULL monthly_credits and credits_remaining are unlimited.';

CREATE VIEW keyvault.usage_by_day WITH (security_invoker = true, security_barrier = true) AS
SELECT r.user_id, (r.created_at AT TIME ZONE 'UTC')::date AS day, r.provider, r.model, r.type, r.payer,
       count(*) AS calls, sum(r.input_tokens)::bigint AS input_tokens, sum(r.cached_tokens)::bigint AS cached_tokens,
       sum(r.output_tokens)::bigint AS output_tokens, sum(r.tokens)::bigint AS tokens,
       sum(r.credits) AS credits, sum(r.cost_usd) AS cost_usd
  FROM keyvault.usage_records r
 GROUP BY r.user_id, (r.created_at AT TIME ZONE 'UTC')::date, r.provider, r.model, r.type, r.payer;
COMMENT ON VIEW keyvault.usage_by_day IS
    'Usage per user, UTC day, provider, model, type and payer: calls, tokens, credits debited and provider cost in USD. The acting user''s, every user''s for access analyst or admin.';
-- Every grant of the extension. Nothing is PUBLIC's; access is given by grant_access.

CREATE FUNCTION keyvault._access_statements(access text) RETURNS SETOF text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    app_functions text[] := '{act_as, upsert_user, set_plan, uuidv7, _debit_tag}';
    user_functions text[] := '{store_api_key, user_api_keys, user_api_key, delete_api_key, request, response, wait_response, call, cancel_request}';
    every_function text[] := '{current_user_id, _may_act_for_any_user, _may_read_all_usage, _may_administer, _period_bound, _period_number}';
    admin_functions text[] := '{upsert_user, set_plan, store_platform_key}';
    routines text[];
    member text;
BEGIN
    IF access IS NULL OR access NOT IN ('app', 'user', 'analyst', 'admin') THEN
        RAISE EXCEPTION 'access must be app, user, analyst or admin'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'See "Access" in doc/keyvault.md.';
    END IF;
    routines := every_function || ('_' || access) || CASE access
        WHEN 'app' THEN app_functions || user_functions
        WHEN 'user' THEN user_functions
        WHEN 'admin' THEN admin_functions END;
    RETURN NEXT 'USAGE ON SCHEMA keyvault';
    FOR member IN SELECT p.oid::regprocedure::text FROM pg_proc p
                   WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname = ANY (routines) ORDER BY 1 LOOP
        RETURN NEXT 'EXECUTE ON ROUTINE ' || member;
    END LOOP;
    RETURN NEXT 'SELECT ON keyvault.users, keyvault.credit_balances, keyvault.credit_holds, keyvault.plans, keyvault.providers, '
             || 'keyvault.model_prices, keyvault.credit_status, keyvault.usage_records, keyvault.usage_by_day';
    IF access IN ('app', 'user') THEN
        RETURN NEXT 'SELECT (user_id, id, provider, model, type, path, payer, api_key_id, status, attempts, timeout_ms, hold_id, estimated_usd, '
                 || 'idempotency_key, queued_at, next_attempt_at, sent_at, finished_at, error, metadata, body) ON keyvault.requests';
        RETURN NEXT 'SELECT ON keyvault.responses, keyvault.request_status';
    END IF;
    IF access IN ('app', 'user', 'admin') THEN
        RETURN NEXT 'SELECT (user_id, id, provider, name, hint, source, status, expires_at, last_used_at, last_verified_at, rotated_at, '
                 || 'created_at, updated_at) ON keyvault.api_keys';
        RETURN NEXT 'SELECT ON keyvault.api_key_status';
    END IF;
    IF access = 'app' THEN
        -- debit_tag stays out: with it, a writer could pass a row off as debited.
        RETURN NEXT 'INSERT (user_id, created_at, id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens, '
                 || 'credits, cost_usd, request_id, api_key_id, issued_key_id, idempotency_key, metadata) ON keyvault.usage_records';
        RETURN NEXT 'SET ON PARAMETER "keyvault.user_id"';
    END IF;
    IF access = 'admin' THEN
        -- Where a provider is, and how it is given the key, is the superuser's: whoever sets that reads the keys.
        RETURN NEXT 'INSERT, UPDATE, DELETE ON keyvault.plans, keyvault.model_prices';
        RETURN NEXT 'UPDATE (key_pattern, platform_paths, usd_per_request) ON keyvault.providers';
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._access_statements(text) IS 'The privileges of an access, each as what stands between GRANT and TO. Error: 22023.';

CREATE FUNCTION keyvault.grant_access(role regrole, access text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    privilege text;
BEGIN
    FOR privilege IN SELECT keyvault._access_statements(access) LOOP
        EXECUTE format('GRANT %s TO %s', privilege, role);
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault.grant_access(regrole, text) IS
    'Gives a role an access: app (trusted application, acts for any user), user (acts as the user it proved to be), analyst (everyone''s usage, no keys), admin (plans, prices, users, platform keys, what a provider costs and accepts, metadata of keys; never plaintext). A superuser calls it. Errors: 22023, 42501.';

CREATE FUNCTION keyvault.revoke_access(role regrole, access text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    privilege text;
    other text;
BEGIN
    FOR privilege IN SELECT keyvault._access_statements(access) LOOP
        EXECUTE format('REVOKE %s FROM %s', privilege, role);
    END LOOP;
    -- Accesses overlap: what another one that the role keeps also gives is given again.
    FOR other IN SELECT substr(p.proname, 2) FROM pg_proc p, aclexplode(p.proacl) a
                  WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname IN ('_app', '_user', '_analyst', '_admin')
                    AND a.grantee = role LOOP
        PERFORM keyvault.grant_access(role, other);
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault.revoke_access(regrole, text) IS
    'Takes an access from a role; other accesses that it was given stay whole. A superuser calls it. Errors: 22023, 42501.';

REVOKE ALL ON ALL ROUTINES IN SCHEMA keyvault FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA keyvault FROM PUBLIC;
