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
#include "crypto/reveal.h"
#include "gateway/call.h"
#include "gateway/claim.h"
#include "gateway/key_use_flush.h"
#include "gateway/maintenance.h"
#include "gateway/places.h"
#include "gateway/reference.h"
#include "gateway/transfer.h"
#include "gateway/turn.h"
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
#include "utils/timestamp.h"
#include "utils/varlena.h"
#include "vault/key_use.h"
#include "vault/sealed_key.h"
#include "utils/wait_event.h"

#define BOXES_AT_ONCE 100

/* When to try boxes again that could not be opened, and those behind a lock. */
#define BOXES_AGAIN_MS	60000
#define BOXES_LOCKED_MS	500

PGDLLEXPORT void keyvault_worker_main(Datum arg);

/* Collect what the network has finished. */
static void
collect_ended(KvWorker *worker)
{
	KvTransferResult result;

	kv_transfer_pool_advance(worker->pool);
	while (kv_transfer_next(worker->pool, &result))
	{
		KvCall	   *call = result.owner;

		if (kv_call_go_on(call, worker->pool, &result))
			continue;
		worker->ended = lappend(worker->ended, call);
		worker->in_flight--;
	}
}

static TimestampTz
in_ms(int ms)
{
	return TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ms);
}

/* Make records of sealed keys: of new ones, or, when that is due, of those as well that failed. */
static void
convert_boxes(KvWorker *worker)
{
	bool		all = worker->boxes_again <= GetCurrentTimestamp();
	bool		failed;
	int			n = kv_sealed_key_convert(BOXES_AT_ONCE, all, &failed);

	if (n < BOXES_AT_ONCE)
		TIMESTAMP_NOEND(worker->boxes_due);
	if (all && n < BOXES_AT_ONCE)
		worker->boxes_again = worker->boxes_failed || failed ? in_ms(BOXES_AGAIN_MS) : worker->boxes_due;
	else if (failed && !all)
		worker->boxes_again = Min(worker->boxes_again, in_ms(BOXES_AGAIN_MS));
	worker->boxes_failed = all && n == BOXES_AT_ONCE && (worker->boxes_failed || failed);
}

static void
make_sealing_key(KvWorker *worker)
{
	kv_sealed_key_make_ready();
}

/* Do work with sealed keys in a turn of its own; when that is not possible, for want of a master key, another time. */
static bool
take_turn_for_boxes(KvWorker *worker, const char *activity, void (*work) (KvWorker *worker))
{
	volatile bool done = true;
	char	   *message;

	PG_TRY();
	{
		kv_turn_begin(activity);
		work(worker);
		kv_turn_end();
	}
	PG_CATCH();
	{
		int			code = kv_turn_roll_back(worker->turn_context, &message);

		if (!kv_turn_error_may_pass(code))
			ereport(WARNING,
					(errcode(code), errmsg("sealed keys cannot be opened: %s", message),
					 errhint("The worker tries again in a minute, and after a reload.")));
		worker->boxes_due = in_ms(kv_turn_error_may_pass(code) ? BOXES_LOCKED_MS : BOXES_AGAIN_MS);
		worker->boxes_again = Max(worker->boxes_again, worker->boxes_due);
		done = false;
	}
	PG_END_TRY();
	MemoryContextSwitchTo(worker->context);
	MemoryContextReset(worker->turn_context);
	return done;
}

/* Neither keeps the other from its work. */
static void
open_boxes(KvWorker *worker)
{
	bool		made = kv_reveal || take_turn_for_boxes(worker, "making a sealing key", make_sealing_key);
	TimestampTz due = worker->boxes_due;

	if (take_turn_for_boxes(worker, "opening sealed keys", convert_boxes) && !made)
		worker->boxes_due = Min(worker->boxes_due, due);
}

/* Are there sealed keys to open? With keyvault.reveal off every wake-up may be about one. */
static bool
boxes_are_due(const KvWorker *worker)
{
	return Min(worker->boxes_due, worker->boxes_again) <= GetCurrentTimestamp() ||
		(!kv_reveal && worker->look && TIMESTAMP_IS_NOEND(worker->boxes_due));
}

