/*-------------------------------------------------------------------------
 * user.c
 *		Users and their plans: checks the caller, the rest is SQL (sql/20_user.sql).
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/error.h"
#include "base/owner_spi.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(keyvault_upsert_user);
PG_FUNCTION_INFO_V1(keyvault_set_plan);

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
	Datum		values[3];
	KvOwnerScope scope;

	if (PG_ARGISNULL(0) || PG_ARGISNULL(1))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("user_id and plan must not be null"),
				 errhint("Pass the user and the name of a plan in keyvault.plans.")));
	(void) kv_identity_check_user_id(PG_GETARG_TEXT_PP(0));
	require_account_rights();
	for (int i = 0; i < 3; i++)
		values[i] = PG_ARGISNULL(i) ? (Datum) 0 : PG_GETARG_DATUM(i);
	kv_owner_begin(&scope);
	kv_statement_execute(&set_plan, values, PG_ARGISNULL(2) ? "  n" : NULL);
	kv_owner_end(&scope);
	PG_RETURN_VOID();
}
