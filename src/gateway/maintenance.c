/*-------------------------------------------------------------------------
 * maintenance.c
 *		What the worker does from time to time: keyvault._maintain(), job by job.
 *
 * One batch of one job in a transaction of its own, then calls are looked after again, so
 * that none waits for more than a batch. Nothing is wrong before a job has run.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/maintenance.h"

#include "base/catalogue.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/settings.h"
#include "catalog/pg_type.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "gateway/worker_slot.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/latch.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(keyvault_maintain);

/* While a worker is there, usage is added up so often; views take the longer the more is left to them. */
#define ROLL_UP_EVERY_MS	30000

/* When to try again what has failed. */
#define AGAIN_MS			60000

typedef struct Job
{
	const char *name;			/* as in keyvault._maintenance_job */
	bool		often;
	bool		rests;			/* after a batch, for as long as it took: debits wait for its WAL and its CPU */
	TimestampTz due_at;
} Job;

static Job	jobs[] = {
	{"partitions"}, {"roll-up",.often = true}, {"retention"}, {"reset",.rests = true}, {"purge"}, {"rotation"}
};

/* Without users there is nothing to do, and a restore may be about to bring partitions of its own. */
static bool nobody = true;
static uint64 looked_after_wakeups = UINT64_MAX;

/* Rotations that were asked for are done without users, and without maintenance: when to look for them, at first at once. */
static TimestampTz asked_due_at = 0;

/* Not inlined: gcc would take its variables for ones that a longjmp may clobber. */
static pg_noinline Job *
next_job(void)
{
	Job		   *next = &jobs[0];

	for (size_t i = 1; i < lengthof(jobs); i++)
		if (jobs[i].due_at < next->due_at)
			next = &jobs[i];
	return next;
}

static Job *
find_job(const char *name)
{
	for (size_t i = 0; i < lengthof(jobs); i++)
		if (strcmp(jobs[i].name, name) == 0)
			return &jobs[i];
	return NULL;
}

static int
delay_of(const Job *job)
{
	return job->often ? Min(ROLL_UP_EVERY_MS, kv_maintenance_interval) : kv_maintenance_interval;
}

/* How long the job rests when there is more, in milliseconds. */
static int
rest_of(const Job *job, TimestampTz began)
{
	return job->rests ? 1 + (int) TimestampDifferenceMilliseconds(began, GetCurrentTimestamp()) : 0;
}

/* Are rotations that were asked for all that there is to do? */
static bool
is_limited(void)
{
	return nobody || kv_maintenance_interval == 0;
}

/* When kv_maintenance_take has something to do; infinity for not before the worker is woken. */
TimestampTz
kv_maintenance_due_at(void)
{
	bool		woken = looked_after_wakeups != kv_worker_wakeups();

	/* With keyvault.reveal off every wake-up may be about a rotation that only the worker can do. */
	if (woken && (!kv_reveal || (nobody && kv_maintenance_interval > 0)))
	{
		find_job("rotation")->due_at = 0;
		return 0;
	}
	return is_limited() ? asked_due_at : next_job()->due_at;
}

/* Do no job later than the interval as it is now says, and look for what was left to the worker. */
void
kv_maintenance_reload(void)
{
	TimestampTz now = GetCurrentTimestamp();

	looked_after_wakeups = UINT64_MAX;
	asked_due_at = 0;
	for (size_t i = 0; i < lengthof(jobs); i++)
		jobs[i].due_at = Min(jobs[i].due_at, TimestampTzPlusMilliseconds(now, delay_of(&jobs[i])));
}

static bool
has_users(void)
{
	static KvStatement users = {"SELECT EXISTS (SELECT FROM keyvault.users)", 0};
	bool		isnull;

	return DatumGetBool(kv_statement_value(&users, NULL, NULL, &isnull));
}

/* Is there a rotation that was left to the worker? The SQL of version 0.1.0 has none. */
static bool
has_rotation_requests(void)
{
	static KvRelation table = {"rotation_requests"};
	static KvStatement requests = {"SELECT EXISTS (SELECT FROM keyvault.rotation_requests)", 0};
	bool		isnull;

	return OidIsValid(kv_relation_find(&table)) &&
		DatumGetBool(kv_statement_value(&requests, NULL, NULL, &isnull));
}

/* One batch of a job; sets whether there is more. Returns how much was done. */
static int64
run_batch(const Job *job, bool *more)
{
	static KvStatement batch = {
		"SELECT CASE WHEN m.more THEN -1 - m.done ELSE m.done END FROM keyvault._maintain($1) m", 1, {TEXTOID}
	};
	static KvStatement partitions = {"SELECT keyvault._make_usage_partitions()", 0};
	Oid			types[2] = {TEXTOID, INT4OID};
	Datum		name = CStringGetTextDatum(job->name);
	bool		isnull;
	int64		done;

	*more = false;
	/* The SQL of version 0.1.0 knows of partitions alone. */
	if (!kv_function_exists("_maintain", lengthof(types), types))
	{
		if (job == &jobs[0])
			(void) kv_statement_value(&partitions, NULL, NULL, &isnull);
		return 0;
	}
	done = DatumGetInt64(kv_statement_value(&batch, &name, NULL, &isnull));
	*more = done < 0;
	return done < 0 ? -1 - done : done;
}

