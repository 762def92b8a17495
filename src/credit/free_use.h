/*-------------------------------------------------------------------------
 * free_use.h
 *		Uses of no credits, which change no balance, and the making of a budget.
 *-------------------------------------------------------------------------
 */
#ifndef KV_FREE_USE_H
#define KV_FREE_USE_H

#include "postgres.h"

extern bool kv_free_use_announce(const char *user_id);

#endif
