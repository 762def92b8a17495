/*
 * What the targets of sealed formats have in common: a valid value is the only one that opens. Once, all its
 * neighbours are tried: every byte with every other value, every length up to its own and a little beyond.
 */
#ifndef KV_FUZZ_FORGE_H
#define KV_FUZZ_FORGE_H

#include "server.h"

#define VALID_MAX 1024

/* Does this open? */
typedef bool (*Opens) (const bytea *value);

static uint8 valid[VALID_MAX];
static size_t valid_length = 0;

/* Only what is the valid value opens, however its length word is written. */
static inline void
opens_if_valid(const uint8 *bytes, size_t length, Opens opens)
{
	bool		is_valid = length == valid_length && memcmp(bytes, valid, length) == 0;

	for (int packed = 0; packed <= 1; packed++)
		KV_HOLDS(opens(kv_exact_bytea(bytes, length, packed != 0)) == is_valid);
	kv_free_all();
}

/* Try all neighbours of the valid value, with every step-th value of each byte. */
static inline void
try_neighbours(Opens opens, int step)
{
	uint8		bytes[VALID_MAX + 16] = {0};
	size_t		tried = 0;

	memcpy(bytes, valid, valid_length);
	for (size_t length = 0; length <= valid_length + 16; length++)
		opens_if_valid(bytes, length, opens);
	for (size_t i = 0; i < valid_length; i++)
	{
		for (int change = 1; change < 256; change += step)
		{
			bytes[i] = valid[i] ^ (uint8) change;
			opens_if_valid(bytes, valid_length, opens);
			tried++;
		}
		bytes[i] = valid[i];
	}
	fputs(psprintf("%zu changed bytes refused\n", tried), stderr);
	kv_free_all();
}

/* Read the file that the environment names: the valid value, which the corpus has as well. */
static inline void
load_valid(const char *variable)
{
	const char *path = getenv(variable);
	FILE	   *file = path ? fopen(path, "rb") : NULL;

	KV_HOLDS(file != NULL);
	valid_length = fread(valid, 1, VALID_MAX, file);
	fclose(file);
}

#endif
