/*-------------------------------------------------------------------------
 * call.c
 *		Send a claimed request, and write what became of it.
 *
 * A settlement writes answer, usage, price, debit and hold at once, only for the attempt
 * that is under way: killed at any moment, a call is in the queue, or known to have been
 * sent, or settled; never two of them.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/call.h"

#include "base/catalogue.h"
#include "base/json_field.h"
#include "base/owner_spi.h"
#include "base/secret_text.h"
#include "base/secret.h"
#include "base/settings.h"
#include "catalog/pg_type.h"
#include "common/pg_prng.h"
#include "gateway/dialect.h"
#include "gateway/reference.h"
#include "utils/builtins.h"
#include "utils/json.h"
#include "utils/memutils.h"
#include "vault/key_shape.h"

/* Back-off of the first retry; it doubles with each further one. */
#define BACKOFF_MS		500
#define BACKOFF_MAX_MS	30000

/*
 * Give a call the key, in secret memory of its own, that it is to send. False, and that is the
 * call's problem, when the key would end its header and begin another.
 */
bool
kv_call_use_key(KvCall *call, char *key)
{
	const char *scheme = call->auth_scheme;
	Size		length = strlen(call->auth_header) + (scheme ? strlen(scheme) : 0) + strlen(key) + 4;
	char	   *header;

	if (!kv_key_shape_is_sendable(key))
	{
		call->problem = "KV009: the key has characters that no header may carry, or not the length of a key";
		call->key = NULL;
		call->result.refused = true;
		call->result.nothing_sent = true;
		return false;
	}
	header = kv_secret_alloc(length);
	snprintf(header, length, "%s: %s%s%s", call->auth_header, scheme ? scheme : "", scheme ? " " : "", key);
	call->key = key;
	call->headers[call->key_header] = header;
	return true;
}

/* A reference that leads nowhere: final, or worth another attempt. */
static void
fail_reference(KvCall *call, const char *reason, bool may_pass)
{
	call->result.refused = !may_pass;
	call->result.nothing_sent = true;
	call->result.retry_after_ms = -1;
	snprintf(call->result.error, sizeof(call->result.error), "the reference to its key cannot be resolved: the Vault server %s", reason);
}

/* Use what a call's reference stands for, if it can be a key of the provider's. */
static bool
use_referenced_key(KvCall *call, char *key)
{
	const char *problem;
	const char *reason;

	if (!kv_reference_check(key, call->provider, &problem, &reason))
	{
		fail_reference(call, reason, true);
		return false;
	}
	if (problem == NULL)
		return kv_call_use_key(call, key);
	kv_reference_forget(call->reference);
	call->problem = psprintf("KV009: what the reference to its key names is malformed for provider \"%s\": %s", call->provider, problem);
	call->result.refused = true;
	call->result.nothing_sent = true;
	return false;
}

/* Find or fetch the key of a call's reference; false when it cannot be had. */
static bool
start_resolving(KvCall *call, KvTransferPool *pool)
{
	const char *reason;
	char	   *key = kv_reference_known(call->reference);

	if (key)
	{
		call->key_was_known = true;
		return use_referenced_key(call, key);
	}
	call->resolving = kv_reference_ask(call->reference, pool, call, &reason);
	if (!call->resolving)
		fail_reference(call, reason, false);
	return call->resolving;
}

static bool
send_call(KvCall *call, KvTransferPool *pool)
{
	KvTransferRequest request = {
		.url = call->url,
		.allowed_host = call->allowed_host,
		.headers = (const char *const *) call->headers,
		.body = call->body,
		.timeout_ms = call->timeout_ms,
		.owner = call,
	};

	if (kv_transfer_start(pool, &request, call->result.error, sizeof(call->result.error)))
		return true;
	call->result.refused = true;
	call->result.nothing_sent = true;
	return false;
}

/*
 * Hand a committed claim to the network; when that is not possible, the call ends with its
 * problem. From here on it outlives the turn that claimed it.
 */
void
kv_call_start(KvCall *call, KvTransferPool *pool, bool *started)
{
	MemoryContext old = MemoryContextSwitchTo(call->context);

	MemoryContextSetParent(call->context, TopMemoryContext);
	if (call->problem)
	{
		call->result.refused = true;
		call->result.nothing_sent = true;
		*started = false;
	}
	else
		*started = (call->key || start_resolving(call, pool)) && (call->resolving || send_call(call, pool));
	MemoryContextSwitchTo(old);
}

/* Take what a transfer has brought; true when the call goes on with another, false when it has ended. */
bool
kv_call_go_on(KvCall *call, KvTransferPool *pool, const KvTransferResult *result)
{
	MemoryContext old;
	const char *reason;
	bool		may_pass;
	char	   *key;
	bool		goes_on = false;

	if (!call->resolving)
	{
		call->result = *result;
		return false;
	}
	old = MemoryContextSwitchTo(call->context);
	call->resolving = false;
	key = kv_reference_take(call->reference, result, &may_pass, &reason);
	if (key == NULL)
		fail_reference(call, reason, may_pass);
	kv_transfer_free(pool, result->transfer);
	if (key)
		goes_on = use_referenced_key(call, key) && send_call(call, pool);
	MemoryContextSwitchTo(old);
	return goes_on;
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
	if (call->problem_may_pass)
		return true;
	if (call->attempt >= kv_max_attempts || call->result.refused)
		return false;
	if (call->result.error[0])
		return call->result.nothing_sent;
	return status_may_pass(call->result.status_code);
}

