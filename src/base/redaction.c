/*-------------------------------------------------------------------------
 * redaction.c
 *		Keeps secrets out of the server log.
 *
 * A statement is sensitive when its text names a secret (secret_text.c), or when a function
 * that takes one ran in it. Of a sensitive statement the
 * log gets the SQLSTATE and what keyvault itself says, no text of the statement, no
 * parameter, no context. To overwrite only the literals would mean to read SQL exactly
 * as the parser does; a comment with an apostrophe is enough to get it wrong. Besides,
 * whatever has the shape of a known provider's key is overwritten in every log line.
 *
 * The hook runs inside error reporting: it overwrites in place, allocates nothing and
 * throws nothing. It works on text and SQLSTATEs, never on translated phrases.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/redaction.h"

#include "access/parallel.h"
#include "access/twophase.h"
#include "access/xact.h"
#include "base/activity.h"
#include "base/error.h"
#include "base/secret_text.h"
#include "base/settings.h"
#include "miscadmin.h"
#include "port/atomics.h"
#include "storage/proc.h"
#include "tcop/tcopprot.h"

static emit_log_hook_type next_emit_log_hook = NULL;

/* The start time of the last statement in which a function took a secret. */
static TimestampTz marked_statement = 0;

/* The same of the statements whose parallel workers ran it, by the place of the leader's PGPROC. */
static pg_atomic_uint64 *marked_of_leader = NULL;

static Size
processes_max(void)
{
	return MaxBackends + NUM_AUXILIARY_PROCS + max_prepared_xacts;
}

Size
kv_redaction_shmem_size(void)
{
	return processes_max() * sizeof(pg_atomic_uint64);
}

void
kv_redaction_shmem_init(void *memory, bool found)
{
	marked_of_leader = memory;
	for (Size i = 0; !found && i < processes_max(); i++)
		pg_atomic_init_u64(&marked_of_leader[i], 0);
}

/*
 * Declare that the statement under way carries a secret, however its text hides it: what
 * the server shows of it is withheld. Holds until the session's next statement begins.
 */
void
kv_redaction_mark_statement(void)
{
	marked_statement = GetCurrentStatementStartTimestamp();
	/* The leader gets what the function returns, and begins the statement at the same time. */
	if (IsParallelWorker() && MyProc->lockGroupLeader != NULL)
		pg_atomic_write_u64(&marked_of_leader[MyProc->lockGroupLeader - ProcGlobal->allProcs], (uint64) marked_statement);
	kv_activity_withhold();
}

/* Did a function take a secret in the statement under way, here or in a parallel worker? Allocates and throws nothing. */
static bool
is_marked(void)
{
	TimestampTz now = GetCurrentStatementStartTimestamp();

	return (marked_statement != 0 && marked_statement == now) ||
		(now != 0 && MyProc != NULL && marked_of_leader != NULL &&
		 pg_atomic_read_u64(&marked_of_leader[MyProc - ProcGlobal->allProcs]) == (uint64) now);
}

/* Overwrite a text from a place on with a notice, as far as there is room. */
static void
withhold_from(char *text)
{
	static const char notice[] = "[withheld by keyvault]";
	Size		length = strlen(text);
	Size		room = Min(length, sizeof(notice) - 1);

	memcpy(text, notice, room);
	text[room] = '\0';
}

/*
 * Messages raised by keyvault itself, and by RAISE, say what their author chose to say;
 * those of the server's own functions may quote an argument.
 */
static bool
is_authored(const ErrorData *edata)
{
	return (edata->domain && strcmp(edata->domain, TEXTDOMAIN) == 0) ||
		(edata->funcname && strcmp(edata->funcname, "exec_stmt_raise") == 0);
}

/* Messages of these SQLSTATEs name objects and types, never a value. */
static bool
names_no_value(int sqlerrcode)
{
	static const int harmless[] = {
		ERRCODE_UNDEFINED_FUNCTION, ERRCODE_UNDEFINED_TABLE, ERRCODE_UNDEFINED_SCHEMA, ERRCODE_DUPLICATE_TABLE,
		ERRCODE_INSUFFICIENT_PRIVILEGE, ERRCODE_READ_ONLY_SQL_TRANSACTION, ERRCODE_DIVISION_BY_ZERO,
		ERRCODE_LOCK_NOT_AVAILABLE, ERRCODE_QUERY_CANCELED, ERRCODE_IN_FAILED_SQL_TRANSACTION,
	};

	for (size_t i = 0; i < lengthof(harmless); i++)
		if (sqlerrcode == harmless[i])
			return true;
	return ERRCODE_TO_CATEGORY(sqlerrcode) == ERRCODE_TO_CATEGORY(ERRCODE_TRANSACTION_ROLLBACK);
}

