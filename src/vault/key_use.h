/*-------------------------------------------------------------------------
 * key_use.h
 *		When and how often keys are used, without a write per use.
 *-------------------------------------------------------------------------
 */
#ifndef KV_KEY_USE_H
#define KV_KEY_USE_H

#include "postgres.h"

#include "utils/uuid.h"

extern void kv_key_use_init(void);
extern Size kv_key_use_shmem_size(void);
extern void kv_key_use_shmem_init(void *memory, bool found);

extern void kv_key_use_note(const char *user_id, const pg_uuid_t *id);
extern int64 kv_key_use_flush(void);

/* for those who see to it that notes are flushed */
extern void kv_key_use_on_pending(void (*callback) (void));
extern bool kv_key_use_is_pending(bool *urgent);
extern int	kv_key_use_begin_round(Oid *databases, int max);
extern uint64 kv_key_use_round(void);
extern void kv_key_use_forget_database(Oid database);

#endif
