\set n random(1, 100000)
INSERT INTO keyvault.usage_records (user_id, type, provider, model, input_tokens, output_tokens) VALUES ('user_' || :n, 'chat', 'openai', 'gpt-5-mini', 1000, 300);
