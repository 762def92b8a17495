/*-------------------------------------------------------------------------
 * associated_data.c
 *		The bytes that a ciphertext is bound to: a header of fixed size, then fields,
 *		each behind its length in four bytes, big-endian, so that no two lists of
 *		fields give the same bytes.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/associated_data.h"

#include "base/error.h"
#include "port/pg_bswap.h"

static void
append(KvAssociatedData *associated, const void *bytes, Size length)
{
	if (length > KV_ASSOCIATED_DATA_MAX - associated->length)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("associated data of a secret is too long")));
	memcpy(associated->bytes + associated->length, bytes, length);
	associated->length += length;
}

/* Begin with a header of a size that its first byte implies. */
void
kv_associated_data_init(KvAssociatedData *associated, const uint8 *header, Size length)
{
	associated->length = 0;
	append(associated, header, length);
}

/* Add a field. */
void
kv_associated_data_add(KvAssociatedData *associated, const uint8 *field, Size length)
{
	uint32		prefix = pg_hton32((uint32) length);

	append(associated, &prefix, sizeof(prefix));
	append(associated, field, length);
}
