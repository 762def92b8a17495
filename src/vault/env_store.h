/*-------------------------------------------------------------------------
 * env_store.h
 *		The .env file on disk: read whole, and replaced whole.
 *-------------------------------------------------------------------------
 */
#ifndef KV_ENV_STORE_H
#define KV_ENV_STORE_H

#include "postgres.h"

/* The contents of the file, in secret memory. */
typedef struct KvEnvContents
{
	char	   *bytes;
	Size		length;
} KvEnvContents;

/* What to make of the contents, in place; false when there is nothing to change. */
typedef bool (*KvEnvEdit) (KvEnvContents *contents, void *arg);

extern bool kv_env_store_read(const char *path, KvEnvContents *contents, bool *readable_by_others);
extern void kv_env_store_prepare(const char *path, KvEnvEdit edit, void *arg);
extern void kv_env_store_finish(bool replace);

#endif
