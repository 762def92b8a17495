/*-------------------------------------------------------------------------
 * period.c
 *		Months of credits, counted from an anchor.
 *
 * Period n begins at anchor + n months of the Gregorian calendar in UTC, each computed
 * from the anchor: the 31st comes back after a short month. A timestamp with time zone is
 * stored as the timestamp that it is in UTC, so that no zone has to be looked up.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/period.h"

#include "base/error.h"
#include "fmgr.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(keyvault_period_bound);
PG_FUNCTION_INFO_V1(keyvault_period_number);

/* When period number begins. Error: 22008 outside the calendar. */
TimestampTz
kv_period_bound(TimestampTz anchor, int32 number)
{
	Interval	months = {.month = number};

	return DatumGetTimestamp(DirectFunctionCall2(timestamp_pl_interval, TimestampGetDatum(anchor), IntervalPGetDatum(&months)));
}

/* Years and months in UTC, as months. Error: 22008 outside the calendar. */
static int32
months_of(TimestampTz at)
{
	struct pg_tm fields;
	fsec_t		fraction;

	if (TIMESTAMP_NOT_FINITE(at) || timestamp2tm(at, NULL, &fields, &fraction, NULL, NULL) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_DATETIME_VALUE_OUT_OF_RANGE),
				 errmsg("timestamp out of range"),
				 errhint("A period begins and ends at a time of the calendar.")));
	return fields.tm_year * MONTHS_PER_YEAR + fields.tm_mon;
}

/* The number of the period that contains a time. Error: 22008 outside the calendar. */
int32
kv_period_number(TimestampTz anchor, TimestampTz at)
{
	int32		months = months_of(at) - months_of(anchor);

	return kv_period_bound(anchor, months) > at ? months - 1 : months;
}

Datum
keyvault_period_bound(PG_FUNCTION_ARGS)
{
	PG_RETURN_TIMESTAMPTZ(kv_period_bound(PG_GETARG_TIMESTAMPTZ(0), PG_GETARG_INT32(1)));
}

Datum
keyvault_period_number(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT32(kv_period_number(PG_GETARG_TIMESTAMPTZ(0), PG_GETARG_TIMESTAMPTZ(1)));
}
