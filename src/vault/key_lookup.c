/*-------------------------------------------------------------------------
 * key_lookup.c
 *		Opens users' provider keys for their owner and for the worker.
 *
 * Lookups are pure reads: they work on a standby and in a READ ONLY transaction. A key
 * that does not open is its own row's error, and hides no other.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/key_lookup.h"

#include "base/argument.h"
#include "base/error.h"
#include "base/index_scan.h"
#include "base/redaction.h"
#include "catalog/pg_collation.h"
#include "catalog/pg_type.h"
#include "crypto/reveal.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"
#include "vault/api_key.h"
#include "vault/development.h"
#include "vault/key_row.h"
#include "vault/key_shape.h"
#include "vault/key_use.h"

PG_FUNCTION_INFO_V1(keyvault_user_api_keys);
PG_FUNCTION_INFO_V1(keyvault_user_api_key);

/* Columns of keyvault.api_keys that lookups read. */
enum
{
	API_KEYS_USER_ID = 1,
	API_KEYS_ID,
	API_KEYS_PROVIDER,
	API_KEYS_NAME,
	API_KEYS_CIPHERTEXT,
	API_KEYS_HINT,
	API_KEYS_FINGERPRINT,
	API_KEYS_SOURCE,
	API_KEYS_STATUS,
	API_KEYS_EXPIRES_AT,
};

static KvIndex by_id = {{"api_keys"}, {"api_keys_pkey"}, 2, {TEXTOID, UUIDOID}};
static KvIndex by_name = {{"api_keys"}, {"api_keys_user_id_provider_name_key"}, 3, {TEXTOID, TEXTOID, TEXTOID}};
static KvIndex by_hash_of_name = {{"api_keys"}, {"api_keys_hash_of_name"}, 1, {INT8OID}};
static KvIndex by_user = {{"api_keys"}, {"api_keys_user_id"}, 1, {TEXTOID}};
static KvIndex by_user_of_name = {{"api_keys"}, {"api_keys_user_id_provider_name_key"}, 1, {TEXTOID}};

static bool
is_expired(KvIndexScan *scan)
{
	bool		isnull;
	Datum		expires_at = kv_index_scan_value(scan, API_KEYS_EXPIRES_AT, &isnull);

	return !isnull && DatumGetTimestampTz(expires_at) <= GetCurrentTimestamp();
}

static bool
column_is(KvIndexScan *scan, int attribute, const char *value, Size length)
{
	bool		isnull;
	text	   *stored = DatumGetTextPP(kv_index_scan_value(scan, attribute, &isnull));

	return VARSIZE_ANY_EXHDR(stored) == length && memcmp(VARDATA_ANY(stored), value, length) == 0;
}

static bool
column_equals(KvIndexScan *scan, int attribute, Datum value)
{
	text	   *other = DatumGetTextPP(value);

	return column_is(scan, attribute, VARDATA_ANY(other), VARSIZE_ANY_EXHDR(other));
}

/* Is the current row's key kept elsewhere? */
static bool
is_reference(KvIndexScan *scan)
{
	return column_is(scan, API_KEYS_SOURCE, "reference", strlen("reference"));
}

/* What the index api_keys_hash_of_name has of a key's user, provider and name. */
static Datum
hash_of_name(const Datum *names)
{
	Datum		hash = Int64GetDatum(0);

	for (int i = 2; i >= 0; i--)
		hash = DirectFunctionCall2Coll(hashtextextended, C_COLLATION_OID, names[i], hash);
	return hash;
}

/* Begin a scan, and step to the key that is named by user, provider and name; false when there is none. */
static bool
find_by_name(KvIndexScan *scan, const Datum *names)
{
	KvIndex    *index = kv_index_or(&by_hash_of_name, &by_name);
	Datum		hash = hash_of_name(names);

	kv_index_scan_begin(scan, index, index == &by_name ? names : &hash);
	while (kv_index_scan_next(scan, ForwardScanDirection))
		if (column_equals(scan, API_KEYS_USER_ID, names[0]) &&
			column_equals(scan, API_KEYS_PROVIDER, names[1]) &&
			column_equals(scan, API_KEYS_NAME, names[2]))
			return true;
	return false;
}

/* Open the key of the scan's current row, and note its use; NULL when it does not open. */
static char *
open_row(KvIndexScan *scan, const char *user_id, const char *provider)
{
	bool		isnull;
	pg_uuid_t  *id = DatumGetUUIDP(kv_index_scan_value(scan, API_KEYS_ID, &isnull));
	char	   *secret = kv_key_row_open(user_id, provider, id,
									 DatumGetByteaPP(kv_index_scan_value(scan, API_KEYS_CIPHERTEXT, &isnull)));

	if (secret)
		kv_key_use_note(user_id, id);
	return secret;
}

static void
raise_reference(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
			 errmsg("the key is kept elsewhere: what is stored here is a reference"),
			 errhint("keyvault.request() uses it; keyvault.api_key_status shows the reference.")));
}

static void
report_unreadable(int level, const char *user_id, const char *provider)
{
	ereport(level,
			(errcode(ERRCODE_KV_SECRET_UNREADABLE),
			 errmsg("API key of user \"%s\" for provider \"%s\" cannot be opened", user_id, provider),
			 errdetail("It was altered, or moved from another row, user or vault, or its data key is gone or was altered."),
			 errhint("Store the key again, or restore api_keys, data_keys and vault together from one backup.")));
}

