-- Plans and users.

CREATE TABLE keyvault.plans (
    plan            text COLLATE "C" PRIMARY KEY CHECK (plan ~ '^[a-z][a-z0-9_-]{0,62}$'),
    monthly_credits numeric(18,6) CHECK (monthly_credits >= 0 AND monthly_credits < 'Infinity'),
    price_usd       numeric(12,2) CHECK (price_usd >= 0 AND price_usd < 'Infinity'),
    credits_per_usd numeric(18,6) NOT NULL DEFAULT 1000 CHECK (credits_per_usd >= 0 AND credits_per_usd < 'Infinity'),
    own_key_rate    numeric(9,6) NOT NULL DEFAULT 0 CHECK (own_key_rate >= 0 AND own_key_rate < 'Infinity'),
    seeded          boolean NOT NULL DEFAULT false,
    infrastructure_usd numeric(18,9) NOT NULL DEFAULT 0 CHECK (infrastructure_usd >= 0 AND infrastructure_usd < 'Infinity'),
    margin          numeric(9,6) NOT NULL DEFAULT 0 CHECK (margin >= 0 AND margin < 'Infinity'),
    overage         text NOT NULL DEFAULT 'block' CHECK (overage IN ('block', 'report')),
    unknown_model   text NOT NULL DEFAULT 'charge' CHECK (unknown_model IN ('charge', 'refuse', 'allow')),
    unknown_model_usd_per_mtok numeric(18,9) NOT NULL DEFAULT 20
                    CHECK (unknown_model_usd_per_mtok > 0 AND unknown_model_usd_per_mtok < 'Infinity'),
    notice_percents integer[] NOT NULL DEFAULT '{50,80,100}' CHECK (1 <= ALL (notice_percents) AND 100 >= ALL (notice_percents)),
    unknown_outcome text NOT NULL DEFAULT 'release' CHECK (unknown_outcome IN ('release', 'charge')),
    credits_changed_at timestamptz DEFAULT clock_timestamp()
);
COMMENT ON TABLE keyvault.plans IS 'What a user may spend in a month, and what provider cost is worth in credits.';
COMMENT ON COLUMN keyvault.plans.monthly_credits IS 'Credits per period; NULL is unlimited. A change reaches each user at the next period or set_plan.';
COMMENT ON COLUMN keyvault.plans.price_usd IS 'What the plan costs its user per month, in USD; NULL where it is negotiated.';
COMMENT ON COLUMN keyvault.plans.credits_per_usd IS
    'Credits per USD: a use is debited (provider cost + infrastructure_usd) * (1 + margin) * credits_per_usd.';
COMMENT ON COLUMN keyvault.plans.infrastructure_usd IS 'Cost of the application''s own per priced use, in USD, whoever pays the provider.';
COMMENT ON COLUMN keyvault.plans.margin IS 'What is earned on top of both costs, as a fraction of them; 0.2 is 20 percent.';
COMMENT ON COLUMN keyvault.plans.overage IS 'At the limit: block refuses with KV001; report debits on, and credit_status and credit_periods say how far beyond.';
COMMENT ON COLUMN keyvault.plans.unknown_model IS
    'What a use costs whose model has no price, or is paid by the token and used without stating tokens: charge by unknown_model_usd_per_mtok, with a WARNING; refuse with 22023; allow for nothing, with a WARNING.';
COMMENT ON COLUMN keyvault.plans.unknown_model_usd_per_mtok IS 'USD per million tokens of any kind, for a model without a price.';
COMMENT ON COLUMN keyvault.plans.notice_percents IS 'Parts of a period''s credits, in percent, whose use is noted in credit_notices, once a period. A change reaches each user when its next threshold is passed, or with its next period or set_plan.';
COMMENT ON COLUMN keyvault.plans.unknown_outcome IS
    'What a provider call costs whose answer was lost, a day after, when nobody reconciled it: release, nothing; charge, its estimate.';
COMMENT ON COLUMN keyvault.plans.own_key_rate IS 'Part of those credits debited when the call used the user''s own key; 0 is free.';
COMMENT ON COLUMN keyvault.plans.credits_changed_at IS 'When monthly_credits last changed: periods that began before it may have others. NULL: as shipped.';
COMMENT ON COLUMN keyvault.plans.seeded IS 'Shipped with the extension and not changed since.';

INSERT INTO keyvault.plans (plan, monthly_credits, price_usd, seeded, credits_changed_at) VALUES
    ('free', 1000, 0, true, NULL),
    ('pro', 50000, 20, true, NULL),
    ('enterprise', NULL, NULL, true, NULL);

CREATE TRIGGER keep_customized BEFORE INSERT OR UPDATE ON keyvault.plans
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_customized('{plan}');
SELECT pg_catalog.pg_extension_config_dump('keyvault.plans', 'WHERE NOT seeded');

