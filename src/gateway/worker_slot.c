/*-------------------------------------------------------------------------
 * worker_slot.c
 *		Which database has a worker, and how to wake it.
 *
 * Shared memory holds plain data: a process is known by the number of its PGPROC. A slot
 * exists for a database while it has a worker or wants one. A wake-up is counted before
 * the latch is set, and a worker leaves only if no wake-up came since it last looked, so
 * that none is lost.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/worker_slot.h"

#include <signal.h>

#include "access/xact.h"
#include "base/pg_version.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lwlock.h"
#include "storage/proc.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#define SLOTS 256

/* Waiters of different databases share a variable now and then; they look again and sleep on. */
#define SETTLEMENTS 16

#define NO_PROCESS (-1)

/* A stop that its session did not live to end is over by itself then. */
#define STOP_LASTS_MS 30000

#define RESTART_AFTER_MS 2000

typedef struct WorkerSlot
{
	Oid			database;		/* InvalidOid: the slot is free */
	int			worker;			/* number of the worker's PGPROC, or NO_PROCESS */
	int			pid;
	bool		wanted;			/* to be started */
	bool		starting;		/* handed to the postmaster, not attached yet */
	uint64		wakeups;
	TimestampTz stopped_until;	/* no start before then */
} WorkerSlot;

typedef struct WorkerSlots
{
	LWLock		lock;
	int			launcher;		/* number of the launcher's PGPROC, or NO_PROCESS */
	bool		scan_databases; /* a slot was missing: the launcher looks at every database again */
	WorkerSlot	slots[SLOTS];
	Oid			served[SLOTS];	/* databases that a worker found keyvault in; InvalidOid: free */
	ConditionVariable settlements[SETTLEMENTS];
} WorkerSlots;

static WorkerSlots *shared = NULL;

/* This process is the worker of that slot. */
static WorkerSlot *attached = NULL;

/* What this transaction has done that others wait for; dropped when it ends. */
static bool wake_at_commit = false;
static bool announce_at_commit = false;

Size
kv_worker_slot_shmem_size(void)
{
	return sizeof(WorkerSlots);
}

void
kv_worker_slot_shmem_init(void *memory, bool found)
{
	shared = memory;
	if (found)
		return;
	memset(shared, 0, sizeof(*shared));
	LWLockInitialize(&shared->lock, LWLockNewTrancheId());
	shared->launcher = NO_PROCESS;
	for (int i = 0; i < SLOTS; i++)
		shared->slots[i].worker = NO_PROCESS;
	for (int i = 0; i < SETTLEMENTS; i++)
		ConditionVariableInit(&shared->settlements[i]);
}

static ConditionVariable *
settlement_of(Oid database)
{
	return &shared->settlements[database % SETTLEMENTS];
}

static void
set_latch_of(int process)
{
	if (process != NO_PROCESS)
		SetLatch(&ProcGlobal->allProcs[process].procLatch);
}

/* The database's slot, a new one if create; NULL when there is none. The lock is held. */
static WorkerSlot *
find_slot(Oid database, bool create)
{
	WorkerSlot *unused = NULL;

	for (int i = 0; i < SLOTS; i++)
	{
		WorkerSlot *slot = &shared->slots[i];

		if (slot->database == database)
			return slot;
		if (slot->database == InvalidOid && unused == NULL)
			unused = slot;
	}
	if (!create || unused == NULL)
		return NULL;
	memset(unused, 0, sizeof(*unused));
	unused->database = database;
	unused->worker = NO_PROCESS;
	return unused;
}

/* Have the database's worker look at its queue, starting it if need be. */
void
kv_worker_wake(Oid database)
{
	WorkerSlot *slot;
	int			process;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(database, true);
	process = shared->launcher;
	if (slot == NULL)
		shared->scan_databases = true;
	else
	{
		slot->wakeups++;
		if (slot->worker != NO_PROCESS)
			process = slot->worker;
		else
			slot->wanted = true;
	}
	LWLockRelease(&shared->lock);
	set_latch_of(process);
}

/* Have the launcher look at what there is to do. */
void
kv_worker_wake_launcher(void)
{
	int			launcher;

	LWLockAcquire(&shared->lock, LW_SHARED);
	launcher = shared->launcher;
	LWLockRelease(&shared->lock);
	set_latch_of(launcher);
}

