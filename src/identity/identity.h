/*-------------------------------------------------------------------------
 * identity.h
 *		The user that a transaction acts as, and who may act for whom.
 *-------------------------------------------------------------------------
 */
#ifndef KV_IDENTITY_H
#define KV_IDENTITY_H

#include "postgres.h"

#include "fmgr.h"

extern const char *kv_identity_current(void);
extern bool kv_identity_acts_for_any_user(void);
extern bool kv_identity_role_acts_for_any_user(Oid role);
extern bool kv_identity_is_admin(void);
extern char *kv_identity_check_user_id(text *user_id);
extern char *kv_identity_resolve(FunctionCallInfo fcinfo, int argument);
extern void kv_identity_require(const char *user_id);

#endif
