/*-------------------------------------------------------------------------
 * key_use.c
 *		When and how often keys are used, without a write per use.
 *
 * A use is noted in this process; at the end of the transaction its notes are added to
 * a table in shared memory, one entry per key. A flush takes a database's entries out of
 * it and adds them to api_keys. What a flush could not write goes back. A note that finds
 * no place is lost, and asks for an early flush; so are those of a server that stops.
 * On a standby nothing is noted.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "vault/key_use.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "base/catalogue.h"
#include "base/error.h"
#include "base/owner_spi.h"
#include "base/settings.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "nodes/pg_list.h"
#include "port/atomics.h"
#include "storage/lwlock.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

PG_FUNCTION_INFO_V1(keyvault_flush_key_use);

/* Keys that compete for one place in the table. */
#define WAYS		16
#define PARTITIONS	16

/* Instead of a key's mark. */
#define FREE		0

/* A bucket with so many keys asks for an early flush. */
#define CROWDED		14

/* Different keys that a process notes before it goes to the table. */
#define NOTES_MAX	32

/* Entries that one statement writes. */
#define BATCH		1000

typedef struct Note
{
	Oid			database;
	uint32		uses;
	TimestampTz last;
	pg_uuid_t	id;
	char		user_id[KV_USER_ID_MAX + 1];
} Note;

/* The marks, of few bytes of the keys' ids, stand together: comparing the notes themselves would read memory for each. */
typedef struct Bucket
{
	uint32		marks[WAYS];
	Note		notes[WAYS];
} Bucket;

typedef struct KeyUse
{
	LWLock		locks[PARTITIONS];
	pg_atomic_uint32 pending;	/* there are notes that nobody has been told of */
	pg_atomic_uint32 urgent;	/* a bucket is crowded */
	pg_atomic_uint64 round;		/* raised each time that everybody is to flush */
	Bucket		buckets[FLEXIBLE_ARRAY_MEMBER];
} KeyUse;

/* Notes that a flush has taken out of the table, until its transaction ends. */
typedef struct Batch
{
	SubTransactionId subtransaction;
	int			n;
	Note		notes[BATCH];	/* with no uses: put back already */
} Batch;

static KeyUse *shared = NULL;
static uint32 n_buckets;

/* This process's notes of the transaction under way. */
static Note noted[NOTES_MAX];
static int	n_noted = 0;

/* In TopTransactionContext; forgotten when the transaction ends. */
static List *taken = NIL;

static void (*on_pending) (void) = NULL;

Size
kv_key_use_shmem_size(void)
{
	n_buckets = kv_key_use_table_size / WAYS;
	return offsetof(KeyUse, buckets) + n_buckets * sizeof(Bucket);
}

void
kv_key_use_shmem_init(void *memory, bool found)
{
	int			tranche;

	shared = memory;
	if (found)
		return;
	memset(shared, 0, kv_key_use_shmem_size());
	tranche = LWLockNewTrancheId();
	for (int i = 0; i < PARTITIONS; i++)
		LWLockInitialize(&shared->locks[i], tranche);
	pg_atomic_init_u32(&shared->pending, 0);
	pg_atomic_init_u32(&shared->urgent, 0);
	pg_atomic_init_u64(&shared->round, 0);
}

/* Have a function called when notes begin to wait for a flush. It must not throw. */
void
kv_key_use_on_pending(void (*callback) (void))
{
	on_pending = callback;
}

/* Tell once, until the next round, that there is something to flush. */
static void
tell(pg_atomic_uint32 *flag)
{
	if (pg_atomic_read_u32(flag) == 0 && pg_atomic_exchange_u32(flag, 1) == 0 && on_pending)
		on_pending();
}

static bool
same_key(const Note *a, const Note *b)
{
	return a->database == b->database && memcmp(&a->id, &b->id, UUID_LEN) == 0 && strcmp(a->user_id, b->user_id) == 0;
}

