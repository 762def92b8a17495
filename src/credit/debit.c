/*-------------------------------------------------------------------------
 * debit.c
 *		The debit of usage_records.
 *
 * The row trigger adds up what a statement owes per user; the statement trigger debits
 * each user once, in user_id order, so that statements over the same users do not
 * deadlock. What is owed belongs to the subtransaction that inserted the rows: it is
 * forgotten when that rolls back and cannot be flushed by another. Rows put into a
 * partition that lacks the statement trigger are debited before commit.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/debit.h"

#include "access/xact.h"
#include "base/error.h"
#include "base/index_scan.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/settings.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "common/int.h"
#include "credit/owed_row.h"
#include "credit/restored_usage.h"
#include "credit/usage_tag.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "miscadmin.h"
#include "replication/logicalworker.h"
#include "utils/builtins.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/numeric.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(keyvault_collect_debit);
PG_FUNCTION_INFO_V1(keyvault_flush_debits);

/* numeric(18,6) as a whole number of micro-credits fits in 64 bits. */
#define MICRO_DIGITS 6

/* So does a cost in USD, numeric(18,9), as nano-dollars. */
#define NANO_DIGITS 9

typedef struct Debit
{
	char		user_id[KV_USER_ID_MAX + 1];	/* hash key, zero-padded */
	int			nest_level;						/* hash key: the subtransaction that owes it */
	int64		micro_credits;
} Debit;

#define DEBIT_KEY_SIZE offsetof(Debit, micro_credits)

/* What the transaction owes: one user (nest_level 0: none) and the others (NULL: none). Dropped when it ends. */
static Debit first_owed;
static HTAB *owed = NULL;

/* Columns that the row trigger reads. */
enum
{
	USER_ID,
	CREATED_AT,
	TYPE,
	PAYER,
	INPUT_TOKENS,
	CACHED_TOKENS,
	OUTPUT_TOKENS,
	TOKENS,
	CREDITS,
	CREDITS_OVERRUN,
	COST_USD,
	DEBIT_TAG,
	COLUMNS
};

static const char *const column_names[COLUMNS] = {
	"user_id", "created_at", "type", "payer", "input_tokens", "cached_tokens", "output_tokens", "tokens",
	"credits", "credits_overrun", "cost_usd", "debit_tag",
};

/* Their numbers in the relation last seen, as partitions may order them otherwise. Dropped when the transaction ends. */
static Oid	columns_of = InvalidOid;
static int	columns[COLUMNS];

/* The type of a usage record, in bytes. */
#define TYPE_MAX 63

static void
find_columns(Relation relation)
{
	if (columns_of == RelationGetRelid(relation))
		return;
	for (int i = 0; i < COLUMNS; i++)
		columns[i] = SPI_fnumber(RelationGetDescr(relation), column_names[i]);
	columns_of = RelationGetRelid(relation);
}

static void
raise_bad_value(int column, const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_CHECK_VIOLATION),
			 errmsg("%s of a usage record must be %s", column_names[column], what)));
}

/* The amount as a whole number of 10^-digits, of at most 18 digits. Error: 23514 for a negative one or NaN. */
static int64
whole_amount(int column, Datum amount, int digits)
{
	Numeric		value = DatumGetNumeric(amount);
	Numeric		scale = int64_to_numeric(digits == MICRO_DIGITS ? INT64CONST(1000000) : INT64CONST(1000000000));
	int64		whole;

	if (numeric_is_nan(value) || numeric_is_inf(value))
		raise_bad_value(column, "a number");
	whole = DatumGetInt64(DirectFunctionCall1(numeric_int8,
											  DirectFunctionCall2(numeric_mul, amount, NumericGetDatum(scale))));
	if (whole < 0)
		raise_bad_value(column, "zero or more");
	return whole;
}

/* What the table's CHECKs would say. */
static void
check_row(const Datum *values, const bool *isnull)
{
	text	   *type = DatumGetTextPP(values[TYPE]);
	text	   *payer = DatumGetTextPP(values[PAYER]);
	Size		payer_length = VARSIZE_ANY_EXHDR(payer);

	if (VARSIZE_ANY_EXHDR(type) == 0 || VARSIZE_ANY_EXHDR(type) > TYPE_MAX)
		raise_bad_value(TYPE, "1 to 63 bytes long");
	if (!(payer_length == 4 && memcmp(VARDATA_ANY(payer), "user", 4) == 0) &&
		!(payer_length == 8 && memcmp(VARDATA_ANY(payer), "platform", 8) == 0))
		raise_bad_value(PAYER, "user or platform");
	if (TIMESTAMP_NOT_FINITE(DatumGetTimestampTz(values[CREATED_AT])))
		raise_bad_value(CREATED_AT, "finite");
	for (int i = INPUT_TOKENS; i <= TOKENS; i++)
		if (!isnull[i] && DatumGetInt64(values[i]) < 0)
			raise_bad_value(i, "zero or more");
	(void) whole_amount(CREDITS_OVERRUN, values[CREDITS_OVERRUN], MICRO_DIGITS);
	(void) whole_amount(COST_USD, values[COST_USD], NANO_DIGITS);
}

