/*-------------------------------------------------------------------------
 * turn.c
 *		The worker's database work: settle what has ended, claim what may start.
 *
 * Both happen in one transaction. When that fails, each call is settled by itself: one
 * whose user's balance is locked waits, one that can never be settled is given up, and
 * none holds up another. Where the master key has to be fetched first, settlements are
 * committed before: nothing is locked while a program or a Vault server is waited for.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/turn.h"

#include "access/xact.h"
#include "base/error.h"
#include "base/settings.h"
#include "commands/extension.h"
#include "crypto/master_key.h"
#include "gateway/call.h"
#include "gateway/claim.h"
#include "gateway/places.h"
#include "gateway/worker_slot.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/ipc.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

/* The worker waits no longer than this for a row that somebody else has locked. */
#define LOCK_TIMEOUT "20ms"

/* When to try a settlement again that found its user's balance locked; doubled each time. */
#define SETTLE_AGAIN_MS		100
#define SETTLE_AGAIN_MAX_MS	5000

/* When to look again after the queue could not be read. */
#define CLAIM_AGAIN_MS		500

/* Of the places for calls, one in so many is kept for users with nothing under way. */
#define RESERVE_SHARE		10

/* Begin a transaction of the worker's; leaves the process when the extension is gone. */
void
kv_turn_begin(const char *activity)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	PushActiveSnapshot(GetTransactionSnapshot());
	pgstat_report_activity(STATE_RUNNING, activity);
	/* The extension may have been dropped since: then there is nothing to do here. */
	if (!OidIsValid(get_extension_oid("keyvault", true)))
	{
		PopActiveSnapshot();
		CommitTransactionCommand();
		proc_exit(0);
	}
	(void) set_config_option("lock_timeout", LOCK_TIMEOUT, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
}

/* Commit it, and report statistics so that autovacuum sees the queue. */
void
kv_turn_end(void)
{
	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/* Report the error under way, and forget it with its transaction; returns its SQLSTATE. */
int
kv_turn_roll_back(MemoryContext context, char **message)
{
	ErrorData  *error;
	int			code;

	HOLD_INTERRUPTS();
	MemoryContextSwitchTo(context);
	error = CopyErrorData();
	code = error->sqlerrcode;
	*message = error->message;
	FlushErrorState();
	AbortCurrentTransaction();
	MemoryContextSwitchTo(context);
	pgstat_report_activity(STATE_IDLE, NULL);
	RESUME_INTERRUPTS();
	return code;
}

/* May the same work succeed another time? */
bool
kv_turn_error_may_pass(int code)
{
	return code == ERRCODE_LOCK_NOT_AVAILABLE || code == ERRCODE_T_R_SERIALIZATION_FAILURE ||
		code == ERRCODE_T_R_DEADLOCK_DETECTED || code == ERRCODE_QUERY_CANCELED;
}

static void
finish_call(KvWorker *worker, KvCall *call)
{
	worker->ended = list_delete_ptr(worker->ended, call);
	kv_call_free(call, worker->pool);
}

/* Mark as unknown, outside of the turn that failed, a call that cannot be settled. */
static void
abandon_call(KvWorker *worker, KvCall *call, char *reason)
{
	char	   *message;

	ereport(WARNING,
			(errmsg("answer of a provider call cannot be stored: %s", reason),
			 errhint("The request's outcome is unknown; see keyvault.request_status.")));
	PG_TRY();
	{
		kv_turn_begin("giving a call up");
		kv_call_abandon(call, "the answer could not be stored; the server log says why");
		kv_turn_end();
	}
	PG_CATCH();
	{
		(void) kv_turn_roll_back(worker->turn_context, &message);
	}
	PG_END_TRY();
}

/* Settle one call in a transaction of its own; false when it has to wait for a lock. */
static bool
settle_alone(KvWorker *worker, KvCall *call)
{
	volatile bool settled = true;
	char	   *message;

	PG_TRY();
	{
		kv_turn_begin("settling a call");
		kv_call_settle(call);
		kv_turn_end();
	}
	PG_CATCH();
	{
		if (kv_turn_error_may_pass(kv_turn_roll_back(worker->turn_context, &message)))
			settled = false;
		else
			abandon_call(worker, call, message);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(worker->turn_context);
	return settled;
}

static void
postpone_settlement(KvCall *call)
{
	call->settle_delay_ms = call->settle_delay_ms == 0 ? SETTLE_AGAIN_MS : Min(call->settle_delay_ms * 2, SETTLE_AGAIN_MAX_MS);
	call->settle_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), call->settle_delay_ms);
}

static int
compare_users(const ListCell *a, const ListCell *b)
{
	return strcmp(((KvCall *) lfirst(a))->user_id, ((KvCall *) lfirst(b))->user_id);
}

/* The calls that have ended and need not wait, in the turn's memory; by user, as every statement locks balances in that order. */
static List *
calls_to_settle(KvWorker *worker)
{
	TimestampTz now = GetCurrentTimestamp();
	List	   *calls = NIL;
	ListCell   *cell;

	foreach(cell, worker->ended)
		if (((KvCall *) lfirst(cell))->settle_at <= now)
			calls = lappend(calls, lfirst(cell));
	list_sort(calls, compare_users);
	return calls;
}

/* After a turn failed: settle each call by itself, so that one cannot hold up the others. */
static void
settle_one_by_one(KvWorker *worker, List *calls)
{
	List	   *blocked_users = NIL;
	ListCell   *cell;

	foreach(cell, calls)
	{
		KvCall	   *call = lfirst(cell);
		ListCell   *user;
		bool		blocked = false;

		CHECK_FOR_INTERRUPTS();
		foreach(user, blocked_users)
			blocked = blocked || strcmp(lfirst(user), call->user_id) == 0;
		if (!blocked && settle_alone(worker, call))
			finish_call(worker, call);
		else
		{
			blocked_users = lappend(blocked_users, call->user_id);
			postpone_settlement(call);
		}
	}
	kv_worker_announce_settlement();
}

