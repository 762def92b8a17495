\set n random(1, 10000)
SELECT keyvault.user_api_keys('user_' || :n);
