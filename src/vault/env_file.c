/*-------------------------------------------------------------------------
 * env_file.c
 *		The text of a .env file: read, and changed with all else left as it was.
 *
 * Means what the npm package dotenv makes of the same bytes, with ASCII white space. Where
 * the text matches no rule, the line is passed over. Reading is linear in the length: a
 * quote that begins a value ends the search for the same quote of an earlier one.
 * These functions allocate nothing, throw nothing and know no file.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/env_file.h"

#include <string.h>

static bool
is_line_break(char c)
{
	return c == '\n' || c == '\r';
}

static bool
is_space(char c)
{
	return c == ' ' || (c >= '\t' && c <= '\r');
}

static bool
is_name_byte(char c)
{
	return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
		c == '_' || c == '.' || c == '-';
}

static bool
is_quote(char c)
{
	return c == '\'' || c == '"' || c == '`';
}

/* Begin to read a text, behind its byte order mark if it has one. */
void
kv_env_file_begin(KvEnvText *text, const char *bytes, Size length)
{
	text->text = bytes;
	text->length = length;
	text->position = length >= 3 && memcmp(bytes, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0;
	text->line = 1;
}

static Size
skip_space(const KvEnvText *text, Size p)
{
	while (p < text->length && is_space(text->text[p]))
		p++;
	return p;
}

static Size
skip_space_in_line(const KvEnvText *text, Size p)
{
	while (p < text->length && is_space(text->text[p]) && !is_line_break(text->text[p]))
		p++;
	return p;
}

static Size
end_of_line(const KvEnvText *text, Size p)
{
	while (p < text->length && !is_line_break(text->text[p]))
		p++;
	return p;
}

static Size
end_of_name(const KvEnvText *text, Size p)
{
	while (p < text->length && is_name_byte(text->text[p]))
		p++;
	return p;
}

/* Move on, counting lines; CR LF is one line break. */
static void
advance(KvEnvText *text, Size to)
{
	for (; text->position < to; text->position++)
	{
		const char *p = text->text + text->position;

		if (*p == '\r' || (*p == '\n' && (text->position == 0 || p[-1] != '\r')))
			text->line++;
	}
}

/* Does nothing but a comment follow, up to the end of the line? */
static bool
ends_here(const KvEnvText *text, Size p)
{
	p = skip_space_in_line(text, p);
	return p == text->length || is_line_break(text->text[p]) || text->text[p] == '#';
}

/*
 * Find the quote that closes the one at p: the first without a backslash before it, or, if
 * other text follows that one, the last with a backslash behind which the line ends.
 */
static bool
find_closing_quote(const KvEnvText *text, Size p, Size *closing)
{
	bool		found = false;

	for (Size i = p + 1; i < text->length; i++)
	{
		if (text->text[i] != text->text[p])
			continue;
		if (ends_here(text, i + 1))
		{
			*closing = i;
			found = true;
		}
		if (text->text[i - 1] != '\\')
			break;
	}
	return found;
}

/* Read the value that may begin at p, right behind the separator. */
static void
read_value(const KvEnvText *text, Size p, KvEnvAssignment *assignment)
{
	Size		quote = skip_space(text, p);
	Size		closing = 0;

	assignment->escaped = quote < text->length && text->text[quote] == '"';
	assignment->quoted = quote < text->length && is_quote(text->text[quote]) &&
		find_closing_quote(text, quote, &closing);
	if (assignment->quoted)
	{
		assignment->value = quote;
		assignment->value_end = closing + 1;
		assignment->end = end_of_line(text, closing);
		return;
	}
	assignment->end = end_of_line(text, p);
	assignment->value_end = p;
	while (assignment->value_end < assignment->end && text->text[assignment->value_end] != '#')
		assignment->value_end++;
	assignment->value = Min(skip_space_in_line(text, p), assignment->value_end);
	if (assignment->value == assignment->value_end)
		assignment->value = assignment->value_end = p;
	while (assignment->value_end > assignment->value && is_space(text->text[assignment->value_end - 1]))
		assignment->value_end--;
	/* A quote in the next line is not this value's first byte. */
	assignment->escaped = assignment->value < assignment->value_end && text->text[assignment->value] == '"';
	assignment->quoted = assignment->value_end - assignment->value >= 2 && is_quote(text->text[assignment->value]) &&
		text->text[assignment->value] == text->text[assignment->value_end - 1];
}

/* Read "NAME=" or "NAME: " at p; returns where its value may begin, 0 when that is not there. */
static Size
read_name(const KvEnvText *text, Size p, KvEnvAssignment *assignment)
{
	Size		separator;

	assignment->name = p;
	assignment->name_end = end_of_name(text, p);
	if (assignment->name_end == p)
		return 0;
	separator = skip_space(text, assignment->name_end);
	if (separator < text->length && text->text[separator] == '=')
		return separator + 1;
	separator = assignment->name_end;
	if (separator + 1 < text->length && text->text[separator] == ':' && is_space(text->text[separator + 1]))
	{
		bool		cr_lf = separator + 2 < text->length && text->text[separator + 1] == '\r' && text->text[separator + 2] == '\n';

		return separator + (cr_lf ? 3 : 2);
	}
	return 0;
}

static bool
read_assignment(const KvEnvText *text, Size p, KvEnvAssignment *assignment)
{
	static const char keyword[] = "export";
	Size		behind = p + strlen(keyword);
	Size		value = 0;

	assignment->start = p;
	if (behind < text->length && memcmp(text->text + p, keyword, strlen(keyword)) == 0 && is_space(text->text[behind]))
		value = read_name(text, skip_space(text, behind), assignment);
	if (value == 0)
		value = read_name(text, p, assignment);
	if (value == 0)
		return false;
	read_value(text, value, assignment);
	return true;
}

/* Step to the next assignment; false at the end of the text. */
bool
kv_env_file_next(KvEnvText *text, KvEnvAssignment *assignment)
{
	while (text->position < text->length)
	{
		Size		p = skip_space(text, text->position);

		advance(text, p);
		if (p == text->length)
			return false;
		if (read_assignment(text, p, assignment))
		{
			advance(text, assignment->name);
			assignment->line = text->line;
			advance(text, assignment->end);
			return true;
		}
		advance(text, end_of_line(text, p));
	}
	return false;
}

/* Is it an assignment to that name? */
bool
kv_env_file_names(const KvEnvText *text, const KvEnvAssignment *assignment, const char *name)
{
	Size		length = assignment->name_end - assignment->name;

	return strlen(name) == length && memcmp(text->text + assignment->name, name, length) == 0;
}

/* Write what the value means to out, which takes value_end - value + 1 bytes; returns its length. */
Size
kv_env_file_value(const KvEnvText *text, const KvEnvAssignment *assignment, char *out)
{
	const char *p = text->text + assignment->value + (assignment->quoted ? 1 : 0);
	const char *end = text->text + assignment->value_end - (assignment->quoted ? 1 : 0);
	Size		length = 0;

	for (; p < end; p++)
	{
		if (*p == '\r')
		{
			out[length++] = '\n';
			if (p + 1 < end && p[1] == '\n')
				p++;
		}
		else if (assignment->escaped && *p == '\\' && p + 1 < end && (p[1] == 'n' || p[1] == 'r'))
			out[length++] = *++p == 'n' ? '\n' : '\r';
		else
			out[length++] = *p;
	}
	out[length] = '\0';
	return length;
}

static bool
same_assignment(const KvEnvText *a_text, const KvEnvAssignment *a, const KvEnvText *b_text, const KvEnvAssignment *b)
{
	Size		name_length = a->name_end - a->name;
	Size		value_length = a->value_end - a->value;

	return b->name_end - b->name == name_length && b->value_end - b->value == value_length &&
		memcmp(a_text->text + a->name, b_text->text + b->name, name_length) == 0 &&
		memcmp(a_text->text + a->value, b_text->text + b->value, value_length) == 0;
}

/* Step to the next assignment to another name. */
static bool
next_other(KvEnvText *text, const char *name, KvEnvAssignment *assignment)
{
	bool		found;

	do
		found = kv_env_file_next(text, assignment);
	while (found && kv_env_file_names(text, assignment, name));
	return found;
}

/* Do two texts assign the same to every name but one? */
static bool
others_are_kept(const char *before, Size before_length, const char *after, Size after_length, const char *name)
{
	KvEnvText	a_text,
				b_text;
	KvEnvAssignment a,
				b;

	kv_env_file_begin(&a_text, before, before_length);
	kv_env_file_begin(&b_text, after, after_length);
	while (next_other(&a_text, name, &a))
		if (!next_other(&b_text, name, &b) || !same_assignment(&a_text, &a, &b_text, &b))
			return false;
	return !next_other(&b_text, name, &b);
}

/* Find the last assignment to a name, which is the one that counts. */
bool
kv_env_file_find(const char *bytes, Size length, const char *name, KvEnvText *text, KvEnvAssignment *last)
{
	KvEnvAssignment assignment;
	bool		found = false;

	kv_env_file_begin(text, bytes, length);
	while (kv_env_file_next(text, &assignment))
		if (kv_env_file_names(text, &assignment, name))
		{
			*last = assignment;
			found = true;
		}
	return found;
}

/* Does a text give the name that value? An escape would make the value shorter than it is written. */
static bool
assigns(const char *bytes, Size length, const char *name, const char *value)
{
	KvEnvText	text;
	KvEnvAssignment last;
	Size		quotes;
	Size		value_length = strlen(value);

	if (!kv_env_file_find(bytes, length, name, &text, &last))
		return false;
	quotes = last.quoted ? 1 : 0;
	return last.value_end - last.value == value_length + 2 * quotes &&
		memcmp(bytes + last.value + quotes, value, value_length) == 0 &&
		!(last.escaped && (strstr(value, "\\n") || strstr(value, "\\r")));
}

static Size
put(char *out, Size length, const char *bytes, Size n)
{
	memcpy(out + length, bytes, n);
	return length + n;
}

static Size
put_value(char *out, Size length, const char *value, char quote)
{
	if (quote)
		out[length++] = quote;
	length = put(out, length, value, strlen(value));
	if (quote)
		out[length++] = quote;
	return length;
}

/* How the text breaks its lines. */
static const char *
line_break_of(const char *bytes, Size length)
{
	const char *line_break = length > 0 ? memchr(bytes, '\n', length) : NULL;

	return line_break && line_break > bytes && line_break[-1] == '\r' ? "\r\n" : "\n";
}

/* Append an assignment in a line of its own, with an empty line before it if apart. */
static Size
append_assignment(const char *bytes, Size length, const char *name, const char *value, char quote, bool apart, char *out)
{
	const char *line_break = line_break_of(bytes, length);
	Size		n = put(out, 0, bytes, length);

	if (length > 0 && !is_line_break(bytes[length - 1]))
		n = put(out, n, line_break, strlen(line_break));
	if (apart)
		n = put(out, n, line_break, strlen(line_break));
	n = put(out, n, name, strlen(name));
	out[n++] = '=';
	n = put_value(out, n, value, quote);
	return put(out, n, line_break, strlen(line_break));
}

static Size
replace_value(const char *bytes, Size length, const KvEnvAssignment *last, const char *value, char quote, char *out)
{
	Size		n = put(out, 0, bytes, last->value);

	n = put_value(out, n, value, quote);
	/* Not every reader takes a # for a comment that touches the value. */
	if (last->value_end < length && bytes[last->value_end] == '#')
		out[n++] = ' ';
	return put(out, n, bytes + last->value_end, length - last->value_end);
}

/* May the value stand without quotes, for a shell too? */
static bool
needs_no_quotes(const char *value)
{
	for (; *value; value++)
		if (!is_name_byte(*value) && strchr("/:@%+=,~^", *value) == NULL)
			return false;
	return true;
}

/*
 * Give a name a value: where it is assigned last, else in a line at the end. The result
 * is written to out, which takes length + strlen(name) + strlen(value) + KV_ENV_FILE_ROOM
 * bytes. False when no way of writing it gives that value and leaves the others alone.
 */
bool
kv_env_file_set(const char *bytes, Size length, const char *name, const char *value, char *out, Size *out_length)
{
	static const char quotes[] = {'\0', '\'', '"', '`', '\0'};
	KvEnvText	text;
	KvEnvAssignment last;
	bool		found = kv_env_file_find(bytes, length, name, &text, &last);

	for (Size i = needs_no_quotes(value) ? 0 : 1; i < lengthof(quotes); i++)
		for (int apart = 0; apart <= (found ? 0 : 1); apart++)
		{
			*out_length = found ? replace_value(bytes, length, &last, value, quotes[i], out) :
				append_assignment(bytes, length, name, value, quotes[i], apart != 0, out);
			if (assigns(out, *out_length, name, value) && others_are_kept(bytes, length, out, *out_length, name))
				return true;
		}
	return false;
}

/*
 * Remove the lines that assign a name, writing the rest to out, which takes length bytes.
 * False when that would change what others are assigned, or assign the name anew.
 */
bool
kv_env_file_remove(const char *bytes, Size length, const char *name, char *out, Size *out_length)
{
	KvEnvText	text;
	KvEnvAssignment assignment;
	Size		copied = 0;
	Size		n = 0;

	kv_env_file_begin(&text, bytes, length);
	while (kv_env_file_next(&text, &assignment))
	{
		Size		start = assignment.start;
		Size		end = assignment.end;

		if (!kv_env_file_names(&text, &assignment, name))
			continue;
		while (start > copied && is_space(bytes[start - 1]) && !is_line_break(bytes[start - 1]))
			start--;
		n = put(out, n, bytes + copied, start - copied);
		if (end < length && bytes[end] == '\r')
			end++;
		if (end < length && bytes[end] == '\n')
			end++;
		copied = end;
	}
	*out_length = put(out, n, bytes + copied, length - copied);
	/* Lines that were apart may now make an assignment: a name in one, and in the next its "=". */
	return !kv_env_file_find(out, *out_length, name, &text, &assignment) &&
		others_are_kept(bytes, length, out, *out_length, name);
}
