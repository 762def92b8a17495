/*-------------------------------------------------------------------------
 * secret_text.c
 *		Which texts may hold a secret.
 *
 * A statement's text does when it names a function that takes a secret or executes a
 * prepared statement; any text does that holds something of a known provider's key's
 * shape. This is called while errors are reported: nothing here allocates or throws.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/secret_text.h"

#include <ctype.h>

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
	{"api_key", false}, {"platform_key", false}, {"issued_key", false}, {"recovery_bundle", false}, {"u&\"", false},
	{"request", true}, {"call", true},
};

/* With which these words, and EXECUTE, begin: most bytes of a text need no closer look. */
static const bool is_first_letter[256] = {
	['a'] = true, ['p'] = true, ['i'] = true, ['u'] = true, ['r'] = true, ['c'] = true, ['e'] = true,
	['A'] = true, ['P'] = true, ['I'] = true, ['U'] = true, ['R'] = true, ['C'] = true, ['E'] = true,
};

/* What makes "api_key" the name of a column or a view. */
static const char *const harmless_after_word[] = {"_id", "_status"};

/* Words behind EXECUTE that make it something else than running a prepared statement. */
static const char *const harmless_after_execute[] = {"on", "function", "procedure"};

/* How keys of the known providers, and our own, begin. */
static const char *const key_prefixes[] = {
	"sk-", "AIza", "xai-", "gsk_", "xan_",
};

/* With which these prefixes begin. */
static const char prefix_letters[] = "sAxg";

/* Fewer characters than this behind a prefix are taken for ordinary text. */
#define KEY_SHAPE_MIN 16

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

/* Is the EXECUTE that ends here in a line of CONTEXT that says where in a PL/pgSQL function it is? */
static bool
locates_in_plpgsql(const char *text, const char *end)
{
	const char *line = end;
	char		stop = end[strcspn(end, "'\"(;\n")];

	if (stop != '\n' && stop != '\0')
		return false;			/* it goes on as a statement does */
	while (line > text && line[-1] != '\n')
		line--;
	for (; line < end; line++)
		if (begins_with(line, "pl/pgsql"))
			return true;
	return false;
}

/* Does the text run a prepared statement at p, as far as can be told from here? */
static bool
executes_prepared(const char *text, const char *p)
{
	const char *end = p + strlen("execute");

	if (!begins_with(p, "execute") || is_word_byte(*end) || locates_in_plpgsql(text, end))
		return false;
	if (p - text >= 7 && strncmp(p - 7, "cannot ", 7) == 0)
		return false;			/* the server's messages say "cannot execute MERGE ..." */
	p = skip_space(end);
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

/* Does the text name a function that takes a secret, or execute a prepared statement? */
bool
kv_secret_text_names_secret(const char *text)
{
	if (text == NULL)
		return false;
	for (const char *p = text; *p; p++)
	{
		if (!is_first_letter[(unsigned char) *p])
			continue;
		if (p > text && is_word_byte(p[-1]) && p[0] != '_' && p[-1] != '_')
			continue;			/* within a word */
		for (size_t i = 0; i < lengthof(sensitive_words); i++)
			if (is_sensitive_word(p, &sensitive_words[i]))
				return true;
		if (executes_prepared(text, p))
			return true;
	}
	return false;
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
	for (; (p = strpbrk(p, prefix_letters)) != NULL; p++)
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

/* Does the text hold something of a known key's shape? */
bool
kv_secret_text_has_key_shape(const char *text)
{
	Size		length;

	return find_key_shape(text, text, &length) != NULL;
}

/* Overwrite what follows a provider's key prefix, wherever it stands. */
void
kv_secret_text_scrub_key_shapes(char *text)
{
	Size		length;

	for (const char *key = text; (key = find_key_shape(text, key, &length)) != NULL; key += length)
		memset(text + (key - text), KV_SECRET_TEXT_MASK, length);
}

/* How many bytes of JSON from here are this character, itself or an escape (RFC 8259, section 7); 0 when they are another. */
static Size
spelled_length(const char *text, const char *end, char character)
{
	static const char digits[] = "0123456789abcdef";

	if (text == end || *text != '\\')
		return text < end && *text == character ? 1 : 0;
	if (end - text >= 2 && text[1] == character && strchr("\"\\/", character))
		return 2;
	/* Bit 0x20 makes a letter small, and is set in a digit. */
	return end - text >= 6 && memcmp(text, "\\u00", 4) == 0 &&
		(text[4] | 0x20) == digits[(unsigned char) character >> 4] && (text[5] | 0x20) == digits[character & 15] ? 6 : 0;
}

/* Where a secret ends that begins here, however JSON spells it; NULL when none does. */
static char *
spelled_end(char *text, const char *end, const char *secret)
{
	for (; *secret; secret++)
	{
		Size		length = spelled_length(text, end, *secret);

		if (length == 0)
			return NULL;
		text += length;
	}
	return text;
}

/* Overwrite every occurrence of a secret in JSON, spelled with escapes too. What was JSON stays JSON. */
void
kv_secret_text_scrub_json(char *text, Size length, const char *secret)
{
	char	   *end = text + length;

	while (*secret && text < end)
	{
		char	   *behind;

		if (*text != *secret && *text != '\\')
			text++;
		else if ((behind = spelled_end(text, end, secret)) != NULL)
		{
			memset(text, KV_SECRET_TEXT_MASK, behind - text);
			text = behind;
		}
		else if (*text == '\\')
			text += end - text >= 6 && text[1] == 'u' ? 6 : Min(2, end - text);
		else
			text++;
	}
}
