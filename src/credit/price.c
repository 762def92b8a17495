/*-------------------------------------------------------------------------
 * price.c
 *		Prices usage records that are inserted without credits.
 *
 * A row that states its credits passes through at the cost of one look at it; the prices
 * themselves are SQL (sql/41_price.sql).
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "base/catalogue.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "fmgr.h"
#include "utils/jsonb.h"
#include "utils/rel.h"

PG_FUNCTION_INFO_V1(keyvault_price_usage);

/* What _price_use() takes, in its order, and what it changes. */
#define INPUTS 12

static const char *const inputs[INPUTS] = {
	"user_id", "provider", "model", "payer", "created_at", "input_tokens", "cached_tokens", "output_tokens",
	"reasoning_tokens", "tokens", "units", "cost_usd",
};
#define OUTPUTS 4

static const char *const outputs[OUTPUTS] = {"credits", "cost_usd", "provider", "price"};

static HeapTuple
price_row(HeapTuple row, TupleDesc descriptor)
{
	static KvStatement price = {
		"SELECT p.credits, p.usd, p.priced_provider, p.price"
		" FROM keyvault._price_use($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) p", INPUTS,
		{TEXTOID, TEXTOID, TEXTOID, TEXTOID, TIMESTAMPTZOID, INT8OID, INT8OID, INT8OID, INT8OID, INT8OID, NUMERICOID, NUMERICOID}
	};
	KvOwnerScope scope;
	Datum		values[INPUTS];
	char		nulls[INPUTS + 1] = {0};
	int			columns[OUTPUTS];
	Datum		priced[OUTPUTS];
	bool		priced_nulls[OUTPUTS];
	bool		isnull;

	for (int i = 0; i < INPUTS; i++)
	{
		values[i] = heap_getattr(row, SPI_fnumber(descriptor, inputs[i]), descriptor, &isnull);
		nulls[i] = isnull ? 'n' : ' ';
	}
	kv_owner_begin(&scope);
	if (kv_statement_execute(&price, values, nulls) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("a usage record got no price")));
	for (int i = 0; i < OUTPUTS; i++)
	{
		columns[i] = SPI_fnumber(descriptor, outputs[i]);
		priced[i] = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, i + 1, &priced_nulls[i]);
	}
	row = SPI_copytuple(heap_modify_tuple_by_cols(row, descriptor, OUTPUTS, columns, priced, priced_nulls));
	kv_owner_end(&scope);
	return row;
}

Datum
keyvault_price_usage(PG_FUNCTION_ARGS)
{
	TriggerData *trigger = (TriggerData *) fcinfo->context;
	TupleDesc	descriptor;
	/* The column's number in the relation last seen; it holds until the catalogue changes. */
	static Oid	relation = InvalidOid;
	static uint64 known_at;
	static int	credits;
	uint64		now = kv_catalogue_changes();
	bool		isnull;

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_BEFORE(trigger->tg_event) ||
		!TRIGGER_FIRED_BY_INSERT(trigger->tg_event) || !TRIGGER_FIRED_FOR_ROW(trigger->tg_event))
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("prices are set by a row trigger before INSERT on keyvault.usage_records")));
	descriptor = RelationGetDescr(trigger->tg_relation);
	if (relation != RelationGetRelid(trigger->tg_relation) || known_at != now)
	{
		credits = SPI_fnumber(descriptor, "credits");
		relation = RelationGetRelid(trigger->tg_relation);
		known_at = now;
	}
	(void) heap_getattr(trigger->tg_trigtuple, credits, descriptor, &isnull);
	return PointerGetDatum(isnull ? price_row(trigger->tg_trigtuple, descriptor) : trigger->tg_trigtuple);
}
