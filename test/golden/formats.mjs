// The formats of the vault, written a second time with Node's own cryptography: prints formats.json, which the tests compare
// with what keyvault opens. All that is random in the formats is fixed here. See "Formats" in doc/keyvault.md.
import { createCipheriv, createECDH, createHash, createHmac, hkdfSync } from 'node:crypto';

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

const wrapOf = (user, version, id, key, nonce) => {
  const header = Buffer.concat([Buffer.from('D'), Buffer.from([1, 1, 1]), u32(masterKeyVersion), kekId]);
  const associated = Buffer.concat([header, lp(vaultId), lp(Buffer.from(user)), lp(u32(version)), lp(id)]);
  return Buffer.concat([header, nonce, gcm(masterKey, nonce, associated, key)]);
};
const recordOf = (user, version, keyId, key, salt, nonce, id, provider, purpose, secret, commitment) => {
  const info = Buffer.concat([Buffer.from('keyvault/v1/record'), Buffer.from([1]), keyId]);
  const derived = Buffer.from(hkdfSync('sha256', key, salt, info, 64));
  const header = Buffer.concat([Buffer.from('K'), Buffer.from([1, 1, 0]), u32(version), keyId, salt, nonce, commitment ?? derived.subarray(32)]);
  const associated = Buffer.concat([header, lp(vaultId), lp(Buffer.from(user)), lp(id), lp(Buffer.from(provider)), lp(Buffer.from(purpose))]);
  return Buffer.concat([header, gcm(derived.subarray(0, 32), nonce, associated, Buffer.from(secret))]);
};
const wrapped = wrapOf(userId, dataKeyVersion, dataKeyId, dataKey, bytes(0x30, 12));

const secret = 'sk-golden-0123456789abcdef';
const provider = 'openai';
const secretId = bytes(0x40, 16);
const record = recordOf(userId, dataKeyVersion, dataKeyId, dataKey, bytes(0x50, 16), bytes(0x60, 12), secretId, provider, 'api_key', secret);

const fingerprintKey = Buffer.from(hkdfSync('sha256', dataKey, Buffer.alloc(0), 'keyvault/v1/fingerprint', 32));
const fingerprint = createHmac('sha256', fingerprintKey).update(secret).digest().subarray(0, 16);

// The vault's sealing key, a record of the platform's, and a box that a client sealed to it.
const platformKey = bytes(0xc0, 32);
const platformKeyId = bytes(0xe0, 16);
const sealing = createECDH('prime256v1');
sealing.setPrivateKey(bytes(0x01, 32));
const sealingId = bytes(0xf0, 16);
const sealingRecord = recordOf('', 1, platformKeyId, platformKey, bytes(0x51, 16), bytes(0x61, 12), sealingId, '', 'sealing_key', sealing.getPrivateKey());
const sealingKeyId = createHash('sha256').update(sealing.getPublicKey()).digest().subarray(0, 4);
const ephemeral = createECDH('prime256v1');
ephemeral.setPrivateKey(bytes(0x21, 32));
const boxInfo = Buffer.concat([Buffer.from('keyvault/seal/v1'), ephemeral.getPublicKey(), sealing.getPublicKey()]);
const boxKey = Buffer.from(hkdfSync('sha256', ephemeral.computeSecret(sealing.getPublicKey()), Buffer.alloc(0), boxInfo, 32));
const boxAssociated = Buffer.concat([Buffer.from('keyvault/seal/v1'), lp(vaultId), lp(Buffer.from(userId)), lp(Buffer.from('exa'))]);
const boxSecret = 'golden-key-in-a-box';
const box = Buffer.concat([Buffer.from([1]), sealingKeyId, ephemeral.getPublicKey(), bytes(0x70, 12),
  gcm(boxKey, bytes(0x70, 12), boxAssociated, Buffer.from(boxSecret))]);

// A key for one call, under a run's key of zeros.
const requestId = bytes(0x90, 16);
const callAssociated = Buffer.concat([Buffer.from('keyvault/v1/call-key'), lp(Buffer.from(userId)), lp(requestId)]);
const callKey = Buffer.concat([Buffer.from('R'), bytes(0xa0, 12), gcm(Buffer.alloc(32), bytes(0xa0, 12), callAssociated, Buffer.from(secret))]);

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
  record_of_another_purpose: recordOf(userId, dataKeyVersion, dataKeyId, dataKey, bytes(0x50, 16), bytes(0x60, 12), secretId, provider, 'sealing_key',
    secret).toString('hex'),
  record_of_another_commitment: recordOf(userId, dataKeyVersion, dataKeyId, dataKey, bytes(0x50, 16), bytes(0x60, 12), secretId, provider, 'api_key',
    secret, bytes(0xd0, 32)).toString('hex'),
  fingerprint: fingerprint.toString('hex'),
  platform_data_key_id: uuid(platformKeyId),
  platform_wrapped: wrapOf('', 1, platformKeyId, platformKey, bytes(0x31, 12)).toString('hex'),
  sealing_key_id: sealingKeyId.toString('hex'),
  sealing_id: uuid(sealingId),
  sealing_public_key: sealing.getPublicKey('hex'),
  sealing_record: sealingRecord.toString('hex'),
  box_provider: 'exa',
  box_secret: boxSecret,
  box: box.toString('hex'),
  request_id: uuid(requestId),
  call_key: callKey.toString('hex'),
}, null, 2));
