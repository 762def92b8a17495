/*-------------------------------------------------------------------------
 * credit.c
 *		Credits by function: record, reserve, settle, grant, refund, budgets, resets.
 *
 * Each function decides whether its caller may, and for which user; the rest is SQL, run
 * as the extension's owner (sql/25_credit.sql to sql/28_budget.sql, sql/41_price.sql).
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/error.h"
#include "base/owner_spi.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "utils/builtins.h"
#include "utils/uuid.h"

PG_FUNCTION_INFO_V1(keyvault_record_usage);
PG_FUNCTION_INFO_V1(keyvault_reserve_credits);
PG_FUNCTION_INFO_V1(keyvault_settle_credits);
PG_FUNCTION_INFO_V1(keyvault_release_credits);
PG_FUNCTION_INFO_V1(keyvault_grant_credits);
PG_FUNCTION_INFO_V1(keyvault_refund_usage);
PG_FUNCTION_INFO_V1(keyvault_set_budget);
PG_FUNCTION_INFO_V1(keyvault_reset_due_credits);

/* Arguments of a statement, taken from those of a call. */
typedef struct Arguments
{
	int			count;
	Datum		values[KV_STATEMENT_MAX_ARGS];
	char		nulls[KV_STATEMENT_MAX_ARGS + 1];
} Arguments;

static void
add_value(Arguments *arguments, Datum value, bool isnull)
{
	arguments->values[arguments->count] = value;
	arguments->nulls[arguments->count++] = isnull ? 'n' : ' ';
}

static void
add_user(Arguments *arguments, const char *user_id)
{
	add_value(arguments, CStringGetTextDatum(user_id), false);
}

/* Add arguments first to last of the call. */
static void
add_call(Arguments *arguments, FunctionCallInfo fcinfo, int first, int last)
{
	for (int i = first; i <= last; i++)
		add_value(arguments, PG_ARGISNULL(i) ? (Datum) 0 : PG_GETARG_DATUM(i), PG_ARGISNULL(i));
}

/* Run the statement as the owner; its value, a uuid if by_reference, goes into the caller's memory. */
static Datum
run(KvStatement *statement, Arguments *arguments, bool by_reference, bool *isnull)
{
	KvOwnerScope scope;
	Datum		value;

	kv_owner_begin(&scope);
	value = kv_statement_value(statement, arguments->values, arguments->nulls, isnull);
	if (!*isnull && by_reference)
		value = SPI_datumTransfer(value, false, UUID_LEN);
	kv_owner_end(&scope);
	return value;
}

/* Run the statement and return what it does. */
static Datum
run_and_return(FunctionCallInfo fcinfo, KvStatement *statement, Arguments *arguments, bool by_reference)
{
	Datum		value = run(statement, arguments, by_reference, &fcinfo->isnull);

	return fcinfo->isnull ? (Datum) 0 : value;
}

static void
require_argument(FunctionCallInfo fcinfo, int argument, const char *name)
{
	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null", name),
				 errhint("See the function's entry in doc/keyvault.md.")));
}

/* The user that an administrator's or a trusted application's call names. Errors: 22004, 22023, 42501. */
static char *
account_argument(FunctionCallInfo fcinfo, int argument)
{
	require_argument(fcinfo, argument, "user_id");
	if (!kv_identity_acts_for_any_user() && !kv_identity_is_admin())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to change users' credits"),
				 errhint("keyvault.grant_access(role, 'app') or (role, 'admin') gives that right.")));
	return kv_identity_check_user_id(PG_GETARG_TEXT_PP(argument));
}

/* The user of a call whose user_id may be left out; an administrator may name any. */
static char *
account_or_identity(FunctionCallInfo fcinfo, int argument)
{
	if (!PG_ARGISNULL(argument) && kv_identity_is_admin())
		return kv_identity_check_user_id(PG_GETARG_TEXT_PP(argument));
	return kv_identity_resolve(fcinfo, argument);
}

Datum
keyvault_record_usage(PG_FUNCTION_ARGS)
{
	static KvStatement record = {
		"SELECT keyvault._record_usage($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)", 16,
		{TEXTOID, TEXTOID, INT4OID, INT4OID, NUMERICOID, TEXTOID, TEXTOID, JSONBOID, TEXTOID, INT8OID, INT8OID, NUMERICOID,
		TEXTOID, NUMERICOID, UUIDOID, TEXTOID}
	};
	Arguments	arguments = {0};

	add_call(&arguments, fcinfo, 0, 4);
	add_user(&arguments, kv_identity_resolve(fcinfo, 5));
	add_call(&arguments, fcinfo, 6, 15);
	return run_and_return(fcinfo, &record, &arguments, true);
}

Datum
keyvault_reserve_credits(PG_FUNCTION_ARGS)
{
	static KvStatement reserve = {
		"SELECT keyvault._reserve_credits($1, $2, $3, $4, $5, $6, $7, $8)", 8,
		{TEXTOID, NUMERICOID, INTERVALOID, TEXTOID, NUMERICOID, UUIDOID, TEXTOID, BOOLOID}
	};
	Arguments	arguments = {0};

	add_user(&arguments, kv_identity_resolve(fcinfo, 2));
	add_call(&arguments, fcinfo, 0, 1);
	add_call(&arguments, fcinfo, 3, 6);
	add_value(&arguments, BoolGetDatum(kv_identity_acts_for_any_user()), false);
	return run_and_return(fcinfo, &reserve, &arguments, true);
}

