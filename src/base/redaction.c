/*-------------------------------------------------------------------------
 * redaction.c
 *		Keeps secrets out of the server log.
 *
 * A statement is sensitive when its text calls a function that takes a secret, when it
 * executes a prepared statement that does, or when such a function ran in it. Every
 * literal of a sensitive statement is overwritten in each field of what is logged, and
 * the STATEMENT line is left out. Besides, whatever has the shape of a provider's key is
 * overwritten in every log line.
 *
 * The hook runs inside error reporting: it overwrites in place, allocates nothing and
 * throws nothing. It works on text, never on translated phrases.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/redaction.h"

#include <ctype.h>

#include "access/xact.h"
#include "base/error.h"
#include "base/settings.h"
#include "commands/prepare.h"
#include "tcop/tcopprot.h"
#include "utils/plancache.h"

/* Words of statements that carry a secret; '(' stands for white space and a parenthesis. */
static const char *const sensitive_words[] = {
	"api_key", "platform_key", "issued_key", "request(", "call(",
};

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

/* Does text at p spell word, in any case? */
static bool
word_at(const char *p, const char *word)
{
	for (; *word; word++, p++)
	{
		if (*word == '(')
		{
			while (isspace((unsigned char) *p))
				p++;
			return *p == '(';
		}
		if (tolower((unsigned char) *p) != *word)
			return false;
	}
	return true;
}

static bool
names_a_secret(const char *text)
{
	if (text == NULL)
		return false;
	for (const char *p = text; *p; p++)
		for (int i = 0; i < lengthof(sensitive_words); i++)
			if (word_at(p, sensitive_words[i]))
				return true;
	return false;
}

/* Read the SQL identifier at p as the parser would fold it; false if none fits. */
static bool
read_identifier(const char *p, char *name)
{
	int			length = 0;
	bool		quoted = (*p == '"');

	for (p += quoted; *p; p++)
	{
		if (quoted ? (*p == '"' && *++p != '"') : !(isalnum((unsigned char) *p) || *p == '_' || *p == '$' || IS_HIGHBIT_SET(*p)))
			break;
		if (length == NAMEDATALEN - 1)
			return false;
		name[length++] = quoted || IS_HIGHBIT_SET(*p) ? *p : tolower((unsigned char) *p);
	}
	name[length] = '\0';
	return length > 0;
}

/* Does text execute a prepared statement whose own text is sensitive? */
static bool
executes_a_secret(const char *text)
{
	char		name[NAMEDATALEN];

	for (const char *p = text; p && *p; p++)
	{
		PreparedStatement *prepared;

		if (!word_at(p, "execute") || !isspace((unsigned char) p[strlen("execute")]))
			continue;
		p += strlen("execute");
		while (isspace((unsigned char) *p))
			p++;
		if (read_identifier(p, name) &&
			(prepared = FetchPreparedStatement(name, false)) != NULL &&
			names_a_secret(prepared->plansource->query_string))
			return true;
		if (*p == '\0')
			break;
	}
	return false;
}

/* Overwrite from p to the closing quote, a doubled quote or a backslash pair not being one. */
static char *
scrub_quoted(char *p, char quote, bool backslashes)
{
	for (; *p; p++)
	{
		if (*p == quote && p[1] != quote)
			return p;
		if ((*p == quote || (backslashes && *p == '\\')) && p[1] != '\0')
			*p++ = KV_REDACTED_BYTE;
		*p = KV_REDACTED_BYTE;
	}
	return p - 1;
}

/* Overwrite a $tag$...$tag$ literal that begins at p; returns its last byte, or p if it is none. */
static char *
scrub_dollar_quoted(char *p)
{
	char	   *body = p + 1;
	char	   *end;
	Size		tag;

	while (isalnum((unsigned char) *body) || *body == '_' || IS_HIGHBIT_SET(*body))
		body++;
	if (*body != '$' || isdigit((unsigned char) p[1]))
		return p;
	body++;
	tag = body - p;
	for (end = body; *end; end++)
	{
		if (strncmp(end, p, tag) == 0)
			return end + tag - 1;
		*end = KV_REDACTED_BYTE;
	}
	return end - 1;
}

