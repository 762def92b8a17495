/*-------------------------------------------------------------------------
 * api_key.h
 *		Users' provider keys.
 *-------------------------------------------------------------------------
 */
#ifndef KV_API_KEY_H
#define KV_API_KEY_H

#include "postgres.h"

#include "utils/uuid.h"

extern void kv_api_key_check_shape(const char *key, const char *provider);
extern char *kv_api_key_open(const char *user_id, const pg_uuid_t *id);

#endif
