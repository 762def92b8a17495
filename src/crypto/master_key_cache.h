/*-------------------------------------------------------------------------
 * master_key_cache.h
 *		Master keys that one process fetches for all.
 *-------------------------------------------------------------------------
 */
#ifndef KV_MASTER_KEY_CACHE_H
#define KV_MASTER_KEY_CACHE_H

#include "postgres.h"

#include "crypto/master_key.h"
#include "datatype/timestamp.h"

/* Fill the ring, or return false with a reason and a hint. */
typedef bool (*KvMasterKeyFetch) (KvMasterKeyRing *ring, const char **reason, const char **hint);

extern Size kv_master_key_cache_shmem_size(void);
extern void kv_master_key_cache_shmem_init(void *memory, bool found);
extern bool kv_master_key_cache_get(KvMasterKeyRing *ring, TimestampTz not_before, KvMasterKeyFetch fetch,
									const char **reason, const char **hint);

#endif
