/*-------------------------------------------------------------------------
 * call.h
 *		One provider call, from claim to settlement.
 *-------------------------------------------------------------------------
 */
#ifndef KV_CALL_H
#define KV_CALL_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "gateway/transfer.h"
#include "utils/uuid.h"

/* A claimed request. Lives in a memory context of its own. */
typedef struct KvCall
{
	MemoryContext context;
	char	   *user_id;
	pg_uuid_t	id;
	int			attempt;
	char	   *provider;
	char	   *dialect;
	char	   *url;
	char	   *allowed_host;
	char	  **headers;
	int			key_header;		/* which of them is to have the key */
	char	   *auth_header;
	char	   *auth_scheme;
	char	   *body;			/* NULL for GET */
	bool		is_key_test;
	int			timeout_ms;
	char	   *key;			/* in secret memory; NULL when it could not be opened, or is not here yet */
	char	   *reference;		/* where the key is kept, or NULL */
	bool		resolving;		/* the transfer under way fetches the key */
	bool		key_was_known;	/* the reference was resolved for an earlier call */
	char	   *problem;		/* why the call cannot be made, or NULL */
	bool		problem_may_pass;	/* then it goes back into the queue, and that was no attempt */
	KvTransferResult result;
	TimestampTz settle_at;		/* not before then: its user's balance was locked */
	int			settle_delay_ms;
} KvCall;

extern bool kv_call_use_key(KvCall *call, char *key);
extern bool kv_call_go_on(KvCall *call, KvTransferPool *pool, const KvTransferResult *result);
extern void kv_call_start(KvCall *call, KvTransferPool *pool, bool *started);
extern void kv_call_settle(KvCall *call);
extern void kv_call_abandon(KvCall *call, const char *reason);
extern void kv_call_free(KvCall *call, KvTransferPool *pool);

#endif
