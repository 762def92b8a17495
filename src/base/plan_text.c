/*-------------------------------------------------------------------------
 * plan_text.c
 *		Keeps secrets out of the names of memory contexts.
 *
 * A plan that may be used again names its memory contexts by its statement's text. When memory
 * is short the server writes those names to its standard error, where no log hook sees them;
 * pg_backend_memory_contexts shows them. The name is for display alone: the plan has the text
 * elsewhere.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/plan_text.h"

#include "nodes/memnodes.h"
#include "utils/memutils.h"

static bool
is_plan(MemoryContext context)
{
	return context->ident != NULL &&
		(strcmp(context->name, "CachedPlanSource") == 0 || strcmp(context->name, "CachedPlan") == 0);
}

/* The context after this one, children before siblings; NULL behind the last. */
static MemoryContext
next_context(MemoryContext context)
{
	if (context->firstchild)
		return context->firstchild;
	while (context->nextchild == NULL)
	{
		context = context->parent;
		if (context == NULL)
			return NULL;
	}
	return context->nextchild;
}

static bool
withhold(MemoryContext context, bool (*shows_secret) (const char *text))
{
	if (!is_plan(context) || !shows_secret(context->ident))
		return false;
	MemoryContextSetIdentifier(context, "[withheld by keyvault]");
	return true;
}

/* Give the contexts of plans whose text shows a secret another name; true when there were any. Allocates and throws nothing. */
bool
kv_plan_text_withhold(bool (*shows_secret) (const char *text))
{
	bool		found = false;

	for (MemoryContext context = TopMemoryContext; context != NULL; context = next_context(context))
		found |= withhold(context, shows_secret);
	return found;
}

/* The same for the one plan that a statement about to run is of. */
void
kv_plan_text_withhold_of(PlannedStmt *statement, bool (*shows_secret) (const char *text))
{
	(void) withhold(GetMemoryChunkContext(statement), shows_secret);
}
