/*-------------------------------------------------------------------------
 * usage_tag.h
 *		Names the transaction that wrote a usage record.
 *-------------------------------------------------------------------------
 */
#ifndef KV_USAGE_TAG_H
#define KV_USAGE_TAG_H

#include "postgres.h"

/* A tag is that of an installation, above so many bits of a transaction id. */
#define KV_USAGE_TAG_XID_BITS 48

extern int64 kv_usage_tag(void);
extern bool kv_usage_is_rolled_up(void);

#endif
