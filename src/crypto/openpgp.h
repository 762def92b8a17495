/*-------------------------------------------------------------------------
 * openpgp.h
 *		OpenPGP messages, which pgcrypto makes.
 *-------------------------------------------------------------------------
 */
#ifndef KV_OPENPGP_H
#define KV_OPENPGP_H

#include "postgres.h"

extern bytea *kv_openpgp_encrypt(bytea *plain, Datum public_key);

#endif
