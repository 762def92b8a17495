/*-------------------------------------------------------------------------
 * worker.c
 *		The event loop that sends a database's requests.
 *
 * One wait for the latch and for every connection; nothing is polled. Each turn settles
 * what has ended and claims what may start, in one transaction, then sends: no
 * transaction is open while the network works. Interrupts are served between turns,
 * whatever calls hang.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/settings.h"
#include "commands/dbcommands.h"
#include "commands/extension.h"
#include "gateway/call.h"
#include "gateway/transfer.h"
#include "gateway/worker_slot.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/varlena.h"
#include "utils/wait_event.h"

/* The worker waits no longer than this for a row that somebody else has locked. */
#define LOCK_TIMEOUT "20ms"

/* When to try a settlement again that found its user's balance locked; doubled each time. */
#define SETTLE_AGAIN_MS		100
#define SETTLE_AGAIN_MAX_MS	5000

/* When to look again after the queue could not be read. */
#define CLAIM_AGAIN_MS		500

/* Of the places for calls, one in so many is kept for users with nothing under way. */
#define RESERVE_SHARE		10

#define MAINTENANCE_EVERY_MS (6 * 60 * 60 * 1000)

/* The state of this process; everything in it lives in context. */
typedef struct Worker
{
	MemoryContext context;
	MemoryContext turn_context; /* reset after each turn */
	KvTransferPool *pool;
	WaitEventSet *events;
	int			in_flight;
	List	   *ended;			/* calls to settle */
	char	   *after_user;		/* the user who was served last */
	uint64		wakeups;		/* how many are accounted for */
	bool		look;			/* the queue may have something for us */
	TimestampTz next_retry;		/* when a queued request becomes due */
	TimestampTz idle_since;
	TimestampTz maintained;
} Worker;

PGDLLEXPORT void keyvault_worker_main(Datum arg);

static void
begin_turn(const char *activity)
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

