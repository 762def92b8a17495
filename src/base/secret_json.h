/*-------------------------------------------------------------------------
 * secret_json.h
 *		One value out of JSON that holds secrets.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SECRET_JSON_H
#define KV_SECRET_JSON_H

#include "postgres.h"

/* What is at a path: a string or a number, or neither. */
typedef struct KvSecretJsonValue
{
	char	   *string;			/* in secret memory of the caller's context, or NULL */
	int64		count;			/* a whole number from 0 to 10^9, or -1 */
} KvSecretJsonValue;

extern bool kv_secret_json_find(const char *text, Size length, const char *path, KvSecretJsonValue *value);

#endif
