/*
 * Wrapped data keys: of all texts only the golden wrap opens, and it to its key, for its own row alone.
 */
#include "forge.h"
#include "golden.h"

#include "crypto/data_key_wrap.h"

/* Every id finds the key: cryptography alone tells wraps apart. */
const KvMasterKey *
kv_master_key_find(const uint8 *kek_id)
{
	static KvMasterKey master_key;

	memset(master_key.key, 0xc0, KV_KEY_SIZE);
	return &master_key;
}

static bool
opens(const bytea *wrap)
{
	KvDataKey	expected = golden_data_key();
	KvDataKey	data_key = golden_data_key();

	memset(data_key.key, 0, KV_KEY_SIZE);
	if (!kv_data_key_unwrap(&data_key, wrap))
		return false;
	KV_HOLDS(memcmp(data_key.key, expected.key, KV_KEY_SIZE) == 0);
	data_key.user_id = "golde";
	KV_HOLDS(!kv_data_key_unwrap(&data_key, wrap));
	data_key = expected;
	data_key.version++;
	KV_HOLDS(!kv_data_key_unwrap(&data_key, wrap));
	data_key = expected;
	data_key.id.data[15] ^= 1;
	KV_HOLDS(!kv_data_key_unwrap(&data_key, wrap));
	data_key = expected;
	data_key.vault_id.data[0] ^= 1;
	KV_HOLDS(!kv_data_key_unwrap(&data_key, wrap));
	return true;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	load_valid("KV_FUZZ_WRAP");
	try_neighbours(opens, 1);
	return 0;
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	opens_if_valid(data, size, opens);
	return 0;
}
