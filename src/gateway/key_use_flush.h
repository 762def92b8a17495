/*-------------------------------------------------------------------------
 * key_use_flush.h
 *		Has the uses of keys written to api_keys, in time and in batches.
 *-------------------------------------------------------------------------
 */
#ifndef KV_KEY_USE_FLUSH_H
#define KV_KEY_USE_FLUSH_H

#include "postgres.h"

#include "gateway/turn.h"

extern void kv_key_use_flush_init(void);
extern long kv_key_use_flush_serve(void);
extern void kv_key_use_flush_now(KvWorker *worker);
extern void kv_key_use_flush_if_due(KvWorker *worker);

#endif
