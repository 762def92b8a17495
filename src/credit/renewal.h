/*-------------------------------------------------------------------------
 * renewal.h
 *		The next period of a plain balance.
 *-------------------------------------------------------------------------
 */
#ifndef KV_RENEWAL_H
#define KV_RENEWAL_H

#include "postgres.h"

#include "executor/tuptable.h"

extern Datum kv_renewal_begin(TupleTableSlot *row, TupleTableSlot *copy);
extern void kv_renewal_close(TupleTableSlot *row, Datum plan);

#endif
