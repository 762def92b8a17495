/*-------------------------------------------------------------------------
 * data_key_cache.c
 *		Unwrapped data keys that this process used lately.
 *
 * A record names its data key by a random id, so that an entry can be used without
 * looking at the table again. An id is never given twice, and the record's associated
 * data still names the user: an entry opens nothing that the row of data_keys would not.
 * When data keys are destroyed, or the master key is read anew, every process forgets
 * all entries.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/data_key_cache.h"

#include "access/xact.h"
#include "base/error.h"
#include "base/secret.h"
#include "base/settings.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "port/atomics.h"

PG_FUNCTION_INFO_V1(keyvault_forget_data_keys);

/* One cache line. */
typedef struct Entry
{
	pg_uuid_t	id;
	pg_uuid_t	vault_id;
	uint8		key[KV_KEY_SIZE];
} Entry;

/* In shared memory: raised when every process has to forget. */
static pg_atomic_uint32 *epoch = NULL;

/* This process's entries, each in the one place that its id hashes to; made at first use. */
static Entry *entries = NULL;
static uint32 size;
static uint64 entries_epoch;

/* This transaction has changed data keys; dropped when it ends. */
static bool forget_at_end = false;

Size
kv_data_key_cache_shmem_size(void)
{
	return sizeof(pg_atomic_uint32);
}

void
kv_data_key_cache_shmem_init(void *memory, bool found)
{
	epoch = memory;
	if (!found)
		pg_atomic_init_u32(epoch, 0);
}

/* Where a data key belongs; NULL when nothing is to be kept. Entries of before now, or of another master key, are wiped first. */
static Entry *
place_of(const pg_uuid_t *id, uint32 generation)
{
	uint64		now = (uint64) generation << 32 | pg_atomic_read_u32(epoch);
	uint32		hash;

	if (entries == NULL)
	{
		if (kv_data_key_cache_size == 0)
			return NULL;
		size = kv_data_key_cache_size;
		entries = kv_secret_page(size * sizeof(Entry));
		entries_epoch = now;
	}
	if (entries_epoch != now)
	{
		kv_secret_wipe(entries, size * sizeof(Entry));
		entries_epoch = now;
	}
	/* The tail of a UUIDv7 is random. */
	memcpy(&hash, id->data + UUID_LEN - sizeof(hash), sizeof(hash));
	return &entries[hash % size];
}

/* Fill in key and vault of the data key with that id; false when it is not here. */
bool
kv_data_key_cache_get(const pg_uuid_t *id, uint32 generation, KvDataKey *data_key)
{
	Entry	   *entry = place_of(id, generation);

	if (entry == NULL || memcmp(&entry->id, id, UUID_LEN) != 0)
		return false;
	data_key->id = *id;
	data_key->vault_id = entry->vault_id;
	memcpy(data_key->key, entry->key, KV_KEY_SIZE);
	return true;
}

/* Keep a data key, in the place of another. */
void
kv_data_key_cache_put(const KvDataKey *data_key, uint32 generation)
{
	Entry	   *entry = place_of(&data_key->id, generation);

	if (entry == NULL)
		return;
	entry->id = data_key->id;
	entry->vault_id = data_key->vault_id;
	memcpy(entry->key, data_key->key, KV_KEY_SIZE);
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
kv_data_key_cache_init(void)
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
