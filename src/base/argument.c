/*-------------------------------------------------------------------------
 * argument.c
 *		Arguments of SQL-callable functions.
 *
 * A function whose arguments have defaults cannot be STRICT: it asks here for those that
 * must have a value.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/argument.h"

#include "base/error.h"
#include "base/pg_version.h"
#include "base/secret.h"
#include "utils/builtins.h"

/* Error 22004 when an argument is NULL. */
void
kv_argument_require(FunctionCallInfo fcinfo, int argument, const char *name)
{
	if (PG_ARGISNULL(argument))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("%s must not be null", name),
				 errhint("Pass a value, or leave the argument out if it has a default.")));
}

/* A text argument as a C string. Error: 22004 when it is NULL. */
char *
kv_argument_text(FunctionCallInfo fcinfo, int argument, const char *name)
{
	kv_argument_require(fcinfo, argument, name);
	return text_to_cstring(PG_GETARG_TEXT_PP(argument));
}

/* A text argument that is not NULL as a C string in secret memory. */
char *
kv_argument_secret(FunctionCallInfo fcinfo, int argument)
{
	text	   *value = PG_GETARG_TEXT_PP(argument);
	Size		length = VARSIZE_ANY_EXHDR(value);
	char	   *secret = kv_secret_alloc(length + 1);

	memcpy(secret, VARDATA_ANY(value), length);
	secret[length] = '\0';
	return secret;
}
