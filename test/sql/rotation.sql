-- Rotating data keys, suspending and erasing users, and provider keys that are due.
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
RESET client_min_messages;
\set VERBOSITY terse
SELECT count(keyvault.store_api_key(p, 'sk-regress-rotation-of-' || u || '-' || p, n, u)) AS stored
  FROM unnest('{rot_a,rot_b,rot_c}'::text[]) u, unnest('{openai,exa}'::text[]) p, unnest('{default,second}'::text[]) n WHERE n = 'default' OR p = 'exa';
SELECT keyvault.store_platform_key('exa', 'regress-rotation-platform') IS NOT NULL AS stored, keyvault.sealing_key() IS NOT NULL AS sealing_key;
CREATE TEMP TABLE before AS SELECT user_id, id, ciphertext, fingerprint FROM keyvault.api_keys WHERE user_id IN ('rot_a', 'rot_b', 'rot_c', '');
CREATE TEMP TABLE sealing_before AS SELECT id, ciphertext FROM keyvault.sealing_keys;
CREATE FUNCTION pg_temp.versions(users text) RETURNS TABLE (user_id text, versions int[]) LANGUAGE sql AS
    'SELECT user_id, array_agg(version ORDER BY version) FROM keyvault.data_keys WHERE user_id LIKE users GROUP BY 1 ORDER BY 1';

-- One user: every secret is sealed again, ids stay, the old version goes.
SELECT keyvault.rotate_data_key('rot_a'), keyvault.rotate_data_key('rot_a');
SELECT * FROM pg_temp.versions('rot%');
SELECT count(*) AS changed FROM keyvault.api_keys k JOIN before b USING (user_id, id)
 WHERE k.user_id = 'rot_a' AND k.ciphertext <> b.ciphertext AND k.fingerprint <> b.fingerprint;
SELECT keyvault.user_api_keys('rot_a'), keyvault.user_api_key('exa', 'rot_a', 'second');
SELECT keyvault.user_api_keys('rot_b');
-- fingerprints are still compared: the same key again is no rotation of it
SELECT keyvault.store_api_key('openai', 'sk-regress-rotation-of-rot_a-openai', user_id => 'rot_a') IS NOT NULL AS stored;
SELECT rotated_at IS NULL AS not_rotated FROM keyvault.api_keys WHERE user_id = 'rot_a' AND provider = 'openai';
-- a reference is sealed as a key is: it opens for the next rotation
SELECT keyvault.store_api_key_reference('gemini', 'vault:secret/gemini#key', user_id => 'rot_a') IS NOT NULL AS stored;
CREATE TEMP TABLE reference AS SELECT id, ciphertext FROM keyvault.api_keys WHERE user_id = 'rot_a' AND source = 'reference';
SELECT keyvault.rotate_data_key('rot_a'), keyvault.rotate_data_key('rot_a');
SELECT count(*) AS changed FROM keyvault.api_keys k JOIN reference r USING (id) WHERE k.ciphertext <> r.ciphertext;
SELECT * FROM pg_temp.versions('rot_a');
-- nothing to rotate
SELECT keyvault.rotate_data_key('rot_nobody');

-- The platform, whose data key also holds the private keys of sealed boxes.
SELECT keyvault.rotate_data_key('') > 1 AS rotated;
SELECT count(*) FILTER (WHERE s.ciphertext = b.ciphertext) AS same, count(*) > 0 AS some FROM keyvault.sealing_keys s JOIN sealing_before b USING (id);
SELECT array_length(versions, 1) FROM pg_temp.versions('');
SELECT keyvault.sealing_key() = keyvault.sealing_key() AS sealing_key;

-- A secret that does not open is left as it is, and so is what it is under.
UPDATE keyvault.api_keys SET ciphertext = set_byte(ciphertext, 90, 255 - get_byte(ciphertext, 90)) WHERE user_id = 'rot_b' AND provider = 'openai';
\set VERBOSITY sqlstate
SELECT keyvault.rotate_data_key('rot_b');
\set VERBOSITY terse
SELECT * FROM pg_temp.versions('rot_b');
SELECT keyvault.user_api_key('exa', 'rot_b');
UPDATE keyvault.api_keys k SET ciphertext = b.ciphertext FROM before b WHERE k.user_id = 'rot_b' AND b.id = k.id AND k.provider = 'openai';
SELECT keyvault.rotate_data_key('rot_b');
SELECT * FROM pg_temp.versions('rot_b');
SELECT keyvault.user_api_keys('rot_b');

