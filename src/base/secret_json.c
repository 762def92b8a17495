/*-------------------------------------------------------------------------
 * secret_json.c
 *		Values out of JSON that holds secrets.
 *
 * PostgreSQL's parser goes over the text where it is, and each string that it hands out is
 * wiped: after a search the text and what was found are the only copies. Nothing here throws
 * on bad JSON.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/secret_json.h"

#include "base/pg_version.h"
#include "base/secret.h"
#include "common/jsonapi.h"
#include "lib/stringinfo.h"
#include "mb/pg_wchar.h"

/* A path has fewer keys. */
#define KEYS_MAX	16
#define COUNT_MAX	INT64CONST(1000000000)

typedef struct Search
{
	char	   *keys[KEYS_MAX];
	int			n_keys;
	int			level;			/* of the member that the parser is in */
	int			matched;		/* how many of the path's keys lead to it */
	int			element[KEYS_MAX];	/* the next one's number in the array at each level */
	KvSecretJsonValue *value;
} Search;

static void
enter_member(Search *search, const char *key)
{
	if (search->matched == search->level && search->level < search->n_keys && strcmp(search->keys[search->level], key) == 0)
		search->matched++;
	search->level++;
}

static void
leave_member(Search *search)
{
	search->level--;
	search->matched = Min(search->matched, search->level);
}

static KvJsonActionResult
array_start(void *arg)
{
	Search	   *search = arg;

	if (search->level < KEYS_MAX)
		search->element[search->level] = 0;
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
element_start(void *arg, bool isnull)
{
	Search	   *search = arg;
	char		number[16] = "";

	if (search->level < KEYS_MAX)
		snprintf(number, sizeof(number), "%d", search->element[search->level]++);
	enter_member(search, number);
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
element_end(void *arg, bool isnull)
{
	leave_member(arg);
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
field_start(void *arg, char *name, bool isnull)
{
	enter_member(arg, name);
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
field_end(void *arg, char *name, bool isnull)
{
	leave_member(arg);
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
scalar(void *arg, char *token, JsonTokenType type)
{
	Search	   *search = arg;
	Size		length = strlen(token);

	if (search->level == search->n_keys && search->matched == search->n_keys)
	{
		search->value->string = NULL;
		search->value->count = -1;
		if (type == JSON_TOKEN_STRING)
			search->value->string = memcpy(kv_secret_alloc(length + 1), token, length + 1);
		else if (type == JSON_TOKEN_NUMBER && length < 11 && strspn(token, "0123456789") == length && strtoll(token, NULL, 10) <= COUNT_MAX)
			search->value->count = strtoll(token, NULL, 10);
	}
	kv_secret_wipe(token, length);
	return KV_JSON_ACTION_DONE;
}

/* Let the parser go over text in an encoding; false when it is not JSON. */
static bool
parse(const char *text, Size length, int encoding, JsonSemAction *actions)
{
	MemoryContext context = CurrentMemoryContext;
	JsonLexContext *lex = KvMakeJsonLexContext(text, (int) length, encoding);
	volatile bool is_json = false;

	/* No string of the text is longer, so that the buffer never moves and leaves a copy behind. */
	enlargeStringInfo(lex->strval, (int) length + MAX_MULTIBYTE_CHAR_LEN);
	PG_TRY();
	{
		is_json = pg_parse_json(lex, actions) == JSON_SUCCESS;
	}
	PG_CATCH();
	{
		int			category = ERRCODE_TO_CATEGORY(geterrcode());

		/* Characters that the database does not have, and nesting without end. There is nothing to roll back. */
		kv_secret_wipe(lex->strval->data, lex->strval->maxlen);
		if (category != ERRCODE_TO_CATEGORY(ERRCODE_DATA_EXCEPTION) &&
			category != ERRCODE_TO_CATEGORY(ERRCODE_PROGRAM_LIMIT_EXCEEDED) && geterrcode() != ERRCODE_FEATURE_NOT_SUPPORTED)
			PG_RE_THROW();
		MemoryContextSwitchTo(context);
		FlushErrorState();
	}
	PG_END_TRY();
	kv_secret_wipe(lex->strval->data, lex->strval->maxlen);
	return is_json;
}

/*
 * Find the string, or the number, at a path of keys, or numbers in arrays, with dots between
 * them, in text of the given length in UTF-8. False when the text is not JSON.
 */
bool
kv_secret_json_find(const char *text, Size length, const char *path, KvSecretJsonValue *value)
{
	Search		search = {.value = value};
	char	   *rest = pstrdup(path);
	JsonSemAction actions = {
		.semstate = &search,.array_start = array_start,.array_element_start = element_start,.array_element_end = element_end,
		.object_field_start = field_start,.object_field_end = field_end,.scalar = scalar,
	};

	value->string = NULL;
	value->count = -1;
	if (memchr(text, '\0', length) != NULL || !pg_verify_mbstr(PG_UTF8, text, (int) length, true))
		return false;
	while (rest && search.n_keys < KEYS_MAX)
		search.keys[search.n_keys++] = strsep(&rest, ".");
	return parse(text, length, PG_UTF8, &actions);
}

/* Fields of the object that the parser is in. */
typedef struct Fields
{
	KvSecretJsonField *fields;
	int			n;
	KvSecretJsonField *current; /* the one whose value comes next, or NULL */
	int			depth;			/* objects and arrays around it */
	bool		is_object;
} Fields;

static KvJsonActionResult
object_opens(void *arg)
{
	Fields	   *fields = arg;

	fields->is_object = fields->is_object || fields->depth == 0;
	fields->depth++;
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
array_opens(void *arg)
{
	((Fields *) arg)->depth++;
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
closes(void *arg)
{
	((Fields *) arg)->depth--;
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
field_opens(void *arg, char *name, bool isnull)
{
	Fields	   *fields = arg;

	fields->current = NULL;
	if (fields->depth == 1 && fields->is_object)
		for (int i = 0; i < fields->n; i++)
			if (strcmp(fields->fields[i].name, name) == 0)
			{
				fields->current = &fields->fields[i];
				fields->current->times++;
			}
	return KV_JSON_ACTION_DONE;
}

static KvJsonActionResult
field_scalar(void *arg, char *token, JsonTokenType type)
{
	Fields	   *fields = arg;
	Size		length = strlen(token);

	if (fields->current && fields->depth == 1)
	{
		fields->current->is_null = type == JSON_TOKEN_NULL;
		if (type == JSON_TOKEN_STRING)
			fields->current->string = memcpy(kv_secret_alloc(length + 1), token, length + 1);
	}
	kv_secret_wipe(token, length);
	return KV_JSON_ACTION_DONE;
}

/*
 * Read fields of an object in text of the given length in the database's encoding: those with these names, which are
 * given with all else zeros. False when the text is not a JSON object.
 */
bool
kv_secret_json_read(const char *text, Size length, KvSecretJsonField *fields, int n)
{
	Fields		read = {.fields = fields,.n = n};
	JsonSemAction actions = {
		.semstate = &read,.object_start = object_opens,.object_end = closes,.array_start = array_opens,.array_end = closes,
		.object_field_start = field_opens,.scalar = field_scalar,
	};

	return parse(text, length, GetDatabaseEncoding(), &actions) && read.is_object;
}
