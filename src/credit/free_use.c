/*-------------------------------------------------------------------------
 * free_use.c
 *		Uses of no credits, which change no balance, and the making of a budget.
 *
 * A budget begins with what was used already. A debit keeps the balance's row lock until
 * its transaction ends, so that whoever makes a budget waits for it; a use of no credits
 * has a lock in common with the other users of its bucket instead, and the maker of a
 * budget takes it for itself, before the row's: it waits for those that have not ended,
 * and its statement holds nothing yet that they may need; what its transaction did before
 * may. Nobody waits for the lock to use it in common: a use that finds it taken goes the
 * way of a debit.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/free_use.h"

#include "base/catalogue.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "catalog/pg_type.h"
#include "common/hashfn.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "storage/lock.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(keyvault_await_free_uses);
PG_FUNCTION_INFO_V1(keyvault_budget_used_by_now);

/* Locks that a transaction over any number of users takes at most. */
#define BUCKETS 128

static LOCKTAG
lock_of(const char *user_id, Size length)
{
	static KvRelation balances = {"credit_balances"};
	LOCKTAG		tag;

	SET_LOCKTAG_OBJECT(tag, MyDatabaseId, kv_relation_oid(&balances), hash_bytes((const unsigned char *) user_id, length) % BUCKETS, 0);
	return tag;
}

/* Announce a use of no credits until the transaction ends; false while a budget is being made. */
bool
kv_free_use_announce(const char *user_id)
{
	LOCKTAG		tag = lock_of(user_id, strlen(user_id));

	return LockAcquire(&tag, ShareLock, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

/* Wait for the uses of no credits of a user that were announced, and have none announced until the transaction ends. */
Datum
keyvault_await_free_uses(PG_FUNCTION_ARGS)
{
	text	   *user_id = PG_GETARG_TEXT_PP(0);
	LOCKTAG		tag = lock_of(VARDATA_ANY(user_id), VARSIZE_ANY_EXHDR(user_id));

	(void) LockAcquire(&tag, ExclusiveLock, false, false);
	PG_RETURN_VOID();
}

/* What a new budget has seen: of what is committed now, though the transaction's snapshot be older. */
Datum
keyvault_budget_used_by_now(PG_FUNCTION_ARGS)
{
	static KvStatement used = {
		"SELECT keyvault._budget_used(g, g.window_start) FROM keyvault.credit_budgets g WHERE g.user_id = $1 AND g.id = $2",
		2, {TEXTOID, UUIDOID}
	};
	KvOwnerScope scope;
	Datum		values[2] = {PG_GETARG_DATUM(0), PG_GETARG_DATUM(1)};
	Datum		amount = (Datum) 0;
	bool		isnull = true;

	kv_owner_begin(&scope);
	if (kv_statement_read(&used, values, GetLatestSnapshot()) > 0)
		amount = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
	if (!isnull)
		amount = SPI_datumTransfer(amount, false, -1);
	kv_owner_end(&scope);
	if (isnull)
		PG_RETURN_NULL();
	PG_RETURN_DATUM(amount);
}
