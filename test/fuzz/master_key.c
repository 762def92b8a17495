/*
 * What a source of master keys yields: taken when, and only when, it is 1 to 16 words of 64 hexadecimal digits.
 */
#include "server.h"

#include "base/error.h"
#include "crypto/master_key.h"
#include "crypto/master_key_cache.h"
#include "crypto/record_key_cache.h"
#include "crypto/reveal.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

static char *source_text;

static bool
is_configured(void)
{
	return true;
}

static bool
is_not_configured(void)
{
	return false;
}

static char *
describe(void)
{
	return "input";
}

static char *
fetch(const char **reason, const char **hint)
{
	*hint = "none";
	return source_text;
}

/* Without one, the vault is not asked which key it expects. */
bool
ActiveSnapshotSet(void)
{
	return false;
}

void
kv_record_key_cache_wipe(void)
{
}

const KvMasterKeySource kv_master_key_from_file = {KV_MASTER_KEY_FILE, "file", false, is_configured, describe, fetch};
const KvMasterKeySource kv_master_key_from_command = {KV_MASTER_KEY_COMMAND, "command", true, is_not_configured, describe, fetch};
const KvMasterKeySource kv_master_key_from_transit = {KV_MASTER_KEY_TRANSIT, "transit", true, is_not_configured, describe, fetch};

void
kv_reveal_require(void)
{
}

bool
kv_master_key_cache_get(KvMasterKeyRing *ring, TimestampTz not_before, KvMasterKeyFetch fetch_keys, const char **reason, const char **hint)
{
	return false;
}

/* How many keys the text holds; 0 when it is not made of keys. */
static int
count_keys(const char *text)
{
	int			n = 0;

	for (text += strspn(text, " \t\r\n"); *text; text += strspn(text, " \t\r\n"))
	{
		if (strspn(text, "0123456789abcdefABCDEF") != 64 || (text[64] && strchr(" \t\r\n", text[64]) == NULL))
			return 0;
		text += 64;
		n++;
	}
	return n <= 16 ? n : 0;
}

static void
get(void *argument)
{
	*(const KvMasterKey **) argument = kv_master_key_get();
}

static void
find(void *argument)
{
	(void) kv_master_key_find((const uint8 *) argument);
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	return 0;
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	uint8		other[KV_KEK_ID_SIZE] = {0};
	const KvMasterKey *key = NULL;
	int			thrown;

	if (size > KV_MASTER_KEY_TEXT_MAX)
		return 0;
	source_text = kv_exact_copy(data, size + 1 > size ? size : 0);
	source_text = memcpy(palloc(size + 1), source_text, size);
	source_text[size] = '\0';
	PgReloadTime++;
	thrown = kv_throws(get, &key);
	KV_HOLDS(thrown == (count_keys(source_text) > 0 ? 0 : ERRCODE_KV_MASTER_KEY));
	if (thrown == 0)
	{
		const char *first = source_text + strspn(source_text, " \t\r\n");

		KV_HOLDS(key->key[0] == (uint8) strtoul((char[]) {first[0], first[1], '\0'}, NULL, 16));
		KV_HOLDS(key->key[31] == (uint8) strtoul((char[]) {first[62], first[63], '\0'}, NULL, 16));
		KV_HOLDS(kv_throws(find, (void *) key->kek_id) == 0);
		KV_HOLDS(kv_throws(find, other) == ERRCODE_KV_MASTER_KEY);
	}
	kv_free_all();
	return 0;
}
