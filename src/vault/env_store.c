/*-------------------------------------------------------------------------
 * env_store.c
 *		The .env file on disk: read whole, and replaced whole.
 *
 * Nothing but a regular file is read, and opening never waits. A change is written to a
 * file beside it, which takes its place: whoever reads sees the old contents or the new.
 * Writers hold a lock (flock(2)) on the file that they replace, and look at the path
 * again when they have it: of several sessions, or servers, none overwrites another's
 * change. Symbolic links are followed, and stay. All that can fail is done before the
 * transaction commits; the new file takes its place right after.
 *
 * Until then the writer holds a lock on the new file as well: one that nobody holds was left
 * by a process that was killed, and the next writer removes it, for it has keys in it.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/env_store.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/error.h"
#include "base/secret.h"
#include "miscadmin.h"
#include "storage/fd.h"

#define FILE_SIZE_MAX	(1024 * 1024)
#define LOCK_RETRY_US	10000
#define LOCK_TRIES_MAX	100

/* Between the name of a file and the number of the process that writes another beside it. */
#define TEMPORARY_INFIX ".keyvault-"

/* The file that is to take the place of another when this transaction commits, and the locks on both; gone when it ends. */
static struct
{
	bool		is_written;
	char		path[MAXPGPATH];
	char		temporary[MAXPGPATH + 32];
	int			fd;
	int			temporary_fd;
}			ready;

static void
raise_file_error(const char *path, const char *what)
{
	ereport(ERROR,
			(errcode_for_file_access(),
			 errmsg("could not %s .env file \"%s\": %m", what, path),
			 errhint("The server's user reads the file, and writes it and files beside it. See keyvault.env_file.")));
}

/* Refuse what is not a file of bearable size. */
static void
check_file(const char *path, int fd, struct stat *status)
{
	if (fstat(fd, status) != 0)
		raise_file_error(path, "examine");
	if (!S_ISREG(status->st_mode))
		ereport(ERROR,
				(errcode(ERRCODE_WRONG_OBJECT_TYPE),
				 errmsg(".env file \"%s\" is not a regular file", path),
				 errhint("Set keyvault.env_file to the absolute path of a file.")));
	if (status->st_size > FILE_SIZE_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg(".env file \"%s\" is larger than %d kB", path, FILE_SIZE_MAX / 1024),
				 errhint("Set keyvault.env_file to the absolute path of a .env file.")));
}

/* Open the file; -1 when there is none. */
static int
open_file(const char *path)
{
	int			fd = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | PG_BINARY);

	if (fd < 0 && errno != ENOENT)
		raise_file_error(path, "open");
	return fd;
}

static void
read_contents(const char *path, int fd, KvEnvContents *contents)
{
	struct stat status;

	check_file(path, fd, &status);
	contents->bytes = kv_secret_alloc(status.st_size + 1);
	contents->length = 0;
	while (contents->length < (Size) status.st_size)
	{
		ssize_t		n = read(fd, contents->bytes + contents->length, status.st_size - contents->length);

		if (n < 0 && errno != EINTR)
			raise_file_error(path, "read");
		if (n == 0)
			break;
		contents->length += Max(n, 0);
	}
}

/* Read the file; false when there is none. */
bool
kv_env_store_read(const char *path, KvEnvContents *contents, bool *readable_by_others)
{
	int			fd = open_file(path);
	struct stat status;

	if (fd < 0)
		return false;
	read_contents(path, fd, contents);
	*readable_by_others = fstat(fd, &status) == 0 && (status.st_mode & S_IROTH) != 0;
	CloseTransientFile(fd);
	return true;
}

/* The path without symbolic links, of a file that need not exist. */
static char *
resolve(const char *path)
{
	char	   *real = realpath(path, NULL);
	char	   *copy;
	struct stat status;

	if (real == NULL)
	{
		/* A link to nowhere is no file that is yet to be made. */
		if (errno != ENOENT || lstat(path, &status) == 0)
			raise_file_error(path, "resolve");
		return pstrdup(path);
	}
	copy = pstrdup(real);
	free(real);
	return copy;
}

/* Is the file that we hold still the one of that path? */
static bool
is_current(const char *path, int fd)
{
	struct stat held,
				named;

	return fstat(fd, &held) == 0 && stat(path, &named) == 0 &&
		held.st_dev == named.st_dev && held.st_ino == named.st_ino;
}

/* Open the file, made empty if there is none, and wait until no other writer has it. */
static int
open_locked(const char *path)
{
	struct stat status;
	int			fd;

	for (;;)
	{
		fd = open_file(path);
		if (fd < 0)
		{
			fd = OpenTransientFilePerm(path, O_RDONLY | O_CREAT | O_EXCL | PG_BINARY, S_IRUSR | S_IWUSR);
			if (fd < 0 && errno == EEXIST)
				continue;
			if (fd < 0)
				raise_file_error(path, "create");
		}
		check_file(path, fd, &status);
		while (flock(fd, LOCK_EX | LOCK_NB) != 0)
		{
			if (errno != EWOULDBLOCK && errno != EINTR)
				raise_file_error(path, "lock");
			CHECK_FOR_INTERRUPTS();
			pg_usleep(LOCK_RETRY_US);
		}
		if (is_current(path, fd))
			return fd;
		CloseTransientFile(fd);
		CHECK_FOR_INTERRUPTS();
	}
}

