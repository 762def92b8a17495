/*
 * Seal an API key for keyvault with WebCrypto alone: in a browser, Node, Deno or a worker.
 * parameters is what keyvault.sealing_key() returns; the result goes to
 * keyvault.store_sealed_api_key(provider, sealed, ...), which only this user and provider open.
 */
const utf8 = (text) => new TextEncoder().encode(text);
const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const concat = (...parts) => new Uint8Array(parts.flatMap((part) => [...part]));
const withLength = (bytes) => concat([0, 0, bytes.length >> 8, bytes.length & 255], bytes);

export async function sealApiKey(parameters, userId, provider, apiKey) {
  const { subtle } = globalThis.crypto;
  const curve = { name: 'ECDH', namedCurve: 'P-256' };
  const publicKey = fromBase64(parameters.public_key);
  const own = await subtle.generateKey(curve, false, ['deriveBits']);
  const ephemeral = new Uint8Array(await subtle.exportKey('raw', own.publicKey));
  const recipient = await subtle.importKey('raw', publicKey, curve, false, []);
  const shared = await subtle.deriveBits({ name: 'ECDH', public: recipient }, own.privateKey, 256);
  const info = concat(utf8(parameters.format), ephemeral, publicKey);
  const key = await subtle.deriveKey(
    { name: 'HKDF', hash: 'SHA-256', salt: new Uint8Array(), info },
    await subtle.importKey('raw', shared, 'HKDF', false, ['deriveKey']),
    { name: 'AES-GCM', length: 256 }, false, ['encrypt']);
  const iv = globalThis.crypto.getRandomValues(new Uint8Array(12));
  const additionalData = concat(
    fromBase64(parameters.associated_data), withLength(utf8(userId)), withLength(utf8(provider)));
  const sealed = await subtle.encrypt({ name: 'AES-GCM', iv, additionalData }, key, utf8(apiKey));
  return concat([1], fromBase64(parameters.key_id), ephemeral, iv, new Uint8Array(sealed));
}
