/*
 * early.c
 *		Has AddressSanitizer begin before any other library's constructor.
 *
 * libgpg-error's constructor allocates inside bindtextdomain, which holds a lock of the C library. A sanitizer that
 * begins at that allocation asks for an error text, wants the same lock, and the program hangs later. Linked with
 * -z initfirst and preloaded behind the sanitizer, this allocation comes first.
 */
#include <stdlib.h>

__attribute__((constructor)) static void
early(void)
{
	void	   *volatile memory = malloc(1);

	free(memory);
}
