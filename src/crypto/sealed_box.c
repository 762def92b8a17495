/*-------------------------------------------------------------------------
 * sealed_box.c
 *		A secret that anybody can seal to a public key, and only its holder opens.
 *
 * Box: 0x01 | key id (4) | ephemeral public key (65) | iv (12) | ciphertext | tag (16).
 * Both keys are points on P-256 (NIST SP 800-186), uncompressed (SEC 1, section 2.3.3). The
 * AES-256-GCM key is HKDF-SHA256 of the ECDH secret (NIST SP 800-56A, the point's x), with
 * the label and both public keys as info. The associated data is the label, then vault, user
 * and context, each behind its length: without lengths a box for user "a" and provider "bc"
 * would open for "ab" and "c". WebCrypto alone can make a box.
 *
 * A key id is the first four bytes of the SHA-256 of the public key.
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "crypto/sealed_box.h"

#include <openssl/bn.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/param_build.h>

#include "base/pg_version.h"
#include "base/secret.h"
#include "crypto/associated_data.h"
#include "crypto/openssl_error.h"

#define BOX_VERSION		0x01
#define UNCOMPRESSED	0x04
#define SHARED_SIZE		32
#define LABEL_MAX		64

typedef struct BoxHeader
{
	uint8		version;
	uint8		key_id[KV_BOX_KEY_ID_SIZE];
	uint8		ephemeral[KV_BOX_PUBLIC_KEY_SIZE];
	uint8		iv[KV_NONCE_SIZE];
} BoxHeader;

StaticAssertDecl(sizeof(BoxHeader) == 82, "the box's format has no padding");

static void
compute_key_id(KvBoxKey *key)
{
	uint8		digest[EVP_MAX_MD_SIZE];
	size_t		size;

	if (EVP_Q_digest(NULL, "SHA256", NULL, key->public_key, sizeof(key->public_key), digest, &size) != 1)
		kv_openssl_error_raise("SHA-256");
	memcpy(key->id, digest, KV_BOX_KEY_ID_SIZE);
}

/* Make a new pair of keys. */
void
kv_sealed_box_make_key(KvBoxKey *key)
{
	EVP_PKEY   *pair = EVP_EC_gen("P-256");
	BIGNUM	   *scalar = NULL;
	size_t		size;
	bool		made;

	made = pair != NULL &&
		EVP_PKEY_get_octet_string_param(pair, OSSL_PKEY_PARAM_PUB_KEY, key->public_key, sizeof(key->public_key), &size) == 1 &&
		size == sizeof(key->public_key) && key->public_key[0] == UNCOMPRESSED &&
		EVP_PKEY_get_bn_param(pair, OSSL_PKEY_PARAM_PRIV_KEY, &scalar) == 1 &&
		BN_bn2binpad(scalar, key->private_key, sizeof(key->private_key)) == sizeof(key->private_key);
	BN_clear_free(scalar);
	EVP_PKEY_free(pair);
	if (!made)
		kv_openssl_error_raise("making a P-256 key");
	compute_key_id(key);
}

/* OpenSSL's form of a key, with its private part if there is one; NULL when it is no point on the curve. */
static EVP_PKEY *
load_key(const uint8 *public_key, const uint8 *private_key)
{
	OSSL_PARAM_BLD *builder = OSSL_PARAM_BLD_new();
	BIGNUM	   *scalar = private_key ? BN_bin2bn(private_key, KV_BOX_PRIVATE_KEY_SIZE, NULL) : NULL;
	EVP_PKEY_CTX *context = EVP_PKEY_CTX_new_from_name(NULL, "EC", NULL);
	OSSL_PARAM *parameters = NULL;
	EVP_PKEY   *key = NULL;

	if (builder && context && (!private_key || scalar) &&
		OSSL_PARAM_BLD_push_utf8_string(builder, OSSL_PKEY_PARAM_GROUP_NAME, "P-256", 0) == 1 &&
		OSSL_PARAM_BLD_push_octet_string(builder, OSSL_PKEY_PARAM_PUB_KEY, public_key, KV_BOX_PUBLIC_KEY_SIZE) == 1 &&
		(!scalar || OSSL_PARAM_BLD_push_BN_pad(builder, OSSL_PKEY_PARAM_PRIV_KEY, scalar, KV_BOX_PRIVATE_KEY_SIZE) == 1) &&
		(parameters = OSSL_PARAM_BLD_to_param(builder)) != NULL &&
		EVP_PKEY_fromdata_init(context) == 1 &&
		EVP_PKEY_fromdata(context, &key, scalar ? EVP_PKEY_KEYPAIR : EVP_PKEY_PUBLIC_KEY, parameters) != 1)
		key = NULL;
	OSSL_PARAM_free(parameters);
	OSSL_PARAM_BLD_free(builder);
	EVP_PKEY_CTX_free(context);
	BN_clear_free(scalar);
	ERR_clear_error();
	return key;
}

/* The secret that a private key shares with another's public key; false when that is no point on the curve. */
static bool
share_secret(const uint8 *public_key, const uint8 *private_key, const uint8 *other_public_key, uint8 *shared)
{
	EVP_PKEY   *own = load_key(public_key, private_key);
	EVP_PKEY   *other = load_key(other_public_key, NULL);
	EVP_PKEY_CTX *context = own && other ? EVP_PKEY_CTX_new_from_pkey(NULL, own, NULL) : NULL;
	size_t		size = SHARED_SIZE;
	bool		done;

	done = context != NULL && EVP_PKEY_derive_init(context) == 1 &&
		EVP_PKEY_derive_set_peer(context, other) == 1 &&
		EVP_PKEY_derive(context, shared, &size) == 1 && size == SHARED_SIZE;
	EVP_PKEY_CTX_free(context);
	EVP_PKEY_free(own);
	EVP_PKEY_free(other);
	ERR_clear_error();
	return done;
}

