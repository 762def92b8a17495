/*
 * Stands in for the PostgreSQL server's functions that the parsers call.
 *
 * Each allocation is one of malloc's, so that AddressSanitizer sees every step beyond it. What is called random is the
 * same in every run.
 */
#include "server.h"

#include <setjmp.h>
#include <stdarg.h>

#include "base/settings.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#undef vsnprintf
#undef snprintf
#undef fprintf

MemoryContext CurrentMemoryContext = NULL;
MemoryContext TopMemoryContext = NULL;
TimestampTz PgReloadTime = 0;
bool		kv_reveal = true;

static void **allocations = NULL;
static size_t n_allocations = 0;
static size_t room = 0;
static MemoryContextCallback *callbacks = NULL;

static jmp_buf *catcher = NULL;
static int	sqlstate;

void
kv_fail(const char *condition, const char *file, int line)
{
	fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, condition);
	abort();
}

void *
palloc(Size size)
{
	void	   *memory = malloc(size ? size : 1);

	if (n_allocations == room)
	{
		room = room ? 2 * room : 64;
		allocations = realloc(allocations, room * sizeof(void *));
	}
	return allocations[n_allocations++] = memory;
}

void *
palloc0(Size size)
{
	return memset(palloc(size), 0, size);
}

void
MemoryContextRegisterResetCallback(MemoryContext context, MemoryContextCallback *callback)
{
	callback->next = callbacks;
	callbacks = callback;
}

void
kv_run_callbacks(void)
{
	for (; callbacks; callbacks = callbacks->next)
		callbacks->func(callbacks->arg);
}

void
kv_free_all(void)
{
	kv_run_callbacks();
	while (n_allocations > 0)
		free(allocations[--n_allocations]);
}

char *
kv_exact_copy(const void *bytes, Size length)
{
	char	   *copy = palloc(length);

	if (length > 0)
		memcpy(copy, bytes, length);
	return copy;
}

bytea *
kv_exact_bytea(const void *bytes, Size length, bool packed)
{
	Size		header = packed && length + VARHDRSZ_SHORT <= VARATT_SHORT_MAX ? VARHDRSZ_SHORT : VARHDRSZ;
	bytea	   *value = palloc(header + length);

	if (header == VARHDRSZ_SHORT)
		SET_VARSIZE_SHORT(value, header + length);
	else
		SET_VARSIZE(value, header + length);
	if (length > 0)
		memcpy(VARDATA_ANY(value), bytes, length);
	return value;
}

char *
pstrdup(const char *text)
{
	return kv_exact_copy(text, strlen(text) + 1);
}

char *
psprintf(const char *format, ...)
{
	va_list		arguments;
	char	   *text;
	int			length;

	va_start(arguments, format);
	length = vsnprintf(NULL, 0, format, arguments);
	va_end(arguments);
	text = palloc(length + 1);
	va_start(arguments, format);
	vsnprintf(text, length + 1, format, arguments);
	va_end(arguments);
	return text;
}

void
initStringInfo(StringInfo text)
{
	text->data = pstrdup("");
	text->len = 0;
}

void
appendStringInfo(StringInfo text, const char *format, ...)
{
	char		piece[1024];
	va_list		arguments;

	va_start(arguments, format);
	vsnprintf(piece, sizeof(piece), format, arguments);
	va_end(arguments);
	text->data = psprintf("%s%s", text->data, piece);
	text->len = strlen(text->data);
}

/* Errors. Nothing below ERROR is of interest. */
bool
errstart(int level, const char *domain)
{
	return level >= ERROR;
}

bool
errstart_cold(int level, const char *domain)
{
	return level >= ERROR;
}

int
errcode(int code)
{
	sqlstate = code;
	return 0;
}

int
errmsg(const char *format, ...)
{
	return 0;
}

int
errdetail(const char *format, ...)
{
	return 0;
}

int
errhint(const char *format, ...)
{
	return 0;
}

void
errfinish(const char *file, int line, const char *function)
{
	if (catcher == NULL)
		kv_fail("no error is thrown here", file, line);
	longjmp(*catcher, 1);
}

int
kv_throws(void (*function) (void *), void *argument)
{
	jmp_buf		here;
	int			thrown = 0;

	catcher = &here;
	if (setjmp(here) == 0)
		function(argument);
	else
		thrown = sqlstate;
	catcher = NULL;
	return thrown;
}

bool
pg_strong_random(void *bytes, size_t length)
{
	static uint64 state = UINT64CONST(0x9e3779b97f4a7c15);

	for (size_t i = 0; i < length; i++)
	{
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		((uint8 *) bytes)[i] = (uint8) (state >> 32);
	}
	return true;
}

static int
digit(char c)
{
	return c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10;
}

uint64
hex_decode(const char *digits, size_t length, char *bytes)
{
	for (size_t i = 0; i < length; i += 2)
		bytes[i / 2] = (char) (digit(digits[i]) << 4 | digit(digits[i + 1]));
	return length / 2;
}

uint64
hex_encode(const char *bytes, size_t length, char *digits)
{
	for (size_t i = 0; i < length; i++)
		snprintf(digits + 2 * i, 3, "%02x", (unsigned char) bytes[i]);
	return 2 * length;
}

TimestampTz
GetCurrentTimestamp(void)
{
	return 0;
}
