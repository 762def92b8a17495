/*-------------------------------------------------------------------------
 * balance.c
 *		The hot rows of a user's credits, changed without SQL.
 *
 * This is what UPDATE ... WHERE there is room does, of one row found by its primary key:
 * the executor would take a fifth of the time of an insert into usage_records. A balance
 * is one row, slot 0, or, while many sessions debit the same user at once, slot 0 and
 * further slots that were lent parts of its room; a debit takes any slot that nobody
 * else is changing. Whatever is not plain room in a row that is not due is left
 * undecided, and nothing is written then.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/balance.h"

#include "access/xact.h"
#include "base/index_scan.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "catalog/pg_trigger.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "common/int.h"
#include "credit/amount.h"
#include "credit/balance_row.h"
#include "credit/free_use.h"
#include "credit/renewal.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "storage/lmgr.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"

/* As in keyvault._split_balance(). */
#define SLOTS 32

/* Whether so much may be used without somebody taking notice. */
static bool
goes_unnoticed(TupleTableSlot *row, Numeric used)
{
	Numeric		notice_at = kv_balance_row_amount(row, BALANCE_NOTICE_AT);

	return notice_at == NULL || kv_amount_at_most(used, notice_at);
}

/* Whether the row has room for amount, with nothing to be done first; sets what would be used then. */
static bool
has_room(TupleTableSlot *row, Numeric amount, Numeric *used)
{
	Numeric		monthly = kv_balance_row_amount(row, BALANCE_MONTHLY_CREDITS);
	Numeric		taken;

	if (kv_balance_row_is_due(row))
		return false;
	*used = kv_amount_add(kv_balance_row_amount(row, BALANCE_CREDITS_USED), amount);
	if (!goes_unnoticed(row, *used))
		return false;
	if (monthly == NULL)
		return true;
	taken = kv_amount_add(kv_amount_add(*used, kv_balance_row_amount(row, BALANCE_CREDITS_HELD)), kv_balance_row_amount(row, BALANCE_CREDITS_LENT));
	return kv_amount_at_most(taken, kv_amount_add(monthly, kv_balance_row_amount(row, BALANCE_EXTRA_CREDITS)));
}

/* Instead of a column: any of them. */
#define ANY_COLUMN 0

/* Whether a trigger has to see that the column changes. What keep_due sees to is so here. */
static bool
concerns(const Trigger *trigger, int column)
{
	bool		result = trigger->tgnattr == 0 || column == ANY_COLUMN;

	if (!TRIGGER_FOR_UPDATE(trigger->tgtype) || trigger->tgenabled == TRIGGER_DISABLED || strcmp(trigger->tgname, "keep_due") == 0)
		return false;
	for (int i = 0; i < trigger->tgnattr; i++)
		result |= trigger->tgattr[i] == column;
	return result;
}

/* Whether an UPDATE of the column would do more than write the row: an administrator may have added to the table. */
static bool
is_more_than_a_write(Relation balances, int column)
{
	const TupleConstr *constraints = RelationGetDescr(balances)->constr;
	const TriggerDesc *triggers = balances->trigdesc;

	for (int i = 0; triggers && i < triggers->numtriggers; i++)
		if (concerns(&triggers->triggers[i], column))
			return true;
	return constraints && (constraints->num_check > 0 || constraints->has_generated_stored);
}

/*
 * How many debits a transaction finds room for in the further slot that it takes. Where it
 * has to look for room elsewhere while it holds a slot, it waits for others that hold
 * theirs, and may be waiting for it.
 */
#define DEBITS_TO_COME 32

/*
 * What this process debits to split balances, in micro-credits: a debit, which half of the
 * last ones were above; what came after the first debit of the transaction under way; and
 * the most that came so in earlier ones, a little less with each that goes by.
 */
static int64 usual_debit;
static FullTransactionId debiting;
static int64 debited_more;
static int64 debited_more_earlier;

static void
note_debit(int64 micro_credits)
{
	FullTransactionId xid = GetTopFullTransactionIdIfAny();

	if (usual_debit == 0)
		usual_debit = micro_credits;
	else
		usual_debit += micro_credits > usual_debit ? usual_debit / 16 + 1 : -(usual_debit / 16);
	if (!FullTransactionIdEquals(xid, debiting))
	{
		debited_more_earlier = Max(debited_more, debited_more_earlier - debited_more_earlier / 8);
		debiting = xid;
		debited_more = 0;
	}
	else if (pg_add_s64_overflow(debited_more, micro_credits, &debited_more))
		debited_more = PG_INT64_MAX;
}

