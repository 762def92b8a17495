/*-------------------------------------------------------------------------
 * call_key.h
 *		A key that is used for one call and not kept.
 *-------------------------------------------------------------------------
 */
#ifndef KV_CALL_KEY_H
#define KV_CALL_KEY_H

#include "postgres.h"

#include "utils/uuid.h"

extern Size kv_call_key_shmem_size(void);
extern void kv_call_key_shmem_init(void *memory, bool found);
extern bytea *kv_call_key_seal(const char *user_id, const pg_uuid_t *request_id, const char *key);
extern char *kv_call_key_open(const char *user_id, const pg_uuid_t *request_id, const bytea *sealed);

#endif