/* The user of a hold that the caller may act for: the one named, else whose it is; NULL for no such hold. */
static char *
hold_user(FunctionCallInfo fcinfo, int hold_argument, int user_argument)
{
	static KvStatement find = {"SELECT keyvault._hold_user($1)", 1, {UUIDOID}};
	KvOwnerScope scope;
	Datum		value;
	bool		isnull;
	char	   *user_id = NULL;
	MemoryContext context = CurrentMemoryContext;

	require_argument(fcinfo, hold_argument, "hold");
	if (!PG_ARGISNULL(user_argument))
		return kv_identity_resolve(fcinfo, user_argument);
	kv_owner_begin(&scope);
	value = kv_statement_value(&find, &PG_GETARG_DATUM(hold_argument), NULL, &isnull);
	if (!isnull)
		user_id = MemoryContextStrdup(context, TextDatumGetCString(value));
	kv_owner_end(&scope);
	if (user_id == NULL && kv_identity_current() != NULL)
		user_id = pstrdup(kv_identity_current());
	if (user_id != NULL)
		kv_identity_require(user_id);
	return user_id;
}

Datum
keyvault_settle_credits(PG_FUNCTION_ARGS)
{
	static KvStatement settle = {
		"SELECT keyvault._settle_credits($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)", 11,
		{TEXTOID, UUIDOID, NUMERICOID, TEXTOID, TEXTOID, INT4OID, INT4OID, JSONBOID, TEXTOID, INT8OID, NUMERICOID}
	};
	Arguments	arguments = {0};
	char	   *user_id = hold_user(fcinfo, 0, 6);

	if (user_id == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("there is no such hold"),
				 errhint("It was settled or released. To settle again without an error, pass user_id.")));
	add_user(&arguments, user_id);
	add_call(&arguments, fcinfo, 0, 5);
	add_call(&arguments, fcinfo, 7, 10);
	return run_and_return(fcinfo, &settle, &arguments, true);
}

Datum
keyvault_release_credits(PG_FUNCTION_ARGS)
{
	static KvStatement release = {"SELECT keyvault._release_hold($1, $2)", 2, {TEXTOID, UUIDOID}};
	Arguments	arguments = {0};
	char	   *user_id = hold_user(fcinfo, 0, 1);

	if (user_id == NULL)
		PG_RETURN_BOOL(false);
	add_user(&arguments, user_id);
	add_call(&arguments, fcinfo, 0, 0);
	return run_and_return(fcinfo, &release, &arguments, false);
}

Datum
keyvault_grant_credits(PG_FUNCTION_ARGS)
{
	static KvStatement grant = {
		"SELECT keyvault._grant_credits($1, $2, $3, $4, $5, $6, $7)", 7,
		{TEXTOID, NUMERICOID, TEXTOID, TIMESTAMPTZOID, TEXTOID, NUMERICOID, BOOLOID}
	};
	Arguments	arguments = {0};

	add_user(&arguments, account_argument(fcinfo, 0));
	add_call(&arguments, fcinfo, 1, 5);
	add_value(&arguments, BoolGetDatum(kv_identity_acts_for_any_user()), false);
	return run_and_return(fcinfo, &grant, &arguments, true);
}

Datum
keyvault_refund_usage(PG_FUNCTION_ARGS)
{
	static KvStatement refund = {"SELECT keyvault._refund_usage($1, $2, $3)", 3, {TEXTOID, UUIDOID, TEXTOID}};
	Arguments	arguments = {0};

	require_argument(fcinfo, 0, "id");
	add_user(&arguments, account_or_identity(fcinfo, 2));
	add_call(&arguments, fcinfo, 0, 1);
	return run_and_return(fcinfo, &refund, &arguments, true);
}

Datum
keyvault_set_budget(PG_FUNCTION_ARGS)
{
	static KvStatement set_budget = {
		"SELECT keyvault._set_budget($1, $2, $3, $4, $5, $6, $7)", 7,
		{TEXTOID, NUMERICOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, BOOLOID}
	};
	Arguments	arguments = {0};

	add_user(&arguments, account_argument(fcinfo, 0));
	add_call(&arguments, fcinfo, 1, 5);
	add_value(&arguments, BoolGetDatum(kv_identity_acts_for_any_user()), false);
	return run_and_return(fcinfo, &set_budget, &arguments, true);
}

Datum
keyvault_reset_due_credits(PG_FUNCTION_ARGS)
{
	static KvStatement reset = {"SELECT keyvault._reset_due_credits($1)", 1, {INT4OID}};
	Arguments	arguments = {0};

	if (!kv_identity_is_admin())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to reset credits"),
				 errhint("keyvault.grant_access(role, 'admin') gives that right.")));
	add_call(&arguments, fcinfo, 0, 0);
	return run_and_return(fcinfo, &reset, &arguments, false);
}