static void
add(Note *to, const Note *from)
{
	to->uses += from->uses;
	to->last = Max(to->last, from->last);
}

/* Add a note to the table. Returns how many keys its bucket has then; more than WAYS when there was no place. */
static int
put(const Note *note)
{
	uint32		random[2];
	Bucket	   *bucket;
	LWLock	   *lock;
	int			unused = -1;
	int			n = 1;

	/* The last bytes of a UUID are random in every version. */
	memcpy(random, note->id.data + UUID_LEN - sizeof(random), sizeof(random));
	bucket = &shared->buckets[random[1] % n_buckets];
	lock = &shared->locks[random[1] % n_buckets % PARTITIONS];
	random[0] = Max(random[0], FREE + 1);
	LWLockAcquire(lock, LW_EXCLUSIVE);
	for (int i = 0; i < WAYS; i++)
	{
		if (bucket->marks[i] == random[0] && same_key(&bucket->notes[i], note))
		{
			add(&bucket->notes[i], note);
			LWLockRelease(lock);
			return n;
		}
		if (bucket->marks[i] == FREE)
			unused = i;
		else
			n++;
	}
	if (unused >= 0)
	{
		bucket->marks[unused] = random[0];
		bucket->notes[unused] = *note;
	}
	LWLockRelease(lock);
	return n;
}

/* Move this process's notes to the table. */
static void
publish(void)
{
	bool		crowded = false;

	if (n_noted == 0)
		return;
	for (int i = 0; i < n_noted; i++)
		crowded = put(&noted[i]) > CROWDED || crowded;
	n_noted = 0;
	tell(&shared->pending);
	if (crowded)
		tell(&shared->urgent);
}

/* Note that a user's key was used now. */
void
kv_key_use_note(const char *user_id, const pg_uuid_t *id)
{
	Note	   *note;

	if (n_buckets == 0 || RecoveryInProgress())
		return;
	for (int i = 0; i < n_noted; i++)
		if (memcmp(&noted[i].id, id, UUID_LEN) == 0)
		{
			noted[i].uses++;
			noted[i].last = GetCurrentStatementStartTimestamp();
			return;
		}
	if (n_noted == NOTES_MAX)
		publish();
	note = &noted[n_noted++];
	note->database = MyDatabaseId;
	note->uses = 1;
	note->last = GetCurrentStatementStartTimestamp();
	note->id = *id;
	strlcpy(note->user_id, user_id, sizeof(note->user_id));
}

/* Call with every note of a database, or of all, under its lock; a note goes when the visitor says so. */
static void
visit(Oid database, bool (*visitor) (const Note *note, void *arg), void *arg)
{
	for (uint32 n = 0; n < n_buckets; n++)
	{
		Bucket	   *bucket = &shared->buckets[n];

		LWLockAcquire(&shared->locks[n % PARTITIONS], LW_EXCLUSIVE);
		for (int i = 0; i < WAYS; i++)
			if (bucket->marks[i] != FREE && (database == InvalidOid || bucket->notes[i].database == database) &&
				visitor(&bucket->notes[i], arg))
				bucket->marks[i] = FREE;
		LWLockRelease(&shared->locks[n % PARTITIONS]);
	}
}

static bool
forget(const Note *note, void *arg)
{
	return true;
}

/* Drop the notes of a database that is gone. */
void
kv_key_use_forget_database(Oid database)
{
	visit(database, forget, NULL);
}

static bool
take(const Note *note, void *arg)
{
	Batch	   *batch = arg;

	if (batch->n == BATCH)
		return false;
	batch->notes[batch->n++] = *note;
	return true;
}

/* Put back what a batch has not written. */
static void
put_back(const Batch *batch)
{
	for (int i = 0; i < batch->n; i++)
		if (batch->notes[i].uses > 0)
			(void) put(&batch->notes[i]);
	tell(&shared->pending);
}

