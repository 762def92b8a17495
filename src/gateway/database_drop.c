/*-------------------------------------------------------------------------
 * database_drop.c
 *		Lets databases be dropped, moved, renamed and copied although they have a worker,
 *		and wakes the worker at COMMIT PREPARED.
 *
 * These commands need a database without connections. Before they run, its worker is
 * asked to leave; the calls it has under way end as unknown.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/database_drop.h"

#include "access/htup_details.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_database.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "gateway/worker_slot.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/syscache.h"
#include "vault/key_use.h"

static ProcessUtility_hook_type next_process_utility = NULL;

/* The database that a command needs without connections, or InvalidOid. */
static Oid
database_to_vacate(Node *command)
{
	const char *name = NULL;

	if (IsA(command, DropdbStmt))
		name = castNode(DropdbStmt, command)->dbname;
	else if (IsA(command, RenameStmt) && castNode(RenameStmt, command)->renameType == OBJECT_DATABASE)
		name = castNode(RenameStmt, command)->subname;
	else if (IsA(command, AlterDatabaseStmt))
	{
		ListCell   *cell;

		foreach(cell, castNode(AlterDatabaseStmt, command)->options)
			if (strcmp(lfirst_node(DefElem, cell)->defname, "tablespace") == 0)
				name = castNode(AlterDatabaseStmt, command)->dbname;
	}
	else if (IsA(command, CreatedbStmt))
	{
		ListCell   *cell;

		name = "template1";
		foreach(cell, castNode(CreatedbStmt, command)->options)
			if (strcmp(lfirst_node(DefElem, cell)->defname, "template") == 0 && lfirst_node(DefElem, cell)->arg)
				name = defGetString(lfirst_node(DefElem, cell));
	}
	return name ? get_database_oid(name, true) : InvalidOid;
}

static bool
may_create_databases(void)
{
	HeapTuple	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(GetUserId()));
	bool		allowed = superuser();

	if (!HeapTupleIsValid(tuple))
		return false;
	allowed = allowed || ((Form_pg_authid) GETSTRUCT(tuple))->rolcreatedb;
	ReleaseSysCache(tuple);
	return allowed;
}

/* Only who may run the command may stop the worker. */
static bool
may_vacate(Oid database, bool to_copy)
{
	HeapTuple	tuple = SearchSysCache1(DATABASEOID, ObjectIdGetDatum(database));
	Form_pg_database row;
	bool		allowed;

	if (!HeapTupleIsValid(tuple))
		return false;
	row = (Form_pg_database) GETSTRUCT(tuple);
	allowed = (to_copy && row->datistemplate) || has_privs_of_role(GetUserId(), row->datdba);
	ReleaseSysCache(tuple);
	return allowed && (!to_copy || may_create_databases()) && database != MyDatabaseId;
}

static void
run_utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree, ProcessUtilityContext context,
			ParamListInfo params, QueryEnvironment *environment, DestReceiver *destination, QueryCompletion *completion)
{
	if (next_process_utility)
		next_process_utility(pstmt, query_string, read_only_tree, context, params, environment, destination, completion);
	else
		standard_ProcessUtility(pstmt, query_string, read_only_tree, context, params, environment, destination, completion);
}

static void
process_utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree, ProcessUtilityContext context,
				ParamListInfo params, QueryEnvironment *environment, DestReceiver *destination, QueryCompletion *completion)
{
	Node	   *command = pstmt->utilityStmt;
	Oid			database = context == PROCESS_UTILITY_TOPLEVEL ? database_to_vacate(command) : InvalidOid;

	if (OidIsValid(database) && may_vacate(database, IsA(command, CreatedbStmt)))
	{
		bool		still_there = true;

		kv_worker_stop(database);
		PG_TRY();
		{
			run_utility(pstmt, query_string, read_only_tree, context, params, environment, destination, completion);
			still_there = !IsA(command, DropdbStmt);
		}
		PG_FINALLY();
		{
			kv_worker_stop_end(database, still_there);
			if (!still_there)
				kv_key_use_forget_database(database);
			else if (!IsA(command, CreatedbStmt))
				kv_worker_wake(database);
		}
		PG_END_TRY();
		return;
	}
	run_utility(pstmt, query_string, read_only_tree, context, params, environment, destination, completion);
	if (IsA(command, TransactionStmt) && castNode(TransactionStmt, command)->kind == TRANS_STMT_COMMIT_PREPARED)
		kv_worker_wake(MyDatabaseId);
}

/* Install the hook; called once, while the server preloads the library. */
void
kv_database_drop_init(void)
{
	next_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
}
