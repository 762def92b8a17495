/*-------------------------------------------------------------------------
 * worker_slot.h
 *		Which database has a worker, and how to wake it.
 *-------------------------------------------------------------------------
 */
#ifndef KV_WORKER_SLOT_H
#define KV_WORKER_SLOT_H

#include "postgres.h"

#include "datatype/timestamp.h"

extern Size kv_worker_slot_shmem_size(void);
extern void kv_worker_slot_shmem_init(void *memory, bool found);
extern void kv_worker_slot_init(void);

/* for those who enqueue and wait */
extern void kv_worker_wake_at_commit(void);
extern void kv_worker_announce_at_commit(void);
extern void kv_worker_wake(Oid database);
extern void kv_worker_wake_launcher(void);
extern void kv_worker_await_settlement_begin(void);
extern bool kv_worker_await_settlement(long timeout_ms);
extern void kv_worker_await_settlement_end(void);

/* for the launcher */
extern void kv_worker_launcher_attach(void);
extern void kv_worker_request_start(Oid database);
extern int	kv_worker_next_to_start(Oid *databases, int max, bool *later);
extern bool kv_worker_take_scan_request(void);
extern void kv_worker_start_failed(Oid database);
extern void kv_worker_request_visits(void);

/* for the worker */
extern bool kv_worker_attach(Oid database);
extern void kv_worker_note_served(Oid database);
extern uint64 kv_worker_wakeups(void);
extern bool kv_worker_detach_unless_woken(uint64 wakeups_seen);
extern void kv_worker_announce_settlement(void);

/* for DROP DATABASE */
extern void kv_worker_stop(Oid database);
extern void kv_worker_stop_end(Oid database, bool still_there);

#endif
