/*-------------------------------------------------------------------------
 * recovery.c
 *		Recovery bundles: chosen users' keys, encrypted to a public key whose private one
 *		is kept elsewhere.
 *
 * A bundle is an OpenPGP message (RFC 4880) made by pgcrypto, which any OpenPGP program
 * opens without this server: JSON lines, one for each key. pgcrypto's functions are called
 * directly and not through SQL, so that no plan, log or statistic sees the plaintext.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/argument.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/redaction.h"
#include "base/secret.h"
#include "base/secret_json.h"
#include "base/settings.h"
#include "base/subtransaction.h"
#include "catalog/pg_type.h"
#include "crypto/master_key.h"
#include "crypto/openpgp.h"
#include "crypto/reveal.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "vault/api_key.h"
#include "vault/key_row.h"
#include "vault/key_shape.h"

PG_FUNCTION_INFO_V1(keyvault_export_recovery_bundle);
PG_FUNCTION_INFO_V1(keyvault_restore_api_keys);

#define BUNDLE_SIZE_MIN 8192

/* No line of a bundle is longer: the longest key, name and user_id, all escaped, are a few kB. */
#define LINE_LENGTH_MAX (256 * 1024)

/* A text that grows in secret memory; as a text value it begins with its length word. */
typedef struct SecretText
{
	char	   *bytes;
	Size		length;
	Size		allocated;
} SecretText;

static void
append(SecretText *plain, const char *bytes, Size length)
{
	if (length > plain->allocated - plain->length)
	{
		Size		wanted = Max(plain->allocated * 2, plain->length + length);
		char	   *larger;

		if (!AllocSizeIsValid(wanted + 1024))
			ereport(ERROR,
					(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
					 errmsg("recovery bundle is too large"),
					 errhint("Make several, each of some users: pass user_ids.")));
		larger = kv_secret_alloc(wanted);
		memcpy(larger, plain->bytes, plain->length);
		kv_secret_wipe(plain->bytes, plain->length);
		plain->bytes = larger;
		plain->allocated = wanted;
	}
	memcpy(plain->bytes + plain->length, bytes, length);
	plain->length += length;
}

/* Append a field of a line; a NULL value is null. */
static void
append_field(SecretText *plain, const char *name, const char *value)
{
	StringInfoData field;

	initStringInfo(&field);
	appendStringInfo(&field, "\"%s\": ", name);
	if (value)
		escape_json(&field, pg_server_to_any(value, strlen(value), PG_UTF8));
	else
		appendStringInfoString(&field, "null");
	append(plain, field.data, field.len);
	kv_secret_wipe(field.data, field.len);
	pfree(field.data);
}

/* A row whose key is to be exported, and what keeps it from that. */
typedef struct Export
{
	char	   *user_id;
	char	   *provider;
	pg_uuid_t  *id;
	bytea	   *stored;
	char	   *secret;
	int			code;
	const char *detail;
} Export;

static void
open_key(void *arg)
{
	Export	   *export = arg;

	export->secret = kv_key_row_open(export->user_id, export->provider, export->id, export->stored);
}

/* Open a row's key, or warn that it is not in the bundle: one that is lost must not keep the others out. */
static bool
try_open(Export *export)
{
	ErrorData  *error = kv_subtransaction_run(open_key, export);

	if (error && error->sqlerrcode != ERRCODE_KV_MASTER_KEY && error->sqlerrcode != ERRCODE_KV_SECRET_UNREADABLE)
		ReThrowError(error);
	if (export->secret)
		return true;
	export->code = error ? error->sqlerrcode : ERRCODE_KV_SECRET_UNREADABLE;
	export->detail = error ? error->detail : NULL;
	ereport(WARNING,
			(errcode(export->code),
			 errmsg("API key of user \"%s\" for provider \"%s\" cannot be opened, and is left out", export->user_id, export->provider),
			 export->detail ? errdetail("%s", export->detail) : 0));
	return false;
}

/* What is known of keys that are not in a bundle. */
typedef struct LeftOut
{
	uint64		count;
	int			code;
	const char *detail;
} LeftOut;

static void
leave_out(LeftOut *left_out, const Export *export)
{
	if (left_out->count++ == 0)
	{
		left_out->code = export->code;
		left_out->detail = export->detail;
	}
	else if (left_out->code != export->code)
		left_out->code = ERRCODE_KV_SECRET_UNREADABLE;
}

