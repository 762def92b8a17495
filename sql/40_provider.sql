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
    env_var      text CHECK (env_var ~ '^[A-Z][A-Z0-9_]{0,62}$'),
    key_pattern  text CHECK (('' ~ key_pattern) IS NOT NULL OR key_pattern IS NULL),
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
COMMENT ON COLUMN keyvault.providers.env_var IS
    'The environment variable the provider''s own SDK reads its key from, and development mode; NULL for the provider''s name and _API_KEY.';
COMMENT ON COLUMN keyvault.providers.key_pattern IS 'A regular expression that a key must match, besides 8 to 512 printable ASCII characters; 2201B for one that does not compile.';
COMMENT ON COLUMN keyvault.providers.test_path IS 'A path whose GET answers 200 to a good key and costs nothing.';
COMMENT ON COLUMN keyvault.providers.allowed_host IS
    'An administrator''s exception: this host, or host:port, may be called over plain http and at a private or loopback address.';
COMMENT ON COLUMN keyvault.providers.usd_per_request IS 'Cost of a call for which neither the answer nor model_prices states one, in USD.';

-- Who may write to any table without being a superuser does not send keys elsewhere.
ALTER TABLE keyvault.providers ENABLE ROW LEVEL SECURITY;
CREATE POLICY read_all ON keyvault.providers FOR SELECT USING (true);
CREATE POLICY change_by_access ON keyvault.providers FOR UPDATE USING ((SELECT keyvault._may_administer()));

-- key_pattern refuses only what is recognisably another provider's key: no vendor promises a shape for its own.
INSERT INTO keyvault.providers
    (provider, base_url, dialect, default_path, platform_paths, auth_header, auth_scheme, headers, env_var, key_pattern, test_path, seeded)
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
COMMENT ON FUNCTION keyvault._are_context_tiers(jsonb) IS 'True for NULL and for what model_prices.context_tiers may hold.';

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
    reasoning_usd_per_mtok    numeric(18,9) CHECK (reasoning_usd_per_mtok >= 0 AND reasoning_usd_per_mtok < 'Infinity'),
    usd_per_request numeric(18,9) NOT NULL DEFAULT 0 CHECK (usd_per_request >= 0 AND usd_per_request < 'Infinity'),
    usd_per_unit  numeric(18,9) NOT NULL DEFAULT 0 CHECK (usd_per_unit >= 0 AND usd_per_unit < 'Infinity'),
    unit          text CHECK (unit <> ''),
    context_tiers jsonb CHECK (keyvault._are_context_tiers(context_tiers)),
    PRIMARY KEY (provider, model, valid_from)
);
COMMENT ON COLUMN keyvault.model_prices.reasoning_usd_per_mtok IS 'For the output tokens that are reasoning; NULL: as the others.';
COMMENT ON COLUMN keyvault.model_prices.usd_per_request IS 'Besides tokens, for each use.';
COMMENT ON COLUMN keyvault.model_prices.usd_per_unit IS 'Besides tokens, for each of usage_records.units.';
COMMENT ON COLUMN keyvault.model_prices.unit IS 'What units counts, for people: image, second, page.';
COMMENT ON COLUMN keyvault.model_prices.context_tiers IS
    'Prices of a whole use with more input tokens than "over": [{"over": 200000, "input": 6, "cached_input": 0.6, "output": 22.5, "reasoning": 22.5}, ...], each in USD per million tokens; a price that is left out stays. The highest tier that applies counts.';
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

INSERT INTO keyvault.model_prices
    (provider, model, valid_from, input_usd_per_mtok, output_usd_per_mtok, cached_input_usd_per_mtok, context_window, source, seeded)
VALUES
    ('gemini', 'gemini-3.8-flash', '2027-01-01 00:00+00', 1.5, 7.5, 0.15, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('gemini', 'gemini-3.7-flash', '2027-01-01 00:00+00', 1.5, 7.5, 0.15, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true),
    ('gemini', 'gemini-3.6-flash', '2027-01-01 00:00+00', 1.5, 7.5, 0.15, 1000000, 'genai-prices 0.1.8 (2026-09-23)', true);

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
 WHERE m.provider OPERATOR(pg_catalog.=) t.provider AND m.model OPERATOR(pg_catalog.=) t.model;

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