CREATE FUNCTION keyvault._keep_used_plan() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.monthly_credits IS DISTINCT FROM OLD.monthly_credits THEN
            NEW.credits_changed_at := clock_timestamp();
        END IF;
        IF NEW.plan = OLD.plan THEN
            RETURN NEW;
        END IF;
    -- A seed that gives way to an inserted row of the same name goes before that row comes: what remains is seen at commit.
    ELSIF TG_WHEN = 'BEFORE' AND OLD.seeded AND pg_trigger_depth() > 1
          OR TG_WHEN = 'AFTER' AND EXISTS (SELECT FROM keyvault.plans p WHERE p.plan = OLD.plan)
    THEN
        RETURN OLD;
    END IF;
    -- Who puts a user on a plan holds its row: with a snapshot of now, what was committed until then is seen.
    IF OLD.plan = 'free' OR EXISTS (SELECT FROM keyvault.users u WHERE u.plan = OLD.plan) THEN
        RAISE EXCEPTION 'plan "%" is in use', OLD.plan
            USING ERRCODE = 'dependent_objects_still_exist',
                  HINT = 'Move its users with keyvault.set_plan() first; plan free is every new user''s.';
    ELSIF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RAISE EXCEPTION 'plans are deleted and renamed at isolation level read committed only'
            USING ERRCODE = 'invalid_transaction_state',
                  DETAIL = 'A user that was put on the plan after the transaction''s snapshot would not be seen.',
                  HINT = 'SET default_transaction_isolation = ''read committed'', or begin the transaction so.';
    END IF;
    RETURN coalesce(NEW, OLD);
END $$;
COMMENT ON FUNCTION keyvault._keep_used_plan() IS
    'Trigger of plans: refuses to delete or rename one that users are on, with 2BP01, and any above READ COMMITTED, with 25000; sets credits_changed_at.';
CREATE TRIGGER keep_used_plan BEFORE UPDATE OR DELETE ON keyvault.plans
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_used_plan();
CREATE CONSTRAINT TRIGGER keep_replaced_plan AFTER DELETE ON keyvault.plans DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (OLD.seeded) EXECUTE FUNCTION keyvault._keep_used_plan();

CREATE FUNCTION keyvault._refuse_missing_plan(plan text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'plan "%" does not exist', plan
        USING ERRCODE = 'undefined_object',
              DETAIL = 'A user is on it, and nothing says what that user may spend.',
              HINT = 'Add it with INSERT INTO keyvault.plans; then keyvault.set_plan() can move its users.';
END $$;
COMMENT ON FUNCTION keyvault._refuse_missing_plan(text) IS 'Raises 42704: no period, price or new balance goes by a plan that is not there.';

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
    updated_at timestamptz NOT NULL DEFAULT now(),
    monthly_credits numeric(18,6) CHECK (monthly_credits >= 0 AND monthly_credits < 'Infinity'),
    status_reason text,
    erased_at  timestamptz,
    erased_master_key integer,
    boxed      boolean NOT NULL DEFAULT false,
    boxes_destroyed_at timestamptz
);
COMMENT ON TABLE keyvault.users IS 'Who owns keys and credits: a person or an organization, named by the application.';
COMMENT ON COLUMN keyvault.users.user_id IS 'The application''s own name for the user: 1 to 255 bytes, never changed.';
COMMENT ON COLUMN keyvault.users.status IS 'active; suspended: no calls and no new keys; erased: keys and personal data destroyed.';
COMMENT ON COLUMN keyvault.users.monthly_credits IS 'Credits per period agreed with this user; NULL: the plan''s. Set by set_plan.';
COMMENT ON COLUMN keyvault.users.status_reason IS 'Why the user was suspended or erased, as the caller said.';
COMMENT ON COLUMN keyvault.users.erased_master_key IS 'The newest version of the master key that wrapped a data key of an erased user; NULL when there was none.';
COMMENT ON COLUMN keyvault.users.boxed IS 'Whether a key of the user''s was ever stored as a sealed box, of which backups may have a copy.';
COMMENT ON COLUMN keyvault.users.boxes_destroyed_at IS 'Since when nothing in this database opens a sealed box of an erased user''s, wherever there is a copy of one.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.users', '');

ALTER TABLE keyvault.users ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_row ON keyvault.users FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.users FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

-- The planner's estimates, which every role may ask for, would tell one user what is in others' rows.
ALTER TABLE keyvault.users ALTER email SET STATISTICS 0, ALTER name SET STATISTICS 0, ALTER image SET STATISTICS 0,
    ALTER status_reason SET STATISTICS 0, ALTER stripe_customer_id SET STATISTICS 0, ALTER stripe_subscription_id SET STATISTICS 0,
    ALTER stripe_price_id SET STATISTICS 0;

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
DECLARE
    had keyvault.users;
