CREATE TABLE plain_keys (
    user_id text COLLATE "C", provider text COLLATE "C", name text COLLATE "C", key text,
    UNIQUE (user_id, provider, name));
INSERT INTO plain_keys
SELECT 'user_' || i, p, 'default', 'sk-bench-' || md5(i || p)
  FROM generate_series(1, 10000) i, unnest('{openai,gemini,exa,copilotkit}'::text[]) p;
SELECT count(keyvault.store_api_key(provider, translate(key, '-', '_'), user_id => user_id)) FROM plain_keys \g /dev/null
VACUUM ANALYZE;
CHECKPOINT;
