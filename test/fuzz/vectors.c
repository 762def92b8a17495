/*
 * The primitives of crypto/aead.h against published vectors, and keys for one call against a golden one, whose digits are the
 * argument; and memory for secrets. Runs by itself, and prints TAP.
 *
 * HKDF: RFC 5869, appendices A.1 to A.3. HMAC: RFC 4231, sections 4.2 to 4.8 but for 4.6, whose output is truncated.
 * GCM: McGrew and Viega, "The Galois/Counter Mode of Operation", test cases 13 to 16, on which NIST SP 800-38D rests.
 */
#include "server.h"

#include "base/secret.h"
#include "crypto/aead.h"
#include "utils/builtins.h"
#include "vault/call_key.h"

#undef printf

#define MOST 192

/* What the golden key for one call of test/golden/formats.mjs is bound to, and what it is. */
#define GOLDEN_USER		"golden_user"
#define GOLDEN_SECRET	"sk-golden-0123456789abcdef"

typedef struct Bytes
{
	uint8		bytes[MOST];
	Size		length;
} Bytes;

static int	n_tests = 0;
static int	n_failed = 0;

static void
ok(bool passed, const char *what, const char *name)
{
	printf("%sok %d - %s %s\n", passed ? "" : "not ", ++n_tests, what, name);
	n_failed += !passed;
}

/* Digits, or a byte and how often: "0b*22". */
static Bytes
from_hex(const char *text)
{
	Bytes		value = {.length = strlen(text) / 2};
	const char *star = strchr(text, '*');

	if (star)
	{
		value.length = atoi(star + 1);
		hex_decode(text, 2, (char *) value.bytes);
		memset(value.bytes, value.bytes[0], value.length);
	}
	else
		hex_decode(text, 2 * value.length, (char *) value.bytes);
	return value;
}

static void
check_hkdf(const char *name, const char *key_text, const char *salt_text, const char *info_text, const char *expected_text)
{
	Bytes		key = from_hex(key_text),
				salt = from_hex(salt_text),
				info = from_hex(info_text),
				expected = from_hex(expected_text);
	uint8		out[MOST] = {0};

	/* It makes whole blocks; the vectors' outputs begin them. */
	kv_hkdf_sha256(key.bytes, key.length, salt.bytes, salt.length, info.bytes, info.length, out, TYPEALIGN(KV_MAC_SIZE, expected.length));
	ok(memcmp(out, expected.bytes, expected.length) == 0, "HKDF-SHA256", name);
}

static void
check_hmac(const char *name, const char *key_text, const char *message_text, const char *expected_text)
{
	Bytes		key = from_hex(key_text),
				message = from_hex(message_text),
				expected = from_hex(expected_text);
	uint8		mac[KV_MAC_SIZE];

	kv_hmac_sha256(key.bytes, key.length, message.bytes, message.length, mac);
	ok(memcmp(mac, expected.bytes, KV_MAC_SIZE) == 0, "HMAC-SHA256", name);
	ok(kv_bytes_equal(mac, expected.bytes, KV_MAC_SIZE), "equal bytes of", name);
	mac[KV_MAC_SIZE - 1] ^= 1;
	ok(!kv_bytes_equal(mac, expected.bytes, KV_MAC_SIZE), "a bit that differs from", name);
}

static void
check_gcm(const char *name, const char *key_text, const char *nonce_text, const char *associated_text, const char *plain_text,
		  const char *cipher_text, const char *tag_text)
{
	Bytes		key = from_hex(key_text),
				nonce = from_hex(nonce_text),
				associated = from_hex(associated_text),
				plain = from_hex(plain_text),
				cipher = from_hex(cipher_text),
				tag = from_hex(tag_text);
	Bytes	   *parts[] = {&key, &nonce, &associated, &cipher, &tag};
	uint8		out[MOST] = {0},
				made[KV_TAG_SIZE];
	static const uint8 zeros[MOST] = {0};
	bool		refused = true;

	kv_aead_seal(key.bytes, nonce.bytes, associated.bytes, associated.length, plain.bytes, plain.length, out, made);
	ok(memcmp(out, cipher.bytes, cipher.length) == 0 && memcmp(made, tag.bytes, KV_TAG_SIZE) == 0, "AES-256-GCM seals", name);
	memset(out, 0xee, sizeof(out));
	ok(kv_aead_open(key.bytes, nonce.bytes, associated.bytes, associated.length, cipher.bytes, cipher.length, tag.bytes, out) &&
	   memcmp(out, plain.bytes, plain.length) == 0, "AES-256-GCM opens", name);
	/* Each bit of everything that goes in. */
	for (int i = 0; i < lengthof(parts); i++)
		for (Size bit = 0; bit < parts[i]->length * 8; bit++)
		{
			parts[i]->bytes[bit / 8] ^= 1 << bit % 8;
			memset(out, 0xee, sizeof(out));
			if (kv_aead_open(key.bytes, nonce.bytes, associated.bytes, associated.length, cipher.bytes, cipher.length, tag.bytes, out) ||
				memcmp(out, zeros, cipher.length) != 0)
				refused = false;
			parts[i]->bytes[bit / 8] ^= 1 << bit % 8;
		}
	ok(refused, "AES-256-GCM refuses every changed bit, and leaves zeros, of", name);
}