static void
write_all(const char *path, int fd, const KvEnvContents *contents)
{
	Size		written = 0;

	while (written < contents->length)
	{
		ssize_t		n;

		errno = 0;
		n = write(fd, contents->bytes + written, contents->length - written);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
		{
			if (errno == 0)
				errno = ENOSPC;
			raise_file_error(path, "write");
		}
		written += n;
	}
	if (pg_fsync(fd) != 0)
		raise_file_error(path, "fsync");
}

/* Is it the name of a file that a writer of this one makes? */
static bool
is_temporary_name(const char *name, const char *file)
{
	Size		length = strlen(file);
	const char *number = name + length + strlen(TEMPORARY_INFIX);

	return strncmp(name, file, length) == 0 && strncmp(name + length, TEMPORARY_INFIX, strlen(TEMPORARY_INFIX)) == 0 &&
		*number && number[strspn(number, "0123456789")] == '\0';
}

/* Remove a file that a writer left, unless one has it, or it is none of the server's own. */
static void
remove_left(const char *path)
{
	struct stat status;
	int			fd = OpenTransientFile(path, O_RDONLY | O_NONBLOCK | O_NOFOLLOW | PG_BINARY);

	if (fd < 0)
		return;
	if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == geteuid() &&
		flock(fd, LOCK_EX | LOCK_NB) == 0 && is_current(path, fd) && unlink(path) == 0)
		ereport(LOG,
				(errmsg("removed \"%s\": a process that was killed while it wrote the .env file left it", path)));
	CloseTransientFile(fd);
}

/* Remove what writers left beside the file. That this fails keeps nobody from writing. */
static void
remove_all_left(const char *path)
{
	char		directory[MAXPGPATH];
	const char *file = last_dir_separator(path) + 1;
	struct dirent *entry;
	DIR		   *dir;

	strlcpy(directory, path, sizeof(directory));
	get_parent_directory(directory);
	dir = AllocateDir(directory);
	while (dir && (entry = ReadDirExtended(dir, directory, LOG)) != NULL)
	{
		CHECK_FOR_INTERRUPTS();
		if (is_temporary_name(entry->d_name, file))
			remove_left(psprintf("%s/%s", directory, entry->d_name));
	}
	if (dir)
		FreeDir(dir);
}

/* Make a file beside the one that is to be replaced, with a lock on it from when it has something in it. */
static int
create_beside(const char *temporary)
{
	for (int tries = 0;; tries++)
	{
		int			fd = OpenTransientFilePerm(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | PG_BINARY, S_IRUSR | S_IWUSR);

		if (fd < 0 && (errno != EEXIST || tries == 0 || tries > LOCK_TRIES_MAX))
			raise_file_error(temporary, "create");
		if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0 && is_current(temporary, fd))
			return fd;
		/* Another writer takes it for one that was left, and removes it. */
		if (fd >= 0)
			CloseTransientFile(fd);
		CHECK_FOR_INTERRUPTS();
		pg_usleep(LOCK_RETRY_US);
	}
}

/* Write new contents to a file beside the one that old_fd is; returns it open, and locked. */
static int
write_beside(const char *temporary, int old_fd, const KvEnvContents *contents)
{
	struct stat old;
	int			fd = create_beside(temporary);

	PG_TRY();
	{
		/* Where the server may give files away, the owner keeps it. */
		if (fstat(old_fd, &old) != 0 || (fchown(fd, old.st_uid, old.st_gid) != 0 && errno != EPERM))
			raise_file_error(temporary, "examine");
		write_all(temporary, fd, contents);
	}
	PG_CATCH();
	{
		(void) unlink(temporary);
		PG_RE_THROW();
	}
	PG_END_TRY();
	return fd;
}

/*
 * Make a change of the file ready, which is made empty if there is none; no other writer can
 * change it until kv_env_store_finish, which the transaction's end has to call.
 */
void
kv_env_store_prepare(const char *path, KvEnvEdit edit, void *arg)
{
	char	   *real = resolve(path);
	int			fd = open_locked(real);
	KvEnvContents contents;

	remove_all_left(real);
	read_contents(real, fd, &contents);
	if (!edit(&contents, arg))
	{
		CloseTransientFile(fd);
		return;
	}
	strlcpy(ready.path, real, sizeof(ready.path));
	snprintf(ready.temporary, sizeof(ready.temporary), "%s" TEMPORARY_INFIX "%d", real, MyProcPid);
	ready.fd = fd;
	ready.temporary_fd = write_beside(ready.temporary, fd, &contents);
	ready.is_written = true;
}

/* Have what is ready take the file's place, or drop it. Throws nothing: the transaction has ended. */
void
kv_env_store_finish(bool replace)
{
	char		directory[MAXPGPATH];
	int			fd;

	if (!ready.is_written)
		return;
	ready.is_written = false;
	if (!replace)
		(void) unlink(ready.temporary);
	else if (rename(ready.temporary, ready.path) != 0)
	{
		ereport(WARNING,
				(errcode_for_file_access(),
				 errmsg("could not replace .env file \"%s\": %m", ready.path),
				 errdetail("What the transaction changed is in the database alone.")));
		(void) unlink(ready.temporary);
	}
	CloseTransientFile(ready.temporary_fd);
	CloseTransientFile(ready.fd);
	strlcpy(directory, ready.path, sizeof(directory));
	get_parent_directory(directory);
	if (replace && (fd = open(directory, O_RDONLY)) >= 0)
	{
		(void) pg_fsync(fd);
		close(fd);
	}
}
