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

#include "access/detoast.h"
#include "access/xact.h"
#include "base/catalogue.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/settings.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "common/hashfn.h"
#include "common/int.h"
#include "credit/amount.h"
#include "credit/balance.h"
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

typedef struct Debit
{
	char		user_id[KV_USER_ID_MAX + 1];	/* hash key */
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
	REASONING_TOKENS,
	CREDITS,
	CREDITS_OVERRUN,
	COST_USD,
	UNITS,
	PROVIDER,
	MODEL,
	DEBIT_TAG,
	COLUMNS
};

static const char *const column_names[COLUMNS] = {
	"user_id", "created_at", "type", "payer", "input_tokens", "cached_tokens", "output_tokens", "tokens",
	"reasoning_tokens", "credits", "credits_overrun", "cost_usd", "units", "provider", "model", "debit_tag",
};

/* Their numbers in the relation last seen, as partitions may order them otherwise. They hold until the catalogue changes. */
static Oid	columns_of = InvalidOid;
static uint64 columns_known_at;
static int	columns[COLUMNS];

/* The type of a usage record, in bytes. */
#define TYPE_MAX 63

/* So many of its tokens of a kind are believed: sums of very many records stay in range. */
#define TOKENS_MAX INT64CONST(1000000000000)

static void
find_columns(Relation relation)
{
	uint64		now = kv_catalogue_changes();

	if (columns_of == RelationGetRelid(relation) && columns_known_at == now)
		return;
	for (int i = 0; i < COLUMNS; i++)
		columns[i] = SPI_fnumber(RelationGetDescr(relation), column_names[i]);
	columns_of = RelationGetRelid(relation);
	columns_known_at = now;
}

/*
 * When a use can have been: from the epoch of Unix, and of UUIDs version 7, to the end of the last year of four digits,
 * which name months. PostgreSQL's own calendar goes further than its arithmetic with months.
 */
#define FIRST_CREATED_AT (((int64) UNIX_EPOCH_JDATE - POSTGRES_EPOCH_JDATE) * USECS_PER_DAY)
#define END_OF_CREATED_AT (INT64CONST(2921940) * USECS_PER_DAY)	/* 8000 years after PostgreSQL's epoch, 2000-01-01 */

static void
raise_bad_value(int column, const char *what, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_CHECK_VIOLATION),
			 errmsg("%s of a usage record must be %s", column_names[column], what),
			 errhint("%s", hint)));
}

/* See that an amount is a number, and zero or more. Error: 23514. */
static void
check_amount(int column, Numeric amount)
{
	if (numeric_is_nan(amount) || numeric_is_inf(amount))
		raise_bad_value(column, "a number", "NaN and Infinity are none; 0 is.");
	if (!kv_amount_at_most(kv_amount_zero(), amount))
		raise_bad_value(column, "zero or more", "keyvault.refund_usage() gives back what a record cost, keyvault.grant_credits() gives any credits.");
}

/* What the table's CHECKs would say of rows that are made, but not of those that a restore brings: sums must go on. */
static void
check_new_row(const Datum *values, const bool *isnull)
{
	for (int i = PROVIDER; i <= MODEL; i++)
		if (!isnull[i] && toast_raw_datum_size(values[i]) - VARHDRSZ > KV_USAGE_NAME_MAX)
			raise_bad_value(i, "at most 255 bytes long", "Pass the name that prices and budgets know it by.");
	for (int i = INPUT_TOKENS; i <= REASONING_TOKENS; i++)
		if (!isnull[i] && DatumGetInt64(values[i]) > TOKENS_MAX)
			raise_bad_value(i, "at most 1000000000000", "Record the use in several records.");
}

/* What the table's CHECKs would say. */
static void
check_row(const Datum *values, const bool *isnull)
{
	text	   *type = DatumGetTextPP(values[TYPE]);
	text	   *payer = DatumGetTextPP(values[PAYER]);
	Size		payer_length = VARSIZE_ANY_EXHDR(payer);
	TimestampTz created_at = DatumGetTimestampTz(values[CREATED_AT]);

	if (VARSIZE_ANY_EXHDR(type) == 0 || VARSIZE_ANY_EXHDR(type) > TYPE_MAX)
		raise_bad_value(TYPE, "1 to 63 bytes long", "Pass chat, api, automation or a word of your own.");
	if (!(payer_length == 4 && memcmp(VARDATA_ANY(payer), "user", 4) == 0) &&
		!(payer_length == 8 && memcmp(VARDATA_ANY(payer), "platform", 8) == 0))
		raise_bad_value(PAYER, "user or platform", "It is whose key was used: the user's own, or the platform's.");
	if (created_at < FIRST_CREATED_AT || created_at >= END_OF_CREATED_AT)
		raise_bad_value(CREATED_AT, "in the years 1970 to 9999, UTC", "It is when the use was; left out, it is now.");
	for (int i = INPUT_TOKENS; i <= REASONING_TOKENS; i++)
		if (!isnull[i] && DatumGetInt64(values[i]) < 0)
			raise_bad_value(i, "zero or more", "Leave out what was not counted.");
	for (int i = CREDITS; i <= UNITS; i++)
		if (!isnull[i])
			check_amount(i, DatumGetNumeric(values[i]));
}

/* Of the hash key: most of it is seldom used. */
static uint32
hash_debit(const void *key, Size size)
{
	return hash_bytes((const unsigned char *) ((const Debit *) key)->user_id, strlen(((const Debit *) key)->user_id));
}

