/*-------------------------------------------------------------------------
 * data_key.h
 *		The key of each user, wrapped by the master key.
 *-------------------------------------------------------------------------
 */
#ifndef KV_DATA_KEY_H
#define KV_DATA_KEY_H

#include "postgres.h"

#include "crypto/aead.h"
#include "utils/uuid.h"

typedef struct KvDataKey
{
	const char *user_id;
	pg_uuid_t	vault_id;
	pg_uuid_t	id;
	uint32		version;
	uint8		key[KV_KEY_SIZE];
} KvDataKey;

extern KvDataKey *kv_data_key_find(const char *user_id, uint32 version, const uint8 *id);
extern KvDataKey *kv_data_key_create(const char *user_id, uint32 version);
extern uint32 kv_data_key_lock(const char *user_id, bool exclusive);
extern KvDataKey *kv_data_key_ensure(const char *user_id);

#endif
