/*-------------------------------------------------------------------------
 * openssl_error.h
 *		What OpenSSL says when it fails.
 *-------------------------------------------------------------------------
 */
#ifndef KV_OPENSSL_ERROR_H
#define KV_OPENSSL_ERROR_H

extern void kv_openssl_error_raise(const char *what);

#endif
