/*-------------------------------------------------------------------------
 * aead.c
 *		AES-256-GCM (NIST SP 800-38D), HKDF-SHA256 (RFC 5869) and HMAC-SHA256
 *		(RFC 2104), from OpenSSL.
 *
 * Algorithms are fetched once per process: fetching costs more than using them.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/aead.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>

#include "base/error.h"
#include "crypto/openssl_error.h"

/* Made at first use and kept; keyed is given a key of zeros after each use, salted keeps the last salt, which is no secret. */
static EVP_CIPHER *gcm = NULL;
static EVP_MAC_CTX *keyed = NULL;
static EVP_MAC_CTX *salted = NULL;

static const EVP_CIPHER *
fetched_gcm(void)
{
	if (gcm == NULL && (gcm = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL)) == NULL)
		kv_openssl_error_raise("fetching AES-256-GCM");
	return gcm;
}

static EVP_MAC_CTX *
fetched_hmac(EVP_MAC_CTX **hmac)
{
	OSSL_PARAM	parameters[] = {
		OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, "SHA256", 0),
		OSSL_PARAM_construct_end(),
	};
	EVP_MAC    *algorithm;

	if (*hmac != NULL)
		return *hmac;
	algorithm = EVP_MAC_fetch(NULL, "HMAC", NULL);
	*hmac = algorithm ? EVP_MAC_CTX_new(algorithm) : NULL;
	EVP_MAC_free(algorithm);
	if (*hmac == NULL || EVP_MAC_CTX_set_params(*hmac, parameters) != 1)
	{
		EVP_MAC_CTX_free(*hmac);
		*hmac = NULL;
		kv_openssl_error_raise("fetching HMAC-SHA256");
	}
	return *hmac;
}

/* Fill out with random bytes from the operating system's generator, by PostgreSQL. */
void
kv_random_bytes(uint8 *out, Size length)
{
	if (!pg_strong_random(out, length))
		ereport(ERROR,
				(errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not generate random bytes")));
}

/* Encrypt length bytes; cipher takes as many, tag KV_TAG_SIZE. A nonce is never used twice with a key. */
void
kv_aead_seal(const uint8 *key, const uint8 *nonce, const uint8 *associated, Size associated_length,
			 const uint8 *plain, Size length, uint8 *cipher, uint8 *tag)
{
	const EVP_CIPHER *algorithm = fetched_gcm();
	EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
	int			n;
	bool		sealed;

	sealed = context != NULL &&
		EVP_EncryptInit_ex2(context, algorithm, key, nonce, NULL) == 1 &&
		EVP_EncryptUpdate(context, NULL, &n, associated, (int) associated_length) == 1 &&
		EVP_EncryptUpdate(context, cipher, &n, plain, (int) length) == 1 &&
		EVP_EncryptFinal_ex(context, cipher + n, &n) == 1 &&
		EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, KV_TAG_SIZE, tag) == 1;
	EVP_CIPHER_CTX_free(context);
	if (!sealed)
		kv_openssl_error_raise("encryption");
}

/* Decrypt length bytes into plain. False, with plain zeroed, when key, nonce, data or tag is not the sealed one. */
bool
kv_aead_open(const uint8 *key, const uint8 *nonce, const uint8 *associated, Size associated_length,
			 const uint8 *cipher, Size length, const uint8 *tag, uint8 *plain)
{
	const EVP_CIPHER *algorithm = fetched_gcm();
	EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
	int			n;
	bool		usable;
	bool		opened;

	usable = context != NULL &&
		EVP_DecryptInit_ex2(context, algorithm, key, nonce, NULL) == 1 &&
		EVP_DecryptUpdate(context, NULL, &n, associated, (int) associated_length) == 1 &&
		EVP_DecryptUpdate(context, plain, &n, cipher, (int) length) == 1 &&
		EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, KV_TAG_SIZE, (void *) tag) == 1;
	opened = usable && EVP_DecryptFinal_ex(context, plain + n, &n) == 1;
	EVP_CIPHER_CTX_free(context);
	if (!opened)
		OPENSSL_cleanse(plain, length);
	if (!usable)
		kv_openssl_error_raise("decryption");
	return opened;
}

