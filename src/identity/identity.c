/*-------------------------------------------------------------------------
 * identity.c
 *		The user that a transaction acts as, and who may act for whom.
 *
 * The identity is the setting keyvault.user_id. It is set with SET LOCAL's own means, so
 * that it ends with the transaction or savepoint that set it. SET privilege on the
 * setting is the right to act for any user, and the only source of that right.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "identity/identity.h"

#include "base/error.h"
#include "base/pg_version.h"
#include "base/settings.h"
#include "catalog/namespace.h"
#include "catalog/pg_parameter_acl.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "nodes/value.h"
#include "parser/parse_func.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"

PG_FUNCTION_INFO_V1(keyvault_current_user_id);
PG_FUNCTION_INFO_V1(keyvault_act_as);

/* The user_id this transaction acts as, or NULL. */
const char *
kv_identity_current(void)
{
	return kv_user_id && kv_user_id[0] ? kv_user_id : NULL;
}

/* May a role act for any user? */
bool
kv_identity_role_acts_for_any_user(Oid role)
{
	return superuser_arg(role) ||
		pg_parameter_aclcheck("keyvault.user_id", role, ACL_SET) == ACLCHECK_OK;
}

/* May the current role act for any user? */
bool
kv_identity_acts_for_any_user(void)
{
	return kv_identity_role_acts_for_any_user(GetUserId());
}

/* Has the current role access admin? */
bool
kv_identity_is_admin(void)
{
	List	   *name = list_make2(makeString("keyvault"), makeString("_admin"));
	Oid			marker = LookupFuncName(name, 0, NULL, true);

	return OidIsValid(marker) &&
		DatumGetBool(DirectFunctionCall2(has_function_privilege_id, ObjectIdGetDatum(marker),
										 CStringGetTextDatum("EXECUTE")));
}

/* A user_id argument as a C string. Error: 22023 when it is empty or too long. */
char *
kv_identity_check_user_id(text *user_id)
{
	Size		length = VARSIZE_ANY_EXHDR(user_id);

	if (length == 0 || length > KV_USER_ID_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("user_id must be 1 to %d bytes long", KV_USER_ID_MAX),
				 errhint("Pass the application's own name for the user.")));
	return text_to_cstring(user_id);
}

/* Error 42501 unless the caller is the user, or may act for any. */
void
kv_identity_require(const char *user_id)
{
	const char *current = kv_identity_current();

	if ((current && strcmp(current, user_id) == 0) || kv_identity_acts_for_any_user())
		return;
	ereport(ERROR,
			(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
			 errmsg("not allowed to act for another user"),
			 current ? errdetail("This transaction acts as user \"%s\".", current)
			 : errdetail("This transaction acts as no user."),
			 errhint("A trusted application is given that right by keyvault.grant_access(role, 'app').")));
}

/*
 * The user that a function's user_id argument means: NULL is the identity. Errors: 42501
 * when the caller may not act for it or there is no identity, 22023 for a bad user_id.
 */
char *
kv_identity_resolve(FunctionCallInfo fcinfo, int argument)
{
	const char *current = kv_identity_current();
	char	   *user_id;

	if (!PG_ARGISNULL(argument))
	{
		user_id = kv_identity_check_user_id(PG_GETARG_TEXT_PP(argument));
		kv_identity_require(user_id);
		return user_id;
	}
	if (current == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("this transaction acts as no user"),
				 errhint("Pass user_id, or call keyvault.act_as() first in the same transaction.")));
	return pstrdup(current);
}

Datum
keyvault_current_user_id(PG_FUNCTION_ARGS)
{
	const char *current = kv_identity_current();

	if (current == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(current));
}

Datum
keyvault_act_as(PG_FUNCTION_ARGS)
{
	char	   *user_id = PG_ARGISNULL(0) ? "" : kv_identity_check_user_id(PG_GETARG_TEXT_PP(0));

	if (!kv_identity_acts_for_any_user())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to act for another user"),
				 errhint("A trusted application is given that right by keyvault.grant_access(role, 'app').")));
	(void) set_config_option("keyvault.user_id", user_id, PGC_SUSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	if (PG_ARGISNULL(0))
		PG_RETURN_NULL();
	PG_RETURN_DATUM(PG_GETARG_DATUM(0));
}
