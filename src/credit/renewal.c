/*-------------------------------------------------------------------------
 * renewal.c
 *		The next period of a plain balance.
 *
 * At the turn of a period nearly every debit finds a balance whose period has ended, and
 * nearly all of them are plain: without further slots, grants and budgets. For these two
 * statements do here what takes keyvault._catch_up(), which does it for all, eleven.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/renewal.h"

#include "access/xact.h"
#include "base/owner_spi.h"
#include "catalog/pg_type.h"
#include "credit/amount.h"
#include "credit/balance_row.h"
#include "credit/period.h"
#include "utils/datum.h"
#include "utils/timestamp.h"

/* Whether little is to be done when the row's period has ended, and only that is due. The row has no further slots. */
static bool
is_plain(TupleTableSlot *row)
{
	Numeric		zero = kv_amount_zero();
	Numeric		notice_at = kv_balance_row_amount(row, BALANCE_NOTICE_AT);

	return DatumGetTimestampTz(kv_balance_row_value(row, BALANCE_PERIOD_END)) <= GetCurrentTransactionStartTimestamp() &&
		kv_amount_at_most(kv_balance_row_amount(row, BALANCE_EXTRA_CREDITS), zero) &&
		kv_amount_at_most(kv_balance_row_amount(row, BALANCE_EXTRA_SPENT), zero) &&
		(notice_at == NULL || kv_amount_at_most(zero, notice_at));
}

/* What a plan gives a user. */
typedef struct GivenPlan
{
	Datum		name;
	Numeric		monthly;		/* NULL is unlimited */
	Numeric		notice_at;		/* just below the first threshold; NULL for none */
} GivenPlan;

/* A value that SPI has found, in a memory context that stays; NULL where it is. */
static void *
kept(int column, MemoryContext context)
{
	bool		isnull;
	Datum		value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, column, &isnull);
	MemoryContext spi = MemoryContextSwitchTo(context);

	value = isnull ? (Datum) 0 : datumCopy(value, false, -1);
	MemoryContextSwitchTo(spi);
	return DatumGetPointer(value);
}

/* The plan of a user. False when it is not there. */
static bool
find_plan(Datum user_id, GivenPlan *plan)
{
	static KvStatement find = {
		"SELECT u.plan, c.monthly,"
		" (SELECT min(t.at) - 0.000001"
		"    FROM unnest(p.notice_percents) percent, round(c.monthly * percent / 100, 6) t(at) WHERE t.at > 0)"
		"  FROM keyvault.users u JOIN keyvault.plans p ON p.plan = u.plan,"
		"       LATERAL (SELECT coalesce(u.monthly_credits, p.monthly_credits)) c(monthly)"
		" WHERE u.user_id = $1", 1, {TEXTOID}
	};
	MemoryContext caller = CurrentMemoryContext;
	KvOwnerScope scope;
	bool		found;

	kv_owner_begin_qualified(&scope);
	found = kv_statement_execute(&find, &user_id, NULL) > 0;
	if (found)
	{
		plan->name = PointerGetDatum(kept(1, caller));
		plan->monthly = kept(2, caller);
		plan->notice_at = kept(3, caller);
	}
	kv_owner_end(&scope);
	return found;
}

/*
 * Make the copy of a due row what it is in the period that contains now(), and return its
 * plan's name, for kv_renewal_close; 0, and nothing done, where that takes more: the
 * balance is not plain, or its plan is not there.
 */
Datum
kv_renewal_begin(TupleTableSlot *row, TupleTableSlot *copy)
{
	TimestampTz anchor = DatumGetTimestampTz(kv_balance_row_value(row, BALANCE_PERIOD_ANCHOR));
	TimestampTz end;
	int32		number;
	GivenPlan	plan;

	if (!is_plain(row) || !find_plan(kv_balance_row_value(row, BALANCE_USER_ID), &plan))
		return (Datum) 0;
	number = kv_period_number(anchor, GetCurrentTransactionStartTimestamp());
	end = kv_period_bound(anchor, number + 1);
	kv_balance_row_set_amount(copy, BALANCE_MONTHLY_CREDITS, plan.monthly);
	kv_balance_row_set_amount(copy, BALANCE_NOTICE_AT, plan.notice_at);
	kv_balance_row_set_amount(copy, BALANCE_CREDITS_USED, kv_amount_zero());
	kv_balance_row_set_amount(copy, BALANCE_CREDITS_COVERED, kv_amount_zero());
	kv_balance_row_set_amount(copy, BALANCE_CREDITS_OVERAGE, kv_amount_zero());
	kv_balance_row_set(copy, BALANCE_PERIOD_START, TimestampTzGetDatum(kv_period_bound(anchor, number)));
	kv_balance_row_set(copy, BALANCE_PERIOD_END, TimestampTzGetDatum(end));
	kv_balance_row_set(copy, BALANCE_DUE_AT, TimestampTzGetDatum(end));
	return plan.name;
}

/* Leave a row in credit_periods of what the balance was, if anything was used. */
void
kv_renewal_close(TupleTableSlot *row, Datum plan)
{
	static KvStatement close = {
		"INSERT INTO keyvault.credit_periods (user_id, ended_by, plan, period_start, period_end, ended_at, monthly_credits,"
		"                                     credits_covered, credits_used, extra_spent, overage)"
		" VALUES ($1, 'period', $2, $3, $4, $4, $5, $6, $7, 0, coalesce(greatest($7 - $5, 0), 0))",
		7, {TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, NUMERICOID, NUMERICOID, NUMERICOID}
	};
	Numeric		monthly = kv_balance_row_amount(row, BALANCE_MONTHLY_CREDITS);
	Datum		values[] = {
		kv_balance_row_value(row, BALANCE_USER_ID),
		plan,
		kv_balance_row_value(row, BALANCE_PERIOD_START),
		kv_balance_row_value(row, BALANCE_PERIOD_END),
		NumericGetDatum(monthly),
		kv_balance_row_value(row, BALANCE_CREDITS_COVERED),
		kv_balance_row_value(row, BALANCE_CREDITS_USED)
	};
	KvOwnerScope scope;

	if (kv_amount_at_most(kv_balance_row_amount(row, BALANCE_CREDITS_USED), kv_amount_zero()))
		return;
	kv_owner_begin_qualified(&scope);
	kv_statement_execute(&close, values, monthly == NULL ? "    n  " : NULL);
	kv_owner_end(&scope);
}
