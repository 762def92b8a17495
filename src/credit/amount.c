/*-------------------------------------------------------------------------
 * amount.c
 *		Amounts of credits: numeric(18,6), or a whole number of micro-credits.
 *
 * 18 digits of micro-credits fit in 64 bits, so that sums of rows need no numeric.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/amount.h"

#include "base/error.h"
#include "base/pg_version.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

#define MICRO_DIGITS 6
#define TYPMOD_OF_NUMERIC_18_6 (((18 << 16) | MICRO_DIGITS) + VARHDRSZ)

/* A whole number as numeric, for as long as the process lives. */
static Numeric
constant(int64 number)
{
	MemoryContext caller = MemoryContextSwitchTo(TopMemoryContext);
	Numeric		value = int64_to_numeric(number);

	MemoryContextSwitchTo(caller);
	return value;
}

Numeric
kv_amount_zero(void)
{
	static Numeric zero = NULL;

	if (zero == NULL)
		zero = constant(0);
	return zero;
}

Numeric
kv_amount_of_micro(int64 micro_credits)
{
	return int64_div_fast_to_numeric(micro_credits, MICRO_DIGITS);
}

/* The amount, of at most 6 decimal places, as micro-credits. Error: 22003. */
int64
kv_amount_in_micro(Numeric credits)
{
	static Numeric million = NULL;

	if (million == NULL)
		million = constant(1000000);
	return DatumGetInt64(DirectFunctionCall1(numeric_int8,
											 NumericGetDatum(numeric_mul_opt_error(credits, million, NULL))));
}

/* a + b. Much of a balance is zero, of which there is the header only, as of what is no number: it takes no arithmetic. */
Numeric
kv_amount_add(Numeric a, Numeric b)
{
	if (VARSIZE_ANY(b) == VARSIZE_ANY(kv_amount_zero()) && !numeric_is_nan(b) && !numeric_is_inf(b))
		return a;
	return numeric_add_opt_error(a, b, NULL);
}

bool
kv_amount_at_most(Numeric a, Numeric b)
{
	return DatumGetBool(DirectFunctionCall2(numeric_le, NumericGetDatum(a), NumericGetDatum(b)));
}

/* The amount as a column of type numeric(18,6) holds it. Error: 22003 when it has too many digits. */
Datum
kv_amount_stored(Numeric credits)
{
	return DirectFunctionCall2(numeric, NumericGetDatum(credits), Int32GetDatum(TYPMOD_OF_NUMERIC_18_6));
}
