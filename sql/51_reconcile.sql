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
COMMENT ON FUNCTION keyvault._reconcile_request(uuid, text, bigint, bigint, bigint, numeric) IS 'reconcile_request, after its caller was checked.';

CREATE FUNCTION keyvault.reconcile_request(request_id uuid, outcome text, input_tokens bigint = NULL, output_tokens bigint = NULL,
                                           cached_tokens bigint = NULL, cost_usd numeric = NULL) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_reconcile_request';
COMMENT ON FUNCTION keyvault.reconcile_request(uuid, text, bigint, bigint, bigint, numeric) IS
    'Ends a request whose outcome is unknown as failed, and its hold: charge debits the tokens or the cost in USD that are given, or the estimate without, up to what the user has left, and writes a usage record; release debits nothing. False when the request''s outcome is not unknown, or no more. Errors: 42501 without the right to act for any user or access admin, 22004, 22023.';

CREATE FUNCTION keyvault.unknown_requests() RETURNS TABLE (user_id text, id uuid, provider text, model text, payer text, estimated_usd numeric,
                                                           credits_held numeric, held_until timestamptz, sent_at timestamptz,
                                                           finished_at timestamptz, error text)
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_unknown_requests';
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
COMMENT ON FUNCTION keyvault._charge_unknown(integer) IS
    'Charges up to batch requests their estimate whose outcome nobody reconciled within a day, on plans with unknown_outcome charge; returns how many.';
