/*-------------------------------------------------------------------------
 * key_row.c
 *		Writes rows of api_keys.
 *
 * A key is sealed before a tuple with it exists. A box that nobody has opened yet, and that may
 * prove to be bad, never takes the place of a key that is good: it waits in key_replacements.
 * Whatever else is stored or deleted takes it away.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/key_row.h"

#include "base/catalogue.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/secret.h"
#include "base/uuid.h"
#include "catalog/pg_type.h"
#include "crypto/envelope.h"
#include "crypto/reveal.h"
#include "crypto/sealing_key.h"
#include "identity/user.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"
#include "vault/key_shape.h"

#define FINGERPRINT_SIZE 16

/* Equal for equal keys of one user under one data key; tells nothing across users. */
bytea *
kv_key_row_fingerprint(const KvDataKey *data_key, const char *secret)
{
	static const char label[] = "keyvault/v1/fingerprint";
	uint8		mac_key[KV_KEY_SIZE];
	uint8		mac[KV_MAC_SIZE];
	bytea	   *fingerprint = palloc(VARHDRSZ + FINGERPRINT_SIZE);

	kv_hkdf_sha256(data_key->key, KV_KEY_SIZE, NULL, 0, (const uint8 *) label, strlen(label), mac_key, KV_KEY_SIZE);
	kv_hmac_sha256(mac_key, KV_KEY_SIZE, (const uint8 *) secret, strlen(secret), mac);
	kv_secret_wipe(mac_key, sizeof(mac_key));
	SET_VARSIZE(fingerprint, VARHDRSZ + FINGERPRINT_SIZE);
	memcpy(VARDATA(fingerprint), mac, FINGERPRINT_SIZE);
	return fingerprint;
}

/* The id of the key of that name, locked, or a new one. */
static pg_uuid_t *
id_for(const KvNewKey *key)
{
	static KvStatement find = {
		"SELECT id FROM keyvault.api_keys WHERE user_id = $1 AND provider = $2 AND name = $3 FOR UPDATE",
		3, {TEXTOID, TEXTOID, TEXTOID}
	};
	Datum		values[3] = {CStringGetTextDatum(key->user_id), CStringGetTextDatum(key->provider), CStringGetTextDatum(key->name)};
	bool		isnull;
	Datum		id = kv_statement_value(&find, values, NULL, &isnull);

	return isnull ? kv_uuid_make() : DatumGetUUIDP(id);
}

/* Tell a user who keeps the same key twice; it is the same row of a provider's invoice, and of its limits. */
static void
notice_duplicate(const KvNewKey *key, const pg_uuid_t *id, bytea *fingerprint)
{
	static KvStatement find = {
		"SELECT provider, name FROM keyvault.api_keys WHERE user_id = $1 AND fingerprint = $2 AND id <> $3"
		" ORDER BY provider, name LIMIT 1", 3, {TEXTOID, BYTEAOID, UUIDOID}
	};
	Datum		values[3] = {CStringGetTextDatum(key->user_id), PointerGetDatum(fingerprint), UUIDPGetDatum(id)};

	if (kv_statement_execute(&find, values, NULL) > 0)
		ereport(NOTICE,
				(errmsg("the same key is kept for provider \"%s\" under the name \"%s\"",
						SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1),
						SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 2))));
}

/* Make a user that may be made, and keep him as he is. Where this process may not open keys, note that he has had a box. */
static void
ensure_user(const char *user_id, bool may_create)
{
	static KvStatement note = {"UPDATE keyvault.users SET boxed = true WHERE user_id = $1 AND NOT boxed", 1, {TEXTOID}};
	static KvStatement ensure = {"SELECT keyvault._ensure_user($1, $2)", 2, {TEXTOID, BOOLOID}};
	Datum		values[2] = {CStringGetTextDatum(user_id), BoolGetDatum(may_create)};

	if (*user_id == '\0')
		return;
	kv_statement_execute(&ensure, values, NULL);
	/* Before the shared lock, which two sessions could not both turn into this one. */
	if (!kv_reveal_may_open())
		kv_statement_execute(&note, values, NULL);
	kv_user_lock(user_id, true);
}

/* A reference is no secret, and its own hint. */
static const char *
hint_of(const char *secret, bool is_reference)
{
	return is_reference ? secret : kv_key_shape_hint(secret);
}

/*
 * Write a row with what has been sealed; without a fingerprint that is a box. False, and nothing
 * is written, when another transaction has just stored the key, under another id, and when the
 * box has yet to be opened and a key is there: one that has not expired and is no box that proved
 * to be bad.
 */
