/*
 * provider.mjs
 *    A local stand-in for the AI providers that the worker calls.
 *
 *    node provider.mjs --port 0 --port-file FILE [--log FILE.jsonl]
 *
 * Answers have the shape that the vendors document, and depend on the request alone, except for
 * ids and times. Nothing is written to standard output, and no answer contains the credential
 * unless a test asks for it (`echo-key`). Node built-ins only: the tests of the extension must
 * run where nothing can be installed.
 */

import http from 'node:http';
import { createHash, randomBytes } from 'node:crypto';
import { openSync, realpathSync, renameSync, writeFileSync, writeSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

import { parseDirectives, withoutDirectives } from './directives.mjs';
import { deliver } from './delivery.mjs';
import { openai } from './vendors/openai.mjs';
import { anthropic } from './vendors/anthropic.mjs';
import { gemini } from './vendors/gemini.mjs';
import { exa } from './vendors/exa.mjs';
import { generic } from './vendors/generic.mjs';

/* The first that knows the path answers: Anthropic before OpenAI, whose /v1/models it shares. */
const VENDORS = [anthropic, openai, gemini, exa, generic];

const LOG_SIZE = 2000;
const LOGGED_BODY = 64 * 1024;
const MAX_BODY = 64 * 1024 * 1024;
const MAX_PATHS = 1000;
const ECHO_LENGTH = 200;
/* Stands for bytes that JSON.stringify cannot write; delivery.mjs puts them in. */
const BAD_UTF8 = '@@bad-utf8@@';

/* What the caller authenticates with, however wrong its shape is. */
function receivedCredential(headers) {
  return headers['x-api-key'] ?? headers['x-goog-api-key'] ?? headers['api-key']
    ?? headers.authorization?.replace(/^Bearer /, '');
}

/*
 * Take the credential out of an answer that repeats the request it came in.
 * Short ones are left, since they are words of the answer itself.
 */
function scrub(json, credential) {
  if (credential === undefined || credential.length < 8) return json;
  const escaped = JSON.stringify(credential).slice(1, -1);
  return json.includes(escaped) ? json.split(escaped).join('[credential]') : json;
}

/* Spell the credential with JSON escapes, as an encoder may that escapes more than it must. */
function spell(json, credential) {
  const escapes = [...credential].map((c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`);
  return json.split(JSON.stringify(credential).slice(1, -1)).join(escapes.join(''));
}

/* The first characters of a text, without half a surrogate pair at the end. */
function beginning(text) {
  if (text.length <= ECHO_LENGTH) return text;
  return text.slice(0, ECHO_LENGTH).replace(/[\ud800-\udbff]$/, '');
}

function countWords(text) {
  return text.split(/\s+/).filter((word) => word !== '').length;
}

/* Replace every number of a usage object by one that no honest provider reports. */
function distort(usage, kind) {
  let n = 0;
  const bad = {
    negative: () => -7, giant: () => 1e18, strings: () => '12 or more', fraction: () => 3.5,
    hostile: () => [-7, 1e18, '12 or more'][n++ % 3],
  }[kind];
  const walk = (value) => {
    if (typeof value === 'number') return bad();
    if (Array.isArray(value)) return value.map(walk);
    if (value === null || typeof value !== 'object') return value;
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, walk(inner)]));
  };
  return walk(usage);
}

/* Tokens of a call: IN is the whole prompt with its cached part, OUT all output with thoughts. */
function countTokens(texts, text, directives) {
  return {
    input: directives.tokens?.input ?? Math.ceil(JSON.stringify(texts).length / 4),
    output: directives.tokens?.output ?? countWords(text),
    cached: directives.cached ?? 0,
    cacheWrite: directives['cache-write'] ?? 0,
    thoughts: directives.thoughts ?? 0,
  };
}

/* What a directive wants to see in the text of an answer or the message of an error. */
function textSuffix(directives, credential) {
  let suffix = '';
  if (directives.nul) suffix += ' nul:\u0000:nul';
  if (directives.badutf8) suffix += ` ${BAD_UTF8}`;
  if (directives['echo-key'] || directives['escape-key']) suffix += ` ${credential ?? 'no credential'}`;
  return suffix;
}

class Provider {
  constructor(logFile) {
    this.logFd = logFile === undefined ? undefined : openSync(logFile, 'a');
    this.run = randomBytes(6).toString('hex');
    this.ids = 0;
    this.closed = new Map();
    this.opened = new Set();
    this.reset();
  }

  /* Forget all requests but those that are still being answered. */
  reset() {
    const open = this.stats?.in_flight ?? 0;
    this.log = [];
    this.next = 0;
    this.seen = new Set();
    this.opened.clear();
    this.paths = 0;
    this.countedSockets = new WeakSet();
    this.stats = {
      requests: 0, connections: 0, in_flight: open, max_in_flight: open, by_path: {},
    };
  }

  /* Unique over restarts, as ids of providers are. */
  requestId() {
    return this.run + (++this.ids).toString(16).padStart(12, '0');
  }

  begin(req, res, path) {
    const { stats } = this;
    stats.requests++;
    stats.in_flight++;
    if (stats.in_flight > stats.max_in_flight) stats.max_in_flight = stats.in_flight;
    // A test that asks for the statistics is no connection of the worker's.
    if (!this.countedSockets.has(req.socket)) {
      this.countedSockets.add(req.socket);
      stats.connections++;
    }
    if (path in stats.by_path) stats.by_path[path]++;
    else if (this.paths++ < MAX_PATHS) stats.by_path[path] = 1;
    res.once('close', () => { this.stats.in_flight--; });
  }

  record(req, body) {
    const { method, url, headers } = req;
    const entry = { time: Date.now(), method, path: url, headers, body };
    if (body.length > LOGGED_BODY) {
      entry.body = body.slice(0, LOGGED_BODY);
      entry.body_length = body.length;
    }
    this.log[this.next] = entry;
    this.next = (this.next + 1) % LOG_SIZE;
    // Written before the answer leaves, so whoever has the answer can read the line.
    if (this.logFd !== undefined) writeSync(this.logFd, `${JSON.stringify(this.show(entry))}\n`);
  }

  show({ time, headers, ...entry }) {
    const credential = receivedCredential(headers);
    return {
      time: new Date(time).toISOString(),
      ...entry,
      headers,
      credential_sha256: credential === undefined ? null
        : createHash('sha256').update(credential).digest('hex'),
    };
  }

  lastRequests(n) {
    const ordered = [...this.log.slice(this.next), ...this.log.slice(0, this.next)];
    return ordered.slice(Math.max(0, ordered.length - n)).map((entry) => this.show(entry));
  }

  /* Directives in force; those of `once:` only if this prompt has not been seen before. */
  directives(req, text, path) {
    let header = req.headers['x-mock'];
    if (header === undefined && req.url.includes('mock=')) {
      header = new URL(req.url, 'http://stand-in').searchParams.get('mock') ?? undefined;
    }
    const { always, once } = parseDirectives(header, text);
    for (const name in once) {
      const key = createHash('sha256').update(`${path}\n${header}\n${text}`).digest('base64');
      if (this.seen.has(key)) return always;
      this.seen.add(key);
      return { ...always, ...once };
    }
    return always;
  }

  /*
   * Decide what a request gets.
   * Returns { status, headers, json, directives }, where json is undefined for an empty body.
   */
  reply(req, path, rawBody) {
    const { vendor, route } = findVendor(req, path);
    const received = receivedCredential(req.headers);
    const requestId = this.requestId();
    const headers = vendor.requestIdHeader ? { [vendor.requestIdHeader]: requestId } : {};
    let directives = {};

    const shown = (json) => {
      if (directives['echo-key']) return json;
      return directives['escape-key'] ? spell(json, received) : scrub(json, received);
    };
    const finish = (status, answer) => {
      const json = JSON.stringify(answer);
      return {
        status,
        headers,
        json: shown(json),
        directives,
      };
    };
    const fail = ({ status, message, details }) => finish(status,
      vendor.error(status, message + textSuffix(directives, received),
        { requestId, code: directives.code, details }));

    const { body, texts, last, problem } = understand(vendor, route, req, rawBody);
    try {
      directives = this.directives(req, last, path);
    } catch (error) {
      return fail({ status: 400, message: error.message });
    }
    if (directives['retry-after'] !== undefined) headers['retry-after'] = directives['retry-after'];
    if (directives.redirect !== undefined) {
      headers.location = directives.redirect;
      return { status: 302, headers, json: undefined, directives };
    }
    const refusal = refuse(vendor, req.headers) ?? problem;
    if (refusal !== undefined) return fail(refusal);
    if (directives.status >= 400) {
      return fail({ status: directives.status, message: `Stand-in error ${directives.status}.` });
    }

    const model = directives.model ?? route.model ?? body.model ?? 'none';
    const suffix = textSuffix(directives, received);
    const text = `Model ${model} heard: ${beginning(withoutDirectives(last))}${suffix}`;
    const answer = vendor.answer(route.operation, {
      id: requestId,
      now: Math.floor(Date.now() / 1000),
      path,
      body,
      model,
      text,
      tokens: countTokens(texts, text, directives),
      cost: directives.cost,
      directives,
      suffix,
    });
    const field = vendor.usageField;
    if (directives.usage === 'missing') delete answer[field];
    else if (directives.usage !== undefined && answer[field] !== undefined) {
      answer[field] = distort(answer[field], directives.usage);
    }
    return finish(directives.status ?? 200, answer);
  }

  /* Answers behind a gate wait until a test has opened it. */
  whenOpen(gate, answer) {
    if (gate === undefined || this.opened.has(gate)) answer();
    else this.closed.set(gate, [...(this.closed.get(gate) ?? []), answer]);
  }

  open(gate) {
    const waiting = this.closed.get(gate) ?? [];
    this.opened.add(gate);
    this.closed.delete(gate);
    for (const answer of waiting) answer();
    return waiting.length;
  }

  /* One request that trips the stand-in must not take the other tests with it. */
  answer(req, res, path, body) {
    try {
      const reply = this.reply(req, path, body);
      this.whenOpen(reply.directives.gate, () => deliver(res, reply, BAD_UTF8));
    } catch (error) {
      process.stderr.write(`stand-in: ${req.method} ${path}: ${error.stack}\n`);
      if (!res.headersSent) res.writeHead(500);
      res.end();
    }
  }

  control(req, res, path) {
    const query = new URL(req.url, 'http://stand-in').searchParams;
    let answer;
    if (path === '/__stats') answer = this.stats;
    else if (path === '/__log') answer = this.lastRequests(Number(query.get('n') ?? LOG_SIZE));
    else if (path === '/__open' && req.method === 'POST') {
      answer = { answered: this.open(query.get('gate')) };
    } else if (path === '/__reset' && req.method === 'POST') {
      this.reset();
      answer = { ok: true };
    }
    req.resume();
    res.writeHead(answer ? 200 : 404, { 'content-type': 'application/json' });
    res.end(JSON.stringify(answer ?? { error: 'no such control path' }));
  }

  handle(req, res) {
    const question = req.url.indexOf('?');
    const path = question < 0 ? req.url : req.url.slice(0, question);
    if (path.startsWith('/__')) {
      this.control(req, res, path);
      return;
    }
    this.begin(req, res, path);
    const chunks = [];
    let length = 0;
    req.on('data', (chunk) => {
      length += chunk.length;
      if (length > MAX_BODY) req.destroy();
      else chunks.push(chunk);
    });
    req.on('end', () => {
      const body = chunks.length === 1 ? chunks[0].toString() : Buffer.concat(chunks).toString();
      this.record(req, body);
      this.answer(req, res, path, body);
    });
    // A caller that goes away is what many tests are about; there is nothing to do.
    req.on('error', () => {});
    res.on('error', () => {});
  }
}

function parseObject(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === 'object' && !Array.isArray(value) ? value : undefined;
  } catch {
    return undefined;
  }
}

/* The dialect that a request speaks; the generic one speaks any. */
function findVendor({ method, headers }, path) {
  for (const vendor of VENDORS) {
    const route = vendor.route(path, headers, method);
    if (route !== undefined) return { vendor, route };
  }
  throw new Error('no vendor for this path');
}

/*
 * Read a request as its vendor would.
 * Returns { body, texts, last, problem }: the texts of the prompt, the last one of the user, and
 * what the vendor would say against the request, if anything, as { status, message }.
 */
function understand(vendor, route, { method, headers }, rawBody) {
  const parsed = parseObject(rawBody);
  const body = parsed ?? {};
  const nothing = { body, texts: [], last: '' };
  const against = (status, message) => ({ ...nothing, problem: { status, message } });

  if (method !== route.method) return against(405, `${method} is not allowed on this path.`);
  if (vendor !== generic && method === 'POST') {
    if (!/^application\/json\b/i.test(headers['content-type'] ?? '')) {
      return against(400, 'The Content-Type of your request is not application/json.');
    }
    if (parsed === undefined) return against(400, 'Your request has no valid JSON body.');
    if (body.stream === true) return against(400, 'This stand-in does not stream.');
  }
  const message = vendor.check(route.operation, body, headers);
  if (message !== undefined) return against(400, message);
  return { body, ...vendor.prompt(route.operation, body), problem: undefined };
}

/* Why the credential is refused, or undefined. The words in a key let tests make one up. */
function refuse(vendor, headers) {
  const credential = vendor.credential(headers);
  if (credential === undefined) {
    if (vendor.needsNoCredential) return undefined;
    return vendor.refuse('missing');
  }
  if (credential.includes('revoked')) return vendor.refuse('revoked');
  if (credential.includes('invalid') || !/^[\x21-\x7e]{8,512}$/.test(credential)) {
    return vendor.refuse('invalid');
  }
  return undefined;
}

/* Start a stand-in on 127.0.0.1. Returns { port, url, close() }; close() drops open calls. */
export async function startProvider({ port = 0, log } = {}) {
  const provider = new Provider(log);
  const server = http.createServer({ keepAliveTimeout: 600000, requestTimeout: 0 },
    (req, res) => provider.handle(req, res));
  server.on('clientError', (error, socket) => socket.destroy());
  await new Promise((resolve, reject) => {
    server.once('error', reject);
    server.listen(port, '127.0.0.1', 4096, resolve);
  });
  const address = server.address();
  return {
    port: address.port,
    url: `http://127.0.0.1:${address.port}`,
    close: () => new Promise((resolve) => {
      server.close(resolve);
      server.closeAllConnections();
    }),
  };
}

/* Write the port where a waiting script finds either nothing or all of it. */
export function writePortFile(file, port) {
  const temporary = `${file}.${process.pid}`;
  writeFileSync(temporary, `${port}\n`);
  renameSync(temporary, file);
}

async function main() {
  const { values } = parseArgs({
    options: {
      port: { type: 'string', default: '0' },
      'port-file': { type: 'string' },
      log: { type: 'string' },
    },
  });
  const stop = () => process.exit(0);
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
  const { port } = await startProvider({ port: Number(values.port), log: values.log });
  if (values['port-file'] !== undefined) writePortFile(values['port-file'], port);
  else process.stderr.write(`listening on 127.0.0.1:${port}\n`);
}

const program = process.argv[1] && realpathSync(process.argv[1]);
if (program === fileURLToPath(import.meta.url)) await main();
