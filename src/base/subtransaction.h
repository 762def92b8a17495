/*-------------------------------------------------------------------------
 * subtransaction.h
 *		Work whose failure is not its caller's.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SUBTRANSACTION_H
#define KV_SUBTRANSACTION_H

#include "postgres.h"

extern ErrorData *kv_subtransaction_run(void (*work) (void *arg), void *arg);

#endif
