/*-------------------------------------------------------------------------
 * sealing_key.c
 *		The vault's own pairs of keys, to which clients seal API keys.
 *
 * A pair is made when it is first asked for, and a new one when the newest is older than
 * keyvault.sealing_key_lifetime; boxes for a pair are taken for twice that time. Private
 * keys are records under the platform's data key. Where this process may not open keys
 * (keyvault.reveal), the database's worker makes pairs.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/sealing_key.h"

#include "base/error.h"
#include "base/index_scan.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/secret.h"
#include "base/settings.h"
#include "base/uuid.h"
#include "catalog/pg_type.h"
#include "crypto/envelope.h"
#include "crypto/reveal.h"
#include "crypto/vault_id.h"
#include "miscadmin.h"
#include "storage/latch.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

/* How long to wait for the worker to make the first pair. */
#define WAIT_FOR_WORKER_MS	5000
#define LOOK_EVERY_MS		20

/* Columns of keyvault.sealing_keys. */
enum
{
	SEALING_KEYS_KEY_ID = 1,
	SEALING_KEYS_ID,
	SEALING_KEYS_PUBLIC_KEY,
	SEALING_KEYS_CIPHERTEXT,
	SEALING_KEYS_CREATED_AT,
	SEALING_KEYS_RETIRED_AT,
};

static bytea *
make_bytea(const uint8 *bytes, Size length)
{
	bytea	   *value = palloc(VARHDRSZ + length);

	SET_VARSIZE(value, VARHDRSZ + length);
	memcpy(VARDATA(value), bytes, length);
	return value;
}

static KvSecretName
secret_name(const pg_uuid_t *id)
{
	return (KvSecretName) {.id = *id,.provider = "",.purpose = "sealing_key"};
}

/* Delete pairs that no box is taken for and no stored box needs; returns how many. Call between kv_owner_begin and kv_owner_end. */
int64
kv_sealing_key_forget_retired(void)
{
	static KvStatement forget = {"SELECT keyvault._forget_sealing_keys()", 0};
	bool		isnull;

	return DatumGetInt64(kv_statement_value(&forget, NULL, NULL, &isnull));
}

/* Make a pair, and delete those whose boxes nobody takes any more. Call between kv_owner_begin and kv_owner_end. */
void
kv_sealing_key_make(void)
{
	static KvStatement insert = {
		"INSERT INTO keyvault.sealing_keys (key_id, id, public_key, ciphertext, retired_at)"
		" VALUES ($1, $2, $3, $4, now() + make_interval(secs => $5 * 2.0))",
		5, {BYTEAOID, UUIDOID, BYTEAOID, BYTEAOID, INT4OID}
	};
	KvDataKey  *data_key = kv_data_key_ensure(KV_PLATFORM_USER);
	KvBoxKey   *key = kv_secret_alloc(sizeof(KvBoxKey));
	KvSecretName name = secret_name(kv_uuid_make());
	Datum		values[5];

	kv_sealed_box_make_key(key);
	values[0] = PointerGetDatum(make_bytea(key->id, KV_BOX_KEY_ID_SIZE));
	values[1] = UUIDPGetDatum(&name.id);
	values[2] = PointerGetDatum(make_bytea(key->public_key, KV_BOX_PUBLIC_KEY_SIZE));
	values[3] = PointerGetDatum(kv_envelope_seal(data_key, &name, (const char *) key->private_key, KV_BOX_PRIVATE_KEY_SIZE));
	values[4] = Int32GetDatum(kv_sealing_key_lifetime);
	(void) kv_sealing_key_forget_retired();
	kv_statement_execute(&insert, values, NULL);
	kv_secret_wipe(key, sizeof(KvBoxKey));
}

/*
 * The newest public key whose boxes are taken; false when there is none. *is_due tells
 * whether it is time for a new one.
 */
