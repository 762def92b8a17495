/*-------------------------------------------------------------------------
 * master_key_command.c
 *		Master keys that a program prints.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/program.h"
#include "base/settings.h"
#include "crypto/master_key_source.h"

#define SPACE " \t\r\n\f\v"

static bool
is_configured(void)
{
	return kv_master_key_command[0] != '\0';
}

/* Divide the setting at its white space. */
static char **
arguments_of(const char *command)
{
	char	   *copy = pstrdup(command);
	char	  **arguments = palloc0((strlen(command) / 2 + 2) * sizeof(char *));
	char	   *rest = NULL;
	int			n = 0;

	for (char *word = strtok_r(copy, SPACE, &rest); word; word = strtok_r(NULL, SPACE, &rest))
		arguments[n++] = word;
	return arguments;
}

/* The program alone: its arguments are its own affair. */
static char *
describe(void)
{
	char	   *program = arguments_of(kv_master_key_command)[0];

	return psprintf("command \"%s\"", program ? program : "");
}

static char *
fetch(const char **reason, const char **hint)
{
	char	  **arguments = arguments_of(kv_master_key_command);
	char	   *text;

	*hint = "keyvault.master_key_command is an absolute path and arguments with white space between them, which no shell reads. "
		"Run it as the server's user, with an environment of PATH alone, to see what it says.";
	if (arguments[0] == NULL || arguments[0][0] != '/')
	{
		*reason = "is not an absolute path";
		return NULL;
	}
	text = kv_program_run(arguments, KV_MASTER_KEY_TEXT_MAX, kv_master_key_timeout, reason);
	if (text && text[strspn(text, SPACE)] == '\0')
	{
		*reason = "printed nothing";
		return NULL;
	}
	return text;
}

const KvMasterKeySource kv_master_key_from_command = {
	.id = KV_MASTER_KEY_COMMAND,
	.setting = "keyvault.master_key_command",
	.shared = true,
	.is_configured = is_configured,
	.describe = describe,
	.fetch = fetch,
};
