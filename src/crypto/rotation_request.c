/*-------------------------------------------------------------------------
 * rotation_request.c
 *		Rotations that are left to the worker.
 *
 * With keyvault.reveal off a session holds nothing that opens a key, and so cannot wrap or
 * seal one again: it leaves a row, and the worker's maintenance does what the row says.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/rotation_request.h"

#include "base/error.h"
#include "base/owner_spi.h"
#include "catalog/pg_type.h"
#include "crypto/reveal.h"
#include "fmgr.h"
#include "utils/builtins.h"

PG_FUNCTION_INFO_V1(keyvault_may_open_keys);

/*
 * Ask for the rotation of the master_key, batch data keys at a time, or of a user's data_key;
 * false when it was asked for already. Call between kv_owner_begin and kv_owner_end.
 */
bool
kv_rotation_request_make(const char *what, const char *user_id, int batch)
{
	static KvStatement insert = {
		"INSERT INTO keyvault.rotation_requests (user_id, what, batch_size) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
		3, {TEXTOID, TEXTOID, INT4OID}
	};
	static KvStatement wake = {"SELECT keyvault._wake_worker()", 0};
	Datum		values[3] = {CStringGetTextDatum(user_id), CStringGetTextDatum(what), Int32GetDatum(batch)};
	bool		is_new = kv_statement_execute(&insert, values, NULL) > 0;

	kv_statement_execute(&wake, NULL, NULL);
	return is_new;
}

/* Tell the caller that the worker will do it. */
void
kv_rotation_request_announce(void)
{
	ereport(NOTICE,
			(errmsg("the worker rotates when this transaction has committed: keyvault.reveal is off"),
			 errhint("What is left to do stands in keyvault.rotation_requests.")));
}

Datum
keyvault_may_open_keys(PG_FUNCTION_ARGS)
{
	PG_RETURN_BOOL(kv_reveal_may_open());
}
