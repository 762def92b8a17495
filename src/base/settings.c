/*-------------------------------------------------------------------------
 * settings.c
 *		Every setting of keyvault.
 *
 * No setting holds a secret: pg_monitor may read any, ALTER ROLE shows them to
 * everybody, and a reload logs new values.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/settings.h"

#include <limits.h>

#include "mb/pg_wchar.h"
#include "utils/guc.h"

char	   *kv_user_id = NULL;
char	   *kv_master_key_file = NULL;
bool		kv_allow_master_key_in_data_directory = false;
char	   *kv_master_key_command = NULL;
int			kv_master_key_timeout = 10000;
char	   *kv_vault_address = NULL;
char	   *kv_vault_token_file = NULL;
char	   *kv_vault_transit_key = NULL;
char	   *kv_vault_ca_file = NULL;
char	   *kv_vault_namespace = NULL;
int			kv_record_key_cache_size = 16384;
int			kv_mode = KV_MODE_PRODUCTION;
char	   *kv_env_file = NULL;
int			kv_key_use_table_size = 32768;
int			kv_key_use_flush_interval = 60;
bool		kv_reveal = true;
int			kv_sealing_key_lifetime = 90 * 24 * 60 * 60;
int			kv_reference_cache_ttl = 60;
bool		kv_create_users = true;
bool		kv_redact_logs = true;
char	   *kv_databases = NULL;
int			kv_max_concurrent_requests = 100;
int			kv_max_concurrent_requests_per_user = 50;
int			kv_per_host_connections = 100;
int			kv_connect_timeout = 10000;
int			kv_request_timeout = 600000;
int			kv_max_attempts = 4;
int			kv_max_request_size = 16384;
int			kv_max_response_size = 16384;
int			kv_worker_idle_timeout = 60000;
int			kv_maintenance_interval = 300000;
int			kv_response_retention = 30 * 86400;
int			kv_data_key_max_age = 0;
int			kv_usage_retention = 0;
bool		kv_drop_retired_usage = false;

static const struct config_enum_entry modes[] = {
	{"production", KV_MODE_PRODUCTION, false},
	{"development", KV_MODE_DEVELOPMENT, false},
	{"auto", KV_MODE_AUTO, false},
	{NULL, 0, false}
};

static bool
check_user_id(char **newval, void **extra, GucSource source)
{
	if (strlen(*newval) > KV_USER_ID_MAX)
	{
		GUC_check_errdetail("A user_id is at most %d bytes long.", KV_USER_ID_MAX);
		return false;
	}
	return true;
}

static void
define_identity_settings(void)
{
	/*
	 * PGC_SUSET, and without GUC_NO_RESET_ALL: SET privilege on it is the right to act
	 * for any user, and DISCARD ALL forgets it before a pooler hands the session on.
	 */
	DefineCustomStringVariable("keyvault.user_id",
							   "The user that the transaction acts as.",
							   "Set by keyvault.act_as(); GRANT SET ON PARAMETER on it is the right to act for any user.",
							   &kv_user_id, "", PGC_SUSET,
							   GUC_DISALLOW_IN_FILE | GUC_NOT_IN_SAMPLE | GUC_NO_SHOW_ALL,
							   check_user_id, NULL, NULL);
	DefineCustomBoolVariable("keyvault.create_users",
							 "Makes a user that does not exist at a trusted application's first write for it.",
							 NULL, &kv_create_users, true, PGC_SUSET, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("keyvault.redact_logs",
							 "Takes secrets out of what the server logs.",
							 NULL, &kv_redact_logs, true, PGC_SIGHUP, 0, NULL, NULL, NULL);
}

