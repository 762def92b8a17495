/*-------------------------------------------------------------------------
 * master_key.h
 *		The key outside the database that wraps data keys.
 *-------------------------------------------------------------------------
 */
#ifndef KV_MASTER_KEY_H
#define KV_MASTER_KEY_H

#include "postgres.h"

#include "crypto/aead.h"

#define KV_KEK_ID_SIZE	16

/* Where a master key came from; stored in each wrap. */
typedef enum KvMasterKeySource
{
	KV_MASTER_KEY_FILE = 1,
} KvMasterKeySource;

typedef struct KvMasterKey
{
	uint8		key[KV_KEY_SIZE];
	uint8		kek_id[KV_KEK_ID_SIZE];
	KvMasterKeySource source;
	uint32		generation;		/* raised each time this process reads it */
} KvMasterKey;

extern const KvMasterKey *kv_master_key_get(void);
extern void kv_master_key_mismatch(const uint8 *expected_kek_id);

#endif