/* Fewer bytes than this, without a quote among them, are a duration and no statement. */
#define DURATION_LINE_MAX 40

/* A line that prints the statement: keep what stands before the statement's text. */
static void
withhold_statement(char *message)
{
	const char *query = debug_query_string;
	char		start[32];
	char	   *found = NULL;

	if (query && *query)
	{
		strlcpy(start, query, sizeof(start));
		found = strstr(message, start);
	}
	if (found != NULL || strlen(message) > DURATION_LINE_MAX || strpbrk(message, "'\"$(") != NULL)
		withhold_from(found ? found : message);
}

/*
 * Withhold what a sensitive statement's event may quote. The message and hint of an ERROR can
 * be replaced by constants, as they are never freed by themselves; those of other levels are.
 */
static void
withhold(ErrorData *edata)
{
	bool		authored = is_authored(edata);

	edata->hide_stmt = true;
	edata->context = NULL;
	edata->internalquery = NULL;
	edata->internalpos = 0;
	edata->detail_log = NULL;
	if (authored)
		return;
	edata->detail = NULL;
	if (edata->elevel >= ERROR && names_no_value(edata->sqlerrcode))
		return;
	if (edata->elevel == ERROR)
	{
		edata->message = "message withheld by keyvault: it may quote a secret of the statement";
		edata->hint = "The SQLSTATE and the position tell what is wrong; with keyvault.redact_logs off the message is shown, and logged.";
		return;
	}
	edata->hint = NULL;
	if (edata->elevel > ERROR)
		withhold_from(edata->message);
	else if (edata->message)
		withhold_statement(edata->message);
}

/*
 * Reports about another process print its statement, which cannot be known here to be
 * harmless: "Failed process was running" and the statements of a deadlock.
 */
static void
withhold_other_process(ErrorData *edata)
{
	if (edata->sqlerrcode == ERRCODE_T_R_DEADLOCK_DETECTED)
		edata->detail_log = NULL;
	else if (MyProcPid == PostmasterPid && edata->elevel == LOG)
		edata->detail = NULL;
}

/* debug_print_parse and its like spell literals as byte numbers, before any function has run. */
static bool
prints_a_tree(const ErrorData *edata)
{
	return edata->elevel == LOG && edata->detail != NULL && strstr(edata->detail, ":constvalue ") != NULL;
}

static void
redact(ErrorData *edata)
{
	char	   *fields[] = {
		edata->message, edata->detail, edata->detail_log, edata->hint,
		edata->context, edata->internalquery,
	};
	bool		sensitive = kv_activity_names_secret() || prints_a_tree(edata) || is_marked();

	for (size_t i = 0; i < lengthof(fields); i++)
		if (fields[i])
			kv_secret_text_scrub_key_shapes(fields[i]);
	if (kv_activity_has_key_shape())
		edata->hide_stmt = true;
	withhold_other_process(edata);
	if (sensitive || (!is_authored(edata) &&
					  (kv_secret_text_names_secret(edata->message) || kv_secret_text_names_secret(edata->detail) ||
					   kv_secret_text_names_secret(edata->context) || kv_secret_text_names_secret(edata->internalquery))))
		withhold(edata);
}

static void
emit_log(ErrorData *edata)
{
	/* Where a transaction has failed already, its next statements meet no other hook. */
	if (edata->elevel >= ERROR)
		kv_activity_withhold_where_sensitive();
	if (kv_redact_logs)
		redact(edata);
	if (next_emit_log_hook)
		next_emit_log_hook(edata);
}

/* Install the log hook; in the postmaster, so that every process inherits it. */
void
kv_redaction_init(void)
{
	next_emit_log_hook = emit_log_hook;
	emit_log_hook = emit_log;
}