-- All that are old, some at a time.
UPDATE keyvault.data_keys SET created_at = now() + interval '1 day' WHERE user_id NOT LIKE 'rot%';
UPDATE keyvault.data_keys SET created_at = now() - interval '100 days' WHERE user_id LIKE 'rot%';
SELECT keyvault.rotate_data_keys('90 days', 2), keyvault.rotate_data_keys('90 days', 2), keyvault.rotate_data_keys('90 days', 2);
SELECT * FROM pg_temp.versions('rot%');
SELECT keyvault.user_api_key('exa', u) FROM unnest('{rot_a,rot_b,rot_c}'::text[]) u;
-- one that cannot be opened does not keep the others back
BEGIN;
UPDATE keyvault.data_keys SET created_at = now() - interval '100 days' WHERE user_id LIKE 'rot%';
UPDATE keyvault.data_keys SET wrapped = set_byte(wrapped, 50, 255 - get_byte(wrapped, 50)) WHERE user_id = 'rot_a';
SELECT keyvault.rotate_data_keys('90 days');
ROLLBACK;
-- another error ends it all, and leaves the session whole
UPDATE keyvault.data_keys SET wrapped = set_byte(wrapped, 8, 255 - get_byte(wrapped, 8)) WHERE user_id = 'rot_a';
SELECT keyvault.rotate_data_keys('0 s', 10000);
SELECT 'alive' AS session;
UPDATE keyvault.data_keys SET wrapped = set_byte(wrapped, 8, 255 - get_byte(wrapped, 8)) WHERE user_id = 'rot_a';
SELECT keyvault.rotate_data_keys('90 days', 0);
SELECT keyvault.rotate_data_keys('90 days', 10001);
SELECT keyvault.rotate_data_keys('-1 day');
SELECT keyvault.rotate_data_keys(NULL);
SELECT keyvault.rotate_data_keys('0', NULL);
SELECT keyvault.rotate_data_key(NULL);
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT keyvault.rotate_data_key('rot_a');
ROLLBACK;
-- a rotation that is rolled back leaves the old version, and the session with it
BEGIN;
SELECT keyvault.rotate_data_key('rot_c') IS NOT NULL AS rotated;
SELECT keyvault.user_api_key('openai', 'rot_c');
ROLLBACK;
SELECT keyvault.user_api_key('openai', 'rot_c');

-- Who may.
CREATE ROLE regress_rot_user;
CREATE ROLE regress_rot_admin;
SELECT keyvault.grant_access('regress_rot_user', 'user'), keyvault.grant_access('regress_rot_admin', 'admin');
SET ROLE regress_rot_user;
SELECT keyvault.rotate_data_key('rot_a');
SELECT keyvault.suspend_user('rot_a', 'no');
SELECT keyvault.erase_user('rot_a');
SELECT keyvault.rotate_master_key();
SELECT * FROM keyvault.master_key_status;
RESET ROLE;
SET ROLE regress_rot_admin;
SELECT keyvault.rotate_data_key('rot_a') IS NOT NULL AS rotated, keyvault.rotate_data_keys('90 days');
SELECT keyvault.rotate_master_key();
RESET ROLE;

-- Provider keys that are due.
SELECT keyvault.store_api_key('anthropic', 'sk-ant-regress-due-soon-0123', 'default', 'rot_a', now() + interval '10 days 1 hour') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('anthropic', 'sk-ant-regress-due-later-123', 'later', 'rot_a', now() + interval '60 days') IS NOT NULL AS stored;
SELECT keyvault.store_api_key('exa', 'regress-expired-already-0123', 'expired', 'rot_b', now() + interval '1 hour') IS NOT NULL AS stored;
UPDATE keyvault.api_keys SET expires_at = now() - interval '36 hours' WHERE user_id = 'rot_b' AND name = 'expired';
SET ROLE regress_rot_admin;
SELECT provider, name, user_id, days_left, hint, status FROM keyvault.api_keys_due WHERE user_id LIKE 'rot%';
RESET ROLE;
BEGIN;
SELECT keyvault.act_as('rot_a');
SET LOCAL ROLE regress_rot_user;
SELECT provider, name, user_id, days_left FROM keyvault.api_keys_due;
ROLLBACK;