typedef struct Bytes
{
	const uint8 *bytes;
	Size		length;
} Bytes;

static void
forget_key(EVP_MAC_CTX *context)
{
	static const uint8 zeros[KV_MAC_SIZE] = {0};

	(void) EVP_MAC_init(context, zeros, sizeof(zeros), NULL);
}

/* HMAC of pieces, under the context's last key if none is given: that need not be absorbed again. */
static void
compute_hmac(EVP_MAC_CTX *context, Bytes key, const Bytes *pieces, int n, uint8 *mac)
{
	size_t		size;
	bool		computed = EVP_MAC_init(context, key.bytes, key.length, NULL) == 1;

	for (int i = 0; computed && i < n; i++)
		computed = pieces[i].length == 0 || EVP_MAC_update(context, pieces[i].bytes, pieces[i].length) == 1;
	if (!computed || EVP_MAC_final(context, mac, &size, KV_MAC_SIZE) != 1)
	{
		forget_key(context);
		kv_openssl_error_raise("message authentication");
	}
}

/* HMAC of a secret under a salt. Records of a week have one salt: it is mostly the last one. */
static void
extract(Bytes salt, Bytes secret, uint8 *extracted)
{
	static uint8 last[KV_MAC_SIZE];
	static Size last_length = 0;
	EVP_MAC_CTX *context = fetched_hmac(&salted);
	bool		is_last = salt.length == last_length && memcmp(salt.bytes, last, last_length) == 0;

	last_length = 0;
	compute_hmac(context, is_last ? (Bytes) {NULL, 0} : salt, &secret, 1, extracted);
	/* What was computed stands in the context until it begins anew. */
	if (EVP_MAC_init(context, NULL, 0, NULL) != 1)
		forget_key(context);
	else if (salt.length <= sizeof(last))
	{
		memcpy(last, salt.bytes, salt.length);
		last_length = salt.length;
	}
}

/*
 * Derive length bytes, a multiple of KV_MAC_SIZE, from a key. A salt of length 0 is
 * HKDF's default one. The two steps of RFC 5869 are spelled out over OpenSSL's HMAC:
 * EVP_KDF, which fetches HMAC anew each time, takes three times as long, and this is what
 * the first lookup of a key spends most on.
 */
void
kv_hkdf_sha256(const uint8 *key, Size key_length, const uint8 *salt, Size salt_length,
			   const uint8 *info, Size info_length, uint8 *out, Size length)
{
	static const uint8 default_salt[KV_MAC_SIZE] = {0};
	uint8		extracted[KV_MAC_SIZE];
	uint8		counter = 0;
	Bytes		expanding = {extracted, KV_MAC_SIZE};
	Bytes		previous = {NULL, 0};

	extract(salt_length ? (Bytes) {salt, salt_length} : (Bytes) {default_salt, KV_MAC_SIZE},
			(Bytes) {key, key_length}, extracted);
	for (Size done = 0; done < length; done += KV_MAC_SIZE)
	{
		Bytes		pieces[3] = {previous, {info, info_length}, {&counter, 1}};

		counter++;
		compute_hmac(fetched_hmac(&keyed), expanding, pieces, 3, out + done);
		expanding = (Bytes) {NULL, 0};
		previous = (Bytes) {out + done, KV_MAC_SIZE};
	}
	OPENSSL_cleanse(extracted, sizeof(extracted));
	forget_key(keyed);
}

/* Compute KV_MAC_SIZE bytes that only a holder of the key can. */
void
kv_hmac_sha256(const uint8 *key, Size key_length, const uint8 *message, Size length, uint8 *mac)
{
	Bytes		piece = {message, length};

	compute_hmac(fetched_hmac(&keyed), (Bytes) {key, key_length}, &piece, 1, mac);
	forget_key(keyed);
}

/* Compare in a time that does not depend on the contents. */
bool
kv_bytes_equal(const uint8 *a, const uint8 *b, Size length)
{
	return CRYPTO_memcmp(a, b, length) == 0;
}
