/*-------------------------------------------------------------------------
 * database_drop.h
 *		Lets databases be dropped, renamed and copied although they have a worker.
 *-------------------------------------------------------------------------
 */
#ifndef KV_DATABASE_DROP_H
#define KV_DATABASE_DROP_H

extern void kv_database_drop_init(void);

#endif
