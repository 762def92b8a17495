/*-------------------------------------------------------------------------
 * call.c
 *		One provider call, from claim to settlement.
 *
 * A claim commits before anything is sent and a settlement writes answer, usage, price,
 * debit and hold at once, only for the attempt that is under way: killed at any moment, a
 * call is in the queue, or known to have been sent, or settled; never two of them.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "base/error.h"
#include "base/json_field.h"
#include "base/owner_spi.h"
#include "base/redaction.h"
#include "base/secret.h"
#include "base/settings.h"
#include "catalog/pg_type.h"
#include "common/pg_prng.h"
#include "gateway/call.h"
#include "gateway/dialect.h"
#include "identity/identity.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"
#include "vault/api_key.h"
#include "vault/call_key.h"

/* Back-off of the first retry; it doubles with each further one. */
#define BACKOFF_MS		500
#define BACKOFF_MAX_MS	30000

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

/* Open the key that a claimed request is to use. Errors: KV003, KV004, KV005. */
static char *
open_key(KvCall *call, HeapTuple row)
{
	bool		isnull;
	bool		own = strcmp(claimed_text(row, CLAIM_PAYER), "user") == 0;
	Datum		key_id = SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_API_KEY_ID, &isnull);
	char	   *key;

	if (!isnull)
	{
		key = kv_api_key_open(own ? call->user_id : KV_PLATFORM_USER, DatumGetUUIDP(key_id));
		if (key == NULL)
			ereport(ERROR,
					(errcode(ERRCODE_KV_NO_API_KEY),
					 errmsg("the API key was deleted or has expired since the request was queued")));
		return key;
	}
	key = kv_call_key_open(call->user_id, &call->id,
						   DatumGetByteaPP(SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_CALL_KEY, &isnull)));
	if (key == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_KV_SECRET_UNREADABLE),
				 errmsg("the key for this call alone did not outlive the server's restart")));
	return key;
}

/* open_key, but an error becomes the call's problem: it must not hold up the others. */
static void
try_open_key(KvCall *call, HeapTuple row)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		call->key = open_key(call, row);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		ErrorData  *error;

		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		/* The rollback has left us in the memory of the surrounding transaction. */
		MemoryContextSwitchTo(context);
		call->problem = psprintf("%s: %s", unpack_sql_state(error->sqlerrcode), error->message);
	}
	PG_END_TRY();
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
}

/* The headers of the call: the provider's own, then the one with the key. */
static char **
make_headers(KvCall *call, HeapTuple row)
{
	bool		isnull;
	Jsonb	   *fixed = DatumGetJsonbP(SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_HEADERS, &isnull));
	char	   *scheme = claimed_text(row, CLAIM_AUTH_SCHEME);
	char	  **headers = palloc0((JB_ROOT_COUNT(fixed) + 5) * sizeof(char *));
	JsonbIterator *iterator = JsonbIteratorInit(&fixed->root);
	JsonbIteratorToken token;
	JsonbValue	value;
	char	   *name = NULL;
	Size		length;
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
	name = claimed_text(row, CLAIM_AUTH_HEADER);
	length = strlen(name) + (scheme ? strlen(scheme) : 0) + strlen(call->key) + 4;
	headers[n] = kv_secret_alloc(length);
	snprintf(headers[n], length, "%s: %s%s%s", name, scheme ? scheme : "", scheme ? " " : "", call->key);
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
	call->timeout_ms = DatumGetInt32(SPI_getbinval(row, SPI_tuptable->tupdesc, CLAIM_TIMEOUT_MS, &isnull));
	if (base_url == NULL)
		call->problem = "the provider was removed since the request was queued";
	else
	{
		call->url = psprintf("%s%s", base_url, claimed_text(row, CLAIM_PATH));
		try_open_key(call, row);
	}
	if (call->key)
		call->headers = make_headers(call, row);
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
		for (uint64 i = 0; i < n; i++)
		{
			MemoryContext old = MemoryContextSwitchTo(context);

			calls = lappend(calls, make_call(SPI_tuptable->vals[i]));
			MemoryContextSwitchTo(old);
		}
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
kv_call_claim(int capacity, int reserve, int per_user, const char *after_user)
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
kv_call_find_lost(void)
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
 * Hand a committed claim to the network; when that is not possible, the call ends with its
 * problem. From here on it outlives the turn that claimed it.
 */
