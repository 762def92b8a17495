/*-------------------------------------------------------------------------
 * api_key.c
 *		Keeps users' provider keys: checked, sealed, stored, deleted.
 *
 * A key is sealed before a tuple with it exists.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/api_key.h"

#include "base/argument.h"
#include "base/error.h"
#include "base/index_scan.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/redaction.h"
#include "base/secret.h"
#include "base/uuid.h"
#include "catalog/pg_type.h"
#include "crypto/envelope.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(keyvault_store_api_key);
PG_FUNCTION_INFO_V1(keyvault_store_platform_key);
PG_FUNCTION_INFO_V1(keyvault_delete_api_key);

#define KEY_LENGTH_MIN	8
#define KEY_LENGTH_MAX	512
#define FINGERPRINT_SIZE 16

/* A hint shows the ends of keys at least this long; of a shorter one it would show too much. */
#define HINT_LENGTH_MIN	20

static void
raise_malformed(const char *provider, const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_KEY_MALFORMED),
			 errmsg("API key for provider \"%s\" is malformed", provider),
			 errdetail("%s", what),
			 errhint("Copy the key again from the provider's console, without spaces or line breaks.")));
}

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
	KvIndexScan scan;
	Datum		key = CStringGetTextDatum(provider);
	Oid			type = TEXTOID;
	bool		known;

	kv_index_scan_begin(&scan, "providers", "providers_pkey", 1, &key, &type);
	known = kv_index_scan_next(&scan, ForwardScanDirection);
	kv_index_scan_end(&scan);
	if (!known)
		raise_unknown_provider();
}

/* Does the provider's own pattern, if it has one, allow the key? */
static bool
matches_provider(const char *key, const char *provider)
{
	static KvStatement match = {
		"SELECT coalesce((SELECT $2 ~ p.key_pattern FROM keyvault.providers p WHERE p.provider = $1), true)",
		2, {TEXTOID, TEXTOID}
	};
	Datum		values[2] = {CStringGetTextDatum(provider), CStringGetTextDatum(key)};
	bool		isnull;
	bool		matches = DatumGetBool(kv_statement_value(&match, values, NULL, &isnull));

	kv_secret_wipe(VARDATA_ANY(DatumGetTextPP(values[1])), strlen(key));
	return matches;
}

/*
 * Error KV009 unless key can be a key of the provider, 22023 for an unknown one. Says what is
 * wrong without the key. Call between kv_owner_begin and kv_owner_end.
 */
void
kv_api_key_check_shape(const char *key, const char *provider)
{
	Size		length = strlen(key);

	kv_api_key_require_provider(provider);
	for (const char *p = key; *p; p++)
		if (*p < '!' || *p > '~')
			raise_malformed(provider, "It contains a character other than printable ASCII, such as a space or a line break.");
	if (length < KEY_LENGTH_MIN || length > KEY_LENGTH_MAX)
		raise_malformed(provider, psprintf("It is %zu characters long; a key has %d to %d.", length, KEY_LENGTH_MIN, KEY_LENGTH_MAX));
	if (!matches_provider(key, provider))
		raise_malformed(provider, "It does not match the provider's key_pattern: it looks like another provider's key.");
}

/* Enough of a key for its owner to recognise it. */
static char *
hint_of(const char *key)
{
	const char *ellipsis = GetDatabaseEncoding() == PG_UTF8 ? "\xE2\x80\xA6" : "...";
	Size		length = strlen(key);

	if (length < HINT_LENGTH_MIN)
		return pstrdup(ellipsis);
	return psprintf("%.3s%s%s", key, ellipsis, key + length - 4);
}

