-- Users' provider keys: stored sealed, opened for their owner only.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
SELECT keyvault.store_api_key('openai', 'sk-regress-aaaaaaaaaaaaaaaa', user_id => 'key_a') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('gemini', 'AIza-regress-aaaaaaaaaaaaaa', user_id => 'key_a') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('exa', 'short-aa', user_id => 'key_a') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('openai', 'sk-regress-second-of-a', 'second', 'key_a') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('openai', 'sk-regress-bbbbbbbbbbbbbbbb', user_id => 'key_b') IS NOT NULL AS stored;

SELECT keyvault.user_api_keys('key_a');
SELECT keyvault.user_api_keys('key_b');
SELECT keyvault.user_api_keys('nobody_yet');
SELECT keyvault.user_api_key('openai', 'key_a'), keyvault.user_api_key('openai', 'key_a', 'second'), keyvault.user_api_key('anthropic', 'key_a');
SELECT keyvault.user_api_key('openia', 'key_a');
-- A user exists from the first write on.
SELECT user_id, plan FROM keyvault.users WHERE user_id IN ('key_a', 'nobody_yet');

-- What the owner sees of them.
SELECT provider, name, hint, status, source, calls_this_month FROM keyvault.api_key_status WHERE user_id = 'key_a' ORDER BY 1, 2;

-- Stored bytes: the record's header, and nothing of the key.
SELECT provider, substr(ciphertext, 1, 4), octet_length(ciphertext), position('regress'::bytea IN ciphertext) AS found
  FROM keyvault.api_keys WHERE user_id = 'key_a' AND name = 'default' ORDER BY 1;
SELECT substr(wrapped, 1, 4), octet_length(wrapped) FROM keyvault.data_keys WHERE user_id = 'key_a';
-- The salt is the week: one record key opens all that a user stores in it.
SELECT count(*) FILTER (WHERE substr(ciphertext, 25, 8) <> '\x0000000000000000') AS other,
       count(*) FILTER (WHERE ('x' || encode(substr(ciphertext, 33, 8), 'hex'))::bit(64)::bigint NOT BETWEEN week.before AND week.now) AS of_other_weeks,
       count(DISTINCT substr(ciphertext, 41, 12)) = count(*) AS nonces_differ
  FROM keyvault.api_keys,
       (SELECT floor(extract(epoch FROM (now() - interval '1 day') - timestamptz '2000-01-01 00:00:00+00') / (7 * 86400)) AS before,
               floor(extract(epoch FROM clock_timestamp() - timestamptz '2000-01-01 00:00:00+00') / (7 * 86400)) AS now) week;

-- Equal keys: equal fingerprints for one user, never across users; never an equal ciphertext.
SELECT keyvault.store_api_key('openai', 'sk-regress-aaaaaaaaaaaaaaaa', 'copy', 'key_a') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('openai', 'sk-regress-aaaaaaaaaaaaaaaa', 'copy', 'key_b') IS NOT NULL AS stored;
SELECT count(DISTINCT fingerprint) AS fingerprints, count(DISTINCT ciphertext) AS ciphertexts, count(*) FROM keyvault.api_keys
 WHERE (user_id, name) IN (('key_a', 'default'), ('key_a', 'copy'), ('key_b', 'copy')) AND provider = 'openai';

-- and for equal keys of two providers, as some vendors have one key for two of their services.
SELECT keyvault.store_api_key('xai', 'sk-regress-second-of-a', 'twin', 'key_a') IS NOT NULL AS stored;
SELECT keyvault.delete_api_key('xai', 'twin', 'key_a');

-- A hint shows the ends of a key, but of one so short that they would be too much of it.
SELECT count(keyvault.store_api_key('exa', left('exa0123456789abcdef', length), 'of' || length, 'key_h')) FROM unnest('{15,16}'::integer[]) length;
SELECT name, hint FROM keyvault.api_key_status WHERE user_id = 'key_h' ORDER BY 1;

-- Replacing keeps the id, and notes a change of the value only.
CREATE TEMP TABLE before AS SELECT id, ciphertext FROM keyvault.api_keys WHERE user_id = 'key_a' AND provider = 'exa';
SELECT keyvault.store_api_key('exa', 'short-aa', user_id => 'key_a') = id AS same_id FROM before;
SELECT k.ciphertext <> b.ciphertext AS resealed, rotated_at IS NULL AS unchanged FROM keyvault.api_keys k JOIN before b USING (id);
SELECT keyvault.store_api_key('exa', 'short-bb', user_id => 'key_a') = id AS same_id FROM before;
SELECT rotated_at IS NOT NULL AS changed, keyvault.user_api_key('exa', 'key_a') FROM keyvault.api_keys JOIN before USING (id);

