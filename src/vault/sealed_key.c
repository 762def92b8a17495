/*-------------------------------------------------------------------------
 * sealed_key.c
 *		API keys that a client sealed, so that their plaintext never reaches SQL.
 *
 * A box is taken once: its digest is kept as long as its sealing key. Otherwise whoever
 * saw an old box could put a key back that was replaced or deleted since.
 *
 * Where this process may not open keys, the box itself is kept, and the worker makes a
 * record of it; until then a key that it is to replace stays. The worker also makes the
 * sealing key then.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/sealed_key.h"

#include "access/xact.h"
#include "base/argument.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/redaction.h"
#include "base/settings.h"
#include "base/subtransaction.h"
#include "catalog/pg_type.h"
#include "crypto/master_key.h"
#include "crypto/reveal.h"
#include "crypto/sealing_key.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "vault/api_key.h"
#include "vault/key_row.h"
#include "vault/key_shape.h"

PG_FUNCTION_INFO_V1(keyvault_sealing_key);
PG_FUNCTION_INFO_V1(keyvault_store_sealed_api_key);

/* version, key id, public key, iv and tag */
#define BOX_OVERHEAD (1 + KV_BOX_KEY_ID_SIZE + KV_BOX_PUBLIC_KEY_SIZE + KV_NONCE_SIZE + KV_TAG_SIZE)

Datum
keyvault_sealing_key(PG_FUNCTION_ARGS)
{
	static KvStatement describe = {"SELECT keyvault._describe_sealing_key($1)", 1, {BYTEAOID}};
	MemoryContext context = CurrentMemoryContext;
	MemoryContext old;
	bytea	   *key_id;
	KvBoxKey	key;
	Datum		value;
	Jsonb	   *description;
	KvOwnerScope scope;
	bool		isnull;

	kv_owner_begin(&scope);
	kv_sealing_key_ensure(&key);
	key_id = palloc(VARHDRSZ + KV_BOX_KEY_ID_SIZE);
	SET_VARSIZE(key_id, VARHDRSZ + KV_BOX_KEY_ID_SIZE);
	memcpy(VARDATA(key_id), key.id, KV_BOX_KEY_ID_SIZE);
	value = PointerGetDatum(key_id);
	value = kv_statement_value(&describe, &value, NULL, &isnull);
	old = MemoryContextSwitchTo(context);
	description = DatumGetJsonbPCopy(value);
	MemoryContextSwitchTo(old);
	kv_owner_end(&scope);
	PG_RETURN_JSONB_P(description);
}

/* Error 22023 unless it can be a box at all. */
static bytea *
required_box(FunctionCallInfo fcinfo, int argument)
{
	bytea	   *box;

	kv_argument_require(fcinfo, argument, "sealed");
	box = PG_GETARG_BYTEA_PP(argument);
	if (VARSIZE_ANY_EXHDR(box) < BOX_OVERHEAD + KV_KEY_LENGTH_MIN || VARSIZE_ANY_EXHDR(box) > BOX_OVERHEAD + KV_KEY_LENGTH_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("sealed is not a sealed key"),
				 errdetail("It is %d bytes long; a sealed key has %d to %d.", (int) VARSIZE_ANY_EXHDR(box),
						   BOX_OVERHEAD + KV_KEY_LENGTH_MIN, BOX_OVERHEAD + KV_KEY_LENGTH_MAX),
				 errhint("Seal the key as \"Sealed box\" in doc/keyvault.md says, and pass the bytes.")));
	return box;
}

static void
raise_unopenable(const char *detail)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_SECRET_UNREADABLE),
			 errmsg("sealed key cannot be opened"),
			 errdetail("%s", detail),
			 errhint("Fetch keyvault.sealing_key(), seal the key for this user and this provider, and send it once.")));
}

/* Error KV005 when the box was taken before. Call between kv_owner_begin and kv_owner_end. */
static void
refuse_replay(const char *user_id, bytea *box)
{
	static KvStatement note = {
		"INSERT INTO keyvault.sealed_boxes (user_id, digest, key_id) VALUES ($1, sha256($2), substr($2, 2, 4))"
		" ON CONFLICT DO NOTHING", 2, {TEXTOID, BYTEAOID}
	};
	Datum		values[2] = {CStringGetTextDatum(user_id), PointerGetDatum(box)};

	if (kv_statement_execute(&note, values, NULL) == 0)
		raise_unopenable("It was stored before, and is taken only once.");
}

/* Check as much of a box as this process may, and open it if it may. Call between kv_owner_begin and kv_owner_end. */
static char *
take_box(const char *user_id, const char *provider, const bytea *box)
{
	char	   *secret;

	if (!kv_sealed_box_looks_right(box))
		raise_unopenable("It is no sealed key of this format.");
	if (!kv_sealing_key_is_accepted(box))
		raise_unopenable("It is sealed to a key that this vault does not have, or no longer takes.");
	if (!kv_reveal_may_open())
		return NULL;
	secret = kv_key_row_open_box(user_id, provider, box);
	if (secret == NULL)
		raise_unopenable("It was altered, or sealed for another user, provider or vault.");
	kv_key_shape_check(secret, strlen(secret), provider);
	return secret;
}

