-- Other keys in the place of old ones, and what is due for it.

CREATE VIEW keyvault.master_key_status WITH (security_invoker = true, security_barrier = true) AS
SELECT m.version, encode(m.kek_id, 'hex') AS kek_id, m.status,
       (SELECT count(*) FROM keyvault.data_keys d WHERE substr(d.wrapped, 9, 16) = m.kek_id) AS data_keys,
       m.created_at, m.retired_at
  FROM keyvault.master_keys m;
COMMENT ON VIEW keyvault.master_key_status IS
    'Each master key that this vault has known: its id, its status, and how many data keys it wraps, which is a rotation''s progress. For superusers.';

CREATE FUNCTION keyvault.rotate_master_key() RETURNS bigint
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_rotate_master_key';
COMMENT ON FUNCTION keyvault.rotate_master_key() IS
    'Makes the first of the loaded master keys the one that wraps, wraps every data key of another again, and retires those that wrap nothing any more; returns how many data keys were wrapped. In one transaction, which waits for, and then keeps back, those who store a first key of a user: for large vaults CALL keyvault.rotate_master_key(batch). A superuser calls it. Errors: KV004 a master key is not loaded, 55000 the first one was retired, 25000 isolation level, 42501 keyvault.reveal is off.';

CREATE PROCEDURE keyvault.rotate_master_key(batch integer)
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_rotate_master_key_in_batches';
COMMENT ON PROCEDURE keyvault.rotate_master_key(integer) IS
    'As rotate_master_key(), with a transaction for each batch of 1 to 100000 data keys, NULL for 1000: nobody is kept waiting, and after an interruption another call goes on. Waits once for the transactions that are storing first keys. Not inside a transaction block (2D000). A superuser calls it. Errors: those of rotate_master_key(), 22023.';

CREATE FUNCTION keyvault.rotate_data_key(user_id text) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_rotate_data_key';
COMMENT ON FUNCTION keyvault.rotate_data_key(text) IS
    'Seals a user''s secrets again, under a new version of the data key, and deletes the version before; returns the new version, NULL for a user without a data key. The user '''' is the platform. A secret that does not open is left as it is, with a warning, and its data key with it. Access admin, or the right to act for any user. Errors: KV004, KV005 the data key cannot be opened, 25000 isolation level, 42501.';

CREATE FUNCTION keyvault.rotate_data_keys(older_than interval, batch integer = 100) RETURNS integer
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_rotate_data_keys';
COMMENT ON FUNCTION keyvault.rotate_data_keys(interval, integer) IS
    'rotate_data_key for up to batch users, 1 to 10000, whose data key is older than older_than, the oldest first; returns how many, 0 when all is done. A user whose data key cannot be opened is passed over with a warning KV005. Access admin, or the right to act for any user. Errors: KV004, 22023, 25000, 42501.';

CREATE VIEW keyvault.api_keys_due WITH (security_invoker = true, security_barrier = true) AS
SELECT k.provider, k.name, k.user_id, k.expires_at,
       floor(extract(epoch FROM k.expires_at - now()) / 86400)::integer AS days_left, k.hint, k.status
  FROM keyvault.api_keys k
 WHERE k.expires_at < now() + interval '30 days'
 ORDER BY k.expires_at;
COMMENT ON VIEW keyvault.api_keys_due IS
    'The acting user''s provider keys that have to be replaced: they expire within 30 days, or have. days_left is negative for those. Access admin sees every user''s.';

CREATE VIEW keyvault.erasure_status WITH (security_invoker = true, security_barrier = true) AS
SELECT u.user_id, u.erased_at, u.status_reason, u.erased_master_key AS master_key_version,
       CASE WHEN u.erased_master_key IS NOT NULL
            THEN (SELECT m.retired_at FROM keyvault.master_keys m WHERE m.version = u.erased_master_key) END AS master_key_retired_at
  FROM keyvault.users u WHERE u.status = 'erased';
COMMENT ON VIEW keyvault.erasure_status IS
    'Erased users. Copies of their keys in backups and WAL from before erased_at open with the master key of master_key_version, or an earlier one: destroy every copy of those keys, once master_key_retired_at is set, and nothing opens them anywhere. For superusers.';
