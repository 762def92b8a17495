/*-------------------------------------------------------------------------
 * usage_tag.c
 *		Names the transaction that wrote a usage record: usage_records.debit_tag.
 *
 * A tag is the full transaction id under the 15 random bits of this installation of the
 * extension. It tells rows that were debited here from restored ones, and it orders
 * rows, so that the roll-up knows which transactions have ended.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/usage_tag.h"

#include "access/table.h"
#include "access/tableam.h"
#include "access/xact.h"
#include "base/catalogue.h"
#include "base/error.h"
#include "fmgr.h"
#include "utils/rel.h"
#include "utils/snapmgr.h"

PG_FUNCTION_INFO_V1(keyvault_debit_tag);
PG_FUNCTION_INFO_V1(keyvault_fresh_from);
PG_FUNCTION_INFO_V1(keyvault_fresh_until);

/* Columns of keyvault.usage_rollup. */
#define ROLLUP_TAG_BASE 2
#define ROLLUP_ROLLED_TO 3

/* What the table with this OID says, until a table is heard to have changed: _begin_rollup() gives it another row. */
static Oid	cached_table = InvalidOid;
static int64 cached_base;
static uint64 cached_at;

/* The tag of the transaction that asked last; transaction ids are not used twice. */
static FullTransactionId tagged;
static int64 tag;

static int64
read_rollup(Oid table_oid, int attribute, Snapshot snapshot)
{
	Relation	table = table_open(table_oid, AccessShareLock);
	TupleTableSlot *slot = table_slot_create(table, NULL);
	TableScanDesc scan = table_beginscan(table, snapshot, 0, NULL);
	bool		isnull;
	int64		value;

	if (!table_scan_getnextslot(scan, ForwardScanDirection, slot))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("keyvault.usage_rollup has lost its row"),
				 errhint("Run SELECT keyvault.rebuild_usage_daily() as a superuser, which makes it again.")));
	value = DatumGetInt64(slot_getattr(slot, attribute, &isnull));
	table_endscan(scan);
	ExecDropSingleTupleTableSlot(slot);
	table_close(table, AccessShareLock);
	return value;
}

static Oid
rollup_table(void)
{
	static KvRelation usage_rollup = {"usage_rollup"};

	return kv_relation_find(&usage_rollup);
}

/* Does the SQL of this database have a roll-up? That of version 0.1.0 has none. */
bool
kv_usage_is_rolled_up(void)
{
	return OidIsValid(rollup_table());
}

/* The first tag of this installation; 0 where there is no roll-up. */
static int64
tag_base(void)
{
	Oid			table = rollup_table();
	uint64		now = kv_catalogue_changes();

	if (!OidIsValid(table))
		return 0;
	if (table != cached_table || cached_at != now)
	{
		Snapshot	snapshot = RegisterSnapshot(GetLatestSnapshot());

		cached_base = read_rollup(table, ROLLUP_TAG_BASE, snapshot);
		UnregisterSnapshot(snapshot);
		cached_table = table;
		cached_at = now;
	}
	return cached_base;
}

/* The tag of the current transaction, which gets a transaction id if it has none. */
int64
kv_usage_tag(void)
{
	FullTransactionId xid = GetTopFullTransactionId();

	/* Without a base, an update of the extension may have brought one within this transaction; else a rebuild another. */
	if (!FullTransactionIdEquals(xid, tagged) || !OidIsValid(cached_table) || cached_at != kv_catalogue_changes())
	{
		tag = tag_base() + (int64) (U64FromFullTransactionId(xid) & ((UINT64CONST(1) << KV_USAGE_TAG_XID_BITS) - 1));
		tagged = xid;
	}
	return tag;
}

Datum
keyvault_debit_tag(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT64(kv_usage_tag());
}

/*
 * A column of the roll-up as the query under way sees it, read once per place in a plan.
 * Views compare debit_tag with a function and not with a subquery, because the planner asks
 * a STABLE function for its estimates: a subquery's unknown value has it expect half a
 * percent of all records, and compile a query that finds few.
 */
static Datum
rollup_column(FunctionCallInfo fcinfo, int attribute, int64 offset)
{
	int64	   *known = fcinfo->flinfo->fn_extra;

	if (known == NULL)
	{
		known = MemoryContextAlloc(fcinfo->flinfo->fn_mcxt, sizeof(int64));
		*known = read_rollup(rollup_table(), attribute, GetActiveSnapshot()) + offset;
		fcinfo->flinfo->fn_extra = known;
	}
	PG_RETURN_INT64(*known);
}

/* The first debit_tag that is not added up yet. */
Datum
keyvault_fresh_from(PG_FUNCTION_ARGS)
{
	return rollup_column(fcinfo, ROLLUP_ROLLED_TO, 0);
}

/* The first debit_tag of other installations behind it. */
Datum
keyvault_fresh_until(PG_FUNCTION_ARGS)
{
	return rollup_column(fcinfo, ROLLUP_TAG_BASE, INT64CONST(1) << KV_USAGE_TAG_XID_BITS);
}
