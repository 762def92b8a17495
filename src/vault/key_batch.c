/*-------------------------------------------------------------------------
 * key_batch.c
 *		Takes many keys of one user in at once.
 *
 * All are stored or none. Keys are taken in jsonb's order, the same for everybody, so that
 * two batches never wait for each other.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/argument.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/redaction.h"
#include "base/secret.h"
#include "fmgr.h"
#include "funcapi.h"
#include "identity/identity.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/uuid.h"
#include "vault/api_key.h"
#include "vault/key_row.h"
#include "vault/key_shape.h"

PG_FUNCTION_INFO_V1(keyvault_store_api_keys);

static void
raise_not_keys(const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("%s", what),
			 errhint("Pass an object of providers and keys: {\"openai\": \"...\", \"gemini\": \"...\"}.")));
}

/* Error 22023 unless the provider is known. Which it is is said without quoting it: it may be a key. */
static void
require_provider(const char *provider, int place)
{
	MemoryContext context = CurrentMemoryContext;

	PG_TRY();
	{
		kv_api_key_require_provider(provider);
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		if (error->sqlerrcode == ERRCODE_INVALID_PARAMETER_VALUE)
			error->detail = psprintf("Its name in keys has %zu bytes, and is number %d there by length and then by bytes.", strlen(provider), place);
		ReThrowError(error);
	}
	PG_END_TRY();
}

/* Store one key of the batch, and add it to the result. */
static void
store_one(KvNewKey *key, int place, const JsonbValue *value, ReturnSetInfo *result)
{
	Datum		columns[2];
	bool		nulls[2] = {false, false};
	pg_uuid_t	id;
	char	   *secret;

	require_provider(key->provider, place);
	if (value->type != jbvString)
		raise_not_keys(psprintf("the key for provider \"%s\" is not a string", key->provider));
	secret = kv_secret_alloc(value->val.string.len + 1);
	memcpy(secret, value->val.string.val, value->val.string.len);
	secret[value->val.string.len] = '\0';
	kv_key_shape_check(secret, value->val.string.len, key->provider);
	key->secret = secret;
	nulls[1] = !kv_api_key_keep(key, &id);
	columns[0] = CStringGetTextDatum(key->provider);
	columns[1] = UUIDPGetDatum(&id);
	tuplestore_putvalues(result->setResult, result->setDesc, columns, nulls);
}

Datum
keyvault_store_api_keys(PG_FUNCTION_ARGS)
{
	KvNewKey	key = {.name = "default"};
	JsonbIterator *iterator;
	JsonbIteratorToken token;
	JsonbValue	value;
	KvOwnerScope scope;
	Jsonb	   *keys;
	int			place = 0;

	kv_redaction_mark_statement();
	kv_argument_require(fcinfo, 0, "keys");
	keys = PG_GETARG_JSONB_P(0);
	if (!JB_ROOT_IS_OBJECT(keys))
		raise_not_keys("keys is not an object");
	key.user_id = kv_identity_resolve(fcinfo, 1);
	key.may_create_user = kv_identity_acts_for_any_user();
	kv_api_key_set_end(&key, fcinfo, 2);
	InitMaterializedSRF(fcinfo, 0);

	kv_owner_begin(&scope);
	iterator = JsonbIteratorInit(&keys->root);
	while ((token = JsonbIteratorNext(&iterator, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			key.provider = pnstrdup(value.val.string.val, value.val.string.len);
		else if (token == WJB_VALUE)
			store_one(&key, ++place, &value, (ReturnSetInfo *) fcinfo->resultinfo);
	}
	kv_owner_end(&scope);
	return (Datum) 0;
}
