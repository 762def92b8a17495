/*-------------------------------------------------------------------------
 * record_key_cache.h
 *		Keys of records that this process opened lately.
 *-------------------------------------------------------------------------
 */
#ifndef KV_RECORD_KEY_CACHE_H
#define KV_RECORD_KEY_CACHE_H

#include "postgres.h"

#include "crypto/aead.h"
#include "utils/uuid.h"

#define KV_SALT_SIZE		16
#define KV_COMMITMENT_SIZE	32

/* What a record's key follows from: the data key that it names, by an id that is never given twice, and its salt. */
typedef struct KvRecordId
{
	uint8		data_key_id[UUID_LEN];
	uint8		salt[KV_SALT_SIZE];
} KvRecordId;

typedef struct KvRecordKey
{
	uint8		key[KV_KEY_SIZE];
	uint8		commitment[KV_COMMITMENT_SIZE];
	pg_uuid_t	vault_id;
} KvRecordKey;

extern void kv_record_key_cache_init(void);
extern void kv_record_key_cache_wipe(void);
extern Size kv_record_key_cache_shmem_size(void);
extern void kv_record_key_cache_shmem_init(void *memory, bool found);
extern bool kv_record_key_cache_get(const KvRecordId *id, uint32 generation, KvRecordKey *record_key);
extern void kv_record_key_cache_put(const KvRecordId *id, uint32 generation, const KvRecordKey *record_key);

#endif
