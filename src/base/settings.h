/*-------------------------------------------------------------------------
 * settings.h
 *		Every setting of keyvault; keyvault.a_b is the variable kv_a_b.
 *-------------------------------------------------------------------------
 */
#ifndef KV_SETTINGS_H
#define KV_SETTINGS_H

#include "postgres.h"

/* The longest user_id, in bytes. The tables' CHECK says the same. */
#define KV_USER_ID_MAX 255

/* Owner of the platform's own keys: no identity can be the empty string. */
#define KV_PLATFORM_USER ""

/* Values of keyvault.mode. */
typedef enum KvMode
{
	KV_MODE_PRODUCTION,
	KV_MODE_DEVELOPMENT,
	KV_MODE_AUTO,
} KvMode;

extern int	kv_mode;
extern char *kv_env_file;
extern int	kv_key_use_table_size;
extern int	kv_key_use_flush_interval;
extern char *kv_user_id;
extern char *kv_master_key_file;
extern bool kv_allow_master_key_in_data_directory;
extern char *kv_master_key_command;
extern int	kv_master_key_timeout;
extern char *kv_vault_address;
extern char *kv_vault_token_file;
extern char *kv_vault_transit_key;
extern char *kv_vault_ca_file;
extern char *kv_vault_namespace;
extern int	kv_record_key_cache_size;
extern bool kv_reveal;
extern int	kv_sealing_key_lifetime;
extern int	kv_reference_cache_ttl;
extern bool kv_create_users;
extern bool kv_redact_logs;
extern char *kv_databases;
extern int	kv_max_concurrent_requests;
extern int	kv_max_concurrent_requests_per_user;
extern int	kv_per_host_connections;
extern int	kv_connect_timeout;
extern int	kv_request_timeout;
extern int	kv_max_attempts;
extern int	kv_max_request_size;
extern int	kv_max_response_size;
extern int	kv_worker_idle_timeout;
extern int	kv_maintenance_interval;
extern int	kv_response_retention;
extern int	kv_data_key_max_age;
extern int	kv_usage_retention;
extern bool kv_drop_retired_usage;

extern void kv_settings_init(void);
extern void kv_settings_on_reveal_off(void (*callback) (void));

#endif