static int
match_debits(const void *a, const void *b, Size size)
{
	return ((const Debit *) a)->nest_level != ((const Debit *) b)->nest_level ||
		strcmp(((const Debit *) a)->user_id, ((const Debit *) b)->user_id) != 0;
}

/* Add to what a user owes at a level. */
static void
add_debit(const Debit *key, int64 micro_credits)
{
	Debit	   *debit;
	bool		found;

	if (owed == NULL)
	{
		HASHCTL		control = {
			.keysize = DEBIT_KEY_SIZE,.entrysize = sizeof(Debit),.hcxt = TopTransactionContext,
			.hash = hash_debit,.match = match_debits
		};

		owed = hash_create("keyvault debits", 64, &control, HASH_ELEM | HASH_FUNCTION | HASH_COMPARE | HASH_CONTEXT);
	}
	debit = hash_search(owed, key, HASH_ENTER, &found);
	if (!found)
		debit->micro_credits = 0;
	if (pg_add_s64_overflow(debit->micro_credits, micro_credits, &debit->micro_credits))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("credits of one statement are out of range"),
				 errhint("A statement can debit a user 9223372036854 credits; use several.")));
}

/* Note what a row costs. The first user of a statement is kept apart: mostly it is the only one. */
static void
owe(const char *user_id, Size length, int64 micro_credits)
{
	int			level = GetCurrentTransactionNestLevel();
	Debit		key;

	if (first_owed.nest_level == 0)
	{
		memcpy(first_owed.user_id, user_id, length);
		first_owed.user_id[length] = '\0';
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
	memcpy(key.user_id, user_id, length);
	key.user_id[length] = '\0';
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
	{
		/* The table of 0.1.0 has no reasoning_tokens and units. */
		isnull[i] = columns[i] <= 0;
		if (!isnull[i])
			values[i] = slot_getattr(trigger->tg_trigslot, columns[i], &isnull[i]);
	}
	check_row(values, isnull);
	user_id = DatumGetTextPP(values[USER_ID]);
	if (VARSIZE_ANY_EXHDR(user_id) == 0 || VARSIZE_ANY_EXHDR(user_id) > KV_USER_ID_MAX)
		(void) kv_identity_check_user_id(user_id);
	if (DatumGetInt64(values[DEBIT_TAG]) == kv_usage_tag())
	{
		check_new_row(values, isnull);
		owe(VARDATA_ANY(user_id), VARSIZE_ANY_EXHDR(user_id), kv_amount_in_micro(DatumGetNumeric(values[CREDITS])));
		kv_owed_row_add(RelationGetRelid(trigger->tg_relation), &trigger->tg_trigtuple->t_self,
						VARDATA_ANY(user_id), VARSIZE_ANY_EXHDR(user_id));
	}
	else
		kv_restored_usage_add(trigger->tg_relation, trigger->tg_trigtuple);
	return PointerGetDatum(NULL);
}

/*
 * A balance that this process found others debiting so often within a second is split, so
 * that they need not wait for each other's commit.
 */
#define COLLISIONS_TO_SPLIT 4
#define COLLISION_WINDOW_MS 1000

/* Note that others debit the same user; true when that has become the rule. */
static bool
is_hot(const char *user_id)
{
	static char last_user[KV_USER_ID_MAX + 1];
	static int	collisions = 0;
	static TimestampTz since;
	TimestampTz now = GetCurrentTimestamp();

	if (strcmp(last_user, user_id) != 0 || TimestampDifferenceExceeds(since, now, COLLISION_WINDOW_MS))
	{
		strlcpy(last_user, user_id, sizeof(last_user));
		since = now;
		collisions = 0;
	}
	return ++collisions >= COLLISIONS_TO_SPLIT;
}

static void
run_for_user(KvStatement *statement, const Debit *debit, bool may_create)
{
	KvOwnerScope scope;
	Datum		values[3] = {
		CStringGetTextDatum(debit->user_id),
		NumericGetDatum(kv_amount_of_micro(debit->micro_credits)),
		BoolGetDatum(may_create)
	};

	kv_owner_begin_qualified(&scope);
	kv_statement_execute(statement, values, NULL);
	kv_owner_end(&scope);
}

/* Debit one user: at once where there plainly is room, else the slow way. */
static void
debit_user(const Debit *debit)
{
	static KvStatement slow = {"SELECT keyvault._debit_slow($1, $2, $3)", 3, {TEXTOID, NUMERICOID, BOOLOID}};
	static KvStatement split = {"SELECT keyvault._split_balance($1, $2)", 2, {TEXTOID, NUMERICOID}};
	KvBalanceResult result = kv_balance_debit(debit->user_id, debit->micro_credits);

	if (result == KV_BALANCE_DEBITED_IN_TURN && is_hot(debit->user_id))
	{
		Debit		usual = *debit;

		usual.micro_credits = kv_balance_usual_debit(debit->micro_credits);
		run_for_user(&split, &usual, false);
	}
	if (result == KV_BALANCE_UNDECIDED)
		run_for_user(&slow, debit, kv_identity_role_acts_for_any_user(GetUserId()));
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
	int			level = GetCurrentTransactionNestLevel();
	Debit	   *debits;
	int			n;

	if (owes_nothing())
		return;
	n = take_debits(level, false, &debits);
	if (n > 1)
		qsort(debits, n, sizeof(Debit), compare_debits);
	kv_owed_row_flush_begin(level);
	for (int i = 0; i < n; i++)
	{
		CHECK_FOR_INTERRUPTS();
		debit_user(&debits[i]);
	}
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
