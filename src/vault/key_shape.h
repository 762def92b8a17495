/*-------------------------------------------------------------------------
 * key_shape.h
 *		What a provider's key looks like, without saying what it is.
 *-------------------------------------------------------------------------
 */
#ifndef KV_KEY_SHAPE_H
#define KV_KEY_SHAPE_H

#include "postgres.h"

#define KV_KEY_LENGTH_MIN	8
#define KV_KEY_LENGTH_MAX	512

extern const char *kv_key_shape_problem(const char *key, Size length, const char *provider);
extern bool kv_key_shape_is_sendable(const char *key);
extern void kv_key_shape_check(const char *key, Size length, const char *provider);
extern char *kv_key_shape_hint(const char *key);

#endif
