/*-------------------------------------------------------------------------
 * envelope.h
 *		Seal and open one secret under a user's data key.
 *-------------------------------------------------------------------------
 */
#ifndef KV_ENVELOPE_H
#define KV_ENVELOPE_H

#include "postgres.h"

#include "crypto/data_key.h"

/* What a secret is bound to besides its vault and its user. */
typedef struct KvSecretName
{
	pg_uuid_t	id;
	const char *provider;
	const char *purpose;
} KvSecretName;

extern bytea *kv_envelope_seal(const KvDataKey *data_key, const KvSecretName *name, const char *secret, Size length);
extern Size kv_envelope_secret_length(const bytea *record);
extern char *kv_envelope_open(const char *user_id, const KvSecretName *name, const bytea *record);

#endif