/* The AES key of a box from its shared secret, which is wiped. */
static void
derive_box_key(uint8 *shared, const char *label, const uint8 *ephemeral, const uint8 *public_key, uint8 *box_key)
{
	uint8		info[LABEL_MAX + 2 * KV_BOX_PUBLIC_KEY_SIZE];
	Size		length = strlen(label);

	Assert(length <= LABEL_MAX);
	memcpy(info, label, length);
	memcpy(info + length, ephemeral, KV_BOX_PUBLIC_KEY_SIZE);
	memcpy(info + length + KV_BOX_PUBLIC_KEY_SIZE, public_key, KV_BOX_PUBLIC_KEY_SIZE);
	kv_hkdf_sha256(shared, SHARED_SIZE, NULL, 0, info, length + 2 * KV_BOX_PUBLIC_KEY_SIZE, box_key, KV_KEY_SIZE);
	kv_secret_wipe(shared, SHARED_SIZE);
}

static void
associate(KvAssociatedData *associated, const KvBoxBinding *binding)
{
	kv_associated_data_init(associated, (const uint8 *) binding->label, strlen(binding->label));
	kv_associated_data_add(associated, binding->vault_id.data, UUID_LEN);
	kv_associated_data_add(associated, (const uint8 *) binding->user_id, strlen(binding->user_id));
	kv_associated_data_add(associated, (const uint8 *) binding->context, strlen(binding->context));
}

/* Seal a secret to a public key; the box is allocated in the current memory context. */
bytea *
kv_sealed_box_seal(const KvBoxKey *key, const KvBoxBinding *binding, const char *secret, Size length)
{
	Size		size = VARHDRSZ + sizeof(BoxHeader) + length + KV_TAG_SIZE;
	bytea	   *box = palloc(size);
	BoxHeader  *header = (BoxHeader *) VARDATA(box);
	uint8	   *cipher = (uint8 *) (header + 1);
	KvBoxKey   *ephemeral = kv_secret_alloc(sizeof(KvBoxKey));
	uint8		shared[SHARED_SIZE];
	uint8		box_key[KV_KEY_SIZE];
	KvAssociatedData associated;

	kv_sealed_box_make_key(ephemeral);
	if (!share_secret(ephemeral->public_key, ephemeral->private_key, key->public_key, shared))
		kv_openssl_error_raise("ECDH");
	SET_VARSIZE(box, size);
	header->version = BOX_VERSION;
	memcpy(header->key_id, key->id, KV_BOX_KEY_ID_SIZE);
	memcpy(header->ephemeral, ephemeral->public_key, KV_BOX_PUBLIC_KEY_SIZE);
	kv_random_bytes(header->iv, KV_NONCE_SIZE);
	derive_box_key(shared, binding->label, header->ephemeral, key->public_key, box_key);
	associate(&associated, binding);
	kv_aead_seal(box_key, header->iv, associated.bytes, associated.length, (const uint8 *) secret, length,
				 cipher, cipher + length);
	kv_secret_wipe(box_key, sizeof(box_key));
	kv_secret_wipe(ephemeral, sizeof(KvBoxKey));
	return box;
}

/* Is what a row holds a box, and not a record? */
bool
kv_sealed_box_is(const bytea *stored)
{
	return VARSIZE_ANY_EXHDR(stored) > 0 && *(const uint8 *) VARDATA_ANY(stored) == BOX_VERSION;
}

/* Has it the outer form of a box, with a point on the curve? */
bool
kv_sealed_box_looks_right(const bytea *box)
{
	const BoxHeader *header = (const BoxHeader *) VARDATA_ANY(box);
	EVP_PKEY   *ephemeral;

	if (VARSIZE_ANY_EXHDR(box) <= sizeof(BoxHeader) + KV_TAG_SIZE ||
		header->version != BOX_VERSION || header->ephemeral[0] != UNCOMPRESSED)
		return false;
	ephemeral = load_key(header->ephemeral, NULL);
	EVP_PKEY_free(ephemeral);
	return ephemeral != NULL;
}

/* The id of the key that a box, which looks right, is sealed to. */
const uint8 *
kv_sealed_box_key_id(const bytea *box)
{
	return ((const BoxHeader *) VARDATA_ANY(box))->key_id;
}

/*
 * Open a box that looks right. Returns the secret, NUL-terminated, in secret memory of the
 * current context; NULL when it was sealed to another key or for something else, or altered.
 */
char *
kv_sealed_box_open(const KvBoxKey *key, const KvBoxBinding *binding, const bytea *box, Size *length)
{
	const BoxHeader *header = (const BoxHeader *) VARDATA_ANY(box);
	const uint8 *cipher = (const uint8 *) (header + 1);
	uint8		shared[SHARED_SIZE];
	uint8		box_key[KV_KEY_SIZE];
	KvAssociatedData associated;
	char	   *secret;
	bool		opened;

	if (memcmp(header->key_id, key->id, KV_BOX_KEY_ID_SIZE) != 0 ||
		!share_secret(key->public_key, key->private_key, header->ephemeral, shared))
		return NULL;
	*length = VARSIZE_ANY_EXHDR(box) - sizeof(BoxHeader) - KV_TAG_SIZE;
	secret = kv_secret_alloc(*length + 1);
	derive_box_key(shared, binding->label, header->ephemeral, key->public_key, box_key);
	associate(&associated, binding);
	opened = kv_aead_open(box_key, header->iv, associated.bytes, associated.length, cipher, *length,
						  cipher + *length, (uint8 *) secret);
	kv_secret_wipe(box_key, sizeof(box_key));
	secret[*length] = '\0';
	return opened ? secret : NULL;
}