void
kv_call_start(KvCall *call, KvTransferPool *pool, bool *started)
{
	KvTransferRequest request = {
		.url = call->url,
		.allowed_host = call->allowed_host,
		.headers = (const char *const *) call->headers,
		.body = call->body,
		.timeout_ms = call->timeout_ms,
		.owner = call,
	};

	MemoryContextSetParent(call->context, TopMemoryContext);
	*started = call->problem == NULL &&
		kv_transfer_start(pool, &request, call->result.error, sizeof(call->result.error));
	if (!*started)
	{
		call->result.refused = true;
		call->result.nothing_sent = true;
	}
}

static bool
status_may_pass(long status_code)
{
	/* 529 is Anthropic's "overloaded". */
	return status_code == 408 || status_code == 425 || status_code == 429 || status_code == 500 ||
		status_code == 502 || status_code == 503 || status_code == 504 || status_code == 529;
}

/* Would another attempt be safe, and might it help? */
static bool
is_worth_a_retry(const KvCall *call)
{
	if (call->attempt >= kv_max_attempts || call->result.refused)
		return false;
	if (call->result.error[0])
		return call->result.nothing_sent;
	return status_may_pass(call->result.status_code);
}

/* What the provider asks for, else exponential back-off with jitter. */
static int
retry_delay_ms(const KvCall *call)
{
	double		delay = Min(BACKOFF_MS * (double) (1 << Min(call->attempt - 1, 16)), BACKOFF_MAX_MS);

	if (call->result.retry_after_ms >= 0)
		return (int) call->result.retry_after_ms;
	return (int) (delay * (0.75 + 0.5 * pg_prng_double(&pg_global_prng_state)));
}

static void
retry(KvCall *call, const char *error)
{
	static KvStatement retry = {
		"SELECT keyvault._retry_request($1, $2, $3, $4, $5)", 5, {TEXTOID, UUIDOID, INT4OID, INT4OID, TEXTOID}
	};
	Datum		values[5] = {
		CStringGetTextDatum(call->user_id), UUIDPGetDatum(&call->id), Int32GetDatum(call->attempt),
		Int32GetDatum(retry_delay_ms(call)), CStringGetTextDatum(error),
	};

	kv_statement_execute(&retry, values, NULL);
}

/* Why a call did not succeed, in our own words: the provider's may echo a secret. */
static char *
describe_failure(const KvCall *call, bool is_json)
{
	const KvTransferResult *result = &call->result;

	if (call->problem)
		return call->problem;
	if (result->error[0])
		return psprintf("%s: %s", call->provider, result->error);
	if (result->status_code < 200 || result->status_code > 299)
		return psprintf("%s answered with HTTP status %ld", call->provider, result->status_code);
	if (!is_json)
		return psprintf("%s answered with something else than JSON", call->provider);
	return NULL;
}

/* done, failed, or unknown: sent, and no answer came. */
static const char *
outcome_of(const KvCall *call, bool failed)
{
	const KvTransferResult *result = &call->result;

	if (!failed)
		return "done";
	if (result->error[0] && !result->nothing_sent && !result->refused)
		return "unknown";
	return "failed";
}

/*
 * Parse an answer, with every occurrence of the key overwritten: some providers quote it in
 * their errors. Where JSON may spell it with escapes, its canonical text is searched too.
 */
static Jsonb *
parse_answer(char *body, Size length, const char *key)
{
	bool		escapes = memchr(body, '\\', length) != NULL;
	Jsonb	   *answer;
	StringInfoData spelled;
	char	   *text;

	kv_redaction_scrub_value(body, length, key);
	answer = kv_json_parse(body, length);
	if (answer == NULL || !escapes)
		return answer;
	initStringInfo(&spelled);
	escape_json(&spelled, key);
	spelled.data[spelled.len - 1] = '\0';	/* the quotes around it */
	text = JsonbToCString(NULL, &answer->root, VARSIZE(answer));
	if (kv_redaction_scrub_value(text, strlen(text), spelled.data + 1) > 0)
		answer = kv_json_parse(text, strlen(text));
	kv_secret_wipe(spelled.data, spelled.len);
	return answer;
}

