/*
 * Sealed boxes: of all texts only the one that was sealed opens, and it to its secret, for its own user and provider
 * alone. The box is made here, and written where the environment says when it says so.
 */
#include "forge.h"
#include "golden.h"

#include "crypto/sealed_box.h"

static KvBoxKey key;

static KvBoxBinding
binding(void)
{
	return (KvBoxBinding) {.label = KV_BOX_LABEL,.vault_id = golden_vault_id,.user_id = GOLDEN_USER,.context = "openai"};
}

static bool
opens_for(const KvBoxBinding *bound, const bytea *box)
{
	Size		length;
	char	   *secret;

	if (!kv_sealed_box_is(box) || !kv_sealed_box_looks_right(box))
		return false;
	(void) kv_sealed_box_key_id(box);
	secret = kv_sealed_box_open(&key, bound, box, &length);
	if (secret == NULL)
		return false;
	KV_HOLDS(length == strlen(GOLDEN_SECRET) && strcmp(secret, GOLDEN_SECRET) == 0);
	return true;
}

static bool
opens(const bytea *box)
{
	KvBoxBinding bound = binding();

	if (!opens_for(&bound, box))
		return false;
	bound.user_id = "golde";
	KV_HOLDS(!opens_for(&bound, box));
	/* The same bytes, divided otherwise. */
	bound.user_id = "goldeno";
	bound.context = "penai";
	KV_HOLDS(!opens_for(&bound, box));
	bound = binding();
	bound.label = "keyvault/v1/call-key";
	KV_HOLDS(!opens_for(&bound, box));
	bound = binding();
	bound.vault_id.data[15] ^= 1;
	KV_HOLDS(!opens_for(&bound, box));
	return true;
}

int
LLVMFuzzerInitialize(int *argc, char ***argv)
{
	KvBoxBinding bound = binding();
	const char *path = getenv("KV_FUZZ_BOX");
	FILE	   *file;
	bytea	   *box;

	kv_sealed_box_make_key(&key);
	box = kv_sealed_box_seal(&key, &bound, GOLDEN_SECRET, strlen(GOLDEN_SECRET));
	valid_length = VARSIZE_ANY_EXHDR(box);
	memcpy(valid, VARDATA_ANY(box), valid_length);
	kv_free_all();
	/* A seed, so that the search starts from a box. */
	if (path && (file = fopen(path, "wb")) != NULL)
	{
		fwrite(valid, 1, valid_length, file);
		fclose(file);
	}
	try_neighbours(opens, 37);
	return 0;
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	uint8		spliced[VALID_MAX];
	size_t		prefix = Min(size, offsetof(KvBoxKey, private_key));

	opens_if_valid(data, size, opens);
	/* Keys are made anew in each run: other bytes behind this run's key id and a point of the input's. */
	memcpy(spliced, valid, valid_length);
	if (size > 0)
		memcpy(spliced + 1 + KV_BOX_KEY_ID_SIZE, data, Min(prefix, valid_length - 1 - KV_BOX_KEY_ID_SIZE));
	opens_if_valid(spliced, valid_length, opens);
	return 0;
}
