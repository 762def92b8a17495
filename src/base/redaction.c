/*-------------------------------------------------------------------------
 * redaction.c
 *		Keeps secrets out of the server log.
 *
 * A statement is sensitive when its text names a function that takes a secret or executes
 * a prepared statement, or when such a function ran in it. Of a sensitive statement the
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

#include <ctype.h>

#include "access/xact.h"
#include "base/error.h"
#include "base/settings.h"
#include "tcop/tcopprot.h"
#include "miscadmin.h"

/*
 * Words of statements that carry a secret. A call is the word with a parenthesis behind it,
 * quotes, white space and comments apart; U&" can spell any name.
 */
typedef struct SensitiveWord
{
	const char *word;
	bool		is_call;
} SensitiveWord;

static const SensitiveWord sensitive_words[] = {
	{"api_key", false}, {"platform_key", false}, {"issued_key", false}, {"u&\"", false},
	{"request", true}, {"call", true},
};

/* What makes "api_key" the name of a column or a view. */
static const char *const harmless_after_word[] = {"_id", "_status"};

/* Words behind EXECUTE that make it something else than running a prepared statement. */
static const char *const harmless_after_execute[] = {"on", "function", "procedure"};

/* How keys of the known providers, and our own, begin. */
static const char *const key_prefixes[] = {
	"sk-", "AIza", "xai-", "gsk_", "xan_",
};

/* Fewer characters than this behind a prefix are taken for ordinary text. */
#define KEY_SHAPE_MIN 16

static emit_log_hook_type next_emit_log_hook = NULL;

/* The start time of the last statement in which a function took a secret. */
static TimestampTz marked_statement = 0;

/*
 * Declare that the statement under way carries a secret, however its text hides it.
 * Holds until the session's next statement begins.
 */
void
kv_redaction_mark_statement(void)
{
	marked_statement = GetCurrentStatementStartTimestamp();
}

static bool
is_word_byte(char c)
{
	return isalnum((unsigned char) c) || c == '_' || c == '$' || IS_HIGHBIT_SET(c);
}

/* Does the text at p begin with a word, in any case? */
static bool
begins_with(const char *p, const char *word)
{
	for (; *word; word++, p++)
		if (tolower((unsigned char) *p) != *word)
			return false;
	return true;
}

/* The first byte behind the comment that begins at p; comments nest. */
static const char *
skip_comment(const char *p)
{
	int			depth = 0;

	do
	{
		if (p[0] == '/' && p[1] == '*')
		{
			depth++;
			p += 2;
		}
		else if (p[0] == '*' && p[1] == '/')
		{
			depth--;
			p += 2;
		}
		else
			p++;
	} while (*p && depth > 0);
	return p;
}

/* The first byte from p on that is no quote, white space or comment. */
static const char *
skip_space(const char *p)
{
	for (;;)
	{
		if (isspace((unsigned char) *p) || *p == '"')
			p++;
		else if (p[0] == '-' && p[1] == '-')
			p += strcspn(p, "\r\n");
		else if (p[0] == '/' && p[1] == '*')
			p = skip_comment(p);
		else
			return p;
	}
}

/* Does the text at p run a prepared statement, as far as can be told from here? */
static bool
executes_prepared(const char *p)
{
	if (!begins_with(p, "execute") || is_word_byte(p[strlen("execute")]))
		return false;
	p = skip_space(p + strlen("execute"));
	for (size_t i = 0; i < lengthof(harmless_after_execute); i++)
		if (begins_with(p, harmless_after_execute[i]) && !is_word_byte(p[strlen(harmless_after_execute[i])]))
			return false;
	return true;
}

static bool
is_sensitive_word(const char *p, const SensitiveWord *sensitive)
{
	const char *end = p + strlen(sensitive->word);

	if (!begins_with(p, sensitive->word))
		return false;
	for (size_t i = 0; i < lengthof(harmless_after_word); i++)
		if (begins_with(end, harmless_after_word[i]))
			return false;
	return !sensitive->is_call || *skip_space(end) == '(';
}

static bool
names_a_secret(const char *text)
{
	if (text == NULL)
		return false;
	for (const char *p = text; *p; p++)
	{
		if (p > text && is_word_byte(p[-1]) && p[0] != '_' && p[-1] != '_')
			continue;			/* within a word */
		for (size_t i = 0; i < lengthof(sensitive_words); i++)
			if (is_sensitive_word(p, &sensitive_words[i]))
				return true;
		if (executes_prepared(p))
			return true;
	}
	return false;
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

/* Is p inside a word, an escape such as \n or %3D before it not being part of one? */
static bool
is_inside_word(const char *text, const char *p)
{
	if (p == text || !isalnum((unsigned char) p[-1]))
		return false;
	return !(p - text >= 2 && p[-2] == '\\') && !(p - text >= 3 && p[-3] == '%');
}

/* The next text of a known key's shape, from p on: what follows its prefix. NULL when there is none. */
static const char *
find_key_shape(const char *text, const char *p, Size *length)
{
	for (; *p; p++)
	{
		if (is_inside_word(text, p))
			continue;
		for (size_t i = 0; i < lengthof(key_prefixes); i++)
		{
			const char *key = p + strlen(key_prefixes[i]);

			if (strncmp(p, key_prefixes[i], key - p) != 0)
				continue;
			for (*length = 0; isalnum((unsigned char) key[*length]) || key[*length] == '-' || key[*length] == '_';)
				(*length)++;
			if (*length >= KEY_SHAPE_MIN)
				return key;
		}
	}
	return NULL;
}

/* Overwrite what follows a provider's key prefix, wherever it stands. */
static void
scrub_key_shapes(char *text)
{
	Size		length;

	for (const char *key = text; (key = find_key_shape(text, key, &length)) != NULL; key += length)
		memset(text + (key - text), KV_REDACTED_BYTE, length);
}

/* Overwrite every occurrence of a secret in text; returns how many there were. */
Size
kv_redaction_scrub_value(char *text, Size length, const char *secret)
{
	Size		secret_length = strlen(secret);
	Size		found = 0;

	if (secret_length == 0 || length < secret_length)
		return 0;
	for (char *p = text, *last = text + length - secret_length; p <= last; p++)
	{
		p = memchr(p, *secret, last - p + 1);
		if (p == NULL)
			break;
		if (memcmp(p, secret, secret_length) == 0)
		{
			memset(p, KV_REDACTED_BYTE, secret_length);
			found++;
		}
	}
	return found;
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
		ERRCODE_LOCK_NOT_AVAILABLE, ERRCODE_QUERY_CANCELED,
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
	Size		length;
	bool		sensitive = names_a_secret(debug_query_string) || prints_a_tree(edata) ||
		(marked_statement != 0 && marked_statement == GetCurrentStatementStartTimestamp());

	for (size_t i = 0; i < lengthof(fields); i++)
		if (fields[i])
			scrub_key_shapes(fields[i]);
	if (debug_query_string && find_key_shape(debug_query_string, debug_query_string, &length))
		edata->hide_stmt = true;
	withhold_other_process(edata);
	if (sensitive || (!is_authored(edata) &&
					  (names_a_secret(edata->message) || names_a_secret(edata->detail) ||
					   names_a_secret(edata->context) || names_a_secret(edata->internalquery))))
		withhold(edata);
}

static void
emit_log(ErrorData *edata)
{
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
