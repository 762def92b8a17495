/*-------------------------------------------------------------------------
 * reference.c
 *		Fetches keys that are kept on a Vault server, for the worker's calls.
 *
 * The worker asks through its own pool of transfers, so that a slow server holds up nobody
 * but the calls that wait for it. A fetched key is kept in the worker's memory for
 * keyvault.reference_cache_ttl, or the secret's own lease if that is shorter.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/reference.h"

#include "base/owner_spi.h"
#include "base/secret.h"
#include "base/secret_json.h"
#include "base/settings.h"
#include "base/vault_server.h"
#include "gateway/turn.h"
#include "utils/hsearch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "vault/key_reference.h"
#include "vault/key_shape.h"

/* With more than these the cache begins anew. */
#define KEYS_MAX		4096

typedef struct KnownKey
{
	char		reference[KV_REFERENCE_MAX + 1];
	TimestampTz until;
	char		key[KV_KEY_LENGTH_MAX + 1];
} KnownKey;

/* The worker's; made at the first fetch. */
static HTAB *known = NULL;

static void
make_cache(void)
{
	HASHCTL		control = {.keysize = KV_REFERENCE_MAX + 1,.entrysize = sizeof(KnownKey),.hcxt = TopMemoryContext};

	known = hash_create("keyvault keys of references", 64, &control, HASH_ELEM | HASH_STRINGS | HASH_CONTEXT);
}

static char *
secret_copy(const char *key)
{
	Size		size = strlen(key) + 1;

	return memcpy(kv_secret_alloc(size), key, size);
}

static void
forget(KnownKey *entry)
{
	kv_secret_wipe(entry->key, sizeof(entry->key));
	hash_search(known, entry->reference, HASH_REMOVE, NULL);
}

/* Forget what a reference stood for. */
void
kv_reference_forget(const char *reference)
{
	KnownKey   *entry = known ? hash_search(known, reference, HASH_FIND, NULL) : NULL;

	if (entry)
		forget(entry);
}

/* Forget all: the server, or the token, may be another one now. */
void
kv_reference_forget_all(void)
{
	HASH_SEQ_STATUS scan;
	KnownKey   *entry;

	if (known == NULL)
		return;
	hash_seq_init(&scan, known);
	while ((entry = hash_seq_search(&scan)) != NULL)
		forget(entry);
}

/* The key that a reference stood for a short while ago, in secret memory; NULL when it has to be fetched. */
char *
kv_reference_known(const char *reference)
{
	KnownKey   *entry = known ? hash_search(known, reference, HASH_FIND, NULL) : NULL;

	if (entry == NULL)
		return NULL;
	if (entry->until <= GetCurrentTimestamp())
	{
		forget(entry);
		return NULL;
	}
	return secret_copy(entry->key);
}

static void
keep(const char *reference, const char *key, int64 lease_seconds)
{
	int64		seconds = lease_seconds > 0 ? Min(lease_seconds, kv_reference_cache_ttl) : kv_reference_cache_ttl;
	KnownKey   *entry;

	if (seconds == 0)
		return;
	if (known == NULL)
		make_cache();
	if (hash_get_num_entries(known) >= KEYS_MAX)
		kv_reference_forget_all();
	entry = hash_search(known, reference, HASH_ENTER, NULL);
	strlcpy(entry->key, key, sizeof(entry->key));
	entry->until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), seconds * 1000);
}

/* Begin to fetch what a reference stands for. False, with a reason that goes on from "the Vault server", when it cannot be. */
bool
kv_reference_ask(const char *reference, KvTransferPool *pool, void *owner, const char **reason)
{
	KvVaultServerRequest prepared;
	KvTransferRequest request = {.is_own_server = true,.ca_file = kv_vault_ca_file,.timeout_ms = kv_master_key_timeout,.owner = owner};
	char	   *path;
	char	   *field;
	char	   *error = palloc0(256);

	*reason = "was not asked: the reference is malformed";
	if (!kv_key_reference_parse(reference, &path, &field) ||
		!kv_vault_server_prepare(path, &prepared, reason))
		return false;
	request.url = prepared.url;
	request.headers = prepared.headers;
	*reason = error;
	if (kv_transfer_start(pool, &request, error, 256))
		return true;
	*reason = psprintf("cannot be asked: %s", error);
	return false;
}

/*
 * The key in what the server answered, in secret memory; it is kept for the calls that
 * follow. NULL with a reason, and whether another attempt may find the server in a better state.
 */
char *
kv_reference_take(const char *reference, const KvTransferResult *result, bool *may_pass, const char **reason)
{
	char	   *path;
	char	   *field;
	KvSecretJsonValue key;
	KvSecretJsonValue lease;

	*may_pass = result->error[0] || result->status_code == 429 || result->status_code >= 500;
	if (result->error[0])
		*reason = psprintf("could not be reached: %s", result->error);
	else if (result->status_code != 200)
		*reason = kv_vault_server_reason(result->status_code);
	if (result->error[0] || result->status_code != 200)
		return NULL;
	*reason = "gave an answer that is not JSON";
	if (result->body == NULL || !kv_key_reference_parse(reference, &path, &field) ||
		!kv_secret_json_find(result->body, result->length, psprintf("data.data.%s", field), &key) ||
		!kv_secret_json_find(result->body, result->length, "lease_duration", &lease))
		return NULL;
	*reason = psprintf("has no text in the field \"%s\" of that secret", field);
	if (key.string == NULL)
		return NULL;
	*reason = "has something there that cannot be a key: not 8 to 512 printable ASCII characters";
	if (!kv_key_shape_is_sendable(key.string))
		return NULL;
	keep(reference, key.string, lease.count);
	return key.string;
}

/*
 * Why a fetched key cannot be one of the provider's, as a sentence; NULL when it can. False,
 * with a reason, when that cannot be told now. In a transaction of its own.
 */
bool
kv_reference_check(const char *key, const char *provider, const char **problem, const char **reason)
{
	MemoryContext context = CurrentMemoryContext;
	volatile bool checked = false;
	KvOwnerScope scope;
	char	   *message;

	*problem = NULL;
	PG_TRY();
	{
		kv_turn_begin("checking a key");
		kv_owner_begin(&scope);
		*problem = kv_key_shape_problem(key, strlen(key), provider);
		if (*problem)
			*problem = MemoryContextStrdup(context, *problem);
		kv_owner_end(&scope);
		kv_turn_end();
		checked = true;
	}
	PG_CATCH();
	{
		(void) kv_turn_roll_back(context, &message);
		*reason = psprintf("has a key there that could not be checked: %s", message);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	return checked;
}