/* Look for sealed keys at the next turn: nobody announces those of a restore, or that one passed over is no longer locked. */
static void
expect_boxes(KvWorker *worker)
{
	if (TIMESTAMP_IS_NOEND(worker->boxes_due))
		worker->boxes_due = 0;
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
next_settlement(const KvWorker *worker)
{
	TimestampTz next;
	ListCell   *cell;

	TIMESTAMP_NOEND(next);
	foreach(cell, worker->ended)
		next = Min(next, ((KvCall *) lfirst(cell))->settle_at);
	return next;
}

static bool
is_idle(const KvWorker *worker)
{
	return worker->in_flight == 0 && worker->ended == NIL && TIMESTAMP_IS_NOEND(worker->next_retry);
}

/* Wait until the latch is set, the network has something, or a time has come. */
static void
wait_for_work(KvWorker *worker)
{
	WaitEvent	event;
	TimestampTz now = GetCurrentTimestamp();
	long		timeout_ms = kv_transfer_pool_timeout(worker->pool);

	sooner(now, worker->next_retry, &timeout_ms);
	sooner(now, kv_maintenance_due_at(), &timeout_ms);
	sooner(now, Min(worker->boxes_due, worker->boxes_again), &timeout_ms);
	sooner(now, next_settlement(worker), &timeout_ms);
	if (is_idle(worker))
		sooner(now, TimestampTzPlusMilliseconds(worker->idle_since, kv_worker_idle_timeout), &timeout_ms);
	(void) WaitEventSetWait(worker->events, timeout_ms, &event, 1, PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
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

/* Leave a database without the extension, or one that keyvault.databases leaves out. */
static void
leave_if_not_served(KvWorker *worker)
{
	bool		installed;
	bool		served;

	StartTransactionCommand();
	installed = OidIsValid(get_extension_oid("keyvault", true));
	served = installed && database_is_served();
	if (!installed)
		kv_key_use_forget_database(MyDatabaseId);
	CommitTransactionCommand();
	if (served)
		return;
	if (installed)
		kv_key_use_flush_now(worker);
	while (!kv_worker_detach_unless_woken(kv_worker_wakeups()))
		;
	proc_exit(0);
}

/* How many calls there may be at once, and connections. */
static void
configure_network(KvWorker *worker)
{
	kv_places_configure();
	kv_transfer_pool_configure(worker->pool, kv_per_host_connections, kv_places());
}

static void
serve_interrupts(KvWorker *worker)
{
	/* lock_timeout needs the signal of pg_cancel_backend; between turns there is nothing to cancel. */
	QueryCancelPending = false;
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
		leave_if_not_served(worker);
		configure_network(worker);
		kv_reference_forget_all();
		kv_maintenance_reload();
		worker->look = true;
		worker->boxes_due = 0;
		worker->boxes_again = 0;
	}
}

/* Leave when there was nothing to do for long enough, so that the database is not pinned. */
static void
leave_if_idle(KvWorker *worker)
{
	TimestampTz now = GetCurrentTimestamp();

	if (!is_idle(worker))
		worker->idle_since = now;
	else if (TimestampDifferenceExceeds(worker->idle_since, now, kv_worker_idle_timeout))
	{
		kv_key_use_flush_now(worker);
		if (kv_worker_detach_unless_woken(worker->wakeups))
			proc_exit(0);
	}
}

static bool
turn_is_due(KvWorker *worker)
{
	TimestampTz now = GetCurrentTimestamp();
	uint64		wakeups = kv_worker_wakeups();

	if (wakeups != worker->wakeups)
		worker->look = true;
	worker->wakeups = wakeups;
	return worker->look || Min(worker->boxes_due, worker->boxes_again) <= now || worker->next_retry <= now || next_settlement(worker) <= now;
}

/* Connect, and leave again where there is nothing to do. */
static void
start_up(KvWorker *worker, Oid database)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(database, InvalidOid, 0);
	/* What it does under locks has to see what was committed before it had them, whatever the server's default is. */
	SetConfigOption("default_transaction_isolation", "read committed", PGC_SUSET, PGC_S_OVERRIDE);
	if (!kv_worker_attach(database))
		proc_exit(0);

	worker->context = AllocSetContextCreate(TopMemoryContext, "keyvault worker", ALLOCSET_DEFAULT_SIZES);
	worker->turn_context = AllocSetContextCreate(worker->context, "keyvault worker turn", ALLOCSET_DEFAULT_SIZES);
	leave_if_not_served(worker);
	kv_worker_note_served(database);
	MemoryContextSwitchTo(worker->context);
	worker->pool = kv_transfer_pool_create();
	configure_network(worker);
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
find_lost_calls(KvWorker *worker)
{
	kv_turn_begin("looking for lost calls");
	MemoryContextSwitchTo(worker->context);
	worker->ended = kv_claim_lost_calls();
	kv_turn_end();
	MemoryContextSwitchTo(worker->context);
	if (worker->ended != NIL)
		ereport(LOG,
				(errmsg("%d provider calls were under way when the last keyvault worker ended; their outcome is unknown",
						list_length(worker->ended))));
}

void
keyvault_worker_main(Datum arg)
{
	KvWorker	worker = {0};

	kv_reveal_become_keeper();
	start_up(&worker, DatumGetObjectId(arg));
	find_lost_calls(&worker);
	for (;;)
	{
		serve_interrupts(&worker);
		if (kv_maintenance_due_at() <= GetCurrentTimestamp())
		{
			kv_maintenance_take(&worker);
			expect_boxes(&worker);
		}
		collect_ended(&worker);
		if (turn_is_due(&worker))
		{
			if (boxes_are_due(&worker))
				open_boxes(&worker);
			kv_turn_take(&worker);
		}
		kv_key_use_flush_if_due(&worker);
		leave_if_idle(&worker);
		wait_for_work(&worker);
	}
}
