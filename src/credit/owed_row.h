/*-------------------------------------------------------------------------
 * owed_row.h
 *		Which usage records a debit is for.
 *-------------------------------------------------------------------------
 */
#ifndef KV_OWED_ROW_H
#define KV_OWED_ROW_H

#include "postgres.h"

#include "storage/itemptr.h"

extern void kv_owed_row_add(Oid relation, const ItemPointerData *tid, const char *user_id, Size length);
extern void kv_owed_row_flush_begin(int nest_level);
extern void kv_owed_row_flush_end(int nest_level);
extern void kv_owed_row_reparent(int nest_level);
extern void kv_owed_row_forget(int nest_level);

#endif
