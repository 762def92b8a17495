/*-------------------------------------------------------------------------
 * launcher.c
 *		Starts a worker in each database that has requests.
 *
 * When the server has started it has a worker look into every database once, for
 * requests that an earlier run left; after that it sleeps until a commit asks for a
 * worker that does not run, or maintenance is due. On a standby it starts with the promotion.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/launcher.h"

#include "access/genam.h"
#include "access/heapam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "base/error.h"
#include "base/settings.h"
#include "catalog/pg_database.h"
#include "gateway/key_use_flush.h"
#include "gateway/token_renewal.h"
#include "gateway/worker_slot.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

/* Workers on their way up at once: connecting is work, and most databases have no keyvault. */
#define STARTS_AT_ONCE 4

/* How long to wait when a start has to wait. */
#define RETRY_MS 500

typedef struct StartedWorker
{
	Oid			database;
	BackgroundWorkerHandle *handle;
} StartedWorker;

PGDLLEXPORT void keyvault_launcher_main(Datum arg);

/* Register the launcher, while the server preloads the library. */
void
kv_launcher_init(void)
{
	BackgroundWorker worker = {
		.bgw_name = "keyvault launcher",
		.bgw_type = "keyvault launcher",
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = 1,
		.bgw_library_name = "keyvault",
		.bgw_function_name = "keyvault_launcher_main",
	};

	/* pg_upgrade wants no connection but its own. */
	if (!IsBinaryUpgrade)
		RegisterBackgroundWorker(&worker);
}

/* Ask for a worker in every database that takes connections. */
static void
scan_databases(void)
{
	Relation	table;
	TableScanDesc scan;
	HeapTuple	tuple;

	StartTransactionCommand();
	(void) GetTransactionSnapshot();
	table = table_open(DatabaseRelationId, AccessShareLock);
	scan = table_beginscan_catalog(table, 0, NULL);
	while ((tuple = heap_getnext(scan, ForwardScanDirection)) != NULL)
	{
		Form_pg_database database = (Form_pg_database) GETSTRUCT(tuple);

		if (database->datallowconn && !database->datistemplate)
			kv_worker_request_start(database->oid);
	}
	table_endscan(scan);
	table_close(table, AccessShareLock);
	CommitTransactionCommand();
}

static BackgroundWorkerHandle *
start_worker(Oid database)
{
	BackgroundWorker worker = {
		.bgw_name = "keyvault worker",
		.bgw_type = "keyvault worker",
		.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION,
		.bgw_start_time = BgWorkerStart_RecoveryFinished,
		.bgw_restart_time = BGW_NEVER_RESTART,
		.bgw_library_name = "keyvault",
		.bgw_function_name = "keyvault_worker_main",
		.bgw_main_arg = ObjectIdGetDatum(database),
		.bgw_notify_pid = MyProcPid,
	};
	BackgroundWorkerHandle *handle;

	if (RegisterDynamicBackgroundWorker(&worker, &handle))
		return handle;
	ereport(LOG,
			(errmsg("no room for a keyvault worker in database with OID %u", database),
			 errhint("Increase max_worker_processes by the number of databases with requests.")));
	return NULL;
}

/* Forget workers that have ended, and return how many are still on their way up. */
static int
check_started(List **started)
{
	ListCell   *cell;
	int			starting = 0;

	foreach(cell, *started)
	{
		StartedWorker *worker = lfirst(cell);
		pid_t		pid;
		BgwHandleStatus status = GetBackgroundWorkerPid(worker->handle, &pid);

		if (status == BGWH_NOT_YET_STARTED)
			starting++;
		if (status != BGWH_STOPPED && status != BGWH_POSTMASTER_DIED)
			continue;
		kv_worker_start_failed(worker->database);
		pfree(worker->handle);
		pfree(worker);
		*started = foreach_delete_current(*started, cell);
	}
	return starting;
}

/* Start the workers that are wanted; true when one has to wait. */
static bool
start_wanted(List **started)
{
	Oid			databases[STARTS_AT_ONCE];
	bool		later;
	int			room = STARTS_AT_ONCE - check_started(started);
	int			n = kv_worker_next_to_start(databases, room, &later);

	for (int i = 0; i < n; i++)
	{
		BackgroundWorkerHandle *handle = start_worker(databases[i]);

		if (handle == NULL)
		{
			kv_worker_start_failed(databases[i]);
			kv_worker_request_start(databases[i]);
			later = true;
		}
		else
		{
			StartedWorker *worker = palloc(sizeof(StartedWorker));

			worker->database = databases[i];
			worker->handle = handle;
			*started = lappend(*started, worker);
		}
	}
	return later;
}

/* Have a worker look into every database that has keyvault when that is due; returns how long until it is again. */
static long
visit_databases(TimestampTz *visited)
{
	TimestampTz now = GetCurrentTimestamp();

	if (kv_maintenance_interval == 0)
		return -1;
	if (TimestampDifferenceExceeds(*visited, now, kv_maintenance_interval))
	{
		kv_worker_request_visits();
		*visited = now;
	}
	return TimestampDifferenceMilliseconds(now, TimestampTzPlusMilliseconds(*visited, kv_maintenance_interval));
}

void
keyvault_launcher_main(Datum arg)
{
	List	   *started = NIL;
	TimestampTz visited = GetCurrentTimestamp();	/* scan_databases does */
	bool		reloaded = false;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, die);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnection(NULL, NULL, 0);
	MemoryContextSwitchTo(TopMemoryContext);
	kv_worker_launcher_attach();
	scan_databases();
	for (;;)
	{
		long		timeout_ms;
		long		uses_ms;
		long		visit_ms;

		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
		{
			ConfigReloadPending = false;
			ProcessConfigFile(PGC_SIGHUP);
			scan_databases();	/* keyvault.databases may name more */
			reloaded = true;
		}
		if (kv_worker_take_scan_request())
			scan_databases();
		timeout_ms = kv_token_renewal_serve(reloaded);
		reloaded = false;
		uses_ms = kv_key_use_flush_serve();
		if (uses_ms >= 0 && (timeout_ms < 0 || timeout_ms > uses_ms))
			timeout_ms = uses_ms;
		visit_ms = visit_databases(&visited);
		if (visit_ms >= 0 && (timeout_ms < 0 || timeout_ms > visit_ms))
			timeout_ms = visit_ms;
		if (start_wanted(&started) && (timeout_ms < 0 || timeout_ms > RETRY_MS))
			timeout_ms = RETRY_MS;
		MemoryContextSwitchTo(TopMemoryContext);
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_EXIT_ON_PM_DEATH | (timeout_ms >= 0 ? WL_TIMEOUT : 0),
						 timeout_ms, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
}
