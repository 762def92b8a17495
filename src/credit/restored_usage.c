/*-------------------------------------------------------------------------
 * restored_usage.c
 *		Counts usage records that were written by another transaction than the one that
 *		brings them: restored, copied or replicated ones.
 *
 * The roll-up finds rows by their debit_tag, which says nothing about when such a row
 * came. They are added up here, many at a time, and stored in keyvault.usage_late by the
 * transaction that brings them. Rows that wait belong to one subtransaction: they are
 * forgotten when it rolls back, and stored by its statement's end or the commit.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/restored_usage.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "credit/usage_tag.h"
#include "fmgr.h"
#include "replication/logicalworker.h"
#include "utils/array.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(keyvault_keep_own_rollup);

/* Rows that wait at most, some hundred bytes each. */
#define BATCH 32768

/* What keyvault._count_restored takes, each as an array. */
static const struct
{
	const char *name;
	Oid			type;
	Oid			array_type;
}			columns[] =
{
	{"user_id", TEXTOID, TEXTARRAYOID},
	{"created_at", TIMESTAMPTZOID, TIMESTAMPTZARRAYOID},
	{"provider", TEXTOID, TEXTARRAYOID},
	{"model", TEXTOID, TEXTARRAYOID},
	{"type", TEXTOID, TEXTARRAYOID},
	{"payer", TEXTOID, TEXTARRAYOID},
	{"input_tokens", INT8OID, INT8ARRAYOID},
	{"cached_tokens", INT8OID, INT8ARRAYOID},
	{"output_tokens", INT8OID, INT8ARRAYOID},
	{"tokens", INT8OID, INT8ARRAYOID},
	{"credits", NUMERICOID, NUMERICARRAYOID},
	{"credits_overrun", NUMERICOID, NUMERICARRAYOID},
	{"cost_usd", NUMERICOID, NUMERICARRAYOID},
	{"debit_tag", INT8OID, INT8ARRAYOID},
};

/* The rows that wait, NULL for none, and the nest level they belong to. Dropped when the transaction ends. */
static MemoryContext waiting = NULL;
static ArrayBuildState *waiting_columns[lengthof(columns)];
static int	waiting_rows;
static int	waiting_level;

/* The columns' numbers in the relation last seen, as partitions may order them otherwise. Dropped when the transaction ends. */
static Oid	numbers_of = InvalidOid;
static int	numbers[lengthof(columns)];

/* What is stored now was counted here: a subscription has not brought it. Reset when the transaction ends. */
static bool storing = false;

/* Store what waits, whatever level it belongs to. */
static void
store(void)
{
	static KvStatement count = {
		"SELECT keyvault._count_restored($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)", lengthof(columns)
	};
	KvOwnerScope scope;
	Datum		values[lengthof(columns)];
	MemoryContext context = waiting;

	for (size_t i = 0; i < lengthof(columns); i++)
	{
		count.argtypes[i] = columns[i].array_type;
		values[i] = makeArrayResult(waiting_columns[i], context);
	}
	waiting = NULL;
	kv_owner_begin_qualified(&scope);
	storing = true;
	kv_statement_execute(&count, values, NULL);
	storing = false;
	kv_owner_end(&scope);
	MemoryContextDelete(context);
}

static void
begin(void)
{
	waiting = AllocSetContextCreate(TopTransactionContext, "keyvault restored usage", ALLOCSET_DEFAULT_SIZES);
	memset(waiting_columns, 0, sizeof(waiting_columns));
	waiting_rows = 0;
	waiting_level = GetCurrentTransactionNestLevel();
}

static void
append(Relation relation, HeapTuple row)
{
	TupleDesc	descriptor = RelationGetDescr(relation);
	Datum	   *values = palloc(descriptor->natts * sizeof(Datum));
	bool	   *isnull = palloc(descriptor->natts * sizeof(bool));

	if (numbers_of != RelationGetRelid(relation))
	{
		for (size_t i = 0; i < lengthof(columns); i++)
			numbers[i] = SPI_fnumber(descriptor, columns[i].name);
		numbers_of = RelationGetRelid(relation);
	}
	heap_deform_tuple(row, descriptor, values, isnull);
	for (size_t i = 0; i < lengthof(columns); i++)
		waiting_columns[i] = accumArrayResult(waiting_columns[i], values[numbers[i] - 1], isnull[numbers[i] - 1],
											  columns[i].type, waiting);
	pfree(values);
	pfree(isnull);
}

/* Count a row that another transaction wrote. */
void
kv_restored_usage_add(Relation relation, HeapTuple row)
{
	MemoryContext outer = NULL;
	ArrayBuildState *outer_columns[lengthof(columns)];
	int			outer_rows = waiting_rows;
	int			outer_level = waiting_level;

	if (!kv_usage_is_rolled_up())
		return;
	/* Rows of an outer level stay apart: this level may roll back without them. */
	if (waiting != NULL && waiting_level != GetCurrentTransactionNestLevel())
	{
		outer = waiting;
		memcpy(outer_columns, waiting_columns, sizeof(waiting_columns));
		waiting = NULL;
	}
	if (waiting == NULL)
		begin();
	append(relation, row);
	if (++waiting_rows >= BATCH || outer != NULL)
		store();
	if (outer != NULL)
	{
		waiting = outer;
		memcpy(waiting_columns, outer_columns, sizeof(waiting_columns));
		waiting_rows = outer_rows;
		waiting_level = outer_level;
	}
}

/* Store what the current subtransaction's statement brought. */
void
kv_restored_usage_flush(void)
{
	if (waiting != NULL && waiting_level == GetCurrentTransactionNestLevel())
		store();
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			if (waiting != NULL)
			{
				PushActiveSnapshot(GetTransactionSnapshot());
				store();
				PopActiveSnapshot();
			}
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PREPARE:
		case XACT_EVENT_ABORT:
			waiting = NULL;		/* its memory goes with the transaction's */
			storing = false;
			numbers_of = InvalidOid;
			break;
		default:
			break;
	}
}

/* Hand what a subtransaction brought to its parent, or forget it. */
static void
at_subtransaction_end(SubXactEvent event, SubTransactionId id, SubTransactionId parent, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();

	if (event == SUBXACT_EVENT_ABORT_SUB)
		storing = false;
	if (waiting == NULL || waiting_level < level)
		return;
	if (event == SUBXACT_EVENT_COMMIT_SUB)
		waiting_level = level - 1;
	else if (event == SUBXACT_EVENT_ABORT_SUB)
	{
		MemoryContextDelete(waiting);
		waiting = NULL;
	}
}

/* Follow the end of transactions; called once, while the server preloads the library. */
void
kv_restored_usage_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
}

/* BEFORE row trigger of derived tables, for session_replication_role = replica: a subscription's rows are passed over. */
Datum
keyvault_keep_own_rollup(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_BEFORE(trigger->tg_event) || !TRIGGER_FIRED_FOR_ROW(trigger->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("the trigger keep_own runs before each row")));
	if (IsLogicalWorker() && !storing)
		return PointerGetDatum(NULL);
	return PointerGetDatum(TRIGGER_FIRED_BY_UPDATE(trigger->tg_event) ? trigger->tg_newtuple : trigger->tg_trigtuple);
}
