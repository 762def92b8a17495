-- keyvault 0.1.0 to 0.2.0. Nothing is granted or revoked but on what is new: the privileges that an object has when a script
-- of its extension changes them are no longer dumped, roles' own among them.
\echo Use "ALTER EXTENSION keyvault UPDATE TO '0.2.0'" to load this file. \quit

-- Data are changed here: no operator of another schema comes in between.
SET LOCAL search_path = pg_catalog, pg_temp;

DROP FUNCTION keyvault._estimate_usd(provider keyvault.providers, model text, body jsonb);

DROP FUNCTION keyvault._price_usd(provider text, model text, at timestamptz, input_tokens bigint, cached_tokens bigint, output_tokens bigint);

DROP FUNCTION keyvault._hold_credits(user_id text, amount numeric, expires_at timestamptz, may_create boolean);

DROP FUNCTION keyvault._roll_period(user_id text);

DROP FUNCTION keyvault._settle_request(user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, model text, input_tokens bigint, cached_tokens bigint, output_tokens bigint, stated_usd numeric, key_refused boolean);

DROP FUNCTION keyvault.set_plan(user_id text, plan text);

DROP FUNCTION keyvault._set_plan(user_id text, plan text);

ALTER TABLE keyvault.plans ADD COLUMN infrastructure_usd numeric(18,9) NOT NULL DEFAULT 0 CHECK (infrastructure_usd >= 0 AND infrastructure_usd < 'Infinity');
ALTER TABLE keyvault.plans ADD COLUMN margin numeric(9,6) NOT NULL DEFAULT 0 CHECK (margin >= 0 AND margin < 'Infinity');
ALTER TABLE keyvault.plans ADD COLUMN overage text NOT NULL DEFAULT 'block' CHECK (overage IN ('block', 'report'));
ALTER TABLE keyvault.plans ADD COLUMN unknown_model text NOT NULL DEFAULT 'charge' CHECK (unknown_model IN ('charge', 'refuse', 'allow'));
ALTER TABLE keyvault.plans ADD COLUMN unknown_model_usd_per_mtok numeric(18,9) NOT NULL DEFAULT 20 CHECK (unknown_model_usd_per_mtok > 0 AND unknown_model_usd_per_mtok < 'Infinity');
ALTER TABLE keyvault.plans ADD COLUMN notice_percents integer[] NOT NULL DEFAULT '{50,80,100}' CHECK (1 <= ALL (notice_percents) AND 100 >= ALL (notice_percents));
ALTER TABLE keyvault.plans ADD COLUMN unknown_outcome text NOT NULL DEFAULT 'release' CHECK (unknown_outcome IN ('release', 'charge'));
ALTER TABLE keyvault.plans ADD COLUMN credits_changed_at timestamptz;
ALTER TABLE keyvault.plans ALTER COLUMN credits_changed_at SET DEFAULT clock_timestamp();
UPDATE keyvault.plans SET credits_changed_at = clock_timestamp() WHERE NOT seeded;

COMMENT ON COLUMN keyvault.plans.credits_changed_at IS 'When monthly_credits last changed: periods that began before it may have others. NULL: as shipped.';

CREATE OR REPLACE FUNCTION keyvault._keep_used_plan() RETURNS trigger
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
REVOKE ALL ON FUNCTION keyvault._refuse_missing_plan(text) FROM PUBLIC;
COMMENT ON FUNCTION keyvault._refuse_missing_plan(text) IS 'Raises 42704: no period, price or new balance goes by a plan that is not there.';

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

ALTER TABLE keyvault.users ADD COLUMN monthly_credits numeric(18,6) CHECK (monthly_credits >= 0 AND monthly_credits < 'Infinity');
ALTER TABLE keyvault.users ADD COLUMN status_reason text;
ALTER TABLE keyvault.users ADD COLUMN erased_at timestamptz;
ALTER TABLE keyvault.users ADD COLUMN erased_master_key integer;
ALTER TABLE keyvault.users ADD COLUMN boxed boolean NOT NULL DEFAULT false;
ALTER TABLE keyvault.users ADD COLUMN boxes_destroyed_at timestamptz;

COMMENT ON COLUMN keyvault.users.status IS 'active; suspended: no calls and no new keys; erased: keys and personal data destroyed.';

COMMENT ON COLUMN keyvault.users.monthly_credits IS 'Credits per period agreed with this user; NULL: the plan''s. Set by set_plan.';

COMMENT ON COLUMN keyvault.users.status_reason IS 'Why the user was suspended or erased, as the caller said.';

COMMENT ON COLUMN keyvault.users.erased_master_key IS 'The newest version of the master key that wrapped a data key of an erased user; NULL when there was none.';
COMMENT ON COLUMN keyvault.users.boxed IS 'Whether a key of the user''s was ever stored as a sealed box, of which backups may have a copy.';
COMMENT ON COLUMN keyvault.users.boxes_destroyed_at IS 'Since when nothing in this database opens a sealed box of an erased user''s, wherever there is a copy of one.';

