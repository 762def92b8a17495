/*-------------------------------------------------------------------------
 * amount.h
 *		Amounts of credits: numeric(18,6), or a whole number of micro-credits.
 *-------------------------------------------------------------------------
 */
#ifndef KV_AMOUNT_H
#define KV_AMOUNT_H

#include "postgres.h"

#include "utils/numeric.h"

extern Numeric kv_amount_zero(void);
extern Numeric kv_amount_of_micro(int64 micro_credits);
extern int64 kv_amount_in_micro(Numeric credits);
extern Numeric kv_amount_add(Numeric a, Numeric b);
extern bool kv_amount_at_most(Numeric a, Numeric b);
extern Datum kv_amount_stored(Numeric credits);

#endif
