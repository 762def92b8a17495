/*-------------------------------------------------------------------------
 * activity.h
 *		Keeps secrets out of pg_stat_activity and pg_stat_statements.
 *-------------------------------------------------------------------------
 */
#ifndef KV_ACTIVITY_H
#define KV_ACTIVITY_H

extern void kv_activity_init(void);
extern void kv_activity_withhold(void);
extern void kv_activity_withhold_where_sensitive(void);
extern bool kv_activity_names_secret(void);
extern bool kv_activity_has_key_shape(void);

#endif
