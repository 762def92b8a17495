/*-------------------------------------------------------------------------
 * user.h
 *		Users: whether they may act.
 *-------------------------------------------------------------------------
 */
#ifndef KV_USER_H
#define KV_USER_H

#include "postgres.h"

extern void kv_user_require_active(const char *user_id);
extern void kv_user_lock(const char *user_id, bool require_active);

#endif
