/*-------------------------------------------------------------------------
 * uuid.h
 *		UUID version 7.
 *-------------------------------------------------------------------------
 */
#ifndef KV_UUID_H
#define KV_UUID_H

#include "postgres.h"

#include "utils/uuid.h"

extern pg_uuid_t *kv_uuid_make(void);

#endif
