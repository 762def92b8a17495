/*-------------------------------------------------------------------------
 * keyvault.c
 *		The modules of keyvault, and what each needs when the server starts.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "base/activity.h"
#include "base/catalogue.h"
#include "base/error.h"
#include "base/redaction.h"
#include "base/settings.h"
#include "credit/debit.h"
#include "credit/partition_restore.h"
#include "credit/restored_usage.h"
#include "crypto/master_key.h"
#include "crypto/master_key_cache.h"
#include "crypto/record_key_cache.h"
#include "crypto/reveal.h"
#include "fmgr.h"
#include "gateway/database_drop.h"
#include "gateway/key_use_flush.h"
#include "gateway/launcher.h"
#include "gateway/worker_slot.h"
#include "miscadmin.h"
#include "storage/ipc.h"
#include "storage/lwlock.h"
#include "storage/shmem.h"
#include "vault/call_key.h"
#include "vault/development.h"
#include "vault/key_use.h"

PG_MODULE_MAGIC;

typedef struct KvModule
{
	const char *name;
	void		(*init) (void);
	Size		(*shmem_size) (void);
	void		(*shmem_init) (void *memory, bool found);
} KvModule;

/* In the order of the layers, lowest first. */
static const KvModule modules[] = {
	{"settings", kv_settings_init},
	{"redaction", kv_redaction_init, kv_redaction_shmem_size, kv_redaction_shmem_init},
	{"activity", kv_activity_init},
	{"catalogue", kv_catalogue_init},
	{"reveal", kv_reveal_init},
	{"master keys", kv_master_key_init, kv_master_key_cache_shmem_size, kv_master_key_cache_shmem_init},
	{"record key cache", kv_record_key_cache_init, kv_record_key_cache_shmem_size, kv_record_key_cache_shmem_init},
	{"call keys", NULL, kv_call_key_shmem_size, kv_call_key_shmem_init},
	{"development", kv_development_init},
	{"key use", kv_key_use_init, kv_key_use_shmem_size, kv_key_use_shmem_init},
	{"debit", kv_debit_init},
	{"restored usage", kv_restored_usage_init},
	{"partition restore", kv_partition_restore_init},
	{"worker slots", kv_worker_slot_init, kv_worker_slot_shmem_size, kv_worker_slot_shmem_init},
	{"database drop", kv_database_drop_init},
	{"key use flush", kv_key_use_flush_init},
	{"launcher", kv_launcher_init},
};

static shmem_request_hook_type next_shmem_request = NULL;
static shmem_startup_hook_type next_shmem_startup = NULL;

void		_PG_init(void);

static void
request_shared_memory(void)
{
	if (next_shmem_request)
		next_shmem_request();
	for (size_t i = 0; i < lengthof(modules); i++)
		if (modules[i].shmem_size)
			RequestAddinShmemSpace(modules[i].shmem_size());
}

static void
start_shared_memory(void)
{
	if (next_shmem_startup)
		next_shmem_startup();
	LWLockAcquire(AddinShmemInitLock, LW_EXCLUSIVE);
	for (size_t i = 0; i < lengthof(modules); i++)
		if (modules[i].shmem_init)
		{
			bool		found;
			void	   *memory = ShmemInitStruct(psprintf("keyvault %s", modules[i].name), modules[i].shmem_size(), &found);

			modules[i].shmem_init(memory, found);
		}
	LWLockRelease(AddinShmemInitLock);
}

void
_PG_init(void)
{
	if (!process_shared_preload_libraries_in_progress)
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
				 errmsg("keyvault must be loaded when the server starts"),
				 errhint("Add to postgresql.conf: shared_preload_libraries = 'keyvault'  (behind the libraries that are there already), then restart the server.")));
	for (size_t i = 0; i < lengthof(modules); i++)
		if (modules[i].init)
			modules[i].init();
	next_shmem_request = shmem_request_hook;
	shmem_request_hook = request_shared_memory;
	next_shmem_startup = shmem_startup_hook;
	shmem_startup_hook = start_shared_memory;
}
