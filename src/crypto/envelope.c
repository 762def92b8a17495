/*-------------------------------------------------------------------------
 * envelope.c
 *		Seal and open one secret under a user's data key.
 *
 * Record: 'K' | 1 | suite | flags | data key version (4) | data key id (16) | salt (16) |
 * nonce (12) | commitment (32) | ciphertext | tag (16), integers big-endian. Salt and
 * nonce are fresh for each record. HKDF-SHA256 of data key and salt gives the record's
 * AES-256-GCM key and the commitment, which is compared first: no record opens under two
 * keys. The associated data is all that precedes the ciphertext, then vault, user, secret
 * id, provider and purpose: a record copied to another row, user, provider or vault does
 * not open.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/envelope.h"

#include "base/secret.h"
#include "crypto/associated_data.h"
#include "port/pg_bswap.h"

#define RECORD_MAGIC	'K'
#define RECORD_FORMAT	1
#define RECORD_SUITE	1		/* HKDF-SHA256, AES-256-GCM, key commitment */
#define SALT_SIZE		16
#define COMMITMENT_SIZE	32

typedef struct RecordHeader
{
	uint8		magic;
	uint8		format;
	uint8		suite;
	uint8		flags;
	uint32		data_key_version;	/* big-endian */
	uint8		data_key_id[UUID_LEN];
	uint8		salt[SALT_SIZE];
	uint8		nonce[KV_NONCE_SIZE];
	uint8		commitment[COMMITMENT_SIZE];
} RecordHeader;

StaticAssertDecl(sizeof(RecordHeader) == 84, "the record's format has no padding");

typedef struct RecordKeys
{
	uint8		key[KV_KEY_SIZE];
	uint8		commitment[COMMITMENT_SIZE];
} RecordKeys;

static void
derive_record_keys(RecordKeys *keys, const KvDataKey *data_key, const RecordHeader *header)
{
	static const char label[] = "keyvault/v1/record";
	uint8		info[sizeof(label) - 1 + 1 + UUID_LEN];

	memcpy(info, label, sizeof(label) - 1);
	info[sizeof(label) - 1] = header->suite;
	memcpy(info + sizeof(label), header->data_key_id, UUID_LEN);
	kv_hkdf_sha256(data_key->key, KV_KEY_SIZE, header->salt, SALT_SIZE, info, sizeof(info),
				   (uint8 *) keys, sizeof(RecordKeys));
}

static void
record_associated_data(KvAssociatedData *associated, const RecordHeader *header,
					   const KvDataKey *data_key, const KvSecretName *name)
{
	kv_associated_data_init(associated, (const uint8 *) header, sizeof(RecordHeader));
	kv_associated_data_add(associated, data_key->vault_id.data, UUID_LEN);
	kv_associated_data_add(associated, (const uint8 *) data_key->user_id, strlen(data_key->user_id));
	kv_associated_data_add(associated, name->id.data, UUID_LEN);
	kv_associated_data_add(associated, (const uint8 *) name->provider, strlen(name->provider));
	kv_associated_data_add(associated, (const uint8 *) name->purpose, strlen(name->purpose));
}

/* Seal a secret; the record is allocated in the current memory context. */
bytea *
kv_envelope_seal(const KvDataKey *data_key, const KvSecretName *name, const char *secret, Size length)
{
	Size		size = VARHDRSZ + sizeof(RecordHeader) + length + KV_TAG_SIZE;
	bytea	   *record = palloc0(size);
	RecordHeader *header = (RecordHeader *) VARDATA(record);
	uint8	   *cipher = (uint8 *) (header + 1);
	RecordKeys	keys;
	KvAssociatedData associated;

	SET_VARSIZE(record, size);
	header->magic = RECORD_MAGIC;
	header->format = RECORD_FORMAT;
	header->suite = RECORD_SUITE;
	header->data_key_version = pg_hton32(data_key->version);
	memcpy(header->data_key_id, data_key->id.data, UUID_LEN);
	kv_random_bytes(header->salt, SALT_SIZE);
	kv_random_bytes(header->nonce, KV_NONCE_SIZE);
	derive_record_keys(&keys, data_key, header);
	memcpy(header->commitment, keys.commitment, COMMITMENT_SIZE);

	record_associated_data(&associated, header, data_key, name);
	kv_aead_seal(keys.key, header->nonce, associated.bytes, associated.length,
				 (const uint8 *) secret, length, cipher, cipher + length);
	kv_secret_wipe(&keys, sizeof(keys));
	return record;
}

/* Which data key a record needs; false when it is no record. */
bool
kv_envelope_names_data_key(const bytea *record, uint32 *version, pg_uuid_t *id)
{
	RecordHeader header;

	if (VARSIZE_ANY_EXHDR(record) < sizeof(RecordHeader) + KV_TAG_SIZE)
		return false;
	memcpy(&header, VARDATA_ANY(record), sizeof(header));	/* a short varlena is not aligned */
	if (header.magic != RECORD_MAGIC || header.format != RECORD_FORMAT ||
		header.suite != RECORD_SUITE || header.flags != 0)
		return false;
	*version = pg_ntoh32(header.data_key_version);
	memcpy(id, header.data_key_id, UUID_LEN);
	return true;
}

/*
 * Open a record for which kv_envelope_names_data_key named this data key. Returns the
 * secret, NUL-terminated, in secret memory of the current context; NULL when it does
 * not open.
 */
char *
kv_envelope_open(const KvDataKey *data_key, const KvSecretName *name, const bytea *record)
{
	RecordHeader header;
	const uint8 *cipher = (const uint8 *) VARDATA_ANY(record) + sizeof(RecordHeader);
	Size		length = VARSIZE_ANY_EXHDR(record) - sizeof(RecordHeader) - KV_TAG_SIZE;
	RecordKeys	keys;
	KvAssociatedData associated;
	char	   *secret;
	bool		opened;

	memcpy(&header, VARDATA_ANY(record), sizeof(header));
	if (memcmp(header.data_key_id, data_key->id.data, UUID_LEN) != 0)
		return NULL;
	secret = kv_secret_alloc(length + 1);
	derive_record_keys(&keys, data_key, &header);
	opened = kv_bytes_equal(keys.commitment, header.commitment, COMMITMENT_SIZE);
	if (opened)
	{
		record_associated_data(&associated, &header, data_key, name);
		opened = kv_aead_open(keys.key, header.nonce, associated.bytes, associated.length,
							  cipher, length, cipher + length, (uint8 *) secret);
	}
	kv_secret_wipe(&keys, sizeof(keys));
	secret[length] = '\0';
	return opened ? secret : NULL;
}
