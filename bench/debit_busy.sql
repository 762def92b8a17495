INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits) VALUES ('user_7', 'chat', 'gpt-5-mini', 100, 0.25);
