/*
 * Texts that may hold a secret: nothing beyond their end is touched, and what was scrubbed holds nothing of a key's shape.
 * The input is a secret behind its length in one byte, then the text.
 */
#include "server.h"

#include "base/secret_text.h"

static char *
exact_text(const uint8 *data, size_t size)
{
	char	   *text = palloc(size + 1);

	memcpy(text, data, size);
	text[size] = '\0';
	return kv_exact_copy(text, strlen(text) + 1);
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	size_t		secret_length = size > 0 ? Min((size_t) data[0] % 32, size - 1) : 0;
	char	   *secret = exact_text(data + (size > 0), secret_length);
	char	   *text = exact_text(data + (size > 0) + secret_length, size - (size > 0) - secret_length);
	char	   *before = pstrdup(text);
	bool		named;
	bool		shaped;

	named = kv_secret_text_names_secret(text);
	KV_HOLDS(kv_secret_text_names_secret(psprintf("%s store_api_key", text)));
	KV_HOLDS(!named || kv_secret_text_names_secret(psprintf("%s ", text)));
	shaped = kv_secret_text_has_key_shape(text);
	kv_secret_text_scrub_key_shapes(text);
	KV_HOLDS(shaped == (strcmp(text, before) != 0));
	KV_HOLDS(!kv_secret_text_has_key_shape(text) && strlen(text) == strlen(before));
	text = kv_exact_copy(before, strlen(before) + 1);
	kv_secret_text_scrub_json(text, strlen(text), secret);
	KV_HOLDS(strlen(text) == strlen(before));
	/* Where there are escapes, what begins inside one is none of the text's characters. */
	if (*secret && strchr(secret, KV_SECRET_TEXT_MASK) == NULL && strchr(before, '\\') == NULL)
	{
		KV_HOLDS((strcmp(text, before) != 0) == (strstr(before, secret) != NULL));
		KV_HOLDS(strstr(text, secret) == NULL);
	}
	kv_free_all();
	return 0;
}
