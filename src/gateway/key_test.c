/*-------------------------------------------------------------------------
 * key_test.c
 *		Ask a provider whether a user's key is good.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/argument.h"
#include "base/owner_spi.h"
#include "base/uuid.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "gateway/worker_slot.h"
#include "identity/identity.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(keyvault_test_api_key);

Datum
keyvault_test_api_key(PG_FUNCTION_ARGS)
{
	static KvStatement enqueue = {
		"SELECT keyvault._enqueue_key_test($1, $2, $3, $4)", 4, {TEXTOID, UUIDOID, TEXTOID, TEXTOID}
	};
	pg_uuid_t  *id = kv_uuid_make();
	Datum		values[4];
	KvOwnerScope scope;

	kv_argument_require(fcinfo, 0, "provider");
	kv_argument_require(fcinfo, 1, "name");
	values[0] = CStringGetTextDatum(kv_identity_resolve(fcinfo, 2));
	values[1] = UUIDPGetDatum(id);
	values[2] = PG_GETARG_DATUM(0);
	values[3] = PG_GETARG_DATUM(1);
	kv_owner_begin(&scope);
	kv_statement_execute(&enqueue, values, NULL);
	kv_owner_end(&scope);
	kv_worker_wake_at_commit();
	PG_RETURN_UUID_P(id);
}
