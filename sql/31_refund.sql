-- Credits given back for a use.

CREATE FUNCTION keyvault._uuid_time(id uuid) RETURNS timestamptz
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE WHEN substr(id::text, 15, 1) = '7'
                THEN to_timestamp(('x' || translate(left(id::text, 13), '-', ''))::bit(48)::bigint / 1000.0) END;
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
COMMENT ON FUNCTION keyvault._refund_usage(text, uuid, text) IS 'refund_usage, after its caller was checked.';

CREATE FUNCTION keyvault.refund_usage(id uuid, reason text, user_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_refund_usage';
COMMENT ON FUNCTION keyvault.refund_usage(uuid, text, text) IS
    'Gives back what a usage record cost: a grant without expiry, whatever had paid for it, and a usage record of type refund that says why, both with the id that is returned. Budgets in credits of the day or month under way that have counted the record get them back, too. A record is refunded once; again returns the same id. user_id NULL is the identity. Errors: 42501, 22004, 22023 for a record that the user has not or that cost nothing.';