/* Add to what a user owes at a level. */
static void
add_debit(const Debit *key, int64 micro_credits)
{
	Debit	   *debit;
	bool		found;

	if (owed == NULL)
	{
		HASHCTL		control = {.keysize = DEBIT_KEY_SIZE,.entrysize = sizeof(Debit),.hcxt = TopTransactionContext};

		owed = hash_create("keyvault debits", 64, &control, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	debit = hash_search(owed, key, HASH_ENTER, &found);
	if (!found)
		debit->micro_credits = 0;
	if (pg_add_s64_overflow(debit->micro_credits, micro_credits, &debit->micro_credits))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("credits of one statement are out of range")));
}

/* Note what a row costs. The first user of a statement is kept apart: mostly it is the only one. */
static void
owe(const char *user_id, Size length, int64 micro_credits)
{
	int			level = GetCurrentTransactionNestLevel();
	Debit		key;

	if (first_owed.nest_level == 0)
	{
		memset(&first_owed, 0, sizeof(first_owed));
		memcpy(first_owed.user_id, user_id, length);
		first_owed.nest_level = level;
		first_owed.micro_credits = micro_credits;
		return;
	}
	if (first_owed.nest_level == level && strncmp(first_owed.user_id, user_id, length) == 0 &&
		first_owed.user_id[length] == '\0' &&
		!pg_add_s64_overflow(first_owed.micro_credits, micro_credits, &micro_credits))
	{
		first_owed.micro_credits = micro_credits;
		return;
	}
	memset(&key, 0, sizeof(key));
	memcpy(key.user_id, user_id, length);
	key.nest_level = level;
	add_debit(&key, micro_credits);
}

static void
check_trigger(FunctionCallInfo fcinfo, bool for_row)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_AFTER(trigger->tg_event) ||
		!TRIGGER_FIRED_BY_INSERT(trigger->tg_event) || for_row != (TRIGGER_FIRED_FOR_ROW(trigger->tg_event) != 0))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("the debit runs as a trigger after INSERT on keyvault.usage_records")));
}

Datum
keyvault_collect_debit(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	Datum		values[COLUMNS];
	bool		isnull[COLUMNS];
	int64		micro_credits;
	text	   *user_id;

	check_trigger(fcinfo, true);
	/* A subscriber receives the balances that its publisher debited. */
	if (IsLogicalWorker())
	{
		kv_restored_usage_add(trigger->tg_relation, trigger->tg_trigtuple);
		return PointerGetDatum(NULL);
	}
	find_columns(trigger->tg_relation);
	for (int i = 0; i < COLUMNS; i++)
		values[i] = heap_getattr(trigger->tg_trigtuple, columns[i], RelationGetDescr(trigger->tg_relation), &isnull[i]);
	check_row(values, isnull);
	micro_credits = whole_amount(CREDITS, values[CREDITS], MICRO_DIGITS);
	user_id = DatumGetTextPP(values[USER_ID]);
	if (VARSIZE_ANY_EXHDR(user_id) == 0 || VARSIZE_ANY_EXHDR(user_id) > KV_USER_ID_MAX)
		(void) kv_identity_check_user_id(user_id);
	if (DatumGetInt64(values[DEBIT_TAG]) == kv_usage_tag())
	{
		owe(VARDATA_ANY(user_id), VARSIZE_ANY_EXHDR(user_id), micro_credits);
		kv_owed_row_add(RelationGetRelid(trigger->tg_relation), &trigger->tg_trigtuple->t_self,
						VARDATA_ANY(user_id), VARSIZE_ANY_EXHDR(user_id));
	}
	else
		kv_restored_usage_add(trigger->tg_relation, trigger->tg_trigtuple);
	return PointerGetDatum(NULL);
}

/* Whether a debit of nothing has nothing to do: there is a balance, and no budget to look at. */
static bool
is_free_to_use(const char *user_id)
{
	KvIndexScan scan;
	Datum		key = CStringGetTextDatum(user_id);
	Oid			type = TEXTOID;
	Datum		notice_at;
	bool		isnull;
	bool		found;

	kv_owner_fresh_snapshot_begin();
	kv_index_scan_begin(&scan, "credit_balances", "credit_balances_pkey", 1, &key, &type);
	found = kv_index_scan_next(&scan, ForwardScanDirection);
	if (found)
	{
		notice_at = slot_getattr(scan.slot, SPI_fnumber(RelationGetDescr(scan.table), "notice_at"), &isnull);
		found = isnull || DatumGetInt32(DirectFunctionCall2(numeric_cmp, notice_at, NumericGetDatum(int64_to_numeric(0)))) >= 0;
	}
	kv_index_scan_end(&scan);
	kv_owner_fresh_snapshot_end();
	return found;
}

