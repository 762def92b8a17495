/*-------------------------------------------------------------------------
 * data_key_rotation.c
 *		A new data key in the place of a user's old one.
 *
 * Every secret of the user's is sealed again in one transaction, then the old version goes.
 * Who stores a secret holds a lock on the version that he seals under, and who rotates takes
 * it for himself alone first: nothing is sealed under a version that goes. Readers see the
 * rows of before or of after, and both open.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "base/argument.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/settings.h"
#include "base/subtransaction.h"
#include "catalog/pg_type.h"
#include "crypto/data_key.h"
#include "crypto/envelope.h"
#include "crypto/reveal.h"
#include "crypto/rotation_request.h"
#include "crypto/sealing_key.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "identity/user.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"
#include "vault/key_row.h"

PG_FUNCTION_INFO_V1(keyvault_rotate_data_key);
PG_FUNCTION_INFO_V1(keyvault_rotate_data_keys);
PG_FUNCTION_INFO_V1(keyvault_retire_sealing_keys);

#define BATCH_MAX 10000

/*
 * All that is sealed under users' data keys. find: id, provider and record of a user's ($1)
 * rows, locked; update: user, id, record and, where there is one, fingerprint.
 */
static struct SecretTable
{
	const char *purpose;
	bool		fingerprinted;
	KvStatement find;
	KvStatement update;
}			tables[] = {
	{
		/* Rows with a record, which begins with a 'K', and not with a box, which waits for the worker. */
		KV_API_KEY_PURPOSE, true,
		{"SELECT id, provider, ciphertext FROM keyvault.api_keys"
			" WHERE user_id = $1 AND get_byte(ciphertext, 0) = 75 ORDER BY id FOR UPDATE", 1, {TEXTOID}},
		{"UPDATE keyvault.api_keys SET ciphertext = $3, fingerprint = $4 WHERE user_id = $1 AND id = $2",
			4, {TEXTOID, UUIDOID, BYTEAOID, BYTEAOID}},
	},
	{
		"sealing_key", false,
		{"SELECT id, ''::text, ciphertext FROM keyvault.sealing_keys WHERE $1 = '' ORDER BY id FOR UPDATE", 1, {TEXTOID}},
		{"UPDATE keyvault.sealing_keys SET ciphertext = $3 WHERE $1 = '' AND id = $2", 3, {TEXTOID, UUIDOID, BYTEAOID}},
	},
};

static void
require_rights(void)
{
	if (!kv_identity_is_admin() && !kv_identity_acts_for_any_user())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to rotate keys"),
				 errhint("keyvault.grant_access(role, 'admin') gives that right.")));
	/* An old snapshot does not see what others have sealed since. */
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("keys are rotated and retired at isolation level read committed only"),
				 errhint("Begin the transaction at that level.")));
}

/* Seal one secret again; false, with a warning, when it does not open. */
static bool
reseal(struct SecretTable *table, const KvDataKey *to, HeapTuple row, TupleDesc descriptor)
{
	bool		isnull;
	KvSecretName name = {.purpose = table->purpose};
	bytea	   *record = DatumGetByteaPP(SPI_getbinval(row, descriptor, 3, &isnull));
	Datum		values[4];
	char	   *secret;

	name.id = *DatumGetUUIDP(SPI_getbinval(row, descriptor, 1, &isnull));
	name.provider = TextDatumGetCString(SPI_getbinval(row, descriptor, 2, &isnull));
	kv_owner_fresh_snapshot_begin();
	secret = kv_envelope_open(to->user_id, &name, record);
	kv_owner_fresh_snapshot_end();
	if (secret == NULL)
	{
		ereport(WARNING,
				(errcode(ERRCODE_KV_SECRET_UNREADABLE),
				 errmsg("a secret of user \"%s\" cannot be opened, and is left as it is", to->user_id),
				 errdetail("It is the %s %s.", table->purpose, DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(&name.id)))),
				 errhint("Store it again, or restore api_keys, data_keys and vault together from one backup.")));
		return false;
	}
	values[0] = CStringGetTextDatum(to->user_id);
	values[1] = UUIDPGetDatum(&name.id);
	values[2] = PointerGetDatum(kv_envelope_seal(to, &name, secret, kv_envelope_secret_length(record)));
	values[3] = table->fingerprinted ? PointerGetDatum(kv_key_row_fingerprint(to, secret)) : (Datum) 0;
	kv_statement_execute(&table->update, values, NULL);
	return true;
}

/* Seal all of a user's secrets again; false when some do not open. */
static bool
reseal_all(const KvDataKey *to)
{
	Datum		user_id = CStringGetTextDatum(to->user_id);
	bool		all = true;

	for (size_t i = 0; i < lengthof(tables); i++)
	{
		uint64		n = kv_statement_execute(&tables[i].find, &user_id, NULL);
		SPITupleTable *rows = SPI_tuptable;

		for (uint64 row = 0; row < n; row++)
			if (!reseal(&tables[i], to, rows->vals[row], rows->tupdesc))
				all = false;
	}
	return all;
}

/* Delete a user's data keys of earlier versions. The platform's seal the sealing keys, which opened users' boxes. */
static void
forget_versions_before(const char *user_id, uint32 version)
{
	static KvStatement note = {"SELECT keyvault._note_boxes_destroyed($1)", 1, {INT4OID}};
	static KvStatement forget = {
		"DELETE FROM keyvault.data_keys WHERE user_id = $1 AND version < $2", 2, {TEXTOID, INT4OID}
	};
	Datum		values[2] = {CStringGetTextDatum(user_id), Int32GetDatum(version)};

	if (*user_id == '\0')
		kv_statement_execute(&note, &values[1], NULL);
	kv_statement_execute(&forget, values, NULL);
}

