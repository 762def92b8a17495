/*-------------------------------------------------------------------------
 * data_key.c
 *		The key of each user, wrapped by the master key.
 *
 * Wrap: 'D' | 1 | suite | source | master key version (4) | kek id (16) | nonce (12) |
 * wrapped key (32) | tag (16), integers big-endian. The associated data is the wrap up to
 * its nonce, the vault, the user, the data key's version and id: a wrap copied to another
 * user's row does not open.
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
#include "crypto/associated_data.h"
#include "crypto/master_key.h"
#include "crypto/vault_id.h"
#include "port/pg_bswap.h"
#include "utils/builtins.h"

#define WRAP_MAGIC		'D'
#define WRAP_FORMAT		1
#define WRAP_SUITE		1		/* AES-256-GCM */

typedef struct WrapHeader
{
	uint8		magic;
	uint8		format;
	uint8		suite;
	uint8		source;
	uint32		kek_version;	/* big-endian */
	uint8		kek_id[KV_KEK_ID_SIZE];
	uint8		nonce[KV_NONCE_SIZE];
} WrapHeader;

typedef struct Wrap
{
	WrapHeader	header;
	uint8		wrapped[KV_KEY_SIZE];
	uint8		tag[KV_TAG_SIZE];
} Wrap;

StaticAssertDecl(sizeof(Wrap) == 84, "the wrap's format has no padding");

/* Columns of keyvault.data_keys. */
enum
{
	DATA_KEYS_USER_ID = 1,
	DATA_KEYS_VERSION,
	DATA_KEYS_DATA_KEY_ID,
	DATA_KEYS_WRAPPED,
};

static void
wrap_associated_data(KvAssociatedData *associated, const WrapHeader *header, const KvDataKey *data_key)
{
	uint32		version = pg_hton32(data_key->version);

	kv_associated_data_init(associated, (const uint8 *) header, offsetof(WrapHeader, nonce));
	kv_associated_data_add(associated, data_key->vault_id.data, UUID_LEN);
	kv_associated_data_add(associated, (const uint8 *) data_key->user_id, strlen(data_key->user_id));
	kv_associated_data_add(associated, (const uint8 *) &version, sizeof(version));
	kv_associated_data_add(associated, data_key->id.data, UUID_LEN);
}

static void
wrap_data_key(Wrap *wrap, const KvDataKey *data_key, const KvMasterKey *master_key, uint32 kek_version)
{
	KvAssociatedData associated;

	wrap->header.magic = WRAP_MAGIC;
	wrap->header.format = WRAP_FORMAT;
	wrap->header.suite = WRAP_SUITE;
	wrap->header.source = master_key->source;
	wrap->header.kek_version = pg_hton32(kek_version);
	memcpy(wrap->header.kek_id, master_key->kek_id, KV_KEK_ID_SIZE);
	kv_random_bytes(wrap->header.nonce, KV_NONCE_SIZE);
	wrap_associated_data(&associated, &wrap->header, data_key);
	kv_aead_seal(master_key->key, wrap->header.nonce, associated.bytes, associated.length,
				 data_key->key, KV_KEY_SIZE, wrap->wrapped, wrap->tag);
}

/* Unwrap data_key->key. Errors: KV004 another master key is needed, KV005 the wrap is not this user's or was altered. */
static void
unwrap_data_key(KvDataKey *data_key, const bytea *stored)
{
	const KvMasterKey *master_key;
	Wrap		wrap = {0};
	KvAssociatedData associated;
	bool		opened = false;

	if (VARSIZE_ANY_EXHDR(stored) == sizeof(Wrap))
		memcpy(&wrap, VARDATA_ANY(stored), sizeof(Wrap));
	if (wrap.header.magic == WRAP_MAGIC && wrap.header.format == WRAP_FORMAT && wrap.header.suite == WRAP_SUITE)
	{
		master_key = kv_master_key_find(wrap.header.kek_id);
		wrap_associated_data(&associated, &wrap.header, data_key);
		opened = kv_aead_open(master_key->key, wrap.header.nonce, associated.bytes, associated.length,
							  wrap.wrapped, KV_KEY_SIZE, wrap.tag, data_key->key);
	}
	if (!opened)
		ereport(ERROR,
				(errcode(ERRCODE_KV_SECRET_UNREADABLE),
				 errmsg("data key of user \"%s\" cannot be opened", data_key->user_id),
				 errdetail("Version %u was altered, or moved from another user or vault.", data_key->version),
				 errhint("Restore keyvault.data_keys and keyvault.vault together, from one backup.")));
}