/* Do one batch of the job that is due, or of the rotations that were asked for; returns in how many milliseconds there is more. */
static int
take_batch(KvWorker *worker, Job *job)
{
	TimestampTz began = GetCurrentTimestamp();
	KvOwnerScope scope;
	bool		asked;
	bool		more = false;
	int64		done = 0;

	kv_turn_begin("doing maintenance");
	kv_owner_begin(&scope);
	nobody = !has_users();
	asked = is_limited() && has_rotation_requests();
	if (!is_limited() || asked)
		done = run_batch(asked ? find_job("rotation") : job, &more);
	asked = asked && has_rotation_requests();
	kv_owner_end(&scope);
	kv_turn_end();
	/* A database that is in use keeps its worker, and so does a job that is not done. */
	if (more || (done > 0 && job->often))
		worker->idle_since = GetCurrentTimestamp();
	asked_due_at = asked ? TimestampTzPlusMilliseconds(GetCurrentTimestamp(), more ? 0 : AGAIN_MS) : DT_NOEND;
	return more ? rest_of(job, began) : delay_of(job);
}

/* Do what is due. */
void
kv_maintenance_take(KvWorker *worker)
{
	Job		   *volatile job = next_job();
	char	   *message;
	volatile int delay_ms;

	looked_after_wakeups = kv_worker_wakeups();
	MemoryContextSwitchTo(worker->turn_context);
	PG_TRY();
	{
		delay_ms = take_batch(worker, job);
	}
	PG_CATCH();
	{
		if (!kv_turn_error_may_pass(kv_turn_roll_back(worker->turn_context, &message)))
			ereport(WARNING,
					(errmsg("maintenance of keyvault failed in job %s: %s", is_limited() ? "rotation" : job->name, message),
					 errhint("It is tried again; SELECT * FROM keyvault.run_maintenance() does it at once, but for what waits in keyvault.rotation_requests.")));
		asked_due_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), AGAIN_MS);
		delay_ms = Min(AGAIN_MS, delay_of(job));
	}
	PG_END_TRY();
	if (!is_limited())
		job->due_at = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), delay_ms);
	MemoryContextSwitchTo(worker->context);
	MemoryContextReset(worker->turn_context);
}

/* Run a statement of keyvault_maintain's that returns one boolean, and commit. */
static bool
execute_and_commit(const char *statement, const char *name)
{
	Oid			type = TEXTOID;
	Datum		value = CStringGetTextDatum(name);
	bool		isnull;
	bool		result;

	if (SPI_execute_with_args(statement, 1, &type, &value, NULL, false, 1) != SPI_OK_SELECT || SPI_processed != 1)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("maintenance of keyvault could not be run")));
	result = DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	SPI_freetuptable(SPI_tuptable);
	SPI_commit();
	return result;
}

/* Do a batch of a job, and rest if there is more. Returns whether there is. */
static bool
do_batch(const Job *job)
{
	TimestampTz began = GetCurrentTimestamp();
	bool		more = execute_and_commit("SELECT m.more FROM keyvault._maintain($1) m", job->name);

	if (more && job->rests)
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, rest_of(job, began), PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
	}
	CHECK_FOR_INTERRUPTS();
	return more;
}

/* CALL maintain(): run_maintenance() with a commit after each batch. */
Datum
keyvault_maintain(PG_FUNCTION_ARGS)
{
	bool		atomic = !(fcinfo->context && IsA(fcinfo->context, CallContext)) ||
		castNode(CallContext, fcinfo->context)->atomic;
	char	   *wanted = PG_ARGISNULL(0) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(0));

	if (atomic)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
				 errmsg("keyvault.maintain() cannot run inside a transaction block"),
				 errhint("It commits after each batch. Inside a transaction use keyvault.run_maintenance().")));
	if (SPI_connect_ext(SPI_OPT_NONATOMIC) != SPI_OK_CONNECT)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not connect to SPI")));
	if (wanted != NULL)
		(void) execute_and_commit("SELECT keyvault._check_maintenance_job($1) IS NULL", wanted);
	for (size_t i = 0; i < lengthof(jobs); i++)
		if (wanted == NULL || strcmp(wanted, jobs[i].name) == 0)
			while (do_batch(&jobs[i]))
				;
	SPI_finish();
	PG_RETURN_VOID();
}