static void
define_master_key_settings(void)
{
	DefineCustomStringVariable("keyvault.master_key_file",
							   "The file that holds the master key: 64 hexadecimal digits, readable by the server's user alone.",
							   NULL, &kv_master_key_file, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY,
							   NULL, NULL, NULL);
	DefineCustomStringVariable("keyvault.master_key_command",
							   "The program, and its arguments, that prints the master key.",
							   "An absolute path, then arguments, separated by white space; no shell reads them.",
							   &kv_master_key_command, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.master_key_timeout",
							"How long the master key's command, or the Vault server, may take.",
							NULL, &kv_master_key_timeout, 10000, 1, 600000, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomBoolVariable("keyvault.allow_master_key_in_data_directory",
							 "Accepts a master key file, or the file of Vault's token, inside the data directory, where base backups carry it along.",
							 NULL, &kv_allow_master_key_in_data_directory, false, PGC_SIGHUP, 0,
							 NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.record_key_cache_size",
							"Keys of records that each process keeps at hand, 113 bytes each; fewer than 4 for none.",
							NULL, &kv_record_key_cache_size, 16384, 0, 1048576, PGC_POSTMASTER, 0, NULL, NULL, NULL);
}

static void (*on_reveal_off) (void) = NULL;

/* Have a function called when a reload turns keyvault.reveal off. It must not throw. */
void
kv_settings_on_reveal_off(void (*callback) (void))
{
	on_reveal_off = callback;
}

static void
assign_reveal(bool newval, void *extra)
{
	if (!newval && on_reveal_off)
		on_reveal_off();
}

static void
define_key_settings(void)
{
	DefineCustomBoolVariable("keyvault.reveal",
							 "Lets those who may read a key read it; off, only the worker can open keys.",
							 NULL, &kv_reveal, true, PGC_SIGHUP, 0, NULL, assign_reveal, NULL);
	DefineCustomIntVariable("keyvault.sealing_key_lifetime",
							"Age at which the key that clients seal to gets a successor; boxes for it are taken for twice as long.",
							NULL, &kv_sealing_key_lifetime, 90 * 24 * 60 * 60, 60, INT_MAX, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.reference_cache_ttl",
							"How long the worker keeps a key that it fetched by a reference.",
							NULL, &kv_reference_cache_ttl, 60, 0, 86400, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
}

/* When and how often keys are used. */
static void
define_key_use_settings(void)
{
	DefineCustomIntVariable("keyvault.key_use_table_size",
							"Keys whose uses can be noted between two flushes, 290 bytes each; fewer than 16 for none.",
							NULL, &kv_key_use_table_size, 32768, 0, 1048576, PGC_POSTMASTER, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.key_use_flush_interval",
							"How long uses of keys wait to be written to the table.",
							NULL, &kv_key_use_flush_interval, 60, 0, 86400, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
}

/* Development mode: keys of a .env file. */
static void
define_development_settings(void)
{
	DefineCustomEnumVariable("keyvault.mode",
							 "Whether keys are those of the database or of a .env file.",
							 "In auto, DEBUG and DEPLOY_ENV of the server's environment decide.",
							 &kv_mode, KV_MODE_PRODUCTION, modes, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomStringVariable("keyvault.env_file",
							   "The .env file of development mode, an absolute path.",
							   NULL, &kv_env_file, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
}

/* HashiCorp Vault or OpenBao: for a master key wrapped by Transit, and for references to its secrets. */
static void
define_vault_settings(void)
{
	DefineCustomStringVariable("keyvault.vault_address",
							   "URL of the HashiCorp Vault or OpenBao server, such as https://vault.example.com:8200.",
							   "Plain http is for a loopback address only.",
							   &kv_vault_address, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
	DefineCustomStringVariable("keyvault.vault_token_file",
							   "The file that holds the token for the Vault server, readable by the server's user alone.",
							   NULL, &kv_vault_token_file, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
	DefineCustomStringVariable("keyvault.vault_transit_key",
							   "The Transit key that keyvault.master_key_file is wrapped by, as mount/name.",
							   "Empty when the file holds master keys in the clear.",
							   &kv_vault_transit_key, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
	DefineCustomStringVariable("keyvault.vault_ca_file",
							   "The certificates that the Vault server's is checked with; empty for the system's.",
							   NULL, &kv_vault_ca_file, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
	DefineCustomStringVariable("keyvault.vault_namespace",
							   "The namespace within the Vault server; empty for none.",
							   NULL, &kv_vault_namespace, "", PGC_SIGHUP, GUC_SUPERUSER_ONLY, NULL, NULL, NULL);
}

static void
define_worker_settings(void)
{
	DefineCustomStringVariable("keyvault.databases",
							   "The databases whose requests are sent, separated by commas; empty for all.",
							   NULL, &kv_databases, "", PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.max_concurrent_requests",
							"Provider calls under way at once, in each database.",
							NULL, &kv_max_concurrent_requests, 100, 1, 10000, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.max_concurrent_requests_per_user",
							"Provider calls under way at once for one user.",
							NULL, &kv_max_concurrent_requests_per_user, 50, 1, 10000, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.per_host_connections",
							"Connections that the worker keeps to one host at most.",
							NULL, &kv_per_host_connections, 100, 1, 10000, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.connect_timeout",
							"Time to connect to a provider.",
							NULL, &kv_connect_timeout, 10000, 1, INT_MAX, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.request_timeout",
							"The longest time that a request may ask for.",
							NULL, &kv_request_timeout, 600000, 1, 86400000, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.max_attempts",
							"How often a call is sent before a failure that may pass is final.",
							NULL, &kv_max_attempts, 4, 1, 100, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.max_request_size",
							"The largest body, as jsonb, that a request may have.",
							NULL, &kv_max_request_size, 16384, 1, 262144, PGC_SIGHUP, GUC_UNIT_KB, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.max_response_size",
							"The largest answer, decoded, that is taken from a provider.",
							NULL, &kv_max_response_size, 16384, 1, 262144, PGC_SIGHUP, GUC_UNIT_KB, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.worker_idle_timeout",
							"How long a database's worker stays connected with nothing to do.",
							NULL, &kv_worker_idle_timeout, 60000, 0, INT_MAX, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
}

static void
define_maintenance_settings(void)
{
	DefineCustomIntVariable("keyvault.maintenance_interval",
							"How often a database's worker looks for maintenance that is due; 0 for never.",
							NULL, &kv_maintenance_interval, 300000, 0, INT_MAX, PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.response_retention",
							"How long requests and their answers are kept after they ended; 0 for ever.",
							NULL, &kv_response_retention, 30 * 86400, 0, INT_MAX, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.data_key_max_age",
							"Data keys older than this are rotated by maintenance; 0 for never.",
							NULL, &kv_data_key_max_age, 0, 0, INT_MAX, PGC_SIGHUP, GUC_UNIT_S, NULL, NULL, NULL);
	DefineCustomIntVariable("keyvault.usage_retention",
							"Months before this one whose usage records are kept; 0 for all.",
							NULL, &kv_usage_retention, 0, 0, 1200, PGC_SIGHUP, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("keyvault.drop_retired_usage",
							 "Drops the usage records of retired months; off detaches their partition and leaves it as a table.",
							 NULL, &kv_drop_retired_usage, false, PGC_SIGHUP, 0, NULL, NULL, NULL);
}

/* Define the settings; called once, while the server preloads the library. */
void
kv_settings_init(void)
{
	define_identity_settings();
	define_master_key_settings();
	define_key_settings();
	define_development_settings();
	define_key_use_settings();
	define_vault_settings();
	define_worker_settings();
	define_maintenance_settings();
	MarkGUCPrefixReserved("keyvault");
}
