/*-------------------------------------------------------------------------
 * turn.h
 *		The worker's database work: settle what has ended, claim what may start.
 *-------------------------------------------------------------------------
 */
#ifndef KV_TURN_H
#define KV_TURN_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "gateway/transfer.h"
#include "nodes/pg_list.h"
#include "storage/latch.h"

/* The state of this process; everything in it lives in context. */
typedef struct KvWorker
{
	MemoryContext context;
	MemoryContext turn_context; /* reset after each turn */
	KvTransferPool *pool;
	WaitEventSet *events;
	int			in_flight;
	List	   *ended;			/* calls to settle */
	char	   *after_user;		/* the user who was served last */
	uint64		wakeups;		/* how many are accounted for */
	bool		look;			/* the queue may have something for us */
	TimestampTz next_retry;		/* when a queued request becomes due */
	TimestampTz idle_since;
	uint64		key_use_round;	/* the last one in which we flushed */
	TimestampTz boxes_due;		/* when to open sealed keys */
	TimestampTz boxes_again;	/* when to go through those as well that an error kept from it */
	bool		boxes_failed;	/* has the pass over them met any that still fail? */
} KvWorker;

extern void kv_turn_begin(const char *activity);
extern void kv_turn_end(void);
extern int	kv_turn_roll_back(MemoryContext context, char **message);
extern bool kv_turn_error_may_pass(int code);
extern void kv_turn_take(KvWorker *worker);

#endif
