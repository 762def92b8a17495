/*-------------------------------------------------------------------------
 * secret_text.h
 *		Which texts may hold a secret.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SECRET_TEXT_H
#define KV_SECRET_TEXT_H

#include "postgres.h"

/* What stands in the place of a secret's bytes. */
#define KV_SECRET_TEXT_MASK '*'

extern bool kv_secret_text_names_secret(const char *text);
extern bool kv_secret_text_has_key_shape(const char *text);
extern void kv_secret_text_scrub_key_shapes(char *text);
extern void kv_secret_text_scrub_json(char *text, Size length, const char *secret);

#endif
