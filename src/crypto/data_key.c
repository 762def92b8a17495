/*-------------------------------------------------------------------------
 * data_key.c
 *		The key of each user, wrapped by the master key.
 *
 * A user's secrets are sealed under the latest version; rotation makes a new one, seals
 * them again and deletes the version before. Who seals holds a lock on the version's row,
 * so that it is not deleted under him.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/data_key.h"

#include "base/error.h"
#include "base/index_scan.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/secret.h"
#include "base/uuid.h"
#include "catalog/pg_type.h"
#include "crypto/data_key_wrap.h"
#include "crypto/master_key_rotation.h"
#include "crypto/vault_id.h"
#include "miscadmin.h"
#include "utils/builtins.h"

/* Columns of keyvault.data_keys. */
enum
{
	DATA_KEYS_USER_ID = 1,
	DATA_KEYS_VERSION,
	DATA_KEYS_DATA_KEY_ID,
	DATA_KEYS_WRAPPED,
};

static void
raise_unreadable(const KvDataKey *data_key)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_SECRET_UNREADABLE),
			 errmsg("data key of user \"%s\" cannot be opened", data_key->user_id),
			 errdetail("Version %u was altered, or moved from another user or vault.", data_key->version),
			 errhint("Restore keyvault.data_keys and keyvault.vault together, from one backup.")));
}

/* A version of a user's data key, and whether its wrap is his and opens; NULL when there is none. Error: KV004. */
static KvDataKey *
read_data_key(const char *user_id, uint32 version, bool *opens)
{
	static KvIndex versions = {{"data_keys"}, {"data_keys_pkey"}, 1, {TEXTOID}};
	KvIndexScan scan;
	Datum		key = CStringGetTextDatum(user_id);
	KvDataKey  *data_key = NULL;
	bool		isnull;

	kv_index_scan_begin(&scan, &versions, &key);
	while (kv_index_scan_next(&scan, BackwardScanDirection))
	{
		uint32		found = DatumGetInt32(kv_index_scan_value(&scan, DATA_KEYS_VERSION, &isnull));

		if (found != version)
			continue;
		data_key = kv_secret_alloc(sizeof(KvDataKey));
		data_key->user_id = user_id;
		data_key->version = found;
		data_key->id = *DatumGetUUIDP(kv_index_scan_value(&scan, DATA_KEYS_DATA_KEY_ID, &isnull));
		kv_vault_id_get(&data_key->vault_id);
		*opens = kv_data_key_unwrap(data_key, DatumGetByteaPP(kv_index_scan_value(&scan, DATA_KEYS_WRAPPED, &isnull)));
		break;
	}
	kv_index_scan_end(&scan);
	return data_key;
}

/* The data key of a user with that version and id; NULL when there is none that opens. Error: KV004. */
KvDataKey *
kv_data_key_find(const char *user_id, uint32 version, const uint8 *id)
{
	bool		opens;
	KvDataKey  *data_key = read_data_key(user_id, version, &opens);

	return data_key && opens && memcmp(data_key->id.data, id, UUID_LEN) == 0 ? data_key : NULL;
}

/* Make a version of a user's data key; NULL when it is there already. Call between kv_owner_begin and kv_owner_end. */
KvDataKey *
kv_data_key_create(const char *user_id, uint32 version)
{
	static KvStatement insert = {
		"INSERT INTO keyvault.data_keys (user_id, version, data_key_id, wrapped) VALUES ($1, $2, $3, $4)"
		" ON CONFLICT DO NOTHING", 4, {TEXTOID, INT4OID, UUIDOID, BYTEAOID}
	};
	uint32		kek_version;
	const KvMasterKey *master_key = kv_master_key_primary(&kek_version);
	KvDataKey  *data_key = kv_secret_alloc(sizeof(KvDataKey));
	Datum		values[4];

	data_key->user_id = user_id;
	data_key->version = version;
	data_key->id = *kv_uuid_make();
	kv_vault_id_ensure(&data_key->vault_id);
	kv_random_bytes(data_key->key, KV_KEY_SIZE);

	values[0] = CStringGetTextDatum(user_id);
	values[1] = Int32GetDatum(version);
	values[2] = UUIDPGetDatum(&data_key->id);
	values[3] = PointerGetDatum(kv_data_key_wrap(data_key, master_key, kek_version));
	return kv_statement_execute(&insert, values, NULL) > 0 ? data_key : NULL;
}

/*
 * Lock the latest version of a user's data key against deletion, or against all other use,
 * and return its number; 0 when there is none. A rotation that was waited for has put
 * another in its place, which only a further look sees; that may have waited for the next.
 */
uint32
kv_data_key_lock(const char *user_id, bool exclusive)
{
	static KvStatement share = {
		"SELECT version FROM keyvault.data_keys WHERE user_id = $1 ORDER BY version DESC LIMIT 1 FOR KEY SHARE", 1, {TEXTOID}
	};
	static KvStatement update = {
		"SELECT version FROM keyvault.data_keys WHERE user_id = $1 ORDER BY version DESC FOR UPDATE", 1, {TEXTOID}
	};
	static KvStatement any = {"SELECT EXISTS (SELECT FROM keyvault.data_keys WHERE user_id = $1)", 1, {TEXTOID}};
	Datum		value = CStringGetTextDatum(user_id);
	bool		isnull;

	do
	{
		Datum		version = kv_statement_value(exclusive ? &update : &share, &value, NULL, &isnull);

		if (!isnull)
			return DatumGetInt32(version);
		CHECK_FOR_INTERRUPTS();
	} while (DatumGetBool(kv_statement_value(&any, &value, NULL, &isnull)));
	return 0;
}

/*
 * The data key for a user's next secret, made if there is none yet, and kept from deletion
 * until the transaction ends. Call between kv_owner_begin and kv_owner_end. Errors: KV004, KV005.
 */
KvDataKey *
kv_data_key_ensure(const char *user_id)
{
	uint32		version = kv_data_key_lock(user_id, false);
	KvDataKey  *data_key = NULL;
	bool		opens;

	if (version == 0)
	{
		data_key = kv_data_key_create(user_id, 1);
		if (data_key)
			return data_key;
		version = kv_data_key_lock(user_id, false);
	}
	if (version != 0)
	{
		kv_owner_fresh_snapshot_begin();
		data_key = read_data_key(user_id, version, &opens);
		kv_owner_fresh_snapshot_end();
	}
	if (data_key == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("another transaction is making the first key of this user"),
				 errhint("Retry the transaction.")));
	if (!opens)
		raise_unreadable(data_key);
	return data_key;
}
