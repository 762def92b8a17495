/*-------------------------------------------------------------------------
 * api_key.c
 *		Keeps users' provider keys: checked, sealed, stored, deleted.
 *
 * A key is sealed before a tuple with it exists: key_row.c.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/api_key.h"

#include "base/argument.h"
#include "base/error.h"
#include "base/index_scan.h"
#include "base/owner_spi.h"
#include "base/redaction.h"
#include "base/secret_text.h"
#include "base/secret.h"
#include "base/settings.h"
#include "catalog/pg_type.h"
#include "crypto/master_key.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "vault/development.h"
#include "vault/key_row.h"
#include "vault/key_shape.h"

PG_FUNCTION_INFO_V1(keyvault_store_api_key);
PG_FUNCTION_INFO_V1(keyvault_store_platform_key);
PG_FUNCTION_INFO_V1(keyvault_delete_api_key);
PG_FUNCTION_INFO_V1(keyvault_delete_platform_key);

/* Error 22023 with the providers that are known. What was asked for is not quoted: it may be a key. */
static void
raise_unknown_provider(void)
{
	static KvStatement raise = {"SELECT keyvault._unknown_provider()", 0};
	KvOwnerScope scope;

	kv_owner_begin(&scope);
	kv_statement_execute(&raise, NULL, NULL);
	kv_owner_end(&scope);
}

/* Error 22023 unless the provider is known. */
void
kv_api_key_require_provider(const char *provider)
{
	static KvIndex providers = {{"providers"}, {"providers_pkey"}, 1, {TEXTOID}};
	KvIndexScan scan;
	Datum		key = CStringGetTextDatum(provider);
	bool		known;

	kv_index_scan_begin(&scan, &providers, &key);
	known = kv_index_scan_next(&scan, ForwardScanDirection);
	kv_index_scan_end(&scan);
	if (!known)
		raise_unknown_provider();
}

/* A required secret argument, in secret memory. Error: 22004. */
static char *
required_secret(FunctionCallInfo fcinfo, int argument)
{
	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("key must not be null"),
				 errhint("To forget a key call keyvault.delete_api_key().")));
	return kv_argument_secret(fcinfo, argument);
}

/* A key's name. Errors: 22004, 22023. */
char *
kv_api_key_name(FunctionCallInfo fcinfo, int argument)
{
	char	   *name = kv_argument_text(fcinfo, argument, "name");

	if (*name == '\0' || strlen(name) >= NAMEDATALEN)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("name of an API key must be 1 to %d bytes long", NAMEDATALEN - 1),
				 errhint("Leave it out for \"default\".")));
	if (kv_secret_text_has_key_shape(name))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("name of an API key has the shape of a key, and names are not encrypted"),
				 errhint("The arguments are provider, key, name: pass the key as the second.")));
	return name;
}

/* Set when a key expires; NULL is never. Error: 22023. */
void
kv_api_key_set_end(KvNewKey *key, FunctionCallInfo fcinfo, int argument)
{
	key->expires = !PG_ARGISNULL(argument);
	key->expires_at = key->expires ? PG_GETARG_TIMESTAMPTZ(argument) : 0;
	if (key->expires && key->expires_at <= GetCurrentTimestamp())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("expires_at must be in the future"),
				 errhint("Leave it out for a key that does not expire.")));
}

/*
 * Keep a key whose shape was checked: in its row and, in development mode, in the .env
 * file. False, with a notice, when without a master key the file alone has it. Call
 * between kv_owner_begin and kv_owner_end.
 */
bool
kv_api_key_keep(const KvNewKey *key, pg_uuid_t *id)
{
	bool		in_file = key->secret && *key->user_id && kv_development_has(key->name);

	if (in_file)
		kv_development_set(key->provider, key->secret);
	if (in_file && !kv_master_key_is_configured())
	{
		ereport(NOTICE,
				(errmsg("the key is kept in the .env file alone"),
				 errdetail("There is no master key to encrypt it with for the database.")));
		return false;
	}
	*id = kv_key_row_write(key);
	return true;
}

/* Check a key and keep it; NULL when it has no row. */
static pg_uuid_t *
store(const KvNewKey *key)
{
	pg_uuid_t  *id = palloc(sizeof(pg_uuid_t));
	KvOwnerScope scope;
	bool		has_row;

	kv_owner_begin(&scope);
	kv_api_key_require_provider(key->provider);
	kv_key_shape_check(key->secret, strlen(key->secret), key->provider);
	has_row = kv_api_key_keep(key, id);
	kv_owner_end(&scope);
	return has_row ? id : NULL;
}

Datum
keyvault_store_api_key(PG_FUNCTION_ARGS)
{
	KvNewKey	key = {0};
	pg_uuid_t  *id;

	kv_redaction_mark_statement();
	key.provider = kv_argument_text(fcinfo, 0, "provider");
	key.secret = required_secret(fcinfo, 1);
	key.name = kv_api_key_name(fcinfo, 2);
	key.user_id = kv_identity_resolve(fcinfo, 3);
	key.may_create_user = kv_identity_acts_for_any_user();
	kv_api_key_set_end(&key, fcinfo, 4);
	id = store(&key);
	if (id == NULL)
		PG_RETURN_NULL();
	PG_RETURN_UUID_P(id);
}

/* Error: 42501 for who may not change the platform's keys. */
static void
require_admin(void)
{
	if (!kv_identity_is_admin())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to change keys of the platform"),
				 errhint("keyvault.grant_access(role, 'admin') gives that right.")));
}

Datum
keyvault_store_platform_key(PG_FUNCTION_ARGS)
{
	KvNewKey	key = {.user_id = KV_PLATFORM_USER};

	kv_redaction_mark_statement();
	require_admin();
	key.provider = kv_argument_text(fcinfo, 0, "provider");
	key.secret = required_secret(fcinfo, 1);
	key.name = kv_api_key_name(fcinfo, 2);
	PG_RETURN_UUID_P(store(&key));
}

/* Delete the row of a key; false when there is none. */
static bool
delete_row(const char *user_id, const char *provider, const char *name)
{
	static KvStatement delete = {
		"DELETE FROM keyvault.api_keys WHERE user_id = $1 AND provider = $2 AND name = $3", 3, {TEXTOID, TEXTOID, TEXTOID}
	};
	Datum		values[3] = {CStringGetTextDatum(user_id), CStringGetTextDatum(provider), CStringGetTextDatum(name)};
	KvOwnerScope scope;
	bool		deleted;

	kv_owner_begin(&scope);
	deleted = kv_statement_execute(&delete, values, NULL) > 0;
	kv_owner_end(&scope);
	return deleted;
}

Datum
keyvault_delete_api_key(PG_FUNCTION_ARGS)
{
	char	   *provider = kv_argument_text(fcinfo, 0, "provider");
	char	   *name = kv_argument_text(fcinfo, 1, "name");
	bool		deleted = delete_row(kv_identity_resolve(fcinfo, 2), provider, name);

	if (kv_development_has(name) && kv_development_remove(provider))
		deleted = true;
	if (!deleted)
		kv_api_key_require_provider(provider);
	PG_RETURN_BOOL(deleted);
}

Datum
keyvault_delete_platform_key(PG_FUNCTION_ARGS)
{
	char	   *provider;
	bool		deleted;

	require_admin();
	provider = kv_argument_text(fcinfo, 0, "provider");
	deleted = delete_row(KV_PLATFORM_USER, provider, kv_argument_text(fcinfo, 1, "name"));
	if (!deleted)
		kv_api_key_require_provider(provider);
	PG_RETURN_BOOL(deleted);
}
