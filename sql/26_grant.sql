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
COMMENT ON FUNCTION keyvault._add_grant(keyvault.credit_balances, uuid, numeric, text, text, timestamptz, uuid, text, numeric) IS
    'Adds a grant to a locked balance and returns its id.';

CREATE FUNCTION keyvault.grant_credits(user_id text, amount numeric, reason text, expires_at timestamptz = NULL, idempotency_key text = NULL,
                                       price_usd numeric = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_grant_credits';
COMMENT ON FUNCTION keyvault.grant_credits(text, numeric, text, timestamptz, text, numeric) IS
    'Gives a user credits beyond the plan, until expires_at or for good, and returns the grant''s id. They can be used at once: they do not pay for overage that was reported before. price_usd is what the user paid for them, in USD. The same idempotency_key returns the same grant. Errors: 42501 without the right to act for any user or access admin, 22004 and 22023 bad argument, 22023 for a key that was used for another grant.';

CREATE FUNCTION keyvault.reset_due_credits(batch integer = 10000) RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_reset_due_credits';
COMMENT ON FUNCTION keyvault.reset_due_credits(integer) IS
    'Begins the periods that are due and ends grants that have expired, for at most batch users whom nobody else has locked; returns how many. Commit and call again until it returns 0. Credits are right without it: it makes the next debit of each of them as fast as any. Errors: 42501 without access admin, 22023.';
