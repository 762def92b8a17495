/*-------------------------------------------------------------------------
 * env_file.h
 *		The text of a .env file: read, and changed with all else left as it was.
 *-------------------------------------------------------------------------
 */
#ifndef KV_ENV_FILE_H
#define KV_ENV_FILE_H

#include "postgres.h"

/* A text and how far it has been read. */
typedef struct KvEnvText
{
	const char *text;
	Size		length;
	Size		position;
	int			line;			/* of position, from 1 */
} KvEnvText;

/* One assignment: places in its text. */
typedef struct KvEnvAssignment
{
	int			line;			/* of its name, from 1 */
	Size		start;			/* "export", else the name */
	Size		name;
	Size		name_end;
	Size		value;			/* with its quotes */
	Size		value_end;
	bool		quoted;
	bool		escaped;		/* \n and \r mean what they mean in C */
	Size		end;			/* of its last line, in front of the line break */
} KvEnvAssignment;

/* What kv_env_file_set may add to a text, besides name and value. */
#define KV_ENV_FILE_ROOM 16

extern void kv_env_file_begin(KvEnvText *text, const char *bytes, Size length);
extern bool kv_env_file_next(KvEnvText *text, KvEnvAssignment *assignment);
extern bool kv_env_file_find(const char *bytes, Size length, const char *name, KvEnvText *text, KvEnvAssignment *last);
extern bool kv_env_file_names(const KvEnvText *text, const KvEnvAssignment *assignment, const char *name);
extern Size kv_env_file_value(const KvEnvText *text, const KvEnvAssignment *assignment, char *out);
extern bool kv_env_file_set(const char *bytes, Size length, const char *name, const char *value, char *out, Size *out_length);
extern bool kv_env_file_remove(const char *bytes, Size length, const char *name, char *out, Size *out_length);

#endif