/* Wake this database's worker once if the transaction commits. */
void
kv_worker_wake_at_commit(void)
{
	wake_at_commit = true;
}

/* Tell those who wait for a request if the transaction commits. */
void
kv_worker_announce_at_commit(void)
{
	announce_at_commit = true;
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT && event != XACT_EVENT_PREPARE)
		return;
	if (wake_at_commit && event == XACT_EVENT_COMMIT && MyProc != NULL)
		kv_worker_wake(MyDatabaseId);
	if (announce_at_commit && event == XACT_EVENT_COMMIT)
		kv_worker_announce_settlement();
	wake_at_commit = announce_at_commit = false;
}

/* Follow the end of transactions; called once, while the server preloads the library. */
void
kv_worker_slot_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
}

/* Get ready to wait for the next settlement in this database; then look at the table, then wait. */
void
kv_worker_await_settlement_begin(void)
{
	ConditionVariablePrepareToSleep(settlement_of(MyDatabaseId));
}

/* Wait for a settlement; false when the time is over. */
bool
kv_worker_await_settlement(long timeout_ms)
{
	return !ConditionVariableTimedSleep(settlement_of(MyDatabaseId), timeout_ms, PG_WAIT_EXTENSION);
}

void
kv_worker_await_settlement_end(void)
{
	ConditionVariableCancelSleep();
}

/* Tell those who wait that this database's settled requests have changed. */
void
kv_worker_announce_settlement(void)
{
	ConditionVariableBroadcast(settlement_of(MyDatabaseId));
}

static void
launcher_detach(int code, Datum arg)
{
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	shared->launcher = NO_PROCESS;
	LWLockRelease(&shared->lock);
}

/* Make this process the one that starts workers. */
void
kv_worker_launcher_attach(void)
{
	before_shmem_exit(launcher_detach, (Datum) 0);
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	shared->launcher = KvMyProcNumber();
	for (int i = 0; i < SLOTS; i++)
		shared->slots[i].starting = false;
	LWLockRelease(&shared->lock);
}

/* Want a worker for a database that has none. The lock is held. */
static void
want_worker(Oid database)
{
	WorkerSlot *slot = find_slot(database, true);

	if (slot != NULL && slot->worker == NO_PROCESS)
		slot->wanted = true;
}

/* Note that a database is to have a worker; the launcher calls it. */
void
kv_worker_request_start(Oid database)
{
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	want_worker(database);
	LWLockRelease(&shared->lock);
}

/* The same for every database that a worker found keyvault in, so that maintenance is done there. */
void
kv_worker_request_visits(void)
{
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SLOTS; i++)
		if (OidIsValid(shared->served[i]))
			want_worker(shared->served[i]);
	LWLockRelease(&shared->lock);
}

/* Forget that a database is served: it may be gone. The lock is held. */
static void
forget_served(Oid database)
{
	for (int i = 0; i < SLOTS; i++)
		if (shared->served[i] == database)
			shared->served[i] = InvalidOid;
}

/* Remember a database that has keyvault, for visits. */
void
kv_worker_note_served(Oid database)
{
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	forget_served(database);
	for (int i = 0; i < SLOTS; i++)
		if (!OidIsValid(shared->served[i]))
		{
			shared->served[i] = database;
			break;
		}
	LWLockRelease(&shared->lock);
}

/*
 * Take up to max databases whose worker is to be started now; they count as starting.
 * later tells whether others are wanted that have to wait.
 */
int
kv_worker_next_to_start(Oid *databases, int max, bool *later)
{
	TimestampTz now = GetCurrentTimestamp();
	int			n = 0;

	*later = false;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < SLOTS; i++)
	{
		WorkerSlot *slot = &shared->slots[i];

		if (slot->database == InvalidOid || !slot->wanted || slot->starting || slot->worker != NO_PROCESS)
			continue;
		if (n == max || slot->stopped_until > now)
		{
			*later = true;
			continue;
		}
		slot->stopped_until = 0;
		slot->wanted = false;
		slot->starting = true;
		databases[n++] = slot->database;
	}
	LWLockRelease(&shared->lock);
	return n;
}

