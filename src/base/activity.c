/*-------------------------------------------------------------------------
 * activity.c
 *		Keeps secrets out of pg_stat_activity, pg_stat_statements and the names of plans.
 *
 * The server puts a statement's text into shared memory when its message arrives: there it
 * is overwritten, over the whole width, as soon as the statement is parsed, and whenever a
 * later message has put it there again. A text without a literal shows no secret and stays.
 * pg_stat_statements takes constants out of the statements that it can; of a utility
 * statement with a literal it is told nothing.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/activity.h"

#include "access/xact.h"
#include "base/pg_version.h"
#include "base/plan_text.h"
#include "base/secret_text.h"
#include "base/settings.h"
#include "executor/executor.h"
#include "parser/analyze.h"
#include "tcop/tcopprot.h"
#include "tcop/utility.h"
#include "utils/backend_status.h"

static post_parse_analyze_hook_type next_post_parse_analyze = NULL;
static ExecutorStart_hook_type next_executor_start = NULL;
static ExecutorRun_hook_type next_executor_run = NULL;
static ProcessUtility_hook_type next_process_utility = NULL;

/*
 * What is known of the text under way. A statement that runs a million others is one text, which may be long: it is
 * searched once, not for each of them. Each message has a start time of its own.
 */
static struct
{
	const char *text;
	TimestampTz since;
	bool		names_secret;
	bool		has_key_shape;
}			known;

static void
know_text(void)
{
	TimestampTz since = GetCurrentStatementStartTimestamp();

	if (known.text == debug_query_string && known.since == since)
		return;
	known.names_secret = kv_secret_text_names_secret(debug_query_string);
	known.has_key_shape = debug_query_string && kv_secret_text_has_key_shape(debug_query_string);
	known.text = debug_query_string;
	known.since = since;
}

/* Does the text under way name a function that takes a secret? Allocates and throws nothing. */
bool
kv_activity_names_secret(void)
{
	know_text();
	return known.names_secret;
}

/* Does it hold something of a known key's shape? Allocates and throws nothing. */
bool
kv_activity_has_key_shape(void)
{
	know_text();
	return known.has_key_shape;
}

/* Does the text hold a string literal, quoted in whatever way? $1 is a parameter. */
static bool
holds_literal(const char *text)
{
	if (strchr(text, '\'') != NULL)
		return true;
	for (text = strchr(text, '$'); text != NULL; text = strchr(text + 1, '$'))
		if (text[1] < '0' || text[1] > '9')
			return true;
	return false;
}

static bool
may_show_secret(const char *text, const char *statement)
{
	return holds_literal(text) &&
		(kv_secret_text_names_secret(statement) || kv_secret_text_has_key_shape(text));
}

/* Overwrite what pg_stat_activity shows of the statement under way. Allocates and throws nothing. */
void
kv_activity_withhold(void)
{
	static const char notice[] = "[withheld by keyvault]";

	if (!kv_redact_logs || MyBEEntry == NULL || MyBEEntry->st_activity_raw == NULL ||
		!holds_literal(MyBEEntry->st_activity_raw))
		return;
	PGSTAT_BEGIN_WRITE_ACTIVITY(MyBEEntry);
	memset(MyBEEntry->st_activity_raw, 0, pgstat_track_activity_query_size);
	strlcpy(MyBEEntry->st_activity_raw, notice, pgstat_track_activity_query_size);
	PGSTAT_END_WRITE_ACTIVITY(MyBEEntry);
}

/* Overwrite it if the statement may carry a secret. Allocates and throws nothing. */
void
kv_activity_withhold_where_sensitive(void)
{
	const char *text = MyBEEntry ? MyBEEntry->st_activity_raw : NULL;

	if (!kv_redact_logs || text == NULL || !holds_literal(text))
		return;
	if (debug_query_string ? kv_activity_names_secret() || kv_activity_has_key_shape() : may_show_secret(text, text))
		kv_activity_withhold();
}

