/*-------------------------------------------------------------------------
 * redaction.h
 *		Keeps secrets out of the server log.
 *-------------------------------------------------------------------------
 */
#ifndef KV_REDACTION_H
#define KV_REDACTION_H

#include "postgres.h"

extern void kv_redaction_init(void);
extern Size kv_redaction_shmem_size(void);
extern void kv_redaction_shmem_init(void *memory, bool found);
extern void kv_redaction_mark_statement(void);

#endif
