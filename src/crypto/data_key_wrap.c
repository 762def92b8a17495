/*-------------------------------------------------------------------------
 * data_key_wrap.c
 *		A data key, wrapped by a master key.
 *
 * Wrap: 'D' | 1 | suite | source | master key version (4) | kek id (16) | nonce (12) |
 * wrapped key (32) | tag (16), integers big-endian. The associated data is the wrap up to
 * its nonce, the vault, the user, the data key's version and id: a wrap copied to another
 * user's row does not open.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/data_key_wrap.h"

#include "base/pg_version.h"
#include "crypto/associated_data.h"
#include "port/pg_bswap.h"

#define WRAP_MAGIC		'D'
#define WRAP_FORMAT		1
#define WRAP_SUITE		1		/* AES-256-GCM */

typedef struct WrapHeader
{
	uint8		magic;
	uint8		format;
	uint8		suite;
	uint8		source;
	uint32		kek_version;	/* big-endian */
	uint8		kek_id[KV_KEK_ID_SIZE];
	uint8		nonce[KV_NONCE_SIZE];
} WrapHeader;

typedef struct Wrap
{
	WrapHeader	header;
	uint8		wrapped[KV_KEY_SIZE];
	uint8		tag[KV_TAG_SIZE];
} Wrap;

StaticAssertDecl(sizeof(Wrap) == 84, "the wrap's format has no padding");
StaticAssertDecl(offsetof(WrapHeader, kek_id) == KV_WRAP_KEK_ID_OFFSET, "the id is where the index looks for it");

static void
associate(KvAssociatedData *associated, const WrapHeader *header, const KvDataKey *data_key)
{
	uint32		version = pg_hton32(data_key->version);

	kv_associated_data_init(associated, (const uint8 *) header, offsetof(WrapHeader, nonce));
	kv_associated_data_add(associated, data_key->vault_id.data, UUID_LEN);
	kv_associated_data_add(associated, (const uint8 *) data_key->user_id, strlen(data_key->user_id));
	kv_associated_data_add(associated, (const uint8 *) &version, sizeof(version));
	kv_associated_data_add(associated, data_key->id.data, UUID_LEN);
}

/* Wrap a data key; kek_version is the master key's in keyvault.master_keys. Allocated in the current context. */
bytea *
kv_data_key_wrap(const KvDataKey *data_key, const KvMasterKey *master_key, uint32 kek_version)
{
	bytea	   *stored = palloc(VARHDRSZ + sizeof(Wrap));
	Wrap	   *wrap = (Wrap *) VARDATA(stored);
	KvAssociatedData associated;

	SET_VARSIZE(stored, VARHDRSZ + sizeof(Wrap));
	wrap->header.magic = WRAP_MAGIC;
	wrap->header.format = WRAP_FORMAT;
	wrap->header.suite = WRAP_SUITE;
	wrap->header.source = master_key->source;
	wrap->header.kek_version = pg_hton32(kek_version);
	memcpy(wrap->header.kek_id, master_key->kek_id, KV_KEK_ID_SIZE);
	kv_random_bytes(wrap->header.nonce, KV_NONCE_SIZE);
	associate(&associated, &wrap->header, data_key);
	kv_aead_seal(master_key->key, wrap->header.nonce, associated.bytes, associated.length,
				 data_key->key, KV_KEY_SIZE, wrap->wrapped, wrap->tag);
	return stored;
}

/*
 * Unwrap data_key->key, all else of which is filled in. False when the wrap is not this
 * user's or was altered. Error: KV004 its master key is not at hand.
 */
bool
kv_data_key_unwrap(KvDataKey *data_key, const bytea *stored)
{
	Wrap		wrap;
	KvAssociatedData associated;
	const KvMasterKey *master_key;

	if (VARSIZE_ANY_EXHDR(stored) != sizeof(Wrap))
		return false;
	memcpy(&wrap, VARDATA_ANY(stored), sizeof(Wrap));
	if (wrap.header.magic != WRAP_MAGIC || wrap.header.format != WRAP_FORMAT || wrap.header.suite != WRAP_SUITE)
		return false;
	master_key = kv_master_key_find(wrap.header.kek_id);
	associate(&associated, &wrap.header, data_key);
	return kv_aead_open(master_key->key, wrap.header.nonce, associated.bytes, associated.length,
						wrap.wrapped, KV_KEY_SIZE, wrap.tag, data_key->key);
}
