/*-------------------------------------------------------------------------
 * master_key_rotation.c
 *		Which master key wraps, and how another takes its place.
 *
 * The primary row of keyvault.master_keys says which master key wraps; the loaded keys only
 * have to contain it. A rotation makes the loaded primary that row, then wraps what others
 * have wrapped again: where it stands is in the rows, so that it goes on after any crash.
 *
 * Whoever wraps holds a lock on the table until his transaction ends. A rotation waits, after
 * its new primary row is committed, for those who had the lock by then: from then on nobody
 * can commit a wrap under an earlier key, and one that wraps nothing is retired for good.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/master_key_rotation.h"

#include "access/xact.h"
#include "base/catalogue.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/secret.h"
#include "catalog/pg_type.h"
#include "crypto/data_key_wrap.h"
#include "crypto/reveal.h"
#include "crypto/rotation_request.h"
#include "crypto/vault_id.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/lmgr.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(keyvault_rotate_master_key);
PG_FUNCTION_INFO_V1(keyvault_rotate_master_key_in_batches);
PG_FUNCTION_INFO_V1(keyvault_rotate_master_key_step);

#define BATCH_DEFAULT	1000
#define BATCH_MAX		100000

/* Columns of the query for wraps. */
enum
{
	WRAP_USER_ID = 1,
	WRAP_VERSION,
	WRAP_DATA_KEY_ID,
	WRAP_WRAPPED,
};

static Oid
master_keys_table(void)
{
	static KvRelation master_keys = {"master_keys"};

	return kv_relation_oid(&master_keys);
}

static bytea *
make_kek_id(const KvMasterKey *master_key)
{
	bytea	   *kek_id = palloc(VARHDRSZ + KV_KEK_ID_SIZE);

	SET_VARSIZE(kek_id, VARHDRSZ + KV_KEK_ID_SIZE);
	memcpy(VARDATA(kek_id), master_key->kek_id, KV_KEK_ID_SIZE);
	return kek_id;
}

/* The primary row as last committed, or written by us; false when there is none. kek_id is in SPI's memory. */
static bool
find_primary(uint32 *version, const uint8 **kek_id)
{
	/* The SQL of version 0.1.0 has no column status, and one row. */
	static KvStatement find = {
		"SELECT m.version, m.kek_id FROM keyvault.master_keys m"
		" WHERE coalesce(to_jsonb(m) ->> 'status', 'primary') = 'primary'", 0
	};
	bool		isnull;

	if (kv_statement_read(&find, NULL, GetLatestSnapshot()) == 0)
		return false;
	*version = DatumGetInt32(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
	*kek_id = (const uint8 *) VARDATA_ANY(DatumGetByteaPP(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull)));
	return true;
}

/*
 * The master key that wraps, and its version: the vault's primary one, which is the loaded
 * primary where the vault has none yet. Call between kv_owner_begin and kv_owner_end. Error: KV004.
 */
const KvMasterKey *
kv_master_key_primary(uint32 *version)
{
	static KvStatement insert = {
		"INSERT INTO keyvault.master_keys (kek_id, version) VALUES ($1, 1) ON CONFLICT DO NOTHING", 1, {BYTEAOID}
	};
	const KvMasterKey *loaded = kv_master_key_get();
	const uint8 *kek_id;

	/* Kept to the transaction's end. */
	LockRelationOid(master_keys_table(), RowShareLock);
	if (!find_primary(version, &kek_id))
	{
		Datum		value = PointerGetDatum(make_kek_id(loaded));

		kv_statement_execute(&insert, &value, NULL);
		if (!find_primary(version, &kek_id))
			ereport(ERROR,
					(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
					 errmsg("another transaction is making the first key of this vault"),
					 errhint("Retry the transaction.")));
	}
	return kv_master_key_find(kek_id);
}

/* An old snapshot does not see what others have wrapped since. */
static void
require_read_committed(void)
{
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("keys are rotated at isolation level read committed only"),
				 errhint("SET default_transaction_isolation = 'read committed', or begin the transaction so.")));
}