/* Memory for secrets is zeros before it is free. */
static void
check_secret_memory(void)
{
	static const uint8 zeros[MOST] = {0};
	uint8	   *secret = kv_secret_alloc(MOST);
	bool		wiped;

	memset(secret, 0xee, MOST);
	kv_run_callbacks();
	wiped = memcmp(secret, zeros, MOST) == 0;
	kv_free_all();
	ok(wiped, "memory for secrets", "is zeroed when its context ends");
}

static bool
call_key_is(const char *user_id, const pg_uuid_t *request_id, const Bytes *sealed)
{
	char	   *key = kv_call_key_open(user_id, request_id, kv_exact_bytea(sealed->bytes, sealed->length, true));
	bool		is_golden = key != NULL && strcmp(key, GOLDEN_SECRET) == 0;

	kv_free_all();
	return is_golden;
}

static void
check_call_key(const char *digits)
{
	Bytes		sealed = from_hex(digits);
	pg_uuid_t	request_id;
	bool		refused = true;

	for (int i = 0; i < UUID_LEN; i++)
		request_id.data[i] = 0x90 + i;
	/* Found, that is not made: the run's key stays zeros. */
	kv_call_key_shmem_init(NULL, true);
	ok(call_key_is(GOLDEN_USER, &request_id, &sealed), "a key for one call", "opens");
	ok(!call_key_is("golden_use", &request_id, &sealed), "a key for one call", "is bound to its user");
	request_id.data[UUID_LEN - 1] ^= 1;
	ok(!call_key_is(GOLDEN_USER, &request_id, &sealed), "a key for one call", "is bound to its request");
	request_id.data[UUID_LEN - 1] ^= 1;
	for (Size bit = 0; bit < sealed.length * 8; bit++)
	{
		sealed.bytes[bit / 8] ^= 1 << bit % 8;
		refused = refused && !call_key_is(GOLDEN_USER, &request_id, &sealed);
		sealed.bytes[bit / 8] ^= 1 << bit % 8;
	}
	ok(refused, "a key for one call", "with a changed bit does not open");
	for (; sealed.length > 0; sealed.length--)
		refused = refused && !call_key_is(GOLDEN_USER, &request_id, &(Bytes) {.length = sealed.length - 1,.bytes[0] = sealed.bytes[0]});
	ok(refused, "a key for one call", "cut short does not open");
}

int
main(int argc, char **argv)
{
	const char *key = "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308";
	const char *nonce = "cafebabefacedbaddecaf888";

	check_hkdf("RFC 5869 A.1", "0b*22", "000102030405060708090a0b0c", "f0f1f2f3f4f5f6f7f8f9",
			   "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865");
	check_hkdf("RFC 5869 A.2",
			   "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f404142434445464748494a4b4c4d4e4f",
			   "606162636465666768696a6b6c6d6e6f707172737475767778797a7b7c7d7e7f808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3a4a5a6a7a8a9aaabacadaeaf",
			   "b0b1b2b3b4b5b6b7b8b9babbbcbdbebfc0c1c2c3c4c5c6c7c8c9cacbcccdcecfd0d1d2d3d4d5d6d7d8d9dadbdcdddedfe0e1e2e3e4e5e6e7e8e9eaebecedeeeff0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
			   "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87");
	check_hkdf("RFC 5869 A.3, no salt and no info", "0b*22", "", "",
			   "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8");

	check_hmac("RFC 4231 4.2", "0b*20", "4869205468657265", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
	check_hmac("RFC 4231 4.3", "4a656665", "7768617420646f2079612077616e7420666f72206e6f7468696e673f",
			   "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
	check_hmac("RFC 4231 4.4", "aa*20", "dd*50", "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe");
	check_hmac("RFC 4231 4.5", "0102030405060708090a0b0c0d0e0f10111213141516171819", "cd*50",
			   "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b");
	check_hmac("RFC 4231 4.7, a key longer than a block", "aa*131",
			   "54657374205573696e67204c6172676572205468616e20426c6f636b2d53697a65204b6579202d2048617368204b6579204669727374",
			   "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
	check_hmac("RFC 4231 4.8, a key and a message longer than a block", "aa*131",
			   "5468697320697320612074657374207573696e672061206c6172676572207468616e20626c6f636b2d73697a65206b657920616e642061206c61726765"
			   "72207468616e20626c6f636b2d73697a6520646174612e20546865206b6579206e6565647320746f20626520686173686564206265666f7265206265"
			   "696e6720757365642062792074686520484d414320616c676f726974686d2e",
			   "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2");

	check_gcm("case 13, nothing", "00*32", "00*12", "", "", "", "530f8afbc74536b9a963b4f1c4cb738b");
	check_gcm("case 14, one block", "00*32", "00*12", "", "00*16", "cea7403d4d606b6e074ec5d3baf39d18", "d0d1c8a799996bf0265b98b5d48ab919");
	check_gcm("case 15, four blocks", key, nonce, "",
			  "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255",
			  "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad",
			  "b094dac5d93471bdec1a502270e3cc6c");
	check_gcm("case 16, part of a block, and associated data", key, nonce, "feedfacedeadbeeffeedfacedeadbeefabaddad2",
			  "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
			  "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662",
			  "76fc6ece0f4e1768cddf8853bb2d551b");
	check_secret_memory();
	check_call_key(argc > 1 ? argv[1] : "");
	printf("1..%d\n", n_tests);
	return n_failed > 0;
}