/* A debit of which a transaction may have DEBITS_TO_COME when it begins with this one: twice what earlier ones had, at least. */
int64
kv_balance_usual_debit(int64 micro_credits)
{
	int64		usual = usual_debit == 0 ? micro_credits : usual_debit + micro_credits / DEBITS_TO_COME;

	return Max(usual, debited_more_earlier / (DEBITS_TO_COME / 2));
}

/* What there should be room for in a slot that a debit is the transaction's first of. */
static Numeric
amount_to_come(int64 micro_credits)
{
	int64		to_come;

	if (pg_mul_s64_overflow(kv_balance_usual_debit(micro_credits), DEBITS_TO_COME, &to_come))
		to_come = PG_INT64_MAX;
	return kv_amount_of_micro(to_come);
}

/* Write the row anew with used; TM_Updated when another transaction was faster. */
static TM_Result
write_used(Relation balances, TupleTableSlot *row, Numeric used)
{
	TupleTableSlot *copy = kv_balance_row_copy(balances, row);

	kv_balance_row_set_amount(copy, BALANCE_CREDITS_USED, used);
	return kv_balance_row_write(balances, row, copy);
}

/* Debit slot 0, which another transaction changed meanwhile: lock it, for a second try. */
static KvBalanceResult
debit_in_turn(Relation balances, TupleTableSlot *row, Numeric amount)
{
	Numeric		used;

	if (kv_balance_row_lock_newest(balances, row) && has_room(row, amount, &used) && write_used(balances, row, used) == TM_Ok)
		return KV_BALANCE_DEBITED_IN_TURN;
	return KV_BALANCE_UNDECIDED;
}

/*
 * Debit the row just found. A further slot that another transaction changed meanwhile is
 * not waited for: who has to make the balance one row again locks slot 0 first, and must
 * not wait for somebody who waits for slot 0.
 */
static KvBalanceResult
debit_row(Relation balances, TupleTableSlot *row, bool is_slot_0, Numeric amount, Numeric to_come)
{
	Numeric		used;
	TM_Result	result;

	if (!is_slot_0 && !kv_balance_row_is_changed_by_me(row) && !has_room(row, to_come, &used))
		return KV_BALANCE_UNDECIDED;
	if (!has_room(row, amount, &used))
		return KV_BALANCE_UNDECIDED;
	result = write_used(balances, row, used);
	if (result == TM_Updated && is_slot_0)
		return debit_in_turn(balances, row, amount);
	return result == TM_Ok ? KV_BALANCE_DEBITED : KV_BALANCE_UNDECIDED;
}

/* Begin the next period of slot 0, which is due, and debit it. */
static KvBalanceResult
debit_due_row(Relation balances, TupleTableSlot *row, Numeric amount)
{
	TupleTableSlot *copy;
	Datum		plan;
	Numeric		used;
	TM_Result	result;

	if (is_more_than_a_write(balances, ANY_COLUMN))
		return KV_BALANCE_UNDECIDED;
	copy = kv_balance_row_copy(balances, row);
	plan = kv_renewal_begin(row, copy);
	if (DatumGetPointer(plan) == NULL || !has_room(copy, amount, &used))
	{
		ExecDropSingleTupleTableSlot(copy);
		return KV_BALANCE_UNDECIDED;
	}
	kv_balance_row_set_amount(copy, BALANCE_CREDITS_USED, used);
	result = kv_balance_row_write(balances, row, copy);
	if (result == TM_Updated)
		return debit_in_turn(balances, row, amount);
	if (result != TM_Ok)
		return KV_BALANCE_UNDECIDED;
	kv_renewal_close(row, plan);
	return KV_BALANCE_DEBITED;
}

static KvIndex slot_0_of_user = {{"credit_balances"}, {"credit_balances_user_id"}, 1, {TEXTOID}, RowExclusiveLock};
static KvIndex slots_of_user = {{"credit_balances"}, {"credit_balances_pkey"}, 1, {TEXTOID}, RowExclusiveLock};
static KvIndex slot_of_user = {{"credit_balances"}, {"credit_balances_pkey"}, 2, {TEXTOID, INT2OID}, RowExclusiveLock};