/* Make the loaded primary key the vault's; the one before it only opens from now on. False when it was that already. */
static bool
switch_primary(void)
{
	static KvStatement demote = {"UPDATE keyvault.master_keys SET status = 'old' WHERE status = 'primary'", 0};
	static KvStatement promote = {
		"INSERT INTO keyvault.master_keys AS m (kek_id, version, status)"
		" SELECT $1, coalesce(max(o.version), 0) + 1, 'primary' FROM keyvault.master_keys o"
		" ON CONFLICT (kek_id) DO UPDATE SET status = 'primary' WHERE m.status = 'old'", 1, {BYTEAOID}
	};
	const KvMasterKey *loaded = kv_master_key_get();
	uint8		loaded_id[KV_KEK_ID_SIZE];
	const uint8 *kek_id;
	uint32		version;
	Datum		value;

	require_read_committed();
	memcpy(loaded_id, loaded->kek_id, KV_KEK_ID_SIZE);
	value = PointerGetDatum(make_kek_id(loaded));
	/* One switch at a time. */
	LockRelationOid(master_keys_table(), ShareUpdateExclusiveLock);
	if (!find_primary(&version, &kek_id) || memcmp(kek_id, loaded_id, KV_KEK_ID_SIZE) == 0)
		return false;
	/* Without the key before, nothing could be wrapped again. */
	(void) kv_master_key_find(kek_id);
	kv_statement_execute(&demote, NULL, NULL);
	if (kv_statement_execute(&promote, &value, NULL) == 0)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("master key %s was retired", kv_master_key_hex(loaded_id)),
				 errhint("Put a new key first: (umask 077; openssl rand -hex 32)")));
	return true;
}

/* One column of a batch. */
static Datum
make_array(Datum *values, int n, Oid type)
{
	int16		length;
	bool		by_value;
	char		alignment;

	get_typlenbyvalalign(type, &length, &by_value, &alignment);
	return PointerGetDatum(construct_array(values, n, type, length, by_value, alignment));
}

/* Wrap the data key of a row again; NULL, with a warning, when it cannot be opened. Error: KV004. */
static bytea *
rewrap_row(HeapTuple row, TupleDesc descriptor, const KvMasterKey *primary, uint32 kek_version)
{
	KvDataKey  *data_key = kv_secret_alloc(sizeof(KvDataKey));
	bool		isnull;

	data_key->user_id = TextDatumGetCString(SPI_getbinval(row, descriptor, WRAP_USER_ID, &isnull));
	data_key->version = DatumGetInt32(SPI_getbinval(row, descriptor, WRAP_VERSION, &isnull));
	data_key->id = *DatumGetUUIDP(SPI_getbinval(row, descriptor, WRAP_DATA_KEY_ID, &isnull));
	kv_vault_id_get(&data_key->vault_id);
	if (kv_data_key_unwrap(data_key, DatumGetByteaPP(SPI_getbinval(row, descriptor, WRAP_WRAPPED, &isnull))))
		return kv_data_key_wrap(data_key, primary, kek_version);
	ereport(WARNING,
			(errcode(ERRCODE_KV_SECRET_UNREADABLE),
			 errmsg("data key of user \"%s\" cannot be opened, and is left as it is", data_key->user_id),
			 errdetail("Version %u was altered, or moved from another user or vault.", data_key->version),
			 errhint("Restore it from a backup, or delete its row of keyvault.data_keys and the keys under it; then rotate again.")));
	return NULL;
}

/*
 * Wrap up to batch data keys of other master keys than the primary one again. Returns how
 * many were; false in *more when there were none to be found. *skipped counts those, at the
 * front of the order, that cannot be opened.
 */
