-- Credits set aside for calls whose cost is not known yet.

CREATE TABLE keyvault.credit_holds (
    user_id    text COLLATE "C" NOT NULL,
    id         uuid NOT NULL DEFAULT keyvault.uuidv7(),
    amount     numeric(18,6) NOT NULL CHECK (amount >= 0 AND amount < 'Infinity'),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    reserved   numeric(18,6) NOT NULL DEFAULT 0,
    model      text,
    issued_key_id uuid,
    member_id  text,
    cost_usd   numeric(18,9) NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, id)
);
CREATE INDEX credit_holds_id ON keyvault.credit_holds (id);
COMMENT ON TABLE keyvault.credit_holds IS 'Credits set aside for calls whose cost is not known yet; a row goes when it is settled or released.';
COMMENT ON COLUMN keyvault.credit_holds.expires_at IS 'From then on the hold no longer counts; infinity while its request is queued or running.';
COMMENT ON COLUMN keyvault.credit_holds.amount IS 'What it takes off the credits left; 0 once it has expired and credits ran short.';
COMMENT ON COLUMN keyvault.credit_holds.reserved IS 'What was set aside.';
COMMENT ON COLUMN keyvault.credit_holds.cost_usd IS 'Estimated cost in USD, which budgets in USD count while the hold is open.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_holds', '');

ALTER TABLE keyvault.credit_holds ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.credit_holds FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.credit_holds FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

CREATE FUNCTION keyvault._sweep_holds(user_id text) RETURNS keyvault.credit_balances
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
COMMENT ON FUNCTION keyvault._end_hold(text, uuid) IS
    'Deletes a hold and gives it back to the balance, whose row lock the caller holds; false when there is no such hold.';

CREATE FUNCTION keyvault._release_hold(user_id text, hold uuid) RETURNS boolean
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    -- The balance is locked before the hold, in the order of every other path.
    PERFORM keyvault._gather_slots($1);
    RETURN keyvault._end_hold($1, hold);
END $$;
COMMENT ON FUNCTION keyvault._release_hold(text, uuid) IS 'Gives a hold back to its user''s balance; false when there is no such hold.';

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
COMMENT ON FUNCTION keyvault._reserve_credits(text, numeric, interval, text, numeric, uuid, text, boolean) IS
    'reserve_credits, after its caller was checked.';

CREATE FUNCTION keyvault.reserve_credits(amount numeric, ttl interval = '10 min', user_id text = NULL, model text = NULL,
                                         cost_usd numeric = 0, issued_key_id uuid = NULL, member_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_reserve_credits';
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
COMMENT ON FUNCTION keyvault._settle_credits(text, uuid, numeric, text, text, integer, integer, jsonb, text, bigint, numeric) IS
    'settle_credits, after its caller was checked.';

CREATE FUNCTION keyvault.settle_credits(hold uuid, amount numeric, type text = 'api', model text = NULL, input_tokens integer = NULL,
                                        output_tokens integer = NULL, user_id text = NULL, metadata jsonb = '{}', provider text = NULL,
                                        cached_tokens bigint = NULL, cost_usd numeric = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_settle_credits';
COMMENT ON FUNCTION keyvault.settle_credits(uuid, numeric, text, text, integer, integer, text, jsonb, text, bigint, numeric) IS
    'Ends a hold with what was really used, more or less than held, as a usage record with the hold''s id, which is returned. Beyond the hold it charges up to the limit and records the rest as credits_overrun. cost_usd (USD) NULL is what model and tokens cost, where they have a price, else what was reserved. Works for an expired hold too, for a week; settling twice with one amount charges once. user_id NULL is the hold''s. Errors: 22023 no such hold, or settled with another amount; 42501.';

CREATE FUNCTION keyvault.release_credits(hold uuid, user_id text = NULL) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_release_credits';
COMMENT ON FUNCTION keyvault.release_credits(uuid, text) IS
    'Gives back what a hold has set aside; false when it was settled or released already. user_id NULL is the hold''s. Error: 42501.';