/* Equal for equal keys of one user and provider; tells nothing across users. */
static bytea *
fingerprint_of(const KvDataKey *data_key, const char *provider, const char *key)
{
	static const char label[] = "keyvault/v1/fingerprint";
	uint8		mac_key[KV_KEY_SIZE];
	uint8		mac[KV_MAC_SIZE];
	Size		provider_size = strlen(provider) + 1;
	Size		size = provider_size + strlen(key);
	uint8	   *message = kv_secret_alloc(size);
	bytea	   *fingerprint = palloc(VARHDRSZ + FINGERPRINT_SIZE);

	memcpy(message, provider, provider_size);
	memcpy(message + provider_size, key, strlen(key));
	kv_hkdf_sha256(data_key->key, KV_KEY_SIZE, NULL, 0, (const uint8 *) label, strlen(label), mac_key, KV_KEY_SIZE);
	kv_hmac_sha256(mac_key, KV_KEY_SIZE, message, size, mac);
	kv_secret_wipe(mac_key, sizeof(mac_key));
	SET_VARSIZE(fingerprint, VARHDRSZ + FINGERPRINT_SIZE);
	memcpy(VARDATA(fingerprint), mac, FINGERPRINT_SIZE);
	return fingerprint;
}

/* The id of the key of that name, locked, or a new one. */
static pg_uuid_t *
key_id_for(const char *user_id, const char *provider, const char *name)
{
	static KvStatement find = {
		"SELECT id FROM keyvault.api_keys WHERE user_id = $1 AND provider = $2 AND name = $3 FOR UPDATE",
		3, {TEXTOID, TEXTOID, TEXTOID}
	};
	Datum		values[3] = {CStringGetTextDatum(user_id), CStringGetTextDatum(provider), CStringGetTextDatum(name)};
	bool		isnull;
	Datum		id = kv_statement_value(&find, values, NULL, &isnull);

	return isnull ? kv_uuid_make() : DatumGetUUIDP(id);
}

/* Seal key and write its row. Call between kv_owner_begin and kv_owner_end. */
static pg_uuid_t
write_key(const char *user_id, const char *provider, const char *name, const char *key,
		  Datum expires_at, bool no_expiry)
{
	static KvStatement upsert = {
		"INSERT INTO keyvault.api_keys AS k (user_id, id, provider, name, ciphertext, hint, fingerprint, source, expires_at)"
		" VALUES ($1, $2, $3, $4, $5, $6, $7, CASE $1 WHEN '' THEN 'platform' ELSE 'user' END, $8)"
		" ON CONFLICT (user_id, provider, name) DO UPDATE"
		" SET id = EXCLUDED.id, ciphertext = EXCLUDED.ciphertext, hint = EXCLUDED.hint, fingerprint = EXCLUDED.fingerprint,"
		" expires_at = EXCLUDED.expires_at, status = 'active', updated_at = now(),"
		" rotated_at = CASE WHEN k.fingerprint = EXCLUDED.fingerprint THEN k.rotated_at ELSE now() END",
		8, {TEXTOID, UUIDOID, TEXTOID, TEXTOID, BYTEAOID, TEXTOID, BYTEAOID, TIMESTAMPTZOID}
	};
	KvDataKey  *data_key = kv_data_key_ensure(user_id);
	KvSecretName secret = {.id = *key_id_for(user_id, provider, name),.provider = provider,.purpose = KV_API_KEY_PURPOSE};
	Datum		values[8];

	values[0] = CStringGetTextDatum(user_id);
	values[1] = UUIDPGetDatum(&secret.id);
	values[2] = CStringGetTextDatum(provider);
	values[3] = CStringGetTextDatum(name);
	values[4] = PointerGetDatum(kv_envelope_seal(data_key, &secret, key, strlen(key)));
	values[5] = CStringGetTextDatum(hint_of(key));
	values[6] = PointerGetDatum(fingerprint_of(data_key, provider, key));
	values[7] = expires_at;
	kv_statement_execute(&upsert, values, no_expiry ? "       n" : NULL);
	return secret.id;
}

