/*-------------------------------------------------------------------------
 * json_field.h
 *		Fields of JSON that a stranger sent.
 *-------------------------------------------------------------------------
 */
#ifndef KV_JSON_FIELD_H
#define KV_JSON_FIELD_H

#include "postgres.h"

#include "utils/jsonb.h"
#include "utils/numeric.h"

extern Jsonb *kv_json_parse(const char *text, Size length);
extern bool kv_json_count(Jsonb *json, const char *path, int64 *count);
extern bool kv_json_amount(Jsonb *json, const char *path, Numeric *amount);
extern char *kv_json_string(Jsonb *json, const char *path);

#endif
