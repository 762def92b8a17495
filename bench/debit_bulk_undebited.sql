INSERT INTO undebited_records (user_id, type, model, tokens, credits) SELECT 'user_' || (i % 1000 + 1), 'chat', 'gpt-5-mini', 100, 0.25 FROM generate_series(1, 100000) i;
