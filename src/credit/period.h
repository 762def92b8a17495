/*-------------------------------------------------------------------------
 * period.h
 *		Months of credits, counted from an anchor.
 *-------------------------------------------------------------------------
 */
#ifndef KV_PERIOD_H
#define KV_PERIOD_H

#include "postgres.h"

#include "datatype/timestamp.h"

extern TimestampTz kv_period_bound(TimestampTz anchor, int32 number);
extern int32 kv_period_number(TimestampTz anchor, TimestampTz at);

#endif