/* Tell of them; an error when there is nothing else. */
static void
report_left_out(const LeftOut *left_out, uint64 n)
{
	if (left_out->count == n)
		ereport(ERROR,
				(errcode(left_out->code),
				 errmsg("none of %llu API keys can be opened, and no recovery bundle is made", (unsigned long long) n),
				 left_out->detail ? errdetail("%s", left_out->detail) : 0,
				 errhint("See the warnings before this one; KV004 is a master key that is not loaded.")));
	ereport(WARNING,
			(errcode(left_out->code),
			 errmsg("%llu of %llu API keys are not in the bundle", (unsigned long long) left_out->count, (unsigned long long) n)));
}

/* Append the line of a key, or note that there is none, with a warning. */
static void
append_key(SecretText *plain, HeapTuple row, TupleDesc tupdesc, LeftOut *left_out)
{
	bool		isnull;
	Export		export = {0};

	export.user_id = TextDatumGetCString(SPI_getbinval(row, tupdesc, 1, &isnull));
	export.provider = TextDatumGetCString(SPI_getbinval(row, tupdesc, 2, &isnull));
	export.id = DatumGetUUIDP(SPI_getbinval(row, tupdesc, 4, &isnull));
	export.stored = DatumGetByteaPP(SPI_getbinval(row, tupdesc, 5, &isnull));
	if (!try_open(&export))
	{
		leave_out(left_out, &export);
		return;
	}
	append(plain, "{", 1);
	append_field(plain, "user_id", export.user_id);
	append(plain, ", ", 2);
	append_field(plain, "provider", export.provider);
	append(plain, ", ", 2);
	append_field(plain, "name", TextDatumGetCString(SPI_getbinval(row, tupdesc, 3, &isnull)));
	append(plain, ", ", 2);
	append_field(plain, "key", export.secret);
	append(plain, ", ", 2);
	append_field(plain, "expires_at", SPI_getvalue(row, tupdesc, 6));
	append(plain, "}\n", 2);
	kv_secret_wipe(export.secret, strlen(export.secret));
}

/* Error 22023 when some of the users are not known: a misspelled one would be missed when it is too late. */
static void
require_users(Datum users)
{
	static KvStatement find = {
		"SELECT count(*), string_agg(quote_ident(w), ', ' ORDER BY w) FILTER (WHERE place <= 10) FROM ("
		"SELECT w, row_number() OVER (ORDER BY w) FROM unnest($1) w WHERE w IS NULL OR w <> ''"
		" AND NOT EXISTS (SELECT FROM keyvault.users u WHERE u.user_id = w)) v (w, place)", 1, {TEXTARRAYOID}
	};
	bool		isnull;
	int64		unknown = DatumGetInt64(kv_statement_value(&find, &users, NULL, &isnull));
	char	   *names = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2);

	if (unknown > 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%lld of user_ids do not exist", (long long) unknown),
				 names ? errdetail("Among them: %s.", names) : 0,
				 errhint("Pass each user_id as it stands in keyvault.users, '' for the platform, or NULL for all.")));
}

Datum
keyvault_export_recovery_bundle(PG_FUNCTION_ARGS)
{
	static KvStatement find = {
		"SELECT user_id, provider, name, id, ciphertext, to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
		" FROM keyvault.api_keys WHERE source <> 'reference' AND ($1 IS NULL OR user_id = ANY ($1)) ORDER BY user_id, provider, name",
		1, {TEXTARRAYOID}
	};
	MemoryContext context = CurrentMemoryContext;
	Datum		users = PG_ARGISNULL(1) ? (Datum) 0 : PG_GETARG_DATUM(1);
	SecretText	plain = {.length = VARHDRSZ,.allocated = BUNDLE_SIZE_MIN};
	KvOwnerScope scope;
	SPITupleTable *rows;
	uint64		n;
	LeftOut		left_out = {0};
	bytea	   *bundle;

	kv_redaction_mark_statement();
	kv_argument_require(fcinfo, 0, "public_key");
	kv_reveal_require();
	kv_owner_begin(&scope);
	if (!PG_ARGISNULL(1))
		require_users(users);
	n = kv_statement_execute(&find, &users, PG_ARGISNULL(1) ? "n" : NULL);
	rows = SPI_tuptable;
	/* Without any master key nothing opens, and that is one error. */
	if (n > 0)
		(void) kv_master_key_get();
	plain.bytes = kv_secret_alloc(plain.allocated);
	for (uint64 i = 0; i < n; i++)
	{
		CHECK_FOR_INTERRUPTS();
		append_key(&plain, rows->vals[i], rows->tupdesc, &left_out);
	}
	if (left_out.count > 0)
		report_left_out(&left_out, n);
	SET_VARSIZE(plain.bytes, plain.length);
	bundle = kv_openpgp_encrypt((bytea *) plain.bytes, PG_GETARG_DATUM(0));
	bundle = (bytea *) memcpy(MemoryContextAlloc(context, VARSIZE(bundle)), bundle, VARSIZE(bundle));
	kv_owner_end(&scope);
	ereport(LOG,
			(errmsg("recovery bundle of %llu API keys made by role \"%s\"",
					(unsigned long long) (n - left_out.count), GetUserNameFromId(GetUserId(), false))));
	PG_RETURN_BYTEA_P(bundle);
}