/* Settle calls and claim up to capacity more, in one transaction. Returns the claims. */
static List *
settle_and_claim(KvWorker *worker, List *calls, int capacity)
{
	ListCell   *cell;
	List	   *claimed = NIL;

	kv_turn_begin("settling and claiming calls");
	foreach(cell, calls)
	{
		CHECK_FOR_INTERRUPTS();
		kv_call_settle(lfirst(cell));
	}
	MemoryContextSwitchTo(worker->turn_context);
	if (capacity > 0)
		claimed = kv_claim_requests(capacity, kv_places() / RESERVE_SHARE,
									kv_max_concurrent_requests_per_user, worker->after_user);
	/* With no place left, the next call that ends gives cause to look. */
	if (list_length(claimed) < capacity)
		worker->next_retry = kv_claim_next_retry();
	else
		TIMESTAMP_NOEND(worker->next_retry);
	kv_turn_end();
	MemoryContextSwitchTo(worker->turn_context);
	return claimed;
}

/* settle_and_claim, with an error reported and rolled back; false then. */
static bool
try_settle_and_claim(KvWorker *worker, List *calls, int capacity, List **claimed)
{
	volatile bool done = true;
	char	   *message;

	*claimed = NIL;
	PG_TRY();
	{
		*claimed = settle_and_claim(worker, calls, capacity);
	}
	PG_CATCH();
	{
		int			code = kv_turn_roll_back(worker->turn_context, &message);

		if (calls == NIL && !kv_turn_error_may_pass(code))
			ereport(WARNING,
					(errmsg("keyvault worker cannot read its queue: %s", message),
					 errhint("It tries again; the SQLSTATE is %s.", unpack_sql_state(code))));
		done = false;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(worker->turn_context);
	return done;
}

static void
finish_calls(KvWorker *worker, List *calls)
{
	ListCell   *cell;

	foreach(cell, calls)
		finish_call(worker, lfirst(cell));
	if (calls != NIL)
		kv_worker_announce_settlement();
}

/* Is any request queued? False as well when that cannot be told for now. */
static bool
has_queued_requests(KvWorker *worker)
{
	volatile TimestampTz due;
	char	   *message;

	TIMESTAMP_NOEND(due);
	PG_TRY();
	{
		kv_turn_begin("looking for calls");
		due = kv_claim_next_retry();
		kv_turn_end();
	}
	PG_CATCH();
	{
		(void) kv_turn_roll_back(worker->turn_context, &message);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(worker->turn_context);
	return !TIMESTAMP_IS_NOEND(due);
}

/* Fetch the master key, in a transaction without a snapshot or a lock. When that fails, each call that needs it says why. */
static void
fetch_master_key(KvWorker *worker)
{
	char	   *message;

	PG_TRY();
	{
		StartTransactionCommand();
		MemoryContextSwitchTo(worker->turn_context);
		pgstat_report_activity(STATE_RUNNING, "fetching the master key");
		(void) kv_master_key_get();
		CommitTransactionCommand();
		pgstat_report_activity(STATE_IDLE, NULL);
	}
	PG_CATCH();
	{
		(void) kv_turn_roll_back(worker->turn_context, &message);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(worker->turn_context);
}

/* Settle calls, and fetch the master key if there is a request that may need it. */
static void
settle_and_fetch(KvWorker *worker, List *calls)
{
	List	   *none;

	if (calls != NIL && try_settle_and_claim(worker, calls, 0, &none))
		finish_calls(worker, calls);
	else if (calls != NIL)
		settle_one_by_one(worker, calls);
	if (has_queued_requests(worker))
		fetch_master_key(worker);
}

static void
send_calls(KvWorker *worker, List *claimed)
{
	ListCell   *cell;

	foreach(cell, claimed)
	{
		KvCall	   *call = lfirst(cell);
		bool		started;

		kv_call_start(call, worker->pool, &started);
		if (started)
			worker->in_flight++;
		else
		{
			MemoryContext old = MemoryContextSwitchTo(worker->context);

			worker->ended = lappend(worker->ended, call);
			MemoryContextSwitchTo(old);
		}
	}
	if (claimed)
	{
		MemoryContext old = MemoryContextSwitchTo(worker->context);

		pfree(worker->after_user);
		worker->after_user = pstrdup(((KvCall *) llast(claimed))->user_id);
		MemoryContextSwitchTo(old);
	}
}

/* One turn of database work. */
void
kv_turn_take(KvWorker *worker)
{
	int			capacity = Max(kv_places() - worker->in_flight, 0);
	List	   *calls;
	List	   *claimed;

	worker->look = false;
	MemoryContextSwitchTo(worker->turn_context);
	calls = calls_to_settle(worker);
	if (capacity > 0 && kv_master_key_is_to_be_fetched())
	{
		settle_and_fetch(worker, calls);
		calls = NIL;
	}
	if (try_settle_and_claim(worker, calls, capacity, &claimed))
		finish_calls(worker, calls);
	else
	{
		settle_one_by_one(worker, calls);
		if (calls == NIL || !try_settle_and_claim(worker, NIL, capacity, &claimed))
			worker->next_retry = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), CLAIM_AGAIN_MS);
	}
	send_calls(worker, claimed);
	MemoryContextSwitchTo(worker->context);
	MemoryContextReset(worker->turn_context);
}
