/*-------------------------------------------------------------------------
 * json_field.c
 *		Fields of JSON that a stranger sent: a field that is missing, of another type or
 *		out of range counts as missing, and nothing here throws on bad JSON.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/json_field.h"

#include "fmgr.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/memutils.h"

/* More tokens than any call can use; a larger count is not believed. */
#define COUNT_MAX INT64CONST(1000000000)

/*
 * jsonb_in, with NULL in place of an error about its input. PostgreSQL 16 can be asked for
 * that, but throws all the same where JSON nests too deep. jsonb_in touches nothing but
 * memory, so that there is nothing to roll back; other errors than about data go on their way.
 */
static Jsonb *
jsonb_or_null(char *text)
{
	MemoryContext context = CurrentMemoryContext;
	Jsonb	   *volatile json = NULL;

	PG_TRY();
	{
		json = DatumGetJsonbP(DirectFunctionCall1(jsonb_in, CStringGetDatum(text)));
	}
	PG_CATCH();
	{
		int			category = ERRCODE_TO_CATEGORY(geterrcode());

		if (category != ERRCODE_TO_CATEGORY(ERRCODE_DATA_EXCEPTION) &&
			category != ERRCODE_TO_CATEGORY(ERRCODE_PROGRAM_LIMIT_EXCEEDED) &&
			category != ERRCODE_TO_CATEGORY(ERRCODE_UNTRANSLATABLE_CHARACTER) &&
			geterrcode() != ERRCODE_FEATURE_NOT_SUPPORTED)
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
		json = NULL;
	}
	PG_END_TRY();
	return json;
}

/* Append text in UTF-8 with every character beyond ASCII as a JSON escape. */
static void
append_escaped(StringInfo out, const char *text, Size length)
{
	for (const unsigned char *p = (const unsigned char *) text, *end = p + length; p < end; p += pg_utf_mblen(p))
	{
		pg_wchar	c = *p < 0x80 ? *p : utf8_to_unicode(p);

		if (c < 0x80)
			appendStringInfoChar(out, (char) c);
		else if (c < 0x10000)
			appendStringInfo(out, "\\u%04x", (unsigned int) c);
		else
			appendStringInfo(out, "\\u%04x\\u%04x", (unsigned int) (0xd800 + ((c - 0x10000) >> 10)),
							 (unsigned int) (0xdc00 + ((c - 0x10000) & 0x3ff)));
	}
}

/* Parse text of the given length, in UTF-8; NULL when it is not JSON that the database can hold. */
Jsonb *
kv_json_parse(const char *text, Size length)
{
	StringInfoData copy;

	if (memchr(text, '\0', length) != NULL ||
		!pg_verify_mbstr(PG_UTF8, text, (int) length, true))
		return NULL;
	initStringInfo(&copy);
	/* In another encoding the parser turns escapes into its characters, or refuses them. */
	if (GetDatabaseEncoding() == PG_UTF8)
		appendBinaryStringInfo(&copy, text, (int) length);
	else
		append_escaped(&copy, text, length);
	return jsonb_or_null(copy.data);
}

/* A member of an object, by its key, or of an array, by its number from 0; false when there is none. */
static bool
find_member(JsonbContainer *container, const char *key, int length, JsonbValue *value)
{
	JsonbValue *found = NULL;

	if (JsonContainerIsObject(container))
		return getKeyJsonValueFromContainer(container, key, length, value) != NULL;
	if (JsonContainerIsArray(container) && length > 0 && strspn(key, "0123456789") >= (Size) length)
		found = getIthJsonbValueFromContainer(container, (uint32) strtoul(key, NULL, 10));
	if (found)
		*value = *found;
	return found != NULL;
}

/* The value at a path of keys, or numbers in arrays, with dots between them; false when there is none. */
static bool
find_value(Jsonb *json, const char *path, JsonbValue *value)
{
	JsonbContainer *container = &json->root;

	for (;;)
	{
		const char *dot = strchr(path, '.');
		int			length = dot ? (int) (dot - path) : (int) strlen(path);

		if (!find_member(container, path, length, value))
			return false;
		if (dot == NULL)
			return true;
		if (value->type != jbvBinary)
			return false;
		container = value->val.binary.data;
		path = dot + 1;
	}
}

/* A whole number from 0 to 10^9. */
bool
kv_json_count(Jsonb *json, const char *path, int64 *count)
{
	Numeric		amount;
	Numeric		limit = int64_to_numeric(COUNT_MAX);

	if (!kv_json_amount(json, path, &amount) ||
		DatumGetBool(DirectFunctionCall2(numeric_gt, NumericGetDatum(amount), NumericGetDatum(limit))))
		return false;
	*count = DatumGetInt64(DirectFunctionCall1(numeric_int8, NumericGetDatum(amount)));
	return true;
}

/* A number that is not negative. */
bool
kv_json_amount(Jsonb *json, const char *path, Numeric *amount)
{
	JsonbValue	value;

	if (!find_value(json, path, &value) || value.type != jbvNumeric ||
		DatumGetBool(DirectFunctionCall2(numeric_lt, NumericGetDatum(value.val.numeric), NumericGetDatum(int64_to_numeric(0)))))
		return false;
	*amount = value.val.numeric;
	return true;
}

/* A string, or NULL. */
char *
kv_json_string(Jsonb *json, const char *path)
{
	JsonbValue	value;

	if (!find_value(json, path, &value) || value.type != jbvString)
		return NULL;
	return pnstrdup(value.val.string.val, value.val.string.len);
}