/* Debit one further slot, which nobody is changing. */
static KvBalanceResult
debit_slot(const char *user_id, int slot, Numeric amount, Numeric to_come)
{
	Datum		keys[2] = {CStringGetTextDatum(user_id), Int16GetDatum(slot)};
	KvIndexScan scan;
	KvBalanceResult result = KV_BALANCE_UNDECIDED;

	kv_index_scan_begin(&scan, &slot_of_user, keys);
	if (kv_index_scan_next(&scan, ForwardScanDirection) && !kv_balance_row_is_being_changed(scan.slot))
		result = debit_row(scan.table, scan.slot, false, amount, to_come);
	kv_index_scan_end(&scan);
	return result;
}

/*
 * Debit the first of the further slots with room, or, without waiting, the first that
 * nobody is changing. Sets whether this transaction holds one.
 */
static KvBalanceResult
debit_first_slot(const char *user_id, bool wait, Numeric amount, Numeric to_come, bool *holds_one)
{
	Datum		key = CStringGetTextDatum(user_id);
	KvIndexScan scan;
	KvBalanceResult result = KV_BALANCE_UNDECIDED;

	*holds_one = false;
	kv_index_scan_begin(&scan, &slots_of_user, &key);
	while (result == KV_BALANCE_UNDECIDED && kv_index_scan_next(&scan, ForwardScanDirection))
	{
		*holds_one |= kv_balance_row_is_changed_by_me(scan.slot);
		if (DatumGetInt16(kv_balance_row_value(scan.slot, BALANCE_SLOT)) > 0 && (wait || !kv_balance_row_is_being_changed(scan.slot)))
			result = debit_row(scan.table, scan.slot, false, amount, to_come);
	}
	kv_index_scan_end(&scan);
	return result;
}

/*
 * Debit a user whose balance is split: this process's own slot, or any free one, or, as
 * long as it holds none that another may be waiting for, any.
 */
static KvBalanceResult
debit_any_slot(const char *user_id, Numeric amount, Numeric to_come)
{
	KvBalanceResult result = debit_slot(user_id, 1 + KvMyProcNumber() % SLOTS, amount, to_come);
	bool		holds_one;

	if (result == KV_BALANCE_UNDECIDED)
		result = debit_first_slot(user_id, false, amount, to_come, &holds_one);
	if (result == KV_BALANCE_UNDECIDED && !holds_one)
		result = debit_first_slot(user_id, true, amount, to_come, &holds_one);
	return result;
}

/* Take micro_credits off a user's balance if there plainly is room for them. None are debited without a write. */
KvBalanceResult
kv_balance_debit(const char *user_id, int64 micro_credits)
{
	Numeric		amount = kv_amount_of_micro(micro_credits);
	Datum		key = CStringGetTextDatum(user_id);
	KvIndexScan scan;
	KvBalanceResult result = KV_BALANCE_UNDECIDED;
	bool		is_split = false;
	bool		is_free = micro_credits == 0 && kv_free_use_announce(user_id);

	kv_owner_fresh_snapshot_begin();
	kv_index_scan_begin(&scan, kv_index_or(&slot_0_of_user, &slots_of_user), &key);
	/* The table of version 0.1.0 lacks columns: keyvault._debit_slow() does for it what an UPDATE can. */
	if (RelationGetDescr(scan.table)->natts >= BALANCE_CREDITS_OVERAGE && !is_more_than_a_write(scan.table, BALANCE_CREDITS_USED) &&
		kv_index_scan_next(&scan, ForwardScanDirection))
	{
		CheckCmdReplicaIdentity(scan.table, CMD_UPDATE);
		is_split = !kv_amount_at_most(kv_balance_row_amount(scan.slot, BALANCE_CREDITS_LENT), kv_amount_zero());
		/* What an older snapshot shows of a row that was changed since may lack a budget: a write finds out. */
		if (is_free && goes_unnoticed(scan.slot, kv_balance_row_amount(scan.slot, BALANCE_CREDITS_USED)) &&
			!(IsolationUsesXactSnapshot() && kv_balance_row_is_being_changed(scan.slot)))
			result = KV_BALANCE_DEBITED;
		else if (!is_split && kv_balance_row_is_due(scan.slot))
			result = debit_due_row(scan.table, scan.slot, amount);
		else if (!is_split)
			result = debit_row(scan.table, scan.slot, true, amount, amount);
	}
	kv_index_scan_end(&scan);
	if (is_split && result == KV_BALANCE_UNDECIDED)
	{
		note_debit(micro_credits);
		result = debit_any_slot(user_id, amount, amount_to_come(micro_credits));
	}
	kv_owner_fresh_snapshot_end();
	return result;
}
