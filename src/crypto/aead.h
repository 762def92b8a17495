/*-------------------------------------------------------------------------
 * aead.h
 *		AES-256-GCM, HKDF-SHA256 and HMAC-SHA256, from OpenSSL.
 *-------------------------------------------------------------------------
 */
#ifndef KV_AEAD_H
#define KV_AEAD_H

#include "postgres.h"

#define KV_KEY_SIZE		32
#define KV_NONCE_SIZE	12
#define KV_TAG_SIZE		16
#define KV_MAC_SIZE		32

extern void kv_random_bytes(uint8 *out, Size length);
extern void kv_aead_seal(const uint8 *key, const uint8 *nonce, const uint8 *associated, Size associated_length,
						 const uint8 *plain, Size length, uint8 *cipher, uint8 *tag);
extern bool kv_aead_open(const uint8 *key, const uint8 *nonce, const uint8 *associated, Size associated_length,
						 const uint8 *cipher, Size length, const uint8 *tag, uint8 *plain);
extern void kv_hkdf_sha256(const uint8 *key, Size key_length, const uint8 *salt, Size salt_length,
						   const uint8 *info, Size info_length, uint8 *out, Size length);
extern void kv_hmac_sha256(const uint8 *key, Size key_length, const uint8 *message, Size length, uint8 *mac);
extern bool kv_bytes_equal(const uint8 *a, const uint8 *b, Size length);

#endif
