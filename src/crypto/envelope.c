/*-------------------------------------------------------------------------
 * envelope.c
 *		Seal and open one secret under a user's data key.
 *
 * Record: 'K' | 1 | suite | flags | data key version (4) | data key id (16) | salt (16) |
 * nonce (12) | commitment (32) | ciphertext | tag (16), integers big-endian. The nonce is
 * fresh for each record, the salt for each week: a user's records of a week have one key,
 * which is derived once to open them all. Nonces are random: a key is good for 2^32 records
 * (NIST SP 800-38D, 8.3), which are 7,100 of one user in every second of a week. HKDF-SHA256 of data key and salt gives the
 * AES-256-GCM key and the commitment, which is compared first: no record opens under two
 * keys. The associated data is all that precedes the ciphertext, then vault, user, secret
 * id, provider and purpose: a record copied to another row, user, provider or vault does
 * not open.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/envelope.h"

#include "base/pg_version.h"
#include "base/secret.h"
#include "crypto/associated_data.h"
#include "crypto/master_key.h"
#include "crypto/record_key_cache.h"
#include "port/pg_bswap.h"
#include "utils/timestamp.h"

#define RECORD_MAGIC	'K'
#define RECORD_FORMAT	1
#define RECORD_SUITE	1		/* HKDF-SHA256, AES-256-GCM, key commitment */

typedef struct RecordHeader
{
	uint8		magic;
	uint8		format;
	uint8		suite;
	uint8		flags;
	uint32		data_key_version;	/* big-endian */
	KvRecordId	id;				/* data key id, salt */
	uint8		nonce[KV_NONCE_SIZE];
	uint8		commitment[KV_COMMITMENT_SIZE];
} RecordHeader;

StaticAssertDecl(sizeof(RecordHeader) == 84, "the record's format has no padding");

/* The week as a salt: its number since 2000-01-01 in UTC, big-endian, behind zeros. */
static void
make_salt(uint8 *salt)
{
	uint64		week = pg_hton64((uint64) (GetCurrentTimestamp() / (7 * USECS_PER_DAY)));

	memset(salt, 0, KV_SALT_SIZE);
	memcpy(salt + KV_SALT_SIZE - sizeof(week), &week, sizeof(week));
}

static void
derive_record_key(KvRecordKey *record_key, const KvDataKey *data_key, const RecordHeader *header)
{
	static const char label[] = "keyvault/v1/record";
	uint8		info[sizeof(label) - 1 + 1 + UUID_LEN];
	uint8		derived[KV_KEY_SIZE + KV_COMMITMENT_SIZE];

	memcpy(info, label, sizeof(label) - 1);
	info[sizeof(label) - 1] = header->suite;
	memcpy(info + sizeof(label), header->id.data_key_id, UUID_LEN);
	kv_hkdf_sha256(data_key->key, KV_KEY_SIZE, header->id.salt, KV_SALT_SIZE, info, sizeof(info), derived, sizeof(derived));
	memcpy(record_key->key, derived, KV_KEY_SIZE);
	memcpy(record_key->commitment, derived + KV_KEY_SIZE, KV_COMMITMENT_SIZE);
	record_key->vault_id = data_key->vault_id;
	kv_secret_wipe(derived, sizeof(derived));
}

static void
record_associated_data(KvAssociatedData *associated, const RecordHeader *header,
					   const pg_uuid_t *vault_id, const char *user_id, const KvSecretName *name)
{
	kv_associated_data_init(associated, (const uint8 *) header, sizeof(RecordHeader));
	kv_associated_data_add(associated, vault_id->data, UUID_LEN);
	kv_associated_data_add(associated, (const uint8 *) user_id, strlen(user_id));
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
	KvRecordKey record_key;
	KvAssociatedData associated;

	SET_VARSIZE(record, size);
	header->magic = RECORD_MAGIC;
	header->format = RECORD_FORMAT;
	header->suite = RECORD_SUITE;
	header->data_key_version = pg_hton32(data_key->version);
	memcpy(header->id.data_key_id, data_key->id.data, UUID_LEN);
	make_salt(header->id.salt);
	kv_random_bytes(header->nonce, KV_NONCE_SIZE);
	derive_record_key(&record_key, data_key, header);
	memcpy(header->commitment, record_key.commitment, KV_COMMITMENT_SIZE);

	record_associated_data(&associated, header, &data_key->vault_id, data_key->user_id, name);
	kv_aead_seal(record_key.key, header->nonce, associated.bytes, associated.length,
				 (const uint8 *) secret, length, cipher, cipher + length);
	kv_secret_wipe(&record_key, sizeof(record_key));
	return record;
}

/* How long the secret in a record is, in bytes. */
Size
kv_envelope_secret_length(const bytea *record)
{
	return VARSIZE_ANY_EXHDR(record) - sizeof(RecordHeader) - KV_TAG_SIZE;
}

/* Copy a record's header, which need not be aligned; false when it is no record. */
static bool
read_header(const bytea *record, RecordHeader *header)
{
	if (VARSIZE_ANY_EXHDR(record) < sizeof(RecordHeader) + KV_TAG_SIZE)
		return false;
	memcpy(header, VARDATA_ANY(record), sizeof(RecordHeader));
	return header->magic == RECORD_MAGIC && header->format == RECORD_FORMAT &&
		header->suite == RECORD_SUITE && header->flags == 0;
}

/* Find a record's key; false when its data key is not there. Errors: KV004, KV005. */
static bool
find_record_key(KvRecordKey *record_key, const RecordHeader *header, const char *user_id)
{
	uint32		generation = kv_master_key_generation();
	KvDataKey  *data_key;

	if (kv_record_key_cache_get(&header->id, generation, record_key))
		return true;
	data_key = kv_data_key_find(user_id, pg_ntoh32(header->data_key_version), header->id.data_key_id);
	if (data_key == NULL)
		return false;
	derive_record_key(record_key, data_key, header);
	kv_record_key_cache_put(&header->id, generation, record_key);
	return true;
}

/*
 * Open a record of a user. Returns the secret, NUL-terminated, in secret memory of the
 * current context; NULL when it does not open. Errors: KV004, KV005.
 */
char *
kv_envelope_open(const char *user_id, const KvSecretName *name, const bytea *record)
{
	RecordHeader header;
	const uint8 *cipher = (const uint8 *) VARDATA_ANY(record) + sizeof(RecordHeader);
	Size		length = kv_envelope_secret_length(record);
	KvRecordKey record_key;
	KvAssociatedData associated;
	char	   *secret;
	bool		opened;

	if (!read_header(record, &header) || !find_record_key(&record_key, &header, user_id))
		return NULL;
	secret = kv_secret_alloc(length + 1);
	opened = kv_bytes_equal(record_key.commitment, header.commitment, KV_COMMITMENT_SIZE);
	if (opened)
	{
		record_associated_data(&associated, &header, &record_key.vault_id, user_id, name);
		opened = kv_aead_open(record_key.key, header.nonce, associated.bytes, associated.length,
							  cipher, length, cipher + length, (uint8 *) secret);
	}
	kv_secret_wipe(&record_key, sizeof(record_key));
	secret[length] = '\0';
	return opened ? secret : NULL;
}
