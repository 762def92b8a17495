/*-------------------------------------------------------------------------
 * reconcile.c
 *		Requests whose outcome is unknown: lists them, and settles them by hand.
 *
 * Users do not reconcile their own calls: it takes the right to act for any user, or
 * access admin.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/argument.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "gateway/worker_slot.h"
#include "identity/identity.h"

PG_FUNCTION_INFO_V1(keyvault_reconcile_request);
PG_FUNCTION_INFO_V1(keyvault_unknown_requests);

/* Error: 42501. */
static void
require_right(void)
{
	if (!kv_identity_acts_for_any_user() && !kv_identity_is_admin())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to reconcile requests"),
				 errhint("keyvault.grant_access(role, 'app') or (role, 'admin') gives that right.")));
}

Datum
keyvault_reconcile_request(PG_FUNCTION_ARGS)
{
	static KvStatement reconcile = {
		"SELECT keyvault._reconcile_request($1, $2, $3, $4, $5, $6)", 6, {UUIDOID, TEXTOID, INT8OID, INT8OID, INT8OID, NUMERICOID}
	};
	KvOwnerScope scope;
	Datum		values[6];
	char		nulls[7] = "      ";
	bool		isnull;
	bool		reconciled;

	require_right();
	kv_argument_require(fcinfo, 0, "request_id");
	kv_argument_require(fcinfo, 1, "outcome");
	for (int i = 0; i < 6; i++)
	{
		values[i] = PG_GETARG_DATUM(i);
		nulls[i] = PG_ARGISNULL(i) ? 'n' : ' ';
	}
	kv_owner_begin(&scope);
	reconciled = DatumGetBool(kv_statement_value(&reconcile, values, nulls, &isnull));
	kv_owner_end(&scope);
	kv_worker_announce_at_commit();
	PG_RETURN_BOOL(reconciled);
}

Datum
keyvault_unknown_requests(PG_FUNCTION_ARGS)
{
	static KvStatement find = {
		"SELECT r.user_id, r.id, r.provider, r.model, r.payer, r.estimated_usd, coalesce(h.amount, 0), h.expires_at,"
		" r.sent_at, r.finished_at, r.error"
		" FROM keyvault.requests r LEFT JOIN keyvault.credit_holds h ON h.user_id = r.user_id AND h.id = r.hold_id"
		" WHERE r.status = 'unknown' AND r.type <> 'test' ORDER BY r.finished_at, r.id", 0
	};
	ReturnSetInfo *result = (ReturnSetInfo *) fcinfo->resultinfo;
	KvOwnerScope scope;
	uint64		n;

	require_right();
	InitMaterializedSRF(fcinfo, 0);
	kv_owner_begin(&scope);
	n = kv_statement_execute(&find, NULL, NULL);
	for (uint64 i = 0; i < n; i++)
		tuplestore_puttuple(result->setResult, SPI_tuptable->vals[i]);
	kv_owner_end(&scope);
	return (Datum) 0;
}
