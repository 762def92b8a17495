/*-------------------------------------------------------------------------
 * dialect.h
 *		How a provider's answer states what it used.
 *-------------------------------------------------------------------------
 */
#ifndef KV_DIALECT_H
#define KV_DIALECT_H

#include "postgres.h"

#include "utils/jsonb.h"
#include "utils/numeric.h"

typedef struct KvUsage
{
	bool		stated;			/* the answer states tokens */
	int64		input_tokens;	/* cached ones included */
	int64		cached_tokens;
	int64		output_tokens;	/* reasoning included */
	int64		reasoning_tokens;
	char	   *model;			/* as the answer names it, or NULL */
	Numeric		stated_usd;		/* cost as the answer states it, or NULL */
} KvUsage;

extern bool kv_dialect_key_refused(const char *dialect, long status_code, Jsonb *answer);
extern void kv_dialect_read_usage(const char *dialect, Jsonb *answer, KvUsage *usage);

#endif