static bool
find_newest(KvBoxKey *key, bool *is_due, Snapshot snapshot)
{
	static KvStatement find = {
		"SELECT key_id, public_key, created_at <= now() - make_interval(secs => $1)"
		" FROM keyvault.sealing_keys WHERE retired_at > now() ORDER BY created_at DESC LIMIT 1", 1, {INT4OID}
	};
	Datum		lifetime = Int32GetDatum(kv_sealing_key_lifetime);
	HeapTuple	row;
	TupleDesc	tupdesc;
	bool		isnull;

	*is_due = true;
	if (kv_statement_read(&find, &lifetime, snapshot) == 0)
		return false;
	row = SPI_tuptable->vals[0];
	tupdesc = SPI_tuptable->tupdesc;
	memset(key, 0, sizeof(*key));
	memcpy(key->id, VARDATA_ANY(DatumGetByteaPP(SPI_getbinval(row, tupdesc, 1, &isnull))), KV_BOX_KEY_ID_SIZE);
	memcpy(key->public_key, VARDATA_ANY(DatumGetByteaPP(SPI_getbinval(row, tupdesc, 2, &isnull))), KV_BOX_PUBLIC_KEY_SIZE);
	*is_due = DatumGetBool(SPI_getbinval(row, tupdesc, 3, &isnull));
	return true;
}

/* Is there a public key that needs no successor yet? Fills it in. Call between kv_owner_begin and kv_owner_end. */
bool
kv_sealing_key_newest(KvBoxKey *key)
{
	bool		is_due;

	return find_newest(key, &is_due, GetActiveSnapshot()) && !is_due;
}

/* Have the worker make a pair, and wait until it has. */
static bool
await_worker(KvBoxKey *key)
{
	static KvStatement wake = {"SELECT keyvault._wake_worker_now()", 0};
	TimestampTz deadline = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), WAIT_FOR_WORKER_MS);
	bool		is_due;

	kv_statement_execute(&wake, NULL, NULL);
	while (!find_newest(key, &is_due, GetLatestSnapshot()))
	{
		if (GetCurrentTimestamp() >= deadline)
			return false;
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, LOOK_EVERY_MS, PG_WAIT_EXTENSION);
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
	}
	return true;
}

/*
 * The public key to seal to, made if there is none or the newest is old. Call between
 * kv_owner_begin and kv_owner_end. Errors: KV004, 25006.
 */
void
kv_sealing_key_ensure(KvBoxKey *key)
{
	bool		is_due;
	bool		found = find_newest(key, &is_due, GetActiveSnapshot());

	if (found && (!is_due || XactReadOnly || !kv_reveal_may_open()))
		return;
	if (XactReadOnly && kv_reveal_may_open())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("there is no key to seal to yet, and a read-only transaction cannot make one"),
				 errhint("Call keyvault.sealing_key() once in a transaction that may write, on the primary; through PostgREST by POST.")));
	if (kv_reveal_may_open())
	{
		kv_sealing_key_make();
		kv_owner_fresh_snapshot_begin();
		found = find_newest(key, &is_due, GetActiveSnapshot());
		kv_owner_fresh_snapshot_end();
	}
	else
		found = await_worker(key);
	if (!found)
		ereport(ERROR,
				(errcode(ERRCODE_KV_MASTER_KEY),
				 errmsg("there is no key to seal to yet"),
				 errdetail("With keyvault.reveal off the database's worker makes it, and it has not done so within %d s.",
						   WAIT_FOR_WORKER_MS / 1000),
				 errhint("See in the server log whether the worker has a master key, and that keyvault.databases includes this database.")));
}

/* Step to the row of a box's key; false when there is none. The caller ends the scan. */
static bool
find_key_of_box(KvIndexScan *scan, const bytea *box)
{
	static KvIndex sealing_keys = {{"sealing_keys"}, {"sealing_keys_pkey"}, 1, {BYTEAOID}};
	Datum		key_id = PointerGetDatum(make_bytea(kv_sealed_box_key_id(box), KV_BOX_KEY_ID_SIZE));

	kv_index_scan_begin(scan, &sealing_keys, &key_id);
	return kv_index_scan_next(scan, ForwardScanDirection);
}

