/*-------------------------------------------------------------------------
 * api_key.h
 *		Keeps users' provider keys: checked, sealed, stored, deleted.
 *-------------------------------------------------------------------------
 */
#ifndef KV_API_KEY_H
#define KV_API_KEY_H

#include "postgres.h"

#include "fmgr.h"
#include "vault/key_row.h"

extern bool kv_api_key_keep(const KvNewKey *key, pg_uuid_t *id);
extern void kv_api_key_require_provider(const char *provider);
extern char *kv_api_key_name(FunctionCallInfo fcinfo, int argument);
extern void kv_api_key_set_end(KvNewKey *key, FunctionCallInfo fcinfo, int argument);

#endif
