/*-------------------------------------------------------------------------
 * subtransaction.c
 *		Work whose failure is not its caller's.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/subtransaction.h"

#include "access/xact.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

/*
 * Do work in a subtransaction, in the current memory context. Returns NULL, or the error that
 * ended and undid it, which the caller throws again with ReThrowError unless it is one that he
 * can go on after: a cancel is among them.
 */
ErrorData *
kv_subtransaction_run(void (*work) (void *arg), void *arg)
{
	MemoryContext context = CurrentMemoryContext;
	ResourceOwner owner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(context);
	PG_TRY();
	{
		work(arg);
		ReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(context);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();
	/* Either end has left us in the memory of the surrounding transaction. */
	MemoryContextSwitchTo(context);
	CurrentResourceOwner = owner;
	return error;
}
