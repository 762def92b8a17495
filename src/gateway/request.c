/*-------------------------------------------------------------------------
 * request.c
 *		Queue provider calls, wait for them, read their answers.
 *
 * Checks who asks and for whom; the queue's own rules are SQL (sql/50_request.sql).
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/detoast.h"
#include "access/htup_details.h"
#include "access/xact.h"
#include "base/argument.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/pg_version.h"
#include "base/redaction.h"
#include "base/secret.h"
#include "base/settings.h"
#include "base/uuid.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "gateway/worker_slot.h"
#include "identity/identity.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "utils/builtins.h"
#include "utils/jsonb.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"
#include "vault/api_key.h"
#include "vault/call_key.h"
#include "vault/key_shape.h"

PG_FUNCTION_INFO_V1(keyvault_request);
PG_FUNCTION_INFO_V1(keyvault_response);
PG_FUNCTION_INFO_V1(keyvault_wait_response);
PG_FUNCTION_INFO_V1(keyvault_call);
PG_FUNCTION_INFO_V1(keyvault_cancel_request);
PG_FUNCTION_INFO_V1(keyvault_wake_worker);
PG_FUNCTION_INFO_V1(keyvault_wake_worker_now);

/* Where request() and call() have their arguments: call() has response between body and path. */
typedef struct ArgumentOrder
{
	int			provider,
				body,
				path,
				model,
				user_id,
				payer,
				api_key,
				key_name,
				idempotency_key,
				timeout,
				metadata;
} ArgumentOrder;

static const ArgumentOrder request_order = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
static const ArgumentOrder call_order = {0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11};

/* An interval in whole milliseconds, between 1 and the limit. Error: 22023. */
static int
interval_ms(FunctionCallInfo fcinfo, int argument, int limit)
{
	Interval   *interval;
	double		ms;

	kv_argument_require(fcinfo, argument, "timeout");
	interval = PG_GETARG_INTERVAL_P(argument);
	ms = interval->time / 1000.0 + (interval->day + interval->month * (double) DAYS_PER_MONTH) * SECS_PER_DAY * 1000.0;
	if (ms < 1 || ms > limit)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("timeout must be between 1 ms and %d ms", limit),
				 errhint("The longest time that a call may take is keyvault.request_timeout.")));
	return (int) ms;
}

/* Error 54000 when a body is larger than keyvault.max_request_size. */
static void
require_body_size(Datum body)
{
	if (toast_raw_datum_size(body) > (Size) kv_max_request_size * 1024)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("body of the request is larger than keyvault.max_request_size"),
				 errhint("Send less, or raise the setting, now %d kB.", kv_max_request_size)));
}

/* Seal a key for one call after checking its shape. */
static Datum
seal_call_key(FunctionCallInfo fcinfo, const ArgumentOrder *order, const char *user_id, const pg_uuid_t *id)
{
	text	   *argument = PG_GETARG_TEXT_PP(order->api_key);
	Size		length = VARSIZE_ANY_EXHDR(argument);
	char	   *key = kv_secret_alloc(length + 1);
	char	   *provider = text_to_cstring(PG_GETARG_TEXT_PP(order->provider));

	memcpy(key, VARDATA_ANY(argument), length);
	key[length] = '\0';
	kv_api_key_require_provider(provider);
	kv_key_shape_check(key, length, provider);
	return PointerGetDatum(kv_call_key_seal(user_id, id, key));
}

/* Write a request and have the worker look at commit. Returns its id, of an earlier one with the same idempotency key. */
static pg_uuid_t *
enqueue(FunctionCallInfo fcinfo, const ArgumentOrder *order, char **user_id)
{
	static KvStatement insert = {
		"SELECT keyvault._enqueue_request($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)", 13,
		{TEXTOID, UUIDOID, TEXTOID, JSONBOID, TEXTOID, TEXTOID, TEXTOID, BYTEAOID, TEXTOID, TEXTOID, INT4OID, JSONBOID, BOOLOID}
	};
	const int	copied[] = {
		-1, -1, order->provider, order->body, order->path, order->model, order->payer, -1,
		order->key_name, order->idempotency_key, -1, order->metadata, -1,
	};
	pg_uuid_t  *id = kv_uuid_make();
	Datum		values[13] = {0};
	char		nulls[14] = "             ";
	bool		may_create = kv_identity_acts_for_any_user();
	KvOwnerScope scope;
	bool		isnull;
	Datum		enqueued;

	if (!PG_ARGISNULL(order->api_key))
		kv_redaction_mark_statement();
	kv_argument_require(fcinfo, order->provider, "provider");
	kv_argument_require(fcinfo, order->body, "body");
	require_body_size(PG_GETARG_DATUM(order->body));
	kv_argument_require(fcinfo, order->payer, "payer");
	kv_argument_require(fcinfo, order->key_name, "key_name");
	*user_id = kv_identity_resolve(fcinfo, order->user_id);
	for (size_t i = 0; i < lengthof(copied); i++)
		if (copied[i] >= 0)
		{
			values[i] = PG_GETARG_DATUM(copied[i]);
			if (PG_ARGISNULL(copied[i]))
				nulls[i] = 'n';
		}
	values[0] = CStringGetTextDatum(*user_id);
	values[1] = UUIDPGetDatum(id);
	values[10] = Int32GetDatum(interval_ms(fcinfo, order->timeout, kv_request_timeout));
	values[12] = BoolGetDatum(may_create);

	kv_owner_begin(&scope);
	if (PG_ARGISNULL(order->api_key))
		nulls[7] = 'n';
	else
		values[7] = seal_call_key(fcinfo, order, *user_id, id);
	enqueued = kv_statement_value(&insert, values, nulls, &isnull);
	memcpy(id, DatumGetUUIDP(enqueued), sizeof(*id));
	kv_owner_end(&scope);
	kv_worker_wake_at_commit();
	return id;
}

