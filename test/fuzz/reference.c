/*
 * References to keys elsewhere: what is taken names one field below one mount, and nothing in it means anything to a URL.
 */
#include "server.h"

#include "vault/key_reference.h"

static bool
consists_of(const char *text, const char *more)
{
	for (; *text; text++)
		if (!((*text >= 'a' && *text <= 'z') || (*text >= 'A' && *text <= 'Z') || (*text >= '0' && *text <= '9') ||
			  strchr(more, *text) != NULL))
			return false;
	return true;
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	char	   *reference = palloc(size + 1);
	char	   *path;
	char	   *field;

	memcpy(reference, data, size);
	reference[size] = '\0';
	if (kv_key_reference_parse(reference, &path, &field))
	{
		KV_HOLDS(strlen(reference) <= KV_REFERENCE_MAX);
		KV_HOLDS(*field && consists_of(field, "_-"));
		KV_HOLDS(consists_of(path, "_-./") && path[0] != '/' && strstr(path, "//") == NULL && path[strlen(path) - 1] != '/');
		KV_HOLDS(strstr(psprintf("/%s/", path), "/../") == NULL && strstr(psprintf("/%s/", path), "/./") == NULL);
		KV_HOLDS(strncmp(strchr(path, '/'), "/data/", 6) == 0);
	}
	kv_free_all();
	return 0;
}
