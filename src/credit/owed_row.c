/*-------------------------------------------------------------------------
 * owed_row.c
 *		Which usage records a debit is for.
 *
 * The row trigger adds credits up per user and nothing else. Budgets need to know more of
 * a row, of which users is not known before their balances have been read; so every row's
 * place is kept until its statement is debited, and only who needs it reads the rows.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/owed_row.h"

#include "access/relation.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "base/error.h"
#include "catalog/pg_collation.h"
#include "common/hashfn.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(keyvault_rows_owed);

typedef struct OwedRow
{
	Oid			relation;
	ItemPointerData tid;
	int			nest_level;		/* the subtransaction that inserted it */
	uint32		user_hash;
} OwedRow;

/* The rows of statements that were not debited yet. The array belongs to the transaction; emptied when it ends. */
static OwedRow *rows = NULL;
static int	n_rows = 0;
static int	n_allocated = 0;

/* The subtransaction whose debits are under way; 0: none. Reset when the transaction ends. */
static int	flushing = 0;

static uint32
hash_user(const char *user_id, Size length)
{
	return hash_bytes((const unsigned char *) user_id, length);
}

/* Note a row that the current subtransaction inserted. */
void
kv_owed_row_add(Oid relation, const ItemPointerData *tid, const char *user_id, Size length)
{
	OwedRow    *row;

	if (n_rows == n_allocated)
	{
		n_allocated = n_allocated == 0 ? 16 : n_allocated * 2;
		rows = n_rows == 0 ?
			MemoryContextAlloc(TopTransactionContext, n_allocated * sizeof(OwedRow)) :
			repalloc_huge(rows, n_allocated * sizeof(OwedRow));
	}
	row = &rows[n_rows++];
	row->relation = relation;
	row->tid = *tid;
	row->nest_level = GetCurrentTransactionNestLevel();
	row->user_hash = hash_user(user_id, length);
}

/* The debits of a subtransaction begin: its rows are those that keyvault._rows_owed() shows. */
void
kv_owed_row_flush_begin(int nest_level)
{
	flushing = nest_level;
}

/* They are done. */
void
kv_owed_row_flush_end(int nest_level)
{
	kv_owed_row_forget(nest_level);
}

/* Hand the rows of a subtransaction, and of those within it, to its parent. */
void
kv_owed_row_reparent(int nest_level)
{
	for (int i = n_rows - 1; i >= 0 && rows[i].nest_level >= nest_level; i--)
		rows[i].nest_level = nest_level - 1;
}

/* Forget the rows of a subtransaction, and of those within it; 0 at the end of the transaction. */
void
kv_owed_row_forget(int nest_level)
{
	while (n_rows > 0 && rows[n_rows - 1].nest_level >= nest_level)
		n_rows--;
	if (flushing >= nest_level)
		flushing = 0;
	if (nest_level == 0)
	{
		rows = NULL;
		n_allocated = 0;
	}
}

/* Columns of a usage record that _rows_owed() returns; hold_id as whether there is one. */
enum
{
	MODEL,
	ISSUED_KEY_ID,
	MEMBER_ID,
	CREDITS,
	COST_USD,
	CREATED_AT,
	HOLD_ID,
	COLUMNS
};

static const char *const columns[COLUMNS] = {"model", "issued_key_id", "member_id", "credits", "cost_usd", "created_at", "hold_id"};

/* Put a row that belongs to the user into the result. */
static void
show_row(const OwedRow *row, Datum user_id, ReturnSetInfo *result)
{
	Relation	relation = table_open(row->relation, AccessShareLock);
	TupleDesc	descriptor = RelationGetDescr(relation);
	TupleTableSlot *slot = table_slot_create(relation, NULL);
	ItemPointerData tid = row->tid;
	Datum		values[COLUMNS];
	bool		nulls[COLUMNS];
	bool		isnull;

	if (table_tuple_fetch_row_version(relation, &tid, SnapshotSelf, slot) &&
		DatumGetBool(DirectFunctionCall2Coll(texteq, C_COLLATION_OID,
											 slot_getattr(slot, SPI_fnumber(descriptor, "user_id"), &isnull), user_id)))
	{
		for (int i = 0; i < COLUMNS; i++)
			values[i] = slot_getattr(slot, SPI_fnumber(descriptor, columns[i]), &nulls[i]);
		values[HOLD_ID] = BoolGetDatum(!nulls[HOLD_ID]);
		nulls[HOLD_ID] = false;
		tuplestore_putvalues(result->setResult, result->setDesc, values, nulls);
	}
	ExecDropSingleTupleTableSlot(slot);
	table_close(relation, NoLock);
}

Datum
keyvault_rows_owed(PG_FUNCTION_ARGS)
{
	text	   *user_id = PG_GETARG_TEXT_PP(0);
	uint32		hash = hash_user(VARDATA_ANY(user_id), VARSIZE_ANY_EXHDR(user_id));

	InitMaterializedSRF(fcinfo, 0);
	for (int i = n_rows - 1; flushing > 0 && i >= 0 && rows[i].nest_level >= flushing; i--)
		if (rows[i].nest_level == flushing && rows[i].user_hash == hash)
			show_row(&rows[i], PointerGetDatum(user_id), (ReturnSetInfo *) fcinfo->resultinfo);
	PG_RETURN_NULL();
}