-- Suspended: no request, no new key; lookups, deletions and usage go on.
SET ROLE regress_rot_admin;
SELECT keyvault.suspend_user('rot_a', 'unpaid');
RESET ROLE;
SELECT status, status_reason FROM keyvault.users WHERE user_id = 'rot_a';
\set VERBOSITY sqlstate
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "messages": []}', user_id => 'rot_a');
SELECT keyvault.store_api_key('openai', 'sk-regress-suspended-new-key', user_id => 'rot_a');
\set VERBOSITY terse
SELECT keyvault.store_api_key('openai', 'sk-regress-suspended-new-key', user_id => 'rot_a');
SELECT keyvault.user_api_key('openai', 'rot_a');
SELECT keyvault.delete_api_key('anthropic', user_id => 'rot_a');
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('rot_a', 'chat', 1);
SELECT keyvault.resume_user('rot_a');
SELECT status, status_reason FROM keyvault.users WHERE user_id = 'rot_a';
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "messages": []}', user_id => 'rot_a', metadata => '{"from": "a person"}') IS NOT NULL AS queued;
SELECT keyvault.suspend_user('rot_nobody', 'x');
SELECT keyvault.suspend_user(NULL, 'x');
SELECT keyvault.resume_user('');

-- Erased.
SELECT keyvault.upsert_user('rot_c', 'c@example.com', 'Carol', 'https://example.com/c.png', 'pro');
INSERT INTO keyvault.usage_records (user_id, type, credits, metadata) VALUES ('rot_c', 'chat', 2, '{"prompt": "private"}');
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "messages": [{"role": "user", "content": "private"}]}', user_id => 'rot_c', payer => 'user') IS NOT NULL AS queued;
SELECT keyvault.erase_user('rot_c', 'asked for by the user');
SELECT user_id, email, name, image, plan, status, status_reason, erased_at IS NOT NULL AS erased, stripe_customer_id FROM keyvault.users WHERE user_id = 'rot_c';
SELECT (SELECT count(*) FROM keyvault.data_keys WHERE user_id = 'rot_c') AS data_keys, (SELECT count(*) FROM keyvault.api_keys WHERE user_id = 'rot_c') AS api_keys,
       (SELECT count(*) FROM keyvault.requests WHERE user_id = 'rot_c') AS requests, (SELECT count(*) FROM keyvault.responses WHERE user_id = 'rot_c') AS responses,
       (SELECT count(*) FROM keyvault.credit_holds WHERE user_id = 'rot_c') AS holds;
SELECT credits, metadata FROM keyvault.usage_records WHERE user_id = 'rot_c';
SELECT credits_used, credits_held FROM keyvault.credit_status WHERE user_id = 'rot_c';
SELECT keyvault.user_api_keys('rot_c'), keyvault.user_api_key('openai', 'rot_c');
SELECT keyvault.store_api_key('openai', 'sk-regress-erased-new-key', user_id => 'rot_c');
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "messages": []}', user_id => 'rot_c', payer => 'platform');
SELECT keyvault.upsert_user('rot_c', 'c@example.com');
SELECT keyvault.resume_user('rot_c');
SELECT keyvault.suspend_user('rot_c', 'x');
SELECT e.user_id, e.status_reason, e.master_key_version = m.version AS master_key, e.master_key_retired_at
  FROM keyvault.erasure_status e, keyvault.master_keys m WHERE m.status = 'primary' AND e.user_id = 'rot_c';
-- once more changes nothing, and keeps when it was
SELECT keyvault.erase_user('rot_c');
SELECT master_key_version IS NOT NULL AS kept, status_reason FROM keyvault.erasure_status WHERE user_id = 'rot_c';
-- A snapshot of before would not see what has been stored since.
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT keyvault.erase_user('rot_c');
ROLLBACK;
SELECT keyvault.erase_user('rot_nobody');
-- usage records stay append-only but for that
UPDATE keyvault.usage_records SET credits = 0, metadata = '{}' WHERE user_id = 'rot_a';
UPDATE keyvault.usage_records SET metadata = '{"other": 1}' WHERE user_id = 'rot_a';
DELETE FROM keyvault.usage_records WHERE user_id = 'rot_a';

