// The formats of the vault, written a second time with Node's own cryptography: prints formats.json, which the tests compare
// with what keyvault opens. All that is random in the formats is fixed here. See "Formats" in doc/keyvault.md.
import { createCipheriv, hkdfSync, createHmac } from 'node:crypto';

const bytes = (first, length) => Buffer.from(Array.from({ length }, (_, i) => (first + i) & 255));
const u32 = (number) => { const b = Buffer.alloc(4); b.writeUInt32BE(number); return b; };
const lp = (field) => Buffer.concat([u32(field.length), field]);
const uuid = (b) => b.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5');
const gcm = (key, nonce, associated, plain) => {
  const cipher = createCipheriv('aes-256-gcm', key, nonce);
  cipher.setAAD(associated);
  return Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
};

const masterKey = bytes(0x00, 32);
const kekId = Buffer.from(hkdfSync('sha256', masterKey, Buffer.alloc(0), 'keyvault/v1/kek-id', 16));
const vaultId = bytes(0x10, 16);
const userId = 'golden_user';
const dataKey = bytes(0x80, 32);
const dataKeyId = bytes(0x20, 16);
const dataKeyVersion = 7;
const masterKeyVersion = 3;

const wrapHeader = Buffer.concat([Buffer.from('D'), Buffer.from([1, 1, 1]), u32(masterKeyVersion), kekId]);
const wrapNonce = bytes(0x30, 12);
const wrapAssociated = Buffer.concat([wrapHeader, lp(vaultId), lp(Buffer.from(userId)), lp(u32(dataKeyVersion)), lp(dataKeyId)]);
const wrapped = Buffer.concat([wrapHeader, wrapNonce, gcm(masterKey, wrapNonce, wrapAssociated, dataKey)]);

const secret = 'sk-golden-0123456789abcdef';
const provider = 'openai';
const secretId = bytes(0x40, 16);
const salt = bytes(0x50, 16);
const info = Buffer.concat([Buffer.from('keyvault/v1/record'), Buffer.from([1]), dataKeyId]);
const derived = Buffer.from(hkdfSync('sha256', dataKey, salt, info, 64));
const recordNonce = bytes(0x60, 12);
const recordHeader = Buffer.concat([
  Buffer.from('K'), Buffer.from([1, 1, 0]), u32(dataKeyVersion), dataKeyId, salt, recordNonce, derived.subarray(32)]);
const recordAssociated = Buffer.concat([
  recordHeader, lp(vaultId), lp(Buffer.from(userId)), lp(secretId), lp(Buffer.from(provider)), lp(Buffer.from('api_key'))]);
const record = Buffer.concat([recordHeader, gcm(derived.subarray(0, 32), recordNonce, recordAssociated, Buffer.from(secret))]);

const fingerprintKey = Buffer.from(hkdfSync('sha256', dataKey, Buffer.alloc(0), 'keyvault/v1/fingerprint', 32));
const fingerprint = createHmac('sha256', fingerprintKey).update(secret).digest().subarray(0, 16);

console.log(JSON.stringify({
  master_key: masterKey.toString('hex'),
  kek_id: kekId.toString('hex'),
  master_key_version: masterKeyVersion,
  vault_id: uuid(vaultId),
  user_id: userId,
  data_key_id: uuid(dataKeyId),
  data_key_version: dataKeyVersion,
  wrapped: wrapped.toString('hex'),
  provider,
  secret_id: uuid(secretId),
  secret,
  record: record.toString('hex'),
  fingerprint: fingerprint.toString('hex'),
}, null, 2));