static KvDataKey *
read_data_key(const char *user_id, uint32 version)
{
	KvIndexScan scan;
	Datum		key = CStringGetTextDatum(user_id);
	Oid			type = TEXTOID;
	KvDataKey  *data_key = NULL;
	bool		isnull;

	kv_index_scan_begin(&scan, "data_keys", "data_keys_pkey", 1, &key, &type);
	while (kv_index_scan_next(&scan, BackwardScanDirection))
	{
		uint32		found = DatumGetInt32(kv_index_scan_value(&scan, DATA_KEYS_VERSION, &isnull));

		if (version != 0 && found != version)
			continue;
		data_key = kv_secret_alloc(sizeof(KvDataKey));
		data_key->user_id = user_id;
		data_key->version = found;
		data_key->id = *DatumGetUUIDP(kv_index_scan_value(&scan, DATA_KEYS_DATA_KEY_ID, &isnull));
		kv_vault_id_get(&data_key->vault_id);
		unwrap_data_key(data_key, DatumGetByteaPP(kv_index_scan_value(&scan, DATA_KEYS_WRAPPED, &isnull)));
		break;
	}
	kv_index_scan_end(&scan);
	return data_key;
}

/* The data key of a user with that version and id; NULL when there is none. Errors: KV004, KV005. */
KvDataKey *
kv_data_key_find(const char *user_id, uint32 version, const uint8 *id)
{
	KvDataKey  *data_key = read_data_key(user_id, version);

	return data_key && memcmp(data_key->id.data, id, UUID_LEN) == 0 ? data_key : NULL;
}

/* The version under which a user's next secret is sealed; NULL before the first one. */
KvDataKey *
kv_data_key_latest(const char *user_id)
{
	return read_data_key(user_id, 0);
}

/*
 * The master key that wraps, and its version: the vault's primary one, which is the loaded
 * primary when the vault has none yet. Error: KV004.
 */
static const KvMasterKey *
wrapping_key(uint32 *version)
{
	static KvStatement insert = {
		"INSERT INTO keyvault.master_keys (kek_id, version)"
		" SELECT $1, 1 WHERE NOT EXISTS (SELECT FROM keyvault.master_keys)"
		" ON CONFLICT DO NOTHING", 1, {BYTEAOID}
	};
	static KvStatement find = {"SELECT version, kek_id FROM keyvault.master_keys ORDER BY version DESC LIMIT 1", 0};
	const KvMasterKey *loaded = kv_master_key_get();
	bytea	   *kek_id = palloc(VARHDRSZ + KV_KEK_ID_SIZE);
	Datum		value = PointerGetDatum(kek_id);
	bool		isnull;

	SET_VARSIZE(kek_id, VARHDRSZ + KV_KEK_ID_SIZE);
	memcpy(VARDATA(kek_id), loaded->kek_id, KV_KEK_ID_SIZE);
	kv_statement_execute(&insert, &value, NULL);
	*version = DatumGetInt32(kv_statement_value(&find, NULL, NULL, &isnull));
	kek_id = DatumGetByteaPP(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2, &isnull));
	return kv_master_key_find((const uint8 *) VARDATA_ANY(kek_id));
}

/* Make the first data key of a user; another session may be faster. */
static void
create_data_key(const char *user_id)
{
	static KvStatement insert = {
		"INSERT INTO keyvault.data_keys (user_id, version, data_key_id, wrapped) VALUES ($1, 1, $2, $3)"
		" ON CONFLICT DO NOTHING", 3, {TEXTOID, UUIDOID, BYTEAOID}
	};
	uint32		kek_version;
	const KvMasterKey *master_key = wrapping_key(&kek_version);
	KvDataKey  *data_key = kv_secret_alloc(sizeof(KvDataKey));
	bytea	   *stored = palloc(VARHDRSZ + sizeof(Wrap));
	Datum		values[3];

	data_key->user_id = user_id;
	data_key->version = 1;
	data_key->id = *kv_uuid_make();
	kv_vault_id_ensure(&data_key->vault_id);
	kv_random_bytes(data_key->key, KV_KEY_SIZE);
	SET_VARSIZE(stored, VARHDRSZ + sizeof(Wrap));
	wrap_data_key((Wrap *) VARDATA(stored), data_key, master_key, kek_version);

	values[0] = CStringGetTextDatum(user_id);
	values[1] = UUIDPGetDatum(&data_key->id);
	values[2] = PointerGetDatum(stored);
	kv_statement_execute(&insert, values, NULL);
}

/* The user's latest data key, made if there is none yet. Call between kv_owner_begin and kv_owner_end. */
KvDataKey *
kv_data_key_ensure(const char *user_id)
{
	static KvStatement find = {
		"SELECT version FROM keyvault.data_keys WHERE user_id = $1", 1, {TEXTOID}
	};
	Datum		value = CStringGetTextDatum(user_id);
	KvDataKey  *data_key;
	bool		isnull;

	(void) kv_statement_value(&find, &value, NULL, &isnull);
	if (isnull)
		create_data_key(user_id);
	kv_owner_fresh_snapshot_begin();
	data_key = kv_data_key_latest(user_id);
	kv_owner_fresh_snapshot_end();
	if (data_key == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_T_R_SERIALIZATION_FAILURE),
				 errmsg("another transaction is making the first key of this user"),
				 errhint("Retry the transaction.")));
	return data_key;
}
