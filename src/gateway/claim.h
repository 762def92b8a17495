/*-------------------------------------------------------------------------
 * claim.h
 *		Take requests from the queue.
 *-------------------------------------------------------------------------
 */
#ifndef KV_CLAIM_H
#define KV_CLAIM_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "nodes/pg_list.h"

extern List *kv_claim_requests(int capacity, int reserve, int per_user, const char *after_user);
extern List *kv_claim_lost_calls(void);
extern TimestampTz kv_claim_next_retry(void);

#endif