-- An erased user's sealed boxes, wherever a copy is, open with a sealing key, and that with the platform's data key.
SELECT keyvault.sealing_key() ->> 'format' AS format;
SELECT keyvault.upsert_user('rot_boxed'), keyvault.upsert_user('rot_unboxed');
UPDATE keyvault.users SET boxed = true WHERE user_id = 'rot_boxed';
SELECT keyvault.erase_user('rot_boxed'), keyvault.erase_user('rot_unboxed');
SELECT master_key_version, boxes_destroyed_at >= erased_at AS none_ever FROM keyvault.erasure_status WHERE user_id = 'rot_unboxed';
SELECT e.master_key_version = m.version AS master_key, e.master_key_retired_at, e.boxes_destroyed_at
  FROM keyvault.erasure_status e, keyvault.master_keys m WHERE m.status = 'primary' AND e.user_id = 'rot_boxed';
SELECT keyvault.rotate_data_key('') > 0 AS rotated;
SELECT boxes_destroyed_at IS NULL AS sealing_key_is_left FROM keyvault.erasure_status WHERE user_id = 'rot_boxed';
SET ROLE regress_rot_user;
SELECT keyvault.retire_sealing_keys();
SET ROLE regress_rot_admin;
SELECT keyvault.retire_sealing_keys() > 0 AS deleted;
RESET ROLE;
SELECT boxes_destroyed_at IS NULL AS data_key_is_left FROM keyvault.erasure_status WHERE user_id = 'rot_boxed';
SELECT keyvault.rotate_data_key('') > 0 AS rotated;
SELECT e.boxes_destroyed_at IS NOT NULL AS destroyed, e.master_key_version = m.version AS master_key, e.master_key_retired_at
  FROM keyvault.erasure_status e, keyvault.master_keys m WHERE m.status = 'primary' AND e.user_id = 'rot_boxed';
-- Maintenance deletes retired ones; one that a stored box needs, or a call in the queue, stays.
SELECT keyvault.sealing_key() ->> 'format' AS format;
UPDATE keyvault.sealing_keys SET retired_at = now();
SELECT keyvault.request('exa', '{}', user_id => 'rot_a', api_key => 'regress-key-for-one-call') IS NOT NULL AS queued;
UPDATE keyvault.requests SET call_key = 'B'::bytea || '\x01' || (SELECT key_id FROM keyvault.sealing_keys) WHERE user_id = 'rot_a' AND call_key IS NOT NULL;
SELECT count(*) AS jobs FROM keyvault.run_maintenance('purge');
SELECT count(*) AS needed FROM keyvault.sealing_keys;
SELECT keyvault.cancel_request(id) FROM keyvault.requests WHERE user_id = 'rot_a' AND call_key IS NOT NULL;
INSERT INTO keyvault.api_keys (user_id, id, provider, name, ciphertext, hint)
SELECT 'rot_a', keyvault.uuidv7(), 'exa', 'box', '\x01' || key_id || sha256('x') || sha256('y') || sha256('z') || sha256('z'), '' FROM keyvault.sealing_keys;
SELECT count(*) AS jobs FROM keyvault.run_maintenance('purge');
SELECT count(*) AS needed FROM keyvault.sealing_keys;
DELETE FROM keyvault.api_keys WHERE user_id = 'rot_a' AND name = 'box';
-- with an old snapshot nobody knows who needs them
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT count(*) AS jobs FROM keyvault.run_maintenance('purge');
COMMIT;
SELECT count(*) AS kept FROM keyvault.sealing_keys;
SELECT count(*) AS jobs FROM keyvault.run_maintenance('purge');
SELECT count(*) AS left FROM keyvault.sealing_keys;

SELECT keyvault.revoke_access('regress_rot_user', 'user'), keyvault.revoke_access('regress_rot_admin', 'admin');
DROP ROLE regress_rot_user, regress_rot_admin;
