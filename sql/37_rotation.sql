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
