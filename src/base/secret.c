/*-------------------------------------------------------------------------
 * secret.c
 *		Memory for secrets, zeroed when it goes.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/secret.h"

#include <sys/mman.h>

#include <openssl/crypto.h>

#include "base/error.h"
#include "utils/memutils.h"

/* The pages of this process; it maps few, each once. */
#define PAGES_MAX 16
static struct
{
	void	   *memory;
	Size		length;
}			pages[PAGES_MAX];
static int	n_pages = 0;

typedef struct SecretBuffer
{
	MemoryContextCallback callback;
	Size		length;
	char		bytes[FLEXIBLE_ARRAY_MEMBER];
} SecretBuffer;

/* Overwrite memory with zeros in a way that the compiler keeps. */
void
kv_secret_wipe(void *memory, Size length)
{
	OPENSSL_cleanse(memory, length);
}

static void
wipe_buffer(void *arg)
{
	SecretBuffer *buffer = arg;

	kv_secret_wipe(buffer->bytes, buffer->length);
}

/*
 * Allocate memory in the current context that is zeroed when the context is reset or
 * deleted, after an error too. Not to be passed to pfree.
 */
void *
kv_secret_alloc(Size length)
{
	SecretBuffer *buffer = palloc(offsetof(SecretBuffer, bytes) + length);

	buffer->length = length;
	buffer->callback.func = wipe_buffer;
	buffer->callback.arg = buffer;
	MemoryContextRegisterResetCallback(CurrentMemoryContext, &buffer->callback);
	return buffer->bytes;
}

static void *
map_page(Size length, int sharing)
{
	void	   *page = mmap(NULL, length, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		ereport(ERROR,
				(errcode(ERRCODE_OUT_OF_MEMORY),
				 errmsg("could not map memory for the master key: %m")));
#ifdef MADV_DONTDUMP
	(void) madvise(page, length, MADV_DONTDUMP);
#endif
	(void) mlock(page, length);
	return page;
}

/* Have kv_secret_wipe_pages find a page. */
static void *
remember_page(void *page, Size length)
{
	if (n_pages == PAGES_MAX)
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("too many pages for secrets")));
	pages[n_pages].memory = page;
	pages[n_pages++].length = length;
	return page;
}

/*
 * Map zeroed memory for the life of the process that stays out of core files and, where
 * the limit on locked memory allows, out of swap.
 */
void *
kv_secret_page(Size length)
{
	return remember_page(map_page(length, MAP_PRIVATE), length);
}

/* The same, in the postmaster, for all the processes that it starts. */
void *
kv_secret_shared_page(Size length)
{
	return remember_page(map_page(length, MAP_SHARED), length);
}

/* The same, for what every process may know as long as the server runs: kv_secret_wipe_pages leaves it. */
void *
kv_secret_run_page(Size length)
{
	return map_page(length, MAP_SHARED);
}

/* Overwrite all that this process keeps in such pages with zeros. */
void
kv_secret_wipe_pages(void)
{
	for (int i = 0; i < n_pages; i++)
		kv_secret_wipe(pages[i].memory, pages[i].length);
}
