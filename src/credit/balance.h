/*-------------------------------------------------------------------------
 * balance.h
 *		The hot rows of a user's credits, changed without SQL.
 *-------------------------------------------------------------------------
 */
#ifndef KV_BALANCE_H
#define KV_BALANCE_H

#include "postgres.h"

typedef enum KvBalanceResult
{
	KV_BALANCE_UNDECIDED,		/* no row, no room, something due: what to do takes SQL */
	KV_BALANCE_DEBITED,
	KV_BALANCE_DEBITED_IN_TURN,	/* after another transaction that debited the same row */
} KvBalanceResult;

extern KvBalanceResult kv_balance_debit(const char *user_id, int64 micro_credits);
extern int64 kv_balance_usual_debit(int64 micro_credits);

#endif