/* Overwrite the contents of every string literal, and of "..." where double_quotes says so. */
static void
scrub_literals(char *text, bool double_quotes)
{
	if (text == NULL)
		return;
	for (char *p = text; *p; p++)
	{
		if (*p == '\'')
			p = scrub_quoted(p + 1, '\'', p > text && (p[-1] == 'E' || p[-1] == 'e'));
		else if (*p == '"' && double_quotes)
			p = scrub_quoted(p + 1, '"', false);
		else if (*p == '$')
			p = scrub_dollar_quoted(p);
	}
}

/* Overwrite a whole field: it may echo an argument without quotes around it. */
static void
scrub_all(char *text)
{
	static const char notice[] = "withheld by keyvault";

	if (text == NULL)
		return;
	for (Size i = 0; text[i]; i++)
	{
		if (i == lengthof(notice) - 1)
		{
			text[i] = '\0';
			break;
		}
		text[i] = notice[i];
	}
}

/* Overwrite what follows a provider's key prefix, wherever it stands. */
static void
scrub_key_shapes(char *text)
{
	if (text == NULL)
		return;
	for (char *p = text; *p; p++)
	{
		if (p > text && isalnum((unsigned char) p[-1]))
			continue;
		for (int i = 0; i < lengthof(key_prefixes); i++)
		{
			Size		prefix = strlen(key_prefixes[i]);
			Size		length = 0;

			if (strncmp(p, key_prefixes[i], prefix) != 0)
				continue;
			while (isalnum((unsigned char) p[prefix + length]) || p[prefix + length] == '-' || p[prefix + length] == '_')
				length++;
			if (length >= KEY_SHAPE_MIN)
			{
				memset(p + prefix, KV_REDACTED_BYTE, length);
				p += prefix + length - 1;
				break;
			}
		}
	}
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
message_is_authored(const ErrorData *edata)
{
	const char *domain = edata->domain;

	return (domain && strcmp(domain, TEXTDOMAIN) == 0) ||
		(edata->funcname && strcmp(edata->funcname, "exec_stmt_raise") == 0);
}

/* A LOG line prints statements, plans and their parameters, all with quoted literals. */
static void
scrub_log_line(ErrorData *edata)
{
	scrub_literals(edata->message, false);
	if (edata->detail && strstr(edata->detail, ":constvalue"))
		scrub_all(edata->detail);	/* debug_print_parse spells literals as byte numbers */
	scrub_literals(edata->detail, false);
	scrub_literals(edata->detail_log, false);
	scrub_literals(edata->hint, false);
	scrub_literals(edata->context, false);
	scrub_literals(edata->internalquery, false);
}

/* An error may quote an argument in its message, and show it bare in its detail or context. */
static void
scrub_error(ErrorData *edata)
{
	if (!message_is_authored(edata))
	{
		scrub_literals(edata->message, true);
		scrub_all(edata->detail);
		scrub_all(edata->detail_log);
		scrub_literals(edata->hint, true);
		scrub_all(edata->context);
	}
	scrub_literals(edata->context, false);
	scrub_literals(edata->internalquery, false);
}

static void
redact(ErrorData *edata)
{
	char	   *fields[] = {
		edata->message, edata->detail, edata->detail_log, edata->hint,
		edata->context, edata->internalquery,
	};
	bool		named = false;

	for (int i = 0; i < lengthof(fields); i++)
		named = named || names_a_secret(fields[i]);

	if (named || names_a_secret(debug_query_string) || executes_a_secret(debug_query_string) ||
		(marked_statement != 0 && marked_statement == GetCurrentStatementStartTimestamp()))
	{
		edata->hide_stmt = true;
		if (edata->elevel == LOG || edata->elevel == LOG_SERVER_ONLY)
			scrub_log_line(edata);
		else
			scrub_error(edata);
	}
	for (int i = 0; i < lengthof(fields); i++)
		scrub_key_shapes(fields[i]);
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