BEGIN
    INSERT INTO keyvault.users AS u (user_id, email, name, image)
    VALUES ($1, $2, $3, $4)
    ON CONFLICT (user_id) DO UPDATE
       SET email = coalesce($2, u.email), name = coalesce($3, u.name), image = coalesce($4, u.image), updated_at = now()
     WHERE u.status <> 'erased'
    RETURNING u.* INTO had;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'user "%" is erased', $1
            USING ERRCODE = 'KV007', HINT = 'What was erased does not come back; a new user needs another user_id.';
    END IF;
    PERFORM keyvault._create_balance($1);
    IF $5 IS NOT NULL THEN
        PERFORM keyvault._set_plan($1, $5, CASE WHEN had.plan = $5 THEN had.monthly_credits END);
    END IF;
    RETURN $1;
END $$;
COMMENT ON FUNCTION keyvault._upsert_user(text, text, text, text, text) IS 'upsert_user, after its caller was checked.';

CREATE FUNCTION keyvault.upsert_user(user_id text, email text = NULL, name text = NULL, image text = NULL, plan text = NULL) RETURNS text
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_upsert_user';
COMMENT ON FUNCTION keyvault.upsert_user(text, text, text, text, text) IS
    'Makes a user, on plan free unless plan names another, or changes the fields given (NULL leaves a field as it is, and the plan that the user is on leaves the credits agreed with it); returns user_id. Errors: 42501 without the right to act for any user or access admin, 22023 for an unknown plan or a bad user_id.';

CREATE FUNCTION keyvault._set_plan(user_id text, plan text, monthly_credits numeric) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    u keyvault.users;
    b keyvault.credit_balances;
    agreed numeric;
    used numeric;
    overage numeric;
BEGIN
    SELECT coalesce($3, p.monthly_credits) INTO agreed FROM keyvault.plans p WHERE p.plan = $2 FOR KEY SHARE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown plan "%"', $2
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = format('Known plans: %s. An administrator adds one with INSERT INTO keyvault.plans.',
                                (SELECT string_agg(p.plan, ', ' ORDER BY p.plan) FROM keyvault.plans p));
    END IF;
    IF $3 < 0 OR $3 >= 1e12 OR $3 = 'NaN' THEN
        RAISE EXCEPTION 'monthly credits must be between 0 and 999999999999'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Leave monthly_credits out for the plan''s own.';
    END IF;
    PERFORM keyvault._ensure_user($1, true);
    SELECT * INTO STRICT u FROM keyvault.users WHERE user_id = $1 FOR NO KEY UPDATE;
    -- What was due before is done under the plan before.
    b := keyvault._spend_extra(keyvault._lock_balance($1, false));
    IF b.monthly_credits IS DISTINCT FROM agreed + b.credits_covered OR u.plan <> $2 THEN
        used := b.credits_used - b.extra_spent;
        overage := CASE WHEN b.monthly_credits IS NULL OR agreed IS NULL THEN 0
                        ELSE greatest(least(used - b.monthly_credits, used - agreed), 0) END;
        PERFORM keyvault._close_stretch(b, u.plan, 'plan', now(), overage);
        b.credits_overage := b.credits_overage + overage;
        -- What was reported is not used of the new plan too.
        b.credits_covered := CASE WHEN agreed IS NULL THEN 0 ELSE greatest(used - agreed, b.credits_overage) END;
        b.monthly_credits := agreed + b.credits_covered;
    END IF;
    UPDATE keyvault.users SET plan = $2, monthly_credits = $3, updated_at = now() WHERE user_id = $1;
    -- A threshold that is ahead again is noted again.
    DELETE FROM keyvault.credit_notices n
     WHERE n.user_id = $1 AND n.period_start = b.period_start
       AND (b.monthly_credits IS NULL OR b.credits_used < round((b.monthly_credits + b.extra_credits) * n.percent / 100, 6));
    PERFORM keyvault._save_balance(b);
END $$;
COMMENT ON FUNCTION keyvault._set_plan(text, text, numeric) IS 'set_plan, after its caller was checked.';