static int64
rewrap_batch(int batch, int *skipped, bool *more)
{
	static KvStatement find = {
		"(SELECT d.user_id, d.version, d.data_key_id, d.wrapped FROM keyvault.data_keys d WHERE substr(d.wrapped, 9, 16) < $1"
		" ORDER BY substr(d.wrapped, 9, 16), d.user_id, d.version LIMIT $2 + $3)"
		" UNION ALL"
		" (SELECT d.user_id, d.version, d.data_key_id, d.wrapped FROM keyvault.data_keys d WHERE substr(d.wrapped, 9, 16) > $1"
		" ORDER BY substr(d.wrapped, 9, 16), d.user_id, d.version LIMIT $2 + $3)"
		" LIMIT $2 OFFSET $3", 3, {BYTEAOID, INT4OID, INT4OID}
	};
	static KvStatement update = {
		"UPDATE keyvault.data_keys d SET wrapped = n.after"
		" FROM unnest($1, $2, $3, $4) AS n(user_id, version, before, after)"
		" WHERE d.user_id = n.user_id AND d.version = n.version AND d.wrapped = n.before",
		4, {TEXTARRAYOID, INT4ARRAYOID, BYTEAARRAYOID, BYTEAARRAYOID}
	};
	uint32		kek_version;
	KvMasterKey *primary = kv_secret_alloc(sizeof(KvMasterKey));
	Datum		arguments[3];
	int			found;
	SPITupleTable *rows;
	Datum	   *columns[4];
	int			n = 0;

	/* A copy: looking for the other keys may load them all anew. */
	*primary = *kv_master_key_primary(&kek_version);
	arguments[0] = PointerGetDatum(make_kek_id(primary));
	arguments[1] = Int32GetDatum(batch);
	arguments[2] = Int32GetDatum(*skipped);
	found = (int) kv_statement_read(&find, arguments, GetLatestSnapshot());
	rows = SPI_tuptable;
	for (int i = 0; i < 4; i++)
		columns[i] = palloc(Max(found, 1) * sizeof(Datum));
	/* Between a procedure's transactions there is none. */
	kv_owner_fresh_snapshot_begin();
	for (int i = 0; i < found; i++)
	{
		bool		isnull;
		bytea	   *after;

		CHECK_FOR_INTERRUPTS();
		after = rewrap_row(rows->vals[i], rows->tupdesc, primary, kek_version);
		if (after == NULL)
		{
			(*skipped)++;
			continue;
		}
		columns[0][n] = SPI_getbinval(rows->vals[i], rows->tupdesc, WRAP_USER_ID, &isnull);
		columns[1][n] = SPI_getbinval(rows->vals[i], rows->tupdesc, WRAP_VERSION, &isnull);
		columns[2][n] = SPI_getbinval(rows->vals[i], rows->tupdesc, WRAP_WRAPPED, &isnull);
		columns[3][n++] = PointerGetDatum(after);
	}
	kv_owner_fresh_snapshot_end();
	*more = found > 0;
	if (n == 0)
		return 0;
	return (int64) kv_statement_execute(&update, (Datum[]) {
		make_array(columns[0], n, TEXTOID), make_array(columns[1], n, INT4OID),
		make_array(columns[2], n, BYTEAOID), make_array(columns[3], n, BYTEAOID)
	}, NULL);
}

/* Retire the keys that wrap nothing. The caller has seen to it that nobody can still commit a wrap under them. */
static void
retire_unused(void)
{
	static KvStatement retire = {
		"UPDATE keyvault.master_keys m SET status = 'retired', retired_at = now() WHERE m.status = 'old'"
		" AND NOT EXISTS (SELECT FROM keyvault.data_keys d WHERE substr(d.wrapped, 9, 16) = m.kek_id)", 0
	};

	kv_statement_execute(&retire, NULL, NULL);
}

static void
leave_to_worker(int batch)
{
	(void) kv_rotation_request_make("master_key", "", batch);
	kv_rotation_request_announce();
}

