/*-------------------------------------------------------------------------
 * places.h
 *		How many calls may be under way at once.
 *-------------------------------------------------------------------------
 */
#ifndef KV_PLACES_H
#define KV_PLACES_H

#include "postgres.h"

extern void kv_places_configure(void);
extern int	kv_places(void);

#endif
