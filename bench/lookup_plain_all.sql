\set n random(1, 10000)
SELECT jsonb_object_agg(provider, key) FROM plain_keys WHERE user_id = 'user_' || :n AND name = 'default';
