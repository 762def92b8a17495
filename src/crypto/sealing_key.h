/*-------------------------------------------------------------------------
 * sealing_key.h
 *		The vault's own pairs of keys, to which clients seal API keys.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SEALING_KEY_H
#define KV_SEALING_KEY_H

#include "postgres.h"

#include "crypto/sealed_box.h"

extern bool kv_sealing_key_newest(KvBoxKey *key);
extern void kv_sealing_key_make(void);
extern void kv_sealing_key_ensure(KvBoxKey *key);
extern bool kv_sealing_key_is_accepted(const bytea *box);
extern void kv_sealing_key_hold(const bytea *box);
extern int64 kv_sealing_key_forget_retired(void);
extern bytea *kv_sealing_key_seal_box(const char *label, const char *user_id, const char *context, const char *secret, Size length);
extern char *kv_sealing_key_open_box(const char *label, const char *user_id, const char *context, const bytea *box, Size *length);

#endif
