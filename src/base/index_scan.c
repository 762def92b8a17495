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
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"

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

/*
 * Begin a scan for rows whose leading index columns equal keys, each of type text,
 * uuid, bytea or int2, under the active snapshot.
 */
void
kv_index_scan_begin(KvIndexScan *scan, const char *table, const char *index,
					int nkeys, const Datum *keys, const Oid *keytypes)
{
	Oid			schema = get_namespace_oid("keyvault", true);
	ScanKeyData conditions[KV_INDEX_SCAN_MAX_KEYS];

	Assert(nkeys <= KV_INDEX_SCAN_MAX_KEYS);
	scan->table = table_open(relation_in_schema(table, schema), AccessShareLock);
	scan->index = index_open(relation_in_schema(index, schema), AccessShareLock);
	for (int i = 0; i < nkeys; i++)
		ScanKeyEntryInitialize(&conditions[i], 0, i + 1, BTEqualStrategyNumber, InvalidOid,
							   scan->index->rd_indcollation[i],
							   equality_of(keytypes[i]), keys[i]);
	scan->slot = table_slot_create(scan->table, NULL);
	scan->descriptor = KvIndexBeginScan(scan->table, scan->index, GetActiveSnapshot(), nkeys);
	index_rescan(scan->descriptor, conditions, nkeys, NULL, 0);
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
	index_close(scan->index, AccessShareLock);
	table_close(scan->table, AccessShareLock);
}
