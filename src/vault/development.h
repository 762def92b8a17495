/*-------------------------------------------------------------------------
 * development.h
 *		Development mode: everybody's default keys are those of a .env file.
 *-------------------------------------------------------------------------
 */
#ifndef KV_DEVELOPMENT_H
#define KV_DEVELOPMENT_H

#include "postgres.h"

#include "nodes/pg_list.h"

/* The name of the keys that the file holds. */
#define KV_DEFAULT_KEY_NAME "default"

/* A key of the file, in secret memory. */
typedef struct KvDevelopmentKey
{
	char	   *provider;
	char	   *secret;
} KvDevelopmentKey;

extern void kv_development_init(void);
extern bool kv_development_is_on(void);
extern bool kv_development_has(const char *name);
extern List *kv_development_keys(void);
extern char *kv_development_key(const char *provider);
extern void kv_development_set(const char *provider, const char *secret);
extern bool kv_development_remove(const char *provider);

#endif
