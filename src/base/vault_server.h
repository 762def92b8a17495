/*-------------------------------------------------------------------------
 * vault_server.h
 *		Calls to HashiCorp Vault or OpenBao.
 *-------------------------------------------------------------------------
 */
#ifndef KV_VAULT_SERVER_H
#define KV_VAULT_SERVER_H

#include "postgres.h"

/* A call that is ready to be made. */
typedef struct KvVaultServerRequest
{
	const char *url;
	const char *headers[5];		/* ending with NULL; one holds the token */
} KvVaultServerRequest;

extern bool kv_vault_server_prepare(const char *path, KvVaultServerRequest *prepared, const char **reason);
extern const char *kv_vault_server_reason(long status);
extern char *kv_vault_server_call(const char *path, const char *body, int timeout_ms, const char **reason);
extern int	kv_vault_server_renew_token(int timeout_ms, const char **reason);

#endif
