/*-------------------------------------------------------------------------
 * sealed_key.h
 *		API keys that a client sealed, so that their plaintext never reaches SQL.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SEALED_KEY_H
#define KV_SEALED_KEY_H

#include "postgres.h"

extern void kv_sealed_key_make_ready(void);
extern int	kv_sealed_key_convert(int max, bool all, bool *failed);

#endif
