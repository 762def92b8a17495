/*-------------------------------------------------------------------------
 * uuid.c
 *		UUID version 7 (RFC 9562, section 5.7, with a fraction of a millisecond in
 *		rand_a by method 3 of section 6.2).
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/uuid.h"

#include <time.h>

#include "base/error.h"
#include "base/pg_version.h"
#include "fmgr.h"
#include "port/pg_bswap.h"
#include "utils/fmgrprotos.h"

PG_FUNCTION_INFO_V1(keyvault_uuidv7);

#if KV_HAS_UUIDV7

/* Make a UUIDv7, in the current memory context. */
pg_uuid_t *
kv_uuid_make(void)
{
	return DatumGetUUIDP(DirectFunctionCall1(uuidv7, (Datum) 0));
}

#else

/* Nanoseconds that one step of the 12-bit fraction of a millisecond stands for. */
#define STEP_NS 245

/* Fill in random bytes, fetched for many at once. Not for secrets, nor in the postmaster, whose children would begin with the same. */
static void
random_bytes(uint8 *out, Size length)
{
	static uint8 fetched[512];
	static Size left = 0;

	if (left < length)
	{
		if (!pg_strong_random(fetched, sizeof(fetched)))
			ereport(ERROR,
					(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not generate random bytes")));
		left = sizeof(fetched);
	}
	left -= length;
	memcpy(out, fetched + left, length);
}

/* Make a UUIDv7, greater than this process's last one, in the current memory context. */
pg_uuid_t *
kv_uuid_make(void)
{
	static int64 last_ns = 0;	/* never reset: it only keeps ids rising */
	pg_uuid_t  *uuid = palloc(sizeof(pg_uuid_t));
	struct timespec now;
	int64		ns;
	uint64		head;

	clock_gettime(CLOCK_REALTIME, &now);
	ns = (int64) now.tv_sec * INT64CONST(1000000000) + now.tv_nsec;
	if (ns < last_ns + STEP_NS)
		ns = last_ns + STEP_NS;
	last_ns = ns;

	head = (uint64) (ns / 1000000) << 16 | UINT64CONST(0x7000) | (uint64) (ns % 1000000) * 4096 / 1000000;
	head = pg_hton64(head);
	memcpy(uuid->data, &head, 8);
	random_bytes(uuid->data + 8, 8);
	uuid->data[8] = (uuid->data[8] & 0x3f) | 0x80;
	return uuid;
}

#endif

Datum
keyvault_uuidv7(PG_FUNCTION_ARGS)
{
	PG_RETURN_UUID_P(kv_uuid_make());
}