/* A required secret argument, in secret memory. Error: 22004. */
static char *
required_secret(FunctionCallInfo fcinfo, int argument)
{
	text	   *value;
	Size		length;
	char	   *secret;

	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("key must not be null"),
				 errhint("To forget a key call keyvault.delete_api_key().")));
	value = PG_GETARG_TEXT_PP(argument);
	length = VARSIZE_ANY_EXHDR(value);
	secret = kv_secret_alloc(length + 1);
	memcpy(secret, VARDATA_ANY(value), length);
	secret[length] = '\0';
	return secret;
}

static char *
key_name(FunctionCallInfo fcinfo, int argument)
{
	char	   *name = kv_argument_text(fcinfo, argument, "name");

	if (*name == '\0' || strlen(name) >= NAMEDATALEN)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("name of an API key must be 1 to %d bytes long", NAMEDATALEN - 1)));
	return name;
}

static pg_uuid_t *
store(const char *user_id, const char *provider, const char *name, const char *key, Datum expires_at, bool no_expiry, bool may_create)
{
	static KvStatement ensure_user = {"SELECT keyvault._ensure_user($1, $2)", 2, {TEXTOID, BOOLOID}};
	pg_uuid_t  *id = palloc(sizeof(pg_uuid_t));
	KvOwnerScope scope;

	kv_owner_begin(&scope);
	kv_api_key_check_shape(key, provider);
	if (*user_id)
	{
		Datum		values[2] = {CStringGetTextDatum(user_id), BoolGetDatum(may_create)};

		kv_statement_execute(&ensure_user, values, NULL);
	}
	*id = write_key(user_id, provider, name, key, expires_at, no_expiry);
	kv_owner_end(&scope);
	return id;
}

Datum
keyvault_store_api_key(PG_FUNCTION_ARGS)
{
	char	   *provider;
	char	   *key;
	char	   *name;
	char	   *user_id;

	kv_redaction_mark_statement();
	provider = kv_argument_text(fcinfo, 0, "provider");
	key = required_secret(fcinfo, 1);
	name = key_name(fcinfo, 2);
	user_id = kv_identity_resolve(fcinfo, 3);
	if (!PG_ARGISNULL(4) && PG_GETARG_TIMESTAMPTZ(4) <= GetCurrentTimestamp())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("expires_at must be in the future"),
				 errhint("Leave it out for a key that does not expire.")));
	PG_RETURN_UUID_P(store(user_id, provider, name, key, PG_GETARG_DATUM(4), PG_ARGISNULL(4),
						   kv_identity_acts_for_any_user()));
}

Datum
keyvault_store_platform_key(PG_FUNCTION_ARGS)
{
	char	   *provider;
	char	   *key;

	kv_redaction_mark_statement();
	if (!kv_identity_is_admin())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to store keys of the platform"),
				 errhint("keyvault.grant_access(role, 'admin') gives that right.")));
	provider = kv_argument_text(fcinfo, 0, "provider");
	key = required_secret(fcinfo, 1);
	PG_RETURN_UUID_P(store(KV_PLATFORM_USER, provider, key_name(fcinfo, 2), key, (Datum) 0, true, false));
}

Datum
keyvault_delete_api_key(PG_FUNCTION_ARGS)
{
	static KvStatement delete = {
		"DELETE FROM keyvault.api_keys WHERE user_id = $1 AND provider = $2 AND name = $3", 3, {TEXTOID, TEXTOID, TEXTOID}
	};
	char	   *provider = kv_argument_text(fcinfo, 0, "provider");
	char	   *name = kv_argument_text(fcinfo, 1, "name");
	char	   *user_id = kv_identity_resolve(fcinfo, 2);
	Datum		values[3] = {CStringGetTextDatum(user_id), CStringGetTextDatum(provider), CStringGetTextDatum(name)};
	KvOwnerScope scope;
	bool		deleted;

	kv_owner_begin(&scope);
	deleted = kv_statement_execute(&delete, values, NULL) > 0;
	kv_owner_end(&scope);
	if (!deleted)
		kv_api_key_require_provider(provider);
	PG_RETURN_BOOL(deleted);
}
