/*-------------------------------------------------------------------------
 * master_key_source.h
 *		Where master keys come from.
 *-------------------------------------------------------------------------
 */
#ifndef KV_MASTER_KEY_SOURCE_H
#define KV_MASTER_KEY_SOURCE_H

#include "postgres.h"

/* Which source; stored in each wrap: values are never changed or used again. */
typedef enum KvMasterKeySourceId
{
	KV_MASTER_KEY_FILE = 1,
	KV_MASTER_KEY_COMMAND = 2,
	KV_MASTER_KEY_TRANSIT = 3,
} KvMasterKeySourceId;

typedef struct KvMasterKeySource
{
	KvMasterKeySourceId id;
	const char *setting;		/* the one that configures it */
	bool		shared;			/* asking costs a program or a call: one process asks for all */
	bool		(*is_configured) (void);
	char	   *(*describe) (void);	/* what to call it, in the middle of a sentence */
	char	   *(*fetch) (const char **reason, const char **hint);
} KvMasterKeySource;

/* A source's text: at most this many keys, each a line of 64 hexadecimal digits. */
#define KV_MASTER_KEYS_MAX		16
#define KV_MASTER_KEY_DIGITS	64
#define KV_MASTER_KEY_TEXT_MAX	2048

/*
 * fetch returns that text, NUL-terminated, in secret memory of the current context; or NULL,
 * with a reason that goes on from "the <what describe returns> ...", and a hint.
 */
extern const KvMasterKeySource kv_master_key_from_file;
extern const KvMasterKeySource kv_master_key_from_command;
extern const KvMasterKeySource kv_master_key_from_transit;

#endif
