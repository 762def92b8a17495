/*-------------------------------------------------------------------------
 * record_key_cache.c
 *		Keys of records that this process opened lately.
 *
 * A record's key follows from its data key, which it names by random bytes that are never
 * given twice, and its salt: it can be used again without reading, unwrapping and deriving,
 * which is most of what opening costs. The record's associated data still names user, row
 * and vault: an entry opens nothing that the row of data_keys would not. When data keys are
 * changed or destroyed, or the master key is read anew, every process forgets all entries.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/record_key_cache.h"

#include "access/xact.h"
#include "base/error.h"
#include "base/secret.h"
#include "base/settings.h"
#include "commands/trigger.h"
#include "common/hashfn.h"
#include "fmgr.h"
#include "port/atomics.h"

PG_FUNCTION_INFO_V1(keyvault_forget_data_keys);

/* Places of a bucket. */
#define WAYS 4

/* Buckets that an entry may be in: it goes to the emptier one, so that none overflows while there is room elsewhere. */
#define CHOICES 2

typedef struct Bucket
{
	KvRecordId	ids[WAYS];
	KvRecordKey record_keys[WAYS];
	uint32		puts;			/* so far: they fill one place after the other */
} Bucket;

/* In shared memory: raised when every process has to forget. */
static pg_atomic_uint32 *epoch = NULL;

/* This process's entries, in memory that stays out of core files; made at first use. */
static Bucket *buckets = NULL;
static uint32 n_buckets;
static uint64 filled_at;

/* This transaction has changed data keys; dropped when it ends. */
static bool forget_at_end = false;

Size
kv_record_key_cache_shmem_size(void)
{
	return sizeof(pg_atomic_uint32);
}

void
kv_record_key_cache_shmem_init(void *memory, bool found)
{
	epoch = memory;
	if (!found)
		pg_atomic_init_u32(epoch, 0);
}

static Size
cache_size(void)
{
	return n_buckets * sizeof(Bucket);
}

/* Make ready for use; false when no entries are kept. Those of before now, or of another master key, are wiped first. */
static bool
is_ready(uint32 generation)
{
	uint64		now = (uint64) generation << 32 | pg_atomic_read_u32(epoch);

	if (buckets == NULL)
	{
		n_buckets = kv_record_key_cache_size / WAYS;
		if (n_buckets == 0)
			return false;
		buckets = kv_secret_page(cache_size());
		filled_at = now;
	}
	if (filled_at != now)
	{
		kv_secret_wipe(buckets, cache_size());
		filled_at = now;
	}
	return true;
}

/* A bucket for a record's key. The last 8 bytes of a UUID are random in every version but for two bits, those of a salt differ. */
static Bucket *
bucket_of(const KvRecordId *id, int choice)
{
	uint32		hash;
	uint32		salt;

	memcpy(&hash, id->data_key_id + UUID_LEN - (choice + 1) * sizeof(hash), sizeof(hash));
	memcpy(&salt, id->salt + KV_SALT_SIZE - sizeof(salt), sizeof(salt));
	hash = hash_combine(hash, murmurhash32(salt));
	return &buckets[hash % n_buckets];
}

/* Fill in the key of a record; false when it is not here. generation is the loaded master key's. */
bool
kv_record_key_cache_get(const KvRecordId *id, uint32 generation, KvRecordKey *record_key)
{
	if (!is_ready(generation))
		return false;
	for (int choice = 0; choice < CHOICES; choice++)
	{
		Bucket	   *bucket = bucket_of(id, choice);

		for (int i = 0; i < WAYS; i++)
			if (memcmp(&bucket->ids[i], id, sizeof(KvRecordId)) == 0)
			{
				*record_key = bucket->record_keys[i];
				return true;
			}
	}
	return false;
}

/* Keep the key of a record, in the place of another once both its buckets are full. */
void
kv_record_key_cache_put(const KvRecordId *id, uint32 generation, const KvRecordKey *record_key)
{
	Bucket	   *bucket;
	uint32		place;

	if (!is_ready(generation))
		return;
	bucket = bucket_of(id, 0);
	if (bucket_of(id, 1)->puts < bucket->puts)
		bucket = bucket_of(id, 1);
	place = bucket->puts++ % WAYS;
	bucket->ids[place] = *id;
	bucket->record_keys[place] = *record_key;
}

/* Wipe what this process keeps. */
void
kv_record_key_cache_wipe(void)
{
	if (buckets)
		kv_secret_wipe(buckets, cache_size());
}

static void
forget_everywhere(void)
{
	pg_atomic_fetch_add_u32(epoch, 1);
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	if (event != XACT_EVENT_COMMIT && event != XACT_EVENT_PREPARE && event != XACT_EVENT_ABORT)
		return;
	if (forget_at_end)
		forget_everywhere();
	forget_at_end = false;
}

/* Follow the end of transactions; called once, while the server preloads the library. */
void
kv_record_key_cache_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
}

/*
 * Trigger of keyvault.data_keys: data keys were changed or destroyed. Others forget when
 * that is committed: until then they may still read, and keep, the rows as they were.
 */
Datum
keyvault_forget_data_keys(PG_FUNCTION_ARGS)
{
	if (!CALLED_AS_TRIGGER(fcinfo))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("keyvault._forget_data_keys() runs as a trigger of keyvault.data_keys")));
	forget_everywhere();
	forget_at_end = true;
	return PointerGetDatum(NULL);
}