/* Debit one user: a single conditional update, or the slow way when that finds no room. */
static void
debit_user(const Debit *debit, Oid caller)
{
	static KvStatement fast = {
		"UPDATE keyvault.credit_balances SET credits_used = credits_used OPERATOR(pg_catalog.+) $2"
		" WHERE user_id OPERATOR(pg_catalog.=) $1 AND slot OPERATOR(pg_catalog.=) 0::pg_catalog.int2"
		" AND due_at OPERATOR(pg_catalog.>) pg_catalog.now() AND (monthly_credits IS NULL"
		" OR ((credits_used OPERATOR(pg_catalog.+) credits_held) OPERATOR(pg_catalog.+) $2)"
		" OPERATOR(pg_catalog.<=) ((monthly_credits OPERATOR(pg_catalog.+) extra_credits) OPERATOR(pg_catalog.-) credits_lent))"
		" AND (notice_at IS NULL OR (credits_used OPERATOR(pg_catalog.+) $2) OPERATOR(pg_catalog.<=) notice_at)",
		2, {TEXTOID, NUMERICOID}
	};
	static KvStatement slow = {"SELECT keyvault._debit_slow($1, $2, $3)", 3, {TEXTOID, NUMERICOID, BOOLOID}};
	Datum		values[3] = {
		CStringGetTextDatum(debit->user_id),
		NumericGetDatum(int64_div_fast_to_numeric(debit->micro_credits, MICRO_DIGITS)),
	};

	if (debit->micro_credits == 0 ? is_free_to_use(debit->user_id) : kv_statement_execute(&fast, values, NULL) == 1)
		return;
	values[2] = BoolGetDatum(kv_identity_role_acts_for_any_user(caller));
	kv_statement_execute(&slow, values, NULL);
}

static int
compare_debits(const void *a, const void *b)
{
	return strcmp(((const Debit *) a)->user_id, ((const Debit *) b)->user_id);
}

static bool
owes_nothing(void)
{
	return first_owed.nest_level == 0 && (owed == NULL || hash_get_num_entries(owed) == 0);
}

/* Take out what is owed at a level or above it, unsorted; returns how many. */
static int
take_debits(int level, bool above, Debit **taken)
{
	HASH_SEQ_STATUS status;
	Debit	   *debit;
	int			n = 0;

	*taken = palloc((1 + (owed ? hash_get_num_entries(owed) : 0)) * sizeof(Debit));
	if (first_owed.nest_level == level || (above && first_owed.nest_level > level))
	{
		(*taken)[n++] = first_owed;
		first_owed.nest_level = 0;
	}
	if (owed == NULL)
		return n;
	hash_seq_init(&status, owed);
	while ((debit = hash_seq_search(&status)) != NULL)
		if (debit->nest_level == level || (above && debit->nest_level > level))
		{
			(*taken)[n++] = *debit;
			hash_search(owed, debit, HASH_REMOVE, NULL);
		}
	return n;
}

/* Debit what the current subtransaction owes. */
static void
flush_debits(void)
{
	KvOwnerScope scope;
	int			level = GetCurrentTransactionNestLevel();
	Debit	   *debits;
	int			n;

	if (owes_nothing())
		return;
	n = take_debits(level, false, &debits);
	if (n > 1)
		qsort(debits, n, sizeof(Debit), compare_debits);
	kv_owed_row_flush_begin(level);
	kv_owner_begin_qualified(&scope);
	for (int i = 0; i < n; i++)
	{
		CHECK_FOR_INTERRUPTS();
		debit_user(&debits[i], scope.caller);
	}
	kv_owner_end(&scope);
	kv_owed_row_flush_end(level);
	pfree(debits);
}

Datum
keyvault_flush_debits(PG_FUNCTION_ARGS)
{
	check_trigger(fcinfo, false);
	flush_debits();
	kv_restored_usage_flush();
	return PointerGetDatum(NULL);
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
		case XACT_EVENT_PRE_PREPARE:
			if (!owes_nothing())
			{
				PushActiveSnapshot(GetTransactionSnapshot());
				flush_debits();
				PopActiveSnapshot();
			}
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PREPARE:
		case XACT_EVENT_ABORT:
			owed = NULL;
			first_owed.nest_level = 0;
			kv_owed_row_forget(0);
			columns_of = InvalidOid;
			break;
		default:
			break;
	}
}

/* Hand what a subtransaction still owes to its parent, or forget it. */
static void
at_subtransaction_end(SubXactEvent event, SubTransactionId id, SubTransactionId parent, void *arg)
{
	int			level = GetCurrentTransactionNestLevel();
	Debit	   *debits;
	int			n;

	if (event == SUBXACT_EVENT_ABORT_SUB)
		kv_owed_row_forget(level);
	if (owes_nothing() || (event != SUBXACT_EVENT_PRE_COMMIT_SUB && event != SUBXACT_EVENT_ABORT_SUB))
		return;
	n = take_debits(level, true, &debits);
	if (event == SUBXACT_EVENT_PRE_COMMIT_SUB)
		kv_owed_row_reparent(level);
	for (int i = 0; event == SUBXACT_EVENT_PRE_COMMIT_SUB && i < n; i++)
	{
		debits[i].nest_level = level - 1;
		add_debit(&debits[i], debits[i].micro_credits);
	}
	pfree(debits);
}

/* Follow the end of transactions; called once, while the server preloads the library. */
void
kv_debit_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
}
