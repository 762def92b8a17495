/*-------------------------------------------------------------------------
 * key_shape.c
 *		What a provider's key looks like, without saying what it is.
 *
 * A problem is described by lengths, places and kinds of characters, never by the
 * characters of the key.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/key_shape.h"

#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/secret.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"

/* A hint shows the ends of keys at least this long; of a shorter one it would show too much. */
#define HINT_LENGTH_MIN	16

/* How keys begin that say whose they are. */
static const struct
{
	const char *prefix;
	const char *provider;
}			known_prefixes[] = {
	{"sk-ant-", "anthropic"}, {"sk-proj-", "openai"}, {"AIza", "gemini"}, {"xai-", "xai"}, {"gsk_", "groq"},
};

/* What a character that no key has is called. */
static const char *
kind_of_character(unsigned char c)
{
	if (c == ' ')
		return "a space";
	if (c == '\n' || c == '\r')
		return "a line break";
	if (c == '\t')
		return "a tab";
	if (IS_HIGHBIT_SET(c))
		return "not ASCII";
	return "a control character";
}

/*
 * Does the provider's own pattern, if it has one, allow the key? The key is no parameter of a statement: what logs
 * plans or parameters would show it, in the worker too.
 */
static bool
matches_pattern(const char *key, const char *provider)
{
	static KvStatement find = {"SELECT key_pattern FROM keyvault.providers WHERE provider = $1", 1, {TEXTOID}};
	Datum		value = CStringGetTextDatum(provider);
	bool		isnull;
	Datum		pattern = kv_statement_value(&find, &value, NULL, &isnull);
	text	   *copy;
	bool		matches;

	if (isnull)
		return true;
	copy = cstring_to_text(key);
	matches = DatumGetBool(DirectFunctionCall2Coll(textregexeq, DEFAULT_COLLATION_OID, PointerGetDatum(copy), pattern));
	kv_secret_wipe(VARDATA(copy), strlen(key));
	return matches;
}

/* What a key that the provider's pattern refuses looks like. */
static const char *
describe_mismatch(const char *key, const char *provider)
{
	for (size_t i = 0; i < lengthof(known_prefixes); i++)
		if (strncmp(key, known_prefixes[i].prefix, strlen(known_prefixes[i].prefix)) == 0 &&
			strcmp(known_prefixes[i].provider, provider) != 0)
			return psprintf("It begins as keys of provider \"%s\" do.", known_prefixes[i].provider);
	return "It does not match the provider's key_pattern.";
}

/*
 * Why a key cannot be one of the provider, as a sentence; NULL when it can. Call between
 * kv_owner_begin and kv_owner_end.
 */
const char *
kv_key_shape_problem(const char *key, Size length, const char *provider)
{
	for (Size i = 0; i < length; i++)
		if (key[i] < '!' || key[i] > '~')
			return psprintf("Byte %zu of its %zu is %s; a key has printable ASCII characters without spaces.",
							i + 1, length, kind_of_character((unsigned char) key[i]));
	if (length < KV_KEY_LENGTH_MIN || length > KV_KEY_LENGTH_MAX)
		return psprintf("It is %zu characters long; a key has %d to %d.", length, KV_KEY_LENGTH_MIN, KV_KEY_LENGTH_MAX);
	if (!matches_pattern(key, provider))
		return describe_mismatch(key, provider);
	return NULL;
}

/* Has it the length and the characters of a key, whosever it is? */
bool
kv_key_shape_is_sendable(const char *key)
{
	Size		length = strlen(key);

	for (const char *p = key; *p; p++)
		if (*p < '!' || *p > '~')
			return false;
	return length >= KV_KEY_LENGTH_MIN && length <= KV_KEY_LENGTH_MAX;
}

/* Error KV009 unless key can be a key of the provider. Call between kv_owner_begin and kv_owner_end. */
void
kv_key_shape_check(const char *key, Size length, const char *provider)
{
	const char *problem = kv_key_shape_problem(key, length, provider);

	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_KV_KEY_MALFORMED),
				 errmsg("API key for provider \"%s\" is malformed", provider),
				 errdetail("%s", problem),
				 errhint("Copy the key again from the provider's console, without spaces or line breaks.")));
}

/* Enough of a key for its owner to recognise it. */
char *
kv_key_shape_hint(const char *key)
{
	const char *ellipsis = GetDatabaseEncoding() == PG_UTF8 ? "\xE2\x80\xA6" : "...";
	Size		length = strlen(key);

	if (length < HINT_LENGTH_MIN)
		return pstrdup(ellipsis);
	return psprintf("%.3s%s%s", key, ellipsis, key + length - 4);
}
