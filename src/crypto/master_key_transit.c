/*-------------------------------------------------------------------------
 * master_key_transit.c
 *		Master keys in a file, each wrapped by the Transit engine of HashiCorp Vault or
 *		OpenBao: a line for each, as "vault:v1:...", all decrypted in one call.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/secret.h"
#include "base/secret_file.h"
#include "base/secret_json.h"
#include "base/settings.h"
#include "base/vault_server.h"
#include "common/base64.h"
#include "crypto/aead.h"
#include "crypto/master_key_source.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"

#define SPACE " \t\r\n"
#define FILE_SIZE_MAX (64 * 1024)

/* The text of a key of 32 bytes, or a key written as 64 digits and a line break or two. */
#define PLAINTEXT_MAX (KV_MASTER_KEY_DIGITS + 8)

static bool
is_configured(void)
{
	return kv_vault_transit_key[0] != '\0';
}

static char *
describe(void)
{
	return psprintf("Transit key \"%s\" at \"%s\"", kv_vault_transit_key, kv_vault_address);
}

/* The path that decrypts: mount/decrypt/name. NULL when the setting is not mount/name. */
static char *
decrypt_path(void)
{
	const char *slash = strrchr(kv_vault_transit_key, '/');

	if (slash == NULL || slash == kv_vault_transit_key || slash[1] == '\0' ||
		kv_vault_transit_key[strspn(kv_vault_transit_key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/")] != '\0')
		return NULL;
	return psprintf("%.*s/decrypt/%s", (int) (slash - kv_vault_transit_key), kv_vault_transit_key, slash + 1);
}

/* The body of the call, for every ciphertext in text; NULL when there is something else in it. */
static char *
decrypt_body(const char *text, int *n)
{
	StringInfoData body;

	*n = 0;
	initStringInfo(&body);
	appendStringInfoString(&body, "{\"batch_input\": [");
	for (const char *word = text + strspn(text, SPACE); *word; word += strspn(word, SPACE))
	{
		Size		length = strcspn(word, SPACE);

		if (strncmp(word, "vault:v", 7) != 0 ||
			strspn(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:+/=_-") < length)
			return NULL;
		appendStringInfo(&body, "%s{\"ciphertext\": \"%.*s\"}", *n ? ", " : "", (int) length, word);
		word += length;
		(*n)++;
	}
	appendStringInfoString(&body, "]}");
	return *n > 0 ? body.data : NULL;
}

/* Append one plaintext, in base64, as a line of digits; false when it is no key. */
static bool
append_key(char *text, const char *base64, int length)
{
	char	   *plain = kv_secret_alloc(PLAINTEXT_MAX + 1);
	int			size;
	Size		used = strlen(text);

	if (pg_b64_dec_len(length) > PLAINTEXT_MAX)
		return false;
	size = pg_b64_decode(base64, length, (void *) plain, PLAINTEXT_MAX);
	if (size == KV_KEY_SIZE)
	{
		hex_encode(plain, KV_KEY_SIZE, text + used);
		strlcpy(text + used + KV_MASTER_KEY_DIGITS, "\n", 2);
		return true;
	}
	if (size < KV_MASTER_KEY_DIGITS)
		return false;
	/* What else it must be, the reader of the text tells. */
	plain[size] = '\0';
	snprintf(text + used, KV_MASTER_KEY_TEXT_MAX - used, "%s\n", plain);
	return true;
}

/* The text of the keys in Vault's answer; NULL with a reason. */
static char *
read_answer(const char *answer, int expected, const char **reason)
{
	char	   *text = kv_secret_alloc(KV_MASTER_KEY_TEXT_MAX);

	text[0] = '\0';
	for (int i = 0; i < expected; i++)
	{
		KvSecretJsonValue plaintext;

		if (!kv_secret_json_find(answer, strlen(answer), psprintf("data.batch_results.%d.plaintext", i), &plaintext))
		{
			*reason = "gave no master key: the Vault server gave an answer that is not JSON";
			return NULL;
		}
		if (plaintext.string == NULL || !append_key(text, plaintext.string, (int) strlen(plaintext.string)))
		{
			*reason = psprintf("did not decrypt line %d of file \"%s\" to a key of 32 bytes", i + 1, kv_master_key_file);
			return NULL;
		}
	}
	return text;
}

static char *
fetch(const char **reason, const char **hint)
{
	char	   *path = decrypt_path();
	char	   *file;
	char	   *body;
	char	   *answer;
	int			n;

	*hint = "See \"Master key\" in doc/keyvault.md. Wrap a new key with: vault write -f -field=ciphertext transit/datakey/wrapped/NAME";
	if (path == NULL)
	{
		*reason = "is not written as mount/name";
		return NULL;
	}
	if (kv_master_key_file[0] == '\0')
	{
		*reason = "has nothing to decrypt: keyvault.master_key_file is empty";
		return NULL;
	}
	file = kv_secret_file_read(kv_master_key_file, FILE_SIZE_MAX, reason);
	if (file == NULL)
	{
		*reason = psprintf("has nothing to decrypt: file \"%s\" %s", kv_master_key_file, *reason);
		return NULL;
	}
	body = decrypt_body(file, &n);
	if (body == NULL || n > KV_MASTER_KEYS_MAX)
	{
		*reason = psprintf("has nothing to decrypt: file \"%s\" does not hold 1 to %d lines of Transit ciphertext, such as vault:v1:...",
						   kv_master_key_file, KV_MASTER_KEYS_MAX);
		return NULL;
	}
	answer = kv_vault_server_call(path, body, kv_master_key_timeout, reason);
	if (answer == NULL)
	{
		*reason = psprintf("gave no master key: the Vault server %s", *reason);
		return NULL;
	}
	return read_answer(answer, n, reason);
}

const KvMasterKeySource kv_master_key_from_transit = {
	.id = KV_MASTER_KEY_TRANSIT,
	.setting = "keyvault.vault_transit_key",
	.shared = true,
	.is_configured = is_configured,
	.describe = describe,
	.fetch = fetch,
};
