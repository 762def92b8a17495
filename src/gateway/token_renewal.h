/*-------------------------------------------------------------------------
 * token_renewal.h
 *		Keeps the token for the Vault server alive.
 *-------------------------------------------------------------------------
 */
#ifndef KV_TOKEN_RENEWAL_H
#define KV_TOKEN_RENEWAL_H

#include "postgres.h"

extern long kv_token_renewal_serve(bool reloaded);

#endif
