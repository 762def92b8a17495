/*-------------------------------------------------------------------------
 * key_use_flush.c
 *		Has the uses of keys written to api_keys, in time and in batches.
 *
 * The first note after a flush wakes the launcher. It waits for
 * keyvault.key_use_flush_interval, in which further notes cost nobody a wake-up, and then
 * wakes, or starts, the worker of each database that has notes.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/key_use_flush.h"

#include "base/error.h"
#include "base/settings.h"
#include "gateway/worker_slot.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "vault/key_use.h"

/* Databases that a round can have; those left out come with the next. */
#define DATABASES_MAX 256

/* Where the table gets crowded notes do not wait for longer than this; they are rows to write all the same. */
#define URGENT_MS 5000

/* In the launcher: since when there are notes; 0 without. */
static TimestampTz pending_since = 0;

/* Have notes wake the launcher; called once, while the server preloads the library. */
void
kv_key_use_flush_init(void)
{
	kv_key_use_on_pending(kv_worker_wake_launcher);
}

/* For the launcher: begin a round of flushes if it is time. Returns after how many ms to look again, -1 for not. */
long
kv_key_use_flush_serve(void)
{
	TimestampTz now = GetCurrentTimestamp();
	TimestampTz due;
	Oid			databases[DATABASES_MAX];
	bool		urgent;
	int64		wait_ms = kv_key_use_flush_interval * INT64CONST(1000);
	int			n;

	if (!kv_key_use_is_pending(&urgent))
	{
		pending_since = 0;
		return -1;
	}
	if (pending_since == 0)
		pending_since = now;
	due = TimestampTzPlusMilliseconds(pending_since, urgent ? Min(wait_ms, URGENT_MS) : wait_ms);
	if (due > now)
		return TimestampDifferenceMilliseconds(now, due);
	pending_since = 0;
	n = kv_key_use_begin_round(databases, DATABASES_MAX);
	for (int i = 0; i < n; i++)
		kv_worker_wake(databases[i]);
	return -1;
}

/* Flush this database's notes, in a transaction of its own. */
void
kv_key_use_flush_now(KvWorker *worker)
{
	char	   *message;

	worker->key_use_round = kv_key_use_round();
	PG_TRY();
	{
		kv_turn_begin("noting uses of keys");
		(void) kv_key_use_flush();
		kv_turn_end();
	}
	PG_CATCH();
	{
		int			code = kv_turn_roll_back(worker->turn_context, &message);

		if (!kv_turn_error_may_pass(code))
			ereport(WARNING, (errcode(code), errmsg("uses of keys could not be written: %s", message)));
	}
	PG_END_TRY();
	MemoryContextSwitchTo(worker->context);
	MemoryContextReset(worker->turn_context);
}

/* The same if a round has begun since the last time. */
void
kv_key_use_flush_if_due(KvWorker *worker)
{
	if (worker->key_use_round != kv_key_use_round())
		kv_key_use_flush_now(worker);
}