Datum
keyvault_request(PG_FUNCTION_ARGS)
{
	char	   *user_id;

	PG_RETURN_UUID_P(enqueue(fcinfo, &request_order, &user_id));
}

static KvStatement find_owner = {
	"SELECT user_id, xmin FROM keyvault.requests WHERE id = $1", 1, {UUIDOID}
};

/*
 * The user of a request, after a check that the caller may see it; written tells whether
 * this very transaction wrote it. Errors: 22023, 42501.
 */
static char *
user_of_request(const pg_uuid_t *id, bool *written)
{
	Datum		value = UUIDPGetDatum(id);
	char	   *user_id = NULL;
	KvOwnerScope scope;
	MemoryContext context = CurrentMemoryContext;
	bool		isnull;

	kv_owner_begin(&scope);
	if (kv_statement_read(&find_owner, &value, GetLatestSnapshot()) > 0)
	{
		MemoryContext old = MemoryContextSwitchTo(context);
		HeapTuple	row = SPI_tuptable->vals[0];
		TupleDesc	tupdesc = SPI_tuptable->tupdesc;

		user_id = TextDatumGetCString(SPI_getbinval(row, tupdesc, 1, &isnull));
		*written = TransactionIdIsCurrentTransactionId(DatumGetTransactionId(SPI_getbinval(row, tupdesc, 2, &isnull)));
		MemoryContextSwitchTo(old);
	}
	kv_owner_end(&scope);
	if (user_id == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("request %s does not exist", DatumGetCString(DirectFunctionCall1(uuid_out, value))),
				 errhint("Pass the id that keyvault.request() returned.")));
	kv_identity_require(user_id);
	return user_id;
}

static KvStatement find_response = {
	"SELECT * FROM keyvault.responses WHERE user_id = $1 AND id = $2", 2, {TEXTOID, UUIDOID}
};

/* Read the answer and its shape under the latest snapshot into the caller's memory; NULL when there is none yet. */
static HeapTuple
read_response(const char *user_id, const pg_uuid_t *id, TupleDesc *tupdesc)
{
	Datum		values[2] = {CStringGetTextDatum(user_id), UUIDPGetDatum(id)};
	MemoryContext context = CurrentMemoryContext;
	HeapTuple	row = NULL;
	KvOwnerScope scope;

	kv_owner_begin(&scope);
	if (kv_statement_read(&find_response, values, GetLatestSnapshot()) > 0)
	{
		MemoryContext old = MemoryContextSwitchTo(context);

		row = heap_copytuple(SPI_tuptable->vals[0]);
		*tupdesc = CreateTupleDescCopy(SPI_tuptable->tupdesc);
		MemoryContextSwitchTo(old);
	}
	kv_owner_end(&scope);
	return row;
}

/* Wait until the answer is there; NULL when the time is over. between_transactions: no snapshot is held meanwhile. */
static HeapTuple
await_response(const char *user_id, const pg_uuid_t *id, int timeout_ms, bool between_transactions, TupleDesc *tupdesc)
{
	TimestampTz deadline = GetCurrentTimestamp() + timeout_ms * INT64CONST(1000);
	HeapTuple	row;

	kv_worker_await_settlement_begin();
	for (;;)
	{
		long		left = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline);

		if (between_transactions)
			PushActiveSnapshot(GetTransactionSnapshot());
		row = read_response(user_id, id, tupdesc);
		if (between_transactions)
			PopActiveSnapshot();
		if (row != NULL || left <= 0)
			break;
		(void) kv_worker_await_settlement(left);
	}
	kv_worker_await_settlement_end();
	return row;
}

static void
return_response(FunctionCallInfo fcinfo, HeapTuple row)
{
	ReturnSetInfo *result;

	InitMaterializedSRF(fcinfo, 0);
	result = (ReturnSetInfo *) fcinfo->resultinfo;
	if (row != NULL)
		tuplestore_puttuple(result->setResult, row);
}

Datum
keyvault_response(PG_FUNCTION_ARGS)
{
	pg_uuid_t  *id = PG_GETARG_UUID_P(0);
	bool		written;
	char	   *user_id = user_of_request(id, &written);
	TupleDesc	tupdesc;

	return_response(fcinfo, read_response(user_id, id, &tupdesc));
	return (Datum) 0;
}