-- Malformed keys: KV009, and the message never has the key.
\set VERBOSITY default
SELECT keyvault.store_api_key('openai', 'seven77', user_id => 'key_a');
SELECT keyvault.store_api_key('openai', repeat('x', 513), user_id => 'key_a');
SELECT keyvault.store_api_key('openai', E'sk-with-a-line-break\r\nX-Injected: 1', user_id => 'key_a');
SELECT keyvault.store_api_key('openai', 'sk-with space', user_id => 'key_a');
SELECT keyvault.store_api_key('openai', E'sk-with-a\ttab', user_id => 'key_a');
SELECT keyvault.store_api_key('openai', E'sk-with-\x7f', user_id => 'key_a');
SELECT keyvault.store_api_key('openai', 'sk-with-ümlaut', user_id => 'key_a');
SELECT keyvault.store_api_key('openai', 'sk-ant-another-providers-key', user_id => 'key_a');
BEGIN;
UPDATE keyvault.providers SET key_pattern = '^nobodys-' WHERE provider = 'exa';
SELECT keyvault.store_api_key('exa', 'somebodys-key', user_id => 'key_a');
ROLLBACK;
\set VERBOSITY sqlstate
SELECT keyvault.store_api_key('openai', '', user_id => 'key_a');
\set VERBOSITY terse
SELECT keyvault.store_api_key('openai', NULL, user_id => 'key_a');
SELECT keyvault.store_api_key('openia', 'sk-regress-aaaaaaaaaaaaaaaa', user_id => 'key_a');
SELECT keyvault.store_api_key(NULL, 'sk-regress-aaaaaaaaaaaaaaaa', user_id => 'key_a');
SELECT keyvault.store_api_key('openai', 'sk-regress-aaaaaaaaaaaaaaaa', '', 'key_a');
SELECT keyvault.store_api_key('openai', 'sk-regress-aaaaaaaaaaaaaaaa');
SELECT keyvault.store_api_key('openai', 'sk-regress-aaaaaaaaaaaaaaaa', user_id => '');
SELECT keyvault.store_api_key('openai', 'sk-regress-aaaaaaaaaaaaaaaa', user_id => 'key_a', expires_at => now() - interval '1 second');
SELECT length(keyvault.user_api_key('openai', 'key_a')) AS unchanged;

-- An expired key is not handed out.
SELECT keyvault.store_api_key('mistral', 'regress-expiring-key', user_id => 'key_a', expires_at => now() + interval '1 day') IS NOT NULL AS stored;
SELECT keyvault.user_api_key('mistral', 'key_a');
UPDATE keyvault.api_keys SET expires_at = now() - interval '1 day' WHERE provider = 'mistral';
SELECT keyvault.user_api_key('mistral', 'key_a') IS NULL AS expired, keyvault.user_api_keys('key_a') ? 'mistral' AS listed;

-- Lookups are pure reads.
BEGIN READ ONLY;
SELECT keyvault.user_api_keys('key_b'), keyvault.user_api_key('openai', 'key_b');
COMMIT;

-- The platform's own keys belong to nobody whom one could act as.
SELECT keyvault.store_platform_key('anthropic', 'sk-ant-regress-platform') IS NOT NULL AS stored;
SELECT user_id, provider, source FROM keyvault.api_keys WHERE source = 'platform' AND provider = 'anthropic';
SELECT keyvault.user_api_keys('');

