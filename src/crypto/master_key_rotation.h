/*-------------------------------------------------------------------------
 * master_key_rotation.h
 *		Which master key wraps, and how another takes its place.
 *-------------------------------------------------------------------------
 */
#ifndef KV_MASTER_KEY_ROTATION_H
#define KV_MASTER_KEY_ROTATION_H

#include "postgres.h"

#include "crypto/master_key.h"

extern const KvMasterKey *kv_master_key_primary(uint32 *version);

#endif
