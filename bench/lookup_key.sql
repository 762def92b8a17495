\set n random(1, 10000)
SELECT keyvault.user_api_key('openai', 'user_' || :n);