static void
end_turn(void)
{
	PopActiveSnapshot();
	CommitTransactionCommand();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/* Report the error under way, and forget it with its transaction; returns its SQLSTATE. */
static int
roll_back_turn(MemoryContext context, char **message)
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

static bool
error_may_pass(int code)
{
	return code == ERRCODE_LOCK_NOT_AVAILABLE || code == ERRCODE_T_R_SERIALIZATION_FAILURE ||
		code == ERRCODE_T_R_DEADLOCK_DETECTED || code == ERRCODE_QUERY_CANCELED;
}

static void
finish_call(Worker *worker, KvCall *call)
{
	worker->ended = list_delete_ptr(worker->ended, call);
	kv_call_free(call, worker->pool);
}

/* Mark as unknown, outside of the turn that failed, a call that cannot be settled. */
static void
abandon_call(Worker *worker, KvCall *call, char *reason)
{
	char	   *message;

	ereport(WARNING,
			(errmsg("answer of a provider call cannot be stored: %s", reason),
			 errhint("The request's outcome is unknown; see keyvault.request_status.")));
	PG_TRY();
	{
		begin_turn("giving a call up");
		kv_call_abandon(call, "the answer could not be stored; the server log says why");
		end_turn();
	}
	PG_CATCH();
	{
		(void) roll_back_turn(worker->turn_context, &message);
	}
	PG_END_TRY();
}

/* Settle one call in a transaction of its own; false when it has to wait for a lock. */
static bool
settle_alone(Worker *worker, KvCall *call)
{
	volatile bool settled = true;
	char	   *message;

	PG_TRY();
	{
		begin_turn("settling a call");
		kv_call_settle(call);
		end_turn();
	}
	PG_CATCH();
	{
		if (error_may_pass(roll_back_turn(worker->turn_context, &message)))
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

/* The calls that have ended and need not wait, in the turn's memory. */
static List *
calls_to_settle(Worker *worker)
{
	TimestampTz now = GetCurrentTimestamp();
	List	   *calls = NIL;
	ListCell   *cell;

	foreach(cell, worker->ended)
		if (((KvCall *) lfirst(cell))->settle_at <= now)
			calls = lappend(calls, lfirst(cell));
	return calls;
}

/* After a turn failed: settle each call by itself, so that one cannot hold up the others. */
static void
settle_one_by_one(Worker *worker, List *calls)
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
settle_and_claim(Worker *worker, List *calls, int capacity)
{
	ListCell   *cell;
	List	   *claimed = NIL;

	begin_turn("settling and claiming calls");
	foreach(cell, calls)
	{
		CHECK_FOR_INTERRUPTS();
		kv_call_settle(lfirst(cell));
	}
	MemoryContextSwitchTo(worker->turn_context);
	if (capacity > 0)
		claimed = kv_call_claim(capacity, kv_max_concurrent_requests / RESERVE_SHARE,
								kv_max_concurrent_requests_per_user, worker->after_user);
	/* With no place left, the next call that ends gives cause to look. */
	if (list_length(claimed) < capacity)
		worker->next_retry = kv_call_next_retry();
	else
		TIMESTAMP_NOEND(worker->next_retry);
	end_turn();
	MemoryContextSwitchTo(worker->turn_context);
	return claimed;
}

/* settle_and_claim, with an error reported and rolled back; false then. */
static bool
try_settle_and_claim(Worker *worker, List *calls, int capacity, List **claimed)
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
		int			code = roll_back_turn(worker->turn_context, &message);

		if (calls == NIL && !error_may_pass(code))
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
send_calls(Worker *worker, List *claimed)
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
static void
take_turn(Worker *worker)
{
	int			capacity = Max(kv_max_concurrent_requests - worker->in_flight, 0);
	List	   *calls;
	List	   *claimed;
	ListCell   *cell;

	worker->look = false;
	MemoryContextSwitchTo(worker->turn_context);
	calls = calls_to_settle(worker);
	if (try_settle_and_claim(worker, calls, capacity, &claimed))
	{
		foreach(cell, calls)
			finish_call(worker, lfirst(cell));
		if (calls != NIL)
			kv_worker_announce_settlement();
	}
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

/* Collect what the network has finished. */
static void
collect_ended(Worker *worker)
{
	KvTransferResult result;

	kv_transfer_pool_advance(worker->pool);
	while (kv_transfer_next(worker->pool, &result))
	{
		KvCall	   *call = result.owner;

		call->result = result;
		worker->ended = lappend(worker->ended, call);
		worker->in_flight--;
	}
}

/* Make the partitions that are missing; when a lock is in the way, another time. */
static void
maintain(Worker *worker)
{
	static KvStatement partitions = {"SELECT keyvault._make_usage_partitions()", 0};
	KvOwnerScope scope;
	char	   *message;

	worker->maintained = GetCurrentTimestamp();
	PG_TRY();
	{
		begin_turn("making partitions");
		kv_owner_begin(&scope);
		kv_statement_execute(&partitions, NULL, NULL);
		kv_owner_end(&scope);
		end_turn();
	}
	PG_CATCH();
	{
		if (!error_may_pass(roll_back_turn(worker->turn_context, &message)))
			ereport(WARNING, (errmsg("partitions of keyvault.usage_records could not be made: %s", message)));
		worker->maintained = TimestampTzPlusMilliseconds(worker->maintained, 60000 - MAINTENANCE_EVERY_MS);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(worker->context);
	MemoryContextReset(worker->turn_context);
}

static void
sooner(TimestampTz now, TimestampTz when, long *timeout_ms)
{
	long		ms;

	if (TIMESTAMP_IS_NOEND(when))
		return;
	ms = TimestampDifferenceMilliseconds(now, when);
	if (*timeout_ms < 0 || ms < *timeout_ms)
		*timeout_ms = ms;
}

/* When a call that has ended may be settled; infinity when none has. */
static TimestampTz
next_settlement(const Worker *worker)
{
	TimestampTz next;
	ListCell   *cell;

	TIMESTAMP_NOEND(next);
	foreach(cell, worker->ended)
		next = Min(next, ((KvCall *) lfirst(cell))->settle_at);
	return next;
}

static bool
is_idle(const Worker *worker)
{
	return worker->in_flight == 0 && worker->ended == NIL && TIMESTAMP_IS_NOEND(worker->next_retry);
}

/* Wait until the latch is set, the network has something, or a time has come. */
static void
wait_for_work(Worker *worker)
{
	WaitEvent	event;
	TimestampTz now = GetCurrentTimestamp();
	long		timeout_ms = kv_transfer_pool_timeout(worker->pool);

	sooner(now, worker->next_retry, &timeout_ms);
	sooner(now, next_settlement(worker), &timeout_ms);
	if (is_idle(worker))
		sooner(now, TimestampTzPlusMilliseconds(worker->idle_since, kv_worker_idle_timeout), &timeout_ms);
	(void) WaitEventSetWait(worker->events, timeout_ms, &event, 1, PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
}

static void
serve_interrupts(Worker *worker)
{
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
		kv_transfer_pool_configure(worker->pool, kv_per_host_connections, kv_max_concurrent_requests);
		worker->look = true;
	}
}

/* Leave when there was nothing to do for long enough, so that the database is not pinned. */
static void
leave_if_idle(Worker *worker)
{
	TimestampTz now = GetCurrentTimestamp();

	if (!is_idle(worker))
		worker->idle_since = now;
	else if (TimestampDifferenceExceeds(worker->idle_since, now, kv_worker_idle_timeout) &&
			 kv_worker_detach_unless_woken(worker->wakeups))
		proc_exit(0);
}

static bool
turn_is_due(Worker *worker)
{
	TimestampTz now = GetCurrentTimestamp();
	uint64		wakeups = kv_worker_wakeups();

	if (wakeups != worker->wakeups)
		worker->look = true;
	worker->wakeups = wakeups;
	return worker->look || worker->next_retry <= now || next_settlement(worker) <= now;
}

/* Is this database one of keyvault.databases? */
static bool
database_is_served(void)
{
	char	   *list = pstrdup(kv_databases);
	List	   *names = NIL;
	ListCell   *cell;
	char	   *mine;

	if (kv_databases[0] == '\0')
		return true;
	if (!SplitIdentifierString(list, ',', &names))
	{
		ereport(WARNING,
				(errmsg("keyvault.databases is not a list of names"),
				 errhint("Write names with commas between them, and no database is served until then.")));
		return false;
	}
	mine = get_database_name(MyDatabaseId);
	foreach(cell, names)
		if (strcmp(lfirst(cell), mine) == 0)
			return true;
	return false;
}

/* Connect, and leave again where there is nothing to do. */
static void
start_up(Worker *worker, Oid database)
{
	bool		served;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	pqsignal(SIGINT, SIG_IGN);	/* there is no statement to cancel */
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(database, InvalidOid, 0);
	if (!kv_worker_attach(database))
		proc_exit(0);
	StartTransactionCommand();
	served = OidIsValid(get_extension_oid("keyvault", true)) && database_is_served();
	CommitTransactionCommand();
	if (!served && kv_worker_detach_unless_woken(kv_worker_wakeups()))
		proc_exit(0);

	worker->context = AllocSetContextCreate(TopMemoryContext, "keyvault worker", ALLOCSET_DEFAULT_SIZES);
	worker->turn_context = AllocSetContextCreate(worker->context, "keyvault worker turn", ALLOCSET_DEFAULT_SIZES);
	MemoryContextSwitchTo(worker->context);
	worker->pool = kv_transfer_pool_create();
	kv_transfer_pool_configure(worker->pool, kv_per_host_connections, kv_max_concurrent_requests);
	worker->events = KvCreateWaitEventSet(3);
	AddWaitEventToSet(worker->events, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(worker->events, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	AddWaitEventToSet(worker->events, WL_SOCKET_READABLE, kv_transfer_pool_fd(worker->pool), NULL, NULL);
	worker->after_user = pstrdup("");
	worker->look = true;
	worker->idle_since = GetCurrentTimestamp();
}

/* Take over what an earlier worker left behind. */
static void
find_lost_calls(Worker *worker)
{
	begin_turn("looking for lost calls");
	MemoryContextSwitchTo(worker->context);
	worker->ended = kv_call_find_lost();
	end_turn();
	MemoryContextSwitchTo(worker->context);
	if (worker->ended != NIL)
		ereport(LOG,
				(errmsg("%d provider calls were under way when the last keyvault worker ended; their outcome is unknown",
						list_length(worker->ended))));
}

void
keyvault_worker_main(Datum arg)
{
	Worker		worker = {0};

	start_up(&worker, DatumGetObjectId(arg));
	find_lost_calls(&worker);
	for (;;)
	{
		serve_interrupts(&worker);
		if (TimestampDifferenceExceeds(worker.maintained, GetCurrentTimestamp(), MAINTENANCE_EVERY_MS))
			maintain(&worker);
		collect_ended(&worker);
		if (turn_is_due(&worker))
			take_turn(&worker);
		leave_if_idle(&worker);
		wait_for_work(&worker);
	}
}
