// A stand-in for HashiCorp Vault or OpenBao: the parts of the Transit, token and key/value (version 2) APIs that keyvault calls.
//   node vault.mjs --port 0 --port-file FILE --token TOKEN [--namespace NAME] [--lease SECONDS] [--cert FILE --key FILE] [--seed TEXT]
// With a seed, Transit keys are the same in each run that has it.
// POST /__mode?mode=NAME makes it misbehave: ok, sealed, slow, malformed, empty, short, huge, redirect, error.
// POST /__token?token=NAME makes another token the good one. GET /__stats counts calls by path.
import { createServer as createPlain } from 'node:http';
import { createServer as createSecure } from 'node:https';
import { createCipheriv, createDecipheriv, createHash, randomBytes } from 'node:crypto';
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import { parseArgs } from 'node:util';

const { values: option } = parseArgs({
  options: {
    port: { type: 'string', default: '0' },
    'port-file': { type: 'string' },
    token: { type: 'string', default: 'stand-in-token' },
    namespace: { type: 'string' },
    lease: { type: 'string', default: '3600' },
    cert: { type: 'string' },
    key: { type: 'string' },
    seed: { type: 'string' },
  },
});

let mode = 'ok';
let token = option.token;
let counts = {};
const transitKeys = new Map();

const transitKey = (name) => {
  if (!transitKeys.has(name)) transitKeys.set(name, option.seed ? createHash('sha256').update(option.seed + name).digest() : randomBytes(32));
  return transitKeys.get(name);
};

const encrypt = (name, plain) => {
  const nonce = randomBytes(12);
  const cipher = createCipheriv('aes-256-gcm', transitKey(name), nonce);
  const sealed = Buffer.concat([nonce, cipher.update(plain), cipher.final(), cipher.getAuthTag()]);
  return `vault:v1:${sealed.toString('base64')}`;
};

const decrypt = (name, ciphertext) => {
  const sealed = Buffer.from(ciphertext.replace(/^vault:v1:/, ''), 'base64');
  const decipher = createDecipheriv('aes-256-gcm', transitKey(name), sealed.subarray(0, 12));
  decipher.setAuthTag(sealed.subarray(-16));
  return Buffer.concat([decipher.update(sealed.subarray(12, -16)), decipher.final()]);
};

const send = (response, status, body) => {
  response.writeHead(status, { 'Content-Type': 'application/json' });
  response.end(typeof body === 'string' ? body : JSON.stringify(body));
};

const decryptBatch = (name, body) => {
  const items = body.batch_input ?? [{ ciphertext: body.ciphertext }];
  const results = items.map(({ ciphertext }) => {
    const plain = decrypt(name, ciphertext);
    return { plaintext: (mode === 'short' ? plain.subarray(1) : plain).toString('base64') };
  });
  return { data: body.batch_input ? { batch_results: results } : results[0] };
};

// Answers to the paths below /v1/; what they throw is a 400.
const answer = (path, body) => {
  const [, mount, action, name] = path.match(/^(.+)\/(decrypt|encrypt|datakey\/wrapped)\/([^/]+)$/) ?? [];
  if (path === 'auth/token/renew-self') {
    return { auth: { client_token: token, lease_duration: Number(option.lease), renewable: true } };
  }
  if (!mount) return undefined;
  if (action === 'decrypt') return mode === 'empty' ? { data: {} } : decryptBatch(name, body);
  const plain = action === 'encrypt' ? Buffer.from(body.plaintext, 'base64') : randomBytes(32);
  return { data: { ciphertext: encrypt(name, plain) } };
};

// The key/value engine, version 2: POST and GET of MOUNT/data/PATH, from any mount.
const secrets = new Map();

const keyValue = (method, path, body) => {
  if (!/^[^/]+\/data\/./.test(path)) return undefined;
  if (method === 'POST') secrets.set(path, body.data);
  if (!secrets.has(path)) return undefined;
  return { lease_duration: 0, data: { data: secrets.get(path), metadata: { version: 1 } } };
};

const serveApi = (request, response, path, text) => {
  counts[path] = (counts[path] ?? 0) + 1;
  if (mode === 'slow') return; // no answer at all
  if (mode === 'sealed') return send(response, 503, { errors: ['Vault is sealed'] });
  if (mode === 'error') return send(response, 500, { errors: ['internal error'] });
  if (mode === 'malformed') return send(response, 200, '{"data": ');
  if (mode === 'huge') return send(response, 200, ' '.repeat(1 << 20));
  if (mode === 'redirect') {
    response.writeHead(307, { Location: '/v1/elsewhere' });
    return response.end();
  }
  if (request.headers['x-vault-token'] !== token || request.headers['x-vault-namespace'] !== option.namespace) {
    return send(response, 403, { errors: ['permission denied'] });
  }
  try {
    const parsed = text ? JSON.parse(text) : {};
    const body = answer(path, parsed) ?? keyValue(request.method, path, parsed);
    return body ? send(response, 200, body) : send(response, 404, { errors: [] });
  } catch {
    return send(response, 400, { errors: ['invalid ciphertext'] });
  }
};

const serve = (request, response) => {
  const url = new URL(request.url, 'http://stand-in');
  let text = '';
  request.on('data', (chunk) => { text += chunk; });
  request.on('end', () => {
    if (url.pathname.startsWith('/v1/')) return serveApi(request, response, url.pathname.slice(4), text);
    if (url.pathname === '/__mode') mode = url.searchParams.get('mode');
    if (url.pathname === '/__token') token = url.searchParams.get('token');
    if (url.pathname === '/__reset') counts = {};
    return send(response, 200, counts);
  });
};

const server = option.cert
  ? createSecure({ cert: readFileSync(option.cert), key: readFileSync(option.key) }, serve)
  : createPlain(serve);
server.listen(Number(option.port), '127.0.0.1', () => {
  if (option['port-file']) {
    writeFileSync(`${option['port-file']}.new`, String(server.address().port));
    renameSync(`${option['port-file']}.new`, option['port-file']);
  }
});
process.on('SIGTERM', () => process.exit(0));
