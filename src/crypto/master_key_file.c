/*-------------------------------------------------------------------------
 * master_key_file.c
 *		Master keys in a file that the server's user alone can read.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/secret_file.h"
#include "base/settings.h"
#include "crypto/master_key_source.h"

static bool
is_configured(void)
{
	return kv_master_key_file[0] != '\0' && kv_vault_transit_key[0] == '\0';
}

static char *
describe(void)
{
	return psprintf("file \"%s\"", kv_master_key_file);
}

static char *
fetch(const char **reason, const char **hint)
{
	const char *path = kv_master_key_file;
	char	   *text = kv_secret_file_read(path, KV_MASTER_KEY_TEXT_MAX, reason);

	*hint = psprintf("As the server's user, make one with: (umask 077; openssl rand -hex 32 > \"%s\")  "
					 "If it existed before, put the old one back: keys stored under it open with no other.", path);
	if (text)
		*reason = kv_secret_file_misplaced(path);
	return *reason ? NULL : text;
}

const KvMasterKeySource kv_master_key_from_file = {
	.id = KV_MASTER_KEY_FILE,
	.setting = "keyvault.master_key_file",
	.is_configured = is_configured,
	.describe = describe,
	.fetch = fetch,
};
