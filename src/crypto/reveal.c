/*-------------------------------------------------------------------------
 * reveal.c
 *		Which processes may hold what opens keys.
 *
 * With keyvault.reveal on every process may. With it off only a keeper may, a worker: no
 * other process ever holds the master key, and one that did wipes it at the reload that
 * turns the setting off.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/reveal.h"

#include <sys/prctl.h>
#include <sys/resource.h>

#include "base/error.h"
#include "base/secret.h"
#include "base/settings.h"

/* Set for the life of a keeper. */
static bool is_keeper = false;

/* Is this process a keeper, a worker that is? */
bool
kv_reveal_is_keeper(void)
{
	return is_keeper;
}

/* May this process open keys? */
bool
kv_reveal_may_open(void)
{
	return kv_reveal || is_keeper;
}

/* Error 42501 where this process may not open keys. */
void
kv_reveal_require(void)
{
	if (!kv_reveal_may_open())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("keys cannot be read here: keyvault.reveal is off"),
				 errdetail("Only the worker opens keys, to make the calls of keyvault.request()."),
				 errhint("Call the provider with keyvault.request() or keyvault.call().")));
}

/*
 * Make this process one that may open keys, and guard its memory: a process that is not
 * dumpable leaves no core file, and others of the same operating system user can neither
 * trace it nor read its memory (prctl(2), ptrace(2)).
 */
void
kv_reveal_become_keeper(void)
{
	struct rlimit none = {0, 0};

	(void) prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
	(void) setrlimit(RLIMIT_CORE, &none);
	is_keeper = true;
}

static void
forget(void)
{
	if (!is_keeper)
		kv_secret_wipe_pages();
}

/* Follow the setting; called once, while the server preloads the library. */
void
kv_reveal_init(void)
{
	kv_settings_on_reveal_off(forget);
}
