/*-------------------------------------------------------------------------
 * restored_usage.h
 *		Counts usage records that were written by another transaction than the one that brings them.
 *-------------------------------------------------------------------------
 */
#ifndef KV_RESTORED_USAGE_H
#define KV_RESTORED_USAGE_H

#include "postgres.h"

#include "access/htup.h"
#include "utils/rel.h"

extern void kv_restored_usage_init(void);
extern void kv_restored_usage_add(Relation relation, HeapTuple row);
extern void kv_restored_usage_flush(void);

#endif