/* Does the source of a statement, the text under way or one of a function's, show a secret? */
static bool
source_may_show_secret(const char *text)
{
	if (!kv_redact_logs || text == NULL || !holds_literal(text))
		return false;
	return text == debug_query_string ? kv_activity_names_secret() || kv_activity_has_key_shape() : may_show_secret(text, text);
}

/*
 * Does this process keep a statement that shows a secret, of which plans may be made? And has one been parsed in this
 * transaction? Its plan comes later, and without any hook where PL/pgSQL takes it for a mere expression.
 */
static bool keeps_secret_text = false;
static bool awaits_plan = false;

/* A statement with this source was parsed. */
static void
withhold_plans(const char *text)
{
	if (!source_may_show_secret(text))
		return;
	if (kv_plan_text_withhold(source_may_show_secret))
		keeps_secret_text = true;
	awaits_plan = keeps_secret_text;
}

/* A statement with this source is about to run: if it is of a plan, that may have been made since it was parsed. */
static void
withhold_plan_of(PlannedStmt *statement, const char *text)
{
	if (keeps_secret_text && source_may_show_secret(text))
		kv_plan_text_withhold_of(statement, source_may_show_secret);
}

/* A statement with a syntax error meets no other hook, and no log hook where errors are not logged. */
static void
at_subtransaction_end(SubXactEvent event, SubTransactionId id, SubTransactionId parent, void *arg)
{
	if (event == SUBXACT_EVENT_ABORT_SUB)
		kv_activity_withhold_where_sensitive();
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	if (event == XACT_EVENT_ABORT)
		kv_activity_withhold_where_sensitive();
	if (awaits_plan)
		(void) kv_plan_text_withhold(source_may_show_secret);
	awaits_plan = false;
}

static void
post_parse_analyze(ParseState *pstate, Query *query, JumbleState *jumble)
{
	kv_activity_withhold_where_sensitive();
	withhold_plans(pstate->p_sourcetext);
	/* Whichever of the two libraries was loaded first: pg_stat_statements passes over what has no id. */
	if (query->commandType == CMD_UTILITY && source_may_show_secret(pstate->p_sourcetext))
		query->queryId = UINT64CONST(0);
	if (next_post_parse_analyze)
		next_post_parse_analyze(pstate, query, jumble);
}

static void
executor_start(QueryDesc *query, int flags)
{
	kv_activity_withhold_where_sensitive();
	withhold_plan_of(query->plannedstmt, query->sourceText);
	if (next_executor_start)
		next_executor_start(query, flags);
	else
		standard_ExecutorStart(query, flags);
}

static void
executor_run(KV_EXECUTOR_RUN_PARAMETERS)
{
	kv_activity_withhold_where_sensitive();
	if (next_executor_run)
		next_executor_run(KV_EXECUTOR_RUN_ARGUMENTS);
	else
		standard_ExecutorRun(KV_EXECUTOR_RUN_ARGUMENTS);
}

static void
process_utility(PlannedStmt *statement, const char *text, bool read_only_tree, ProcessUtilityContext context,
				ParamListInfo parameters, QueryEnvironment *environment, DestReceiver *receiver,
				QueryCompletion *completion)
{
	kv_activity_withhold_where_sensitive();
	withhold_plan_of(statement, text);
	if (next_process_utility)
		next_process_utility(statement, text, read_only_tree, context, parameters, environment, receiver, completion);
	else
		standard_ProcessUtility(statement, text, read_only_tree, context, parameters, environment, receiver, completion);
}

/* Install the hooks; in the postmaster, so that every process inherits them. */
void
kv_activity_init(void)
{
	next_post_parse_analyze = post_parse_analyze_hook;
	post_parse_analyze_hook = post_parse_analyze;
	next_executor_start = ExecutorStart_hook;
	ExecutorStart_hook = executor_start;
	next_executor_run = ExecutorRun_hook;
	ExecutorRun_hook = executor_run;
	next_process_utility = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
}
