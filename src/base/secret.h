/*-------------------------------------------------------------------------
 * secret.h
 *		Memory for secrets, zeroed when it goes.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SECRET_H
#define KV_SECRET_H

#include "postgres.h"

extern void kv_secret_wipe(void *memory, Size length);
extern void *kv_secret_alloc(Size length);
extern void *kv_secret_page(Size length);
extern void kv_secret_wipe_pages(void);
extern void *kv_secret_shared_page(Size length);
extern void *kv_secret_run_page(Size length);

#endif
