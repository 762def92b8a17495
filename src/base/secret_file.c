/*-------------------------------------------------------------------------
 * secret_file.c
 *		Small files with secrets: read only when nobody else can have read them.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/secret_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/secret.h"
#include "base/settings.h"
#include "miscadmin.h"
#include "storage/fd.h"

/* Does the path lead, through links too, into the data directory? */
static bool
is_in_data_directory(const char *path)
{
	char	   *real_path = realpath(path, NULL);
	char	   *real_data = realpath(DataDir, NULL);
	bool		inside = real_path && real_data && path_is_prefix_of_path(real_data, real_path);

	free(real_path);
	free(real_data);
	return inside;
}

/* Why a file is not to be where it is: base backups copy the data directory. NULL when it may be there. */
const char *
kv_secret_file_misplaced(const char *path)
{
	if (kv_allow_master_key_in_data_directory || !is_in_data_directory(path))
		return NULL;
	return "lies in the data directory, where every base backup carries it along "
		"(keyvault.allow_master_key_in_data_directory accepts that)";
}

/* Why an open file is not to be trusted with a secret; NULL when it is. */
static const char *
distrust(int fd, Size size_max)
{
	struct stat status;

	if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode))
		return "is not a regular file";
	if (status.st_uid != geteuid() && status.st_uid != 0)
		return "does not belong to the server's user or to root";
	if ((status.st_uid == 0 && (status.st_mode & (S_IWGRP | S_IRWXO)) != 0) ||
		(status.st_uid != 0 && (status.st_mode & (S_IRWXG | S_IRWXO)) != 0))
		return "can be read by others: its mode must be 0600, or 0640 if it belongs to root";
	if (status.st_size > (off_t) size_max)
		return psprintf("is too long: it may have %zu bytes", size_max);
	return NULL;
}

/*
 * Read a file of at most size_max bytes. Returns its text, NUL-terminated, in secret memory of
 * the current context; NULL, with a reason that goes on from "the file ...", when it cannot be
 * read or when others can.
 */
char *
kv_secret_file_read(const char *path, Size size_max, const char **reason)
{
	int			fd = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | PG_BINARY);
	char	   *text = NULL;
	ssize_t		length;

	if (fd < 0)
	{
		*reason = psprintf("could not be opened: %s", strerror(errno));
		return NULL;
	}
	*reason = distrust(fd, size_max);
	if (*reason == NULL)
	{
		text = kv_secret_alloc(size_max + 1);
		length = read(fd, text, size_max);
		if (length < 0)
			*reason = psprintf("could not be read: %s", strerror(errno));
		text[Max(length, 0)] = '\0';
	}
	CloseTransientFile(fd);
	return *reason ? NULL : text;
}
