/*-------------------------------------------------------------------------
 * debit.h
 *		The debit of usage_records.
 *-------------------------------------------------------------------------
 */
#ifndef KV_DEBIT_H
#define KV_DEBIT_H

extern void kv_debit_init(void);

#endif
