/*-------------------------------------------------------------------------
 * owner_spi.c
 *		SQL statements run as the extension's owner.
 *
 * Callers have no privileges on keyvault's tables beyond their own rows: a C function
 * first decides what the caller may do, then runs its statements between
 * kv_owner_begin and kv_owner_end, where names mean pg_catalog's whatever the caller's
 * search_path says.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/owner_spi.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "base/error.h"
#include "catalog/namespace.h"
#include "catalog/pg_class.h"
#include "miscadmin.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"

/* The owner of keyvault.vault, and so of the extension. */
static Oid
extension_owner(void)
{
	Oid			schema = get_namespace_oid("keyvault", true);
	HeapTuple	tuple = NULL;
	Oid			owner;

	if (OidIsValid(schema))
		tuple = SearchSysCache2(RELNAMENSP, CStringGetDatum("vault"), ObjectIdGetDatum(schema));
	if (!HeapTupleIsValid(tuple))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("extension keyvault is not installed in this database"),
				 errhint("Run CREATE EXTENSION keyvault CASCADE.")));
	owner = ((Form_pg_class) GETSTRUCT(tuple))->relowner;
	ReleaseSysCache(tuple);
	return owner;
}

/*
 * Connect SPI and become the extension's owner until kv_owner_end, for statements that
 * qualify every name, operators and casts included. An error ends the scope by itself.
 */
void
kv_owner_begin_qualified(KvOwnerScope *scope)
{
	Oid			owner = extension_owner();

	if (SPI_connect() != SPI_OK_CONNECT)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not connect to SPI")));
	GetUserIdAndSecContext(&scope->caller, &scope->security_context);
	SetUserIdAndSecContext(owner, scope->security_context | SECURITY_LOCAL_USERID_CHANGE);
	scope->guc_level = 0;
}

/* As kv_owner_begin_qualified, for any statement: names mean pg_catalog's first. */
void
kv_owner_begin(KvOwnerScope *scope)
{
	kv_owner_begin_qualified(scope);
	scope->guc_level = NewGUCNestLevel();
	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
}

/* Become the caller again and disconnect SPI. */
void
kv_owner_end(KvOwnerScope *scope)
{
	if (scope->guc_level != 0)
		AtEOXact_GUC(true, scope->guc_level);
	SetUserIdAndSecContext(scope->caller, scope->security_context);
	SPI_finish();
}

/* Activate a snapshot that sees what this transaction has written, for an index scan. */
void
kv_owner_fresh_snapshot_begin(void)
{
	CommandCounterIncrement();
	PushActiveSnapshot(GetTransactionSnapshot());
}

void
kv_owner_fresh_snapshot_end(void)
{
	PopActiveSnapshot();
}

static SPIPlanPtr
planned(KvStatement *statement)
{
	if (statement->plan == NULL)
	{
		SPIPlanPtr	plan = SPI_prepare(statement->sql, statement->nargs, statement->argtypes);

		if (plan == NULL || SPI_keepplan(plan) != 0)
			ereport(ERROR,
					(errcode(ERRCODE_INTERNAL_ERROR),
					 errmsg("could not prepare a statement: %s", SPI_result_code_string(SPI_result))));
		statement->plan = plan;
	}
	return statement->plan;
}

static uint64
check_result(int result)
{
	if (result < 0)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR),
				 errmsg("could not run a statement: %s", SPI_result_code_string(result))));
	return SPI_processed;
}

/* Run a statement and return how many rows it processed. nulls as for SPI_execute_plan. */
uint64
kv_statement_execute(KvStatement *statement, const Datum *values, const char *nulls)
{
	return check_result(SPI_execute_plan(planned(statement), (Datum *) values, nulls, false, 0));
}

/* Run a query under a given snapshot and return how many rows it found. */
uint64
kv_statement_read(KvStatement *statement, const Datum *values, Snapshot snapshot)
{
	return check_result(SPI_execute_snapshot(planned(statement), (Datum *) values, NULL, snapshot,
											 InvalidSnapshot, true, false, 0));
}

/* Run a statement and return the first column of its first row, in SPI's memory; NULL without a row. */
Datum
kv_statement_value(KvStatement *statement, const Datum *values, const char *nulls, bool *isnull)
{
	*isnull = true;
	if (kv_statement_execute(statement, values, nulls) == 0 || SPI_tuptable == NULL)
		return (Datum) 0;
	return SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, isnull);
}
