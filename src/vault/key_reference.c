/*-------------------------------------------------------------------------
 * key_reference.c
 *		Keys that are kept elsewhere: what is stored here names them.
 *
 * A reference is vault:mount/path#field, a field of a secret in the second version of
 * HashiCorp Vault's or OpenBao's key/value engine. The worker resolves it for each call.
 * Whoever stores one chooses which secret the server's token fetches; it takes the right to
 * act for any user.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/key_reference.h"

#include "base/argument.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/redaction.h"
#include "fmgr.h"
#include "identity/identity.h"
#include "utils/builtins.h"
#include "utils/uuid.h"
#include "vault/api_key.h"
#include "vault/key_row.h"

PG_FUNCTION_INFO_V1(keyvault_store_api_key_reference);

static const char prefix[] = "vault:";
static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-";

/* Is it a segment of a path: letters, digits, "_", "-", and dots inside? */
static bool
is_segment(const char *start, Size length)
{
	bool		other = false;

	for (Size i = 0; i < length; i++)
	{
		if (strchr(letters, start[i]) == NULL && start[i] != '.')
			return false;
		other = other || start[i] != '.';
	}
	return other;
}

/*
 * Take a reference apart: the path of the API below /v1/, and the field. False when it is none.
 */
bool
kv_key_reference_parse(const char *reference, char **path, char **field)
{
	const char *mount = reference + strlen(prefix);
	const char *mount_end;
	const char *hash;

	if (strlen(reference) > KV_REFERENCE_MAX || strncmp(reference, prefix, strlen(prefix)) != 0)
		return false;
	hash = strchr(mount, '#');
	mount_end = strchr(mount, '/');
	if (hash == NULL || mount_end == NULL || mount_end > hash ||
		hash[1] == '\0' || hash[1 + strspn(hash + 1, letters)] != '\0')
		return false;
	for (const char *start = mount, *end; start <= hash; start = end + 1)
	{
		end = start + strcspn(start, "/#");
		if (!is_segment(start, end - start))
			return false;
	}
	*path = psprintf("%.*s/data%.*s", (int) (mount_end - mount), mount, (int) (hash - mount_end), mount_end);
	*field = pstrdup(hash + 1);
	return true;
}

Datum
keyvault_store_api_key_reference(PG_FUNCTION_ARGS)
{
	KvNewKey	key = {.is_reference = true,.may_create_user = true};
	pg_uuid_t  *id = palloc(sizeof(pg_uuid_t));
	char	   *reference;
	char	   *path;
	char	   *field;
	KvOwnerScope scope;

	/* A reference is no secret, but whoever takes this for store_api_key passes a key. */
	kv_redaction_mark_statement();
	key.provider = kv_argument_text(fcinfo, 0, "provider");
	reference = kv_argument_text(fcinfo, 1, "reference");
	key.name = kv_api_key_name(fcinfo, 2);
	key.user_id = kv_identity_resolve(fcinfo, 3);
	key.secret = reference;
	if (!kv_identity_acts_for_any_user())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("not allowed to store references"),
				 errdetail("A reference makes the server fetch any secret that its token may read."),
				 errhint("A trusted application stores them for its users.")));
	if (!kv_key_reference_parse(reference, &path, &field))
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("reference is malformed"),
				 errhint("Write vault:mount/path#field, at most %d bytes; a mount, a path and a field have letters, digits, \"_\" and \"-\", the first two dots as well.",
						 KV_REFERENCE_MAX)));
	kv_owner_begin(&scope);
	kv_api_key_require_provider(key.provider);
	*id = kv_key_row_write(&key);
	kv_owner_end(&scope);
	PG_RETURN_UUID_P(id);
}