/* rotate_master_key(): all in the caller's transaction, during which nobody else gets a first key. */
Datum
keyvault_rotate_master_key(PG_FUNCTION_ARGS)
{
	KvOwnerScope scope;
	int64		total = 0;
	int			skipped = 0;
	bool		more = true;

	kv_owner_begin(&scope);
	if (!kv_reveal_may_open())
	{
		leave_to_worker(BATCH_DEFAULT);
		kv_owner_end(&scope);
		PG_RETURN_NULL();
	}
	require_read_committed();
	LockRelationOid(master_keys_table(), ExclusiveLock);
	(void) switch_primary();
	while (more)
		total += rewrap_batch(BATCH_DEFAULT, &skipped, &more);
	retire_unused();
	kv_owner_end(&scope);
	PG_RETURN_INT64(total);
}

/* Commit what was done, and begin the next transaction. */
static void
commit_batch(KvOwnerScope *scope)
{
	kv_owner_end(scope);
	SPI_commit();
	kv_owner_begin(scope);
}

/* CALL rotate_master_key(batch): a transaction for each batch. */
Datum
keyvault_rotate_master_key_in_batches(PG_FUNCTION_ARGS)
{
	int			batch = PG_ARGISNULL(0) ? BATCH_DEFAULT : PG_GETARG_INT32(0);
	bool		atomic = fcinfo->context == NULL || !IsA(fcinfo->context, CallContext) ||
		castNode(CallContext, fcinfo->context)->atomic;
	LOCKTAG		tag;
	KvOwnerScope scope;
	int			skipped = 0;
	bool		more = true;

	if (atomic)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
				 errmsg("keyvault.rotate_master_key(batch) cannot run inside a transaction block"),
				 errhint("It commits after each batch. Inside a transaction use SELECT keyvault.rotate_master_key().")));
	if (batch < 1 || batch > BATCH_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("batch must be 1 to %d", BATCH_MAX),
				 errhint("It is how many data keys are wrapped again in one transaction.")));
	if (SPI_connect_ext(SPI_OPT_NONATOMIC) != SPI_OK_CONNECT)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not connect to SPI")));
	kv_owner_begin(&scope);
	if (!kv_reveal_may_open())
	{
		leave_to_worker(batch);
		kv_owner_end(&scope);
		SPI_finish();
		PG_RETURN_VOID();
	}
	(void) switch_primary();
	commit_batch(&scope);
	SET_LOCKTAG_RELATION(tag, MyDatabaseId, master_keys_table());
	WaitForLockers(tag, ExclusiveLock, false);
	while (more)
	{
		require_read_committed();
		(void) rewrap_batch(batch, &skipped, &more);
		commit_batch(&scope);
	}
	retire_unused();
	kv_owner_end(&scope);
	SPI_finish();
	PG_RETURN_VOID();
}

/*
 * A step of the rotation that the worker does, in a transaction of its own: the switch, a batch,
 * or the end; true with the end. That waits for those who may have wrapped under an earlier key,
 * as long as lock_timeout allows. Where the rotation stands is in the rows; only how many of
 * them cannot be opened does the process keep, lest each step goes through those again.
 */
Datum
keyvault_rotate_master_key_step(PG_FUNCTION_ARGS)
{
	static int	skipped = 0;
	KvOwnerScope scope;
	bool		more = true;
	int64		n = 0;

	kv_owner_begin(&scope);
	if (switch_primary())
	{
		skipped = 0;
		kv_owner_end(&scope);
		PG_RETURN_BOOL(false);
	}
	while (n == 0 && more)
		n = rewrap_batch(PG_GETARG_INT32(0), &skipped, &more);
	if (n == 0)
	{
		LockRelationOid(master_keys_table(), ExclusiveLock);
		skipped = 0;
		for (more = true; more;)
			(void) rewrap_batch(BATCH_DEFAULT, &skipped, &more);
		skipped = 0;
		retire_unused();
	}
	kv_owner_end(&scope);
	PG_RETURN_BOOL(n == 0);
}
