/*-------------------------------------------------------------------------
 * key_row.h
 *		Writes rows of api_keys.
 *-------------------------------------------------------------------------
 */
#ifndef KV_KEY_ROW_H
#define KV_KEY_ROW_H

#include "postgres.h"

#include "crypto/data_key.h"
#include "datatype/timestamp.h"
#include "utils/uuid.h"

/* What a record in api_keys is bound to, besides user, row and provider. */
#define KV_API_KEY_PURPOSE	"api_key"

/* A key to be kept. The platform's has the user KV_PLATFORM_USER. */
typedef struct KvNewKey
{
	const char *user_id;
	const char *provider;
	const char *name;
	const char *secret;			/* NULL when only the box is known */
	bytea	   *box;			/* the secret as the client sealed it, or NULL */
	bool		is_reference;	/* the secret names where the key is kept */
	bool		may_create_user;
	bool		expires;
	TimestampTz expires_at;
} KvNewKey;

extern pg_uuid_t kv_key_row_write(const KvNewKey *key);
extern char *kv_key_row_open_box(const char *user_id, const char *provider, const bytea *box);
extern char *kv_key_row_open(const char *user_id, const char *provider, const pg_uuid_t *id, const bytea *stored);
extern void kv_key_row_convert(const char *user_id, const pg_uuid_t *id, const char *provider, bool is_reference, const char *secret);
extern void kv_key_row_replace(const KvNewKey *key, const pg_uuid_t *id);
extern bool kv_key_row_may_wait(void);
extern bytea *kv_key_row_fingerprint(const KvDataKey *data_key, const char *secret);

#endif
