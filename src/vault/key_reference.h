/*-------------------------------------------------------------------------
 * key_reference.h
 *		Keys that are kept elsewhere: what is stored here names them.
 *-------------------------------------------------------------------------
 */
#ifndef KV_KEY_REFERENCE_H
#define KV_KEY_REFERENCE_H

#include "postgres.h"

#define KV_REFERENCE_MAX 400

extern bool kv_key_reference_parse(const char *reference, char **path, char **field);

#endif
