/*-------------------------------------------------------------------------
 * call_key.c
 *		A key that is used for one call and not kept.
 *
 * It waits in the queue sealed under a random key that exists only in this run's shared
 * memory: what reaches the disk opens for nobody once the server has stopped.
 *
 * Sealed: nonce (12) | ciphertext | tag (16); associated data: the user and the request.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/call_key.h"

#include "base/pg_version.h"
#include "base/secret.h"
#include "crypto/aead.h"
#include "crypto/associated_data.h"

/* In shared memory, made with it. */
static uint8 *run_key = NULL;

Size
kv_call_key_shmem_size(void)
{
	return KV_KEY_SIZE;
}

/* Make the key of this run, or find the one that the postmaster made. */
void
kv_call_key_shmem_init(void *memory, bool found)
{
	run_key = memory;
	if (!found)
		kv_random_bytes(run_key, KV_KEY_SIZE);
}

static void
associate(KvAssociatedData *associated, const char *user_id, const pg_uuid_t *request_id)
{
	static const char label[] = "keyvault/v1/call-key";

	kv_associated_data_init(associated, (const uint8 *) label, strlen(label));
	kv_associated_data_add(associated, (const uint8 *) user_id, strlen(user_id));
	kv_associated_data_add(associated, request_id->data, UUID_LEN);
}

/* Seal a key for one request. */
bytea *
kv_call_key_seal(const char *user_id, const pg_uuid_t *request_id, const char *key)
{
	Size		length = strlen(key);
	Size		size = VARHDRSZ + KV_NONCE_SIZE + length + KV_TAG_SIZE;
	bytea	   *sealed = palloc(size);
	uint8	   *nonce = (uint8 *) VARDATA(sealed);
	uint8	   *cipher = nonce + KV_NONCE_SIZE;
	KvAssociatedData associated;

	SET_VARSIZE(sealed, size);
	kv_random_bytes(nonce, KV_NONCE_SIZE);
	associate(&associated, user_id, request_id);
	kv_aead_seal(run_key, nonce, associated.bytes, associated.length, (const uint8 *) key, length, cipher, cipher + length);
	return sealed;
}

/* Open it, in secret memory; NULL when it was sealed by another run of the server, or moved. */
char *
kv_call_key_open(const char *user_id, const pg_uuid_t *request_id, const bytea *sealed)
{
	const uint8 *nonce = (const uint8 *) VARDATA_ANY(sealed);
	const uint8 *cipher = nonce + KV_NONCE_SIZE;
	Size		length;
	char	   *key;
	KvAssociatedData associated;

	if (VARSIZE_ANY_EXHDR(sealed) < KV_NONCE_SIZE + KV_TAG_SIZE)
		return NULL;
	length = VARSIZE_ANY_EXHDR(sealed) - KV_NONCE_SIZE - KV_TAG_SIZE;
	key = kv_secret_alloc(length + 1);
	associate(&associated, user_id, request_id);
	if (!kv_aead_open(run_key, nonce, associated.bytes, associated.length, cipher, length, cipher + length, (uint8 *) key))
		return NULL;
	key[length] = '\0';
	return key;
}
