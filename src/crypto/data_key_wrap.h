/*-------------------------------------------------------------------------
 * data_key_wrap.h
 *		A data key, wrapped by a master key.
 *-------------------------------------------------------------------------
 */
#ifndef KV_DATA_KEY_WRAP_H
#define KV_DATA_KEY_WRAP_H

#include "postgres.h"

#include "crypto/data_key.h"
#include "crypto/master_key.h"

/* Where the id of the master key stands in a wrap; sql/35_api_key.sql has an index on it. */
#define KV_WRAP_KEK_ID_OFFSET 8

extern bytea *kv_data_key_wrap(const KvDataKey *data_key, const KvMasterKey *master_key, uint32 kek_version);
extern bool kv_data_key_unwrap(KvDataKey *data_key, const bytea *stored);

#endif
