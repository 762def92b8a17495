/*-------------------------------------------------------------------------
 * debit.h
 *		The debit of usage_records.
 *-------------------------------------------------------------------------
 */
#ifndef KV_DEBIT_H
#define KV_DEBIT_H

/* The provider and the model of a usage record, in bytes. */
#define KV_USAGE_NAME_MAX 255

extern void kv_debit_init(void);

#endif
