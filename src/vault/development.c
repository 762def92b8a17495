/*-------------------------------------------------------------------------
 * development.c
 *		Development mode: everybody's default keys are those of a .env file.
 *
 * In production the file is never opened. Keys are read from the file at each lookup, so
 * that what an editor saved counts at once. What a transaction changes it sees itself,
 * and the file gets when the transaction has committed: a rollback leaves it alone.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/development.h"

#include "access/xact.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/secret.h"
#include "base/settings.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "vault/env_file.h"
#include "vault/env_store.h"
#include "vault/key_shape.h"

PG_FUNCTION_INFO_V1(keyvault_env_file_has_key);

/* A change of the file that this transaction wants. */
typedef struct Change
{
	char	   *variable;
	char	   *value;			/* in secret memory; NULL to remove the variable */
	SubTransactionId subtransaction;
} Change;

/* In TopTransactionContext; forgotten when the transaction ends. */
static List *changes = NIL;

/* The configuration under which this process has said which file it uses, and warned about it. */
static TimestampTz announced_at = 0;
static bool announced = false;

/* What the environment of the server says, read once, before any code but the server's has run. */
static bool environment_is_development = false;

/* Is development mode on? */
bool
kv_development_is_on(void)
{
	return kv_mode == KV_MODE_DEVELOPMENT || (kv_mode == KV_MODE_AUTO && environment_is_development);
}

/* Does the file stand for the keys of that name? */
bool
kv_development_has(const char *name)
{
	return kv_development_is_on() && strcmp(name, KV_DEFAULT_KEY_NAME) == 0;
}

/* The path of the file. Error: 55000 when it is not usable. */
static const char *
env_path(void)
{
	if (!is_absolute_path(kv_env_file))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 kv_env_file[0] ? errmsg("keyvault.env_file is not an absolute path")
				 : errmsg("development mode has no .env file"),
				 errhint("ALTER SYSTEM SET keyvault.env_file = '/path/to/.env'; SELECT pg_reload_conf();  "
						 "Or turn development mode off: ALTER SYSTEM SET keyvault.mode = 'production'.")));
	return kv_env_file;
}

/* Say once per process and configuration which file is used, and that others can read it. */
static void
announce(const char *path, bool readable_by_others)
{
	if (announced && announced_at == PgReloadTime)
		return;
	announced = true;
	announced_at = PgReloadTime;
	ereport(LOG_SERVER_ONLY,
			(errmsg("[DEV MODE] Using .env file"), errdetail("The file is \"%s\".", path)));
	if (readable_by_others)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg(".env file \"%s\" can be read by everybody on this machine", path),
				 errhint("chmod 600 it.")));
}

/* The variable of a provider, or of all: SPI_tuptable has provider and variable. */
static uint64
find_variables(const char *provider)
{
	static KvStatement find = {
		"SELECT provider, coalesce(env_var, upper(translate(provider, '-', '_')) || '_API_KEY')"
		" FROM keyvault.providers WHERE $1 IN ('', provider) ORDER BY provider", 1, {TEXTOID}
	};
	Datum		value = CStringGetTextDatum(provider);

	return kv_statement_read(&find, &value, GetActiveSnapshot());
}

static void
raise_unwritable(const char *variable)
{
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("variable \"%s\" cannot be changed in the .env file without changing others", variable),
			 errhint("Look for quotes that are not closed in the file, or change the line by hand.")));
}

/* Make this transaction's changes to contents; false when there are none. */
static bool
apply_changes(KvEnvContents *contents, void *arg)
{
	bool		changed = false;
	ListCell   *cell;

	foreach(cell, changes)
	{
		Change	   *change = lfirst(cell);
		Size		room = contents->length + strlen(change->variable) + (change->value ? strlen(change->value) : 0) + KV_ENV_FILE_ROOM;
		char	   *bytes = kv_secret_alloc(room);
		Size		length;
		bool		done = change->value ?
			kv_env_file_set(contents->bytes, contents->length, change->variable, change->value, bytes, &length) :
			kv_env_file_remove(contents->bytes, contents->length, change->variable, bytes, &length);

		if (!done)
			raise_unwritable(change->variable);
		changed = changed || length != contents->length || memcmp(bytes, contents->bytes, length) != 0;
		contents->bytes = bytes;
		contents->length = length;
	}
	return changed;
}

/* The file as this transaction sees it; empty when there is none. */
static void
read_file(KvEnvContents *contents)
{
	const char *path = env_path();
	bool		readable_by_others = false;

	if (!kv_env_store_read(path, contents, &readable_by_others))
	{
		contents->bytes = kv_secret_alloc(1);
		contents->length = 0;
	}
	announce(path, readable_by_others);
	(void) apply_changes(contents, NULL);
}

/* A variable's value as a key of the provider; NULL, with a warning, when it cannot be one, and when it is empty. */
static char *
key_of(const KvEnvContents *contents, const char *provider, const char *variable)
{
	KvEnvText	text;
	KvEnvAssignment assignment;
	char	   *value;
	Size		length;
	const char *problem;

	if (!kv_env_file_find(contents->bytes, contents->length, variable, &text, &assignment))
		return NULL;
	value = kv_secret_alloc(assignment.value_end - assignment.value + 1);
	length = kv_env_file_value(&text, &assignment, value);
	if (length == 0)
		return NULL;
	problem = kv_key_shape_problem(value, length, provider);
	if (problem == NULL)
		return value;
	ereport(WARNING,
			(errcode(ERRCODE_KV_KEY_MALFORMED),
			 errmsg("variable \"%s\" in line %d of the .env file is no API key for provider \"%s\"", variable, assignment.line, provider),
			 errdetail("%s", problem)));
	return NULL;
}

