/*-------------------------------------------------------------------------
 * master_key.c
 *		The keys outside the database that wrap data keys.
 *
 * One source yields up to 16 keys: the first is primary, the others only open what was
 * wrapped under them. They are read at first use, again after a configuration reload, and
 * when a data key asks for one that is not among them; they live in pages that stay out of
 * core files. Missing or wrong keys are the error KV004 of whoever needs them; the server
 * starts and runs without. After a reload that brings no keys, the earlier ones are gone.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/master_key.h"

#include "access/xact.h"
#include "base/error.h"
#include "base/index_scan.h"
#include "base/secret.h"
#include "base/settings.h"
#include "crypto/master_key_cache.h"
#include "crypto/record_key_cache.h"
#include "crypto/reveal.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#define SPACE " \t\r\n"

/* A shared source is not asked again for a missing key when its answer is this young. */
#define MISSING_KEY_MS 1000

/*
 * How long a worker goes by the last answer of a slow source: a second, and three times what it took to fail. A worker with
 * many keys to open is kept waiting once, not for each of them, and has time for its calls in between.
 */
#define FAILURE_KEPT_FACTOR	3
#define ANSWER_KEPT_MS		1000
#define ANSWER_TEXT_SIZE	512

/* In the order in which an error names them. */
static const KvMasterKeySource *const sources[] = {
	&kv_master_key_from_file, &kv_master_key_from_command, &kv_master_key_from_transit,
};

/* Two rings: the one in use, and the one being loaded. */
static KvMasterKeyRing *ring = NULL;
static KvMasterKeyRing *fresh = NULL;

/* Whether ring is loaded, under which configuration; generation is raised each time its keys may have changed. */
static bool loaded = false;
static TimestampTz loaded_at;
static uint32 generation = 0;

/* Has the source not yielded keys when it was last needed? */
static bool source_failed = false;

/* What a slow source last answered to this process, a worker; under another configuration that counts for nothing. */
static struct
{
	TimestampTz reload;
	TimestampTz kept_until;
	bool		fetched;
	char		reason[ANSWER_TEXT_SIZE];
	char		hint[ANSWER_TEXT_SIZE];
}			answer;

/* For a DETAIL: which key this vault wants, as far as the database can be asked. Empty before it has stored anything. */
static const char *
expected_key(void)
{
	static KvIndex by_id = {{"master_keys"}, {"master_keys_pkey"}};
	enum
	{
		MASTER_KEYS_KEK_ID = 1,
		MASTER_KEYS_STATUS = 4	/* version 0.1.0 has none, and one key */
	};
	const char *expected = "";
	KvIndexScan scan;
	bool		isnull;

	if (!ActiveSnapshotSet())
		return expected;
	kv_index_scan_begin(&scan, &by_id, NULL);
	while (kv_index_scan_next(&scan, ForwardScanDirection))
	{
		bytea	   *kek_id = DatumGetByteaPP(kv_index_scan_value(&scan, MASTER_KEYS_KEK_ID, &isnull));

		if (RelationGetNumberOfAttributes(scan.table) >= MASTER_KEYS_STATUS &&
			strcmp(TextDatumGetCString(kv_index_scan_value(&scan, MASTER_KEYS_STATUS, &isnull)), "primary") != 0)
			continue;
		expected = psprintf(" Expected key id %s, loaded none.", kv_master_key_hex((uint8 *) VARDATA_ANY(kek_id)));
	}
	kv_index_scan_end(&scan);
	return expected;
}

static void
raise_unusable(const KvMasterKeySource *source, const char *reason, const char *hint)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_MASTER_KEY),
			 errmsg("master key is not available"),
			 errdetail("The %s %s.%s", source->describe(), reason, expected_key()),
			 errhint("%s", hint)));
}

static void
raise_not_configured(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_KV_MASTER_KEY),
			 errmsg("master key is not available"),
			 errdetail("Setting keyvault.master_key_file is empty, and no other source is set.%s", expected_key()),
			 errhint("As root, make one with: install -d -m 700 -o postgres /etc/keyvault && "
					 "(umask 077; openssl rand -hex 32 > /etc/keyvault/master.key) && chown postgres /etc/keyvault/master.key  "
					 "Then: ALTER SYSTEM SET keyvault.master_key_file = '/etc/keyvault/master.key'; SELECT pg_reload_conf();")));
}

/* Is any source of a master key configured? */
bool
kv_master_key_is_configured(void)
{
	for (size_t i = 0; i < lengthof(sources); i++)
		if (sources[i]->is_configured())
			return true;
	return false;
}

/* Was the KV004 that this process has met last for want of an answer of the source, which may come yet? */
bool
kv_master_key_source_has_failed(void)
{
	return source_failed;
}

