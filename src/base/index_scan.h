/*-------------------------------------------------------------------------
 * index_scan.h
 *		Rows of keyvault's tables by an index, without SQL.
 *-------------------------------------------------------------------------
 */
#ifndef KV_INDEX_SCAN_H
#define KV_INDEX_SCAN_H

#include "postgres.h"

#include "access/genam.h"
#include "access/skey.h"
#include "base/catalogue.h"
#include "executor/tuptable.h"
#include "utils/rel.h"

#define KV_INDEX_SCAN_MAX_KEYS 3

/* An index and its leading columns, by which rows are looked up. Declare it static. */
typedef struct KvIndex
{
	KvRelation	table;
	KvRelation	index;
	int			nkeys;
	Oid			keytypes[KV_INDEX_SCAN_MAX_KEYS];	/* text, uuid, bytea, int2 or int8 */
	LOCKMODE	lockmode;		/* of the table; 0: AccessShareLock */
} KvIndex;

typedef struct KvIndexScan
{
	Relation	table;
	Relation	index;
	IndexScanDesc descriptor;
	TupleTableSlot *slot;
} KvIndexScan;

extern KvIndex *kv_index_or(KvIndex *index, KvIndex *other);
extern void kv_index_scan_begin(KvIndexScan *scan, KvIndex *index, const Datum *keys);
extern bool kv_index_scan_next(KvIndexScan *scan, ScanDirection direction);
extern Datum kv_index_scan_value(KvIndexScan *scan, int attribute, bool *isnull);
extern void kv_index_scan_end(KvIndexScan *scan);

#endif
