/*-------------------------------------------------------------------------
 * user.c
 *		Users and their plans: checks the caller, the rest is SQL (sql/20_user.sql).
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "identity/user.h"

#include "access/xact.h"
#include "base/argument.h"
#include "base/error.h"
#include "base/index_scan.h"
#include "base/owner_spi.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(keyvault_upsert_user);
PG_FUNCTION_INFO_V1(keyvault_set_plan);
PG_FUNCTION_INFO_V1(keyvault_suspend_user);
PG_FUNCTION_INFO_V1(keyvault_resume_user);
PG_FUNCTION_INFO_V1(keyvault_erase_user);

/* Column of keyvault.users. */
#define USERS_STATUS	8

static void
raise_inactive(const char *user_id, const char *status)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_USER_INACTIVE),
			 errmsg("user \"%s\" is %s", user_id, status),
			 strcmp(status, "suspended") == 0 ? errhint("keyvault.resume_user() ends a suspension.")
			 : errhint("What was erased does not come back; a new user needs another user_id.")));
}

/* Error KV007 when a user is suspended or erased. One who does not exist passes. */
void
kv_user_require_active(const char *user_id)
{
	static KvIndex users = {{"users"}, {"users_pkey"}, 1, {TEXTOID}};
	KvIndexScan scan;
	Datum		key = CStringGetTextDatum(user_id);
	char	   *status = NULL;
	bool		isnull;

	kv_index_scan_begin(&scan, &users, &key);
	if (kv_index_scan_next(&scan, ForwardScanDirection))
		status = TextDatumGetCString(kv_index_scan_value(&scan, USERS_STATUS, &isnull));
	kv_index_scan_end(&scan);
	if (status && strcmp(status, "active") != 0)
		raise_inactive(user_id, status);
}

/*
 * Keep a user's status as it is until the transaction ends, so that nothing is sealed behind
 * an erasure. Call between kv_owner_begin and kv_owner_end, before other rows of the user's
 * are locked. Error: KV007 unless the user is active, if asked for.
 */
void
kv_user_lock(const char *user_id, bool require_active)
{
	static KvStatement lock = {"SELECT status FROM keyvault.users WHERE user_id = $1 FOR SHARE", 1, {TEXTOID}};
	Datum		value = CStringGetTextDatum(user_id);
	bool		isnull;
	Datum		status = kv_statement_value(&lock, &value, NULL, &isnull);

	if (require_active && !isnull && strcmp(TextDatumGetCString(status), "active") != 0)
		raise_inactive(user_id, TextDatumGetCString(status));
}

static void
require_account_rights(void)
{
	if (!kv_identity_acts_for_any_user() && !kv_identity_is_admin())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to change users"),
				 errhint("keyvault.grant_access(role, 'app') or (role, 'admin') gives that right.")));
}

Datum
keyvault_upsert_user(PG_FUNCTION_ARGS)
{
	static KvStatement upsert = {
		"SELECT keyvault._upsert_user($1, $2, $3, $4, $5)", 5, {TEXTOID, TEXTOID, TEXTOID, TEXTOID, TEXTOID}
	};
	Datum		values[5];
	char		nulls[6] = "     ";
	KvOwnerScope scope;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("user_id must not be null"),
				 errhint("Pass the application's own name for the user.")));
	(void) kv_identity_check_user_id(PG_GETARG_TEXT_PP(0));
	require_account_rights();
	for (int i = 0; i < 5; i++)
	{
		values[i] = PG_GETARG_DATUM(i);
		if (PG_ARGISNULL(i))
			nulls[i] = 'n';
	}
	kv_owner_begin(&scope);
	kv_statement_execute(&upsert, values, nulls);
	kv_owner_end(&scope);
	PG_RETURN_DATUM(PG_GETARG_DATUM(0));
}

Datum
keyvault_set_plan(PG_FUNCTION_ARGS)
{
	static KvStatement set_plan = {"SELECT keyvault._set_plan($1, $2, $3)", 3, {TEXTOID, TEXTOID, NUMERICOID}};
	/* The SQL of version 0.1.0 has no credits of a user's own. */
	static KvStatement set_plan_alone = {"SELECT keyvault._set_plan($1, $2)", 2, {TEXTOID, TEXTOID}};
	bool		is_alone = PG_NARGS() == 2;
	Datum		values[3];
	KvOwnerScope scope;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("user_id and plan must not be null"),
				 errhint("Pass the user and the name of a plan in keyvault.plans.")));
	(void) kv_identity_check_user_id(PG_GETARG_TEXT_PP(0));
	require_account_rights();
	for (int i = 0; i < PG_NARGS(); i++)
		values[i] = PG_ARGISNULL(i) ? (Datum) 0 : PG_GETARG_DATUM(i);
	kv_owner_begin(&scope);
	kv_statement_execute(is_alone ? &set_plan_alone : &set_plan, values, !is_alone && PG_ARGISNULL(2) ? "  n" : NULL);
	kv_owner_end(&scope);
	PG_RETURN_VOID();
}

/* Run a statement about a user and a text, NULL or not, for a caller who may change users. */
static void
change_user(FunctionCallInfo fcinfo, KvStatement *change)
{
	Datum		values[2] = {PG_GETARG_DATUM(0)};
	char		nulls[3] = "  ";
	KvOwnerScope scope;

	kv_argument_require(fcinfo, 0, "user_id");
	(void) kv_identity_check_user_id(PG_GETARG_TEXT_PP(0));
	require_account_rights();
	if (PG_NARGS() > 1 && !PG_ARGISNULL(1))
		values[1] = PG_GETARG_DATUM(1);
	else
		nulls[1] = 'n';
	kv_owner_begin(&scope);
	kv_statement_execute(change, values, nulls);
	kv_owner_end(&scope);
}

Datum
keyvault_suspend_user(PG_FUNCTION_ARGS)
{
	static KvStatement suspend = {"SELECT keyvault._set_user_status($1, 'suspended', $2)", 2, {TEXTOID, TEXTOID}};

	change_user(fcinfo, &suspend);
	PG_RETURN_VOID();
}

Datum
keyvault_resume_user(PG_FUNCTION_ARGS)
{
	static KvStatement resume = {"SELECT keyvault._set_user_status($1, 'active', $2)", 2, {TEXTOID, TEXTOID}};

	change_user(fcinfo, &resume);
	PG_RETURN_VOID();
}

Datum
keyvault_erase_user(PG_FUNCTION_ARGS)
{
	static KvStatement erase = {"SELECT keyvault._erase_user($1, $2)", 2, {TEXTOID, TEXTOID}};

	/* An old snapshot does not see what others have stored since. */
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_STATE),
				 errmsg("users are erased at isolation level read committed only"),
				 errhint("Begin the transaction at that level.")));
	change_user(fcinfo, &erase);
	PG_RETURN_VOID();
}
