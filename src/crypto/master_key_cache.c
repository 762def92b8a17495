/*-------------------------------------------------------------------------
 * master_key_cache.c
 *		Master keys that one process fetches for all.
 *
 * A program or a Vault server is asked once, by whoever needs the keys first; others wait
 * for the answer, and can be interrupted while they do. The keys are in pages shared by all
 * processes that stay out of core files. Keys fetched before a process reloaded its
 * configuration are not good enough for it. A failure is everybody's answer for a second,
 * so that a source that is slow to fail is not asked by each session in turn.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/master_key_cache.h"

#include "base/error.h"
#include "base/secret.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/condition_variable.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#define FAILURE_KEPT_MS	1000
#define TEXT_SIZE		512

/* In shared memory. Times are when asking began; 0 for never. */
typedef struct Cache
{
	LWLock		lock;
	ConditionVariable asked;
	bool		asking;
	TimestampTz fetched;
	TimestampTz failed;
	char		reason[TEXT_SIZE];
	char		hint[TEXT_SIZE];
} Cache;

static Cache *cache = NULL;

/* What was fetched, in pages of its own, which every process inherits from the postmaster. */
static KvMasterKeyRing *fetched_ring = NULL;

Size
kv_master_key_cache_shmem_size(void)
{
	return sizeof(Cache);
}

void
kv_master_key_cache_shmem_init(void *memory, bool found)
{
	cache = memory;
	if (found)
		return;
	memset(cache, 0, sizeof(*cache));
	LWLockInitialize(&cache->lock, LWLockNewTrancheId());
	LWLockRegisterTranche(cache->lock.tranche, "keyvault master keys");
	ConditionVariableInit(&cache->asked);
	/* The pages outlive a restart after a crash; what is in them must not. */
	if (fetched_ring == NULL)
		fetched_ring = kv_secret_shared_page(sizeof(KvMasterKeyRing));
	else
		kv_secret_wipe(fetched_ring, sizeof(KvMasterKeyRing));
}

/* Forget that we are asking, when an error or our end keeps us from an answer. */
static void
give_up(int code, Datum arg)
{
	LWLockAcquire(&cache->lock, LW_EXCLUSIVE);
	cache->asking = false;
	LWLockRelease(&cache->lock);
	ConditionVariableBroadcast(&cache->asked);
}

/* Ask the source, and leave what it answers for all. */
static bool
ask(KvMasterKeyRing *ring, KvMasterKeyFetch fetch, const char **reason, const char **hint)
{
	TimestampTz began = GetCurrentTimestamp();
	bool		fetched;

	PG_ENSURE_ERROR_CLEANUP(give_up, (Datum) 0);
	{
		fetched = fetch(ring, reason, hint);
	}
	PG_END_ENSURE_ERROR_CLEANUP(give_up, (Datum) 0);
	LWLockAcquire(&cache->lock, LW_EXCLUSIVE);
	if (fetched)
	{
		*fetched_ring = *ring;
		cache->fetched = began;
		cache->failed = 0;
	}
	else
	{
		/* Nobody is to find keys that the source may have taken back. */
		kv_secret_wipe(fetched_ring, sizeof(KvMasterKeyRing));
		cache->fetched = 0;
		cache->failed = GetCurrentTimestamp();
		strlcpy(cache->reason, *reason, TEXT_SIZE);
		strlcpy(cache->hint, *hint, TEXT_SIZE);
	}
	cache->asking = false;
	LWLockRelease(&cache->lock);
	ConditionVariableBroadcast(&cache->asked);
	return fetched;
}

/* Copy keys that were fetched no earlier than not_before; false when there are none. */
static bool
take_keys(KvMasterKeyRing *ring, TimestampTz not_before)
{
	if (cache->fetched == 0 || cache->fetched < not_before)
		return false;
	*ring = *fetched_ring;
	/* Processes that may no longer open keys wipe the pages without asking. */
	pg_read_barrier();
	return fetched_ring->n > 0;
}

/* Copy the reason of a failure that counts for who began to ask at since; false when there is none. */
static bool
take_failure(TimestampTz not_before, TimestampTz since, const char **reason, const char **hint)
{
	if (cache->failed == 0 || cache->failed < not_before ||
		(cache->failed < since && TimestampDifferenceExceeds(cache->failed, GetCurrentTimestamp(), FAILURE_KEPT_MS)))
		return false;
	*reason = pstrdup(cache->reason);
	*hint = pstrdup(cache->hint);
	return true;
}

/*
 * Fill the ring with keys fetched no earlier than not_before, fetching them when nobody has.
 * False, with a reason and a hint, when they cannot be had.
 */
bool
kv_master_key_cache_get(KvMasterKeyRing *ring, TimestampTz not_before, KvMasterKeyFetch fetch,
						const char **reason, const char **hint)
{
	TimestampTz since = GetCurrentTimestamp();
	bool		good;
	bool		failed;
	bool		our_turn;

	ConditionVariablePrepareToSleep(&cache->asked);
	for (;;)
	{
		LWLockAcquire(&cache->lock, LW_EXCLUSIVE);
		good = take_keys(ring, not_before);
		failed = !good && take_failure(not_before, since, reason, hint);
		our_turn = !good && !failed && !cache->asking;
		if (our_turn)
			cache->asking = true;
		LWLockRelease(&cache->lock);
		if (good || failed || our_turn)
			break;
		ConditionVariableSleep(&cache->asked, PG_WAIT_EXTENSION);
	}
	/* Asking waits for the latch in its own way. */
	ConditionVariableCancelSleep();
	return our_turn ? ask(ring, fetch, reason, hint) : good;
}
