/*-------------------------------------------------------------------------
 * balance_row.h
 *		A row of keyvault.credit_balances, read and written without SQL.
 *-------------------------------------------------------------------------
 */
#ifndef KV_BALANCE_ROW_H
#define KV_BALANCE_ROW_H

#include "postgres.h"

#include "access/tableam.h"
#include "datatype/timestamp.h"
#include "executor/tuptable.h"
#include "utils/numeric.h"
#include "utils/rel.h"

/* Its columns. */
enum
{
	BALANCE_USER_ID = 1,
	BALANCE_SLOT,
	BALANCE_MONTHLY_CREDITS,
	BALANCE_EXTRA_CREDITS,
	BALANCE_CREDITS_USED,
	BALANCE_CREDITS_HELD,
	BALANCE_PERIOD_ANCHOR,
	BALANCE_PERIOD_START,
	BALANCE_PERIOD_END,
	BALANCE_DUE_AT,
	BALANCE_NOTICE_AT,
	BALANCE_CREDITS_LENT,
	BALANCE_CREDITS_COVERED,
	BALANCE_EXTRA_SPENT,
	BALANCE_CREDITS_OVERAGE,
};

extern Datum kv_balance_row_value(TupleTableSlot *row, int attribute);
extern Numeric kv_balance_row_amount(TupleTableSlot *row, int attribute);
extern bool kv_balance_row_is_due(TupleTableSlot *row);
extern bool kv_balance_row_is_changed_by_me(TupleTableSlot *row);
extern bool kv_balance_row_is_being_changed(TupleTableSlot *row);
extern TupleTableSlot *kv_balance_row_copy(Relation balances, TupleTableSlot *row);
extern void kv_balance_row_set(TupleTableSlot *copy, int attribute, Datum value);
extern void kv_balance_row_set_amount(TupleTableSlot *copy, int attribute, Numeric amount);
extern TM_Result kv_balance_row_write(Relation balances, TupleTableSlot *row, TupleTableSlot *copy);
extern bool kv_balance_row_lock_newest(Relation balances, TupleTableSlot *row);

#endif
