/*-------------------------------------------------------------------------
 * partition_restore.c
 *		Lets pg_restore bring the partitions of usage_records without an error.
 *
 * pg_dump makes a partition's primary key with a command of its own, after the data. The
 * parent comes from CREATE EXTENSION with its key, so that ATTACH PARTITION has made the
 * partition's already: the command that asks for it again is passed over.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "credit/partition_restore.h"

#include "access/relation.h"
#include "base/catalogue.h"
#include "base/error.h"
#include "catalog/namespace.h"
#include "catalog/partition.h"
#include "nodes/parsenodes.h"
#include "tcop/utility.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/relcache.h"

static ProcessUtility_hook_type next_process_utility = NULL;

/* Does a command do nothing but add a primary key? */
static bool
adds_primary_key(const AlterTableStmt *command)
{
	AlterTableCmd *step;

	if (command->objtype != OBJECT_TABLE || list_length(command->cmds) != 1)
		return false;
	step = linitial_node(AlterTableCmd, command->cmds);
	return step->subtype == AT_AddConstraint && IsA(step->def, Constraint) &&
		castNode(Constraint, step->def)->contype == CONSTR_PRIMARY;
}

/* Is the table a partition of keyvault.usage_records that has its primary key? */
static bool
has_inherited_key(const RangeVar *name)
{
	static KvRelation usage_records = {"usage_records"};
	Oid			table = RangeVarGetRelid(name, NoLock, true);
	Oid			parent;
	Relation	relation;
	bool		has_key = false;

	if (!OidIsValid(table) || !get_rel_relispartition(table))
		return false;
	parent = kv_relation_find(&usage_records);
	relation = try_relation_open(table, AccessShareLock);
	if (relation == NULL)
		return false;
	if (relation->rd_rel->relispartition && get_partition_parent(table, true) == parent)
	{
		(void) RelationGetIndexList(relation);
		has_key = OidIsValid(relation->rd_pkindex);
	}
	relation_close(relation, AccessShareLock);
	return has_key;
}

static void
process_utility(PlannedStmt *pstmt, const char *query_string, bool read_only_tree, ProcessUtilityContext context,
				ParamListInfo params, QueryEnvironment *environment, DestReceiver *destination, QueryCompletion *completion)
{
	Node	   *command = pstmt->utilityStmt;

	if (IsA(command, AlterTableStmt) && adds_primary_key(castNode(AlterTableStmt, command)) &&
		has_inherited_key(castNode(AlterTableStmt, command)->relation))
	{
		ereport(DEBUG1,
				(errmsg_internal("partition of keyvault.usage_records has its primary key from its parent")));
		return;
	}
	if (next_process_utility)
		next_process_utility(pstmt, query_string, read_only_tree, context, params, environment, destination, completion);
	else
		standard_ProcessUtility(pstmt, query_string, read_only_tree, context, params, environment, destination, completion);
}

/* Install the hook; called once, while the server preloads the library. */
void
kv_partition_restore_init(void)
{
	next_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
}
