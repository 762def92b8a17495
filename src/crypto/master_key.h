/*-------------------------------------------------------------------------
 * master_key.h
 *		The keys outside the database that wrap data keys.
 *-------------------------------------------------------------------------
 */
#ifndef KV_MASTER_KEY_H
#define KV_MASTER_KEY_H

#include "postgres.h"

#include "crypto/aead.h"
#include "crypto/master_key_source.h"

#define KV_KEK_ID_SIZE	16

typedef struct KvMasterKey
{
	uint8		key[KV_KEY_SIZE];
	uint8		kek_id[KV_KEK_ID_SIZE];
	KvMasterKeySourceId source;
} KvMasterKey;

/* The master keys at hand; the first is the primary one. */
typedef struct KvMasterKeyRing
{
	int			n;
	KvMasterKey keys[KV_MASTER_KEYS_MAX];
} KvMasterKeyRing;

extern void kv_master_key_init(void);
extern bool kv_master_key_is_configured(void);
extern bool kv_master_key_source_has_failed(void);
extern bool kv_master_key_is_to_be_fetched(void);
extern const KvMasterKey *kv_master_key_get(void);
extern const KvMasterKey *kv_master_key_find(const uint8 *kek_id);
extern uint32 kv_master_key_generation(void);
extern char *kv_master_key_hex(const uint8 *kek_id);

#endif