/* A refused key that was fetched for an earlier call may have been replaced since, where it is kept. */
static bool
may_have_a_newer_key(const KvCall *call)
{
	return call->key_was_known && call->attempt < kv_max_attempts;
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

/*
 * Put back a call whose key could not be opened for now. That was no attempt, so that what it waits for may take its time;
 * it is looked at again when it has waited half as long again, after 0.5 to 30 seconds.
 */
static void
wait_for_key(KvCall *call)
{
	static KvStatement wait = {
		"UPDATE keyvault.requests SET status = 'queued', attempts = attempts - 1, error = $4,"
		" sent_at = CASE WHEN attempts > 1 THEN sent_at END, next_attempt_at = clock_timestamp()"
		" + least(greatest((clock_timestamp() - queued_at) / 2, '500 ms'), '30 s') * (0.75 + 0.5 * random())"
		" WHERE user_id = $1 AND id = $2 AND status = 'sent' AND attempts = $3", 4, {TEXTOID, UUIDOID, INT4OID, TEXTOID}
	};
	Datum		values[4] = {
		CStringGetTextDatum(call->user_id), UUIDPGetDatum(&call->id), Int32GetDatum(call->attempt),
		CStringGetTextDatum(call->problem),
	};

	kv_statement_execute(&wait, values, NULL);
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

	if (call->problem_may_pass)
		wait_for_key(call);
	else
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

/* Parse an answer, with every occurrence of the key overwritten: some providers quote it in their errors. */
static Jsonb *
parse_answer(char *body, Size length, const char *key)
{
	kv_secret_text_scrub_json(body, length, key);
	return kv_json_parse(body, length);
}

/* Write what became of a test of a key. */
static void
settle_key_test(const KvCall *call, const char *failure, Jsonb *answer, bool key_refused)
{
	static KvStatement settle = {
		"SELECT keyvault._settle_key_test($1, $2, $3, $4, $5, $6, $7, $8)", 8,
		{TEXTOID, UUIDOID, INT4OID, TEXTOID, INT4OID, JSONBOID, TEXTOID, BOOLOID}
	};
	long		status_code = call->result.status_code;
	Datum		values[8] = {
		CStringGetTextDatum(call->user_id), UUIDPGetDatum(&call->id), Int32GetDatum(call->attempt),
		CStringGetTextDatum(outcome_of(call, failure != NULL)), Int32GetDatum((int32) status_code),
		answer ? JsonbPGetDatum(answer) : (Datum) 0, failure ? CStringGetTextDatum(failure) : (Datum) 0,
		BoolGetDatum(key_refused),
	};
	char		nulls[9] = "        ";

	nulls[4] = status_code ? ' ' : 'n';
	nulls[5] = answer ? ' ' : 'n';
	nulls[6] = failure ? ' ' : 'n';
	kv_statement_execute(&settle, values, nulls);
}

/*
 * Write what became of a call: the answer with all that goes with it, or a retry. Runs
 * in the caller's transaction.
 */
void
kv_call_settle(KvCall *call)
{
	static KvStatement settle = {
		"SELECT keyvault._settle_request($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)", 14,
		{TEXTOID, UUIDOID, INT4OID, TEXTOID, INT4OID, JSONBOID, TEXTOID, TEXTOID, INT8OID, INT8OID, INT8OID, NUMERICOID, BOOLOID, INT8OID}
	};
	/* The SQL of version 0.1.0 has no reasoning tokens. */
	static KvStatement settle_without_reasoning = {
		"SELECT keyvault._settle_request($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)", 13,
		{TEXTOID, UUIDOID, INT4OID, TEXTOID, INT4OID, JSONBOID, TEXTOID, TEXTOID, INT8OID, INT8OID, INT8OID, NUMERICOID, BOOLOID}
	};
	KvTransferResult *result = &call->result;
	KvUsage		usage = {0};
	Jsonb	   *answer = NULL;
	char	   *failure;
	bool		key_refused;
	KvOwnerScope scope;
	Datum		values[14];
	char		nulls[15] = "              ";

	if (result->body && result->length > 0 && result->error[0] == '\0')
		answer = parse_answer(result->body, result->length, call->key);
	if (answer)
		kv_dialect_read_usage(call->dialect, answer, &usage);
	failure = describe_failure(call, answer != NULL);
	key_refused = call->dialect && kv_dialect_key_refused(call->dialect, result->status_code, answer);
	if (key_refused && call->reference)
		kv_reference_forget(call->reference);

	kv_owner_begin(&scope);
	if (failure && (is_worth_a_retry(call) || (key_refused && may_have_a_newer_key(call))))
	{
		retry(call, failure);
		kv_owner_end(&scope);
		return;
	}
	if (call->is_key_test)
	{
		settle_key_test(call, failure, answer, key_refused);
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
	values[12] = BoolGetDatum(key_refused);
	values[13] = Int64GetDatum(usage.reasoning_tokens);
	nulls[13] = nulls[10];
	kv_statement_execute(kv_function_exists("_settle_request", settle.nargs, settle.argtypes) ? &settle : &settle_without_reasoning,
						 values, nulls);
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

/* Free a call and all that it holds. */
void
kv_call_free(KvCall *call, KvTransferPool *pool)
{
	if (call->result.transfer)
		kv_transfer_free(pool, call->result.transfer);
	MemoryContextDelete(call->context);
}