Datum
keyvault_wait_response(PG_FUNCTION_ARGS)
{
	pg_uuid_t  *id = PG_GETARG_UUID_P(0);
	int			timeout_ms = interval_ms(fcinfo, 1, INT_MAX);
	bool		written;
	char	   *user_id = user_of_request(id, &written);
	TupleDesc	tupdesc;

	if (written)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("request is not committed yet"),
				 errhint("COMMIT first: the worker sees the request then. CALL keyvault.call() does it all in one.")));
	return_response(fcinfo, await_response(user_id, id, timeout_ms, false, &tupdesc));
	return (Datum) 0;
}

/* The body of an answer; error KV008 for one that is not good. */
static Datum
body_of_response(HeapTuple row, TupleDesc tupdesc, bool *isnull)
{
	char	   *status;
	char	   *error;
	char	   *status_code;

	status = SPI_getvalue(row, tupdesc, SPI_fnumber(tupdesc, "status"));
	error = SPI_getvalue(row, tupdesc, SPI_fnumber(tupdesc, "error"));
	status_code = SPI_getvalue(row, tupdesc, SPI_fnumber(tupdesc, "status_code"));
	if (strcmp(status, "done") != 0)
		ereport(ERROR,
				(errcode(ERRCODE_KV_CALL_FAILED),
				 errmsg("provider call failed: %s", error ? error : status),
				 status_code ? errdetail("HTTP status %s.", status_code) : 0,
				 errhint("keyvault.responses holds the provider's own answer.")));
	return heap_getattr(row, SPI_fnumber(tupdesc, "body"), tupdesc, isnull);
}

Datum
keyvault_call(PG_FUNCTION_ARGS)
{
	bool		atomic = !(fcinfo->context && IsA(fcinfo->context, CallContext)) ||
		castNode(CallContext, fcinfo->context)->atomic;
	MemoryContext context = CurrentMemoryContext;
	int			timeout_ms = interval_ms(fcinfo, call_order.timeout, kv_request_timeout);
	TupleDesc	result_desc;
	TupleDesc	response_desc;
	char	   *user_id;
	pg_uuid_t  *id;
	HeapTuple	row;
	HeapTuple	result;
	Datum		value;
	bool		isnull;

	if (atomic)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
				 errmsg("keyvault.call() cannot run inside a transaction block"),
				 errhint("It commits before it waits. Inside a transaction use keyvault.request(), and wait after COMMIT.")));
	if (get_call_result_type(fcinfo, NULL, &result_desc) != TYPEFUNC_COMPOSITE)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("keyvault.call() has no result type")));

	if (SPI_connect_ext(SPI_OPT_NONATOMIC) != SPI_OK_CONNECT)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not connect to SPI")));
	id = enqueue(fcinfo, &call_order, &user_id);
	SPI_commit();
	row = await_response(user_id, id, timeout_ms, true, &response_desc);
	if (row == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_KV_CALL_FAILED),
				 errmsg("provider call did not end within %d ms", timeout_ms),
				 errdetail("Request %s goes on.", DatumGetCString(DirectFunctionCall1(uuid_out, UUIDPGetDatum(id)))),
				 errhint("Fetch the answer later with keyvault.wait_response().")));

	/* The body may be stored out of line, which takes a snapshot to read. */
	PushActiveSnapshot(GetTransactionSnapshot());
	value = body_of_response(row, response_desc, &isnull);
	MemoryContextSwitchTo(context);
	if (!isnull)
		value = JsonbPGetDatum(DatumGetJsonbPCopy(value));
	PopActiveSnapshot();
	result = heap_form_tuple(BlessTupleDesc(result_desc), &value, &isnull);
	SPI_finish();
	PG_RETURN_DATUM(HeapTupleGetDatum(result));
}

Datum
keyvault_cancel_request(PG_FUNCTION_ARGS)
{
	static KvStatement cancel = {"SELECT keyvault._cancel_request($1, $2)", 2, {TEXTOID, UUIDOID}};
	pg_uuid_t  *id = PG_GETARG_UUID_P(0);
	bool		written;
	char	   *user_id = user_of_request(id, &written);
	Datum		values[2] = {CStringGetTextDatum(user_id), UUIDPGetDatum(id)};
	KvOwnerScope scope;
	bool		isnull;
	bool		canceled;

	kv_owner_begin(&scope);
	canceled = DatumGetBool(kv_statement_value(&cancel, values, NULL, &isnull));
	kv_owner_end(&scope);
	kv_worker_announce_at_commit();
	PG_RETURN_BOOL(canceled);
}

Datum
keyvault_wake_worker(PG_FUNCTION_ARGS)
{
	kv_worker_wake_at_commit();
	PG_RETURN_VOID();
}

Datum
keyvault_wake_worker_now(PG_FUNCTION_ARGS)
{
	kv_worker_wake(MyDatabaseId);
	PG_RETURN_VOID();
}
