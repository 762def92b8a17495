/*
 * .env texts: reading stays inside the text and goes forward; what was set is read back and all else is as before; what
 * was removed is gone. The input is an operand of printable characters behind its length in one byte, then the text.
 */
#include "server.h"

#include "vault/env_file.h"

static const char *const names[] = {"A", "OPENAI_API_KEY", "export", "a.b-c"};

static void
check_places(const KvEnvText *text, const KvEnvAssignment *a, Size behind)
{
	KV_HOLDS(behind <= a->start && a->start <= a->name && a->name < a->name_end && a->name_end < a->value);
	KV_HOLDS(a->value <= a->value_end && a->value_end <= a->end && a->end <= text->length);
	KV_HOLDS(text->position == a->end && a->line >= 1 && a->line <= text->line);
	KV_HOLDS(!a->quoted || a->value_end - a->value >= 2);
}

/* Every assignment but those to one name, as a text: names and what they mean. */
static char *
read_all(const char *bytes, Size length, const char *but, Size *read_length)
{
	char	   *out = palloc(2 * length + 2);
	Size		n = 0;
	Size		behind = 0;
	KvEnvText	text;
	KvEnvAssignment a;

	kv_env_file_begin(&text, bytes, length);
	while (kv_env_file_next(&text, &a))
	{
		char	   *value;
		Size		value_length;

		check_places(&text, &a, behind);
		behind = a.end;
		value = palloc(a.value_end - a.value + 1);
		value_length = kv_env_file_value(&text, &a, value);
		KV_HOLDS(value_length <= a.value_end - a.value && value[value_length] == '\0');
		if (but && kv_env_file_names(&text, &a, but))
			continue;
		memcpy(out + n, bytes + a.name, a.name_end - a.name);
		n += a.name_end - a.name;
		out[n++] = '=';
		memcpy(out + n, value, value_length);
		n += value_length;
		KV_HOLDS(n <= 2 * length + 1);
	}
	*read_length = n;
	return out;
}

static void
check_others(const char *before, Size before_length, const char *after, Size after_length, const char *name)
{
	Size		a_length;
	Size		b_length;
	char	   *a = read_all(before, before_length, name, &a_length);
	char	   *b = read_all(after, after_length, name, &b_length);

	KV_HOLDS(a_length == b_length && memcmp(a, b, a_length) == 0);
}

static void
check_set(const char *bytes, Size length, const char *name, const char *value)
{
	char	   *out = palloc(length + strlen(name) + strlen(value) + KV_ENV_FILE_ROOM);
	Size		out_length;
	KvEnvText	text;
	KvEnvAssignment last;
	char	   *found;

	if (!kv_env_file_set(bytes, length, name, value, out, &out_length))
		return;
	KV_HOLDS(out_length <= length + strlen(name) + strlen(value) + KV_ENV_FILE_ROOM);
	out = kv_exact_copy(out, out_length);
	KV_HOLDS(kv_env_file_find(out, out_length, name, &text, &last));
	found = palloc(last.value_end - last.value + 1);
	(void) kv_env_file_value(&text, &last, found);
	KV_HOLDS(strcmp(found, value) == 0);
	check_others(bytes, length, out, out_length, name);
}

static void
check_remove(const char *bytes, Size length, const char *name)
{
	char	   *out = palloc(length);
	Size		out_length;
	KvEnvText	text;
	KvEnvAssignment last;

	if (!kv_env_file_remove(bytes, length, name, out, &out_length))
		return;
	KV_HOLDS(out_length <= length);
	out = kv_exact_copy(out, out_length);
	KV_HOLDS(!kv_env_file_find(out, out_length, name, &text, &last));
	check_others(bytes, length, out, out_length, name);
}

int
LLVMFuzzerTestOneInput(const uint8 *data, size_t size)
{
	char		value[128];
	size_t		value_length = size > 0 ? Min((size_t) data[0] % 64, size - 1) : 0;
	char	   *bytes;
	Size		length;
	Size		ignored;

	for (size_t i = 0; i < value_length; i++)
		value[i] = (char) ('!' + data[1 + i] % ('~' - '!' + 1));
	value[value_length] = '\0';
	length = size > 0 ? size - 1 - value_length : 0;
	bytes = kv_exact_copy(data + (size - length), length);
	(void) read_all(bytes, length, NULL, &ignored);
	for (size_t i = 0; i < lengthof(names); i++)
	{
		check_set(bytes, length, names[i], value);
		check_remove(bytes, length, names[i]);
	}
	kv_free_all();
	return 0;
}
