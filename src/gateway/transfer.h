/*-------------------------------------------------------------------------
 * transfer.h
 *		Many HTTP calls at once, behind one file descriptor.
 *-------------------------------------------------------------------------
 */
#ifndef KV_TRANSFER_H
#define KV_TRANSFER_H

#include "postgres.h"

typedef struct KvTransferPool KvTransferPool;
typedef struct KvTransfer KvTransfer;

/* One call. Everything is copied, except that secret headers are wiped when the transfer ends. */
typedef struct KvTransferRequest
{
	const char *url;
	const char *allowed_host;	/* host or host:port that may be http or private, or NULL */
	const char *const *headers; /* "Name: value", NULL-terminated */
	const char *body;			/* POST body, or NULL for GET */
	bool		is_own_server;	/* an administrator set the address, and the answer is a secret */
	const char *ca_file;		/* NULL or empty for the system's certificates */
	int			timeout_ms;
	void	   *owner;			/* handed back with the result */
} KvTransferRequest;

typedef struct KvTransferResult
{
	void	   *owner;
	long		status_code;	/* 0 without an answer */
	long		retry_after_ms; /* -1 when the answer does not say */
	bool		nothing_sent;	/* the provider cannot have seen the call */
	bool		refused;		/* by us: another attempt would be refused too */
	char		error[256];		/* empty for a complete answer */
	char	   *body;			/* decoded bytes, valid until kv_transfer_free */
	Size		length;
	KvTransfer *transfer;
} KvTransferResult;

extern KvTransferPool *kv_transfer_pool_create(void);
extern void kv_transfer_pool_configure(KvTransferPool *pool, int host_connections, int connections);
extern int	kv_transfer_pool_fd(KvTransferPool *pool);
extern long kv_transfer_pool_timeout(KvTransferPool *pool);
extern void kv_transfer_pool_advance(KvTransferPool *pool);
extern bool kv_transfer_start(KvTransferPool *pool, const KvTransferRequest *request, char *error, Size error_size);
extern bool kv_transfer_next(KvTransferPool *pool, KvTransferResult *result);
extern void kv_transfer_free(KvTransferPool *pool, KvTransfer *transfer);

#endif
