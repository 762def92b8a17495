/*-------------------------------------------------------------------------
 * redaction.h
 *		Keeps secrets out of the server log.
 *-------------------------------------------------------------------------
 */
#ifndef KV_REDACTION_H
#define KV_REDACTION_H

#include "postgres.h"

/* What stands in the place of a secret's bytes. */
#define KV_REDACTED_BYTE '*'

extern void kv_redaction_init(void);
extern void kv_redaction_mark_statement(void);
extern Size kv_redaction_scrub_value(char *text, Size length, const char *secret);

#endif
