/*-------------------------------------------------------------------------
 * data_key_cache.h
 *		Unwrapped data keys that this process used lately.
 *-------------------------------------------------------------------------
 */
#ifndef KV_DATA_KEY_CACHE_H
#define KV_DATA_KEY_CACHE_H

#include "postgres.h"

#include "crypto/data_key.h"

extern void kv_data_key_cache_init(void);
extern Size kv_data_key_cache_shmem_size(void);
extern void kv_data_key_cache_shmem_init(void *memory, bool found);
extern bool kv_data_key_cache_get(const pg_uuid_t *id, uint32 generation, KvDataKey *data_key);
extern void kv_data_key_cache_put(const KvDataKey *data_key, uint32 generation);

#endif
