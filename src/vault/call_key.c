/*-------------------------------------------------------------------------
 * call_key.c
 *		A key that is used for one call and not kept.
 *
 * It waits in the queue sealed under a random key that exists only in this run's shared
 * memory: what reaches the disk opens for nobody once the server has stopped.
 *
 * Sealed: a kind, then nonce (12) | ciphertext | tag (16); associated data: the user and
 * the request. Where this process may not open keys, that is in turn in a sealed box, which
 * only the worker opens: every process of this run has the run's key.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/call_key.h"

#include "base/pg_version.h"
#include "base/secret.h"
#include "crypto/aead.h"
#include "crypto/associated_data.h"
#include "crypto/reveal.h"
#include "crypto/sealing_key.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"

/* The kinds. */
#define UNDER_RUN_KEY	'R'
#define IN_BOX			'B'

static const char label[] = "keyvault/v1/call-key";

/* In a page that all processes share and that stays out of core files. */
static uint8 *run_key = NULL;

/* The server's own shared memory, which core files have, holds nothing of it; its making tells when a run begins. */
Size
kv_call_key_shmem_size(void)
{
	return 1;
}

/* Make the key of this run, another one after a crash, too. */
void
kv_call_key_shmem_init(void *memory, bool found)
{
	if (run_key == NULL)
		run_key = kv_secret_run_page(KV_KEY_SIZE);
	if (!found)
		kv_random_bytes(run_key, KV_KEY_SIZE);
}

static void
associate(KvAssociatedData *associated, const char *user_id, const pg_uuid_t *request_id)
{
	kv_associated_data_init(associated, (const uint8 *) label, strlen(label));
	kv_associated_data_add(associated, (const uint8 *) user_id, strlen(user_id));
	kv_associated_data_add(associated, request_id->data, UUID_LEN);
}

/* nonce | ciphertext | tag, under this run's key. */
static bytea *
seal_for_this_run(const char *user_id, const pg_uuid_t *request_id, const char *key)
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

static char *
open_of_this_run(const char *user_id, const pg_uuid_t *request_id, const uint8 *sealed, Size size)
{
	const uint8 *cipher = sealed + KV_NONCE_SIZE;
	Size		length;
	char	   *key;
	KvAssociatedData associated;

	if (size < KV_NONCE_SIZE + KV_TAG_SIZE)
		return NULL;
	length = size - KV_NONCE_SIZE - KV_TAG_SIZE;
	key = kv_secret_alloc(length + 1);
	associate(&associated, user_id, request_id);
	if (!kv_aead_open(run_key, sealed, associated.bytes, associated.length, cipher, length, cipher + length, (uint8 *) key))
		return NULL;
	key[length] = '\0';
	return key;
}

/* A kind, then what it says. */
static bytea *
with_kind(uint8 kind, const void *bytes, Size length)
{
	bytea	   *sealed = palloc(VARHDRSZ + 1 + length);

	SET_VARSIZE(sealed, VARHDRSZ + 1 + length);
	*(uint8 *) VARDATA(sealed) = kind;
	memcpy(VARDATA(sealed) + 1, bytes, length);
	return sealed;
}

static char *
box_context(const pg_uuid_t *request_id)
{
	return DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(request_id)));
}

/* Seal a key for one request. Call between kv_owner_begin and kv_owner_end. Error: KV004. */
bytea *
kv_call_key_seal(const char *user_id, const pg_uuid_t *request_id, const char *key)
{
	bytea	   *sealed = seal_for_this_run(user_id, request_id, key);

	if (kv_reveal_may_open())
		return with_kind(UNDER_RUN_KEY, VARDATA(sealed), VARSIZE(sealed) - VARHDRSZ);
	sealed = kv_sealing_key_seal_box(label, user_id, box_context(request_id), VARDATA(sealed), VARSIZE(sealed) - VARHDRSZ);
	return with_kind(IN_BOX, VARDATA(sealed), VARSIZE(sealed) - VARHDRSZ);
}

/* Open it, in secret memory; NULL when it was sealed by another run of the server, or moved. Error: KV004. */
char *
kv_call_key_open(const char *user_id, const pg_uuid_t *request_id, const bytea *sealed)
{
	const uint8 *bytes = (const uint8 *) VARDATA_ANY(sealed);
	Size		length = VARSIZE_ANY_EXHDR(sealed);
	bytea	   *box;

	if (length > 0 && bytes[0] == UNDER_RUN_KEY)
		return open_of_this_run(user_id, request_id, bytes + 1, length - 1);
	if (length == 0 || bytes[0] != IN_BOX)
		return NULL;
	box = palloc(VARHDRSZ + length - 1);
	SET_VARSIZE(box, VARHDRSZ + length - 1);
	memcpy(VARDATA(box), bytes + 1, length - 1);
	if (!kv_sealed_box_looks_right(box))
		return NULL;
	bytes = (const uint8 *) kv_sealing_key_open_box(label, user_id, box_context(request_id), box, &length);
	return bytes ? open_of_this_run(user_id, request_id, bytes, length) : NULL;
}