Datum
keyvault_store_sealed_api_key(PG_FUNCTION_ARGS)
{
	KvNewKey	key = {0};
	pg_uuid_t  *id = palloc(sizeof(pg_uuid_t));
	KvOwnerScope scope;
	bool		has_row;

	kv_redaction_mark_statement();
	key.provider = kv_argument_text(fcinfo, 0, "provider");
	key.box = required_box(fcinfo, 1);
	key.name = kv_api_key_name(fcinfo, 2);
	key.user_id = kv_identity_resolve(fcinfo, 3);
	key.may_create_user = kv_identity_acts_for_any_user();
	kv_api_key_set_end(&key, fcinfo, 4);

	kv_owner_begin(&scope);
	kv_api_key_require_provider(key.provider);
	key.secret = take_box(key.user_id, key.provider, key.box);
	has_row = kv_api_key_keep(&key, id);
	refuse_replay(key.user_id, key.box);
	kv_owner_end(&scope);
	if (!has_row)
		PG_RETURN_NULL();
	PG_RETURN_UUID_P(id);
}

/*
 * Where boxes are: beside a key whose place they are to take, and in the place of a key. A good one goes from there to here
 * before a record is made of it: where none can be made, calls still have the box.
 * find: up to $1 of them behind user $2 and id $3, those with a problem only if $4, with what convert_box takes;
 * note: user, id, problem, and whether that is final.
 */
typedef struct BoxKind
{
	bool		beside;
	KvStatement find;
	KvStatement note;
} BoxKind;

static BoxKind kinds[] = {
	{
		true,
		/* The key's row comes first, as with who stores or deletes one. */
		{"SELECT k.user_id, k.id, k.provider, r.box, false, k.name, r.expires_at"
			" FROM keyvault.key_replacements r JOIN keyvault.api_keys k ON k.user_id = r.user_id AND k.id = r.id"
			" WHERE r.status = 'waiting' AND (r.user_id, r.id) > ($2, $3) AND ($4 OR r.problem IS NULL)"
			" ORDER BY r.user_id, r.id LIMIT $1 FOR UPDATE OF k, r SKIP LOCKED", 4, {INT4OID, TEXTOID, UUIDOID, BOOLOID}},
		{"UPDATE keyvault.key_replacements SET status = CASE WHEN $4 THEN 'refused' ELSE status END, problem = $3,"
			" box = CASE WHEN NOT $4 THEN box END WHERE user_id = $1 AND id = $2", 4, {TEXTOID, UUIDOID, TEXTOID, BOOLOID}},
	},
	{
		false,
		/* The SQL of version 0.1.0 has no column problem, and no boxes. */
		{"SELECT k.user_id, k.id, k.provider, k.ciphertext, k.source = 'reference', k.name, k.expires_at FROM keyvault.api_keys k"
			" WHERE k.fingerprint IS NULL AND (k.user_id, k.id) > ($2, $3)"
			" AND (to_jsonb(k) ->> 'problem' IS NULL OR $4 AND k.status = 'active')"
			" ORDER BY k.user_id, k.id LIMIT $1 FOR UPDATE SKIP LOCKED", 4, {INT4OID, TEXTOID, UUIDOID, BOOLOID}},
		{"UPDATE keyvault.api_keys SET status = CASE WHEN $4 THEN 'failed' ELSE status END, problem = $3 WHERE user_id = $1 AND id = $2",
			4, {TEXTOID, UUIDOID, TEXTOID, BOOLOID}},
	},
};

/* A row of a kind's find. */
typedef struct BoxRow
{
	BoxKind    *kind;
	HeapTuple	row;
	TupleDesc	tupdesc;
} BoxRow;

/* Note why a box is not a record; final when it never can be. */
static void
note_problem(BoxRow *box, const char *problem, bool final)
{
	bool		isnull;
	Datum		values[4] = {
		SPI_getbinval(box->row, box->tupdesc, 1, &isnull), SPI_getbinval(box->row, box->tupdesc, 2, &isnull),
		CStringGetTextDatum(problem), BoolGetDatum(final),
	};

	kv_statement_execute(&box->kind->note, values, NULL);
}

