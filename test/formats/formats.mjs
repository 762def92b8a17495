/*
 * formats.mjs
 *    keyvault's formats once more, from doc/keyvault.md alone and not from its C: what the one
 *    writes the other must read. Checked against RFC 5869 and NIST vectors first.
 *
 *    node formats.mjs OPERATION < arguments.json > result.json
 */

import assert from 'node:assert/strict';
import { createCipheriv, createDecipheriv, createECDH, createHash, createHmac, randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';

const hex = (text) => Buffer.from(text.replace(/^\\x/, ''), 'hex');
const uuid = (text) => hex(text.replaceAll('-', ''));
const u32 = (n) => { const b = Buffer.alloc(4); b.writeUInt32BE(n); return b; };
const lp = (bytes) => Buffer.concat([u32(Buffer.from(bytes).length), Buffer.from(bytes)]);

function hmac(key, ...parts) {
  const mac = createHmac('sha256', key);
  parts.forEach((part) => mac.update(part));
  return mac.digest();
}

/* RFC 5869, written out. */
function hkdf(input, salt, info, length) {
  const extracted = hmac(salt.length ? salt : Buffer.alloc(32), input);
  let last = Buffer.alloc(0);
  let out = Buffer.alloc(0);
  for (let i = 1; out.length < length; i++) {
    last = hmac(extracted, last, info, Buffer.from([i]));
    out = Buffer.concat([out, last]);
  }
  return out.subarray(0, length);
}

function gcmSeal(key, iv, associated, plain) {
  const cipher = createCipheriv('aes-256-gcm', key, iv);
  cipher.setAAD(associated);
  return Buffer.concat([cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
}

function gcmOpen(key, iv, associated, sealed) {
  const decipher = createDecipheriv('aes-256-gcm', key, iv);
  decipher.setAAD(associated);
  decipher.setAuthTag(sealed.subarray(-16));
  return Buffer.concat([decipher.update(sealed.subarray(0, -16)), decipher.final()]);
}

/* RFC 5869, appendices A.1 to A.3; GCM specification (NIST SP 800-38D), test cases 14 and 16. */
function checkVectors() {
  const range = (from, to) => Buffer.from(Array.from({ length: to - from + 1 }, (_, i) => from + i));
  assert.equal(hkdf(Buffer.alloc(22, 0x0b), range(0, 12), range(0xf0, 0xf9), 42).toString('hex'),
    '3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865');
  assert.equal(hkdf(range(0, 0x4f), range(0x60, 0xaf), range(0xb0, 0xff), 82).toString('hex'),
    'b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87');
  assert.equal(hkdf(Buffer.alloc(22, 0x0b), Buffer.alloc(0), Buffer.alloc(0), 42).toString('hex'),
    '8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8');
  assert.equal(gcmSeal(Buffer.alloc(32), Buffer.alloc(12), Buffer.alloc(0), Buffer.alloc(16)).toString('hex'),
    'cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919');
  assert.equal(gcmSeal(hex('feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308'), hex('cafebabefacedbaddecaf888'),
    hex('feedfacedeadbeeffeedfacedeadbeefabaddad2'),
    hex('d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39')).toString('hex'),
    '522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662'
    + '76fc6ece0f4e1768cddf8853bb2d551b');
}

const kekId = (masterKey) => hkdf(masterKey, Buffer.alloc(0), Buffer.from('keyvault/v1/kek-id'), 32).subarray(0, 16);

function wrapAssociated(header, a) {
  return Buffer.concat([header.subarray(0, 24), lp(uuid(a.vault_id)), lp(a.user_id), lp(u32(a.version)), lp(uuid(a.data_key_id))]);
}

function makeWrap(a) {
  const masterKey = hex(a.master_key);
  const header = Buffer.concat([Buffer.from([0x44, 1, 1, 1]), u32(a.kek_version), kekId(masterKey), hex(a.nonce)]);
  return Buffer.concat([header, gcmSeal(masterKey, hex(a.nonce), wrapAssociated(header, a), hex(a.data_key))]);
}

function openWrap(a) {
  const wrap = hex(a.wrapped);
  assert.deepEqual(wrap.subarray(8, 24), kekId(hex(a.master_key)));
  return gcmOpen(hex(a.master_key), wrap.subarray(24, 36), wrapAssociated(wrap, a), wrap.subarray(36));
}

function recordKeys(dataKey, header) {
  const info = Buffer.concat([Buffer.from('keyvault/v1/record'), header.subarray(2, 3), header.subarray(8, 24)]);
  const keys = hkdf(dataKey, header.subarray(24, 40), info, 64);
  return { key: keys.subarray(0, 32), commitment: keys.subarray(32) };
}

function recordAssociated(header, a) {
  return Buffer.concat([header, lp(uuid(a.vault_id)), lp(a.user_id), lp(uuid(a.id)), lp(a.provider), lp(a.purpose)]);
}

function makeRecord(a) {
  const start = Buffer.concat([Buffer.from([0x4b, 1, 1, 0]), u32(a.version), uuid(a.data_key_id), hex(a.salt), hex(a.record_nonce)]);
  const { key, commitment } = recordKeys(hex(a.data_key), start);
  const header = Buffer.concat([start, commitment]);
  return Buffer.concat([header, gcmSeal(key, hex(a.record_nonce), recordAssociated(header, a), Buffer.from(a.secret))]);
}

function openRecord(a) {
  const record = hex(a.record);
  const header = record.subarray(0, 84);
  const { key, commitment } = recordKeys(openWrap(a), header);
  assert.deepEqual(commitment, header.subarray(52, 84));
  return gcmOpen(key, header.subarray(40, 52), recordAssociated(header, a), record.subarray(84));
}

function fingerprint(a) {
  const key = hkdf(openWrap(a), Buffer.alloc(0), Buffer.from('keyvault/v1/fingerprint'), 32);
  return hmac(key, Buffer.from(a.secret)).subarray(0, 16);
}

function boxKey(label, shared, ephemeral, publicKey) {
  return hkdf(shared, Buffer.alloc(0), Buffer.concat([Buffer.from(label), ephemeral, publicKey]), 32);
}

function boxAssociated(a) {
  return Buffer.concat([Buffer.from('keyvault/seal/v1'), lp(uuid(a.vault_id)), lp(a.user_id), lp(a.provider)]);
}

function makeBox(a) {
  const ephemeral = createECDH('prime256v1');
  const publicKey = hex(a.public_key);
  if (a.ephemeral_private_key) ephemeral.setPrivateKey(hex(a.ephemeral_private_key));
  else ephemeral.generateKeys();
  const iv = a.iv ? hex(a.iv) : randomBytes(12);
  const own = ephemeral.getPublicKey();
  const key = boxKey('keyvault/seal/v1', ephemeral.computeSecret(publicKey), own, publicKey);
  const keyId = createHash('sha256').update(publicKey).digest().subarray(0, 4);
  return Buffer.concat([Buffer.from([1]), keyId, own, iv, gcmSeal(key, iv, boxAssociated(a), Buffer.from(a.secret, a.encoding))]);
}

function openBox(a) {
  const box = hex(a.box);
  const own = createECDH('prime256v1');
  own.setPrivateKey(hex(a.private_key));
  const ephemeral = box.subarray(5, 70);
  const key = boxKey('keyvault/seal/v1', own.computeSecret(ephemeral), ephemeral, own.getPublicKey());
  return gcmOpen(key, box.subarray(70, 82), boxAssociated(a), box.subarray(82));
}

const operations = { makeWrap, openWrap, makeRecord, openRecord, fingerprint, makeBox, openBox };

checkVectors();
const results = JSON.parse(readFileSync(0, 'utf8')).map(([operation, a]) => operations[operation](a).toString('hex'));
process.stdout.write(JSON.stringify(results));
