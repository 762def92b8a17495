/*-------------------------------------------------------------------------
 * sealed_box.h
 *		A secret that anybody can seal to a public key, and only its holder opens.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SEALED_BOX_H
#define KV_SEALED_BOX_H

#include "postgres.h"

#include "crypto/aead.h"
#include "utils/uuid.h"

#define KV_BOX_KEY_ID_SIZE		4
#define KV_BOX_PUBLIC_KEY_SIZE	65
#define KV_BOX_PRIVATE_KEY_SIZE 32

/* What boxes of API keys are labelled with. */
#define KV_BOX_LABEL	"keyvault/seal/v1"

typedef struct KvBoxKey
{
	uint8		id[KV_BOX_KEY_ID_SIZE];
	uint8		public_key[KV_BOX_PUBLIC_KEY_SIZE];
	uint8		private_key[KV_BOX_PRIVATE_KEY_SIZE];	/* zeros where only the public key is known */
} KvBoxKey;

/* What a box is bound to: it opens for nothing else. */
typedef struct KvBoxBinding
{
	const char *label;
	pg_uuid_t	vault_id;
	const char *user_id;
	const char *context;		/* the provider of an API key */
} KvBoxBinding;

extern void kv_sealed_box_make_key(KvBoxKey *key);
extern bytea *kv_sealed_box_seal(const KvBoxKey *key, const KvBoxBinding *binding, const char *secret, Size length);
extern char *kv_sealed_box_open(const KvBoxKey *key, const KvBoxBinding *binding, const bytea *box, Size *length);
extern bool kv_sealed_box_is(const bytea *stored);
extern bool kv_sealed_box_looks_right(const bytea *box);
extern const uint8 *kv_sealed_box_key_id(const bytea *box);

#endif
