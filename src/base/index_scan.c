/*-------------------------------------------------------------------------
 * index_scan.c
 *		Rows of keyvault's tables by an index, without SQL.
 *
 * What a lookup costs is mostly the executor: this is the way of the hot reads.
 * Privileges and row-level security do not apply here: the caller has decided.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/index_scan.h"

#include "access/nbtree.h"
#include "access/table.h"
#include "access/tableam.h"
#include "base/error.h"
#include "base/pg_version.h"
#include "catalog/namespace.h"
#include "catalog/pg_type.h"
#include "utils/fmgroids.h"
#include "utils/inval.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

/* How often this process has heard of a change that may give a name another oid; beyond 0, which no KvIndex knows. */
static uint64 catalogue_changes = 1;

static Oid
relation_in_schema(const char *name, Oid schema)
{
	Oid			relation = OidIsValid(schema) ? get_relname_relid(name, schema) : InvalidOid;

	if (!OidIsValid(relation))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("keyvault.%s does not exist", name),
				 errhint("Run CREATE EXTENSION keyvault CASCADE.")));
	return relation;
}

static RegProcedure
equality_of(Oid type)
{
	switch (type)
	{
		case UUIDOID:
			return F_UUID_EQ;
		case BYTEAOID:
			return F_BYTEAEQ;
		case INT2OID:
			return F_INT2EQ;
		default:
			return F_TEXTEQ;
	}
}

static void
relation_changed(Datum arg, Oid relation)
{
	catalogue_changes++;
}

static void
schema_changed(Datum arg, int cache, uint32 hash)
{
	catalogue_changes++;
}

/* Follow changes of the catalogue; called once, while the server preloads the library. */
void
kv_index_scan_init(void)
{
	CacheRegisterRelcacheCallback(relation_changed, (Datum) 0);
	CacheRegisterSyscacheCallback(NAMESPACEOID, schema_changed, (Datum) 0);
}

/* Find an index and its table by their names, if they may be others than before. */
static void
know_index(KvIndex *index)
{
	uint64		now = catalogue_changes;
	Oid			schema;

	if (index->known_at == now)
		return;
	schema = get_namespace_oid("keyvault", true);
	index->table_oid = relation_in_schema(index->table, schema);
	index->oid = relation_in_schema(index->name, schema);
	index->known_at = now;
}

/* Begin a scan for rows whose leading index columns equal keys, under the active snapshot. Locks stay until the transaction ends. */
void
kv_index_scan_begin(KvIndexScan *scan, KvIndex *index, const Datum *keys)
{
	ScanKeyData conditions[KV_INDEX_SCAN_MAX_KEYS];

	know_index(index);
	scan->table = table_open(index->table_oid, index->lockmode ? index->lockmode : AccessShareLock);
	scan->index = index_open(index->oid, AccessShareLock);
	for (int i = 0; i < index->nkeys; i++)
		ScanKeyEntryInitialize(&conditions[i], 0, i + 1, BTEqualStrategyNumber, InvalidOid,
							   scan->index->rd_indcollation[i],
							   equality_of(index->keytypes[i]), keys[i]);
	scan->slot = table_slot_create(scan->table, NULL);
	scan->descriptor = KvIndexBeginScan(scan->table, scan->index, GetActiveSnapshot(), index->nkeys);
	index_rescan(scan->descriptor, conditions, index->nkeys, NULL, 0);
}

/* Step to the next row; false when there is none. */
bool
kv_index_scan_next(KvIndexScan *scan, ScanDirection direction)
{
	return index_getnext_slot(scan->descriptor, direction, scan->slot);
}

/* A column of the current row, valid until the next step. */
Datum
kv_index_scan_value(KvIndexScan *scan, int attribute, bool *isnull)
{
	return slot_getattr(scan->slot, attribute, isnull);
}

/* End the scan. An error ends it by itself. */
void
kv_index_scan_end(KvIndexScan *scan)
{
	index_endscan(scan->descriptor);
	ExecDropSingleTupleTableSlot(scan->slot);
	index_close(scan->index, NoLock);
	table_close(scan->table, NoLock);
}
