/*-------------------------------------------------------------------------
 * claim.c
 *		Take requests from the queue.
 *
 * A claim commits before anything is sent. A key that cannot be opened, or a provider
 * that is gone, is the problem of its one call.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/claim.h"

#include "base/error.h"
#include "base/owner_spi.h"
#include "base/secret.h"
#include "base/settings.h"
#include "base/subtransaction.h"
#include "catalog/pg_type.h"
#include "crypto/master_key.h"
#include "gateway/call.h"
#include "identity/user.h"
#include "mb/pg_wchar.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "vault/call_key.h"
#include "vault/development.h"
#include "vault/key_lookup.h"

/* Columns of keyvault._claim_requests. */
enum
{
	CLAIM_USER_ID = 1,
	CLAIM_ID,
	CLAIM_ATTEMPT,
	CLAIM_PROVIDER,
	CLAIM_DIALECT,
	CLAIM_BASE_URL,
	CLAIM_PATH,
	CLAIM_AUTH_HEADER,
	CLAIM_AUTH_SCHEME,
	CLAIM_HEADERS,
	CLAIM_ALLOWED_HOST,
	CLAIM_BODY,
	CLAIM_TIMEOUT_MS,
	CLAIM_PAYER,
	CLAIM_API_KEY_ID,
	CLAIM_CALL_KEY,
};

static char *
claimed_text(HeapTuple row, int column)
{
	bool		isnull;
	Datum		value = SPI_getbinval(row, SPI_tuptable->tupdesc, column, &isnull);

	return isnull ? NULL : TextDatumGetCString(value);
}

/* The key that a request of development mode is to use: it had none when it was queued. Error: KV003. */
static char *
open_development_key(const char *provider)
{
	char	   *key = kv_development_is_on() ? kv_development_key(provider) : NULL;

	if (key == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_KV_NO_API_KEY),
				 errmsg("the key was taken out of the .env file, or development mode was turned off, since the request was queued")));
	return key;
}

/*
 * Open the key that a claimed request is to use; NULL, with call->reference set, when it is
 * kept elsewhere. Errors: KV003, KV004, KV005, KV007.
 */
static char *
open_key(KvCall *call, HeapTuple row)
{
	bool		isnull;
	bool		own = strcmp(claimed_text(row, CLAIM_PAYER), "user") == 0;
	Datum		key_id = SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_API_KEY_ID, &isnull);
	Datum		call_key;
	char	   *key;

	kv_user_require_active(call->user_id);
	if (!isnull)
	{
		bool		names_reference;

		key = kv_key_lookup_by_id(own ? call->user_id : KV_PLATFORM_USER, DatumGetUUIDP(key_id), &names_reference);
		if (key == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_KV_NO_API_KEY),
					 errmsg("the API key was deleted or has expired since the request was queued")));
		if (!names_reference)
			return key;
		call->reference = key;
		return NULL;
	}
	call_key = SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_CALL_KEY, &isnull);
	if (isnull)
		return open_development_key(call->provider);
	key = kv_call_key_open(call->user_id, &call->id, DatumGetByteaPP(call_key));
	if (key == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_KV_SECRET_UNREADABLE),
				 errmsg("the key for this call alone did not outlive the server's restart")));
	return key;
}

/* May a key that could not be opened for this reason be opened later? */
static bool
may_open_later(int code)
{
	int			category = ERRCODE_TO_CATEGORY(code);

	if (code == ERRCODE_KV_MASTER_KEY)
		return kv_master_key_source_has_failed();
	return code == ERRCODE_LOCK_NOT_AVAILABLE || code == ERRCODE_QUERY_CANCELED ||
		category == ERRCODE_TRANSACTION_ROLLBACK || category == ERRCODE_INSUFFICIENT_RESOURCES;
}

/* A call whose key is to be opened, and its row. */
typedef struct KeyOfCall
{
	KvCall	   *call;
	HeapTuple	row;
} KeyOfCall;

static void
open_key_of(void *arg)
{
	KeyOfCall  *key = arg;

	key->call->key = open_key(key->call, key->row);
}