/*
 * Rotate a user's data key; returns the new version, 0 when there is none, or not the one
 * expected, if any is. Call between kv_owner_begin and kv_owner_end.
 */
static uint32
rotate(const char *user_id, uint32 expected)
{
	KvDataKey  *to;
	uint32		version;

	if (*user_id == '\0')
		(void) kv_sealing_key_forget_retired();
	else
		kv_user_lock(user_id, false);
	version = kv_data_key_lock(user_id, true);
	if (version == 0 || (expected != 0 && version != expected))
		return 0;
	/* One that does not open gets no successor: nothing could be sealed again. */
	(void) kv_data_key_ensure(user_id);
	to = kv_data_key_create(user_id, version + 1);
	if (to == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("another transaction is rotating this data key"),
				 errhint("Retry the transaction.")));
	if (reseal_all(to))
		forget_versions_before(user_id, version + 1);
	return version + 1;
}

/* A rotation that may fail. */
typedef struct Attempt
{
	const char *user_id;
	uint32		expected;
	bool		rotated;
} Attempt;

static void
attempt(void *arg)
{
	Attempt    *this = arg;

	this->rotated = rotate(this->user_id, this->expected) != 0;
}

/* rotate, but a data key that cannot be opened is a warning: it must not hold up the others. */
static bool
try_rotate(const char *user_id, uint32 expected)
{
	Attempt		this = {user_id, expected};
	ErrorData  *error = kv_subtransaction_run(attempt, &this);

	if (error && error->sqlerrcode != ERRCODE_KV_SECRET_UNREADABLE)
		ReThrowError(error);
	if (error)
		ereport(WARNING,
				(errcode(ERRCODE_KV_SECRET_UNREADABLE),
				 errmsg("data key of user \"%s\" is not rotated: it cannot be opened", user_id),
				 errhint("Restore keyvault.data_keys and keyvault.vault together, from one backup.")));
	return this.rotated && !error;
}

Datum
keyvault_rotate_data_key(PG_FUNCTION_ARGS)
{
	text	   *argument;
	char	   *user_id;
	KvOwnerScope scope;
	uint32		version = 0;

	kv_argument_require(fcinfo, 0, "user_id");
	argument = PG_GETARG_TEXT_PP(0);
	user_id = VARSIZE_ANY_EXHDR(argument) == 0 ? KV_PLATFORM_USER : kv_identity_check_user_id(argument);
	require_rights();
	kv_owner_begin(&scope);
	if (kv_reveal_may_open())
		version = rotate(user_id, 0);
	else if (kv_data_key_lock(user_id, false) != 0)
	{
		(void) kv_rotation_request_make("data_key", user_id, 1);
		kv_rotation_request_announce();
	}
	kv_owner_end(&scope);
	if (version == 0)
		PG_RETURN_NULL();
	PG_RETURN_INT32(version);
}

Datum
keyvault_rotate_data_keys(PG_FUNCTION_ARGS)
{
	static KvStatement find = {
		"SELECT o.user_id, o.version FROM ("
		"SELECT d.user_id, d.version FROM keyvault.data_keys d WHERE d.created_at < now() - $1"
		" AND NOT EXISTS (SELECT FROM keyvault.data_keys n WHERE n.user_id = d.user_id AND n.version > d.version)"
		" ORDER BY d.created_at, d.user_id LIMIT $2) o ORDER BY o.user_id", 2, {INTERVALOID, INT4OID}
	};
	static const Interval none = {0};
	int			batch = PG_ARGISNULL(1) ? 0 : PG_GETARG_INT32(1);
	Datum		values[2] = {PG_GETARG_DATUM(0), Int32GetDatum(batch)};
	KvOwnerScope scope;
	SPITupleTable *users;
	uint64		n;
	int			rotated = 0;
	bool		isnull;

	require_rights();
	kv_argument_require(fcinfo, 0, "older_than");
	kv_argument_require(fcinfo, 1, "batch");
	if (DatumGetBool(DirectFunctionCall2(interval_lt, values[0], IntervalPGetDatum(&none))))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("older_than must not be negative"),
				 errhint("Pass '0' for every data key.")));
	if (batch < 1 || batch > BATCH_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("batch must be 1 to %d", BATCH_MAX),
				 errhint("It is how many users' data keys one call renews.")));
	kv_owner_begin(&scope);
	n = kv_statement_execute(&find, values, NULL);
	users = SPI_tuptable;
	for (uint64 i = 0; i < n; i++)
	{
		char	   *user_id = TextDatumGetCString(SPI_getbinval(users->vals[i], users->tupdesc, 1, &isnull));
		uint32		version = DatumGetInt32(SPI_getbinval(users->vals[i], users->tupdesc, 2, &isnull));

		CHECK_FOR_INTERRUPTS();
		if (kv_reveal_may_open() ? try_rotate(user_id, version) : kv_rotation_request_make("data_key", user_id, 1))
			rotated++;
	}
	if (rotated > 0 && !kv_reveal_may_open())
		kv_rotation_request_announce();
	kv_owner_end(&scope);
	PG_RETURN_INT32(rotated);
}

/* Take no more boxes for the sealing keys of before, and delete those that no stored box needs. */
Datum
keyvault_retire_sealing_keys(PG_FUNCTION_ARGS)
{
	static KvStatement retire = {"UPDATE keyvault.sealing_keys SET retired_at = now() WHERE retired_at > now()", 0};
	KvOwnerScope scope;
	int64		forgotten;

	require_rights();
	kv_owner_begin(&scope);
	kv_statement_execute(&retire, NULL, NULL);
	forgotten = kv_sealing_key_forget_retired();
	kv_owner_end(&scope);
	PG_RETURN_INT64(forgotten);
}