/* Are new boxes for the key of this one, which looks right, taken? */
bool
kv_sealing_key_is_accepted(const bytea *box)
{
	KvIndexScan scan;
	bool		isnull;
	bool		accepted;

	accepted = find_key_of_box(&scan, box) &&
		DatumGetTimestampTz(kv_index_scan_value(&scan, SEALING_KEYS_RETIRED_AT, &isnull)) > GetCurrentTimestamp();
	kv_index_scan_end(&scan);
	return accepted;
}

/* Have the key of a box stay until the transaction ends, so that whoever deletes retired ones sees the box. Error: 40001 when it is gone. */
void
kv_sealing_key_hold(const bytea *box)
{
	static KvStatement hold = {
		"SELECT FROM keyvault.sealing_keys WHERE key_id = substr($1, 2, 4) FOR KEY SHARE", 1, {BYTEAOID}
	};
	Datum		value = PointerGetDatum(box);

	if (kv_statement_execute(&hold, &value, NULL) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("the key that this one is sealed to has just been replaced"),
				 errhint("Retry the transaction; seal a key of keyvault.store_sealed_api_key() to keyvault.sealing_key() again.")));
}

/*
 * Seal a secret where this process may not open it: in a box that is the worker's to open, and
 * whose key is held. Call between kv_owner_begin and kv_owner_end. Errors: KV004, 25006, 40001.
 */
bytea *
kv_sealing_key_seal_box(const char *label, const char *user_id, const char *context, const char *secret, Size length)
{
	KvBoxBinding binding = {.label = label,.user_id = user_id,.context = context};
	KvBoxKey	key;
	bytea	   *box;

	kv_sealing_key_ensure(&key);
	/* The worker may just have made the vault, with the key. */
	kv_owner_fresh_snapshot_begin();
	kv_vault_id_get(&binding.vault_id);
	kv_owner_fresh_snapshot_end();
	box = kv_sealed_box_seal(&key, &binding, secret, length);
	kv_sealing_key_hold(box);
	return box;
}

/*
 * Open a box that looks right. Returns the secret, NUL-terminated, in secret memory; NULL
 * when it does not open, or its key is gone. Errors: KV004, KV005.
 */
char *
kv_sealing_key_open_box(const char *label, const char *user_id, const char *context, const bytea *box, Size *length)
{
	KvBoxKey   *key = kv_secret_alloc(sizeof(KvBoxKey));
	KvBoxBinding binding = {.label = label,.user_id = user_id,.context = context};
	KvIndexScan scan;
	char	   *private_key = NULL;

	if (find_key_of_box(&scan, box))
	{
		bool		isnull;
		KvSecretName name = secret_name(DatumGetUUIDP(kv_index_scan_value(&scan, SEALING_KEYS_ID, &isnull)));
		bytea	   *public_key = DatumGetByteaPP(kv_index_scan_value(&scan, SEALING_KEYS_PUBLIC_KEY, &isnull));

		memcpy(key->id, kv_sealed_box_key_id(box), KV_BOX_KEY_ID_SIZE);
		memcpy(key->public_key, VARDATA_ANY(public_key), KV_BOX_PUBLIC_KEY_SIZE);
		private_key = kv_envelope_open(KV_PLATFORM_USER, &name,
									   DatumGetByteaPP(kv_index_scan_value(&scan, SEALING_KEYS_CIPHERTEXT, &isnull)));
	}
	kv_index_scan_end(&scan);
	if (private_key == NULL)
		return NULL;
	memcpy(key->private_key, private_key, KV_BOX_PRIVATE_KEY_SIZE);
	kv_vault_id_get(&binding.vault_id);
	return kv_sealed_box_open(key, &binding, box, length);
}
