/*-------------------------------------------------------------------------
 * maintenance.h
 *		What the worker does from time to time.
 *-------------------------------------------------------------------------
 */
#ifndef KV_MAINTENANCE_H
#define KV_MAINTENANCE_H

#include "postgres.h"

#include "datatype/timestamp.h"
#include "gateway/turn.h"

extern TimestampTz kv_maintenance_due_at(void);
extern void kv_maintenance_reload(void);
extern void kv_maintenance_take(KvWorker *worker);

#endif
