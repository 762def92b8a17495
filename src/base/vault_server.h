/*-------------------------------------------------------------------------
 * vault_server.h
 *		Calls to HashiCorp Vault or OpenBao.
 *-------------------------------------------------------------------------
 */
#ifndef KV_VAULT_SERVER_H
#define KV_VAULT_SERVER_H

#include "postgres.h"

#include "utils/jsonb.h"

extern Jsonb *kv_vault_server_call(const char *path, const char *body, const char **reason);
extern int	kv_vault_server_renew_token(const char **reason);

#endif
