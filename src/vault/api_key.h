/*-------------------------------------------------------------------------
 * api_key.h
 *		Keeps users' provider keys: checked, sealed, stored, deleted.
 *-------------------------------------------------------------------------
 */
#ifndef KV_API_KEY_H
#define KV_API_KEY_H

#include "postgres.h"

/* What a provider key's record is bound to, besides user, row and provider. */
#define KV_API_KEY_PURPOSE	"api_key"

extern void kv_api_key_require_provider(const char *provider);
extern void kv_api_key_check_shape(const char *key, const char *provider);

#endif
