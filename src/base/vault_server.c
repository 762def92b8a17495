/*-------------------------------------------------------------------------
 * vault_server.c
 *		Calls to HashiCorp Vault or OpenBao, with the settings keyvault.vault_*.
 *
 * The token is read anew for each call, from a file that nobody else can read, so that
 * another program may replace it. Answers are never quoted: they hold secrets.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/vault_server.h"

#include "base/https.h"
#include "base/secret.h"
#include "base/secret_file.h"
#include "base/secret_json.h"
#include "base/settings.h"

#define TOKEN_MAX		4096
#define ANSWER_MAX		(256 * 1024)

/* The token; NULL with a reason. */
static char *
read_token(const char **reason)
{
	char	   *token;

	if (kv_vault_token_file[0] == '\0')
	{
		*reason = "cannot be asked: keyvault.vault_token_file is empty";
		return NULL;
	}
	token = kv_secret_file_read(kv_vault_token_file, TOKEN_MAX, reason);
	if (token)
		*reason = kv_secret_file_misplaced(kv_vault_token_file);
	if (*reason)
	{
		*reason = psprintf("cannot be asked: the token's file \"%s\" %s", kv_vault_token_file, *reason);
		return NULL;
	}
	token += strspn(token, " \t\r\n");
	token[strcspn(token, " \t\r\n")] = '\0';
	for (const char *p = token; *p; p++)
		if (*p < '!' || *p > '~')
			token = "";
	if (*token == '\0')
	{
		*reason = psprintf("cannot be asked: the token's file \"%s\" does not hold a token", kv_vault_token_file);
		return NULL;
	}
	return token;
}

/* What an HTTP status other than 200 means; see "HTTP status codes" of Vault's API documentation. */
const char *
kv_vault_server_reason(long status)
{
	switch (status)
	{
		case 400:
			return "refused the request as malformed (status 400): the ciphertext or the path is not of this server's making";
		case 403:
			return "denied access (status 403): the token is expired or revoked, or its policy lacks the path";
		case 404:
			return "knows no such path (status 404): check the mount, the name and keyvault.vault_namespace";
		case 429:
			return "has too many calls to answer (status 429)";
		case 503:
			return "is sealed or down for maintenance (status 503): have it unsealed";
		default:
			return psprintf("answered with status %ld", status);
	}
}

/* Make ready a call of /v1/path. False, with a reason that goes on from "the Vault server ...", when it cannot be made. */
bool
kv_vault_server_prepare(const char *path, KvVaultServerRequest *prepared, const char **reason)
{
	Size		address = strlen(kv_vault_address);
	char	   *token;
	char	   *header;

	if (address == 0)
	{
		*reason = "is not set: keyvault.vault_address is empty";
		return false;
	}
	if ((token = read_token(reason)) == NULL)
		return false;
	header = kv_secret_alloc(TOKEN_MAX + 32);
	snprintf(header, TOKEN_MAX + 32, "X-Vault-Token: %s", token);
	memset(prepared, 0, sizeof(*prepared));
	prepared->headers[0] = "X-Vault-Request: true";
	prepared->headers[1] = "Content-Type: application/json";
	prepared->headers[2] = header;
	if (kv_vault_namespace[0])
		prepared->headers[3] = psprintf("X-Vault-Namespace: %s", kv_vault_namespace);
	while (address > 0 && kv_vault_address[address - 1] == '/')
		address--;
	prepared->url = psprintf("%.*s/v1/%s", (int) address, kv_vault_address, path);
	return true;
}

/*
 * Call /v1/path within timeout_ms: POST with a body, GET without one. Returns the answer's text, in secret memory;
 * NULL, with a reason as above, when there is none to be used. Errors: only those of interrupts.
 */
char *
kv_vault_server_call(const char *path, const char *body, int timeout_ms, const char **reason)
{
	KvHttpsRequest request = {.body = body,.ca_file = kv_vault_ca_file,.timeout_ms = timeout_ms,.size_max = ANSWER_MAX};
	KvVaultServerRequest prepared;
	KvHttpsResponse response;

	if (!kv_vault_server_prepare(path, &prepared, reason))
		return NULL;
	request.url = prepared.url;
	request.headers = prepared.headers;
	if (!kv_https_call(&request, &response))
		*reason = psprintf("could not be reached: %s", response.error);
	else if (response.status != 200)
		*reason = kv_vault_server_reason(response.status);
	else if (strlen(response.body) != response.length)
		*reason = "gave an answer that is not JSON";
	else
		return response.body;
	return NULL;
}

/*
 * Renew the token within timeout_ms. Returns the seconds that it is good for, 0 for one that does not end; -1,
 * with a reason as above, when it is not renewed.
 */
int
kv_vault_server_renew_token(int timeout_ms, const char **reason)
{
	char	   *answer = kv_vault_server_call("auth/token/renew-self", "{}", timeout_ms, reason);
	KvSecretJsonValue duration;

	if (answer == NULL)
		return -1;
	if (!kv_secret_json_find(answer, strlen(answer), "auth.lease_duration", &duration))
		*reason = "gave an answer that is not JSON";
	else if (duration.count < 0)
		*reason = "gave an answer without auth.lease_duration";
	return (int) duration.count;
}