CREATE OR REPLACE FUNCTION keyvault._upsert_user(user_id text, email text, name text, image text, plan text) RETURNS text
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
REVOKE ALL ON FUNCTION keyvault._set_plan(user_id text, plan text, monthly_credits numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._set_plan(text, text, numeric) IS 'set_plan, after its caller was checked.';

CREATE FUNCTION keyvault.set_plan(user_id text, plan text, monthly_credits numeric = NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_set_plan';
REVOKE ALL ON FUNCTION keyvault.set_plan(user_id text, plan text, monthly_credits numeric) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._set_user_status(user_id text, status text, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._set_user_status(text, text, text) IS 'suspend_user and resume_user, after their caller was checked.';

CREATE FUNCTION keyvault.suspend_user(user_id text, reason text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_suspend_user';
REVOKE ALL ON FUNCTION keyvault.suspend_user(user_id text, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.suspend_user(text, text) IS
    'Suspends a user: new requests, requests still in the queue and new keys are refused with KV007. Calls under way end; lookups, deletions and usage records go on. reason, which the user can read, is kept in users.status_reason. Errors: 42501, 22023 unknown user, 22004, KV007 erased.';

CREATE FUNCTION keyvault.resume_user(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_resume_user';
REVOKE ALL ON FUNCTION keyvault.resume_user(user_id text) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._erase_user(user_id text, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._erase_user(text, text) IS 'erase_user, after its caller was checked.';

CREATE FUNCTION keyvault.erase_user(user_id text, reason text = NULL) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_erase_user';
REVOKE ALL ON FUNCTION keyvault.erase_user(user_id text, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.erase_user(text, text) IS
    'Destroys a user''s data keys, API keys, requests and answers, clears the personal fields of users and the metadata of usage records, and refuses the user from then on with KV007; usage, credits and the row of users stay. Nothing opens here any more once this is committed. Bytes of deleted rows, all of them encrypted or wrapped where they are keys, leave the disk with VACUUM and the recycling of WAL. Backups and WAL of before open with the master key of their time: for them the erasure is complete when that master key was retired, by rotation, and destroyed, after the sealing keys of before were: see erasure_status. A second call erases what has come since, and keeps the reason unless it gives one. Errors: 42501, 22023 unknown user, 22004, 25000 above READ COMMITTED.';

ALTER TABLE keyvault.credit_balances ADD COLUMN due_at timestamptz;
ALTER TABLE keyvault.credit_balances ADD COLUMN notice_at numeric(18,6);
ALTER TABLE keyvault.credit_balances ADD COLUMN credits_lent numeric(18,6);
ALTER TABLE keyvault.credit_balances ADD COLUMN credits_covered numeric(18,6);
ALTER TABLE keyvault.credit_balances ADD COLUMN extra_spent numeric(18,6);
ALTER TABLE keyvault.credit_balances ADD COLUMN credits_overage numeric(18,6);

COMMENT ON COLUMN keyvault.credit_balances.slot IS
    '0: the balance. Above 0: room that slot 0 lent to a busy user''s further slot, as that slot''s monthly_credits; a user''s credits_used is the sum over slots.';

COMMENT ON COLUMN keyvault.credit_balances.monthly_credits IS 'What may be used in this period before extra credits are: the plan''s credits and credits_covered; NULL is unlimited.';

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

-- A column is not added with its default while functions take the table's rows. Nothing expires yet but periods. The next threshold is the first that was not reached.
UPDATE keyvault.credit_balances b
   SET due_at = b.period_end, credits_lent = 0, credits_covered = 0, extra_spent = 0, credits_overage = 0,
       notice_at = (SELECT min(t.at) - 0.000001
                      FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan,
                           unnest(p.notice_percents) percent,
                           round((b.monthly_credits + b.extra_credits) * percent / 100, 6) t(at)
                     WHERE u.user_id = b.user_id AND t.at > b.credits_used);
ALTER TABLE keyvault.credit_balances ALTER COLUMN due_at SET NOT NULL,
    ALTER COLUMN credits_lent SET NOT NULL, ALTER COLUMN credits_lent SET DEFAULT 0,
    ALTER COLUMN credits_covered SET NOT NULL, ALTER COLUMN credits_covered SET DEFAULT 0,
    ALTER COLUMN extra_spent SET NOT NULL, ALTER COLUMN extra_spent SET DEFAULT 0,
    ALTER COLUMN credits_overage SET NOT NULL, ALTER COLUMN credits_overage SET DEFAULT 0;

-- Not WHERE slot = 0: while the table is new the planner would take it for looking up one balance, and scan it all.
CREATE INDEX credit_balances_due ON keyvault.credit_balances (due_at);
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
REVOKE ALL ON keyvault.credit_periods FROM PUBLIC;

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
REVOKE ALL ON keyvault.credit_notices FROM PUBLIC;

COMMENT ON TABLE keyvault.credit_notices IS
    'For alerts: which part of a period''s credits was used up when, once each per period, for three months. plans.notice_percents says which parts.';

COMMENT ON COLUMN keyvault.credit_notices.percent IS 'Percent of monthly and extra credits together, of the time when it was reached.';

SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_notices', '');

ALTER TABLE keyvault.credit_periods ENABLE ROW LEVEL SECURITY;

-- What was used before a change to a smaller plan was covered by the larger one, as set_plan has it now.
UPDATE keyvault.credit_balances b
   SET credits_covered = b.credits_used - b.extra_credits - b.monthly_credits, monthly_credits = b.credits_used - b.extra_credits
 WHERE b.credits_used > b.monthly_credits + b.extra_credits;

CREATE POLICY own_rows ON keyvault.credit_periods FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));

CREATE POLICY read_by_access ON keyvault.credit_periods FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

ALTER TABLE keyvault.credit_notices ENABLE ROW LEVEL SECURITY;

INSERT INTO keyvault.credit_notices (user_id, period_start, percent, credits_used, credits_limit)
SELECT b.user_id, b.period_start, percent, b.credits_used, b.monthly_credits + b.extra_credits
  FROM keyvault.credit_balances b JOIN keyvault.users u ON u.user_id = b.user_id
  JOIN keyvault.plans p ON p.plan = u.plan, unnest(p.notice_percents) percent
 WHERE b.credits_used > 0 AND b.period_end > now()
   AND b.credits_used >= round((b.monthly_credits + b.extra_credits) * percent / 100, 6)
ON CONFLICT DO NOTHING;

CREATE POLICY own_rows ON keyvault.credit_notices FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));

CREATE POLICY read_by_access ON keyvault.credit_notices FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

CREATE OR REPLACE FUNCTION keyvault._period_bound(anchor timestamptz, number integer) RETURNS timestamptz
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_period_bound';

CREATE OR REPLACE FUNCTION keyvault._period_number(anchor timestamptz, at timestamptz) RETURNS integer
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_period_number';

CREATE FUNCTION keyvault._keep_due() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.due_at := least(NEW.due_at, NEW.period_end);
    RETURN NEW;
END $$;
REVOKE ALL ON FUNCTION keyvault._keep_due() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._keep_due() IS
    'Trigger of credit_balances: a period that an administrator ends earlier is due earlier. The debit does not fire it.';

CREATE TRIGGER keep_due BEFORE INSERT OR UPDATE OF period_end ON keyvault.credit_balances
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_due();

CREATE OR REPLACE FUNCTION keyvault._create_balance(user_id text) RETURNS void
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

-- plpgsql where SQL would do: it keeps its plans, and these run for every call.

CREATE OR REPLACE FUNCTION keyvault._credits_left(balance keyvault.credit_balances) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN balance.monthly_credits + balance.extra_credits - balance.credits_used - balance.credits_held - balance.credits_lent;

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
REVOKE ALL ON FUNCTION keyvault._split_balance(user_id text, amount numeric) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._debit_split(user_id text, amount numeric, as_hold boolean) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._gather_slots(user_id text) FROM PUBLIC;

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

REVOKE ALL ON FUNCTION keyvault._slots_are_free(keyvault.credit_balances) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._next_notice(balance keyvault.credit_balances) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._note_thresholds(balance keyvault.credit_balances) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._save_balance(balance keyvault.credit_balances) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._close_stretch(balance keyvault.credit_balances, plan text, ended_by text, ended_at timestamptz, overage numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._close_stretch(keyvault.credit_balances, text, text, timestamptz, numeric) IS
    'Leaves a row in credit_periods. The balance''s grants have paid what they owe.';

CREATE FUNCTION keyvault._overage(balance keyvault.credit_balances) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN coalesce(greatest(balance.credits_used - balance.monthly_credits - balance.extra_spent, 0), 0);
REVOKE ALL ON FUNCTION keyvault._overage(balance keyvault.credit_balances) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._catch_up(balance keyvault.credit_balances) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._catch_up(keyvault.credit_balances) IS
    'Does for a locked balance what is due, and returns it: grants that have expired end, and when its period has, the one that contains now() begins: usage at zero, what grants paid for taken off, the monthly credits renewed.';

CREATE OR REPLACE FUNCTION keyvault._lock_balance(user_id text, may_create boolean) RETURNS keyvault.credit_balances
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

DROP FUNCTION keyvault._require_credits(user_id text, amount numeric, may_create boolean);
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
REVOKE ALL ON FUNCTION keyvault._require_credits(user_id text, amount numeric, may_create boolean) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._reports_overage(user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._reports_overage(text) IS 'True when a user''s plan debits beyond the limit.';

CREATE OR REPLACE FUNCTION keyvault._debit_slow(user_id text, amount numeric, may_create boolean) RETURNS void
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
REVOKE ALL ON FUNCTION keyvault._reset_due_credits(batch integer) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._reset_due_credits(integer) IS 'reset_due_credits, after its caller was checked.';

-- Credits beyond the plan: top-ups, promotions, refunds.

CREATE TABLE keyvault.credit_grants (
    user_id    text COLLATE "C" NOT NULL,
    id         uuid NOT NULL DEFAULT keyvault.uuidv7(),
    amount     numeric(18,6) NOT NULL CHECK (amount > 0 AND amount < 'Infinity'),
    remaining  numeric(18,6) NOT NULL CHECK (remaining >= 0),
    expired    numeric(18,6) NOT NULL DEFAULT 0 CHECK (expired >= 0),
    kind       text NOT NULL DEFAULT 'grant' CHECK (kind IN ('grant', 'refund')),
    reason     text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    usage_id   uuid,
    idempotency_key text COLLATE "C",
    price_usd  numeric(18,6) CHECK (price_usd >= 0 AND price_usd < 'Infinity'),
    PRIMARY KEY (user_id, id),
    CONSTRAINT credit_grants_idempotency_key UNIQUE (user_id, idempotency_key),
    CONSTRAINT credit_grants_usage_id UNIQUE (user_id, usage_id),
    CHECK (remaining + expired <= amount)
);
REVOKE ALL ON keyvault.credit_grants FROM PUBLIC;

CREATE INDEX credit_grants_open ON keyvault.credit_grants (user_id) WHERE remaining > 0;

COMMENT ON TABLE keyvault.credit_grants IS
    'Credits beyond the plan. They are spent after the monthly ones: the earliest to expire first, then the oldest.';

COMMENT ON COLUMN keyvault.credit_grants.remaining IS
    'What is left, as of when grants last paid: at a grant, an expiry, a change of plan or a period''s end. credit_status is right at any time.';

COMMENT ON COLUMN keyvault.credit_grants.expired IS 'What was left when it expired.';

COMMENT ON COLUMN keyvault.credit_grants.kind IS 'grant, or refund of a usage record.';

COMMENT ON COLUMN keyvault.credit_grants.expires_at IS 'From then on what is left no longer counts; NULL: never.';

COMMENT ON COLUMN keyvault.credit_grants.usage_id IS 'The usage record that was refunded.';

COMMENT ON COLUMN keyvault.credit_grants.price_usd IS 'What the user paid for it, in USD; NULL or 0: nothing. revenue_by_user counts it.';

SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_grants', '');

ALTER TABLE keyvault.credit_grants ENABLE ROW LEVEL SECURITY;

-- Extra credits become a grant without expiry. It pays at the end of the period for what was used beyond the monthly ones.
INSERT INTO keyvault.credit_grants (user_id, amount, remaining, reason)
SELECT b.user_id, b.extra_credits, b.extra_credits, 'extra credits of version 0.1.0'
  FROM keyvault.credit_balances b WHERE b.extra_credits > 0;

CREATE POLICY own_rows ON keyvault.credit_grants FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));

CREATE POLICY read_by_access ON keyvault.credit_grants FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

CREATE FUNCTION keyvault._spend_extra(balance keyvault.credit_balances) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    owed numeric;
BEGIN
    owed := greatest(least(balance.credits_used - balance.monthly_credits, balance.extra_credits) - balance.extra_spent, 0);
    IF balance.monthly_credits IS NULL OR owed = 0 THEN
        RETURN balance;
    END IF;
    UPDATE keyvault.credit_grants g SET remaining = g.remaining - least(g.remaining, owed - o.before)
      FROM (SELECT n.id, sum(n.remaining) OVER (ORDER BY n.expires_at, n.created_at, n.id) - n.remaining AS before
              FROM keyvault.credit_grants n WHERE n.user_id = balance.user_id AND n.remaining > 0) o
     WHERE g.user_id = balance.user_id AND g.id = o.id AND o.before < owed;
    balance.extra_spent := balance.extra_spent + owed;
    RETURN balance;
END $$;
REVOKE ALL ON FUNCTION keyvault._spend_extra(balance keyvault.credit_balances) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._spend_extra(keyvault.credit_balances) IS
    'Has grants pay for what was used beyond the monthly credits and they have not paid for, in spend order; returns the balance with extra_spent raised. The caller holds its row lock and saves it.';

CREATE FUNCTION keyvault._expire_grants(balance keyvault.credit_balances) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    lost numeric;
BEGIN
    WITH ended AS (
        UPDATE keyvault.credit_grants g SET expired = g.remaining, remaining = 0
         WHERE g.user_id = balance.user_id AND g.remaining > 0 AND g.expires_at <= now()
        RETURNING g.expired)
    SELECT coalesce(sum(e.expired), 0) INTO lost FROM ended e;
    balance.extra_credits := balance.extra_credits - lost;
    RETURN balance;
END $$;
REVOKE ALL ON FUNCTION keyvault._expire_grants(balance keyvault.credit_balances) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._expire_grants(keyvault.credit_balances) IS
    'Ends a user''s expired grants; returns the balance without what was left of them. The caller holds its row lock and saves it; grants have paid.';

CREATE FUNCTION keyvault._balance_now(balance keyvault.credit_balances, used numeric) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    spent numeric;
    lost numeric;
    number integer;
BEGIN
    balance.credits_used := used;
    balance.credits_lent := 0;
    IF balance.due_at > now() THEN
        RETURN balance;
    END IF;
    spent := CASE WHEN balance.monthly_credits IS NULL THEN balance.extra_spent
                  ELSE greatest(least(balance.credits_used - balance.monthly_credits, balance.extra_credits), balance.extra_spent) END;
    SELECT coalesce(sum(g.remaining - least(greatest(spent - balance.extra_spent - g.before, 0), g.remaining)), 0) INTO lost
      FROM (SELECT n.remaining, n.expires_at,
                   sum(n.remaining) OVER (ORDER BY n.expires_at, n.created_at, n.id) - n.remaining AS before
              FROM keyvault.credit_grants n WHERE n.user_id = balance.user_id AND n.remaining > 0) g
     WHERE g.expires_at <= now();
    balance.extra_credits := balance.extra_credits - lost;
    IF balance.period_end <= now() THEN
        number := keyvault._period_number(balance.period_anchor, now());
        balance.extra_credits := balance.extra_credits - spent;
        balance.extra_spent := 0;
        balance.credits_used := 0;
        balance.credits_covered := 0;
        balance.credits_overage := 0;
        -- Without a plan there are none: NULL would be as many as one likes.
        balance.monthly_credits := (SELECT CASE WHEN p.plan IS NULL THEN 0 ELSE coalesce(u.monthly_credits, p.monthly_credits) END
                                      FROM keyvault.users u LEFT JOIN keyvault.plans p ON p.plan = u.plan
                                     WHERE u.user_id = balance.user_id);
        balance.period_start := keyvault._period_bound(balance.period_anchor, number);
        balance.period_end := keyvault._period_bound(balance.period_anchor, number + 1);
    END IF;
    RETURN balance;
END $$;
REVOKE ALL ON FUNCTION keyvault._balance_now(balance keyvault.credit_balances, used numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._balance_now(keyvault.credit_balances, numeric) IS
    'A balance, with what all its slots have used, as it is once what is due now() has been done, which nothing need have done yet: what _catch_up makes of it, without writing.';

CREATE FUNCTION keyvault._check_amount(amount numeric, at_least numeric, unit text = 'credits') RETURNS void
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF amount IS NULL OR amount = 'NaN' OR round(amount, 6) < at_least OR amount >= 1e12 THEN
        RAISE EXCEPTION 'amount must be between % and 999999999999 %', at_least, unit
            USING ERRCODE = 'invalid_parameter_value', HINT = 'An amount has six decimal places.';
    END IF;
END $$;
REVOKE ALL ON FUNCTION keyvault._check_amount(amount numeric, at_least numeric, unit text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._check_amount(numeric, numeric, text) IS 'Error 22023 unless amount is a number, of credits or another unit, of at_least or more.';

CREATE FUNCTION keyvault._grant_credits(user_id text, amount numeric, reason text, expires_at timestamptz, idempotency_key text,
                                        price_usd numeric, may_create boolean) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    balance keyvault.credit_balances;
    earlier keyvault.credit_grants;
    ends constant timestamptz := nullif($4, 'infinity');
BEGIN
    PERFORM keyvault._check_amount($2, 0.000001);
    IF octet_length($3) NOT BETWEEN 1 AND 1024 OR $3 IS NULL THEN
        RAISE EXCEPTION 'reason must be 1 to 1024 bytes long'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Say why the user is given credits, for whoever reads the account later.';
    END IF;
    IF octet_length($5) NOT BETWEEN 1 AND 255 THEN
        RAISE EXCEPTION 'idempotency key must be 1 to 255 bytes long' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Leave it out for a grant that may be repeated.';
    END IF;
    IF $6 = 'NaN' OR $6 < 0 OR $6 >= 1e12 THEN
        RAISE EXCEPTION 'price_usd must be between 0 and 999999999999' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Leave it out for credits that were not paid for.';
    END IF;
    balance := keyvault._lock_balance($1, $7);
    -- Under the balance's lock nobody else inserts the same key.
    SELECT * INTO earlier FROM keyvault.credit_grants g WHERE g.user_id = $1 AND g.idempotency_key = $5;
    IF FOUND THEN
        IF earlier.amount <> round($2, 6) OR earlier.reason <> $3 OR earlier.expires_at IS DISTINCT FROM ends
           OR earlier.price_usd IS DISTINCT FROM round($6, 6) THEN
            RAISE EXCEPTION 'idempotency key was already used for another grant'
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Use a new idempotency key for each different grant.';
        END IF;
        RETURN earlier.id;
    END IF;
    IF ends <= now() THEN
        RAISE EXCEPTION 'expires_at must be in the future'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Leave it out for credits that do not expire.';
    END IF;
    RETURN keyvault._add_grant(balance, keyvault.uuidv7(), $2, 'grant', $3, ends, NULL, $5, $6);
END $$;
REVOKE ALL ON FUNCTION keyvault._grant_credits(user_id text, amount numeric, reason text, expires_at timestamptz, idempotency_key text, price_usd numeric, may_create boolean) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._grant_credits(text, numeric, text, timestamptz, text, numeric, boolean) IS 'grant_credits, after its caller was checked.';

CREATE FUNCTION keyvault._add_grant(balance keyvault.credit_balances, id uuid, amount numeric, kind text, reason text,
                                    expires_at timestamptz, usage_id uuid, idempotency_key text, price_usd numeric = NULL) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    overage numeric;
BEGIN
    -- What was used before it is not this grant's to pay: overage is reported, and settled with that.
    balance := keyvault._spend_extra(balance);
    overage := keyvault._overage(balance);
    IF overage > 0 THEN
        PERFORM keyvault._close_stretch(balance, u.plan, 'grant', now(), overage)
           FROM keyvault.users u WHERE u.user_id = balance.user_id;
        balance.monthly_credits := balance.monthly_credits + overage;
        balance.credits_covered := balance.credits_covered + overage;
        balance.credits_overage := balance.credits_overage + overage;
    END IF;
    INSERT INTO keyvault.credit_grants (user_id, id, amount, remaining, kind, reason, expires_at, usage_id, idempotency_key, price_usd)
    VALUES (balance.user_id, $2, $3, $3, $4, $5, $6, $7, $8, $9);
    balance.extra_credits := balance.extra_credits + round($3, 6);
    PERFORM keyvault._save_balance(balance);
    RETURN $2;
END $$;
REVOKE ALL ON FUNCTION keyvault._add_grant(balance keyvault.credit_balances, id uuid, amount numeric, kind text, reason text, expires_at timestamptz, usage_id uuid, idempotency_key text, price_usd numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._add_grant(keyvault.credit_balances, uuid, numeric, text, text, timestamptz, uuid, text, numeric) IS
    'Adds a grant to a locked balance and returns its id.';

CREATE FUNCTION keyvault.grant_credits(user_id text, amount numeric, reason text, expires_at timestamptz = NULL, idempotency_key text = NULL,
                                       price_usd numeric = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_grant_credits';
REVOKE ALL ON FUNCTION keyvault.grant_credits(user_id text, amount numeric, reason text, expires_at timestamptz, idempotency_key text, price_usd numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.grant_credits(text, numeric, text, timestamptz, text, numeric) IS
    'Gives a user credits beyond the plan, until expires_at or for good, and returns the grant''s id. They can be used at once: they do not pay for overage that was reported before. price_usd is what the user paid for them, in USD. The same idempotency_key returns the same grant. Errors: 42501 without the right to act for any user or access admin, 22004 and 22023 bad argument, 22023 for a key that was used for another grant.';

CREATE FUNCTION keyvault.reset_due_credits(batch integer = 10000) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_reset_due_credits';
REVOKE ALL ON FUNCTION keyvault.reset_due_credits(batch integer) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.reset_due_credits(integer) IS
    'Begins the periods that are due and ends grants that have expired, for at most batch users whom nobody else has locked; returns how many. Commit and call again until it returns 0. Credits are right without it: it makes the next debit of each of them as fast as any. Errors: 42501 without access admin, 22023.';

ALTER TABLE keyvault.credit_holds ADD COLUMN reserved numeric(18,6) NOT NULL DEFAULT 0;
ALTER TABLE keyvault.credit_holds ADD COLUMN model text;
ALTER TABLE keyvault.credit_holds ADD COLUMN issued_key_id uuid;
ALTER TABLE keyvault.credit_holds ADD COLUMN member_id text;
ALTER TABLE keyvault.credit_holds ADD COLUMN cost_usd numeric(18,9) NOT NULL DEFAULT 0;
UPDATE keyvault.credit_holds SET reserved = amount;
UPDATE keyvault.credit_holds h SET model = r.model, cost_usd = r.estimated_usd
  FROM keyvault.requests r WHERE r.user_id = h.user_id AND r.hold_id = h.id;

CREATE INDEX credit_holds_id ON keyvault.credit_holds (id);

COMMENT ON COLUMN keyvault.credit_holds.amount IS 'What it takes off the credits left; 0 once it has expired and credits ran short.';

COMMENT ON COLUMN keyvault.credit_holds.reserved IS 'What was set aside.';

COMMENT ON COLUMN keyvault.credit_holds.cost_usd IS 'Estimated cost in USD, which budgets in USD count while the hold is open.';

CREATE OR REPLACE FUNCTION keyvault._sweep_holds(user_id text) RETURNS keyvault.credit_balances
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances;
    swept numeric;
BEGIN
    DELETE FROM keyvault.credit_holds h WHERE h.user_id = $1 AND h.expires_at <= now() - interval '7 days' AND h.amount = 0;
    WITH expired AS MATERIALIZED (
        SELECT h.id, h.amount FROM keyvault.credit_holds h
         WHERE h.user_id = $1 AND h.expires_at <= now() AND h.amount > 0 FOR UPDATE
    ), emptied AS (
        UPDATE keyvault.credit_holds h SET amount = 0 FROM expired e WHERE h.user_id = $1 AND h.id = e.id RETURNING e.amount)
    SELECT coalesce(sum(e.amount), 0) INTO swept FROM emptied e;
    UPDATE keyvault.credit_balances b SET credits_held = greatest(b.credits_held - swept, 0)
     WHERE b.user_id = $1 AND b.slot = 0
    RETURNING b.* INTO STRICT balance;
    RETURN balance;
END $$;

COMMENT ON FUNCTION keyvault._sweep_holds(text) IS
    'Takes a user''s expired holds off the balance, and returns it. Their rows stay a week, so that a late settlement finds them. The caller holds the balance''s row lock.';

CREATE FUNCTION keyvault._hold_credits(user_id text, amount numeric, expires_at timestamptz, may_create boolean, model text = NULL,
                                       cost_usd numeric = 0, issued_key_id uuid = NULL, member_id text = NULL) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    hold uuid := keyvault.uuidv7();
    balance keyvault.credit_balances;
    overage boolean;
BEGIN
    -- A user with budgets has no split balance.
    IF NOT keyvault._debit_split($1, amount, true) THEN
        balance := keyvault._require_credits($1, amount, may_create);
        IF balance.notice_at < 0 THEN
            PERFORM keyvault._check_budgets($1, model, issued_key_id, member_id, amount, cost_usd);
        END IF;
        UPDATE keyvault.credit_balances b SET credits_held = b.credits_held + amount
         WHERE b.user_id = $1 AND b.slot = 0;
    END IF;
    INSERT INTO keyvault.credit_holds (user_id, id, amount, reserved, expires_at, model, cost_usd, issued_key_id, member_id)
    VALUES ($1, hold, amount, amount, expires_at, model, cost_usd, issued_key_id, member_id);
    RETURN hold;
END $$;
REVOKE ALL ON FUNCTION keyvault._hold_credits(user_id text, amount numeric, expires_at timestamptz, may_create boolean, model text, cost_usd numeric, issued_key_id uuid, member_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._hold_credits(text, numeric, timestamptz, boolean, text, numeric, uuid, text) IS
    'Sets credits aside until expires_at and returns the hold''s id. Errors: KV001, 22023.';

CREATE FUNCTION keyvault._end_hold(user_id text, hold uuid) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    released numeric;
BEGIN
    DELETE FROM keyvault.credit_holds h WHERE h.user_id = $1 AND h.id = hold RETURNING h.amount INTO released;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    UPDATE keyvault.credit_balances b SET credits_held = greatest(b.credits_held - released, 0)
     WHERE b.user_id = $1 AND b.slot = 0;
    RETURN true;
END $$;
REVOKE ALL ON FUNCTION keyvault._end_hold(user_id text, hold uuid) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._end_hold(text, uuid) IS
    'Deletes a hold and gives it back to the balance, whose row lock the caller holds; false when there is no such hold.';

CREATE OR REPLACE FUNCTION keyvault._release_hold(user_id text, hold uuid) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- The balance is locked before the hold, in the order of every other path.
    PERFORM keyvault._gather_slots($1);
    RETURN keyvault._end_hold($1, hold);
END $$;

CREATE FUNCTION keyvault._settle_hold(user_id text, hold uuid, owed numeric) RETURNS numeric
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    balance keyvault.credit_balances := keyvault._lock_balance($1, false);
    credits_left numeric;
BEGIN
    IF keyvault._end_hold($1, hold) THEN
        balance := keyvault._gather_slots($1);
    END IF;
    credits_left := keyvault._credits_left(balance);
    IF credits_left < owed AND balance.credits_held > 0 THEN
        credits_left := keyvault._credits_left(keyvault._sweep_holds($1));
    END IF;
    IF credits_left IS NULL OR credits_left >= owed OR keyvault._reports_overage($1) THEN
        RETURN owed;
    END IF;
    RETURN greatest(credits_left, 0);
END $$;
REVOKE ALL ON FUNCTION keyvault._settle_hold(user_id text, hold uuid, owed numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._settle_hold(text, uuid, numeric) IS
    'Ends a hold, if it is still there, and returns how much of what is owed its user can be charged: all, or up to the limit. The caller inserts the usage record, with the rest as credits_overrun, in the same transaction.';

CREATE FUNCTION keyvault._reserve_credits(user_id text, amount numeric, ttl interval, model text, cost_usd numeric, issued_key_id uuid,
                                          member_id text, may_create boolean) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM keyvault._check_amount(amount, 0);
    IF cost_usd = 'NaN' OR cost_usd < 0 OR round(cost_usd, 9) >= 1e9 THEN
        RAISE EXCEPTION 'cost_usd must be between 0 and 999999999 USD'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'It is what the use is expected to cost the provider''s customer.';
    END IF;
    -- As intervals compare, a year has 360 days; in UTC no hour is left out.
    IF ttl IS NULL OR ttl <= interval '0' OR ttl > interval '2 years' OR now() AT TIME ZONE 'UTC' + ttl > now() AT TIME ZONE 'UTC' + interval '1 year' THEN
        RAISE EXCEPTION 'ttl must be more than 0 and at most a year'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'It is how long the credits stay set aside if nobody settles the hold.';
    END IF;
    RETURN keyvault._hold_credits($1, round(amount, 6), now() + ttl, may_create, model, coalesce(round(cost_usd, 9), 0), issued_key_id, member_id);
END $$;
REVOKE ALL ON FUNCTION keyvault._reserve_credits(user_id text, amount numeric, ttl interval, model text, cost_usd numeric, issued_key_id uuid, member_id text, may_create boolean) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._reserve_credits(text, numeric, interval, text, numeric, uuid, text, boolean) IS
    'reserve_credits, after its caller was checked.';

CREATE FUNCTION keyvault.reserve_credits(amount numeric, ttl interval = '10 min', user_id text = NULL, model text = NULL,
                                         cost_usd numeric = 0, issued_key_id uuid = NULL, member_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_reserve_credits';
REVOKE ALL ON FUNCTION keyvault.reserve_credits(amount numeric, ttl interval, user_id text, model text, cost_usd numeric, issued_key_id uuid, member_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.reserve_credits(numeric, interval, text, text, numeric, uuid, text) IS
    'Sets credits aside for a use whose cost is not known yet, for ttl at most, and returns the hold''s id. model, cost_usd (USD), issued_key_id and member_id are what budgets look at. user_id NULL is the identity. Errors: KV001 credit limit or budget, 22023, 42501.';

CREATE FUNCTION keyvault._hold_user(hold uuid) RETURNS text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    owner text;
BEGIN
    SELECT h.user_id INTO owner FROM keyvault.credit_holds h WHERE h.id = hold;
    RETURN owner;
END $$;
REVOKE ALL ON FUNCTION keyvault._hold_user(hold uuid) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._hold_user(uuid) IS 'Whose a hold is; NULL for none.';

CREATE FUNCTION keyvault._settle_credits(user_id text, hold uuid, amount numeric, type text, model text, input_tokens integer,
                                         output_tokens integer, metadata jsonb, provider text, cached_tokens bigint, cost_usd numeric) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    h keyvault.credit_holds;
    earlier keyvault.usage_records;
    owed numeric := round($3, 6);
    charged numeric;
BEGIN
    PERFORM keyvault._check_amount($3, 0);
    PERFORM keyvault._lock_balance($1, false);
    SELECT * INTO h FROM keyvault.credit_holds c WHERE c.user_id = $1 AND c.id = $2;
    IF NOT FOUND THEN
        -- A settled hold's usage record has the hold's id.
        earlier := keyvault._find_usage($1, $2);
        IF earlier.id IS NULL OR earlier.hold_id IS NULL THEN
            RAISE EXCEPTION 'there is no such hold'
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = 'It was released, or expired more than a week ago. Record what was used with keyvault.record_usage().';
        ELSIF earlier.credits + earlier.credits_overrun <> owed THEN
            RAISE EXCEPTION 'the hold was already settled with another amount'
                USING ERRCODE = 'invalid_parameter_value', HINT = 'A hold is settled once; further use is a usage record of its own.';
        END IF;
        RETURN $2;
    END IF;
    charged := keyvault._settle_hold($1, $2, owed);
    INSERT INTO keyvault.usage_records (user_id, id, type, provider, model, input_tokens, cached_tokens, output_tokens, tokens, credits,
                                        credits_overrun, cost_usd, issued_key_id, metadata, member_id, hold_id)
    VALUES ($1, $2, coalesce($4, 'api'), $9, coalesce($5, h.model), $6, $10, $7, coalesce($6, 0)::bigint + coalesce($7, 0), charged,
            owed - charged,
            coalesce($11, keyvault._price_usd($9, coalesce($5, h.model), $6, $10, $7, NULL, NULL), h.cost_usd), h.issued_key_id, coalesce($8, '{}'), h.member_id, $2);
    RETURN $2;
END $$;
REVOKE ALL ON FUNCTION keyvault._settle_credits(user_id text, hold uuid, amount numeric, type text, model text, input_tokens integer, output_tokens integer, metadata jsonb, provider text, cached_tokens bigint, cost_usd numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._settle_credits(text, uuid, numeric, text, text, integer, integer, jsonb, text, bigint, numeric) IS
    'settle_credits, after its caller was checked.';

CREATE FUNCTION keyvault.settle_credits(hold uuid, amount numeric, type text = 'api', model text = NULL, input_tokens integer = NULL,
                                        output_tokens integer = NULL, user_id text = NULL, metadata jsonb = '{}', provider text = NULL,
                                        cached_tokens bigint = NULL, cost_usd numeric = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_settle_credits';
REVOKE ALL ON FUNCTION keyvault.settle_credits(hold uuid, amount numeric, type text, model text, input_tokens integer, output_tokens integer, user_id text, metadata jsonb, provider text, cached_tokens bigint, cost_usd numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.settle_credits(uuid, numeric, text, text, integer, integer, text, jsonb, text, bigint, numeric) IS
    'Ends a hold with what was really used, more or less than held, as a usage record with the hold''s id, which is returned. Beyond the hold it charges up to the limit and records the rest as credits_overrun. cost_usd (USD) NULL is what model and tokens cost, where they have a price, else what was reserved. Works for an expired hold too, for a week; settling twice with one amount charges once. user_id NULL is the hold''s. Errors: 22023 no such hold, or settled with another amount; 42501.';

CREATE FUNCTION keyvault.release_credits(hold uuid, user_id text = NULL) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_release_credits';
REVOKE ALL ON FUNCTION keyvault.release_credits(hold uuid, user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.release_credits(uuid, text) IS
    'Gives back what a hold has set aside; false when it was settled or released already. user_id NULL is the hold''s. Error: 42501.';

-- Limits beside the plan's: for a user, one of its members, an issued key or a model, per day or month.

CREATE TABLE keyvault.credit_budgets (
    user_id      text COLLATE "C" NOT NULL,
    id           uuid NOT NULL DEFAULT keyvault.uuidv7(),
    scope        text NOT NULL CHECK (scope IN ('user', 'member', 'issued_key', 'model')),
    target       text COLLATE "C" NOT NULL DEFAULT '',
    per          text NOT NULL CHECK (per IN ('day', 'month')),
    unit         text NOT NULL CHECK (unit IN ('credits', 'usd')),
    amount       numeric(18,6) NOT NULL CHECK (amount >= 0 AND amount < 'Infinity'),
    spent        numeric(24,9) NOT NULL DEFAULT 0,
    window_start timestamptz NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    spent_apart  numeric(24,9) NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, id),
    CONSTRAINT credit_budgets_target UNIQUE (user_id, scope, target, per, unit),
    CHECK ((scope = 'user') = (target = ''))
);
REVOKE ALL ON keyvault.credit_budgets FROM PUBLIC;

COMMENT ON TABLE keyvault.credit_budgets IS
    'What a user, or a part of its use, may spend in a UTC day or month. A debit beyond it fails with KV001, the plan''s credits notwithstanding.';

COMMENT ON COLUMN keyvault.credit_budgets.scope IS 'What is limited: user, all use; member, issued_key, model: the use that names target.';

COMMENT ON COLUMN keyvault.credit_budgets.target IS 'The member_id, issued_key_id or model, whose dated names count too; empty for scope user.';

COMMENT ON COLUMN keyvault.credit_budgets.unit IS 'credits, or usd: provider cost, cost_usd of usage records.';

COMMENT ON COLUMN keyvault.credit_budgets.spent IS 'Spent since window_start, to the nine decimal places of cost_usd; nothing once that day or month is over.';
COMMENT ON COLUMN keyvault.credit_budgets.spent_apart IS
    'The part of spent that is for records with a created_at before window_start, less what those with a later one were counted for in an earlier day or month, and less refunds: the proof of spent.';

SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_budgets', '');

ALTER TABLE keyvault.credit_budgets ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_rows ON keyvault.credit_budgets FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));

CREATE POLICY read_by_access ON keyvault.credit_budgets FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

CREATE FUNCTION keyvault._model_family(model text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN regexp_replace(model, '-([0-9]{8}|[0-9]{4}-[0-9]{2}-[0-9]{2}|latest)$', '');
REVOKE ALL ON FUNCTION keyvault._model_family(model text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._model_family(text) IS
    'The model that a dated or "latest" name stands for, in prices and budgets; any other name as it is.';

CREATE FUNCTION keyvault._in_budget(budget keyvault.credit_budgets, model text, issued_key_id uuid, member_id text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE budget.scope WHEN 'user' THEN true
                             WHEN 'model' THEN coalesce(budget.target IN (model, keyvault._model_family(model)), false)
                             WHEN 'issued_key' THEN coalesce(issued_key_id::text = budget.target, false)
                             ELSE coalesce(member_id = budget.target, false) END;
REVOKE ALL ON FUNCTION keyvault._in_budget(budget keyvault.credit_budgets, model text, issued_key_id uuid, member_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._in_budget(keyvault.credit_budgets, text, uuid, text) IS 'True when a use counts in a budget.';

CREATE FUNCTION keyvault._budget_window(budget keyvault.credit_budgets) RETURNS timestamptz
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN greatest(date_trunc(budget.per, now(), 'UTC'), budget.window_start);
REVOKE ALL ON FUNCTION keyvault._budget_window(budget keyvault.credit_budgets) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._budget_window(keyvault.credit_budgets) IS
    'When the day or month began that a budget is in; the one that it is in already when the clock went back.';

CREATE FUNCTION keyvault._budget_held(budget keyvault.credit_budgets) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT coalesce(sum(CASE budget.unit WHEN 'usd' THEN h.cost_usd ELSE h.amount END), 0)
              FROM keyvault.credit_holds h
             WHERE h.user_id = budget.user_id AND h.expires_at > now()
               AND keyvault._in_budget(budget, h.model, h.issued_key_id, h.member_id));
END $$;
REVOKE ALL ON FUNCTION keyvault._budget_held(budget keyvault.credit_budgets) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._budget_held(keyvault.credit_budgets) IS 'What open holds set aside of a budget, in its unit.';

CREATE FUNCTION keyvault._budget_used(budget keyvault.credit_budgets, since timestamptz, except_tag bigint = NULL) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT coalesce(sum(CASE budget.unit WHEN 'usd' THEN r.cost_usd ELSE r.credits END), 0)
              FROM keyvault.usage_records r
             WHERE r.user_id = budget.user_id AND r.created_at >= since AND r.debit_tag IS DISTINCT FROM except_tag
               AND keyvault._in_budget(budget, r.model, r.issued_key_id, r.member_id));
END $$;
REVOKE ALL ON FUNCTION keyvault._budget_used(budget keyvault.credit_budgets, since timestamptz, except_tag bigint) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._budget_used(keyvault.credit_budgets, timestamptz, bigint) IS
    'What usage records with a created_at of since or later come to in a budget, in its unit, without those with the debit_tag except_tag.';

CREATE FUNCTION keyvault._require_budget(budget keyvault.credit_budgets, amount numeric) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    spent numeric := CASE WHEN keyvault._budget_window(budget) = budget.window_start THEN budget.spent ELSE 0 END;
    held numeric;
BEGIN
    IF amount = 0 THEN
        RETURN;
    END IF;
    held := keyvault._budget_held(budget);
    IF spent + held + amount > budget.amount THEN
        RAISE EXCEPTION 'budget of % % per % reached for % of user "%"', trim_scale(budget.amount), budget.unit, budget.per,
              CASE budget.scope WHEN 'user' THEN 'all use'
                                ELSE format('%s "%s"', replace(budget.scope, '_', ' '), budget.target) END, budget.user_id
            USING ERRCODE = 'KV001',
                  DETAIL = format('%s asked for; %s spent and %s held of %s.', trim_scale(amount), trim_scale(spent), trim_scale(held),
                                  trim_scale(budget.amount)),
                  HINT = format('The budget begins anew at %s UTC; keyvault.set_budget() changes it.',
                                to_char((keyvault._budget_window(budget) AT TIME ZONE 'UTC') + ('1 ' || budget.per)::interval,
                                        'YYYY-MM-DD HH24:MI'));
    END IF;
END $$;
REVOKE ALL ON FUNCTION keyvault._require_budget(budget keyvault.credit_budgets, amount numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._require_budget(keyvault.credit_budgets, numeric) IS 'Raises KV001, naming the budget, unless amount is left of it.';

CREATE FUNCTION keyvault._check_budgets(user_id text, model text, issued_key_id uuid, member_id text, credits numeric, cost_usd numeric)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    budget keyvault.credit_budgets;
BEGIN
    FOR budget IN SELECT * FROM keyvault.credit_budgets g WHERE g.user_id = $1 ORDER BY g.id LOOP
        IF keyvault._in_budget(budget, $2, $3, $4) THEN
            PERFORM keyvault._require_budget(budget, CASE budget.unit WHEN 'usd' THEN $6 ELSE $5 END);
        END IF;
    END LOOP;
END $$;
REVOKE ALL ON FUNCTION keyvault._check_budgets(user_id text, model text, issued_key_id uuid, member_id text, credits numeric, cost_usd numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._check_budgets(text, text, uuid, text, numeric, numeric) IS
    'Sees that a use fits into its user''s budgets. The caller holds the balance''s row lock. Error: KV001.';

CREATE FUNCTION keyvault._rows_owed(user_id text)
    RETURNS TABLE (model text, issued_key_id uuid, member_id text, credits numeric, cost_usd numeric, created_at timestamptz, settled boolean)
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_rows_owed';
REVOKE ALL ON FUNCTION keyvault._rows_owed(user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._rows_owed(text) IS
    'The usage records of a user that the debit under way is for; settled: they end a hold. No rows outside of a debit.';

CREATE FUNCTION keyvault._charge_budgets(user_id text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    budget keyvault.credit_budgets;
    begins timestamptz;
    added numeric;
    settled numeric;
    apart numeric;
BEGIN
    FOR budget IN SELECT * FROM keyvault.credit_budgets g WHERE g.user_id = $1 ORDER BY g.id LOOP
        begins := keyvault._budget_window(budget);
        SELECT coalesce(sum(u.amount) FILTER (WHERE NOT u.settled), 0), coalesce(sum(u.amount) FILTER (WHERE u.settled), 0),
               coalesce(sum(u.amount) FILTER (WHERE u.created_at < begins), 0)
          INTO added, settled, apart
          FROM (SELECT CASE budget.unit WHEN 'usd' THEN r.cost_usd ELSE r.credits END AS amount, r.settled, r.created_at
                  FROM keyvault._rows_owed($1) r
                 WHERE keyvault._in_budget(budget, r.model, r.issued_key_id, r.member_id)) u;
        -- What was reserved has happened: it is counted, not refused.
        PERFORM keyvault._require_budget(budget, added);
        IF added + settled > 0 THEN
            IF budget.window_start < begins THEN
                -- What this transaction inserted is counted from here on.
                budget.spent := 0;
                budget.spent_apart := -keyvault._budget_used(budget, begins, keyvault._debit_tag());
            END IF;
            UPDATE keyvault.credit_budgets g
               SET spent = budget.spent + added + settled, spent_apart = budget.spent_apart + apart, window_start = begins
             WHERE g.user_id = $1 AND g.id = budget.id;
        END IF;
    END LOOP;
END $$;
REVOKE ALL ON FUNCTION keyvault._charge_budgets(user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._charge_budgets(text) IS
    'Counts the debit under way in its user''s budgets. The caller holds the balance''s row lock. Error: KV001.';

CREATE FUNCTION keyvault._await_free_uses(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_await_free_uses';
REVOKE ALL ON FUNCTION keyvault._await_free_uses(text) FROM PUBLIC;
COMMENT ON FUNCTION keyvault._await_free_uses(text) IS
    'Waits for transactions under way that have recorded uses of no credits of a user, or of one of its 1/128 of all users; further ones go by the balance''s row lock until the transaction ends. To be called before that is locked.';

CREATE FUNCTION keyvault._budget_used_by_now(user_id text, id uuid) RETURNS numeric
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_budget_used_by_now';
REVOKE ALL ON FUNCTION keyvault._budget_used_by_now(text, uuid) FROM PUBLIC;
COMMENT ON FUNCTION keyvault._budget_used_by_now(text, uuid) IS
    'What usage records of a budget''s day or month come to, in its unit, of those that are committed when it is called; NULL for no such budget.';

CREATE FUNCTION keyvault._set_budget(user_id text, amount numeric, per text, unit text, scope text, target text, may_create boolean) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    budget keyvault.credit_budgets;
    the_target text := coalesce($6, '');
BEGIN
    IF $3 IS NULL OR $3 NOT IN ('day', 'month') OR $4 IS NULL OR $4 NOT IN ('credits', 'usd')
       OR $5 IS NULL OR $5 NOT IN ('user', 'member', 'issued_key', 'model') OR ($5 = 'user') <> (the_target = '')
    THEN
        RAISE EXCEPTION 'a budget is per day or month, in credits or usd, for a user, or for a member, an issued_key or a model that target names'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'See "Budgets" in doc/keyvault.md.';
    END IF;
    IF octet_length(the_target) > 255 THEN
        RAISE EXCEPTION 'target of a budget must be at most 255 bytes long'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass what usage records have as member_id, issued_key_id or model.';
    END IF;
    budget.amount := $2;
    budget.window_start := date_trunc($3, now(), 'UTC');
    IF $5 = 'issued_key' THEN
        BEGIN
            the_target := the_target::uuid::text;
        EXCEPTION
            WHEN invalid_text_representation THEN
                RAISE EXCEPTION 'target of a budget for an issued key must be its id, a uuid'
                    USING ERRCODE = 'invalid_text_representation', HINT = 'Pass what usage records have as issued_key_id.';
        END;
    END IF;
    PERFORM keyvault._await_free_uses($1);
    -- Nobody is made to have a budget removed.
    PERFORM keyvault._lock_balance($1, $7 AND $2 IS NOT NULL);
    IF $2 IS NULL THEN
        DELETE FROM keyvault.credit_budgets
         WHERE user_id = $1 AND scope = $5 AND target = the_target AND per = $3 AND unit = $4 RETURNING id INTO budget.id;
    ELSE
        PERFORM keyvault._check_amount($2, 0, CASE $4 WHEN 'usd' THEN 'USD' ELSE 'credits' END);
        INSERT INTO keyvault.credit_budgets AS g (user_id, scope, target, per, unit, amount, window_start)
        VALUES ($1, $5, the_target, $3, $4, $2, budget.window_start)
        ON CONFLICT (user_id, scope, target, per, unit) DO UPDATE SET amount = excluded.amount, updated_at = now()
        RETURNING * INTO budget;
        IF budget.created_at = budget.updated_at THEN
            -- What this day or month has seen already counts.
            UPDATE keyvault.credit_budgets g SET spent = keyvault._budget_used_by_now($1, budget.id), spent_apart = 0
             WHERE g.user_id = $1 AND g.id = budget.id;
        END IF;
    END IF;
    PERFORM keyvault._save_balance(keyvault._gather_slots($1));
    RETURN budget.id;
END $$;
REVOKE ALL ON FUNCTION keyvault._set_budget(user_id text, amount numeric, per text, unit text, scope text, target text, may_create boolean) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._set_budget(text, numeric, text, text, text, text, boolean) IS 'set_budget, after its caller was checked.';

CREATE FUNCTION keyvault.set_budget(user_id text, amount numeric, per text = 'month', unit text = 'credits', scope text = 'user',
                                    target text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_set_budget';
REVOKE ALL ON FUNCTION keyvault.set_budget(user_id text, amount numeric, per text, unit text, scope text, target text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.set_budget(text, numeric, text, text, text, text) IS
    'Limits what a user (scope user), or its use that names target as member_id, issued_key_id or model, may spend per UTC day or month, in credits or USD of provider cost; returns the budget''s id. A budget of the same scope, target, per and unit is changed; amount NULL removes it. Errors: 42501 without the right to act for any user or access admin, 22004, 22023 bad argument, or a user that does not exist and has a budget removed, 22P02 for an issued key that is no uuid.';

CREATE VIEW keyvault.budget_status WITH (security_invoker = true, security_barrier = true) AS
SELECT g.user_id, g.id, g.scope, nullif(g.target, '') AS target, g.per, g.unit, g.amount, s.spent, s.held,
       greatest(g.amount - s.spent - s.held, 0) AS remaining, keyvault._budget_window(g) AS window_start,
       ((keyvault._budget_window(g) AT TIME ZONE 'UTC') + ('1 ' || g.per)::interval) AT TIME ZONE 'UTC' AS resets_at
  FROM keyvault.credit_budgets g
 CROSS JOIN LATERAL (SELECT CASE WHEN keyvault._budget_window(g) = g.window_start THEN g.spent ELSE 0 END AS spent,
                            keyvault._budget_held(g) AS held) s;
REVOKE ALL ON keyvault.budget_status FROM PUBLIC;

COMMENT ON VIEW keyvault.budget_status IS
    'Budgets of the acting user, of every user for access analyst or admin: what is spent, held by open holds, and left, in the budget''s unit.';
COMMENT ON COLUMN keyvault.budget_status.user_id IS 'Whose budget.';
COMMENT ON COLUMN keyvault.budget_status.id IS 'The id that set_budget() returned.';
COMMENT ON COLUMN keyvault.budget_status.scope IS 'What is limited: user, all use; member, issued_key, model: the use that names target.';
COMMENT ON COLUMN keyvault.budget_status.target IS 'The member_id, issued_key_id or model, whose dated names count too; NULL for scope user.';
COMMENT ON COLUMN keyvault.budget_status.per IS 'day or month, in UTC.';
COMMENT ON COLUMN keyvault.budget_status.unit IS 'credits, or usd: provider cost.';
COMMENT ON COLUMN keyvault.budget_status.amount IS 'What may be spent per day or month, in that unit.';
COMMENT ON COLUMN keyvault.budget_status.spent IS 'Spent since window_start, in that unit.';
COMMENT ON COLUMN keyvault.budget_status.held IS 'Set aside by open holds, in that unit.';
COMMENT ON COLUMN keyvault.budget_status.remaining IS 'What is left of amount after both; 0 when nothing is.';
COMMENT ON COLUMN keyvault.budget_status.window_start IS 'When the day or month under way began.';
COMMENT ON COLUMN keyvault.budget_status.resets_at IS 'When it ends, and spent begins anew.';

COMMENT ON FUNCTION keyvault._debit_tag() IS
    'The number of this transaction in this installation of the extension, the default of usage_records.debit_tag.';

ALTER TABLE keyvault.usage_records ALTER COLUMN credits SET DEFAULT NULL;
ALTER TABLE keyvault.usage_records ADD COLUMN reasoning_tokens bigint;
ALTER TABLE keyvault.usage_records ADD COLUMN units numeric(18,6);
ALTER TABLE keyvault.usage_records ADD COLUMN member_id text;
ALTER TABLE keyvault.usage_records ADD COLUMN hold_id uuid;
ALTER TABLE keyvault.usage_records ADD COLUMN price jsonb;

COMMENT ON COLUMN keyvault.usage_records.user_id IS 'Whose use; the balance of this user is debited.';
COMMENT ON COLUMN keyvault.usage_records.created_at IS 'When the use was, in the years 1970 to 9999: now unless the INSERT says otherwise. It is debited in the period of the INSERT.';
COMMENT ON COLUMN keyvault.usage_records.id IS 'A UUID version 7, made by the INSERT unless it gives one.';
COMMENT ON COLUMN keyvault.usage_records.provider IS 'Whose service was used; NULL: not known, or none. Where the row is priced by its model, whose price it was.';
COMMENT ON COLUMN keyvault.usage_records.model IS 'The model that was used, at most 255 bytes, as provider; NULL: none is named.';
COMMENT ON COLUMN keyvault.usage_records.tokens IS 'All tokens together. Each count of a record is at most 1000000000000.';
COMMENT ON COLUMN keyvault.usage_records.request_id IS 'The request whose answer this is; NULL: not a provider call.';
COMMENT ON COLUMN keyvault.usage_records.api_key_id IS 'The API key that the call used; NULL: not known, or a key for the call alone.';
COMMENT ON COLUMN keyvault.usage_records.issued_key_id IS 'The issued key that the use came with, as the application states it, for budgets.';
COMMENT ON COLUMN keyvault.usage_records.idempotency_key IS 'The caller''s own name for the use, for reference: record_usage() sees that it is recorded once, an INSERT does not.';
COMMENT ON COLUMN keyvault.usage_records.metadata IS 'The application''s own notes; erase_user empties them.';

COMMENT ON COLUMN keyvault.usage_records.credits IS
    'Credits debited by this row. An INSERT that leaves them out has the row priced, by its model and tokens or by the cost_usd it gives.';

COMMENT ON COLUMN keyvault.usage_records.credits_overrun IS
    'Credits a provider call cost beyond what the user had left, or that its answer claims beyond what is believed; not debited.';

COMMENT ON COLUMN keyvault.usage_records.reasoning_tokens IS 'The part of output_tokens that the model spent on thinking.';

COMMENT ON COLUMN keyvault.usage_records.units IS 'What is not counted in tokens: images, seconds, pages; model_prices.unit says what.';

COMMENT ON COLUMN keyvault.usage_records.member_id IS 'Who of an organization used it, for budgets.';

COMMENT ON COLUMN keyvault.usage_records.hold_id IS 'The hold, or the request, that this row settled. Budgets count such a row and do not refuse it.';

COMMENT ON COLUMN keyvault.usage_records.price IS
    'The price that was used: provider, model, valid_from, USD per million tokens, per request and per unit, the context tier, and what made credits of it; as unknown, what the plan did without a price; as claimed, what an answer states beyond what is believed. NULL for a row with credits of its own, and for a call that was charged as estimated.';

COMMENT ON COLUMN keyvault.usage_records.debit_tag IS
    'Names the transaction that debited the row: 15 bits of the installation, 48 of the transaction id. A row that arrives with another transaction''s tag, by pg_restore or logical replication, is not debited again.';

CREATE FUNCTION keyvault._price_usage() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_price_usage';
REVOKE ALL ON FUNCTION keyvault._price_usage() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._price_usage() IS
    'Row trigger of usage_records: prices a row without credits. Error: 22023 for an unknown model on a plan that refuses it.';

CREATE OR REPLACE FUNCTION keyvault._refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.metadata = '{}' AND to_jsonb(NEW) - 'metadata' = to_jsonb(OLD) - 'metadata' THEN
            RETURN NEW;
        END IF;
    -- A month that was detached is a table of its own, which whoever keeps it may empty.
    ELSIF TG_OP = 'TRUNCATE' AND TG_RELID <> 'keyvault.usage_records'::regclass
          AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = TG_RELID AND i.inhparent = 'keyvault.usage_records'::regclass)
    THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'usage records are append-only'
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = 'Correct a record with a further one; retire old months by detaching their partition.';
END $$;

COMMENT ON FUNCTION keyvault._refuse_change() IS 'Trigger that refuses UPDATE, DELETE and TRUNCATE of usage_records with 55000; only metadata may be emptied, as erase_user does.';

-- In C, without WHEN: PostgreSQL would plan a condition anew for every statement.
CREATE TRIGGER price_usage BEFORE INSERT ON keyvault.usage_records
    FOR EACH ROW EXECUTE FUNCTION keyvault._price_usage();

ALTER TABLE keyvault.usage_records ENABLE ALWAYS TRIGGER price_usage;

CREATE OR REPLACE FUNCTION keyvault._guard_partition(partition regclass) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER flush_debits AFTER INSERT ON %s EXECUTE FUNCTION keyvault._flush_debits()', partition);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER flush_debits', partition);
    EXECUTE format('CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON %s EXECUTE FUNCTION keyvault._refuse_change()', partition);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER refuse_truncate', partition);
    -- Not an index of the parent: a dump would make the partitions' ones again that ATTACH has made.
    IF partition <> 'keyvault.usage_records'::regclass THEN
        EXECUTE format('CREATE INDEX ON %s USING brin (debit_tag) WITH (pages_per_range = 32, autosummarize = on)', partition);
    END IF;
END $$;

COMMENT ON FUNCTION keyvault._guard_partition(regclass) IS
    'Gives a table of usage records what partitions do not inherit: the statement triggers, and an index by which the roll-up finds new rows.';

-- The index of _guard_partition, for the partitions that there are.
DO $$
DECLARE
    partition regclass;
BEGIN
    FOR partition IN SELECT i.inhrelid FROM pg_inherits i WHERE i.inhparent = 'keyvault.usage_records'::regclass LOOP
        EXECUTE format('CREATE INDEX ON %s USING brin (debit_tag) WITH (pages_per_range = 32, autosummarize = on)', partition);
    END LOOP;
END $$;

-- Credits given back for a use.

CREATE FUNCTION keyvault._uuid_time(id uuid) RETURNS timestamptz
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN substr(id::text, 15, 1) = '7'
                THEN to_timestamp(('x' || translate(left(id::text, 13), '-', ''))::bit(48)::bigint / 1000.0) END;
REVOKE ALL ON FUNCTION keyvault._uuid_time(id uuid) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._uuid_time(uuid) IS 'When a UUID of version 7 was made, to the millisecond (RFC 9562, section 5.7); NULL for another.';

CREATE FUNCTION keyvault._find_usage(user_id text, id uuid) RETURNS keyvault.usage_records
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- Mostly created_at, so that one partition is read.
    made timestamptz := keyvault._uuid_time($2);
    found_row keyvault.usage_records;
BEGIN
    SELECT * INTO found_row FROM keyvault.usage_records r
     WHERE r.user_id = $1 AND r.id = $2 AND r.created_at BETWEEN made - interval '1 hour' AND made + interval '1 minute';
    IF NOT FOUND THEN
        SELECT * INTO found_row FROM keyvault.usage_records r WHERE r.user_id = $1 AND r.id = $2 LIMIT 1;
    END IF;
    RETURN found_row;
END $$;
REVOKE ALL ON FUNCTION keyvault._find_usage(user_id text, id uuid) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._find_usage(text, uuid) IS 'A user''s usage record by its id; NULL when there is none.';

CREATE FUNCTION keyvault._refund_budgets(refunded keyvault.usage_records) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- A use that settles a hold of the application has the id of the hold, and is recorded at created_at.
    recorded timestamptz := coalesce(CASE WHEN refunded.hold_id IS DISTINCT FROM refunded.id THEN keyvault._uuid_time(refunded.id) END,
                                     refunded.created_at);
BEGIN
    UPDATE keyvault.credit_budgets g
       SET spent = g.spent - least(refunded.credits, g.spent), spent_apart = g.spent_apart - least(refunded.credits, g.spent)
     WHERE g.user_id = refunded.user_id AND g.unit = 'credits' AND g.window_start = keyvault._budget_window(g)
       AND refunded.created_at >= g.window_start
       -- It was counted when it was recorded, or, being there already, when the budget was made.
       AND greatest(recorded, g.created_at) >= g.window_start
       AND keyvault._in_budget(g, refunded.model, refunded.issued_key_id, refunded.member_id);
END $$;
REVOKE ALL ON FUNCTION keyvault._refund_budgets(keyvault.usage_records) FROM PUBLIC;
COMMENT ON FUNCTION keyvault._refund_budgets(keyvault.usage_records) IS
    'Gives the credits of a refunded record back to the budgets of the day or month under way that have counted it. The caller holds the balance''s row lock.';

CREATE FUNCTION keyvault._refund_usage(user_id text, id uuid, reason text) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    refunded keyvault.usage_records;
    refund uuid := keyvault.uuidv7();
    earlier uuid;
    balance keyvault.credit_balances := keyvault._lock_balance($1, false);
BEGIN
    IF octet_length($3) NOT BETWEEN 1 AND 1024 OR $3 IS NULL THEN
        RAISE EXCEPTION 'reason must be 1 to 1024 bytes long'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Say why the use is refunded, for whoever reads the account later.';
    END IF;
    SELECT g.id INTO earlier FROM keyvault.credit_grants g WHERE g.user_id = $1 AND g.usage_id = $2;
    IF FOUND THEN
        RETURN earlier;
    END IF;
    refunded := keyvault._find_usage($1, $2);
    IF refunded.id IS NULL THEN
        RAISE EXCEPTION 'user "%" has no such usage record', $1
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the id of a row of keyvault.usage_records.';
    END IF;
    IF refunded.credits = 0 THEN
        RAISE EXCEPTION 'the usage record cost no credits'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'There is nothing to give back.';
    END IF;
    PERFORM keyvault._refund_budgets(refunded);
    PERFORM keyvault._add_grant(balance, refund, refunded.credits, 'refund', $3, NULL, $2, NULL);
    INSERT INTO keyvault.usage_records (user_id, id, type, provider, model, payer, credits, metadata)
    VALUES ($1, refund, 'refund', refunded.provider, refunded.model, refunded.payer, 0,
            jsonb_build_object('refund_of', $2, 'credits', refunded.credits, 'reason', $3));
    RETURN refund;
END $$;
REVOKE ALL ON FUNCTION keyvault._refund_usage(user_id text, id uuid, reason text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._refund_usage(text, uuid, text) IS 'refund_usage, after its caller was checked.';

CREATE FUNCTION keyvault.refund_usage(id uuid, reason text, user_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_refund_usage';
REVOKE ALL ON FUNCTION keyvault.refund_usage(id uuid, reason text, user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.refund_usage(uuid, text, text) IS
    'Gives back what a usage record cost: a grant without expiry, whatever had paid for it, and a usage record of type refund that says why, both with the id that is returned. Budgets in credits of the day or month under way that have counted the record get them back, too. A record is refunded once; again returns the same id. user_id NULL is the identity. Errors: 42501, 22004, 22023 for a record that the user has not or that cost nothing.';

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
REVOKE ALL ON keyvault.usage_rollup FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._begin_rollup() FROM PUBLIC;

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
REVOKE ALL ON keyvault.usage_daily FROM PUBLIC;

COMMENT ON TABLE keyvault.usage_daily IS
    'Usage added up per user, UTC day, provider, model, type and payer, as far as usage_rollup says. Derived from usage_records: a dump leaves it out, and the restored rows are added up anew. Read the views.';

COMMENT ON COLUMN keyvault.usage_daily.provider IS 'The first 255 characters of the records'' provider, empty where they name none; model likewise. Records cannot have more, but those of version 0.1.0.';

COMMENT ON COLUMN keyvault.usage_daily.calls IS 'Number of usage records.';

CREATE INDEX usage_daily_month ON keyvault.usage_daily ((date_trunc('month', day::timestamp)::date));

CREATE INDEX usage_daily_day ON keyvault.usage_daily (day);

CREATE TABLE keyvault.usage_late (LIKE keyvault.usage_daily, id uuid NOT NULL DEFAULT keyvault.uuidv7(), PRIMARY KEY (user_id, id));
REVOKE ALL ON keyvault.usage_late FROM PUBLIC;

COMMENT ON TABLE keyvault.usage_late IS
    'What usage_daily is still to be changed by: records that a restore or a subscription brought, added up by the statement that brought them. The roll-up takes the rows away.';

CREATE TABLE keyvault.usage_retired (LIKE keyvault.usage_late INCLUDING DEFAULTS, PRIMARY KEY (user_id, id));
REVOKE ALL ON keyvault.usage_retired FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._keep_own_rollup() FROM PUBLIC;

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

CREATE TRIGGER keep_own BEFORE DELETE ON keyvault.usage_records
    FOR EACH ROW EXECUTE FUNCTION keyvault._keep_own_rollup();

ALTER TABLE keyvault.usage_records ENABLE REPLICA TRIGGER keep_own;

CREATE FUNCTION keyvault._fresh_from() RETURNS bigint
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_fresh_from';
REVOKE ALL ON FUNCTION keyvault._fresh_from() FROM PUBLIC;
COMMENT ON FUNCTION keyvault._fresh_from() IS 'usage_rollup.rolled_to as the query under way sees it: the planner can ask for it.';
CREATE FUNCTION keyvault._fresh_until() RETURNS bigint
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_fresh_until';
REVOKE ALL ON FUNCTION keyvault._fresh_until() FROM PUBLIC;
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
REVOKE ALL ON keyvault._usage FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._count_restored( user_ids text[], created_ats timestamptz[], providers text[], models text[], types text[], payers text[], input_tokens bigint[], cached_tokens bigint[], output_tokens bigint[], tokens bigint[], credits numeric[], overruns numeric[], costs numeric[], tags bigint[]) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._roll_up_usage(batch integer, OUT rolled bigint, OUT more boolean) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault.rebuild_usage_daily() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.rebuild_usage_daily() IS
    'Adds usage up from usage_records anew and returns the number of rows in usage_daily: after records came or went behind the triggers'' back, as by pg_restore --disable-triggers or ATTACH PARTITION of a table with rows, or when usage_rollup has lost its row, which is made again. A superuser calls it, in READ COMMITTED. Error: 42501.';

-- A debit_tag of 0.1.0 is a hash, or a bare transaction id while the library was newer than the SQL. Hashes that would
-- pass for tags of this installation are made negative, which its tags never are.
ALTER TABLE keyvault.usage_records DISABLE TRIGGER refuse_change;
UPDATE keyvault.usage_records SET debit_tag = debit_tag # (-1::bigint << 63)
 WHERE debit_tag >= (SELECT tag_base FROM keyvault.usage_rollup)
   AND debit_tag < (SELECT tag_base + (1::bigint << 48) FROM keyvault.usage_rollup);
ALTER TABLE keyvault.usage_records ENABLE ALWAYS TRIGGER refuse_change;
SELECT keyvault.rebuild_usage_daily();

-- Periods that have ended, from what was used in them, so that balances can be proved. Usage that was debited in another
-- period than that of its created_at counts for the last one.
INSERT INTO keyvault.credit_periods (user_id, ended_by, plan, period_start, period_end, ended_at, monthly_credits,
                                     credits_covered, credits_used, extra_spent, overage)
WITH past AS MATERIALIZED (
    SELECT b.user_id, b.period_anchor, u.plan, p.monthly_credits, keyvault._period_number(b.period_anchor, b.period_start) - 1 AS last,
           (SELECT sum(d.credits) FROM keyvault.usage_daily d WHERE d.user_id = b.user_id) - b.credits_used AS credits
      FROM keyvault.credit_balances b JOIN keyvault.users u ON u.user_id = b.user_id JOIN keyvault.plans p ON p.plan = u.plan
), dated AS (
    SELECT a.user_id, least(keyvault._period_number(a.period_anchor, d.day::timestamp AT TIME ZONE 'UTC'), a.last) AS number, d.credits
      FROM past a JOIN keyvault.usage_daily d ON d.user_id = a.user_id
     WHERE a.credits > 0 AND keyvault._period_number(a.period_anchor, d.day::timestamp AT TIME ZONE 'UTC') <= a.last
), numbered AS (
    SELECT n.user_id, n.number, sum(n.credits) AS credits
      FROM (SELECT d.user_id, d.number, d.credits FROM dated d
             UNION ALL
            SELECT a.user_id, a.last, a.credits - coalesce((SELECT sum(d.credits) FROM dated d WHERE d.user_id = a.user_id), 0)
              FROM past a WHERE a.credits > 0) n
     GROUP BY n.user_id, n.number HAVING sum(n.credits) <> 0
)
SELECT a.user_id, 'period', a.plan, keyvault._period_bound(a.period_anchor, n.number), keyvault._period_bound(a.period_anchor, n.number + 1),
       keyvault._period_bound(a.period_anchor, n.number + 1), a.monthly_credits, 0, n.credits, 0, 0
  FROM numbered n JOIN past a ON a.user_id = n.user_id;

-- Months of usage: partitions made ahead, rows of the default partition given theirs, old months retired.
-- Inserts would have to wait behind whoever waits for a lock that excludes them: so these functions wait for
-- 100 ms at most, and are called again later. DETACH ... CONCURRENTLY is no way: PostgreSQL refuses it for a table
-- that has a default partition.

CREATE FUNCTION keyvault._usage_partition_name(month timestamptz) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 'usage_records_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM');
REVOKE ALL ON FUNCTION keyvault._usage_partition_name(month timestamptz) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._make_usage_partition(month timestamptz) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._make_usage_partition(timestamptz) IS
    'Makes the partition of usage_records for the month that begins at month, and moves its rows there from the default partition. Error: 55P03 when a lock is not to be had within 100 ms.';

CREATE OR REPLACE FUNCTION keyvault._make_usage_partitions(ahead integer = 3) RETURNS integer
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
REVOKE ALL ON FUNCTION keyvault._usage_kept_from() FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._settle_default_partition(max_rows bigint) FROM PUBLIC;

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

REVOKE ALL ON FUNCTION keyvault._require_read_committed() FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._retire_usage(kept_from timestamptz) FROM PUBLIC;

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

REVOKE ALL ON FUNCTION keyvault._retire_late_usage(integer, timestamptz) FROM PUBLIC;

ALTER TABLE keyvault.master_keys ADD COLUMN status text NOT NULL DEFAULT 'primary' CHECK (status IN ('primary', 'old', 'retired'));
ALTER TABLE keyvault.master_keys ADD COLUMN retired_at timestamptz;

UPDATE keyvault.master_keys SET status = 'old' WHERE version < (SELECT max(version) FROM keyvault.master_keys);

CREATE UNIQUE INDEX master_keys_primary ON keyvault.master_keys (status) WHERE status = 'primary';

COMMENT ON COLUMN keyvault.master_keys.status IS
    'primary: wraps new data keys; old: an earlier one, which still opens some; retired: wraps nothing, and never will again.';

COMMENT ON COLUMN keyvault.master_keys.retired_at IS 'From when on no data key of this database needs it; backups of before do.';

-- Which master key wraps what: rotation finds what is left by it.
CREATE INDEX data_keys_kek_id ON keyvault.data_keys (substr(wrapped, 9, 16), user_id, version);

CREATE INDEX data_keys_created_at ON keyvault.data_keys (created_at);

ALTER TABLE keyvault.api_keys ALTER COLUMN fingerprint DROP NOT NULL;
ALTER TABLE keyvault.api_keys DROP CONSTRAINT api_keys_source_check;
ALTER TABLE keyvault.api_keys ADD CONSTRAINT api_keys_source_check CHECK (source IN ('user', 'platform', 'reference'));
ALTER TABLE keyvault.api_keys ADD COLUMN problem text;
ALTER TABLE keyvault.api_keys SET (fillfactor = 70);
ALTER TABLE keyvault.api_keys ADD COLUMN use_count bigint NOT NULL DEFAULT 0;
ALTER TABLE keyvault.api_keys ALTER name SET STATISTICS 0, ALTER hint SET STATISTICS 0, ALTER problem SET STATISTICS 0;
ALTER TABLE keyvault.users ALTER email SET STATISTICS 0, ALTER name SET STATISTICS 0, ALTER image SET STATISTICS 0,
    ALTER status_reason SET STATISTICS 0, ALTER stripe_customer_id SET STATISTICS 0, ALTER stripe_subscription_id SET STATISTICS 0,
    ALTER stripe_price_id SET STATISTICS 0;
DELETE FROM pg_catalog.pg_statistic s USING pg_catalog.pg_attribute a
 WHERE s.starelid = a.attrelid AND s.staattnum = a.attnum AND a.attstattarget = 0
   AND a.attrelid IN ('keyvault.users'::regclass, 'keyvault.api_keys'::regclass);
ALTER TABLE keyvault.providers ENABLE ROW LEVEL SECURITY;
CREATE POLICY read_all ON keyvault.providers FOR SELECT USING (true);
CREATE POLICY change_by_access ON keyvault.providers FOR UPDATE USING ((SELECT keyvault._may_administer()));

CREATE INDEX api_keys_boxes ON keyvault.api_keys (user_id, id) WHERE fingerprint IS NULL;
CREATE INDEX api_keys_user_id ON keyvault.api_keys USING hash (user_id);
CREATE INDEX api_keys_hash_of_name ON keyvault.api_keys
    USING hash (hashtextextended(user_id, hashtextextended(provider, hashtextextended(name, 0))));

COMMENT ON COLUMN keyvault.api_keys.status IS 'active; failed: the provider refused it when it was last used, or it came sealed and is none, as problem says.';
COMMENT ON COLUMN keyvault.api_keys.ciphertext IS 'Secret record, or a sealed box that the worker has yet to make a record of: see "Formats" in doc/keyvault.md.';

COMMENT ON COLUMN keyvault.api_keys.fingerprint IS 'Keyed hash under the user''s own data key: equal for equal keys of one user, and only there. NULL for a sealed box.';

COMMENT ON COLUMN keyvault.api_keys.last_used_at IS 'When the key was last looked up or called with; written within keyvault.key_use_flush_interval.';

COMMENT ON COLUMN keyvault.api_keys.use_count IS 'How often the key was looked up or called with, platform and user alike; written as last_used_at is.';

COMMENT ON COLUMN keyvault.api_keys.problem IS 'Why a sealed box could not be opened, or no record made of it.';

COMMENT ON COLUMN keyvault.api_keys.source IS 'user; platform: its own; reference: what is encrypted names where the key is kept.';

CREATE TABLE keyvault.key_replacements (
    user_id    text COLLATE "C" NOT NULL,
    id         uuid NOT NULL,
    status     text NOT NULL DEFAULT 'waiting' CHECK (status IN ('waiting', 'refused')),
    box        bytea CHECK (octet_length(box) BETWEEN 100 AND 8192),
    problem    text,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    PRIMARY KEY (user_id, id),
    FOREIGN KEY (user_id, id) REFERENCES keyvault.api_keys ON UPDATE CASCADE ON DELETE CASCADE,
    CHECK ((box IS NULL) = (status = 'refused'))
);
REVOKE ALL ON keyvault.key_replacements FROM PUBLIC;
CREATE INDEX key_replacements_waiting ON keyvault.key_replacements (user_id, id) WHERE status = 'waiting';
COMMENT ON TABLE keyvault.key_replacements IS 'Sealed boxes that wait to take the place of a key, which goes on until then, and why those that could not did not.';
COMMENT ON COLUMN keyvault.key_replacements.id IS 'The id in api_keys of the key that is to be replaced.';
COMMENT ON COLUMN keyvault.key_replacements.status IS 'waiting: for the worker to open the box; refused: the box was bad, and is gone.';
COMMENT ON COLUMN keyvault.key_replacements.box IS 'Sealed box: see "Formats" in doc/keyvault.md.';
COMMENT ON COLUMN keyvault.key_replacements.problem IS 'Why the box was refused, or is not yet a record.';
COMMENT ON COLUMN keyvault.key_replacements.created_at IS 'When the box was stored.';
COMMENT ON COLUMN keyvault.key_replacements.expires_at IS 'When the key in the box is to expire; NULL for never.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.key_replacements', '');

ALTER TABLE keyvault.key_replacements ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.key_replacements FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.key_replacements FOR SELECT
    USING ((SELECT keyvault._may_administer()));

CREATE OR REPLACE VIEW keyvault.api_key_status WITH (security_invoker = true, security_barrier = true) AS
SELECT k.user_id, k.provider, k.name, k.hint, k.status, k.source, k.id,
       k.expires_at, k.last_used_at, k.last_verified_at, k.rotated_at, k.created_at,
       coalesce(m.calls, 0) AS calls_this_month,
       coalesce(m.cost_usd, 0) AS cost_usd_this_month,
       coalesce(w.problem, k.problem) AS problem, k.use_count, w.status AS replacement, w.created_at AS replacement_at
  FROM keyvault.api_keys k
  LEFT JOIN keyvault.key_replacements w ON w.user_id = k.user_id AND w.id = k.id
  LEFT JOIN LATERAL (
       SELECT count(*) AS calls, sum(r.cost_usd) AS cost_usd
         FROM keyvault.usage_records r
        WHERE r.user_id = k.user_id AND r.api_key_id = k.id
          AND r.created_at >= date_trunc('month', now(), 'UTC')) m ON true;
COMMENT ON VIEW keyvault.api_key_status IS
    'The acting user''s keys without their values: hint, status and this month''s calls (UTC). Where a sealed key is to take a key''s place, replacement says how that stands (waiting, refused), replacement_at when it was stored, and problem why not; status is the present key''s. Access admin sees every user''s.';
COMMENT ON COLUMN keyvault.api_key_status.user_id IS 'Whose key; '''' is the platform.';
COMMENT ON COLUMN keyvault.api_key_status.provider IS 'Whose service the key is for.';
COMMENT ON COLUMN keyvault.api_key_status.name IS 'Tells a user''s keys of a provider apart; default is used where none is named.';
COMMENT ON COLUMN keyvault.api_key_status.hint IS 'How the key begins and ends, for people.';
COMMENT ON COLUMN keyvault.api_key_status.status IS 'active; failed: the provider refused it when it was last used, or it came sealed and is none, as problem says.';
COMMENT ON COLUMN keyvault.api_key_status.source IS 'How it came.';
COMMENT ON COLUMN keyvault.api_key_status.id IS 'The id of the key, as usage_records.api_key_id has it.';
COMMENT ON COLUMN keyvault.api_key_status.expires_at IS 'From then on it is not used; NULL: never.';
COMMENT ON COLUMN keyvault.api_key_status.last_used_at IS 'When it was last opened, some seconds late; NULL: never.';
COMMENT ON COLUMN keyvault.api_key_status.last_verified_at IS 'When the provider last took it; NULL: never.';
COMMENT ON COLUMN keyvault.api_key_status.rotated_at IS 'When its value last changed.';
COMMENT ON COLUMN keyvault.api_key_status.created_at IS 'When it was first stored.';
COMMENT ON COLUMN keyvault.api_key_status.calls_this_month IS 'Usage records of the UTC month that used it.';
COMMENT ON COLUMN keyvault.api_key_status.cost_usd_this_month IS 'What the provider charges for them, in USD.';
COMMENT ON COLUMN keyvault.api_key_status.problem IS 'What is wrong with it, or with the key that is to take its place; NULL: nothing.';
COMMENT ON COLUMN keyvault.api_key_status.use_count IS 'How often it was opened.';
COMMENT ON COLUMN keyvault.api_key_status.replacement IS 'How a sealed key stands that is to take its place: waiting or refused; NULL: there is none.';
COMMENT ON COLUMN keyvault.api_key_status.replacement_at IS 'When that was stored.';

-- The keys that clients seal API keys to.

CREATE FUNCTION keyvault.delete_platform_key(provider text, name text = 'default') RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_delete_platform_key';
REVOKE ALL ON FUNCTION keyvault.delete_platform_key(provider text, name text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.delete_platform_key(text, text) IS
    'Deletes the platform''s key for a provider; true if there was one. Requests that would use it fail with KV003 from then on. Old row versions leave the disk as those of delete_api_key do. Access admin. Errors: 22004, 22023 unknown provider, 42501.';

COMMENT ON FUNCTION keyvault.user_api_keys(text) IS
    'The user''s keys named ''default'' as {"provider": "key"}, {} when there is none; NULL is the acting user. Expired keys are left out; one that cannot be opened is left out with a warning KV005. Errors: KV004, 42501.';

CREATE TABLE keyvault.sealing_keys (
    key_id     bytea PRIMARY KEY CHECK (octet_length(key_id) = 4),
    id         uuid NOT NULL,
    public_key bytea NOT NULL CHECK (octet_length(public_key) = 65),
    ciphertext bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    retired_at timestamptz NOT NULL
);
REVOKE ALL ON keyvault.sealing_keys FROM PUBLIC;

COMMENT ON TABLE keyvault.sealing_keys IS 'The vault''s pairs of keys on P-256 to which clients seal API keys; several may be in use at once.';

COMMENT ON COLUMN keyvault.sealing_keys.key_id IS 'The first four bytes of the SHA-256 of public_key.';

COMMENT ON COLUMN keyvault.sealing_keys.public_key IS 'A point on P-256, uncompressed (SEC 1, section 2.3.3).';

COMMENT ON COLUMN keyvault.sealing_keys.ciphertext IS 'The private key, 32 bytes, as a secret record of the platform''s.';

COMMENT ON COLUMN keyvault.sealing_keys.retired_at IS 'Boxes for this key are taken until then.';

ALTER TABLE keyvault.sealing_keys ENABLE ROW LEVEL SECURITY;
SELECT pg_catalog.pg_extension_config_dump('keyvault.sealing_keys', '');

CREATE TABLE keyvault.sealed_boxes (
    user_id    text COLLATE "C" NOT NULL,
    digest     bytea NOT NULL CHECK (octet_length(digest) = 32),
    key_id     bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, digest)
);
REVOKE ALL ON keyvault.sealed_boxes FROM PUBLIC;

COMMENT ON TABLE keyvault.sealed_boxes IS 'SHA-256 of the boxes that were taken, so that none is taken twice; forgotten with the sealing key.';

ALTER TABLE keyvault.sealed_boxes ENABLE ROW LEVEL SECURITY;

SELECT pg_catalog.pg_extension_config_dump('keyvault.sealed_boxes', '');

CREATE FUNCTION keyvault._forget_sealing_keys() RETURNS bigint
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    retired bytea[];
    forgotten bigint;
BEGIN
    -- Who seals a box holds its key until his transaction ends: the next statement sees all boxes of these, but with an old snapshot.
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
        RETURN 0;
    END IF;
    retired := ARRAY(SELECT s.key_id FROM keyvault.sealing_keys s WHERE s.retired_at <= now() FOR UPDATE SKIP LOCKED);
    IF retired = '{}' THEN
        RETURN 0;
    END IF;
    WITH forgotten AS (
        DELETE FROM keyvault.sealing_keys s
         WHERE s.key_id = ANY (retired)
           AND NOT EXISTS (SELECT FROM keyvault.api_keys k WHERE k.fingerprint IS NULL AND substr(k.ciphertext, 2, 4) = s.key_id)
           AND NOT EXISTS (SELECT FROM keyvault.key_replacements r WHERE r.status = 'waiting' AND substr(r.box, 2, 4) = s.key_id)
           AND NOT EXISTS (SELECT FROM keyvault.requests r
                            WHERE r.status IN ('queued', 'sent') AND substr(r.call_key, 1, 1) = 'B' AND substr(r.call_key, 3, 4) = s.key_id)
        RETURNING s.key_id
    ), digests AS (
        DELETE FROM keyvault.sealed_boxes b USING forgotten f WHERE b.key_id = f.key_id)
    SELECT count(*) INTO forgotten FROM forgotten;
    RETURN forgotten;
END $$;
REVOKE ALL ON FUNCTION keyvault._forget_sealing_keys() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._forget_sealing_keys() IS
    'Deletes sealing keys whose boxes are no longer taken and that no stored box needs, with the digests of their boxes; returns how many. None above READ COMMITTED.';

CREATE FUNCTION keyvault._forget_problem() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    NEW.problem := NULL;
    RETURN NEW;
END $$;
REVOKE ALL ON FUNCTION keyvault._forget_problem() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._forget_problem() IS 'Trigger of api_keys: a new value has not the problem of the one before.';

CREATE TRIGGER forget_problem BEFORE UPDATE OF ciphertext ON keyvault.api_keys
    FOR EACH ROW WHEN (OLD.problem IS NOT NULL) EXECUTE FUNCTION keyvault._forget_problem();

CREATE FUNCTION keyvault._wake_worker_now() RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_wake_worker_now';
REVOKE ALL ON FUNCTION keyvault._wake_worker_now() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._wake_worker_now() IS 'Has this database''s worker look at its work at once, before the transaction ends.';

CREATE FUNCTION keyvault._describe_sealing_key(key_id bytea) RETURNS jsonb
    LANGUAGE sql STABLE PARALLEL SAFE
BEGIN ATOMIC
    SELECT jsonb_build_object(
        'format', 'keyvault/seal/v1',
        'key_id', encode(s.key_id, 'base64'),
        'public_key', replace(encode(s.public_key, 'base64'), chr(10), ''),
        'jwk', jsonb_build_object('kty', 'EC', 'crv', 'P-256', 'use', 'enc', 'kid', encode(s.key_id, 'hex'),
            'x', translate(encode(substr(s.public_key, 2, 32), 'base64'), '+/=', '-_'),
            'y', translate(encode(substr(s.public_key, 34, 32), 'base64'), '+/=', '-_')),
        'vault_id', v.vault_id,
        'curve', 'P-256', 'kdf', 'HKDF-SHA256', 'cipher', 'AES-256-GCM',
        'associated_data', replace(encode(convert_to('keyvault/seal/v1', 'UTF8') || int4send(16) || uuid_send(v.vault_id), 'base64'), chr(10), ''),
        'accepted_until', s.retired_at)
      FROM keyvault.sealing_keys s, keyvault.vault v WHERE s.key_id = $1;
END;
REVOKE ALL ON FUNCTION keyvault._describe_sealing_key(key_id bytea) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._describe_sealing_key(bytea) IS 'What sealing_key() returns, for the sealing key with that id.';

CREATE FUNCTION keyvault.sealing_key() RETURNS jsonb
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_sealing_key';
REVOKE ALL ON FUNCTION keyvault.sealing_key() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.sealing_key() IS
    'The public key to which a client seals API keys, and what else that takes, bytes in base64: public_key (a point on P-256) and the same as jwk, key_id, associated_data (its beginning), vault_id, accepted_until. Format: "Sealed box" in doc/keyvault.md. Makes the key at first use and when it is older than keyvault.sealing_key_lifetime. Errors: KV004, 25006 there is none yet and the transaction is READ ONLY.';

CREATE FUNCTION keyvault.store_sealed_api_key(provider text, sealed bytea, name text = 'default', user_id text = NULL, expires_at timestamptz = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_sealed_api_key';
REVOKE ALL ON FUNCTION keyvault.store_sealed_api_key(provider text, sealed bytea, name text, user_id text, expires_at timestamp with time zone) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.store_sealed_api_key(text, bytea, text, text, timestamptz) IS
    'Keeps a key that a client sealed to sealing_key() for this user and provider; returns its id. A box is taken once. With keyvault.reveal off the worker opens it, and a key that it is to replace goes on until then: see api_key_status. Errors: KV004, KV005 it does not open, was sealed for another user or provider, or was stored before, KV009 malformed key, 22004, 22023, 40001, 42501 as store_api_key.';

-- Development mode: keys of a .env file.

CREATE FUNCTION keyvault._env_file_has_key(provider text) RETURNS boolean
    LANGUAGE c STABLE STRICT PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_env_file_has_key';
REVOKE ALL ON FUNCTION keyvault._env_file_has_key(provider text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._env_file_has_key(text) IS
    'In development mode: has the .env file a key for the provider? NULL in production. Error: 55000 keyvault.env_file is not set.';

-- Many keys at once: taken in, exported for recovery, restored.

CREATE FUNCTION keyvault.store_api_keys(keys jsonb, user_id text = NULL, expires_at timestamptz = NULL) RETURNS TABLE (provider text, id uuid)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_api_keys';
REVOKE ALL ON FUNCTION keyvault.store_api_keys(keys jsonb, user_id text, expires_at timestamp with time zone) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.store_api_keys(jsonb, text, timestamptz) IS
    'Encrypts and keeps a user''s keys {"provider": "key", ...} under the name ''default'', all or none; returns their ids. Pass the keys as a bind parameter. Errors: as store_api_key, KV009 naming the provider; 22023 keys is not such an object.';

CREATE FUNCTION keyvault.export_recovery_bundle(public_key text, user_ids text[] = NULL) RETURNS bytea
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_export_recovery_bundle';
REVOKE ALL ON FUNCTION keyvault.export_recovery_bundle(public_key text, user_ids text[]) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.export_recovery_bundle(text, text[]) IS
    'The keys of these users, or of all and the platform, as an OpenPGP message (RFC 4880) to an armored public key (RSA or ElGamal): JSON lines {"user_id", "provider", "name", "key", "expires_at"}. A key that cannot be opened is left out with a warning, KV004 or KV005. No access includes it: a superuser, or who was granted EXECUTE. Errors: KV004 and KV005 no key opens, 22023 unknown users, 42501 keyvault.reveal is off, 39000 pgcrypto cannot use the key.';

CREATE FUNCTION keyvault.restore_api_keys(lines text) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_restore_api_keys';
REVOKE ALL ON FUNCTION keyvault.restore_api_keys(lines text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.restore_api_keys(text) IS
    'Stores the keys of a decrypted recovery bundle in this vault, replacing those of the same names; returns how many. One that store_api_key would not take, or whose user''s data key cannot be opened, is left out with a warning that names line and, as far as they are known here, user and provider. No access includes it. Errors, after which nothing is stored: 22023 a line is none of a bundle''s, KV004 no master key at all, 40001, 42501.';

-- Other keys in the place of old ones, and what is due for it.

CREATE VIEW keyvault.master_key_status WITH (security_invoker = true, security_barrier = true) AS
SELECT m.version, encode(m.kek_id, 'hex') AS kek_id, m.status,
       (SELECT count(*) FROM keyvault.data_keys d WHERE substr(d.wrapped, 9, 16) = m.kek_id) AS data_keys,
       m.created_at, m.retired_at
  FROM keyvault.master_keys m;
REVOKE ALL ON keyvault.master_key_status FROM PUBLIC;

COMMENT ON VIEW keyvault.master_key_status IS
    'Each master key that this vault has known: its id, its status, and how many data keys it wraps, which is a rotation''s progress. For superusers.';
COMMENT ON COLUMN keyvault.master_key_status.version IS 'Counts the master keys of this vault, in the order they were first used.';
COMMENT ON COLUMN keyvault.master_key_status.kek_id IS 'What the key is known by, in hexadecimal digits.';
COMMENT ON COLUMN keyvault.master_key_status.status IS 'primary wraps, old only opens, retired is given up.';
COMMENT ON COLUMN keyvault.master_key_status.data_keys IS 'How many data keys it wraps: 0 when a rotation from it is complete.';
COMMENT ON COLUMN keyvault.master_key_status.created_at IS 'When this vault first used it.';
COMMENT ON COLUMN keyvault.master_key_status.retired_at IS 'When it wrapped nothing any more and was given up; NULL: not yet.';

CREATE TABLE keyvault.rotation_requests (
    user_id  text COLLATE "C" NOT NULL,
    what     text NOT NULL CHECK (what IN ('master_key', 'data_key')),
    asked_at timestamptz NOT NULL DEFAULT now(),
    batch_size integer NOT NULL CHECK (batch_size BETWEEN 1 AND 100000),
    PRIMARY KEY (user_id, what)
);
REVOKE ALL ON keyvault.rotation_requests FROM PUBLIC;

COMMENT ON TABLE keyvault.rotation_requests IS
    'Rotations that were asked for while keyvault.reveal was off, until the worker has done them. The user '''' is the platform, and the master key''s.';

COMMENT ON COLUMN keyvault.rotation_requests.batch_size IS 'How many data keys to wrap again in a transaction, for the master key.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.rotation_requests', '');

ALTER TABLE keyvault.rotation_requests ENABLE ROW LEVEL SECURITY;

CREATE FUNCTION keyvault._may_open_keys() RETURNS boolean
    LANGUAGE c STABLE
    AS 'MODULE_PATHNAME', 'keyvault_may_open_keys';
REVOKE ALL ON FUNCTION keyvault._may_open_keys() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._may_open_keys() IS 'True where keys can be opened: in every session, or, with keyvault.reveal off, in the worker alone.';

CREATE FUNCTION keyvault.rotate_master_key() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_rotate_master_key';
REVOKE ALL ON FUNCTION keyvault.rotate_master_key() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.rotate_master_key() IS
    'Makes the first of the loaded master keys the one that wraps, wraps every data key of another again, and retires those that wrap nothing any more; returns how many data keys were wrapped; NULL with keyvault.reveal off, when the worker does it. In one transaction, which waits for, and then keeps back, those who store a first key of a user: for large vaults CALL keyvault.rotate_master_key(batch). A superuser calls it. Errors: KV004 a master key is not loaded, 55000 the first one was retired, 25000 isolation level, 42501 keyvault.reveal is off.';

CREATE PROCEDURE keyvault.rotate_master_key(batch integer)
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_rotate_master_key_in_batches';
REVOKE ALL ON PROCEDURE keyvault.rotate_master_key(batch integer) FROM PUBLIC;

COMMENT ON PROCEDURE keyvault.rotate_master_key(integer) IS
    'As rotate_master_key(), with a transaction for each batch of 1 to 100000 data keys, NULL for 1000: nobody is kept waiting, and after an interruption another call goes on. Waits once for the transactions that are storing first keys. Not inside a transaction block (2D000). A superuser calls it. Errors: those of rotate_master_key(), 22023.';

CREATE FUNCTION keyvault._rotate_master_key_step(batch integer) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_rotate_master_key_step';
REVOKE ALL ON FUNCTION keyvault._rotate_master_key_step(integer) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._rotate_master_key_step(integer) IS
    'A step of rotate_master_key(batch), which its caller commits: the switch to the first loaded key, or a batch of up to batch data keys, or the end; true with the end. Errors: those of rotate_master_key(), 55P03 the end waits for transactions that store first keys.';

CREATE FUNCTION keyvault.rotate_data_key(user_id text) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_rotate_data_key';
REVOKE ALL ON FUNCTION keyvault.rotate_data_key(user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.rotate_data_key(text) IS
    'Seals a user''s secrets again, under a new version of the data key, and deletes the version before; returns the new version, NULL for a user without a data key, and with keyvault.reveal off, when the worker does it. The user '''' is the platform. A secret that does not open is left as it is, with a warning, and its data key with it. Access admin. Errors: KV004, KV005 the data key cannot be opened, 22004, 25000 isolation level, 42501.';

CREATE FUNCTION keyvault.rotate_data_keys(older_than interval, batch integer = 100) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_rotate_data_keys';
REVOKE ALL ON FUNCTION keyvault.rotate_data_keys(older_than interval, batch integer) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.rotate_data_keys(interval, integer) IS
    'rotate_data_key for up to batch users, 1 to 10000, whose data key is older than older_than, the oldest first; returns how many, 0 when all is done. A user whose data key cannot be opened is passed over with a warning KV005. Access admin. Errors: KV004, 22004, 22023 batch, or a negative older_than, 25000, 42501.';

CREATE FUNCTION keyvault._rotate_due(batch integer, OUT done integer, OUT more boolean)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    oldest constant interval := current_setting('keyvault.data_key_max_age')::interval;
    asked keyvault.rotation_requests;
BEGIN
    done := 0;
    more := false;
    IF NOT keyvault._may_open_keys() THEN
        RETURN;
    END IF;
    FOR asked IN SELECT * FROM keyvault.rotation_requests r ORDER BY r.what DESC, r.asked_at, r.user_id LIMIT batch FOR UPDATE SKIP LOCKED LOOP
        BEGIN
            IF asked.what = 'master_key' THEN
                IF NOT keyvault._rotate_master_key_step(asked.batch_size) THEN
                    -- The next step is another transaction, and calls are looked after in between.
                    more := true;
                    RETURN;
                END IF;
            ELSE
                PERFORM keyvault.rotate_data_key(asked.user_id);
            END IF;
            DELETE FROM keyvault.rotation_requests r WHERE r.user_id = asked.user_id AND r.what = asked.what;
            done := done + 1;
        EXCEPTION
            -- One that cannot be done must not hold up the others; it is tried again.
            WHEN SQLSTATE 'KV004' OR SQLSTATE 'KV005' OR object_not_in_prerequisite_state THEN
                RAISE WARNING 'rotation of the % of user "%" failed: %', replace(asked.what, '_', ' '), asked.user_id, SQLERRM
                    USING ERRCODE = SQLSTATE, HINT = 'It is tried again. A superuser gives it up with DELETE FROM keyvault.rotation_requests.';
            WHEN lock_not_available THEN
                NULL;
        END;
    END LOOP;
    IF oldest > '0' AND done < batch THEN
        done := done + keyvault.rotate_data_keys(oldest, batch - done);
    END IF;
    more := done >= batch;
END $$;
REVOKE ALL ON FUNCTION keyvault._rotate_due(batch integer, OUT done integer, OUT more boolean) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._rotate_due(integer) IS
    'Does up to batch of the rotations that were asked for, the master key''s a step at a time, and of data keys older than keyvault.data_key_max_age: how many, and whether there may be more. Nothing where keys cannot be opened.';

CREATE VIEW keyvault.api_keys_due WITH (security_invoker = true, security_barrier = true) AS
SELECT k.provider, k.name, k.user_id, k.expires_at,
       floor(extract(epoch FROM k.expires_at - now()) / 86400)::integer AS days_left, k.hint, k.status
  FROM keyvault.api_keys k
 WHERE k.expires_at < now() + interval '30 days'
 ORDER BY k.expires_at;
REVOKE ALL ON keyvault.api_keys_due FROM PUBLIC;

COMMENT ON VIEW keyvault.api_keys_due IS
    'The acting user''s provider keys that have to be replaced: they expire within 30 days, or have. days_left is negative for those. Access admin sees every user''s.';
COMMENT ON COLUMN keyvault.api_keys_due.provider IS 'Whose service the key is for.';
COMMENT ON COLUMN keyvault.api_keys_due.name IS 'Tells a user''s keys of a provider apart.';
COMMENT ON COLUMN keyvault.api_keys_due.user_id IS 'Whose key; '''' is the platform.';
COMMENT ON COLUMN keyvault.api_keys_due.expires_at IS 'From then on it is not used.';
COMMENT ON COLUMN keyvault.api_keys_due.days_left IS 'Whole days until then; negative: since.';
COMMENT ON COLUMN keyvault.api_keys_due.hint IS 'How the key begins and ends, for people.';
COMMENT ON COLUMN keyvault.api_keys_due.status IS 'active; failed: the provider refused it, or it came sealed and is none.';

CREATE FUNCTION keyvault._platform_master_key(before integer) RETURNS integer
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT max(m.version) FROM keyvault.data_keys d JOIN keyvault.master_keys m ON m.kek_id = substr(d.wrapped, 9, 16)
     WHERE d.user_id = '' AND d.version < $1;
END;
REVOKE ALL ON FUNCTION keyvault._platform_master_key(before integer) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._platform_master_key(integer) IS
    'The newest version of the master key that wraps a data key of the platform''s of an earlier version than that; NULL when there is none.';

CREATE FUNCTION keyvault._note_boxes_destroyed(version integer) RETURNS void
    LANGUAGE sql VOLATILE
BEGIN ATOMIC
    UPDATE keyvault.users u
       SET boxes_destroyed_at = clock_timestamp(),
           erased_master_key = greatest(u.erased_master_key, keyvault._platform_master_key($1))
     WHERE u.status = 'erased' AND u.boxes_destroyed_at IS NULL
       AND NOT EXISTS (SELECT FROM keyvault.sealing_keys s WHERE s.created_at <= u.erased_at);
END;
REVOKE ALL ON FUNCTION keyvault._note_boxes_destroyed(version integer) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._note_boxes_destroyed(integer) IS
    'Notes, before the platform''s data keys of earlier versions are deleted, for which erased users nothing is left here that opens their sealed boxes: those without a sealing key from before the erasure.';

CREATE FUNCTION keyvault.retire_sealing_keys() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_retire_sealing_keys';
REVOKE ALL ON FUNCTION keyvault.retire_sealing_keys() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.retire_sealing_keys() IS
    'Has no more boxes taken for the keys that sealing_key() has given so far, and deletes those that no stored box needs, the others in maintenance when the worker has opened these; returns how many were deleted. The next sealing_key() makes a new one. A step of a complete erasure: see erasure_status. Access admin. Errors: 25000 above READ COMMITTED, 42501.';

CREATE VIEW keyvault.erasure_status WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.erased_at, u.status_reason, e.master_key_version,
       CASE WHEN u.boxes_destroyed_at IS NOT NULL
            THEN (SELECT m.retired_at FROM keyvault.master_keys m WHERE m.version = e.master_key_version) END AS master_key_retired_at,
       u.boxes_destroyed_at
  FROM keyvault.users u,
       LATERAL (SELECT CASE WHEN u.boxes_destroyed_at IS NOT NULL THEN u.erased_master_key
                            ELSE greatest(u.erased_master_key, keyvault._platform_master_key(2147483647)) END AS master_key_version) e
 WHERE u.status = 'erased';
REVOKE ALL ON keyvault.erasure_status FROM PUBLIC;

COMMENT ON VIEW keyvault.erasure_status IS
    'Erased users. Copies of their keys in backups and WAL from before erased_at open with the master key of master_key_version, or an earlier one: destroy every copy of those keys, once master_key_retired_at is set, and nothing opens them anywhere. Where a copy may be a sealed box, this database itself holds what opens it until boxes_destroyed_at: retire_sealing_keys(), then rotate_data_key(''''), then rotate the master key. For superusers.';
COMMENT ON COLUMN keyvault.erasure_status.user_id IS 'Who was erased.';
COMMENT ON COLUMN keyvault.erasure_status.erased_at IS 'When.';
COMMENT ON COLUMN keyvault.erasure_status.status_reason IS 'Why, as the caller said.';
COMMENT ON COLUMN keyvault.erasure_status.master_key_version IS 'The newest master key that opens copies of the user''s keys from before; NULL: none does.';
COMMENT ON COLUMN keyvault.erasure_status.master_key_retired_at IS 'When that was retired, from when on destroying every copy of it completes the erasure; NULL: not yet.';
COMMENT ON COLUMN keyvault.erasure_status.boxes_destroyed_at IS 'When the keys were destroyed that sealed boxes of the user open with; NULL: not yet.';

-- Keys that are kept on a Vault server.

CREATE FUNCTION keyvault.store_api_key_reference(provider text, reference text, name text = 'default', user_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_api_key_reference';
REVOKE ALL ON FUNCTION keyvault.store_api_key_reference(provider text, reference text, name text, user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.store_api_key_reference(text, text, text, text) IS
    'Keeps where a user''s key is instead of the key, vault:mount/path#field (HashiCorp Vault or OpenBao, key/value engine version 2); the worker fetches it for calls. Returns its id. Access app. Errors: 22004, 22023, 42501, KV004, 40001 as store_api_key.';

-- When and how often keys are used: noted in shared memory, written in batches.

CREATE FUNCTION keyvault._flush_key_use() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_flush_key_use';
REVOKE ALL ON FUNCTION keyvault._flush_key_use() FROM PUBLIC;

COMMENT ON FUNCTION keyvault._flush_key_use() IS
    'Writes the noted uses of this database''s keys to api_keys (last_used_at, use_count) now; returns for how many keys. Rows that are locked wait for the next flush. The worker does the same by itself.';

ALTER TABLE keyvault.providers RENAME COLUMN env_variable TO env_var;
ALTER TABLE keyvault.providers RENAME CONSTRAINT providers_env_variable_check TO providers_env_var_check;
-- A pattern that does not compile refused every key of its provider: correct or remove it, then update again.
ALTER TABLE keyvault.providers ADD CONSTRAINT providers_key_pattern_check CHECK (('' ~ key_pattern) IS NOT NULL OR key_pattern IS NULL);
COMMENT ON COLUMN keyvault.providers.key_pattern IS 'A regular expression that a key must match, besides 8 to 512 printable ASCII characters; 2201B for one that does not compile.';

COMMENT ON COLUMN keyvault.providers.env_var IS
    'The environment variable the provider''s own SDK reads its key from, and development mode; NULL for the provider''s name and _API_KEY.';

CREATE FUNCTION keyvault._are_context_tiers(tiers jsonb) RETURNS boolean
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN tiers IS NULL OR (jsonb_typeof(tiers) = 'array' AND NOT EXISTS (
        SELECT FROM jsonb_array_elements(tiers) t
         WHERE jsonb_typeof(t) <> 'object' OR NOT t ? 'over' OR EXISTS (
            SELECT FROM jsonb_each(t) e
             WHERE e.key NOT IN ('over', 'input', 'cached_input', 'output', 'reasoning') OR jsonb_typeof(e.value) <> 'number'
                OR e.value::numeric < 0 OR e.value::numeric >= 1e9)));
END $$;
REVOKE ALL ON FUNCTION keyvault._are_context_tiers(tiers jsonb) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._are_context_tiers(jsonb) IS 'True for NULL and for what model_prices.context_tiers may hold.';

ALTER TABLE keyvault.model_prices ADD COLUMN reasoning_usd_per_mtok numeric(18,9) CHECK (reasoning_usd_per_mtok >= 0 AND reasoning_usd_per_mtok < 'Infinity');
ALTER TABLE keyvault.model_prices ADD COLUMN usd_per_request numeric(18,9) NOT NULL DEFAULT 0 CHECK (usd_per_request >= 0 AND usd_per_request < 'Infinity');
ALTER TABLE keyvault.model_prices ADD COLUMN usd_per_unit numeric(18,9) NOT NULL DEFAULT 0 CHECK (usd_per_unit >= 0 AND usd_per_unit < 'Infinity');
ALTER TABLE keyvault.model_prices ADD COLUMN unit text CHECK (unit <> '');
ALTER TABLE keyvault.model_prices ADD COLUMN context_tiers jsonb CHECK (keyvault._are_context_tiers(context_tiers));

COMMENT ON COLUMN keyvault.model_prices.reasoning_usd_per_mtok IS 'For the output tokens that are reasoning; NULL: as the others.';

COMMENT ON COLUMN keyvault.model_prices.usd_per_request IS 'Besides tokens, for each use.';

COMMENT ON COLUMN keyvault.model_prices.usd_per_unit IS 'Besides tokens, for each of usage_records.units.';

COMMENT ON COLUMN keyvault.model_prices.unit IS 'What units counts, for people: image, second, page.';

COMMENT ON COLUMN keyvault.model_prices.context_tiers IS
    'Prices of a whole use with more input tokens than "over": [{"over": 200000, "input": 6, "cached_input": 0.6, "output": 22.5, "reasoning": 22.5}, ...], each in USD per million tokens; a price that is left out stays. The highest tier that applies counts.';

-- Past the trigger, so that what is shipped stays seeded. An administrator's own rows stay as they are.
ALTER TABLE keyvault.model_prices DISABLE TRIGGER keep_customized;
INSERT INTO keyvault.model_prices
    (provider, model, valid_from, input_usd_per_mtok, output_usd_per_mtok, cached_input_usd_per_mtok, context_window, source, seeded)
VALUES
    ('gemini', 'gemini-3.8-flash', '2027-01-01 00:00+00', 1.5, 7.5, 0.15, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('gemini', 'gemini-3.7-flash', '2027-01-01 00:00+00', 1.5, 7.5, 0.15, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('gemini', 'gemini-3.6-flash', '2027-01-01 00:00+00', 1.5, 7.5, 0.15, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true)
ON CONFLICT DO NOTHING;
UPDATE keyvault.model_prices m
   SET context_tiers = jsonb_build_array(jsonb_strip_nulls(jsonb_build_object('over', t.over_tokens, 'input', t.input,
                                                                              'cached_input', t.cached_input, 'output', t.output)))
  FROM (VALUES
          ('openai', 'gpt-6-astra', 271999, 20, 2, 75),
          ('openai', 'gpt-6-sol', 272000, 4, 0.4, 15),
          ('openai', 'gpt-6-luna', 272000, 0.2, 0.02, 0.75),
          ('openai', 'gpt-5.6-sol', 271999, 8, 0.8, 30),
          ('openai', 'gpt-5.6-terra', 271999, 4, 0.4, 18),
          ('openai', 'gpt-5.6-luna', 271999, 0.4, 0.04, 1.8),
          ('openai', 'gpt-5.5-pro', 271999, 60, NULL, 270),
          ('openai', 'gpt-5.5', 271999, 10, 1, 45),
          ('openai', 'gpt-5.4', 271999, 5, 0.5, 22.5),
          ('anthropic', 'claude-sonnet-4-5', 200000, 6, 0.6, 22.5),
          ('gemini', 'gemini-3.1-pro-preview', 200000, 4, 0.4, 18),
          ('gemini', 'gemini-2.5-pro', 200000, 2.5, 0.25, 15),
          ('xai', 'grok-4.6', 199999, 4, 1, 12),
          ('xai', 'grok-4.5', 199999, 4, 0.6, 12),
          ('xai', 'grok-4.3', 199999, 2.5, 0.4, 5),
          ('xai', 'grok-4.20', 199999, 2.5, 0.4, 5),
          ('xai', 'grok-build-0.1', 199999, 2, 0.4, 4)
       ) t(provider, model, over_tokens, input, cached_input, output)
 WHERE m.provider OPERATOR(pg_catalog.=) t.provider AND m.model OPERATOR(pg_catalog.=) t.model AND m.seeded;
ALTER TABLE keyvault.model_prices ENABLE TRIGGER keep_customized;

-- What a use costs: from tokens to USD by model_prices, from USD to credits by plan.

CREATE TABLE keyvault.plan_prices (
    plan          text COLLATE "C" NOT NULL,
    provider      text COLLATE "C" NOT NULL,
    model         text COLLATE "C" NOT NULL,
    valid_from    timestamptz NOT NULL DEFAULT '-infinity',
    input_usd_per_mtok        numeric(18,9) NOT NULL CHECK (input_usd_per_mtok >= 0 AND input_usd_per_mtok < 'Infinity'),
    output_usd_per_mtok       numeric(18,9) NOT NULL CHECK (output_usd_per_mtok >= 0 AND output_usd_per_mtok < 'Infinity'),
    cached_input_usd_per_mtok numeric(18,9) CHECK (cached_input_usd_per_mtok >= 0 AND cached_input_usd_per_mtok < 'Infinity'),
    reasoning_usd_per_mtok    numeric(18,9) CHECK (reasoning_usd_per_mtok >= 0 AND reasoning_usd_per_mtok < 'Infinity'),
    usd_per_request numeric(18,9) NOT NULL DEFAULT 0 CHECK (usd_per_request >= 0 AND usd_per_request < 'Infinity'),
    usd_per_unit  numeric(18,9) NOT NULL DEFAULT 0 CHECK (usd_per_unit >= 0 AND usd_per_unit < 'Infinity'),
    context_tiers jsonb CHECK (keyvault._are_context_tiers(context_tiers)),
    PRIMARY KEY (plan, provider, model, valid_from)
);
REVOKE ALL ON keyvault.plan_prices FROM PUBLIC;

COMMENT ON TABLE keyvault.plan_prices IS
    'What a plan''s users pay for a model instead of model_prices: it makes the credits; cost_usd stays what the provider charges. Columns as there; the latest valid_from that has come counts.';

SELECT pg_catalog.pg_extension_config_dump('keyvault.plan_prices', '');

CREATE FUNCTION keyvault._find_price(provider text, model text, at timestamptz, plan text = NULL) RETURNS keyvault.model_prices
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    family text := keyvault._model_family($2);
    price keyvault.model_prices;
BEGIN
    IF $4 IS NOT NULL THEN
        SELECT m.provider, m.model, m.valid_from, m.input_usd_per_mtok, m.output_usd_per_mtok, m.cached_input_usd_per_mtok,
               NULL, NULL, false, m.reasoning_usd_per_mtok, m.usd_per_request, m.usd_per_unit, NULL, m.context_tiers
          INTO price
          FROM (SELECT DISTINCT ON (c.provider, c.model) c.* FROM keyvault.plan_prices c
                 WHERE c.plan = $4 AND c.provider = coalesce($1, c.provider) AND c.model IN ($2, family) AND c.valid_from <= at
                 ORDER BY c.provider, c.model, c.valid_from DESC) m
         ORDER BY m.model = $2 DESC, m.output_usd_per_mtok DESC, m.input_usd_per_mtok DESC, m.provider
         LIMIT 1;
    ELSIF $1 IS NOT NULL THEN
        SELECT * INTO price FROM keyvault.model_prices m
         WHERE m.provider = $1 AND m.model IN ($2, family) AND m.valid_from <= at
         ORDER BY m.model = $2 DESC, m.valid_from DESC
         LIMIT 1;
    ELSE
        SELECT c.* INTO price
          FROM (SELECT DISTINCT ON (m.provider, m.model) m.* FROM keyvault.model_prices m
                 WHERE m.model IN ($2, family) AND m.valid_from <= at
                 ORDER BY m.provider, m.model, m.valid_from DESC) c
         ORDER BY c.model = $2 DESC, c.output_usd_per_mtok DESC, c.input_usd_per_mtok DESC, c.provider
         LIMIT 1;
    END IF;
    RETURN price;
END $$;
REVOKE ALL ON FUNCTION keyvault._find_price(provider text, model text, at timestamptz, plan text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._find_price(text, text, timestamptz, text) IS
    'The price of a model in force at a time, of plan_prices when plan is given; NULL without one. A dated or "latest" name of a model counts as the model. Without a provider the dearest that has the model counts.';

CREATE FUNCTION keyvault._use_usd(price keyvault.model_prices, input_tokens bigint, cached_tokens bigint, output_tokens bigint,
                                  reasoning_tokens bigint, units numeric, OUT usd numeric, OUT used jsonb)
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tier jsonb;
    input_price numeric;
    cached_price numeric;
    output_price numeric;
    reasoning_price numeric;
    fresh bigint := coalesce(input_tokens, 0) - least(coalesce(cached_tokens, 0), coalesce(input_tokens, 0));
    thought bigint := least(coalesce(reasoning_tokens, 0), coalesce(output_tokens, 0));
BEGIN
    IF price.model IS NULL THEN
        RETURN;
    END IF;
    -- Few models have tiers, and a query takes as long as all the rest.
    IF price.context_tiers IS NOT NULL THEN
        tier := (SELECT t FROM jsonb_array_elements(price.context_tiers) t WHERE (t ->> 'over')::numeric < input_tokens
                  ORDER BY (t ->> 'over')::numeric DESC LIMIT 1);
    END IF;
    input_price := coalesce((tier ->> 'input')::numeric, price.input_usd_per_mtok);
    cached_price := coalesce((tier ->> 'cached_input')::numeric, price.cached_input_usd_per_mtok, input_price);
    output_price := coalesce((tier ->> 'output')::numeric, price.output_usd_per_mtok);
    reasoning_price := coalesce((tier ->> 'reasoning')::numeric, price.reasoning_usd_per_mtok, output_price);
    usd := least(round((fresh * input_price + (coalesce(input_tokens, 0) - fresh) * cached_price
                        + (coalesce(output_tokens, 0) - thought) * output_price + thought * reasoning_price) / 1000000
                       + price.usd_per_request + coalesce(units, 0) * price.usd_per_unit, 9), 999999999);
    used := jsonb_strip_nulls(jsonb_build_object(
        'provider', price.provider, 'model', price.model, 'valid_from', nullif(price.valid_from, '-infinity'),
        'input', trim_scale(input_price), 'cached_input', trim_scale(nullif(cached_price, input_price)),
        'output', trim_scale(output_price), 'reasoning', trim_scale(nullif(reasoning_price, output_price)),
        'per_request', trim_scale(nullif(price.usd_per_request, 0)), 'per_unit', trim_scale(nullif(price.usd_per_unit, 0)),
        'over', tier -> 'over'));
END $$;
REVOKE ALL ON FUNCTION keyvault._use_usd(price keyvault.model_prices, input_tokens bigint, cached_tokens bigint, output_tokens bigint, reasoning_tokens bigint, units numeric, OUT usd numeric, OUT used jsonb) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._use_usd(keyvault.model_prices, bigint, bigint, bigint, bigint, numeric) IS
    'What a use costs in USD at a price, and what of the price was used; NULL without a price. cached_tokens are part of input_tokens, reasoning_tokens of output_tokens.';

CREATE FUNCTION keyvault._price_usd(provider text, model text, input_tokens bigint, cached_tokens bigint, output_tokens bigint,
                                    reasoning_tokens bigint, units numeric) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF model IS NULL OR (input_tokens IS NULL AND output_tokens IS NULL AND units IS NULL) THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT q.usd FROM keyvault._use_usd(keyvault._find_price($1, $2, now()), $3, $4, $5, $6, $7) q);
END $$;
REVOKE ALL ON FUNCTION keyvault._price_usd(provider text, model text, input_tokens bigint, cached_tokens bigint, output_tokens bigint, reasoning_tokens bigint, units numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._price_usd(text, text, bigint, bigint, bigint, bigint, numeric) IS
    'What a use whose credits are given costs the provider''s customer in USD; NULL for a model without a price and for a use without tokens and units.';

CREATE FUNCTION keyvault._credits_of(plan keyvault.plans, payer text, cost_usd numeric) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN least(round((cost_usd * CASE payer WHEN 'user' THEN plan.own_key_rate ELSE 1 END + plan.infrastructure_usd)
                       * (1 + plan.margin) * plan.credits_per_usd, 6), 999999999999);
REVOKE ALL ON FUNCTION keyvault._credits_of(plan keyvault.plans, payer text, cost_usd numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._credits_of(keyvault.plans, text, numeric) IS
    'What a cost in USD is in credits on a plan, with its infrastructure and margin, by whose key was used.';

CREATE OR REPLACE FUNCTION keyvault._credits_owed(plan text, payer text, cost_usd numeric) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    p keyvault.plans;
BEGIN
    SELECT * INTO p FROM keyvault.plans WHERE plan = $1;
    IF NOT FOUND THEN
        PERFORM keyvault._refuse_missing_plan($1);
    END IF;
    RETURN keyvault._credits_of(p, payer, cost_usd);
END $$;

COMMENT ON FUNCTION keyvault._credits_owed(text, text, numeric) IS
    'What a cost in USD is in credits on the plan of that name. Error: 42704.';

CREATE FUNCTION keyvault._unknown_model_usd(plan keyvault.plans, provider text, tokens bigint, problem text, hint text) RETURNS numeric
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    usd numeric := 0;
BEGIN
    IF plan.unknown_model = 'refuse' AND problem IS NOT NULL THEN
        RAISE EXCEPTION '%', problem
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = hint || ' keyvault.plans.unknown_model says what is done without.';
    END IF;
    IF plan.unknown_model <> 'allow' THEN
        usd := round(tokens * plan.unknown_model_usd_per_mtok / 1000000, 9);
        IF usd = 0 THEN
            usd := coalesce((SELECT p.usd_per_request FROM keyvault.providers p WHERE p.provider = $2), 0.01);
        END IF;
    END IF;
    IF problem IS NOT NULL THEN
        RAISE WARNING '%: % USD assumed', problem, trim_scale(usd)
            USING HINT = hint || ' keyvault.plans.unknown_model says what is done without.';
    END IF;
    RETURN usd;
END $$;
REVOKE ALL ON FUNCTION keyvault._unknown_model_usd(plan keyvault.plans, provider text, tokens bigint, problem text, hint text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._unknown_model_usd(keyvault.plans, text, bigint, text, text) IS
    'What a use that has no price is taken to cost in USD, by its user''s plan, with problem as a WARNING. Error: 22023 on a plan that refuses it. Without a problem the use has happened: nothing is said, and refuse charges.';

CREATE FUNCTION keyvault._price_use(user_id text, provider text, model text, payer text, at timestamptz, input_tokens bigint, cached_tokens bigint,
                                    output_tokens bigint, reasoning_tokens bigint, tokens bigint, units numeric, cost_usd numeric,
                                    happened boolean = false,
                                    OUT credits numeric, OUT usd numeric, OUT priced_provider text, OUT price jsonb)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    users_plan record;
    plan keyvault.plans;
    found_price keyvault.model_prices;
    plan_price keyvault.model_prices;
    -- Tokens of a kind that nobody states are taken for output.
    unstated bigint := greatest(coalesce(tokens, 0) - coalesce(input_tokens, 0) - coalesce(output_tokens, 0), 0);
    output_all bigint := coalesce(output_tokens, 0) + unstated;
    -- Cached and reasoning tokens that are stated alone are tokens, too.
    all_tokens bigint := greatest(coalesce(input_tokens, 0), cached_tokens) + greatest(output_all, reasoning_tokens);
    states_tokens boolean := input_tokens IS NOT NULL OR output_tokens IS NOT NULL OR unstated > 0;
    cost record;
    sold_usd numeric;
    sold_used jsonb;
    assumed numeric;
BEGIN
    SELECT p AS plan, EXISTS (SELECT FROM keyvault.plan_prices s WHERE s.plan = p.plan) AS sells INTO users_plan
      FROM keyvault.plans p WHERE p.plan = coalesce((SELECT u.plan FROM keyvault.users u WHERE u.user_id = $1), 'free');
    IF NOT FOUND THEN
        PERFORM keyvault._refuse_missing_plan(coalesce((SELECT u.plan FROM keyvault.users u WHERE u.user_id = $1), 'free'));
    END IF;
    plan := users_plan.plan;
    priced_provider := provider;
    IF cost_usd > 0 THEN
        usd := cost_usd;
        price := '{}';
    ELSIF model IS NULL AND provider IS NULL AND units IS NULL AND all_tokens = 0 THEN
        credits := 0;
        usd := 0;
        RETURN;
    ELSE
        found_price := keyvault._find_price(provider, model, at);
        priced_provider := coalesce(found_price.provider, provider);
        IF users_plan.sells THEN
            plan_price := keyvault._find_price(priced_provider, model, at, plan.plan);
        END IF;
        cost := keyvault._use_usd(found_price, input_tokens, cached_tokens, output_all, reasoning_tokens, units);
        usd := cost.usd;
        price := cost.used;
        IF plan_price.model IS NOT NULL THEN
            cost := keyvault._use_usd(plan_price, input_tokens, cached_tokens, output_all, reasoning_tokens, units);
            sold_usd := cost.usd;
            sold_used := cost.used;
        END IF;
        IF usd IS NULL AND sold_usd IS NOT NULL THEN
            -- What only a plan has a price for is known to no more than that.
            usd := sold_usd;
            price := '{}';
            priced_provider := plan_price.provider;
        END IF;
        IF usd IS NULL THEN
            usd := keyvault._unknown_model_usd(plan, provider, all_tokens,
                       CASE WHEN NOT happened THEN coalesce('model "' || nullif(model, '') || '" has no price', 'a use that names no model has no price') END,
                       'Give the credits, or the model, and its price with INSERT INTO keyvault.model_prices;');
            price := jsonb_build_object('unknown', plan.unknown_model);
        ELSIF NOT states_tokens AND NOT coalesce(units > 0 AND greatest(found_price.usd_per_unit, plan_price.usd_per_unit) > 0, false)
              AND greatest(found_price.input_usd_per_mtok, found_price.output_usd_per_mtok,
                           plan_price.input_usd_per_mtok, plan_price.output_usd_per_mtok) > 0
        THEN
            -- What is paid by the token is not free because nobody counted: a cut stream is no free one.
            assumed := keyvault._unknown_model_usd(plan, priced_provider, all_tokens,
                       CASE WHEN NOT happened THEN format('a use of model "%s" states no %stokens', model, CASE WHEN all_tokens > 0 THEN 'input or output ' END) END,
                       'Give its tokens, 0 if there were none, its cost_usd or its credits;');
            price := CASE WHEN usd > 0 THEN price ELSE '{}' END || jsonb_build_object('unknown', plan.unknown_model);
            usd := usd + assumed;
            sold_used := CASE WHEN sold_usd > 0 THEN sold_used END;
            sold_usd := sold_usd + assumed;
        END IF;
    END IF;
    credits := keyvault._credits_of(plan, payer, coalesce(sold_usd, usd));
    price := price || jsonb_strip_nulls(jsonb_build_object(
        'plan', plan.plan, 'plan_price', CASE WHEN sold_usd IS NOT NULL THEN sold_used END,
        'credits_per_usd', trim_scale(plan.credits_per_usd),
        'own_key_rate', CASE payer WHEN 'user' THEN trim_scale(plan.own_key_rate) END,
        'infrastructure_usd', trim_scale(nullif(plan.infrastructure_usd, 0)), 'margin', trim_scale(nullif(plan.margin, 0))));
END $$;
REVOKE ALL ON FUNCTION keyvault._price_use(user_id text, provider text, model text, payer text, at timestamptz, input_tokens bigint, cached_tokens bigint, output_tokens bigint, reasoning_tokens bigint, tokens bigint, units numeric, cost_usd numeric, happened boolean, OUT credits numeric, OUT usd numeric, OUT priced_provider text, OUT price jsonb) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._price_use(text, text, text, text, timestamptz, bigint, bigint, bigint, bigint, bigint, numeric, numeric, boolean) IS
    'What a use costs its user in credits and the provider''s customer in USD, by which provider''s price, and the price for usage_records.price. One that happened is never refused, and nothing is said of it. Error: 22023 for an unknown model, or a known one without tokens, on a plan that refuses it.';

-- usage_records cannot have a unique key without its partitions' created_at.
CREATE TABLE keyvault.usage_keys (
    user_id         text COLLATE "C" NOT NULL,
    idempotency_key text COLLATE "C" NOT NULL,
    usage_id        uuid NOT NULL,
    fingerprint     bytea NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, idempotency_key)
);

CREATE INDEX usage_keys_made ON keyvault.usage_keys USING brin (created_at) WITH (autosummarize = on);
REVOKE ALL ON keyvault.usage_keys FROM PUBLIC;

COMMENT ON TABLE keyvault.usage_keys IS 'Which usage record an idempotency key of record_usage stands for, for as long as keyvault.response_retention.';

COMMENT ON COLUMN keyvault.usage_keys.fingerprint IS 'SHA-256 of what was recorded.';

SELECT pg_catalog.pg_extension_config_dump('keyvault.usage_keys', '');

ALTER TABLE keyvault.usage_keys ENABLE ROW LEVEL SECURITY;

CREATE FUNCTION keyvault._record_usage(
    type text, model text, input_tokens integer, output_tokens integer, credits numeric, user_id text, idempotency_key text, metadata jsonb,
    provider text, cached_tokens bigint, reasoning_tokens bigint, units numeric, payer text, cost_usd numeric, issued_key_id uuid,
    member_id text) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    usage uuid := keyvault.uuidv7();
    print bytea;
    earlier keyvault.usage_keys;
BEGIN
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'type must not be null' USING ERRCODE = 'null_value_not_allowed', HINT = 'Pass chat, api, automation or your own word.';
    END IF;
    IF $7 IS NOT NULL THEN
        IF octet_length($7) NOT BETWEEN 1 AND 255 THEN
            RAISE EXCEPTION 'idempotency key must be 1 to 255 bytes long' USING ERRCODE = 'invalid_parameter_value',
                HINT = 'Leave it out for a use that may be recorded again.';
        END IF;
        print := sha256(convert_to(jsonb_build_array($1, $2, $3, $4, trim_scale($5), $8, $9, $10, $11, trim_scale($12), $13,
                                                     trim_scale($14), $15, $16)::text, 'UTF8'));
        INSERT INTO keyvault.usage_keys (user_id, idempotency_key, usage_id, fingerprint) VALUES ($6, $7, usage, print) ON CONFLICT DO NOTHING;
        IF NOT FOUND THEN
            SELECT * INTO earlier FROM keyvault.usage_keys k WHERE k.user_id = $6 AND k.idempotency_key = $7;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'another transaction is using this idempotency key'
                    USING ERRCODE = 'serialization_failure', HINT = 'Retry the transaction.';
            ELSIF earlier.fingerprint <> print THEN
                RAISE EXCEPTION 'idempotency key was already used for another usage record'
                    USING ERRCODE = 'invalid_parameter_value', HINT = 'Use a new idempotency key for each different use.';
            END IF;
            RETURN earlier.usage_id;
        END IF;
    END IF;
    INSERT INTO keyvault.usage_records (user_id, id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens, credits,
                                        cost_usd, issued_key_id, idempotency_key, metadata, reasoning_tokens, units, member_id)
    VALUES ($6, usage, $1, $9, $2, coalesce($13, 'platform'), $3, $10, $4, coalesce($3, 0)::bigint + coalesce($4, 0), $5,
            coalesce($14, CASE WHEN $5 IS NOT NULL THEN keyvault._price_usd($9, $2, $3, $10, $4, $11, $12) END, 0), $15, $7, coalesce($8, '{}'), $11, $12, $16);
    RETURN usage;
END $$;
REVOKE ALL ON FUNCTION keyvault._record_usage( type text, model text, input_tokens integer, output_tokens integer, credits numeric, user_id text, idempotency_key text, metadata jsonb, provider text, cached_tokens bigint, reasoning_tokens bigint, units numeric, payer text, cost_usd numeric, issued_key_id uuid, member_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._record_usage(text, text, integer, integer, numeric, text, text, jsonb, text, bigint, bigint, numeric, text, numeric, uuid, text) IS
    'record_usage, after its caller was checked.';

CREATE FUNCTION keyvault.record_usage(
    type text, model text, input_tokens integer, output_tokens integer, credits numeric = NULL, user_id text = NULL,
    idempotency_key text = NULL, metadata jsonb = '{}', provider text = NULL, cached_tokens bigint = NULL, reasoning_tokens bigint = NULL,
    units numeric = NULL, payer text = 'platform', cost_usd numeric = NULL, issued_key_id uuid = NULL, member_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_record_usage';
REVOKE ALL ON FUNCTION keyvault.record_usage( type text, model text, input_tokens integer, output_tokens integer, credits numeric, user_id text, idempotency_key text, metadata jsonb, provider text, cached_tokens bigint, reasoning_tokens bigint, units numeric, payer text, cost_usd numeric, issued_key_id uuid, member_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.record_usage(text, text, integer, integer, numeric, text, text, jsonb, text, bigint, bigint, numeric, text, numeric, uuid, text) IS
    'Records a use, debits its credits, and returns the usage record''s id. Without credits the use is priced by model and tokens, or by cost_usd (USD); with credits, cost_usd NULL is what model and tokens cost, where they have a price. The same idempotency_key records once and returns the same id, for as long as keyvault.response_retention. cached_tokens are part of input_tokens, reasoning_tokens of output_tokens. user_id NULL is the identity. Errors: KV001 credit limit or budget, 22004, 22023, 23514 bad argument, 40001 the idempotency key is in use, 42501.';

CREATE FUNCTION keyvault._output_limit(body jsonb, OUT tokens bigint, OUT answers bigint)
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- The largest of what may be meant: which of them a provider heeds is its own affair.
    tokens := (SELECT max(asked::bigint)
                 FROM unnest(ARRAY[body ->> 'max_completion_tokens', body ->> 'max_output_tokens', body ->> 'max_tokens',
                                   body #>> '{generationConfig,maxOutputTokens}']) asked
                WHERE asked ~ '^[0-9]{1,9}$');
    answers := (SELECT greatest(max(asked::bigint), 1)
                  FROM unnest(ARRAY[body ->> 'n', body #>> '{generationConfig,candidateCount}']) asked
                 WHERE asked ~ '^[0-9]{1,4}$');
END $$;
REVOKE ALL ON FUNCTION keyvault._output_limit(body jsonb, OUT tokens bigint, OUT answers bigint) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._output_limit(jsonb) IS
    'How many output tokens a request allows each answer, NULL without a limit, and how many answers it asks for, at least 1.';

CREATE FUNCTION keyvault._estimate_request(user_id text, provider keyvault.providers, model text, payer text, body jsonb,
                                           OUT usd numeric, OUT credits numeric)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    asked record;
    bill record;
    input_tokens bigint;
    output_tokens bigint;
BEGIN
    IF model IS NULL THEN
        usd := provider.usd_per_request;
        credits := keyvault._credits_owed((SELECT u.plan FROM keyvault.users u WHERE u.user_id = $1), payer, usd);
        RETURN;
    END IF;
    IF provider.dialect <> 'json' OR (keyvault._find_price(provider.provider, model, now())).model IS NOT NULL THEN
        asked := keyvault._output_limit(body);
        -- A token is seldom shorter than three bytes of JSON text.
        input_tokens := octet_length(body::text) / 3;
        output_tokens := greatest(coalesce(asked.tokens, 4096), 1) * asked.answers;
    END IF;
    bill := keyvault._price_use($1, provider.provider, model, payer, now(), input_tokens, 0, output_tokens, NULL, NULL, NULL, 0);
    usd := bill.usd;
    credits := bill.credits;
END $$;
REVOKE ALL ON FUNCTION keyvault._estimate_request(user_id text, provider keyvault.providers, model text, payer text, body jsonb, OUT usd numeric, OUT credits numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._estimate_request(text, keyvault.providers, text, text, jsonb) IS
    'An upper estimate of a call''s cost in USD, and of the credits it takes: the body''s bytes / 3 as input, its output limit (4096 tokens without one) times the answers asked for as output. Error: 22023 for an unknown model on a plan that refuses it.';

CREATE FUNCTION keyvault._bill_request(r keyvault.requests, model text, INOUT input_tokens bigint, INOUT cached_tokens bigint,
                                       INOUT output_tokens bigint, INOUT reasoning_tokens bigint, INOUT cost_usd numeric, OUT owed numeric, OUT claimed numeric, OUT price jsonb)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    plan text;
    -- What no model of today writes at once, and the window of one that states none.
    usual_most constant bigint := 131072;
    -- Some providers count thinking beside the limit.
    beside_limit constant bigint := 4096;
    used_model text := r.model;
    listed keyvault.model_prices;
    asked record;
    bill record;
    most_usd numeric;
    input_most bigint;
    output_most bigint;
BEGIN
    IF cost_usd IS NOT NULL OR input_tokens IS NULL THEN
        plan := (SELECT u.plan FROM keyvault.users u WHERE u.user_id = r.user_id);
    END IF;
    IF cost_usd IS NOT NULL THEN
        -- A provider whose usual price nobody stated has none to compare with.
        most_usd := greatest(r.estimated_usd, 50 * (SELECT p.usd_per_request FROM keyvault.providers p WHERE p.provider = r.provider));
        most_usd := coalesce(nullif(most_usd, 0), cost_usd);
        cost_usd := least(cost_usd, 999999999);
        claimed := keyvault._credits_owed(plan, r.payer, cost_usd);
        price := CASE WHEN cost_usd > most_usd THEN jsonb_build_object('claimed', jsonb_build_object('cost_usd', cost_usd)) END;
        cost_usd := least(cost_usd, most_usd);
        owed := keyvault._credits_owed(plan, r.payer, cost_usd);
        RETURN;
    ELSIF input_tokens IS NULL THEN
        -- An answer that does not say what it used is charged as estimated, never silently free.
        cost_usd := r.estimated_usd;
        owed := (SELECT h.reserved FROM keyvault.credit_holds h WHERE h.user_id = r.user_id AND h.id = r.hold_id);
        owed := coalesce(owed, CASE WHEN r.hold_id IS NULL THEN 0 ELSE keyvault._credits_owed(plan, r.payer, cost_usd) END);
        claimed := owed;
        RETURN;
    END IF;
    bill := keyvault._price_use(r.user_id, r.provider, used_model, r.payer, now(), input_tokens, cached_tokens, output_tokens, reasoning_tokens, NULL, NULL, 0, true);
    IF bill.price ? 'unknown' AND (keyvault._find_price(r.provider, model, now())).model IS NOT NULL THEN
        used_model := model;
        bill := keyvault._price_use(r.user_id, r.provider, used_model, r.payer, now(), input_tokens, cached_tokens, output_tokens, reasoning_tokens, NULL, NULL, 0, true);
    END IF;
    claimed := bill.credits;
    IF bill.usd > r.estimated_usd THEN
        listed := keyvault._find_price(r.provider, used_model, now());
        -- Images, files and searches are more tokens than bytes, but a model reads no more than its window at once.
        asked := keyvault._output_limit(r.body);
        input_most := octet_length(r.body::text) + coalesce(listed.context_window, usual_most);
        output_most := coalesce(asked.tokens + beside_limit, least(listed.context_window, usual_most)) * asked.answers;
        IF input_tokens > input_most OR output_tokens > output_most THEN
            price := jsonb_build_object('claimed', jsonb_build_object('input', input_tokens, 'cached_input', cached_tokens, 'output', output_tokens));
            input_tokens := least(input_tokens, input_most);
            cached_tokens := least(cached_tokens, input_tokens);
            output_tokens := least(output_tokens, output_most);
            reasoning_tokens := least(reasoning_tokens, output_tokens);
            bill := keyvault._price_use(r.user_id, r.provider, used_model, r.payer, now(), input_tokens, cached_tokens, output_tokens, reasoning_tokens, NULL, NULL, 0, true);
        END IF;
    END IF;
    cost_usd := bill.usd;
    owed := bill.credits;
    price := bill.price || coalesce(price, '{}');
END $$;
REVOKE ALL ON FUNCTION keyvault._bill_request(r keyvault.requests, model text, INOUT input_tokens bigint, INOUT cached_tokens bigint, INOUT output_tokens bigint, INOUT reasoning_tokens bigint, INOUT cost_usd numeric, OUT owed numeric, OUT claimed numeric, OUT price jsonb) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._bill_request(keyvault.requests, text, bigint, bigint, bigint, bigint, numeric) IS
    'What an answer that names a model, tokens or a cost in USD makes its request cost: the tokens and USD that are believed, the credits owed for them, those for all that is claimed, and the price for usage_records.price.';

CREATE FUNCTION keyvault._address_request(provider keyvault.providers, INOUT path text, INOUT model text, INOUT body jsonb)
    LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    in_body text := nullif(regexp_replace(body ->> 'model', '^models/', ''), '');
    -- Where a path of this provider's names the model, as its default path has it: behind "models/", say.
    place text;
    in_path text;
BEGIN
    path := coalesce(path, provider.default_path);
    model := nullif(model, '');
    IF path IS NULL OR path NOT LIKE '/%' THEN
        RAISE EXCEPTION 'a request to provider "%" needs a path that begins with "/"', provider.provider
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the path of the provider''s API, without its host.';
    END IF;
    IF path !~ '^[!-~]*$' OR path ~ '(^|/)[.][.](/|$)|#' OR strpos(path, chr(92)) > 0 THEN
        RAISE EXCEPTION 'path of a request has what no path may have'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'It has printable ASCII characters, without blanks, "#" and backslashes, and no part "..": percent-encode all others.';
    END IF;
    IF path LIKE '%{model}%' THEN
        model := coalesce(model, in_body);
        IF model IS NULL OR model !~ '^[A-Za-z0-9][A-Za-z0-9._-]*$' THEN
            RAISE EXCEPTION 'a request to provider "%" needs a model', provider.provider
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass model => ''name''; letters, digits, ".", "_" and "-".';
        END IF;
        path := replace(path, '{model}', model);
        body := body - 'model';
        RETURN;
    END IF;
    IF provider.default_path LIKE '%/{model}%' THEN
        -- Another spelling of the path would be another model's.
        IF strpos(split_part(path, '?', 1), '%') > 0 THEN
            RAISE EXCEPTION 'a path of provider "%" must not have "%%" before "?"', provider.provider
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass the path as the provider''s API reference spells it.';
        END IF;
        place := substring(provider.default_path FROM '/[^/]*/(?=[{]model[}])');
        in_path := substring(split_part(path, place, 2) FROM '^[^/:?]+');
    END IF;
    IF coalesce(in_path <> model, false) OR coalesce(in_path <> in_body, false)
       OR (provider.dialect = 'json' AND coalesce(model <> in_body, false))
    THEN
        RAISE EXCEPTION 'a request must not name two models'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'The path, the body and the argument model name the same, which is what the call costs and what budgets count.';
    END IF;
    IF in_path IS NULL AND model IS NOT NULL AND provider.dialect <> 'json' THEN
        body := body || jsonb_build_object('model', model);
    END IF;
    model := coalesce(in_path, model, in_body);
END $$;
REVOKE ALL ON FUNCTION keyvault._address_request(provider keyvault.providers, INOUT path text, INOUT model text, INOUT body jsonb) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._address_request(keyvault.providers, text, text, jsonb) IS
    'The path, model and body of a request as they are sent and priced: a path that names the model decides which it is. Error: 22023.';

CREATE OR REPLACE FUNCTION keyvault._choose_key(user_id text, provider text, key_name text, INOUT payer text, OUT api_key_id uuid)
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    in_env_file boolean := CASE WHEN $3 = 'default' THEN keyvault._env_file_has_key($2) END;
BEGIN
    IF $4 IN ('auto', 'user') AND in_env_file THEN
        payer := 'user';
        RETURN;
    ELSIF $4 IN ('auto', 'user') AND in_env_file IS NULL THEN
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

CREATE OR REPLACE FUNCTION keyvault._enqueue_request(
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
    address record;
    the_model text;
    the_body jsonb;
    the_path text;
    key record;
    estimate record;
    hold uuid;
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
    IF $7 = 'platform' AND $8 IS NOT NULL THEN
        RAISE EXCEPTION 'payer is platform, and the call brings a key of its own' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Leave api_key out for the platform''s key, or payer for the call''s own, which is the user''s.';
    END IF;

    address := keyvault._address_request(p, $5, $6, $4);
    the_path := address.path;
    the_model := address.model;
    IF octet_length(the_model) > 255 THEN
        RAISE EXCEPTION 'model of a request must be at most 255 bytes long' USING ERRCODE = 'invalid_parameter_value',
            HINT = 'Pass the name that the provider''s API reference gives the model.';
    END IF;
    the_body := address.body;
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
            USING ERRCODE = 'KV007', HINT = 'keyvault.resume_user() ends a suspension; an erasure has no end.';
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
    estimate := keyvault._estimate_request($1, p, the_model, key.payer, the_body);
    -- Without credits to set aside, budgets in USD may still have to be.
    IF estimate.credits > 0 OR EXISTS (SELECT FROM keyvault.credit_budgets g WHERE g.user_id = $1) THEN
        hold := keyvault._hold_credits($1, estimate.credits, 'infinity', false, the_model, estimate.usd);
    END IF;
    INSERT INTO keyvault.requests (user_id, id, provider, model, type, path, payer, api_key_id, call_key, timeout_ms,
                                   hold_id, estimated_usd, idempotency_key, metadata, body)
    VALUES ($1, $2, $3, the_model, CASE p.dialect WHEN 'json' THEN 'api' ELSE 'chat' END, the_path, key.payer, key.api_key_id, $8,
            $11, hold, estimate.usd, $10, coalesce($12, '{}'), the_body)
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

ALTER TABLE keyvault.requests ADD COLUMN key_rotated_at timestamptz;
COMMENT ON COLUMN keyvault.requests.key_rotated_at IS 'The key''s rotated_at when the call was sent: its answer tells nothing about a key that has come in its place since.';

CREATE OR REPLACE FUNCTION keyvault._claim_requests(capacity integer, per_user integer, after_user text)
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
       SET status = 'sent', attempts = r.attempts + 1, sent_at = clock_timestamp(),
           key_rotated_at = (SELECT k.rotated_at FROM keyvault.api_keys k
                              WHERE k.user_id = CASE r.payer WHEN 'user' THEN r.user_id ELSE '' END AND k.id = r.api_key_id)
      FROM claimed c LEFT JOIN keyvault.providers p ON p.provider = c.provider
     WHERE r.user_id = c.user_id AND r.id = c.id
    RETURNING r.user_id, r.id, r.attempts, r.provider, p.dialect, p.base_url, r.path, p.auth_header, p.auth_scheme,
              p.headers, p.allowed_host, CASE r.type WHEN 'test' THEN NULL ELSE r.body::text END, r.timeout_ms, r.payer, r.api_key_id, r.call_key;
END $$;

CREATE FUNCTION keyvault._settle_request(
    user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, model text,
    input_tokens bigint, cached_tokens bigint, output_tokens bigint, stated_usd numeric, key_refused boolean, reasoning_tokens bigint) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
    cost numeric := 0;
    owed numeric := 0;
    charged numeric := 0;
    -- A provider that is in trouble says nothing of the key.
    verdict constant text := CASE WHEN $13 THEN 'failed' WHEN $5 < 500 THEN 'active' END;
    bill record;
    -- The erasure does not see requests of transactions that have yet to end.
    erased constant boolean := EXISTS (SELECT FROM keyvault.users u WHERE u.user_id = $1 AND u.status = 'erased');
BEGIN
    UPDATE keyvault.requests SET status = $4, finished_at = clock_timestamp(), error = $7, call_key = NULL,
           body = CASE WHEN erased THEN '{}' ELSE body END, metadata = CASE WHEN erased THEN '{"erased": true}' ELSE metadata END
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3
    RETURNING * INTO r;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF $4 = 'done' OR $5 BETWEEN 200 AND 299 THEN
        bill := keyvault._bill_request(r, $8, $9, $10, $11, $14, $12);
        cost := bill.cost_usd;
        owed := bill.owed;
    END IF;
    IF $4 = 'unknown' AND r.hold_id IS NOT NULL THEN
        -- The provider may have charged for it: the credits stay set aside for a day, and for a second one where
        -- maintenance is to charge for it then.
        PERFORM keyvault._lock_balance($1, false);
        UPDATE keyvault.credit_holds
           SET expires_at = now() + CASE WHEN (SELECT p.unknown_outcome FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan
                                                WHERE u.user_id = $1) = 'charge' THEN interval '2 days' ELSE interval '1 day' END
         WHERE user_id = $1 AND id = r.hold_id;
    END IF;
    IF owed > 0 OR r.hold_id IS NOT NULL AND $4 <> 'unknown' THEN
        charged := keyvault._settle_hold($1, CASE WHEN $4 <> 'unknown' THEN r.hold_id END, owed);
    END IF;
    IF $4 = 'done' OR cost > 0 THEN
        INSERT INTO keyvault.usage_records (user_id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens,
                                            credits, credits_overrun, cost_usd, request_id, api_key_id, idempotency_key, metadata, hold_id, price,
                                            reasoning_tokens)
        VALUES ($1, r.type, r.provider, coalesce(r.model, $8), r.payer, bill.input_tokens, bill.cached_tokens, bill.output_tokens,
                coalesce(bill.input_tokens, 0) + coalesce(bill.output_tokens, 0), charged, bill.claimed - charged, cost, $2, r.api_key_id,
                r.idempotency_key, r.metadata, coalesce(r.hold_id, $2), bill.price, bill.reasoning_tokens);
    END IF;
    INSERT INTO keyvault.responses (user_id, id, status, status_code, body, error, model, input_tokens, cached_tokens, output_tokens,
                                    cost_usd, credits, payer)
    VALUES ($1, $2, $4, $5, CASE WHEN r.metadata <> '{"erased": true}' THEN $6 END, $7, coalesce($8, r.model), $9, $10, $11, cost, charged,
            r.payer);
    -- One write a minute tells enough about a busy key, and its row is not fought over.
    UPDATE keyvault.api_keys k
       SET last_used_at = now(), status = coalesce(verdict, k.status)
     WHERE k.user_id = CASE r.payer WHEN 'user' THEN $1 ELSE '' END AND k.id = r.api_key_id AND $5 IS NOT NULL AND k.problem IS NULL
       AND k.rotated_at IS NOT DISTINCT FROM r.key_rotated_at
       AND (k.last_used_at IS NULL OR k.last_used_at < now() - interval '1 minute'
            OR k.status <> verdict);
    RETURN true;
END $$;
REVOKE ALL ON FUNCTION keyvault._settle_request(user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, model text, input_tokens bigint, cached_tokens bigint, output_tokens bigint, stated_usd numeric, key_refused boolean, reasoning_tokens bigint) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._settle_request(text, uuid, integer, text, integer, jsonb, text, text, bigint, bigint, bigint, numeric, boolean, bigint) IS
    'Ends a sent request: answer, usage, price, debit and hold in one go. False, and nothing done, when that attempt is no longer the one under way.';

-- Calls that were sent and whose answer was lost: what became of them is found out elsewhere, or settled by the plan.

CREATE INDEX requests_unknown ON keyvault.requests (finished_at) WHERE status = 'unknown';

CREATE FUNCTION keyvault._reconcile_request(request_id uuid, outcome text, input_tokens bigint, output_tokens bigint, cached_tokens bigint,
                                            cost_usd numeric) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
    cost numeric := 0;
    owed numeric := 0;
    charged numeric;
    price jsonb;
BEGIN
    IF $2 IS NULL OR $2 NOT IN ('charge', 'release') OR ($2 = 'release' AND (num_nonnulls($3, $4, $5) > 0 OR $6 IS NOT NULL))
       OR $3 < 0 OR $4 < 0 OR $5 < 0 OR $6 = 'NaN' OR $6 <= 0 OR $6 > 999999999
    THEN
        RAISE EXCEPTION 'an outcome is charge, for tokens of 0 or more or a cost in USD above 0, or release, for nothing'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'See "Unknown outcome" in doc/keyvault.md.';
    END IF;
    UPDATE keyvault.requests q
       SET status = 'failed', error = concat_ws('; ', q.error, CASE $2 WHEN 'charge' THEN 'reconciled: charged' ELSE 'reconciled: not charged' END)
     WHERE q.id = $1 AND q.status = 'unknown' AND q.type <> 'test'
    RETURNING q.* INTO r;
    IF NOT FOUND THEN
        PERFORM FROM keyvault.requests q WHERE q.id = $1;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'request % does not exist', $1
                USING ERRCODE = 'invalid_parameter_value', HINT = 'keyvault.unknown_requests() has the ids of those to reconcile.';
        END IF;
        RETURN false;
    END IF;
    IF $2 = 'release' THEN
        PERFORM keyvault._release_hold(r.user_id, r.hold_id);
    ELSE
        IF num_nonnulls($3, $4) > 0 OR $6 IS NOT NULL THEN
            SELECT p.usd, p.credits, p.price INTO cost, owed, price
              FROM keyvault._price_use(r.user_id, r.provider, r.model, r.payer, r.finished_at, $3, $5, $4, NULL, NULL, NULL, $6, true) p;
        ELSE
            SELECT b.cost_usd, b.owed INTO cost, owed FROM keyvault._bill_request(r, NULL, NULL, NULL, NULL, NULL, NULL) b;
        END IF;
        charged := keyvault._settle_hold(r.user_id, r.hold_id, owed);
        INSERT INTO keyvault.usage_records (user_id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens, credits,
                                            credits_overrun, cost_usd, request_id, api_key_id, idempotency_key, metadata, hold_id, price)
        VALUES (r.user_id, r.type, r.provider, r.model, r.payer, $3, $5, $4, coalesce($3, 0) + coalesce($4, 0), charged, owed - charged, cost,
                r.id, r.api_key_id, r.idempotency_key, r.metadata, coalesce(r.hold_id, r.id), price);
    END IF;
    UPDATE keyvault.responses a
       SET status = r.status, error = r.error, input_tokens = $3, cached_tokens = $5, output_tokens = $4, cost_usd = cost,
           credits = coalesce(charged, 0)
     WHERE a.user_id = r.user_id AND a.id = r.id;
    RETURN true;
END $$;
REVOKE ALL ON FUNCTION keyvault._reconcile_request(request_id uuid, outcome text, input_tokens bigint, output_tokens bigint, cached_tokens bigint, cost_usd numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._reconcile_request(uuid, text, bigint, bigint, bigint, numeric) IS 'reconcile_request, after its caller was checked.';

CREATE FUNCTION keyvault.reconcile_request(request_id uuid, outcome text, input_tokens bigint = NULL, output_tokens bigint = NULL,
                                           cached_tokens bigint = NULL, cost_usd numeric = NULL) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_reconcile_request';
REVOKE ALL ON FUNCTION keyvault.reconcile_request(request_id uuid, outcome text, input_tokens bigint, output_tokens bigint, cached_tokens bigint, cost_usd numeric) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.reconcile_request(uuid, text, bigint, bigint, bigint, numeric) IS
    'Ends a request whose outcome is unknown as failed, and its hold: charge debits the tokens or the cost in USD that are given, or the estimate without, up to what the user has left, and writes a usage record; release debits nothing. False when the request''s outcome is not unknown, or no more. Errors: 42501 without the right to act for any user or access admin, 22004, 22023.';

CREATE FUNCTION keyvault.unknown_requests() RETURNS TABLE (user_id text, id uuid, provider text, model text, payer text, estimated_usd numeric,
                                                           credits_held numeric, held_until timestamptz, sent_at timestamptz,
                                                           finished_at timestamptz, error text)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_unknown_requests';
REVOKE ALL ON FUNCTION keyvault.unknown_requests() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.unknown_requests() IS
    'Every user''s requests whose outcome is unknown, the oldest first: what they are estimated to cost in USD, how many credits are set aside for them and until when. Error: 42501 without the right to act for any user or access admin.';

CREATE FUNCTION keyvault._charge_unknown(batch integer) RETURNS integer
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    due uuid[];
    balances keyvault.credit_balances[];
    charged integer := 0;
BEGIN
    -- What somebody else holds waits for another time.
    WITH locked AS MATERIALIZED (
        SELECT r.id, b FROM keyvault.requests r
          JOIN keyvault.users u ON u.user_id = r.user_id JOIN keyvault.plans p ON p.plan = u.plan AND p.unknown_outcome = 'charge'
          JOIN keyvault.credit_balances b ON b.user_id = r.user_id AND b.slot = 0
         WHERE r.status = 'unknown' AND r.type <> 'test' AND r.finished_at <= now() - interval '1 day'
         ORDER BY r.finished_at LIMIT batch FOR NO KEY UPDATE OF r, b SKIP LOCKED)
    SELECT array_agg(l.id), array_agg(l.b) INTO due, balances FROM locked l;
    FOR i IN 1 .. coalesce(cardinality(due), 0) LOOP
        IF keyvault._slots_are_free(balances[i]) THEN
            BEGIN
                PERFORM keyvault._reconcile_request(due[i], 'charge', NULL, NULL, NULL, NULL);
                charged := charged + 1;
            EXCEPTION WHEN OTHERS THEN
                -- Not to keep others' from being charged, nor anything from being purged.
                RAISE WARNING 'request % could not be charged: %', due[i], SQLERRM USING ERRCODE = SQLSTATE;
            END;
        END IF;
    END LOOP;
    RETURN charged;
END $$;
REVOKE ALL ON FUNCTION keyvault._charge_unknown(batch integer) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._charge_unknown(integer) IS
    'Charges up to batch requests their estimate whose outcome nobody reconciled within a day, on plans with unknown_outcome charge; returns how many.';

-- Tests of users' keys: a GET of the provider's test_path, which costs nothing.

CREATE FUNCTION keyvault.test_api_key(provider text, name text = 'default', user_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_test_api_key';
REVOKE ALL ON FUNCTION keyvault.test_api_key(provider text, name text, user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.test_api_key(text, text, text) IS
    'Queues a test of a user''s key and returns the request''s id; the worker sends it when the transaction commits. A 2xx answer makes the key active, one that refuses the key makes it failed, both set last_verified_at; any other leaves it as it is. Costs no credits. Errors: KV003 no such key, KV007 suspended, 22004, 22023 unknown provider, or one without test_path, 42501.';

CREATE FUNCTION keyvault._enqueue_key_test(user_id text, request_id uuid, provider text, name text) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    test_path text;
    user_status text;
    key record;
BEGIN
    SELECT p.test_path INTO test_path FROM keyvault.providers p WHERE p.provider = $3;
    IF NOT FOUND THEN
        PERFORM keyvault._unknown_provider();
    ELSIF test_path IS NULL THEN
        RAISE EXCEPTION 'keys for provider "%" cannot be tested', $3
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Its row in keyvault.providers has no test_path: the provider has no call that costs nothing. Make a real one with keyvault.request().';
    END IF;
    SELECT * INTO key FROM keyvault._choose_key($1, $3, $4, 'user');
    SELECT u.status INTO user_status FROM keyvault.users u WHERE u.user_id = $1;
    IF user_status <> 'active' THEN
        RAISE EXCEPTION 'user "%" is %', $1, user_status
            USING ERRCODE = 'KV007', HINT = 'keyvault.resume_user() ends a suspension; an erasure has no end.';
    END IF;
    INSERT INTO keyvault.requests (user_id, id, provider, type, path, payer, api_key_id, timeout_ms, estimated_usd, body)
    VALUES ($1, $2, $3, 'test', test_path, 'user', key.api_key_id, 30000, 0, '{}');
    RETURN $2;
END $$;
REVOKE ALL ON FUNCTION keyvault._enqueue_key_test(user_id text, request_id uuid, provider text, name text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._enqueue_key_test(text, uuid, text, text) IS 'test_api_key, after its caller was checked. Errors: 22023, KV003, KV007.';

CREATE FUNCTION keyvault._settle_key_test(
    user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, key_refused boolean) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    r keyvault.requests;
BEGIN
    UPDATE keyvault.requests SET status = $4, finished_at = clock_timestamp(), error = $7
     WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3
    RETURNING * INTO r;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO keyvault.responses (user_id, id, status, status_code, body, error, payer)
    VALUES ($1, $2, $4, $5, $6, $7, r.payer);
    -- Not when the key was replaced since: the answer is about the one before.
    UPDATE keyvault.api_keys k
       SET last_verified_at = clock_timestamp(), status = CASE WHEN $8 THEN 'failed' ELSE 'active' END
     WHERE k.user_id = $1 AND k.id = r.api_key_id AND ($8 OR $4 = 'done') AND k.problem IS NULL
       AND k.rotated_at IS NOT DISTINCT FROM r.key_rotated_at;
    RETURN true;
END $$;
REVOKE ALL ON FUNCTION keyvault._settle_key_test( user_id text, id uuid, attempt integer, outcome text, status_code integer, body jsonb, error text, key_refused boolean) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._settle_key_test(text, uuid, integer, text, integer, jsonb, text, boolean) IS
    'Ends a test of a key: answer and the key''s status. False, and nothing done, when that attempt is no longer the one under way.';

-- What applications and analysts read.

CREATE OR REPLACE VIEW keyvault.credit_status WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.plan, (c.monthly_credits - c.credits_covered)::numeric(18,6) AS monthly_credits, c.extra_credits, c.credits_used,
       held.amount AS credits_held,
       CASE WHEN c.monthly_credits IS NOT NULL
            THEN greatest(c.monthly_credits + c.extra_credits - c.credits_used - held.amount, 0) END AS credits_remaining,
       c.period_end AS credits_reset_at,
       (coalesce(greatest(c.credits_used - c.monthly_credits - c.extra_credits, 0), 0) + c.credits_overage)::numeric(18,6) AS credits_overage
  FROM keyvault.users u
  JOIN keyvault.credit_balances b ON b.user_id = u.user_id AND b.slot = 0
 CROSS JOIN LATERAL keyvault._balance_now(b, CASE WHEN b.credits_lent > 0
                                             THEN (SELECT sum(s.credits_used) FROM keyvault.credit_balances s WHERE s.user_id = b.user_id)
                                             ELSE b.credits_used END) c
 CROSS JOIN LATERAL (SELECT coalesce(sum(h.amount), 0)::numeric(18,6) AS amount
                       FROM keyvault.credit_holds h
                      WHERE h.user_id = b.user_id AND h.expires_at > now()) held;

COMMENT ON VIEW keyvault.credit_status IS
    'Plan and credits of the acting user, of every user for access analyst or admin. Right also when a period or a grant has ended and nothing was written yet. NULL monthly_credits and credits_remaining are unlimited; extra_credits are those of the period, spent ones among them; credits_overage is what was used in the period beyond all of them, on a plan with overage report; a later grant does not pay for it.';
COMMENT ON COLUMN keyvault.credit_status.user_id IS 'Whose credits.';
COMMENT ON COLUMN keyvault.credit_status.plan IS 'The plan that the user is on.';
COMMENT ON COLUMN keyvault.credit_status.monthly_credits IS 'Credits of the plan, or agreed with the user, for the period; NULL is unlimited.';
COMMENT ON COLUMN keyvault.credit_status.extra_credits IS 'Credits beyond the plan in this period, those that are spent among them.';
COMMENT ON COLUMN keyvault.credit_status.credits_used IS 'Credits debited since the period began.';
COMMENT ON COLUMN keyvault.credit_status.credits_held IS 'Credits that open holds set aside.';
COMMENT ON COLUMN keyvault.credit_status.credits_remaining IS 'What can be used or held now; NULL is unlimited.';
COMMENT ON COLUMN keyvault.credit_status.credits_reset_at IS 'When the period ends, and the next one begins.';
COMMENT ON COLUMN keyvault.credit_status.credits_overage IS 'Credits used in the period beyond all of them, on a plan with overage report.';

COMMENT ON COLUMN keyvault.request_status.user_id IS 'Whose request.';
COMMENT ON COLUMN keyvault.request_status.id IS 'The id that request() returned.';
COMMENT ON COLUMN keyvault.request_status.provider IS 'Who is called.';
COMMENT ON COLUMN keyvault.request_status.model IS 'The model that is asked for; NULL: none is named.';
COMMENT ON COLUMN keyvault.request_status.payer IS 'Whose key is used: user or platform.';
COMMENT ON COLUMN keyvault.request_status.status IS 'queued, sent, done, failed, unknown or canceled.';
COMMENT ON COLUMN keyvault.request_status.attempts IS 'How often it was sent.';
COMMENT ON COLUMN keyvault.request_status.queued_at IS 'When request() was called.';
COMMENT ON COLUMN keyvault.request_status.sent_at IS 'When it was last sent; NULL: not yet.';
COMMENT ON COLUMN keyvault.request_status.finished_at IS 'When it ended; NULL: not yet.';
COMMENT ON COLUMN keyvault.request_status.queue_time IS 'From queued_at to sent_at.';
COMMENT ON COLUMN keyvault.request_status.call_time IS 'From sent_at to finished_at.';
COMMENT ON COLUMN keyvault.request_status.next_attempt_at IS 'Not sent before, while it is queued.';
COMMENT ON COLUMN keyvault.request_status.error IS 'Why it failed, in words.';
COMMENT ON COLUMN keyvault.request_status.idempotency_key IS 'The caller''s own name for it; NULL: none.';
COMMENT ON COLUMN keyvault.request_status.metadata IS 'The caller''s own notes.';

-- Usage for people: by day, model, month and payer, what it earns, and what is out of the ordinary. Each view is exact
-- at any time: it reads what is added up already and the records that are not.

-- The collations of 0.1.0: an update cannot replace the view with others.
CREATE OR REPLACE VIEW keyvault.usage_by_day WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.day, nullif(u.provider, '') COLLATE "default" AS provider, nullif(u.model, '') COLLATE "default" AS model,
       u.type COLLATE "default" AS type, u.payer COLLATE "default" AS payer,
       sum(u.calls)::bigint AS calls, sum(u.input_tokens)::bigint AS input_tokens, sum(u.cached_tokens)::bigint AS cached_tokens,
       sum(u.output_tokens)::bigint AS output_tokens, sum(u.tokens)::bigint AS tokens,
       sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd, sum(u.credits_overrun) AS credits_overrun
  FROM keyvault._usage u
 GROUP BY u.user_id, u.day, u.provider, u.model, u.type, u.payer;

COMMENT ON VIEW keyvault.usage_by_day IS
    'Usage per user, UTC day, provider, model, type and payer. The acting user''s; every user''s for access analyst or admin.';

COMMENT ON COLUMN keyvault.usage_by_day.user_id IS 'Whose usage.';

COMMENT ON COLUMN keyvault.usage_by_day.day IS 'Date in UTC.';

COMMENT ON COLUMN keyvault.usage_by_day.provider IS 'NULL where the records name none.';

COMMENT ON COLUMN keyvault.usage_by_day.model IS 'NULL where the records name none.';

COMMENT ON COLUMN keyvault.usage_by_day.type IS 'chat, api, automation, or the applications own word.';

COMMENT ON COLUMN keyvault.usage_by_day.payer IS 'Whose key was used: user or platform.';

COMMENT ON COLUMN keyvault.usage_by_day.calls IS 'Usage records.';

COMMENT ON COLUMN keyvault.usage_by_day.input_tokens IS 'Tokens read, cached ones included; NULL where no record states them.';

COMMENT ON COLUMN keyvault.usage_by_day.cached_tokens IS 'The part of input_tokens that came from the providers'' cache; NULL where no record states it.';

COMMENT ON COLUMN keyvault.usage_by_day.output_tokens IS 'Tokens written; NULL where no record states them.';

COMMENT ON COLUMN keyvault.usage_by_day.tokens IS 'All tokens together.';

COMMENT ON COLUMN keyvault.usage_by_day.credits IS 'Credits debited.';

COMMENT ON COLUMN keyvault.usage_by_day.cost_usd IS 'What the providers charge, in USD.';

COMMENT ON COLUMN keyvault.usage_by_day.credits_overrun IS 'Credits beyond what the user had left; not debited.';

CREATE VIEW keyvault.usage_by_model WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, date_trunc('month', u.day::timestamp)::date AS month, nullif(u.provider, '') AS provider, nullif(u.model, '') AS model,
       sum(u.calls)::bigint AS calls, sum(u.input_tokens)::bigint AS input_tokens, sum(u.cached_tokens)::bigint AS cached_tokens,
       sum(u.output_tokens)::bigint AS output_tokens, sum(u.tokens)::bigint AS tokens,
       sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd, sum(u.credits_overrun) AS credits_overrun
  FROM keyvault._usage u
 GROUP BY u.user_id, date_trunc('month', u.day::timestamp)::date, u.provider, u.model;
REVOKE ALL ON keyvault.usage_by_model FROM PUBLIC;

COMMENT ON VIEW keyvault.usage_by_model IS
    'Usage per user, UTC month, provider and model. The acting user''s; every user''s for access analyst or admin.';

COMMENT ON COLUMN keyvault.usage_by_model.user_id IS 'Whose usage.';

COMMENT ON COLUMN keyvault.usage_by_model.month IS 'First day of the month, in UTC.';

COMMENT ON COLUMN keyvault.usage_by_model.provider IS 'NULL where the records name none.';

COMMENT ON COLUMN keyvault.usage_by_model.model IS 'NULL where the records name none.';

COMMENT ON COLUMN keyvault.usage_by_model.calls IS 'Usage records.';

COMMENT ON COLUMN keyvault.usage_by_model.input_tokens IS 'Tokens read, cached ones included; NULL where no record states them.';

COMMENT ON COLUMN keyvault.usage_by_model.cached_tokens IS 'The part of input_tokens that came from the providers'' cache; NULL where no record states it.';

COMMENT ON COLUMN keyvault.usage_by_model.output_tokens IS 'Tokens written; NULL where no record states them.';

COMMENT ON COLUMN keyvault.usage_by_model.tokens IS 'All tokens together.';

COMMENT ON COLUMN keyvault.usage_by_model.credits IS 'Credits debited.';

COMMENT ON COLUMN keyvault.usage_by_model.cost_usd IS 'What the providers charge, in USD.';

COMMENT ON COLUMN keyvault.usage_by_model.credits_overrun IS 'Credits beyond what the user had left; not debited.';

CREATE VIEW keyvault.usage_by_month WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, date_trunc('month', u.day::timestamp)::date AS month,
       sum(u.calls)::bigint AS calls, sum(u.input_tokens)::bigint AS input_tokens, sum(u.cached_tokens)::bigint AS cached_tokens,
       sum(u.output_tokens)::bigint AS output_tokens, sum(u.tokens)::bigint AS tokens,
       sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd, sum(u.credits_overrun) AS credits_overrun
  FROM keyvault._usage u
 GROUP BY u.user_id, date_trunc('month', u.day::timestamp)::date;
REVOKE ALL ON keyvault.usage_by_month FROM PUBLIC;

COMMENT ON VIEW keyvault.usage_by_month IS
    'Usage per user and UTC month. The acting user''s; every user''s for access analyst or admin.';

COMMENT ON COLUMN keyvault.usage_by_month.user_id IS 'Whose usage.';

COMMENT ON COLUMN keyvault.usage_by_month.month IS 'First day of the month, in UTC.';

COMMENT ON COLUMN keyvault.usage_by_month.calls IS 'Usage records.';

COMMENT ON COLUMN keyvault.usage_by_month.input_tokens IS 'Tokens read, cached ones included; NULL where no record states them.';

COMMENT ON COLUMN keyvault.usage_by_month.cached_tokens IS 'The part of input_tokens that came from the providers'' cache; NULL where no record states it.';

COMMENT ON COLUMN keyvault.usage_by_month.output_tokens IS 'Tokens written; NULL where no record states them.';

COMMENT ON COLUMN keyvault.usage_by_month.tokens IS 'All tokens together.';

COMMENT ON COLUMN keyvault.usage_by_month.credits IS 'Credits debited.';

COMMENT ON COLUMN keyvault.usage_by_month.cost_usd IS 'What the providers charge, in USD.';

COMMENT ON COLUMN keyvault.usage_by_month.credits_overrun IS 'Credits beyond what the user had left; not debited.';

CREATE VIEW keyvault.cost_by_payer WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, date_trunc('month', u.day::timestamp)::date AS month, u.payer, nullif(u.provider, '') AS provider,
       sum(u.calls)::bigint AS calls, sum(u.input_tokens)::bigint AS input_tokens, sum(u.cached_tokens)::bigint AS cached_tokens,
       sum(u.output_tokens)::bigint AS output_tokens, sum(u.tokens)::bigint AS tokens,
       sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd, sum(u.credits_overrun) AS credits_overrun
  FROM keyvault._usage u
 GROUP BY u.user_id, date_trunc('month', u.day::timestamp)::date, u.payer, u.provider;
REVOKE ALL ON keyvault.cost_by_payer FROM PUBLIC;

COMMENT ON VIEW keyvault.cost_by_payer IS
    'Who pays for what: usage per user, UTC month, whose key was used and provider. cost_usd is charged to the owner of the key: the user itself, or the platform. The acting user''s; every user''s for access analyst or admin.';

COMMENT ON COLUMN keyvault.cost_by_payer.user_id IS 'Whose usage.';

COMMENT ON COLUMN keyvault.cost_by_payer.month IS 'First day of the month, in UTC.';

COMMENT ON COLUMN keyvault.cost_by_payer.payer IS 'Whose key was used: user or platform.';

COMMENT ON COLUMN keyvault.cost_by_payer.provider IS 'NULL where the records name none.';

COMMENT ON COLUMN keyvault.cost_by_payer.calls IS 'Usage records.';

COMMENT ON COLUMN keyvault.cost_by_payer.input_tokens IS 'Tokens read, cached ones included; NULL where no record states them.';

COMMENT ON COLUMN keyvault.cost_by_payer.cached_tokens IS 'The part of input_tokens that came from the providers'' cache; NULL where no record states it.';

COMMENT ON COLUMN keyvault.cost_by_payer.output_tokens IS 'Tokens written; NULL where no record states them.';

COMMENT ON COLUMN keyvault.cost_by_payer.tokens IS 'All tokens together.';

COMMENT ON COLUMN keyvault.cost_by_payer.credits IS 'Credits debited.';

COMMENT ON COLUMN keyvault.cost_by_payer.cost_usd IS 'What the providers charge, in USD.';

COMMENT ON COLUMN keyvault.cost_by_payer.credits_overrun IS 'Credits beyond what the user had left; not debited.';

CREATE VIEW keyvault.revenue_by_user WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, m.month::date AS month, w.plan, r.usd AS revenue_usd, coalesce(c.platform, 0) AS provider_cost_usd,
       r.usd - coalesce(c.platform, 0) AS margin_usd,
       round((r.usd - coalesce(c.platform, 0)) / nullif(r.usd, 0), 4) AS margin,
       coalesce(c.own, 0) AS own_key_cost_usd, coalesce(c.credits, 0) AS credits
  FROM keyvault.users u
  LEFT JOIN (SELECT d.user_id, min(d.day) AS day FROM keyvault._usage d GROUP BY 1) f ON f.user_id = u.user_id
 CROSS JOIN LATERAL generate_series(date_trunc('month', least(u.created_at AT TIME ZONE 'UTC', f.day::timestamp)), now() AT TIME ZONE 'UTC',
                                    '1 month') m(month)
 -- The first change after the month says what was in force when it ended; the plan chosen on the first day is the first.
 CROSS JOIN LATERAL (SELECT coalesce((SELECT e.plan FROM keyvault.credit_periods e
                                       WHERE e.user_id = u.user_id AND e.ended_at >= (m.month + interval '1 month') AT TIME ZONE 'UTC'
                                         AND e.ended_at >= (SELECT b.period_anchor + interval '1 day' FROM keyvault.credit_balances b
                                                             WHERE b.user_id = u.user_id AND b.slot = 0)
                                       ORDER BY e.ended_at, e.id LIMIT 1), u.plan)) w(plan)
  LEFT JOIN keyvault.plans p ON p.plan = w.plan
  LEFT JOIN (SELECT g.user_id, date_trunc('month', g.created_at AT TIME ZONE 'UTC') AS month, sum(g.price_usd) AS usd
               FROM keyvault.credit_grants g WHERE g.price_usd IS NOT NULL GROUP BY 1, 2) g ON g.user_id = u.user_id AND g.month = m.month
 CROSS JOIN LATERAL (SELECT p.price_usd + coalesce(g.usd, 0)) r(usd)
  LEFT JOIN (SELECT d.user_id, date_trunc('month', d.day::timestamp)::date AS month,
                    sum(d.cost_usd) FILTER (WHERE d.payer = 'platform') AS platform,
                    sum(d.cost_usd) FILTER (WHERE d.payer = 'user') AS own, sum(d.credits) AS credits
               FROM keyvault._usage d GROUP BY 1, 2) c ON c.user_id = u.user_id AND c.month = m.month::date;
REVOKE ALL ON keyvault.revenue_by_user FROM PUBLIC;

COMMENT ON VIEW keyvault.revenue_by_user IS
    'What each user brings and costs, per UTC month since it was made or first used something: the price of the plan that the month ended with, and of grants, against what the providers charge the platform. Every user''s, for access analyst or admin.';

COMMENT ON COLUMN keyvault.revenue_by_user.user_id IS 'Whose plan and usage.';

COMMENT ON COLUMN keyvault.revenue_by_user.month IS 'First day of the month, in UTC; the first one counts whole.';

COMMENT ON COLUMN keyvault.revenue_by_user.plan IS 'The plan that the month ended with, or that the user has now.';

COMMENT ON COLUMN keyvault.revenue_by_user.revenue_usd IS 'Price of the plan for a month, as it is now, and of the month''s grants, in USD; NULL where the plan''s is negotiated.';

COMMENT ON COLUMN keyvault.revenue_by_user.provider_cost_usd IS 'What providers charge the platform for the user''s calls, in USD.';

COMMENT ON COLUMN keyvault.revenue_by_user.margin_usd IS 'revenue_usd less provider_cost_usd; NULL where the price is.';

COMMENT ON COLUMN keyvault.revenue_by_user.margin IS 'margin_usd as a fraction of revenue_usd; NULL for a plan that is free or negotiated.';

COMMENT ON COLUMN keyvault.revenue_by_user.own_key_cost_usd IS 'What providers charge the user itself, for calls with its own keys, in USD.';

COMMENT ON COLUMN keyvault.revenue_by_user.credits IS 'Credits debited.';

CREATE VIEW keyvault.usage_anomalies WITH (security_invoker = true, security_barrier = true) AS
WITH days AS (
    SELECT u.user_id, u.day, sum(u.calls) AS calls, sum(u.tokens) AS tokens, sum(u.credits) AS credits, sum(u.cost_usd) AS cost_usd
      FROM keyvault._usage u
     WHERE u.day > (now() AT TIME ZONE 'UTC')::date - 60
     GROUP BY u.user_id, u.day
), known AS (
    SELECT d.user_id, d.day, m.measure, m.value, m.least,
           array_agg(m.value) OVER (PARTITION BY d.user_id, m.measure ORDER BY d.day
                                    RANGE BETWEEN '28 days' PRECEDING AND '1 day' PRECEDING) AS earlier
      FROM days d
     CROSS JOIN LATERAL (VALUES ('calls', d.calls, 1), ('tokens', d.tokens, 1000), ('credits', d.credits, 1), ('cost_usd', d.cost_usd, 0.01)) m(measure, value, least)
), judged AS (
    SELECT k.user_id, k.day, k.measure, k.value, k.least, c.median, d.mad, cardinality(k.earlier) AS baseline_days
      FROM known k
     CROSS JOIN LATERAL (SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY e)::numeric FROM unnest(k.earlier) e) c(median)
     CROSS JOIN LATERAL (SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY abs(e - c.median))::numeric FROM unnest(k.earlier) e) d(mad)
     WHERE cardinality(k.earlier) >= 7 AND k.day > (now() AT TIME ZONE 'UTC')::date - 30
)
SELECT j.user_id, j.day, j.measure, j.value, round(j.median, 6) AS median, round(j.mad, 6) AS mad, s.score, j.baseline_days
  FROM judged j
 CROSS JOIN LATERAL (SELECT round((j.value - j.median) / coalesce(nullif(greatest(1.4826 * j.mad, 0.1 * j.median), 0), j.least), 2)) s(score)
 WHERE s.score >= 3.5 OR (s.score <= -3.5 AND j.day < (now() AT TIME ZONE 'UTC')::date);
REVOKE ALL ON keyvault.usage_anomalies FROM PUBLIC;

COMMENT ON VIEW keyvault.usage_anomalies IS
    'Days of the last 30 on which a user''s usage is far from its own: a robust z-score of 3.5 or more to either side of the median of the days in the 28 before on which there was usage, of which there have to be 7. Today counts as high only, as it is not over. After Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993). The acting user''s; every user''s for access analyst or admin.';

COMMENT ON COLUMN keyvault.usage_anomalies.user_id IS 'Whose usage.';

COMMENT ON COLUMN keyvault.usage_anomalies.day IS 'Date in UTC.';

COMMENT ON COLUMN keyvault.usage_anomalies.measure IS 'calls, tokens, credits or cost_usd; a day may stand out in several.';

COMMENT ON COLUMN keyvault.usage_anomalies.value IS 'The measure on that day; cost_usd in USD.';

COMMENT ON COLUMN keyvault.usage_anomalies.median IS 'Its median on the days before.';

COMMENT ON COLUMN keyvault.usage_anomalies.mad IS 'The median of the absolute deviations from that.';

COMMENT ON COLUMN keyvault.usage_anomalies.score IS 'Deviations from the median, each the larger of 1.4826 mad, which is a standard deviation where values are normally distributed, and a tenth of the median, or where both are 0, one call, 1000 tokens, one credit, 0.01 USD; negative below it.';

COMMENT ON COLUMN keyvault.usage_anomalies.baseline_days IS 'Days that the median is of.';

CREATE FUNCTION keyvault.usage_chart(user_id text = NULL, days integer = 30, measure text = 'credits') RETURNS SETOF text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_variable
DECLARE
    width constant integer := 40;
    whose constant text := coalesce(user_id, keyvault.current_user_id());
    today constant date := (now() AT TIME ZONE 'UTC')::date;
    in_blocks constant boolean := getdatabaseencoding() = 'UTF8';
BEGIN
    IF measure IS NULL OR measure NOT IN ('calls', 'tokens', 'input_tokens', 'cached_tokens', 'output_tokens', 'credits', 'cost_usd') THEN
        RAISE EXCEPTION 'there is no such measure of usage'
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Measures are calls, tokens, input_tokens, cached_tokens, output_tokens, credits and cost_usd.';
    END IF;
    IF days IS NULL OR days NOT BETWEEN 1 AND 366 THEN
        RAISE EXCEPTION 'days must be between 1 and 366' USING ERRCODE = 'invalid_parameter_value', HINT = 'Leave it out for 30.';
    END IF;
    RETURN QUERY
    WITH used AS (
        SELECT u.day, sum(CASE measure WHEN 'calls' THEN u.calls WHEN 'tokens' THEN u.tokens WHEN 'input_tokens' THEN u.input_tokens
                                       WHEN 'cached_tokens' THEN u.cached_tokens WHEN 'output_tokens' THEN u.output_tokens
                                       WHEN 'credits' THEN u.credits ELSE u.cost_usd END) AS value
          FROM keyvault._usage u
         WHERE (whose IS NULL OR u.user_id = whose) AND u.day > today - days AND u.day <= today
         GROUP BY u.day
    ), shown AS (
        SELECT today - i AS day, coalesce(u.value, 0) AS value,
               coalesce(round(u.value * width * 8 / nullif(max(u.value) OVER (), 0)), 0)::integer AS eighths,
               to_char(coalesce(u.value, 0), CASE WHEN measure = 'cost_usd' THEN 'FM999,999,999,990.0000'
                                                  WHEN measure = 'credits' THEN 'FM999,999,999,999,990.00'
                                                  ELSE 'FM999,999,999,999,999,990' END) AS label
          FROM generate_series(days - 1, 0, -1) i LEFT JOIN used u ON u.day = today - i
    )
    SELECT format('%s per day (UTC), total %s', measure, trim_scale((SELECT coalesce(sum(s.value), 0) FROM shown s)))
    UNION ALL
    SELECT * FROM (
        SELECT format('%s %s %s', to_char(s.day, 'YYYY-MM-DD'),
                      -- U+2588 is a full block, U+2589 to U+258F are seven to one eighths of one.
                      rpad(CASE WHEN NOT in_blocks THEN repeat('#', (s.eighths + 4) / 8)
                                ELSE repeat(chr(9608), s.eighths / 8)
                                     || CASE WHEN s.eighths % 8 > 0 THEN chr(9616 - s.eighths % 8)
                                             WHEN s.eighths = 0 AND s.value > 0 THEN chr(9615) ELSE '' END END, width),
                      lpad(s.label, max(length(s.label)) OVER ()))
          FROM shown s ORDER BY s.day) lines;
END $$;
REVOKE ALL ON FUNCTION keyvault.usage_chart(user_id text, days integer, measure text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.usage_chart(text, integer, text) IS
    'A bar per day, in text: usage of a user, or of all that the caller may see where neither user_id nor an identity is given, over the last days (1 to 366), of a measure: calls, tokens, input_tokens, cached_tokens, output_tokens, credits or cost_usd. Bars are 40 characters wide, in eighths. Error: 22023.';

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
REVOKE ALL ON keyvault.usage_archived FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._archive_usage(partition regclass) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._ledger() FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault.verify_ledger() FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault.balance_at(user_id text, at timestamptz) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault.explain_balance(user_id text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.explain_balance(text) IS
    'How a user''s credits_remaining comes about, line by line, in credits: the lines add up to the last one, remaining. Debits are negative. user_id NULL is the identity. The acting user''s, every user''s for access analyst or admin; no rows otherwise.';

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
REVOKE ALL ON keyvault._maintenance_job FROM PUBLIC;

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

REVOKE ALL ON FUNCTION keyvault._purge_aged(integer) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._purge(batch integer, OUT purged bigint, OUT more boolean) FROM PUBLIC;

COMMENT ON FUNCTION keyvault._purge(integer) IS
    'Charges unknown outcomes that are due, takes the expired holds of users, 250 at most, whose balances nobody else has locked off these, then deletes up to batch requests that ended longer than keyvault.response_retention ago, with their answers, retired sealing keys, and what _purge_aged deletes; returns how many of all, and whether there are more.';

CREATE FUNCTION keyvault._receives(what regclass) RETURNS boolean
    LANGUAGE sql STABLE
BEGIN ATOMIC
    SELECT EXISTS (SELECT FROM pg_subscription_rel r WHERE r.srrelid = what);
END;

COMMENT ON FUNCTION keyvault._receives(regclass) IS 'True when a subscription of this database brings a table''s rows.';

REVOKE ALL ON FUNCTION keyvault._receives(regclass) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._maintain(job text, batch integer, OUT done bigint, OUT more boolean, OUT detail text) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._check_maintenance_job(name text) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault.run_maintenance(name text) FROM PUBLIC;

COMMENT ON FUNCTION keyvault.run_maintenance(text) IS
    'Does all that is due, or one job of it, in the caller''s transaction, and returns a row per job: what was done, and how much of it. Again at once it finds little left. CALL maintain() does the same and commits after each batch. A superuser calls it. Errors: 22023, 42501.';

CREATE PROCEDURE keyvault.maintain(name text = NULL)
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_maintain';
REVOKE ALL ON PROCEDURE keyvault.maintain(name text) FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault.job_statements() FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault._require_cron() FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault.schedule_jobs() FROM PUBLIC;

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
REVOKE ALL ON FUNCTION keyvault.unschedule_jobs() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.unschedule_jobs() IS
    'Takes this database''s maintenance out of pg_cron, and returns how many jobs there were. Errors: 42501, 55000 where pg_cron is not.';

-- Every grant of the extension. Nothing is PUBLIC's; access is given by grant_access.

CREATE OR REPLACE FUNCTION keyvault._access_statements(access text) RETURNS SETOF text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    app_functions text[] := '{act_as, store_api_key_reference, upsert_user, set_plan, suspend_user, resume_user, erase_user, uuidv7, _debit_tag, reconcile_request, unknown_requests}';
    user_functions text[] := '{test_api_key, store_api_key, store_api_keys, sealing_key, store_sealed_api_key, user_api_keys, user_api_key, delete_api_key, request, response, wait_response, call, cancel_request}';
    every_function text[] := '{current_user_id, _may_act_for_any_user, _may_read_all_usage, _may_administer, _period_bound, _period_number, _fresh_from, _fresh_until, usage_chart}';
    admin_functions text[] := '{upsert_user, set_plan, suspend_user, resume_user, erase_user, rotate_data_key, rotate_data_keys, retire_sealing_keys, store_platform_key, delete_platform_key, reconcile_request, unknown_requests, _are_context_tiers}';
    credit_functions text[] := CASE access
        WHEN 'app' THEN '{record_usage, reserve_credits, settle_credits, release_credits, grant_credits, refund_usage, set_budget}'
        WHEN 'admin' THEN '{grant_credits, refund_usage, set_budget, reset_due_credits, verify_ledger, _ledger, _budget_used}'
        WHEN 'analyst' THEN '{verify_ledger, _ledger, _budget_used}' END::text[]
        || '{_balance_now, _in_budget, _model_family, _budget_window, _budget_held, balance_at, explain_balance}'::text[];
    routines text[];
    member text;
BEGIN
    IF access IS NULL OR access NOT IN ('app', 'user', 'analyst', 'admin') THEN
        RAISE EXCEPTION 'access must be app, user, analyst or admin'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'See "Access" in doc/keyvault.md.';
    END IF;
    routines := every_function || credit_functions || ('_' || access) || CASE access
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
    RETURN NEXT 'SELECT ON keyvault.credit_grants, keyvault.credit_periods, keyvault.credit_notices, keyvault.credit_budgets, '
             || 'keyvault.budget_status, keyvault.plan_prices, keyvault.usage_archived';
    RETURN NEXT 'SELECT ON keyvault.usage_by_model, keyvault.usage_by_month, keyvault.cost_by_payer, '
             || 'keyvault.usage_anomalies, keyvault.usage_daily, keyvault.usage_late, keyvault.usage_retired, keyvault.usage_rollup, keyvault._usage';
    IF access IN ('analyst', 'admin') THEN
        RETURN NEXT 'SELECT ON keyvault.revenue_by_user';
    END IF;
    IF access IN ('app', 'user') THEN
        RETURN NEXT 'SELECT (user_id, id, provider, model, type, path, payer, api_key_id, status, attempts, timeout_ms, hold_id, estimated_usd, '
                 || 'idempotency_key, queued_at, next_attempt_at, sent_at, finished_at, error, metadata, body) ON keyvault.requests';
        RETURN NEXT 'SELECT ON keyvault.responses, keyvault.request_status';
    END IF;
    IF access IN ('app', 'user', 'admin') THEN
        RETURN NEXT 'SELECT (user_id, id, provider, name, hint, source, status, expires_at, last_used_at, last_verified_at, rotated_at, '
                 || 'created_at, updated_at, problem, use_count) ON keyvault.api_keys';
        RETURN NEXT 'SELECT (user_id, id, status, problem, created_at) ON keyvault.key_replacements';
        RETURN NEXT 'SELECT ON keyvault.api_key_status, keyvault.api_keys_due';
    END IF;
    IF access = 'app' THEN
        -- debit_tag and hold_id stay out: with them, a writer could pass a row off as debited, or as settled past a budget.
        RETURN NEXT 'INSERT (user_id, created_at, id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens, '
                 || 'credits, cost_usd, request_id, api_key_id, issued_key_id, idempotency_key, metadata, reasoning_tokens, units, member_id) ON keyvault.usage_records';
        RETURN NEXT 'SET ON PARAMETER "keyvault.user_id"';
    END IF;
    IF access = 'admin' THEN
        -- Where a provider is, and how it is given the key, is the superuser's: whoever sets that reads the keys.
        RETURN NEXT 'INSERT, UPDATE, DELETE ON keyvault.plans, keyvault.model_prices, keyvault.plan_prices';
        -- So is key_pattern: who sets it learns from what it refuses what others' keys look like.
        RETURN NEXT 'UPDATE (platform_paths, usd_per_request) ON keyvault.providers';
    END IF;
END $$;

CREATE FUNCTION keyvault._change_access(role regrole, access text, change text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    privilege text;
BEGIN
    IF role IS NULL THEN
        RAISE EXCEPTION 'role must not be NULL' USING ERRCODE = 'null_value_not_allowed', HINT = 'Pass the name of a role.';
    END IF;
    FOR privilege IN SELECT keyvault._access_statements(access) LOOP
        EXECUTE format(change, privilege, role);
    END LOOP;
END $$;
REVOKE ALL ON FUNCTION keyvault._change_access(role regrole, access text, change text) FROM PUBLIC;
COMMENT ON FUNCTION keyvault._change_access(regrole, text, text) IS
    'Carries out a change, with %s for each privilege of an access and for a role: GRANT %s TO %s or REVOKE %s FROM %s. Errors: 22004, 22023, 42501.';

CREATE OR REPLACE FUNCTION keyvault.grant_access(role regrole, access text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM keyvault._change_access(role, access, 'GRANT %s TO %s');
END $$;
COMMENT ON FUNCTION keyvault.grant_access(regrole, text) IS
    'Gives a role an access: app (trusted application, acts for any user), user (acts as the user it proved to be), analyst (everyone''s usage, no keys), admin (plans, prices, users, platform keys, what a provider costs, and which paths the platform pays for, metadata of keys; never plaintext). A superuser calls it. Errors: 22004, 22023, 42501.';

CREATE OR REPLACE FUNCTION keyvault.revoke_access(role regrole, access text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    other text;
BEGIN
    PERFORM keyvault._change_access(role, access, 'REVOKE %s FROM %s');
    -- Accesses overlap: what another one that the role keeps also gives is given again.
    FOR other IN SELECT substr(p.proname, 2) FROM pg_proc p, aclexplode(p.proacl) a
                  WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname IN ('_app', '_user', '_analyst', '_admin')
                    AND a.grantee = role LOOP
        PERFORM keyvault.grant_access(role, other);
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault.revoke_access(regrole, text) IS
    'Takes an access from a role; other accesses that it was given stay whole. A superuser calls it. Errors: 22004, 22023, 42501.';

CREATE FUNCTION keyvault.refresh_access() RETURNS TABLE (role regrole, access text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    FOR role, access IN SELECT DISTINCT a.grantee, substr(p.proname, 2) FROM pg_proc p, aclexplode(p.proacl) a
                         WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname IN ('_app', '_user', '_analyst', '_admin')
                           AND a.grantee NOT IN (0, p.proowner)
                         ORDER BY 1, 2 LOOP
        PERFORM keyvault.grant_access(role, access);
        -- What 0.1.0 gave and no access has any more.
        EXECUTE format('REVOKE UPDATE (key_pattern) ON keyvault.providers FROM %s', role);
        RETURN NEXT;
    END LOOP;
END $$;
REVOKE ALL ON FUNCTION keyvault.refresh_access() FROM PUBLIC;

COMMENT ON FUNCTION keyvault.refresh_access() IS
    'Gives every role the accesses that it has once more, and returns them: after ALTER EXTENSION keyvault UPDATE, which grants nothing, so that they cover what the update brought, and takes what an access no longer has. A superuser calls it. Error: 42501.';
