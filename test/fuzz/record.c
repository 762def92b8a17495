/*
 * Secret records: of all texts only the golden record opens, and it to its secret, for its own row alone.
 */
#include "forge.h"
#include "golden.h"

#include "crypto/envelope.h"
#include "crypto/master_key.h"
#include "crypto/record_key_cache.h"

uint32
kv_master_key_generation(void)
{
	return 1;
}

/* Every version and every id finds the key: cryptography alone tells records apart. */
KvDataKey *
kv_data_key_find(const char *user_id, uint32 version, const uint8 *id)
{
	KvDataKey	data_key = golden_data_key();

	return (KvDataKey *) kv_exact_copy(&data_key, sizeof(data_key));
}

bool
kv_record_key_cache_get(const KvRecordId *id, uint32 generation, KvRecordKey *record_key)
{
	return false;
}

void
kv_record_key_cache_put(const KvRecordId *id, uint32 generation, const KvRecordKey *record_key)
{
}

static bool
opens(const bytea *record)
{
	KvSecretName name = {.id = golden_secret_id,.provider = "openai",.purpose = "api_key"};
	char	   *secret = kv_envelope_open(GOLDEN_USER, &name, record);

	if (secret == NULL)
		return false;
	KV_HOLDS(strcmp(secret, GOLDEN_SECRET) == 0);
	KV_HOLDS(kv_envelope_open("golde", &name, record) == NULL);
	name.provider = "gemini";
	KV_HOLDS(kv_envelope_open(GOLDEN_USER, &name, record) == NULL);
	/* The same bytes, divided otherwise. */
	name.provider = "openaiapi";
	name.purpose = "_key";
	KV_HOLDS(kv_envelope_open(GOLDEN_USER, &name, record) == NULL);
	name.provider = "openai";
	name.purpose = "reference";
	KV_HOLDS(kv_envelope_open(GOLDEN_USER, &name, record) == NULL);
	name.purpose = "api_key";
	name.id.data[0] ^= 1;
	KV_HOLDS(kv_envelope_open(GOLDEN_USER, &name, record) == NULL);
	return true;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	load_valid("KV_FUZZ_RECORD");
	try_neighbours(opens, 1);
	return 0;
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	opens_if_valid(data, size, opens);
	return 0;
}
