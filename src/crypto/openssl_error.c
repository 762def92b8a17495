/*-------------------------------------------------------------------------
 * openssl_error.c
 *		What OpenSSL says when it fails.
 *
 * Its reasons name algorithms and steps, never an input.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/openssl_error.h"

#include <openssl/err.h>

#include "base/error.h"

/* Raise that a step failed, with OpenSSL's reason. */
void
kv_openssl_error_raise(const char *what)
{
	unsigned long code = ERR_get_error();
	const char *reason = code ? ERR_reason_error_string(code) : NULL;

	ERR_clear_error();
	ereport(ERROR,
			(errcode(ERRCODE_INTERNAL_ERROR),
			 errmsg("%s failed in OpenSSL: %s", what, reason ? reason : "no reason given"),
			 errhint("Check that the server's OpenSSL provides AES-256-GCM, HKDF and ECDH on P-256.")));
}
