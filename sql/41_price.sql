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
COMMENT ON FUNCTION keyvault._price_usd(text, text, bigint, bigint, bigint, bigint, numeric) IS
    'What a use whose credits are given costs the provider''s customer in USD; NULL for a model without a price and for a use without tokens and units.';

CREATE FUNCTION keyvault._credits_of(plan keyvault.plans, payer text, cost_usd numeric) RETURNS numeric
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN least(round((cost_usd * CASE payer WHEN 'user' THEN plan.own_key_rate ELSE 1 END + plan.infrastructure_usd)
                       * (1 + plan.margin) * plan.credits_per_usd, 6), 999999999999);
COMMENT ON FUNCTION keyvault._credits_of(keyvault.plans, text, numeric) IS
    'What a cost in USD is in credits on a plan, with its infrastructure and margin, by whose key was used.';

CREATE FUNCTION keyvault._credits_owed(plan text, payer text, cost_usd numeric) RETURNS numeric
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
COMMENT ON FUNCTION keyvault._record_usage(text, text, integer, integer, numeric, text, text, jsonb, text, bigint, bigint, numeric, text, numeric, uuid, text) IS
    'record_usage, after its caller was checked.';

CREATE FUNCTION keyvault.record_usage(
    type text, model text, input_tokens integer, output_tokens integer, credits numeric = NULL, user_id text = NULL,
    idempotency_key text = NULL, metadata jsonb = '{}', provider text = NULL, cached_tokens bigint = NULL, reasoning_tokens bigint = NULL,
    units numeric = NULL, payer text = 'platform', cost_usd numeric = NULL, issued_key_id uuid = NULL, member_id text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_record_usage';
COMMENT ON FUNCTION keyvault.record_usage(text, text, integer, integer, numeric, text, text, jsonb, text, bigint, bigint, numeric, text, numeric, uuid, text) IS
    'Records a use, debits its credits, and returns the usage record''s id. Without credits the use is priced by model and tokens, or by cost_usd (USD); with credits, cost_usd NULL is what model and tokens cost, where they have a price. The same idempotency_key records once and returns the same id, for as long as keyvault.response_retention. cached_tokens are part of input_tokens, reasoning_tokens of output_tokens. user_id NULL is the identity. Errors: KV001 credit limit or budget, 22004, 22023, 23514 bad argument, 40001 the idempotency key is in use, 42501.';
