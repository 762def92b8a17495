/*-------------------------------------------------------------------------
 * vault_id.h
 *		The vault's own name, part of every secret's associated data.
 *-------------------------------------------------------------------------
 */
#ifndef KV_VAULT_ID_H
#define KV_VAULT_ID_H

#include "postgres.h"

#include "utils/uuid.h"

extern void kv_vault_id_get(pg_uuid_t *vault_id);
extern void kv_vault_id_ensure(pg_uuid_t *vault_id);

#endif
