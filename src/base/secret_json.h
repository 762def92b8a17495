/*-------------------------------------------------------------------------
 * secret_json.h
 *		Values out of JSON that holds secrets.
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

/* A field of an object: whether it is there, how often, and its value if that is a string. */
typedef struct KvSecretJsonField
{
	const char *name;
	int			times;
	bool		is_null;
	char	   *string;			/* in secret memory of the caller's context, or NULL */
} KvSecretJsonField;

extern bool kv_secret_json_find(const char *text, Size length, const char *path, KvSecretJsonValue *value);
extern bool kv_secret_json_read(const char *text, Size length, KvSecretJsonField *fields, int n);

#endif
