/*
 * Reads .env texts as keyvault does, for dotenv.mjs. Standard input: texts, each behind its length in four bytes,
 * big-endian. Output, for each text: its assignments and an empty line; an assignment is its line number and the
 * hexadecimal digits of name and value.
 */
#include "postgres.h"
#undef printf

#include "vault/env_file.h"

static void
print_hex(const char *bytes, size_t length)
{
	putchar(' ');
	for (size_t i = 0; i < length; i++)
		printf("%02x", (unsigned char) bytes[i]);
}

int
main(void)
{
	unsigned char size[4];

	while (fread(size, 1, 4, stdin) == 4)
	{
		size_t		length = (size_t) size[0] << 24 | size[1] << 16 | size[2] << 8 | size[3];
		char	   *bytes = malloc(length + 1);
		char	   *value = malloc(length + 1);
		KvEnvText	text;
		KvEnvAssignment assignment;

		if (fread(bytes, 1, length, stdin) != length)
			return 1;
		kv_env_file_begin(&text, bytes, length);
		while (kv_env_file_next(&text, &assignment))
		{
			size_t		n = kv_env_file_value(&text, &assignment, value);

			printf("%d", assignment.line);
			print_hex(bytes + assignment.name, assignment.name_end - assignment.name);
			print_hex(value, n);
			putchar('\n');
		}
		putchar('\n');
		free(bytes);
		free(value);
	}
	return 0;
}
