/*-------------------------------------------------------------------------
 * token_renewal.c
 *		Keeps the token for the Vault server alive: the launcher renews it when half of its
 *		time is over. That it fails is a warning, and tried again.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "gateway/token_renewal.h"

#include "base/error.h"
#include "base/settings.h"
#include "base/vault_server.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* When to try again what has failed, and the least time between two renewals. */
#define RETRY_MS	60000
#define LEAST_MS	1000

/* The launcher starts no worker while it waits for the server, so it does not wait longer; half of the token's time is left for the next try. */
#define TIMEOUT_MS	2000

/* When to renew; the launcher's, at its start at once. */
static TimestampTz due = 0;

static void
renew(void)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "keyvault token renewal", ALLOCSET_SMALL_SIZES);
	MemoryContext old = MemoryContextSwitchTo(context);
	const char *reason;
	int			seconds = kv_vault_server_renew_token(Min(kv_master_key_timeout, TIMEOUT_MS), &reason);

	if (seconds > 0)
		due = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), Max((int64) seconds * 500, LEAST_MS));
	else if (seconds == 0)
		TIMESTAMP_NOEND(due);
	else
	{
		due = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), RETRY_MS);
		ereport(WARNING,
				(errcode(ERRCODE_KV_MASTER_KEY),
				 errmsg("token for the Vault server is not renewed"),
				 errdetail("The Vault server %s.", reason),
				 errhint("It is tried again in a minute. Put a good token into keyvault.vault_token_file.")));
	}
	MemoryContextSwitchTo(old);
	MemoryContextDelete(context);
}

/* Renew the token if that is due, or the configuration was reloaded; returns the milliseconds until it is due again, -1 for never. */
long
kv_token_renewal_serve(bool reloaded)
{
	if (kv_vault_address[0] == '\0' || kv_vault_token_file[0] == '\0')
		return -1;
	if (reloaded || due <= GetCurrentTimestamp())
		renew();
	if (TIMESTAMP_IS_NOEND(due))
		return -1;
	return Max(TimestampDifferenceMilliseconds(GetCurrentTimestamp(), due), 1);
}
