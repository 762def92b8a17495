/*-------------------------------------------------------------------------
 * launcher.h
 *		Starts a worker in each database that has requests.
 *-------------------------------------------------------------------------
 */
#ifndef KV_LAUNCHER_H
#define KV_LAUNCHER_H

extern void kv_launcher_init(void);

#endif