CREATE FUNCTION keyvault.set_plan(user_id text, plan text, monthly_credits numeric = NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_set_plan';
COMMENT ON FUNCTION keyvault.set_plan(text, text, numeric) IS
    'Puts a user on a plan at once: its monthly credits, or those agreed with the user, count from now; what was used this period stays used, and what an earlier plan or a grant paid for stays paid. A user who does not exist yet is made where keyvault.create_users is on. Errors: 42501, 22004, 22023 for an unknown plan, a bad amount, or an unknown user where users are not made.';

CREATE FUNCTION keyvault._set_user_status(user_id text, status text, reason text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    UPDATE keyvault.users u SET status = $2, status_reason = $3, updated_at = now()
     WHERE u.user_id = $1 AND u.status <> 'erased';
    IF FOUND THEN
        RETURN;
    END IF;
    IF EXISTS (SELECT FROM keyvault.users u WHERE u.user_id = $1) THEN
        RAISE EXCEPTION 'user "%" is erased', $1
            USING ERRCODE = 'KV007', HINT = 'What was erased does not come back; a new user needs another user_id.';
    END IF;
    RAISE EXCEPTION 'user "%" does not exist', $1
        USING ERRCODE = 'invalid_parameter_value', HINT = 'Create it with keyvault.upsert_user().';
END $$;
COMMENT ON FUNCTION keyvault._set_user_status(text, text, text) IS 'suspend_user and resume_user, after their caller was checked.';

CREATE FUNCTION keyvault.suspend_user(user_id text, reason text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_suspend_user';
COMMENT ON FUNCTION keyvault.suspend_user(text, text) IS
    'Suspends a user: new requests, requests still in the queue and new keys are refused with KV007. Calls under way end; lookups, deletions and usage records go on. reason, which the user can read, is kept in users.status_reason. Errors: 42501, 22023 unknown user, 22004, KV007 erased.';

CREATE FUNCTION keyvault.resume_user(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_resume_user';
COMMENT ON FUNCTION keyvault.resume_user(text) IS
    'Ends a suspension. Errors: 42501, 22023 unknown user, 22004, KV007 erased.';

-- One place for all that is destroyed with a user: a part that adds a table of users' secrets or personal data adds it here.
CREATE FUNCTION keyvault._erase_user(user_id text, reason text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    -- Who stores a key holds the row shared: nothing is sealed behind this, and the next statement sees all that was.
    PERFORM FROM keyvault.users u WHERE u.user_id = $1 FOR UPDATE;
    UPDATE keyvault.users u
       SET status = 'erased', status_reason = CASE u.status WHEN 'erased' THEN coalesce($2, u.status_reason) ELSE $2 END,
           email = NULL, name = NULL, image = NULL, email_verified_at = NULL,
           stripe_customer_id = NULL, stripe_subscription_id = NULL, stripe_price_id = NULL, stripe_current_period_end = NULL,
           updated_at = now(), erased_at = coalesce(u.erased_at, clock_timestamp()),
           -- Private halves of sealing keys, also those in backups, open with the platform's data key.
           boxes_destroyed_at = CASE WHEN u.status = 'erased' THEN u.boxes_destroyed_at
                                     WHEN NOT u.boxed THEN clock_timestamp() END,
           erased_master_key = coalesce(u.erased_master_key, (
               SELECT max(m.version) FROM keyvault.data_keys d JOIN keyvault.master_keys m ON m.kek_id = substr(d.wrapped, 9, 16)
                WHERE d.user_id = $1))
     WHERE u.user_id = $1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'user "%" does not exist', $1
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the user_id as it stands in keyvault.users.';
    END IF;
    DELETE FROM keyvault.data_keys d WHERE d.user_id = $1;
    DELETE FROM keyvault.api_keys k WHERE k.user_id = $1;
    DELETE FROM keyvault.sealed_boxes b WHERE b.user_id = $1;

    PERFORM keyvault._cancel_request($1, r.id) FROM keyvault.requests r WHERE r.user_id = $1 AND r.status = 'queued';
    -- Of calls under way the usage is recorded when they end, and the answer dropped.
    UPDATE keyvault.requests r SET body = '{}', metadata = '{"erased": true}' WHERE r.user_id = $1 AND r.status = 'sent';
    DELETE FROM keyvault.responses a WHERE a.user_id = $1;
    DELETE FROM keyvault.requests r WHERE r.user_id = $1 AND r.status <> 'sent';
    UPDATE keyvault.usage_records r SET metadata = '{}' WHERE r.user_id = $1 AND r.metadata <> '{}';
END $$;
COMMENT ON FUNCTION keyvault._erase_user(text, text) IS 'erase_user, after its caller was checked.';

CREATE FUNCTION keyvault.erase_user(user_id text, reason text = NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_erase_user';
COMMENT ON FUNCTION keyvault.erase_user(text, text) IS
    'Destroys a user''s data keys, API keys, requests and answers, clears the personal fields of users and the metadata of usage records, and refuses the user from then on with KV007; usage, credits and the row of users stay. Nothing opens here any more once this is committed. Bytes of deleted rows, all of them encrypted or wrapped where they are keys, leave the disk with VACUUM and the recycling of WAL. Backups and WAL of before open with the master key of their time: for them the erasure is complete when that master key was retired, by rotation, and destroyed, after the sealing keys of before were: see erasure_status. A second call erases what has come since, and keeps the reason unless it gives one. Errors: 42501, 22023 unknown user, 22004, 25000 above READ COMMITTED.';
