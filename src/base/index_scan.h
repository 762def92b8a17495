/*-------------------------------------------------------------------------
 * index_scan.h
 *		Rows of keyvault's tables by a text index, without SQL.
 *-------------------------------------------------------------------------
 */
#ifndef KV_INDEX_SCAN_H
#define KV_INDEX_SCAN_H

#include "postgres.h"

#include "access/genam.h"
#include "access/skey.h"
#include "executor/tuptable.h"
#include "utils/rel.h"

#define KV_INDEX_SCAN_MAX_KEYS 3

typedef struct KvIndexScan
{
	Relation	table;
	Relation	index;
	IndexScanDesc descriptor;
	TupleTableSlot *slot;
} KvIndexScan;

extern void kv_index_scan_begin(KvIndexScan *scan, const char *table, const char *index,
								int nkeys, const Datum *keys, const Oid *keytypes);
extern bool kv_index_scan_next(KvIndexScan *scan, ScanDirection direction);
extern Datum kv_index_scan_value(KvIndexScan *scan, int attribute, bool *isnull);
extern void kv_index_scan_end(KvIndexScan *scan);

#endif
