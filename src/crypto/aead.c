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
#include "base/error.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>

/* Fetched at first use and kept: they hold no key. */
static EVP_CIPHER *gcm = NULL;
static EVP_KDF *hkdf = NULL;

static void
raise_openssl_error(const char *what)
{
	unsigned long code = ERR_get_error();
	const char *reason = code ? ERR_reason_error_string(code) : NULL;

	ERR_clear_error();
	ereport(ERROR,
			(errcode(ERRCODE_INTERNAL_ERROR),
			 errmsg("%s failed in OpenSSL: %s", what, reason ? reason : "no reason given"),
			 errhint("Check that the server's OpenSSL provides AES-256-GCM and HKDF.")));
}

static const EVP_CIPHER *
fetched_gcm(void)
{
	if (gcm == NULL && (gcm = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL)) == NULL)
		raise_openssl_error("fetching AES-256-GCM");
	return gcm;
}

static EVP_KDF *
fetched_hkdf(void)
{
	if (hkdf == NULL && (hkdf = EVP_KDF_fetch(NULL, "HKDF", NULL)) == NULL)
		raise_openssl_error("fetching HKDF");
	return hkdf;
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
		raise_openssl_error("encryption");
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
		raise_openssl_error("decryption");
	return opened;
}

/* Derive length bytes from a key. A salt of length 0 is HKDF's default one. */
void
kv_hkdf_sha256(const uint8 *key, Size key_length, const uint8 *salt, Size salt_length,
			   const uint8 *info, Size info_length, uint8 *out, Size length)
{
	EVP_KDF_CTX *context = EVP_KDF_CTX_new(fetched_hkdf());
	OSSL_PARAM	parameters[] = {
		OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, "SHA256", 0),
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *) key, key_length),
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *) info, info_length),
		salt_length == 0 ? OSSL_PARAM_construct_end() :
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SALT, (void *) salt, salt_length),
		OSSL_PARAM_construct_end(),
	};
	bool		derived = context != NULL && EVP_KDF_derive(context, out, length, parameters) == 1;

	EVP_KDF_CTX_free(context);
	if (!derived)
		raise_openssl_error("key derivation");
}

/* Compute KV_MAC_SIZE bytes that only a holder of the key can. */
void
kv_hmac_sha256(const uint8 *key, Size key_length, const uint8 *message, Size length, uint8 *mac)
{
	size_t		n;

	if (EVP_Q_mac(NULL, "HMAC", NULL, "SHA256", NULL, key, key_length, message, length, mac, KV_MAC_SIZE, &n) == NULL)
		raise_openssl_error("message authentication");
}

/* Compare in a time that does not depend on the contents. */
bool
kv_bytes_equal(const uint8 *a, const uint8 *b, Size length)
{
	return CRYPTO_memcmp(a, b, length) == 0;
}