static void
raise_bad_line(int line, const char *what)
{
	ereport(ERROR,
			(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
			 errmsg("line %d is not a key of a recovery bundle", line),
			 errdetail("%s", what),
			 errhint("Pass what a recovery bundle holds when it is decrypted, unchanged.")));
}

/* Fields of a line, as read_line reads them. */
enum
{
	FIELD_USER_ID,
	FIELD_PROVIDER,
	FIELD_NAME,
	FIELD_KEY,
	FIELD_EXPIRES_AT,
	N_FIELDS
};

/* A time that may be none: its text, and what it is. */
typedef struct Expiry
{
	char	   *text;
	TimestampTz time;
} Expiry;

static void
parse_expiry(void *arg)
{
	Expiry	   *expiry = arg;

	expiry->time = DatumGetTimestampTz(DirectFunctionCall3(timestamptz_in, CStringGetDatum(expiry->text),
														   ObjectIdGetDatum(InvalidOid), Int32GetDatum(-1)));
}

/* The time that a line states; what PostgreSQL says of a bad one quotes it. */
static TimestampTz
read_expiry(char *text, int line)
{
	Expiry		expiry = {.text = text};
	ErrorData  *error = kv_subtransaction_run(parse_expiry, &expiry);

	if (error && ERRCODE_TO_CATEGORY(error->sqlerrcode) != ERRCODE_TO_CATEGORY(ERRCODE_DATA_EXCEPTION))
		ReThrowError(error);
	if (error)
		raise_bad_line(line, "Its \"expires_at\" is no time.");
	return expiry.time;
}

/* The key of a line, all of it there. Error: 22023. */
static void
read_line(KvNewKey *key, const char *text, int line)
{
	KvSecretJsonField fields[N_FIELDS] = {
		[FIELD_USER_ID] = {"user_id"},[FIELD_PROVIDER] = {"provider"},[FIELD_NAME] = {"name"},[FIELD_KEY] = {"key"},
		[FIELD_EXPIRES_AT] = {"expires_at"},
	};
	Size		length = strlen(text);

	if (length > LINE_LENGTH_MAX)
		raise_bad_line(line, psprintf("It is longer than %d kB.", LINE_LENGTH_MAX / 1024));
	/* A database without an encoding takes any bytes; a bundle is JSON, and that is UTF-8. */
	if ((GetDatabaseEncoding() == PG_SQL_ASCII && !pg_verify_mbstr(PG_UTF8, text, (int) length, true)) ||
		!kv_secret_json_read(text, length, fields, N_FIELDS))
		raise_bad_line(line, "It is no JSON object, or has characters that this database cannot hold.");
	for (int i = 0; i < N_FIELDS; i++)
	{
		if (fields[i].times > 1)
			raise_bad_line(line, psprintf("It has more than one \"%s\".", fields[i].name));
		if (fields[i].string == NULL && (i != FIELD_EXPIRES_AT || (fields[i].times > 0 && !fields[i].is_null)))
			raise_bad_line(line, psprintf("It has no string \"%s\".", fields[i].name));
	}
	key->user_id = fields[FIELD_USER_ID].string;
	key->provider = fields[FIELD_PROVIDER].string;
	key->name = fields[FIELD_NAME].string;
	key->secret = fields[FIELD_KEY].string;
	if (strlen(key->user_id) > KV_USER_ID_MAX)
		raise_bad_line(line, psprintf("Its user_id is longer than %d bytes.", KV_USER_ID_MAX));
	if (*key->name == '\0' || strlen(key->name) >= NAMEDATALEN)
		raise_bad_line(line, psprintf("Its name is not of 1 to %d bytes.", NAMEDATALEN - 1));
	key->expires = fields[FIELD_EXPIRES_AT].string != NULL;
	if (key->expires)
		key->expires_at = read_expiry(fields[FIELD_EXPIRES_AT].string, line);
}