static void
convert_box(void *arg)
{
	BoxRow	   *box = arg;
	bool		isnull;
	pg_uuid_t  *id = DatumGetUUIDP(SPI_getbinval(box->row, box->tupdesc, 2, &isnull));
	const char *problem = NULL;
	KvNewKey	key = {
		.user_id = TextDatumGetCString(SPI_getbinval(box->row, box->tupdesc, 1, &isnull)),
		.provider = TextDatumGetCString(SPI_getbinval(box->row, box->tupdesc, 3, &isnull)),
		.is_reference = DatumGetBool(SPI_getbinval(box->row, box->tupdesc, 5, &isnull)),
		.box = DatumGetByteaP(SPI_getbinval(box->row, box->tupdesc, 4, &isnull)),
		.name = TextDatumGetCString(SPI_getbinval(box->row, box->tupdesc, 6, &isnull)),
	};

	key.expires_at = DatumGetTimestampTz(SPI_getbinval(box->row, box->tupdesc, 7, &isnull));
	key.expires = !isnull;
	key.secret = kv_key_row_open_box(key.user_id, key.provider, key.box);
	if (key.secret == NULL)
		problem = "It was altered, or sealed for another user, provider or vault.";
	else if (!key.is_reference)
		problem = kv_key_shape_problem(key.secret, strlen(key.secret), key.provider);

	if (problem)
		note_problem(box, problem, true);
	else if (box->kind->beside)
		kv_key_row_replace(&key, id);
	else
		kv_key_row_convert(key.user_id, id, key.provider, key.is_reference, key.secret);
}

/* Make a sealing key where there is none or it is old. The worker calls it. Error: KV004. */
void
kv_sealed_key_make_ready(void)
{
	KvBoxKey	newest;
	KvOwnerScope scope;

	kv_owner_begin(&scope);
	if (!kv_sealing_key_newest(&newest))
		kv_sealing_key_make();
	kv_owner_end(&scope);
}

/* Make a record of a box, or note why not; returns the error that it is noted for. Throws what keeps all boxes from it. */
static ErrorData *
try_convert(BoxRow *box)
{
	ErrorData  *error = kv_subtransaction_run(convert_box, box);

	if (error == NULL)
		return NULL;
	if (error->sqlerrcode == ERRCODE_QUERY_CANCELED ||
		(error->sqlerrcode == ERRCODE_KV_MASTER_KEY && kv_master_key_source_has_failed()))
		ReThrowError(error);
	note_problem(box, psprintf("%s: %s", unpack_sql_state(error->sqlerrcode), error->message), false);
	return error;
}

/* Where a pass over all boxes stands: behind this one. The worker's; zeros at its beginning. */
static struct
{
	size_t		kind;
	char		user_id[KV_USER_ID_MAX + 1];
	pg_uuid_t	id;
}			pass;

/* Boxes of a kind: those without a problem, or with all any behind the one where the pass stands. */
static uint64
find_boxes(size_t kind, int max, bool all)
{
	pg_uuid_t	first = {{0}};
	bool		behind = all && kind == pass.kind;
	Datum		values[4] = {
		Int32GetDatum(max), CStringGetTextDatum(behind ? pass.user_id : ""), UUIDPGetDatum(behind ? &pass.id : &first), BoolGetDatum(all),
	};

	if (kinds[kind].beside && !kv_key_row_may_wait())
		return 0;
	return kv_statement_execute(&kinds[kind].find, values, NULL);
}

/* Have the pass stand at a box. */
static void
advance_pass(const BoxRow *last)
{
	bool		isnull;

	pass.kind = last->kind - kinds;
	pass.id = *DatumGetUUIDP(SPI_getbinval(last->row, last->tupdesc, 2, &isnull));
	strlcpy(pass.user_id, TextDatumGetCString(SPI_getbinval(last->row, last->tupdesc, 1, &isnull)), sizeof(pass.user_id));
}

/* kv_sealed_key_convert for one kind; *first is the first error that one was noted for. */
static int
convert_kind(size_t kind, int max, bool all, ErrorData **first)
{
	int			n = (int) find_boxes(kind, max, all);
	SPITupleTable *rows = SPI_tuptable;
	BoxRow		box = {&kinds[kind], NULL, n > 0 ? rows->tupdesc : NULL};

	for (int i = 0; i < n; i++)
	{
		ErrorData  *error;

		box.row = rows->vals[i];
		error = try_convert(&box);
		*first = *first ? *first : error;
	}
	if (all && n == max)
		advance_pass(&box);
	return n;
}

/*
 * Make records of up to max boxes. One that an error keeps from it, its user's data key being
 * broken for one, stays a box with a problem, *failed tells of such, and only a pass over all
 * looks at it again; that goes on behind the boxes of the last call, and ends with fewer than
 * max. Returns how many were looked at. The worker calls it, in a transaction of its own.
 * Error: KV004.
 */
int
kv_sealed_key_convert(int max, bool all, bool *failed)
{
	KvOwnerScope scope;
	ErrorData  *first = NULL;
	int			n = 0;

	kv_owner_begin(&scope);
	for (size_t kind = all ? pass.kind : 0; kind < lengthof(kinds) && n < max; kind++)
		n += convert_kind(kind, max - n, all, &first);
	if (all && n < max)
		memset(&pass, 0, sizeof(pass));
	if (first)
		ereport(WARNING,
				(errcode(first->sqlerrcode), errmsg("sealed keys cannot be opened: %s", first->message),
				 errhint("The worker tries again in a minute, and after a reload.")));
	*failed = first != NULL;
	kv_owner_end(&scope);
	return n;
}