/* True once after a database found no slot, so that every database has to be looked at. */
bool
kv_worker_take_scan_request(void)
{
	bool		scan;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	scan = shared->scan_databases;
	shared->scan_databases = false;
	LWLockRelease(&shared->lock);
	return scan;
}

static void
release_slot(WorkerSlot *slot)
{
	slot->worker = NO_PROCESS;
	slot->pid = 0;
	slot->starting = false;
	if (!slot->wanted && slot->stopped_until < GetCurrentTimestamp())
		slot->database = InvalidOid;
}

/* A worker ended before it could attach: its database is gone, or the postmaster had no room. */
void
kv_worker_start_failed(Oid database)
{
	WorkerSlot *slot;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(database, false);
	if (slot != NULL && slot->worker == NO_PROCESS)
	{
		if (slot->starting)
			forget_served(database);
		release_slot(slot);
	}
	LWLockRelease(&shared->lock);
}

static void
worker_detach(int code, Datum arg)
{
	TimestampTz again = GetCurrentTimestamp() + RESTART_AFTER_MS * INT64CONST(1000);
	int			launcher;

	if (attached == NULL)
		return;
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	/* One that failed, or was terminated, is started again, but not in a tight loop. */
	attached->wanted = true;
	attached->stopped_until = Max(attached->stopped_until, again);
	release_slot(attached);
	launcher = shared->launcher;
	LWLockRelease(&shared->lock);
	attached = NULL;
	set_latch_of(launcher);
}

/* Become the worker of a database; false when it has one, or is to have none. */
bool
kv_worker_attach(Oid database)
{
	WorkerSlot *slot;
	bool		taken;

	before_shmem_exit(worker_detach, (Datum) 0);
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(database, true);
	taken = slot == NULL || slot->worker != NO_PROCESS || slot->stopped_until > GetCurrentTimestamp();
	if (!taken)
	{
		slot->worker = KvMyProcNumber();
		slot->pid = MyProcPid;
		slot->starting = false;
		attached = slot;
	}
	else if (slot != NULL)
	{
		/* One that a command keeps away is to come when that has ended. */
		slot->wanted = slot->wanted || slot->worker == NO_PROCESS;
		slot->starting = false;
	}
	LWLockRelease(&shared->lock);
	return !taken;
}

/* How often this worker was woken so far. */
uint64
kv_worker_wakeups(void)
{
	uint64		wakeups;

	LWLockAcquire(&shared->lock, LW_SHARED);
	wakeups = attached->wakeups;
	LWLockRelease(&shared->lock);
	return wakeups;
}

/* Give the slot up, unless a wake-up came after the given one. */
bool
kv_worker_detach_unless_woken(uint64 wakeups_seen)
{
	bool		detached;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	detached = attached->wakeups == wakeups_seen;
	if (detached)
	{
		release_slot(attached);
		attached = NULL;
	}
	LWLockRelease(&shared->lock);
	return detached;
}

/* Have the database's worker leave, and keep it from coming back until kv_worker_stop_end. */
void
kv_worker_stop(Oid database)
{
	for (;;)
	{
		WorkerSlot *slot;
		int			pid = 0;
		bool		busy;

		LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
		slot = find_slot(database, true);
		busy = slot != NULL && (slot->worker != NO_PROCESS || slot->starting);
		if (slot != NULL)
		{
			slot->stopped_until = GetCurrentTimestamp() + STOP_LASTS_MS * INT64CONST(1000);
			pid = slot->pid;
		}
		LWLockRelease(&shared->lock);
		if (!busy)
			break;
		if (pid != 0)
			(void) kill(pid, SIGTERM);
		CHECK_FOR_INTERRUPTS();
		pg_usleep(5000);
	}
}

/* Allow a worker again, and start one if that is wanted by now, or was ended; unless the database is gone. */
void
kv_worker_stop_end(Oid database, bool still_there)
{
	WorkerSlot *slot;
	int			launcher;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	slot = find_slot(database, false);
	if (!still_there)
		forget_served(database);
	if (slot != NULL)
	{
		slot->stopped_until = 0;
		slot->wanted = slot->wanted && still_there;
		if (slot->worker == NO_PROCESS)
			release_slot(slot);
	}
	launcher = shared->launcher;
	LWLockRelease(&shared->lock);
	set_latch_of(launcher);
}
