\set n random(1, :users)
INSERT INTO keyvault.usage_records (user_id, type, model, tokens, credits) VALUES ('reset_' || :n, 'chat', 'gpt-5-mini', 100, 0.25);
