/*-------------------------------------------------------------------------
 * argument.h
 *		Arguments of SQL-callable functions.
 *-------------------------------------------------------------------------
 */
#ifndef KV_ARGUMENT_H
#define KV_ARGUMENT_H

#include "postgres.h"

#include "fmgr.h"

extern void kv_argument_require(FunctionCallInfo fcinfo, int argument, const char *name);
extern char *kv_argument_text(FunctionCallInfo fcinfo, int argument, const char *name);
extern char *kv_argument_secret(FunctionCallInfo fcinfo, int argument);

#endif
