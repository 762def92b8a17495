/*-------------------------------------------------------------------------
 * partition_restore.h
 *		Lets pg_restore bring the partitions of usage_records without an error.
 *-------------------------------------------------------------------------
 */
#ifndef KV_PARTITION_RESTORE_H
#define KV_PARTITION_RESTORE_H

extern void kv_partition_restore_init(void);

#endif