/*
 * Open a key by its id. Returns it in secret memory, or the reference that stands for it; NULL when there is none or it has
 * expired. Call between kv_owner_begin and kv_owner_end. Errors: KV004, KV005, KV009 a client sealed what is no key of the provider.
 */
char *
kv_key_lookup_by_id(const char *user_id, const pg_uuid_t *id, bool *names_reference)
{
	KvIndexScan scan;
	Datum		keys[2] = {CStringGetTextDatum(user_id), UUIDPGetDatum(id)};
	char	   *secret = NULL;

	*names_reference = false;
	kv_index_scan_begin(&scan, &by_id, keys);
	if (kv_index_scan_next(&scan, ForwardScanDirection) && !is_expired(&scan))
	{
		bool		isnull;
		char	   *provider = TextDatumGetCString(kv_index_scan_value(&scan, API_KEYS_PROVIDER, &isnull));

		*names_reference = is_reference(&scan);
		secret = open_row(&scan, user_id, provider);
		if (secret == NULL)
			report_unreadable(ERROR, user_id, provider);
		(void) kv_index_scan_value(&scan, API_KEYS_FINGERPRINT, &isnull);
		if (isnull && !*names_reference)
			kv_key_shape_check(secret, strlen(secret), provider);
	}
	kv_index_scan_end(&scan);
	return secret;
}

/* Does a lookup of keys of that name read the .env file? Says in the log what it does. */
static bool
uses_env_file(const char *user_id, const char *name)
{
	if (kv_development_has(name))
		return true;
	ereport(DEBUG1, (errmsg("[PROD MODE] Using database for user %s", user_id)));
	return false;
}

static Datum
secret_result(FunctionCallInfo fcinfo, const char *secret)
{
	if (secret == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(secret));
}

Datum
keyvault_user_api_key(PG_FUNCTION_ARGS)
{
	char	   *provider = kv_argument_text(fcinfo, 0, "provider");
	char	   *user_id = kv_identity_resolve(fcinfo, 1);
	Datum		keys[3] = {CStringGetTextDatum(user_id), PG_GETARG_DATUM(0), PG_GETARG_DATUM(2)};
	KvIndexScan scan;
	char	   *secret = NULL;
	bool		found;

	kv_redaction_mark_statement();
	kv_reveal_require();
	kv_argument_require(fcinfo, 2, "name");
	if (uses_env_file(user_id, text_to_cstring(PG_GETARG_TEXT_PP(2))))
	{
		secret = kv_development_key(provider);
		if (secret == NULL)
			kv_api_key_require_provider(provider);
		return secret_result(fcinfo, secret);
	}
	found = find_by_name(&scan, keys);
	if (found && !is_expired(&scan))
	{
		if (is_reference(&scan))
			raise_reference();
		secret = open_row(&scan, user_id, provider);
		if (secret == NULL)
			report_unreadable(ERROR, user_id, provider);
	}
	kv_index_scan_end(&scan);
	if (!found)
		kv_api_key_require_provider(provider);
	return secret_result(fcinfo, secret);
}

static void
push_string(JsonbParseState **state, JsonbIteratorToken token, char *string)
{
	JsonbValue	value = {.type = jbvString,.val.string = {.len = strlen(string),.val = string}};

	pushJsonbValue(state, token, &value);
}

static void
push_env_file_keys(JsonbParseState **state)
{
	ListCell   *cell;

	foreach(cell, kv_development_keys())
	{
		KvDevelopmentKey *key = lfirst(cell);

		push_string(state, WJB_KEY, key->provider);
		push_string(state, WJB_VALUE, key->secret);
	}
}

Datum
keyvault_user_api_keys(PG_FUNCTION_ARGS)
{
	char	   *user_id = kv_identity_resolve(fcinfo, 0);
	Datum		key = CStringGetTextDatum(user_id);
	KvIndexScan scan;
	JsonbParseState *state = NULL;
	bool		isnull;

	kv_redaction_mark_statement();
	kv_reveal_require();
	pushJsonbValue(&state, WJB_BEGIN_OBJECT, NULL);
	if (uses_env_file(user_id, KV_DEFAULT_KEY_NAME))
	{
		push_env_file_keys(&state);
		PG_RETURN_JSONB_P(JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL)));
	}
	kv_index_scan_begin(&scan, kv_index_or(&by_user, &by_user_of_name), &key);
	while (kv_index_scan_next(&scan, ForwardScanDirection))
	{
		char	   *name = TextDatumGetCString(kv_index_scan_value(&scan, API_KEYS_NAME, &isnull));
		char	   *provider = TextDatumGetCString(kv_index_scan_value(&scan, API_KEYS_PROVIDER, &isnull));
		char	   *secret;

		if (strcmp(name, KV_DEFAULT_KEY_NAME) != 0 || is_expired(&scan) || is_reference(&scan))
			continue;
		secret = open_row(&scan, user_id, provider);
		if (secret == NULL)
		{
			report_unreadable(WARNING, user_id, provider);
			continue;
		}
		push_string(&state, WJB_KEY, provider);
		push_string(&state, WJB_VALUE, secret);
	}
	kv_index_scan_end(&scan);
	PG_RETURN_JSONB_P(JsonbValueToJsonb(pushJsonbValue(&state, WJB_END_OBJECT, NULL)));
}
