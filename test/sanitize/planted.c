/*-------------------------------------------------------------------------
 * planted.c
 *		Defects that a sanitizer must find: the check of the check.
 *
 * Loaded by "script/test sanitize" and "script/test valgrind" alone, and never shipped.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"

PG_MODULE_MAGIC;

PG_FUNCTION_INFO_V1(planted_heap);
PG_FUNCTION_INFO_V1(planted_stack);
PG_FUNCTION_INFO_V1(planted_undefined);
PG_FUNCTION_INFO_V1(planted_uninitialised);

/* Each is called with 16, an index that is one too high, or with a number that is too great: what the compiler cannot see. */

Datum
planted_heap(PG_FUNCTION_ARGS)
{
	volatile char *memory = malloc(PG_GETARG_INT32(0));

	memory[PG_GETARG_INT32(0)] = 'x';
	free((void *) memory);
	PG_RETURN_VOID();
}

Datum
planted_stack(PG_FUNCTION_ARGS)
{
	volatile char memory[16];

	memory[PG_GETARG_INT32(0)] = 'x';
	PG_RETURN_VOID();
}

Datum
planted_undefined(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT32(PG_GETARG_INT32(0) + PG_INT32_MAX);
}

Datum
planted_uninitialised(PG_FUNCTION_ARGS)
{
	volatile char *memory = malloc(16);

	if (memory[PG_GETARG_INT32(0) - 16] == 'x')
		ereport(NOTICE, (errmsg("by chance")));
	free((void *) memory);
	PG_RETURN_VOID();
}
