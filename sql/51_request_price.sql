-- Which model a request reaches, what it is estimated to cost, and what its answer makes it cost.

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
COMMENT ON FUNCTION keyvault._address_request(keyvault.providers, text, text, jsonb) IS
    'The path, model and body of a request as they are sent and priced: a path that names the model decides which it is. Error: 22023.';