/* A key to be restored. What its line has for a user and a provider is shown only once it is known to be one. */
typedef struct Restore
{
	KvNewKey	key;
	const char *user_id;
	const char *provider;
} Restore;

/* Error 22023 for a user that is not here, and is not to be made. */
static void
look_for_user(Restore *restore)
{
	static KvStatement find = {"SELECT FROM keyvault.users WHERE user_id = $1", 1, {TEXTOID}};
	Datum		user_id = CStringGetTextDatum(restore->key.user_id);

	if (*restore->key.user_id == '\0' || kv_statement_execute(&find, &user_id, NULL) > 0)
		restore->user_id = restore->key.user_id;
	else if (!kv_create_users)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("unknown user"),
				 errdetail("Users are not made by restoring while keyvault.create_users is off.")));
}

static void
store_key(void *arg)
{
	Restore    *restore = arg;
	KvNewKey   *key = &restore->key;

	look_for_user(restore);
	kv_api_key_require_provider(key->provider);
	restore->provider = key->provider;
	kv_key_shape_check(key->secret, strlen(key->secret), key->provider);
	(void) kv_key_row_write(key);
}

/*
 * Store the key of a line, or warn that this one is not restored: its user is suspended or
 * erased, its provider unknown or of another opinion, its user's data key lost. Error 22023:
 * the line is none of a bundle's.
 */
static bool
restore_line(const char *text, int line)
{
	Restore		restore = {.key.may_create_user = true,.user_id = "?",.provider = "?"};
	ErrorData  *error;
	KvOwnerScope scope;

	/* What a line takes of memory goes with it. */
	kv_owner_begin(&scope);
	read_line(&restore.key, text, line);
	error = kv_subtransaction_run(store_key, &restore);
	if (error && error->sqlerrcode != ERRCODE_KV_USER_INACTIVE && error->sqlerrcode != ERRCODE_KV_KEY_MALFORMED &&
		error->sqlerrcode != ERRCODE_KV_MASTER_KEY && error->sqlerrcode != ERRCODE_KV_SECRET_UNREADABLE &&
		error->sqlerrcode != ERRCODE_INVALID_PARAMETER_VALUE)
		ReThrowError(error);
	if (error)
		ereport(WARNING,
				(errcode(error->sqlerrcode),
				 errmsg("line %d: API key of user \"%s\" for provider \"%s\" is not restored: %s",
						line, restore.user_id, restore.provider, error->message),
				 error->detail ? errdetail("%s", error->detail) : 0));
	kv_owner_end(&scope);
	return error == NULL;
}

Datum
keyvault_restore_api_keys(PG_FUNCTION_ARGS)
{
	char	   *lines;
	char	   *end;
	int64		restored = 0;
	int64		left_out = 0;
	int			line = 0;

	kv_redaction_mark_statement();
	kv_argument_require(fcinfo, 0, "lines");
	if (!kv_identity_acts_for_any_user())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to store keys of every user"),
				 errhint("Restore as a superuser.")));
	lines = kv_argument_secret(fcinfo, 0);
	/* Without any master key nothing is sealed, and that is one error; where keys cannot be opened, boxes are. */
	if (kv_reveal_may_open())
		(void) kv_master_key_get();
	for (char *start = lines; *start; start = end)
	{
		CHECK_FOR_INTERRUPTS();
		line++;
		end = start + strcspn(start, "\n");
		if (*end)
			*end++ = '\0';
		if (start[strspn(start, " \t\r")] == '\0')
			continue;
		if (restore_line(start, line))
			restored++;
		else
			left_out++;
	}
	if (left_out > 0)
		ereport(WARNING,
				(errcode(ERRCODE_WARNING),
				 errmsg("%lld of %lld API keys are not restored", (long long) left_out, (long long) (restored + left_out)),
				 errhint("Put right what the warnings before this one say, and restore again: keys that are here already do no harm.")));
	PG_RETURN_INT64(restored);
}