/* The one source that is configured. Error: KV004 for none or several. */
static const KvMasterKeySource *
configured_source(void)
{
	const KvMasterKeySource *found = NULL;

	for (size_t i = 0; i < lengthof(sources); i++)
	{
		if (!sources[i]->is_configured())
			continue;
		if (found)
			ereport(ERROR,
					(errcode(ERRCODE_KV_MASTER_KEY),
					 errmsg("master key is not available"),
					 errdetail("Both %s and %s are set, and which one counts is not for the server to guess.",
							   found->setting, sources[i]->setting),
					 errhint("Leave one of them, with ALTER SYSTEM RESET and SELECT pg_reload_conf().")));
		found = sources[i];
	}
	if (found == NULL)
		raise_not_configured();
	return found;
}

/* Add a line's key to a ring; false when it does not hold one. */
static bool
add_key(KvMasterKeyRing *to, const char *line, Size length, KvMasterKeySourceId source)
{
	static const char info[] = "keyvault/v1/kek-id";
	KvMasterKey *key = &to->keys[to->n];
	uint8		id[KV_MAC_SIZE];

	if (length != KV_MASTER_KEY_DIGITS || strspn(line, "0123456789abcdefABCDEF") < length)
		return false;
	hex_decode(line, length, (char *) key->key);
	kv_hkdf_sha256(key->key, KV_KEY_SIZE, NULL, 0, (const uint8 *) info, strlen(info), id, sizeof(id));
	memcpy(key->kek_id, id, KV_KEK_ID_SIZE);
	key->source = source;
	to->n++;
	return true;
}

/* Fill a ring from a source's text; false, with a reason, when it is not made of keys. */
static bool
read_keys(KvMasterKeyRing *to, const char *text, KvMasterKeySourceId source, const char **reason)
{
	memset(to, 0, sizeof(*to));
	for (const char *word = text + strspn(text, SPACE); *word; word += strspn(word, SPACE))
	{
		Size		length = strcspn(word, SPACE);

		if (to->n == KV_MASTER_KEYS_MAX)
			*reason = psprintf("holds more than %d master keys", KV_MASTER_KEYS_MAX);
		else if (add_key(to, word, length, source))
		{
			word += length;
			continue;
		}
		else
			*reason = "does not hold master keys: lines of 64 hexadecimal digits, and nothing else";
		return false;
	}
	if (to->n == 0)
		*reason = "does not hold a master key: a line of 64 hexadecimal digits";
	return to->n > 0;
}

/* Ask the configured source. */
static bool
fetch_keys(KvMasterKeyRing *to, const char **reason, const char **hint)
{
	const KvMasterKeySource *source = configured_source();
	char	   *text = source->fetch(reason, hint);

	return text != NULL && read_keys(to, text, source->id, reason);
}

/* Ask a slow source, through the shared cache where others may use what it answers. */
static bool
ask_slow_source(KvMasterKeyRing *to, TimestampTz not_before, const char **reason, const char **hint)
{
	/* Where only some processes may open keys, none leaves them where others could find them. */
	return kv_reveal ? kv_master_key_cache_get(to, not_before, fetch_keys, reason, hint) : fetch_keys(to, reason, hint);
}

/* ask_slow_source for a worker, unless it was answered a short while ago. */
static bool
ask_now_and_then(KvMasterKeyRing *to, TimestampTz not_before, const char **reason, const char **hint)
{
	TimestampTz began = GetCurrentTimestamp();
	bool		counts = answer.reload == PgReloadTime && began < answer.kept_until;
	int64		took;

	if (counts && answer.fetched && loaded)
	{
		*to = *ring;
		return true;
	}
	if (counts && !answer.fetched)
	{
		*reason = pstrdup(answer.reason);
		*hint = pstrdup(answer.hint);
		return false;
	}
	answer.fetched = ask_slow_source(to, not_before, reason, hint);
	if (!answer.fetched)
	{
		strlcpy(answer.reason, *reason, ANSWER_TEXT_SIZE);
		strlcpy(answer.hint, *hint, ANSWER_TEXT_SIZE);
	}
	took = answer.fetched ? 0 : TimestampDifferenceMilliseconds(began, GetCurrentTimestamp());
	answer.reload = PgReloadTime;
	answer.kept_until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), Max(FAILURE_KEPT_FACTOR * took, ANSWER_KEPT_MS));
	return answer.fetched;
}

