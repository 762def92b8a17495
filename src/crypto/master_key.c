/*-------------------------------------------------------------------------
 * master_key.c
 *		The key outside the database that wraps data keys.
 *
 * The key is read at first use and again after a configuration reload, and lives in
 * one page that stays out of core files. A missing or wrong key is the error KV004 of
 * whoever needs it; the server starts and runs without.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/master_key.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/secret.h"
#include "base/settings.h"
#include "crypto/reveal.h"
#include "miscadmin.h"
#include "storage/fd.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* Written as 64 hexadecimal digits, with white space around them allowed. */
#define MASTER_KEY_DIGITS	(2 * KV_KEY_SIZE)
#define FILE_SIZE_MAX		256

/* The key of this process; valid while loaded_from and loaded_at match the configuration. */
static KvMasterKey *loaded = NULL;
static char *loaded_from = NULL;
static TimestampTz loaded_at;

static void
raise_unusable(const char *path, const char *reason)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_MASTER_KEY),
			 errmsg("master key is not available"),
			 errdetail("File \"%s\" %s.", path, reason),
			 errhint("As the server's user, make one with: (umask 077; openssl rand -hex 32 > \"%s\")  "
					 "If it existed before, put the old one back: keys stored under it open with no other.", path)));
}

static void
raise_not_configured(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_MASTER_KEY),
			 errmsg("master key is not available"),
			 errdetail("Setting keyvault.master_key_file is empty."),
			 errhint("As root, make one with: install -d -m 700 -o postgres /etc/keyvault && "
					 "(umask 077; openssl rand -hex 32 > /etc/keyvault/master.key) && chown postgres /etc/keyvault/master.key  "
					 "Then: ALTER SYSTEM SET keyvault.master_key_file = '/etc/keyvault/master.key'; SELECT pg_reload_conf();")));
}

static bool
lies_in_data_directory(const char *path)
{
	char	   *real_path = realpath(path, NULL);
	char	   *real_data = realpath(DataDir, NULL);
	bool		inside = real_path && real_data && path_is_prefix_of_path(real_data, real_path);

	free(real_path);
	free(real_data);
	return inside;
}

/* Refuse a file that others could have read, or that base backups carry along. */
static void
check_key_file(const char *path, int fd)
{
	struct stat status;

	if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode))
		raise_unusable(path, "is not a regular file");
	if (status.st_uid != geteuid() && status.st_uid != 0)
		raise_unusable(path, "does not belong to the server's user or to root");
	if ((status.st_uid == 0 && (status.st_mode & (S_IWGRP | S_IRWXO)) != 0) ||
		(status.st_uid != 0 && (status.st_mode & (S_IRWXG | S_IRWXO)) != 0))
		raise_unusable(path, "can be read by others: its mode must be 0600, or 0640 if it belongs to root");
	if (status.st_size > FILE_SIZE_MAX)
		raise_unusable(path, "is too long for a master key: it holds 64 hexadecimal digits");
	if (!kv_allow_master_key_in_data_directory && lies_in_data_directory(path))
		raise_unusable(path, "lies in the data directory, where every base backup carries it along "
					   "(keyvault.allow_master_key_in_data_directory accepts that)");
}

/* Read the file into buffer, NUL-terminated. */
static void
read_key_file(const char *path, char *buffer)
{
	int			fd = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | PG_BINARY);
	ssize_t		length;

	if (fd < 0)
		raise_unusable(path, psprintf("could not be opened: %s", strerror(errno)));
	check_key_file(path, fd);
	length = read(fd, buffer, FILE_SIZE_MAX);
	CloseTransientFile(fd);
	if (length < 0)
		raise_unusable(path, "could not be read");
	buffer[length] = '\0';
}

/* Decode the digits in text into key. */
static void
decode_key(const char *path, const char *text, uint8 *key)
{
	const char *first = text + strspn(text, " \t\r\n");
	Size		digits = strspn(first, "0123456789abcdefABCDEF");

	if (digits != MASTER_KEY_DIGITS || first[digits + strspn(first + digits, " \t\r\n")] != '\0')
		raise_unusable(path, "does not hold a master key: 64 hexadecimal digits and nothing else");
	hex_decode(first, MASTER_KEY_DIGITS, (char *) key);
}

static void
load_key_file(const char *path)
{
	static const char info[] = "keyvault/v1/kek-id";
	char	   *text = kv_secret_alloc(FILE_SIZE_MAX + 1);
	uint8		id[KV_MAC_SIZE];
	uint32		generation;

	if (loaded == NULL)
		loaded = kv_secret_page(sizeof(KvMasterKey));
	if (loaded_from)
		pfree(loaded_from);
	loaded_from = NULL;
	generation = loaded->generation + 1;
	kv_secret_wipe(loaded, sizeof(KvMasterKey));
	loaded->generation = generation;

	read_key_file(path, text);
	decode_key(path, text, loaded->key);
	kv_hkdf_sha256(loaded->key, KV_KEY_SIZE, NULL, 0, (const uint8 *) info, strlen(info), id, sizeof(id));
	memcpy(loaded->kek_id, id, KV_KEK_ID_SIZE);
	loaded->source = KV_MASTER_KEY_FILE;
	loaded_at = PgReloadTime;
	loaded_from = MemoryContextStrdup(TopMemoryContext, path);
}

/* The primary master key. Error: KV004 when there is none to be had. */
const KvMasterKey *
kv_master_key_get(void)
{
	kv_reveal_require();
	if (loaded_from == NULL || loaded_at != PgReloadTime || strcmp(loaded_from, kv_master_key_file) != 0)
	{
		if (kv_master_key_file[0] == '\0')
			raise_not_configured();
		load_key_file(kv_master_key_file);
	}
	return loaded;
}

static char *
hex_of_kek_id(const uint8 *kek_id)
{
	char	   *hex = palloc0(2 * KV_KEK_ID_SIZE + 1);

	hex_encode((const char *) kek_id, KV_KEK_ID_SIZE, hex);
	return hex;
}

/* Raise KV004: a data key was wrapped by another master key than the one loaded. */
void
kv_master_key_mismatch(const uint8 *expected_kek_id)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_MASTER_KEY),
			 errmsg("master key is not the one that these keys were stored under"),
			 errdetail("Expected key id %s, loaded %s from \"%s\".",
					   hex_of_kek_id(expected_kek_id), hex_of_kek_id(kv_master_key_get()->kek_id), kv_master_key_file),
			 errhint("Put the master key with the expected id back in place and reload; "
					 "the ids are not secret and stand in keyvault.master_keys.")));
}