-- A record opens only where it was sealed: not for another user, provider, row or vault, nor altered.
CREATE FUNCTION pg_temp.opens(the_user text, the_provider text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE state text;
BEGIN
    RETURN CASE WHEN keyvault.user_api_key(the_provider, the_user) IS NULL THEN 'missing' ELSE 'opens' END;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE;
    RETURN state;
END $$;
CREATE FUNCTION pg_temp.opens_after(change text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE result text;
BEGIN
    BEGIN
        EXECUTE change;
        result := pg_temp.opens('key_a', 'openai');
        RAISE EXCEPTION USING ERRCODE = 'T0000';
    EXCEPTION WHEN SQLSTATE 'T0000' THEN
    END;
    RETURN result;
END $$;
SELECT pg_temp.opens_after('SELECT 1') AS control;
SELECT pg_temp.opens_after($$UPDATE keyvault.api_keys SET ciphertext = (SELECT ciphertext FROM keyvault.api_keys
    WHERE user_id = 'key_b' AND provider = 'openai' AND name = 'default') WHERE user_id = 'key_a' AND provider = 'openai' AND name = 'default'$$) AS other_user;
SELECT pg_temp.opens_after($$UPDATE keyvault.api_keys SET ciphertext = (SELECT ciphertext FROM keyvault.api_keys
    WHERE user_id = 'key_a' AND provider = 'gemini') WHERE user_id = 'key_a' AND provider = 'openai' AND name = 'default'$$) AS other_provider;
SELECT pg_temp.opens_after($$UPDATE keyvault.api_keys SET ciphertext = (SELECT ciphertext FROM keyvault.api_keys
    WHERE user_id = 'key_a' AND provider = 'openai' AND name = 'copy') WHERE user_id = 'key_a' AND provider = 'openai' AND name = 'default'$$) AS other_name;
SELECT pg_temp.opens_after($$UPDATE keyvault.api_keys SET id = keyvault.uuidv7() WHERE user_id = 'key_a' AND provider = 'openai' AND name = 'default'$$) AS other_id;
SELECT pg_temp.opens_after($$UPDATE keyvault.data_keys a SET wrapped = b.wrapped FROM keyvault.data_keys b WHERE a.user_id = 'key_a' AND b.user_id = 'key_b'$$) AS other_data_key;
SELECT pg_temp.opens_after($$UPDATE keyvault.data_keys SET data_key_id = keyvault.uuidv7() WHERE user_id = 'key_a'$$) AS other_data_key_id;
SELECT pg_temp.opens_after($$UPDATE keyvault.data_keys SET version = 2 WHERE user_id = 'key_a'$$) AS other_version;
SELECT pg_temp.opens_after($$DELETE FROM keyvault.data_keys WHERE user_id = 'key_a'$$) AS no_data_key;
-- every bit of the record and of the wrap counts
SELECT pg_temp.opens_after(format($$UPDATE keyvault.api_keys SET ciphertext = set_bit(ciphertext, %s, 1 - get_bit(ciphertext, %1$s))
    WHERE user_id = 'key_a' AND provider = 'openai' AND name = 'default'$$, bit)) AS outcome, count(*)
  FROM generate_series(0, (84 + 27 + 16) * 8 - 1) bit GROUP BY 1;
SELECT pg_temp.opens_after(format($$UPDATE keyvault.data_keys SET wrapped = set_bit(wrapped, %s, 1 - get_bit(wrapped, %1$s))
    WHERE user_id = 'key_a'$$, bit)) AS outcome, count(*)
  FROM generate_series(0, 84 * 8 - 1) bit GROUP BY 1 ORDER BY 1;
SELECT pg_temp.opens_after($$UPDATE keyvault.api_keys SET ciphertext = substr(ciphertext, 1, octet_length(ciphertext) - 1) WHERE user_id = 'key_a'$$) AS shortened;
SELECT pg_temp.opens_after($$UPDATE keyvault.api_keys SET ciphertext = ciphertext || '\x00' WHERE user_id = 'key_a'$$) AS lengthened;
SELECT pg_temp.opens_after($$UPDATE keyvault.data_keys SET wrapped = substr(wrapped, 1, 40) WHERE user_id = 'key_a'$$) AS short_wrap;

-- One key that cannot be opened does not hide the others.
BEGIN;
UPDATE keyvault.api_keys SET ciphertext = set_byte(ciphertext, 90, 255 - get_byte(ciphertext, 90)) WHERE user_id = 'key_a' AND provider = 'gemini';
SELECT keyvault.user_api_keys('key_a');
ROLLBACK;

-- All keys of a user are found by the hash of his id, which another user's may have, too.
SELECT hashtext('user_87903') = hashtext('user_104901') AS one_hash;
SELECT keyvault.store_api_key('openai', 'sk-regress-87903', user_id => 'user_87903') IS NOT NULL AS stored;
SELECT keyvault.user_api_keys('user_104901');
SELECT keyvault.store_api_key('openai', 'sk-regress-104901', user_id => 'user_104901') IS NOT NULL AS stored;
SELECT keyvault.user_api_keys('user_87903'), keyvault.user_api_keys('user_104901');
-- One key is found by the hash of its user, provider and name: here two at a time have the same.
BEGIN;
INSERT INTO keyvault.providers (provider, base_url) SELECT 'provider-' || i, 'https://hash.example' FROM unnest('{5460,94905}'::int[]) i;
CREATE TEMPORARY TABLE names ON COMMIT DROP AS
    SELECT * FROM (VALUES ('user_14855', 'openai', 'default', 1), ('user_105288', 'openai', 'default', 2),
                          ('key_many', 'provider-5460', 'default', 1), ('key_many', 'provider-94905', 'default', 2),
                          ('key_many', 'openai', 'name_27584', 1), ('key_many', 'openai', 'name_45307', 2)) n (user_id, provider, name, turn);
SELECT count(*), count(DISTINCT hashint8(hashtextextended(user_id COLLATE "C", hashtextextended(provider COLLATE "C", hashtextextended(name COLLATE "C", 0)))))
  FROM names;
SELECT count(keyvault.store_api_key(provider, 'sk-regress-first-' || provider, name, user_id)) FROM names WHERE turn = 1;
SELECT user_id, provider, name, keyvault.user_api_key(provider, user_id, name) FROM names ORDER BY user_id, provider, turn;
SELECT count(keyvault.store_api_key(provider, 'sk-regress-second-' || provider, name, user_id)) FROM names WHERE turn = 2;
SELECT user_id, provider, name, keyvault.user_api_key(provider, user_id, name) FROM names ORDER BY user_id, provider, turn;
ROLLBACK;

-- Deleting.
SELECT keyvault.delete_api_key('openai', user_id => 'key_a'), keyvault.delete_api_key('openai', user_id => 'key_a');
SELECT keyvault.delete_api_key('openia', user_id => 'key_a');
SELECT keyvault.user_api_keys('key_a');

-- A rolled back first key leaves no vault id behind in the session.
DROP EXTENSION keyvault;
CREATE EXTENSION keyvault;
BEGIN;
SELECT keyvault.store_api_key('openai', 'sk-regress-rolled-back', user_id => 'key_c') IS NOT NULL AS stored;
SELECT keyvault.user_api_key('openai', 'key_c');
ROLLBACK;
SELECT keyvault.store_api_key('openai', 'sk-regress-afterwards', user_id => 'key_c') IS NOT NULL AS stored;
SELECT keyvault.user_api_key('openai', 'key_c');

-- Errors that name no value are shown, though the statement holds a key.
BEGIN;
SELECT 1 / 0;
SELECT keyvault.store_api_key('exa', 'regress-key-of-an-aborted-one', user_id => 'aborted');
ROLLBACK;
-- A read-only transaction cannot make the sealing key, and says what to do.
\set VERBOSITY default
SELECT keyvault.retire_sealing_keys() >= 0 AS retired;
BEGIN READ ONLY;
SELECT keyvault.sealing_key();
ROLLBACK;
SELECT keyvault.sealing_key() IS NOT NULL AS made;
BEGIN READ ONLY;
SELECT keyvault.sealing_key() IS NOT NULL AS found;
ROLLBACK;
-- A suspended user's key is not tested, and the hint says how to go on.
SELECT keyvault.store_api_key('exa', 'regress-key-of-a-suspended-one', user_id => 'test_suspended') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('openai', 'sk-regress-key-of-a-suspended-one', user_id => 'test_suspended') IS NOT NULL AS stored;
SELECT keyvault.suspend_user('test_suspended', 'unpaid');
SELECT keyvault.test_api_key('openai', user_id => 'test_suspended');
\set VERBOSITY terse

-- A name is not encrypted: what has the shape of a key is none.
SELECT keyvault.store_api_key('exa', 'default-key', 'sk-ant-regress-key-as-a-name-0123', 'swapped');
SELECT keyvault.store_platform_key('exa', 'default-key', 'sk-ant-regress-key-as-a-name-0123');
SELECT count(*) FROM keyvault.api_keys WHERE name ~ 'regress';
-- An unknown provider of a batch is told by its place, and not quoted.
\set VERBOSITY default
SELECT * FROM keyvault.store_api_keys('{"exa": "regress-batch-key", "sk-ant-regress-key-0123456789": "openai"}', 'swapped');
SELECT * FROM keyvault.store_api_keys('{"openay": "sk-regress-batch-key", "anthropic": "sk-ant-regress-batch-key"}', 'swapped');
\set VERBOSITY terse
-- What is stored without an end has none.
SELECT keyvault.store_api_key('exa', 'regress-key-with-an-end', user_id => 'ends', expires_at => now() + interval '1 day') IS NOT NULL AS stored;
SELECT provider FROM keyvault.store_api_keys('{"exa": "regress-key-with-an-end"}', 'ends');
SELECT expires_at FROM keyvault.api_keys WHERE user_id = 'ends';
SELECT provider FROM keyvault.store_api_keys('{"exa": "regress-key-with-an-end", "cohere": "regress-key-with-an-end"}', 'ends', '2999-01-01 00:00+00');
SELECT count(*) FROM keyvault.api_keys WHERE user_id = 'ends' AND expires_at = '2999-01-01 00:00+00';
SELECT provider FROM keyvault.store_api_keys('{"exa": "regress-key-with-an-end"}', 'ends', now());
SELECT keyvault.store_sealed_api_key('exa', sha256('') || sha256('') || sha256('') || sha256(''), user_id => 'ends', expires_at => now());
