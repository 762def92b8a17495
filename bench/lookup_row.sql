\set n random(1, 10000)
SELECT hint FROM keyvault.api_keys WHERE user_id = 'user_' || :n AND provider = 'openai' AND name = 'default';