/* open_key, but an error becomes the call's problem: it must not hold up the others. */
static void
try_open_key(KvCall *call, HeapTuple row)
{
	KeyOfCall	key = {call, row};
	SPITupleTable *claimed = SPI_tuptable;
	ErrorData  *error = kv_subtransaction_run(open_key_of, &key);

	if (error)
	{
		/* Which master key is missing is in the detail. */
		bool		detailed = error->sqlerrcode == ERRCODE_KV_MASTER_KEY && error->detail;

		call->problem = psprintf("%s: %s%s%s", unpack_sql_state(error->sqlerrcode), error->message,
								 detailed ? ": " : "", detailed ? error->detail : "");
		call->problem_may_pass = may_open_later(error->sqlerrcode);
	}
	/* Looking at a sealed key's shape is a statement, too. */
	SPI_tuptable = claimed;
}

/* The headers of the call: the provider's own, with room for the one with the key. */
static char **
make_headers(KvCall *call, HeapTuple row)
{
	bool		isnull;
	Jsonb	   *fixed = DatumGetJsonbP(SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_HEADERS, &isnull));
	char	  **headers = palloc0((JB_ROOT_COUNT(fixed) + 5) * sizeof(char *));
	JsonbIterator *iterator = JsonbIteratorInit(&fixed->root);
	JsonbIteratorToken token;
	JsonbValue	value;
	char	   *name = NULL;
	int			n = 0;

	headers[n++] = "Content-Type: application/json";
	headers[n++] = "Accept: application/json";
	headers[n++] = "Expect:";
	while ((token = JsonbIteratorNext(&iterator, &value, true)) != WJB_DONE)
	{
		if (token == WJB_KEY)
			name = pnstrdup(value.val.string.val, value.val.string.len);
		else if (token == WJB_VALUE && value.type == jbvString)
			headers[n++] = psprintf("%s: %.*s", name, value.val.string.len, value.val.string.val);
	}
	call->key_header = n;
	call->auth_header = claimed_text(row, CLAIM_AUTH_HEADER);
	call->auth_scheme = claimed_text(row, CLAIM_AUTH_SCHEME);
	return headers;
}

/* Copy a claimed row into a call, in a child of the current memory context. */
static KvCall *
make_call(HeapTuple row)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "keyvault call", ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	KvCall	   *call = palloc0(sizeof(KvCall));
	char	   *base_url;
	bool		isnull;

	call->context = context;
	call->user_id = claimed_text(row, CLAIM_USER_ID);
	call->id = *DatumGetUUIDP(SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_ID, &isnull));
	call->attempt = DatumGetInt32(SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_ATTEMPT, &isnull));
	call->provider = claimed_text(row, CLAIM_PROVIDER);
	call->dialect = claimed_text(row, CLAIM_DIALECT);
	base_url = claimed_text(row, CLAIM_BASE_URL);
	call->allowed_host = claimed_text(row, CLAIM_ALLOWED_HOST);
	call->body = claimed_text(row, CLAIM_BODY);
	call->is_key_test = call->body == NULL;
	if (call->body)
		call->body = pg_server_to_any(call->body, strlen(call->body), PG_UTF8);
	call->timeout_ms = DatumGetInt32(SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_TIMEOUT_MS, &isnull));
	if (base_url == NULL)
		call->problem = "the provider was removed since the request was queued";
	else
	{
		call->url = psprintf("%s%s", base_url, claimed_text(row, CLAIM_PATH));
		try_open_key(call, row);
	}
	if (call->problem == NULL)
		call->headers = make_headers(call, row);
	if (call->key)
		(void) kv_call_use_key(call, call->key);
	MemoryContextSwitchTo(old);
	return call;
}

