\set n random(1, 100000)
INSERT INTO undebited_records (user_id, type, model, tokens, credits) VALUES ('user_' || :n, 'chat', 'gpt-5-mini', 100, 0.25);