/* The keys of one provider, or of all, in the current memory context. */
static List *
find_keys(const char *provider)
{
	MemoryContext caller = CurrentMemoryContext;
	KvEnvContents contents;
	KvOwnerScope scope;
	List	   *keys = NIL;
	SPITupleTable *rows;
	uint64		n;

	read_file(&contents);
	kv_owner_begin(&scope);
	n = find_variables(provider);
	rows = SPI_tuptable;
	for (uint64 i = 0; i < n; i++)
	{
		char	   *name = SPI_getvalue(rows->vals[i], rows->tupdesc, 1);
		char	   *secret = key_of(&contents, name, SPI_getvalue(rows->vals[i], rows->tupdesc, 2));
		MemoryContext spi = MemoryContextSwitchTo(caller);

		if (secret)
		{
			KvDevelopmentKey *key = palloc(sizeof(KvDevelopmentKey));

			key->provider = pstrdup(name);
			key->secret = kv_secret_alloc(strlen(secret) + 1);
			memcpy(key->secret, secret, strlen(secret) + 1);
			keys = lappend(keys, key);
		}
		MemoryContextSwitchTo(spi);
	}
	kv_owner_end(&scope);
	return keys;
}

/* The keys that the file holds: a list of KvDevelopmentKey, by provider. */
List *
kv_development_keys(void)
{
	return find_keys("");
}

/* The file's key for a provider, in secret memory; NULL when it has none. */
char *
kv_development_key(const char *provider)
{
	List	   *keys = *provider ? find_keys(provider) : NIL;

	return keys == NIL ? NULL : ((KvDevelopmentKey *) linitial(keys))->secret;
}

/* Note a change of a provider's variable, to be made at commit. Errors: 55000, 25006 in a transaction that may not write. */
static void
note_change(const char *provider, const char *value)
{
	KvOwnerScope scope;

	PreventCommandIfReadOnly(value ? "store_api_key()" : "delete_api_key()");
	(void) env_path();
	kv_owner_begin(&scope);
	if (find_variables(provider) > 0)
	{
		char	   *variable = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2);
		MemoryContext spi;
		Change	   *change;

		spi = MemoryContextSwitchTo(TopTransactionContext);
		change = palloc(sizeof(Change));
		change->variable = pstrdup(variable);
		change->value = value ? kv_secret_alloc(strlen(value) + 1) : NULL;
		if (value)
			memcpy(change->value, value, strlen(value) + 1);
		change->subtransaction = GetCurrentSubTransactionId();
		changes = lappend(changes, change);
		MemoryContextSwitchTo(spi);
	}
	kv_owner_end(&scope);
}

/* Give a provider's variable a value, which was checked, when the transaction commits. Error: 55000. */
void
kv_development_set(const char *provider, const char *secret)
{
	KvEnvContents contents;

	note_change(provider, secret);
	/* What cannot be done is to fail here, and not at the commit. */
	read_file(&contents);
}

/* Remove a provider's variable when the transaction commits; false when it is not in the file. Error: 55000. */
bool
kv_development_remove(const char *provider)
{
	KvEnvContents contents;
	Size		length;

	read_file(&contents);
	length = contents.length;
	note_change(provider, NULL);
	read_file(&contents);
	return contents.length != length;
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	switch (event)
	{
		case XACT_EVENT_PRE_COMMIT:
			if (changes != NIL)
				kv_env_store_prepare(env_path(), apply_changes, NULL);
			break;
		case XACT_EVENT_PRE_PREPARE:
			if (changes != NIL)
				ereport(ERROR,
						(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
						 errmsg("cannot PREPARE a transaction that has changed the .env file"),
						 errhint("Commit it, or turn development mode off.")));
			break;
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_ABORT:
			/* Only now is it certain: a serialization failure comes after PRE_COMMIT. */
			kv_env_store_finish(event == XACT_EVENT_COMMIT);
			changes = NIL;
			break;
		default:
			break;
	}
}

static void
at_subtransaction_end(SubXactEvent event, SubTransactionId id, SubTransactionId parent, void *arg)
{
	ListCell   *cell;

	if (event != SUBXACT_EVENT_COMMIT_SUB && event != SUBXACT_EVENT_ABORT_SUB)
		return;
	foreach(cell, changes)
	{
		Change	   *change = lfirst(cell);

		if (change->subtransaction != id)
			continue;
		if (event == SUBXACT_EVENT_COMMIT_SUB)
			change->subtransaction = parent;
		else
			changes = foreach_delete_current(changes, cell);
	}
}

/* Has a variable of the environment exactly that value? */
static bool
environment_has(const char *variable, const char *value)
{
	const char *found = getenv(variable);

	return found != NULL && strcmp(found, value) == 0;
}

/* Read the environment, and follow transactions; called once, while the server preloads the library. */
void
kv_development_init(void)
{
	environment_is_development = environment_has("DEBUG", "true") || getenv("DEPLOY_ENV") == NULL;
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
}

/* For the queue: has the file a key for the provider? NULL in production. */
Datum
keyvault_env_file_has_key(PG_FUNCTION_ARGS)
{
	if (!kv_development_is_on())
		PG_RETURN_NULL();
	PG_RETURN_BOOL(kv_development_key(text_to_cstring(PG_GETARG_TEXT_PP(0))) != NULL);
}