typedef struct Databases
{
	Oid		   *oids;
	int			n;
	int			max;
} Databases;

static bool
collect_database(const Note *note, void *arg)
{
	Databases  *databases = arg;

	for (int i = 0; i < databases->n; i++)
		if (databases->oids[i] == note->database)
			return false;
	if (databases->n < databases->max)
		databases->oids[databases->n++] = note->database;
	return false;
}

/* Are there notes to flush? */
bool
kv_key_use_is_pending(bool *urgent)
{
	*urgent = pg_atomic_read_u32(&shared->urgent) != 0;
	return pg_atomic_read_u32(&shared->pending) != 0;
}

/* Begin a round of flushes; returns the databases, up to max, that have notes. */
int
kv_key_use_begin_round(Oid *databases, int max)
{
	Databases	found = {.oids = databases,.max = max};

	/* First, so that a note that comes now tells of itself. */
	pg_atomic_write_u32(&shared->pending, 0);
	pg_atomic_write_u32(&shared->urgent, 0);
	pg_atomic_fetch_add_u64(&shared->round, 1);
	visit(InvalidOid, collect_database, &found);
	return found.n;
}

/* The number of the last round that has begun. */
uint64
kv_key_use_round(void)
{
	return pg_atomic_read_u64(&shared->round);
}

