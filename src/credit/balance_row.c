/*-------------------------------------------------------------------------
 * balance_row.c
 *		A row of keyvault.credit_balances, read and written without SQL.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/balance_row.h"

#include "access/transam.h"
#include "access/xact.h"
#include "base/error.h"
#include "base/pg_version.h"
#include "credit/amount.h"
#include "executor/executor.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* A column that is never NULL. */
Datum
kv_balance_row_value(TupleTableSlot *row, int attribute)
{
	bool		isnull;

	return slot_getattr(row, attribute, &isnull);
}

/* An amount of the row; NULL where the column is. */
Numeric
kv_balance_row_amount(TupleTableSlot *row, int attribute)
{
	bool		isnull;
	Datum		value = slot_getattr(row, attribute, &isnull);

	return isnull ? NULL : DatumGetNumeric(value);
}

/* Whether something has to be done before the row is right: its period has ended, or a grant expired. */
bool
kv_balance_row_is_due(TupleTableSlot *row)
{
	return DatumGetTimestampTz(kv_balance_row_value(row, BALANCE_DUE_AT)) <= GetCurrentTransactionStartTimestamp();
}

/* Whether this transaction has changed the row. */
bool
kv_balance_row_is_changed_by_me(TupleTableSlot *row)
{
	return TTS_IS_BUFFERTUPLE(row) &&
		TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(((BufferHeapTupleTableSlot *) row)->base.tuple->t_data));
}

/* Whether somebody else is changing the row, as far as can be seen without waiting. */
bool
kv_balance_row_is_being_changed(TupleTableSlot *row)
{
	HeapTupleHeader header;

	if (!TTS_IS_BUFFERTUPLE(row))
		return false;
	header = ((BufferHeapTupleTableSlot *) row)->base.tuple->t_data;
	return (header->t_infomask & HEAP_XMAX_INVALID) == 0 &&
		!TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetUpdateXid(header));
}

/* A copy of the row to change and to write, good as long as the row is. */
TupleTableSlot *
kv_balance_row_copy(Relation balances, TupleTableSlot *row)
{
	TupleTableSlot *copy = table_slot_create(balances, NULL);
	int			natts = RelationGetDescr(balances)->natts;

	slot_getallattrs(row);
	memcpy(copy->tts_values, row->tts_values, natts * sizeof(Datum));
	memcpy(copy->tts_isnull, row->tts_isnull, natts * sizeof(bool));
	ExecStoreVirtualTuple(copy);
	return copy;
}

/* Change a column of a copy, by a value that is not NULL. */
void
kv_balance_row_set(TupleTableSlot *copy, int attribute, Datum value)
{
	copy->tts_values[attribute - 1] = value;
	copy->tts_isnull[attribute - 1] = false;
}

/* Change an amount of a copy; NULL for none. */
void
kv_balance_row_set_amount(TupleTableSlot *copy, int attribute, Numeric amount)
{
	copy->tts_values[attribute - 1] = amount == NULL ? (Datum) 0 : kv_amount_stored(amount);
	copy->tts_isnull[attribute - 1] = amount == NULL;
}

/* Enter a row version into every index; needed where there was no room for it on its page. */
static void
index_row(Relation balances, TupleTableSlot *row, KvUpdateIndexes update_indexes)
{
	EState	   *estate = CreateExecutorState();
	ResultRelInfo *relation = makeNode(ResultRelInfo);

	InitResultRelInfo(relation, balances, 0, NULL, 0);
	ExecOpenIndices(relation, false);
	(void) KvExecInsertIndexTuples(relation, row, estate, update_indexes);
	ExecCloseIndices(relation);
	FreeExecutorState(estate);
}

/* Put the copy, which ends, in the row's place. TM_Updated when another transaction was faster. */
TM_Result
kv_balance_row_write(Relation balances, TupleTableSlot *row, TupleTableSlot *copy)
{
	TM_FailureData failure;
	LockTupleMode lock_mode;
	KvUpdateIndexes update_indexes = {0};
	TM_Result	result;

	result = table_tuple_update(balances, &row->tts_tid, copy, GetCurrentCommandId(true), GetActiveSnapshot(),
								InvalidSnapshot, true, &failure, &lock_mode, &update_indexes);
	if (result == TM_Ok && KvMustUpdateIndexes(update_indexes))
		index_row(balances, copy, update_indexes);
	ExecDropSingleTupleTableSlot(copy);
	if (result == TM_Updated && IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("could not serialize access due to concurrent update")));
	return result;
}

/* Wait for whoever changes the row, lock its newest version, and put that into row. False when it is gone. */
bool
kv_balance_row_lock_newest(Relation balances, TupleTableSlot *row)
{
	TM_FailureData failure;
	ItemPointerData tid = row->tts_tid;

	return table_tuple_lock(balances, &tid, GetActiveSnapshot(), row, GetCurrentCommandId(true), LockTupleNoKeyExclusive,
							LockWaitBlock, TUPLE_LOCK_FLAG_FIND_LAST_VERSION, &failure) == TM_Ok;
}
