/*-------------------------------------------------------------------------
 * reference.h
 *		Fetches keys that are kept on a Vault server, for the worker's calls.
 *-------------------------------------------------------------------------
 */
#ifndef KV_REFERENCE_H
#define KV_REFERENCE_H

#include "postgres.h"

#include "gateway/transfer.h"

extern char *kv_reference_known(const char *reference);
extern bool kv_reference_ask(const char *reference, KvTransferPool *pool, void *owner, const char **reason);
extern char *kv_reference_take(const char *reference, const KvTransferResult *result, bool *may_pass, const char **reason);
extern void kv_reference_forget(const char *reference);
extern void kv_reference_forget_all(void);
extern bool kv_reference_check(const char *key, const char *provider, const char **problem, const char **reason);

#endif
