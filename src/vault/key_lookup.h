/*-------------------------------------------------------------------------
 * key_lookup.h
 *		Opens users' provider keys for their owner and for the worker.
 *-------------------------------------------------------------------------
 */
#ifndef KV_KEY_LOOKUP_H
#define KV_KEY_LOOKUP_H

#include "postgres.h"

#include "utils/uuid.h"

extern char *kv_key_lookup_by_id(const char *user_id, const pg_uuid_t *id, bool *names_reference);

#endif