/* Load the keys; shared ones may have been fetched since not_before. The ring in use stays when it fails. Error: KV004. */
static void
load_keys(TimestampTz not_before)
{
	const KvMasterKeySource *source;
	const char *reason = NULL;
	const char *hint = NULL;
	bool		fetched;

	source_failed = false;
	source = configured_source();
	if (ring == NULL)
	{
		KvMasterKeyRing *both = kv_secret_page(2 * sizeof(KvMasterKeyRing));

		fresh = both + 1;
		ring = both;
	}
	if (!source->shared)
		fetched = fetch_keys(fresh, &reason, &hint);
	else
		fetched = (kv_reveal_is_keeper() ? ask_now_and_then : ask_slow_source) (fresh, not_before, &reason, &hint);
	source_failed = !fetched;
	if (!fetched)
		raise_unusable(source, reason, hint);
	if (memcmp(ring, fresh, sizeof(KvMasterKeyRing)) != 0)
		generation++;
	memcpy(ring, fresh, sizeof(KvMasterKeyRing));
	kv_secret_wipe(fresh, sizeof(KvMasterKeyRing));
}

/* What was wrapped under a key that has been taken away must not open any more. */
static void
forget(void)
{
	loaded = false;
	kv_secret_wipe(ring, sizeof(KvMasterKeyRing));
	kv_record_key_cache_wipe();
	generation++;
}

/* Keep nothing beyond the first transaction after a reload, whatever it does. */
static void
at_transaction_end(XactEvent event, void *arg)
{
	if (loaded && loaded_at != PgReloadTime && (event == XACT_EVENT_COMMIT || event == XACT_EVENT_ABORT || event == XACT_EVENT_PREPARE))
		forget();
}

/* Follow the end of transactions; called once, while the server preloads the library. */
void
kv_master_key_init(void)
{
	RegisterXactCallback(at_transaction_end, NULL);
}

/*
 * The keys, loaded when they are not, or when the configuration was since. The one way to
 * them. Errors: KV004, and 42501 where this process may not open keys.
 */
static const KvMasterKeyRing *
current_ring(void)
{
	kv_reveal_require();
	if (loaded && loaded_at == PgReloadTime)
		return ring;
	if (loaded)
		forget();
	load_keys(PgReloadTime);
	loaded_at = PgReloadTime;
	loaded = true;
	return ring;
}

/* Have the keys yet to be fetched, by a program or from a Vault server, which may take up to keyvault.master_key_timeout? */
bool
kv_master_key_is_to_be_fetched(void)
{
	bool		slow = false;

	for (size_t i = 0; i < lengthof(sources); i++)
		slow = slow || (sources[i]->shared && sources[i]->is_configured());
	return slow && !(loaded && loaded_at == PgReloadTime);
}

/* The primary master key. Error: KV004 when there is none to be had. */
const KvMasterKey *
kv_master_key_get(void)
{
	return &current_ring()->keys[0];
}

/* A number that is another one whenever the keys may be. Error: KV004 when there are none to be had. */
uint32
kv_master_key_generation(void)
{
	(void) current_ring();
	return generation;
}

/* A key's id in hexadecimal digits. */
char *
kv_master_key_hex(const uint8 *kek_id)
{
	char	   *hex = palloc0(2 * KV_KEK_ID_SIZE + 1);

	hex_encode((const char *) kek_id, KV_KEK_ID_SIZE, hex);
	return hex;
}

static void
raise_not_loaded(const uint8 *kek_id)
{
	StringInfoData ids;

	initStringInfo(&ids);
	for (int i = 0; i < ring->n; i++)
		appendStringInfo(&ids, "%s%s", i ? ", " : "", kv_master_key_hex(ring->keys[i].kek_id));
	ereport(ERROR,
			(errcode(ERRCODE_KV_MASTER_KEY),
			 errmsg("master key is not the one that these keys were stored under"),
			 errdetail("Expected key id %s, loaded %s from %s.", kv_master_key_hex(kek_id), ids.data, configured_source()->describe()),
			 errhint("Put the master key with the expected id back, as a further line, and reload; "
					 "the ids are not secret and stand in keyvault.master_keys.")));
}

static const KvMasterKey *
look_up(const uint8 *kek_id)
{
	for (int i = 0; i < ring->n; i++)
		if (memcmp(ring->keys[i].kek_id, kek_id, KV_KEK_ID_SIZE) == 0)
			return &ring->keys[i];
	return NULL;
}

/*
 * The master key with an id. One that is not at hand is asked for once more: a session in a
 * long statement has not heard of the reload that brought it. Error: KV004.
 */
const KvMasterKey *
kv_master_key_find(const uint8 *kek_id)
{
	const KvMasterKey *key;

	(void) current_ring();
	key = look_up(kek_id);
	if (key == NULL)
	{
		load_keys(TimestampTzPlusMilliseconds(GetCurrentTimestamp(), -MISSING_KEY_MS));
		key = look_up(kek_id);
	}
	if (key == NULL)
		raise_not_loaded(kek_id);
	return key;
}
