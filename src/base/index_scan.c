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
#include "base/pg_version.h"
#include "catalog/pg_am.h"
#include "catalog/pg_type.h"
#include "utils/fmgroids.h"
#include "utils/snapmgr.h"

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
		case INT8OID:
			return F_INT8EQ;
		default:
			return F_TEXTEQ;
	}
}

/* The index if there is one, else another: a database whose SQL is of an earlier version may lack it. */
KvIndex *
kv_index_or(KvIndex *index, KvIndex *other)
{
	return OidIsValid(kv_relation_find(&index->index)) ? index : other;
}

/* Begin a scan for rows whose leading index columns equal keys, under the active snapshot. Locks stay until the transaction ends. */
void
kv_index_scan_begin(KvIndexScan *scan, KvIndex *index, const Datum *keys)
{
	ScanKeyData conditions[KV_INDEX_SCAN_MAX_KEYS];
	StrategyNumber equal;

	scan->table = table_open(kv_relation_oid(&index->table), index->lockmode ? index->lockmode : AccessShareLock);
	scan->index = index_open(kv_relation_oid(&index->index), AccessShareLock);
	equal = scan->index->rd_rel->relam == HASH_AM_OID ? HTEqualStrategyNumber : BTEqualStrategyNumber;
	for (int i = 0; i < index->nkeys; i++)
		ScanKeyEntryInitialize(&conditions[i], 0, i + 1, equal, InvalidOid,
							   scan->index->rd_indcollation[i],
							   equality_of(index->keytypes[i]), keys[i]);
	scan->slot = table_slot_create(scan->table, NULL);
	scan->descriptor = KvIndexBeginScan(scan->table, scan->index, GetActiveSnapshot(), index->nkeys);
	index_rescan(scan->descriptor, conditions, index->nkeys, NULL, 0);
}

/* Whether the current row's columns equal the keys. A hash index knows their hashes only; an expression is the caller's to compare. */
static bool
is_match(KvIndexScan *scan)
{
	for (int i = 0; i < scan->descriptor->numberOfKeys; i++)
	{
		ScanKey		key = &scan->descriptor->keyData[i];
		AttrNumber	attribute = scan->index->rd_index->indkey.values[i];
		bool		isnull;
		Datum		value;

		if (attribute == InvalidAttrNumber)
			continue;
		value = slot_getattr(scan->slot, attribute, &isnull);
		if (isnull || !DatumGetBool(FunctionCall2Coll(&key->sk_func, key->sk_collation, value, key->sk_argument)))
			return false;
	}
	return true;
}

/* Step to the next row; false when there is none. By a hash of an expression, rows with others of the same hash come, too. */
bool
kv_index_scan_next(KvIndexScan *scan, ScanDirection direction)
{
	while (index_getnext_slot(scan->descriptor, direction, scan->slot))
		if (!scan->descriptor->xs_recheck || is_match(scan))
			return true;
	return false;
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