/* Claim users in turn, once from the one behind after_user and once more from the start. */
static List *
claim_round(List *calls, int capacity, int per_user, const char *after_user, MemoryContext context)
{
	static KvStatement claim = {
		"SELECT * FROM keyvault._claim_requests($1, $2, $3)", 3, {INT4OID, INT4OID, TEXTOID}
	};

	for (int round = 0; round < 2 && list_length(calls) < capacity; round++)
	{
		Datum		values[3] = {
			Int32GetDatum(capacity - list_length(calls)), Int32GetDatum(per_user),
			CStringGetTextDatum(round == 0 ? after_user : ""),
		};
		uint64		n;

		if (round == 1 && *after_user == '\0')
			break;
		n = kv_statement_execute(&claim, values, NULL);
		/* The key of a request is at least as new as the request. */
		kv_owner_fresh_snapshot_begin();
		for (uint64 i = 0; i < n; i++)
		{
			MemoryContext old = MemoryContextSwitchTo(context);

			calls = lappend(calls, make_call(SPI_tuptable->vals[i]));
			MemoryContextSwitchTo(old);
		}
		kv_owner_fresh_snapshot_end();
	}
	return calls;
}

/*
 * Claim due requests for up to capacity calls, taking users in turn from the one behind
 * after_user. The last reserve places are for users with nothing under way, one each, so
 * that a few users with slow calls cannot take them all. Returns calls, in a list in the
 * caller's memory; the transaction's commit makes them ours.
 */
List *
kv_claim_requests(int capacity, int reserve, int per_user, const char *after_user)
{
	MemoryContext context = CurrentMemoryContext;
	List	   *calls = NIL;
	KvOwnerScope scope;

	kv_owner_begin(&scope);
	if (capacity > reserve)
		calls = claim_round(calls, capacity - reserve, per_user, after_user, context);
	calls = claim_round(calls, capacity, 1, after_user, context);
	kv_owner_end(&scope);
	return calls;
}

/*
 * Calls that an earlier worker had sent and not settled, as calls whose answer was lost.
 * Whether the provider did the work cannot be known: they are neither repeated nor charged.
 */
List *
kv_claim_lost_calls(void)
{
	static KvStatement find = {
		"SELECT user_id, id, attempts, provider FROM keyvault.requests WHERE status = 'sent' ORDER BY user_id, id", 0
	};
	MemoryContext caller = CurrentMemoryContext;
	List	   *calls = NIL;
	KvOwnerScope scope;
	uint64		n;

	kv_owner_begin(&scope);
	n = kv_statement_execute(&find, NULL, NULL);
	for (uint64 i = 0; i < n; i++)
	{
		MemoryContext context = AllocSetContextCreate(TopMemoryContext, "keyvault call", ALLOCSET_SMALL_SIZES);
		MemoryContext old = MemoryContextSwitchTo(context);
		HeapTuple	row = SPI_tuptable->vals[i];
		KvCall	   *call = palloc0(sizeof(KvCall));
		bool		isnull;

		call->context = context;
		call->user_id = claimed_text(row, 1);
		call->id = *DatumGetUUIDP(SPI_getbinval(row, SPI_tuptable->tupdesc, 2, &isnull));
		call->attempt = DatumGetInt32(SPI_getbinval(row, SPI_tuptable->tupdesc, 3, &isnull));
		call->provider = claimed_text(row, 4);
		snprintf(call->result.error, sizeof(call->result.error),
				 "the server stopped after the call was sent and before its answer was stored");
		MemoryContextSwitchTo(caller);
		calls = lappend(calls, call);
		MemoryContextSwitchTo(old);
	}
	kv_owner_end(&scope);
	return calls;
}

/*
 * When to look for queued requests again without having been woken; infinity when none is
 * queued. One that is due and could not be claimed, because somebody has it locked, is
 * looked at again a second later. Runs in the caller's transaction.
 */
TimestampTz
kv_claim_next_retry(void)
{
	static KvStatement next = {
		"SELECT coalesce(min(greatest(next_attempt_at, clock_timestamp() + interval '1 second')), 'infinity')"
		" FROM keyvault.requests WHERE status = 'queued'", 0
	};
	KvOwnerScope scope;
	bool		isnull;
	TimestampTz due;

	kv_owner_begin(&scope);
	due = DatumGetTimestampTz(kv_statement_value(&next, NULL, NULL, &isnull));
	kv_owner_end(&scope);
	return due;
}
