/*-------------------------------------------------------------------------
 * vault_id.c
 *		The vault's own name: one row, made with the first data key, so that a
 *		restored dump brings its own.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/vault_id.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "base/catalogue.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/uuid.h"
#include "catalog/pg_type.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

/* Column of keyvault.vault. */
#define VAULT_VAULT_ID	1

/* The id as last read from the table with this OID, committed; the row never changes. */
static Oid	cached_table = InvalidOid;
static pg_uuid_t cached_id;

/* Read the vault's id. Error: KV005 when it is missing though secrets exist. */
void
kv_vault_id_get(pg_uuid_t *vault_id)
{
	static KvRelation vault = {"vault"};
	Oid			table_oid = kv_relation_oid(&vault);
	Relation	table;
	TableScanDesc scan;
	TupleTableSlot *slot;
	bool		isnull;

	if (cached_table == table_oid)
	{
		*vault_id = cached_id;
		return;
	}
	table = table_open(table_oid, AccessShareLock);
	slot = table_slot_create(table, NULL);
	scan = table_beginscan(table, GetActiveSnapshot(), 0, NULL);
	if (!table_scan_getnextslot(scan, ForwardScanDirection, slot))
		ereport(ERROR,
				(errcode(ERRCODE_KV_SECRET_UNREADABLE),
				 errmsg("the vault has lost its id"),
				 errhint("Restore keyvault.vault from the backup that the keys came from.")));
	*vault_id = *DatumGetUUIDP(slot_getattr(slot, VAULT_VAULT_ID, &isnull));
	/* An id of our own transaction may yet be rolled back. */
	if (!TransactionIdIsCurrentTransactionId(DatumGetTransactionId(slot_getsysattr(slot, MinTransactionIdAttributeNumber, &isnull))))
	{
		cached_table = table_oid;
		cached_id = *vault_id;
	}
	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	table_close(table, AccessShareLock);
}

/* Read the vault's id, made if there is none yet. Call between kv_owner_begin and kv_owner_end. */
void
kv_vault_id_ensure(pg_uuid_t *vault_id)
{
	static KvStatement insert = {
		"INSERT INTO keyvault.vault (vault_id) SELECT $1 WHERE NOT EXISTS (SELECT FROM keyvault.vault)"
		" ON CONFLICT DO NOTHING", 1, {UUIDOID}
	};
	Datum		value = UUIDPGetDatum(kv_uuid_make());

	kv_statement_execute(&insert, &value, NULL);
	kv_owner_fresh_snapshot_begin();
	kv_vault_id_get(vault_id);
	kv_owner_fresh_snapshot_end();
}
