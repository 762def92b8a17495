/*-------------------------------------------------------------------------
 * https.h
 *		One HTTPS call, waited for.
 *-------------------------------------------------------------------------
 */
#ifndef KV_HTTPS_H
#define KV_HTTPS_H

#include "postgres.h"

typedef struct KvHttpsRequest
{
	const char *url;			/* https, or http to a loopback address */
	const char *const *headers; /* "Name: value", ending with NULL */
	const char *body;			/* NULL for GET, else POST */
	const char *ca_file;		/* NULL or empty for the system's certificates */
	int			timeout_ms;
	Size		size_max;		/* bytes of the answer */
} KvHttpsRequest;

typedef struct KvHttpsResponse
{
	long		status;			/* HTTP status; 0 when there was no answer */
	char	   *body;			/* NUL-terminated, in secret memory of the caller's context */
	Size		length;
	char		error[256];		/* why there was none; empty when there was */
} KvHttpsResponse;

extern bool kv_https_initialize(void);
extern void kv_https_keep_no_plaintext(void *easy);
extern void kv_https_leave_resolver(void *multi, void *easy);
extern bool kv_https_host_is_loopback(const char *host);
extern bool kv_https_call(const KvHttpsRequest *request, KvHttpsResponse *response);

#endif