static bool
write_row(const KvNewKey *key, const pg_uuid_t *id, bytea *ciphertext, bytea *fingerprint)
{
	static KvStatement upsert = {
		"INSERT INTO keyvault.api_keys AS k (user_id, id, provider, name, ciphertext, hint, fingerprint, source, expires_at)"
		" VALUES ($1, $2, $3, $4, $5, $6, $7, CASE WHEN $9 THEN 'reference' WHEN $1 = '' THEN 'platform' ELSE 'user' END, $8)"
		" ON CONFLICT (user_id, provider, name) DO UPDATE"
		" SET ciphertext = EXCLUDED.ciphertext, hint = EXCLUDED.hint, fingerprint = EXCLUDED.fingerprint,"
		" source = EXCLUDED.source, expires_at = EXCLUDED.expires_at, status = 'active', updated_at = now(),"
		" last_verified_at = CASE WHEN k.fingerprint = EXCLUDED.fingerprint THEN k.last_verified_at END,"
		" rotated_at = CASE WHEN k.fingerprint = EXCLUDED.fingerprint THEN k.rotated_at ELSE now() END"
		" WHERE k.id = EXCLUDED.id AND ($10 OR k.expires_at <= now()"
		"       OR k.fingerprint IS NULL AND k.status = 'failed' AND to_jsonb(k) ->> 'problem' IS NOT NULL)",
		10, {TEXTOID, UUIDOID, TEXTOID, TEXTOID, BYTEAOID, TEXTOID, BYTEAOID, TIMESTAMPTZOID, BOOLOID, BOOLOID}
	};
	Datum		values[10];
	char		nulls[11] = "          ";

	values[0] = CStringGetTextDatum(key->user_id);
	values[1] = UUIDPGetDatum(id);
	values[2] = CStringGetTextDatum(key->provider);
	values[3] = CStringGetTextDatum(key->name);
	values[4] = PointerGetDatum(ciphertext);
	values[5] = CStringGetTextDatum(hint_of(key->secret ? key->secret : "", key->is_reference));
	values[6] = PointerGetDatum(fingerprint);
	nulls[6] = fingerprint ? ' ' : 'n';
	values[7] = TimestampTzGetDatum(key->expires_at);
	nulls[7] = key->expires ? ' ' : 'n';
	values[8] = BoolGetDatum(key->is_reference);
	values[9] = BoolGetDatum(key->secret != NULL);
	return kv_statement_execute(&upsert, values, nulls) > 0;
}

/* Does the SQL of this database have key_replacements? That of version 0.1.0 has not. */
bool
kv_key_row_may_wait(void)
{
	static KvRelation table = {"key_replacements"};

	return OidIsValid(kv_relation_find(&table));
}

/* Forget what was to take the place of the key that a row had before. */
static void
forget_replacement(const char *user_id, const pg_uuid_t *id)
{
	static KvStatement forget = {"DELETE FROM keyvault.key_replacements WHERE user_id = $1 AND id = $2", 2, {TEXTOID, UUIDOID}};
	Datum		values[2] = {CStringGetTextDatum(user_id), UUIDPGetDatum(id)};

	if (kv_key_row_may_wait())
		kv_statement_execute(&forget, values, NULL);
}

/*
 * Have a box wait beside the key whose place it is to take; the one that waited before goes. The key's row is changed as
 * well, so that a transaction with a snapshot of before, which does not see the box, fails to store or delete the key.
 */
static void
write_beside(const KvNewKey *key, const pg_uuid_t *id)
{
	static KvStatement upsert = {
		"WITH present AS (UPDATE keyvault.api_keys SET updated_at = now() WHERE user_id = $1 AND id = $2 RETURNING user_id, id)"
		" INSERT INTO keyvault.key_replacements AS r (user_id, id, box, expires_at) SELECT user_id, id, $3, $4 FROM present"
		" ON CONFLICT (user_id, id) DO UPDATE SET box = EXCLUDED.box, expires_at = EXCLUDED.expires_at, status = 'waiting', problem = NULL, created_at = now()",
		4, {TEXTOID, UUIDOID, BYTEAOID, TIMESTAMPTZOID}
	};
	Datum		values[4] = {
		CStringGetTextDatum(key->user_id), UUIDPGetDatum(id), PointerGetDatum(key->box), TimestampTzGetDatum(key->expires_at),
	};

	kv_statement_execute(&upsert, values, key->expires ? NULL : "   n");
}

/*
 * Write a row with a box, or have a client's wait beside the key that is there. Sets the row's id: looked for again when
 * another transaction has stored the first key of that name since.
 */
static void
write_row_or_beside(const KvNewKey *key, pg_uuid_t *id, bytea *box)
{
	*id = *id_for(key);
	while (!write_row(key, id, box, NULL))
	{
		CHECK_FOR_INTERRUPTS();
		*id = *id_for(key);
		if (key->secret == NULL)
		{
			write_beside(key, id);
			return;
		}
	}
	forget_replacement(key->user_id, id);
}