/* The notes as arrays: user_id, id, last use, uses. */
static void
make_arrays(const Note *notes, int n, Datum *arrays)
{
	Datum	   *values[4];

	for (int i = 0; i < 4; i++)
		values[i] = palloc(n * sizeof(Datum));
	for (int i = 0; i < n; i++)
	{
		values[0][i] = CStringGetTextDatum(notes[i].user_id);
		values[1][i] = UUIDPGetDatum(&notes[i].id);
		values[2][i] = TimestampTzGetDatum(notes[i].last);
		values[3][i] = Int64GetDatum(notes[i].uses);
	}
	arrays[0] = PointerGetDatum(construct_array(values[0], n, TEXTOID, -1, false, TYPALIGN_INT));
	arrays[1] = PointerGetDatum(construct_array(values[1], n, UUIDOID, UUID_LEN, false, TYPALIGN_CHAR));
	arrays[2] = PointerGetDatum(construct_array(values[2], n, TIMESTAMPTZOID, sizeof(TimestampTz), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
	arrays[3] = PointerGetDatum(construct_array(values[3], n, INT8OID, sizeof(int64), FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

/* Take a batch out of the table; it is put back if the subtransaction fails. */
static Batch *
take_batch(void)
{
	MemoryContext old = MemoryContextSwitchTo(TopTransactionContext);
	Batch	   *batch = palloc(sizeof(Batch));

	batch->subtransaction = GetCurrentSubTransactionId();
	batch->n = 0;
	taken = lappend(taken, batch);
	visit(MyDatabaseId, take, batch);
	MemoryContextSwitchTo(old);
	return batch;
}

/* Set columns of the keys that notes are about; returns the notes whose rows are locked. */
#define WRITE_USES(set_count) \
	"WITH n AS (SELECT * FROM unnest($1, $2, $3, $4) WITH ORDINALITY n (user_id, id, last, uses, ordinal))," \
	" free AS (SELECT k.user_id, k.id FROM keyvault.api_keys k WHERE (k.user_id, k.id) IN (SELECT n.user_id, n.id FROM n)" \
	"  ORDER BY k.user_id, k.id FOR NO KEY UPDATE SKIP LOCKED)," \
	" written AS (UPDATE keyvault.api_keys k SET " set_count "last_used_at = greatest(k.last_used_at, n.last)" \
	"  FROM n JOIN free USING (user_id, id) WHERE k.user_id = n.user_id AND k.id = n.id RETURNING n.ordinal)" \
	" SELECT n.ordinal FROM n WHERE n.ordinal NOT IN (SELECT ordinal FROM written)" \
	"  AND EXISTS (SELECT FROM keyvault.api_keys k WHERE k.user_id = n.user_id AND k.id = n.id)"

/* Whether api_keys has the column use_count: the SQL of version 0.1.0 has not. */
static bool
counts_uses(void)
{
	static KvRelation api_keys = {"api_keys"};

	return get_attnum(kv_relation_oid(&api_keys), "use_count") != InvalidAttrNumber;
}

/* Write a batch to api_keys; notes whose row is locked go back to the table. Returns how many were written. */
static int
write_batch(Batch *batch)
{
	static KvStatement update = {
		WRITE_USES("use_count = k.use_count + n.uses, "),
		4, {TEXTARRAYOID, UUIDARRAYOID, TIMESTAMPTZARRAYOID, INT8ARRAYOID}
	};
	static KvStatement update_without_count = {
		WRITE_USES(""), 4, {TEXTARRAYOID, UUIDARRAYOID, TIMESTAMPTZARRAYOID, INT8ARRAYOID}
	};
	Datum		arrays[4];
	int			locked;

	make_arrays(batch->notes, batch->n, arrays);
	locked = (int) kv_statement_execute(counts_uses() ? &update : &update_without_count, arrays, NULL);
	for (int i = 0; i < locked; i++)
	{
		bool		isnull;
		int64		ordinal = DatumGetInt64(SPI_getbinval(SPI_tuptable->vals[i], SPI_tuptable->tupdesc, 1, &isnull));
		Note	   *note = &batch->notes[ordinal - 1];

		(void) put(note);
		note->uses = 0;
	}
	if (locked > 0)
		tell(&shared->pending);
	return batch->n - locked;
}

/* Write this database's notes to api_keys, in the caller's transaction; returns for how many keys. */
int64
kv_key_use_flush(void)
{
	int64		written = 0;
	KvOwnerScope scope;
	Batch	   *batch;

	if (n_buckets == 0)
		return 0;
	publish();
	kv_owner_begin(&scope);
	/* Notes of locked rows go back, and are not to be taken for ever. */
	for (uint32 batches = 0; batches <= n_buckets * WAYS / BATCH; batches++)
	{
		batch = take_batch();
		if (batch->n > 0)
			written += write_batch(batch);
		if (batch->n < BATCH)
			break;
	}
	kv_owner_end(&scope);
	return written;
}

static void
at_transaction_end(XactEvent event, void *arg)
{
	ListCell   *cell;

	switch (event)
	{
		case XACT_EVENT_ABORT:
			foreach(cell, taken)
				put_back(lfirst(cell));
			/* FALLTHROUGH */
		case XACT_EVENT_COMMIT:
		case XACT_EVENT_PREPARE:
			taken = NIL;
			publish();
			break;
		case XACT_EVENT_PARALLEL_COMMIT:
		case XACT_EVENT_PARALLEL_ABORT:
			publish();
			break;
		default:
			break;
	}
}

static void
at_subtransaction_end(SubXactEvent event, SubTransactionId id, SubTransactionId parent, void *arg)
{
	ListCell   *cell;

	if (event != SUBXACT_EVENT_COMMIT_SUB && event != SUBXACT_EVENT_ABORT_SUB)
		return;
	foreach(cell, taken)
	{
		Batch	   *batch = lfirst(cell);

		if (batch->subtransaction != id)
			continue;
		if (event == SUBXACT_EVENT_COMMIT_SUB)
			batch->subtransaction = parent;
		else
		{
			put_back(batch);
			taken = foreach_delete_current(taken, cell);
		}
	}
}

/* Follow transactions; called once, while the server preloads the library. */
void
kv_key_use_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
	RegisterSubXactCallback(at_subtransaction_end, NULL);
}

Datum
keyvault_flush_key_use(PG_FUNCTION_ARGS)
{
	PG_RETURN_INT64(kv_key_use_flush());
}
