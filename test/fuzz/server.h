/*
 * What fuzz targets have in place of the PostgreSQL server: memory that is freed after each input, and errors that
 * end in kv_throws.
 */
#ifndef KV_FUZZ_SERVER_H
#define KV_FUZZ_SERVER_H

#include "postgres.h"

/* Run a function; returns the SQLSTATE of the error that ended it, 0 without one. */
extern int	kv_throws(void (*function) (void *), void *argument);

/* Call the callbacks of what was allocated, and free nothing yet. */
extern void kv_run_callbacks(void);

/* Free what was allocated since the last call, as the end of a memory context does. */
extern void kv_free_all(void);

/* A copy in memory of exactly that size, so that a step beyond it is seen. */
extern char *kv_exact_copy(const void *bytes, Size length);

/* The same as a bytea, behind a long length word, or a short one where it fits. */
extern bytea *kv_exact_bytea(const void *bytes, Size length, bool packed);

/* End the run with a report when a property does not hold. */
#define KV_HOLDS(condition) \
	do { if (!(condition)) { kv_fail(#condition, __FILE__, __LINE__); } } while (0)
extern void kv_fail(const char *condition, const char *file, int line);

extern int	LLVMFuzzerTestOneInput(const uint8 *data, size_t size);
extern int	LLVMFuzzerInitialize(int *argc, char ***argv);

#endif