/*
 * Write what became of a call: the answer with all that goes with it, or a retry. Runs
 * in the caller's transaction.
 */
void
kv_call_settle(KvCall *call)
{
	static KvStatement settle = {
		"SELECT keyvault._settle_request($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)", 13,
		{TEXTOID, UUIDOID, INT4OID, TEXTOID, INT4OID, JSONBOID, TEXTOID, TEXTOID, INT8OID, INT8OID, INT8OID, NUMERICOID, BOOLOID}
	};
	KvTransferResult *result = &call->result;
	KvUsage		usage = {0};
	Jsonb	   *answer = NULL;
	char	   *failure;
	KvOwnerScope scope;
	Datum		values[13];
	char		nulls[14] = "             ";

	if (result->body && result->length > 0 && result->error[0] == '\0')
		answer = parse_answer(result->body, result->length, call->key);
	if (answer)
		kv_dialect_read_usage(call->dialect, answer, &usage);
	failure = describe_failure(call, answer != NULL);

	kv_owner_begin(&scope);
	if (failure && is_worth_a_retry(call))
	{
		retry(call, failure);
		kv_owner_end(&scope);
		return;
	}
	values[0] = CStringGetTextDatum(call->user_id);
	values[1] = UUIDPGetDatum(&call->id);
	values[2] = Int32GetDatum(call->attempt);
	values[3] = CStringGetTextDatum(outcome_of(call, failure != NULL));
	values[4] = Int32GetDatum((int32) result->status_code);
	nulls[4] = result->status_code ? ' ' : 'n';
	values[5] = answer ? JsonbPGetDatum(answer) : (Datum) 0;
	nulls[5] = answer ? ' ' : 'n';
	values[6] = failure ? CStringGetTextDatum(failure) : (Datum) 0;
	nulls[6] = failure ? ' ' : 'n';
	values[7] = usage.model ? CStringGetTextDatum(usage.model) : (Datum) 0;
	nulls[7] = usage.model ? ' ' : 'n';
	values[8] = Int64GetDatum(usage.input_tokens);
	values[9] = Int64GetDatum(usage.cached_tokens);
	values[10] = Int64GetDatum(usage.output_tokens);
	nulls[8] = nulls[9] = nulls[10] = usage.stated ? ' ' : 'n';
	values[11] = usage.stated_usd ? NumericGetDatum(usage.stated_usd) : (Datum) 0;
	nulls[11] = usage.stated_usd ? ' ' : 'n';
	values[12] = BoolGetDatum(call->dialect && kv_dialect_key_refused(call->dialect, result->status_code, answer));
	kv_statement_execute(&settle, values, nulls);
	kv_owner_end(&scope);
}

/* Give up on a settlement that the database refuses for good. Runs in the caller's transaction. */
void
kv_call_abandon(KvCall *call, const char *reason)
{
	static KvStatement abandon = {
		"SELECT keyvault._abandon_request($1, $2, $3, $4)", 4, {TEXTOID, UUIDOID, INT4OID, TEXTOID}
	};
	Datum		values[4] = {
		CStringGetTextDatum(call->user_id), UUIDPGetDatum(&call->id), Int32GetDatum(call->attempt),
		CStringGetTextDatum(reason),
	};
	KvOwnerScope scope;

	kv_owner_begin(&scope);
	kv_statement_execute(&abandon, values, NULL);
	kv_owner_end(&scope);
}

/*
 * When to look for queued requests again without having been woken; infinity when none is
 * queued. One that is due and could not be claimed, because somebody has it locked, is
 * looked at again a second later. Runs in the caller's transaction.
 */
TimestampTz
kv_call_next_retry(void)
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

/* Free a call and all that it holds. */
void
kv_call_free(KvCall *call, KvTransferPool *pool)
{
	if (call->result.transfer)
		kv_transfer_free(pool, call->result.transfer);
	MemoryContextDelete(call->context);
}
