/*-------------------------------------------------------------------------
 * reveal.h
 *		Which processes may hold what opens keys.
 *-------------------------------------------------------------------------
 */
#ifndef KV_REVEAL_H
#define KV_REVEAL_H

#include "postgres.h"

extern void kv_reveal_init(void);
extern bool kv_reveal_is_keeper(void);
extern bool kv_reveal_may_open(void);
extern void kv_reveal_require(void);
extern void kv_reveal_become_keeper(void);

#endif