/*
 * Keep a key where this process may not open keys: as a box, which the worker makes a record.
 * Sets the id of its row.
 */
static void
write_box(const KvNewKey *key, pg_uuid_t *id)
{
	static KvStatement wake = {"SELECT keyvault._wake_worker()", 0};
	bytea	   *box = key->box;

	if (box)
		kv_sealing_key_hold(box);
	else
		box = kv_sealing_key_seal_box(KV_BOX_LABEL, key->user_id, key->provider, key->secret, strlen(key->secret));
	write_row_or_beside(key, id, box);
	kv_statement_execute(&wake, NULL, NULL);
}

static bytea *
seal_record(const KvDataKey *data_key, const pg_uuid_t *id, const char *provider, const char *secret)
{
	KvSecretName name = {.id = *id,.provider = provider,.purpose = KV_API_KEY_PURPOSE};

	return kv_envelope_seal(data_key, &name, secret, strlen(secret));
}

/*
 * Seal a key, whose shape was checked if it is known, and write its row; returns the row's
 * id, the one it had if it is replaced. Call between kv_owner_begin and kv_owner_end.
 */
pg_uuid_t
kv_key_row_write(const KvNewKey *key)
{
	KvDataKey  *data_key;
	bytea	   *fingerprint;
	pg_uuid_t	id;

	ensure_user(key->user_id, key->may_create_user);
	if (!kv_reveal_may_open())
	{
		write_box(key, &id);
		return id;
	}
	data_key = kv_data_key_ensure(key->user_id);
	fingerprint = kv_key_row_fingerprint(data_key, key->secret);
	/* Again when another transaction has stored the first key of that name since: a record is sealed for one id. */
	do
	{
		CHECK_FOR_INTERRUPTS();
		id = *id_for(key);
	} while (!write_row(key, &id, seal_record(data_key, &id, key->provider, key->secret), fingerprint));
	forget_replacement(key->user_id, &id);
	notice_duplicate(key, &id, fingerprint);
	return id;
}

/* Have a box that waited, and whose secret was opened and checked, take the place of that key. Call as kv_key_row_write. */
void
kv_key_row_replace(const KvNewKey *key, const pg_uuid_t *id)
{
	write_row(key, id, key->box, NULL);
	forget_replacement(key->user_id, id);
}

/* Open a box. Returns what a client sealed, whatever it is, in secret memory; NULL when it does not open. Errors: KV004, KV005. */
char *
kv_key_row_open_box(const char *user_id, const char *provider, const bytea *box)
{
	Size		length;
	char	   *secret;

	if (!kv_sealed_box_looks_right(box))
		return NULL;
	secret = kv_sealing_key_open_box(KV_BOX_LABEL, user_id, provider, box, &length);
	return secret && strlen(secret) == length ? secret : NULL;
}

/*
 * Open what a row's ciphertext holds. Returns the key in secret memory; NULL when it does
 * not open, or when a box has something in it that no header may carry. Errors: KV004, KV005.
 */
char *
kv_key_row_open(const char *user_id, const char *provider, const pg_uuid_t *id, const bytea *stored)
{
	KvSecretName name = {.id = *id,.provider = provider,.purpose = KV_API_KEY_PURPOSE};
	char	   *secret;

	if (!kv_sealed_box_is(stored))
		return kv_envelope_open(user_id, &name, stored);
	secret = kv_key_row_open_box(user_id, provider, stored);
	return secret && kv_key_shape_is_sendable(secret) ? secret : NULL;
}

/* Make a record of a row that holds a box, whose secret was opened and checked. Call between kv_owner_begin and kv_owner_end. */
void
kv_key_row_convert(const char *user_id, const pg_uuid_t *id, const char *provider, bool is_reference, const char *secret)
{
	static KvStatement update = {
		"UPDATE keyvault.api_keys SET ciphertext = $3, hint = $4, fingerprint = $5"
		" WHERE user_id = $1 AND id = $2", 5, {TEXTOID, UUIDOID, BYTEAOID, TEXTOID, BYTEAOID}
	};
	KvDataKey  *data_key = kv_data_key_ensure(user_id);
	Datum		values[5];

	values[0] = CStringGetTextDatum(user_id);
	values[1] = UUIDPGetDatum(id);
	values[2] = PointerGetDatum(seal_record(data_key, id, provider, secret));
	values[3] = CStringGetTextDatum(hint_of(secret, is_reference));
	values[4] = PointerGetDatum(kv_key_row_fingerprint(data_key, secret));
	kv_statement_execute(&update, values, NULL);
}
