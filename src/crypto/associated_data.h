/*-------------------------------------------------------------------------
 * associated_data.h
 *		The bytes that a ciphertext is bound to.
 *-------------------------------------------------------------------------
 */
#ifndef KV_ASSOCIATED_DATA_H
#define KV_ASSOCIATED_DATA_H

#include "postgres.h"

#define KV_ASSOCIATED_DATA_MAX 1024

typedef struct KvAssociatedData
{
	Size		length;
	uint8		bytes[KV_ASSOCIATED_DATA_MAX];
} KvAssociatedData;

extern void kv_associated_data_init(KvAssociatedData *associated, const uint8 *header, Size length);
extern void kv_associated_data_add(KvAssociatedData *associated, const uint8 *field, Size length);

#endif
