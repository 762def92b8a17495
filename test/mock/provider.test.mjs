/*
 * provider.test.mjs
 *    Tests of the stand-in itself: node --test provider.test.mjs
 */

import { strict as assert } from 'node:assert';
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import http from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, beforeEach, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { gunzipSync } from 'node:zlib';

import { startProvider } from './provider.mjs';

const KEY = 'test-key-0123456789';
const BEARER = { authorization: `Bearer ${KEY}` };
const ANTHROPIC = { 'x-api-key': KEY, 'anthropic-version': '2023-06-01' };
const GEMINI = { 'x-goog-api-key': KEY };
const EXA = { 'x-api-key': KEY };
const GENERATE = '/v1beta/models/gemini-2.5-flash:generateContent';

let provider;
let agent;

before(async () => {
  provider = await startProvider();
  agent = new http.Agent({ keepAlive: true });
});
beforeEach(() => request('POST', '/__reset'));
after(async () => {
  agent.destroy();
  await provider.close();
});

/* Send a request; returns { status, headers, bytes, text, json() }. */
function request(method, path, headers = {}, body = undefined, signal = undefined) {
  return new Promise((resolve, reject) => {
    const req = http.request(provider.url + path, {
      method, agent, signal, headers: { 'content-type': 'application/json', ...headers },
    }, (res) => {
      const chunks = [];
      res.on('data', (chunk) => chunks.push(chunk));
      res.on('error', reject);
      res.on('end', () => {
        const bytes = Buffer.concat(chunks);
        const text = bytes.toString();
        resolve({
          status: res.statusCode, headers: res.headers, bytes, text, json: () => JSON.parse(text),
        });
      });
    });
    req.on('error', reject);
    req.end(typeof body === 'object' ? JSON.stringify(body) : body);
  });
}

/* The same prompt in each dialect. */
const DIALECTS = {
  openai: (prompt, headers = BEARER) => request('POST', '/v1/chat/completions', headers,
    { model: 'gpt-5-mini', messages: [{ role: 'user', content: prompt }] }),
  anthropic: (prompt, headers = ANTHROPIC) => request('POST', '/v1/messages', headers,
    { model: 'claude-opus-5-5', max_tokens: 9, messages: [{ role: 'user', content: prompt }] }),
  gemini: (prompt, headers = GEMINI) => request('POST', GENERATE, headers,
    { contents: [{ role: 'user', parts: [{ text: prompt }] }] }),
  exa: (prompt, headers = EXA) => request('POST', '/answer', headers, { query: prompt }),
};
const chat = DIALECTS.openai;

test('openai chat completion', async () => {
  const answer = await request('POST', '/v1/chat/completions', BEARER, {
    model: 'gpt-5-mini',
    messages: [
      { role: 'system', content: 'Be short.' },
      { role: 'user', content: [{ type: 'text', text: 'one two' }] },
      { role: 'assistant', content: 'three' },
    ],
  });
  const { id, object, created, model, choices, usage } = answer.json();
  assert.equal(answer.status, 200);
  assert.ok(answer.headers['x-request-id']);
  assert.match(id, /^chatcmpl-/);
  assert.equal(object, 'chat.completion');
  assert.ok(Math.abs(created - Date.now() / 1000) < 60);
  assert.equal(model, 'gpt-5-mini');
  assert.equal(choices[0].message.content, 'Model gpt-5-mini heard: one two');
  const texts = JSON.stringify(['Be short.', 'one two', 'three']);
  assert.equal(usage.prompt_tokens, Math.ceil(texts.length / 4));
  assert.equal(usage.completion_tokens, 5);
  assert.equal(usage.total_tokens, usage.prompt_tokens + 5);
  assert.equal(usage.prompt_tokens_details.cached_tokens, 0);
  assert.equal(usage.completion_tokens_details.reasoning_tokens, 0);
});

test('openai responses', async () => {
  const { object, status, output, usage } = (await request('POST', '/v1/responses', BEARER,
    { model: 'gpt-5-mini', input: 'hi [[mock: tokens=10,8 cached=4 thoughts=3]]' })).json();
  assert.equal(object, 'response');
  assert.equal(status, 'completed');
  assert.deepEqual(output.map(({ type }) => type), ['reasoning', 'message']);
  assert.equal(output[1].content[0].text, 'Model gpt-5-mini heard: hi');
  assert.deepEqual(usage, {
    input_tokens: 10,
    input_tokens_details: { cached_tokens: 4, cache_write_tokens: 0 },
    output_tokens: 8,
    output_tokens_details: { reasoning_tokens: 3 },
    total_tokens: 18,
  });
});

test('openai embeddings are the same as floats and as base64', async () => {
  const body = { model: 'text-embedding-3-small', input: ['a', 'b'], dimensions: 8 };
  const call = async (format) => (await request('POST', '/v1/embeddings', BEARER,
    { ...body, encoding_format: format })).json();
  const floats = await call('float');
  const base64 = await call('base64');
  const bytes = Buffer.from(base64.data[1].embedding, 'base64');
  assert.equal(floats.data.length, 2);
  assert.notDeepEqual(floats.data[0].embedding, floats.data[1].embedding);
  floats.data[1].embedding.forEach((value, i) => assert.equal(bytes.readFloatLE(4 * i), value));
  assert.deepEqual(Object.keys(floats.usage), ['prompt_tokens', 'total_tokens']);
});

test('anthropic message', async () => {
  const prompt = 'hi [[mock: tokens=10,8 cached=4 cache-write=1]]';
  const message = (await DIALECTS.anthropic(prompt)).json();
  assert.match(message.id, /^msg_/);
  assert.equal(message.type, 'message');
  assert.equal(message.stop_reason, 'end_turn');
  assert.deepEqual(message.content, [{ type: 'text', text: 'Model claude-opus-5-5 heard: hi' }]);
  assert.equal(message.usage.input_tokens, 5);
  assert.equal(message.usage.cache_read_input_tokens, 4);
  assert.equal(message.usage.cache_creation_input_tokens, 1);
  assert.equal(message.usage.output_tokens, 8);
});

test('anthropic takes both ways to send a key, and wants a version it knows', async () => {
  const body = { model: 'm', max_tokens: 9, messages: [{ role: 'user', content: 'hi' }] };
  const call = (headers, more) => request('POST', '/v1/messages', headers, { ...body, ...more });
  const now = { ...BEARER, 'anthropic-version': '2026-10-21' };
  assert.equal((await call(now)).status, 200);
  assert.equal((await call(ANTHROPIC, { temperature: 1 })).status, 200);
  for (const refused of [
    await call(now, { temperature: 1 }),
    await call({ 'x-api-key': KEY }),
    await call({ 'x-api-key': KEY, 'anthropic-version': '2024-01-01' }),
    await call(ANTHROPIC, { max_tokens: undefined }),
  ]) {
    assert.equal(refused.status, 400);
    assert.equal(refused.json().type, 'error');
    assert.equal(refused.json().error.type, 'invalid_request_error');
  }
});

test('gemini generateContent', async () => {
  const answer = (await DIALECTS.gemini('hi [[mock: tokens=10,8 cached=4 thoughts=3]]')).json();
  assert.deepEqual(answer.candidates[0].content,
    { parts: [{ text: 'Model gemini-2.5-flash heard: hi' }], role: 'model' });
  assert.equal(answer.modelVersion, 'gemini-2.5-flash');
  const usage = answer.usageMetadata;
  assert.equal(usage.promptTokenCount, 10);
  assert.equal(usage.cachedContentTokenCount, 4);
  assert.equal(usage.candidatesTokenCount, 5);
  assert.equal(usage.thoughtsTokenCount, 3);
  assert.equal(usage.totalTokenCount, 18);
});

test('gemini embeddings, and no key in the query string', async () => {
  const path = '/v1beta/models/gemini-embedding-001';
  const content = { parts: [{ text: 'hi' }] };
  const one = await request('POST', `${path}:embedContent`, GEMINI,
    { content, outputDimensionality: 8 });
  assert.equal(one.json().embedding.values.length, 8);
  const many = await request('POST', `${path}:batchEmbedContents`, GEMINI,
    { requests: [{ content, outputDimensionality: 8 }] });
  assert.deepEqual(many.json().embeddings[0], one.json().embedding);
  const inQuery = await request('POST', `${path}:embedContent?key=${KEY}`, {}, { content });
  assert.equal(inQuery.status, 401);
});

test('exa search, contents and answer', async () => {
  const search = (await request('POST', '/search', EXA,
    { query: 'hi', numResults: 2, contents: { text: true } })).json();
  assert.equal(search.results.length, 2);
  assert.equal(search.results[0].text, 'Model exa heard: hi');
  assert.equal(search.costDollars.total, 0.007);
  const urls = ['https://example.com/a', 'https://example.com/b'];
  const contents = (await request('POST', '/contents', EXA, { urls })).json();
  assert.deepEqual(contents.statuses.map(({ id }) => id), urls);
  assert.equal(contents.costDollars.total, 0.002);
  const answer = (await DIALECTS.exa('hi [[mock: cost=0.25]]')).json();
  assert.equal(answer.answer, 'Model exa heard: hi');
  assert.deepEqual(answer.costDollars, { total: 0.25 });
});

test('models of three vendors, two of them on one path', async () => {
  assert.equal((await request('GET', '/v1/models', BEARER)).json().object, 'list');
  assert.equal((await request('GET', '/v1/models', ANTHROPIC)).json().has_more, false);
  assert.ok((await request('GET', '/v1beta/models', GEMINI)).json().models[0].name);
  for (const [path, headers] of [['/v1/models', { authorization: 'Bearer revoked-key' }],
    ['/v1/models', { ...ANTHROPIC, 'x-api-key': 'revoked-key' }],
    ['/v1beta/models', { 'x-goog-api-key': 'revoked-key' }]]) {
    assert.equal((await request('GET', path, headers)).status, 401);
  }
});

test('any other path echoes itself, with or without a credential', async () => {
  const answer = await request('POST', '/api/v2/run?x=1', {}, { prompt: 'hi' });
  assert.deepEqual(answer.json(), { ok: true, path: '/api/v2/run' });
  const counted = await request('POST', '/run', BEARER, { prompt: '[[mock: tokens=3,4]]' });
  assert.equal(counted.json().usage.total_tokens, 7);
  const revoked = await request('POST', '/run', { authorization: 'Bearer revoked-key' });
  assert.equal(revoked.status, 401);
});

test('refused keys: 401 in the shape of the vendor', async () => {
  const type = {
    openai: ({ error }) => error.type,
    anthropic: ({ error }) => error.type,
    gemini: ({ error }) => error.status,
    exa: ({ tag }) => tag,
  };
  const expected = {
    openai: 'invalid_request_error', anthropic: 'authentication_error',
    gemini: 'UNAUTHENTICATED', exa: 'INVALID_API_KEY',
  };
  const headersWith = (name, key) => ({
    openai: { authorization: `Bearer ${key}` }, anthropic: { ...ANTHROPIC, 'x-api-key': key },
    gemini: { 'x-goog-api-key': key }, exa: { 'x-api-key': key },
  }[name]);
  for (const [name, call] of Object.entries(DIALECTS)) {
    const revoked = 'my-revoked-key-42';
    const headers = headersWith(name, revoked);
    for (const answer of [await call('hi', { 'anthropic-version': '2023-06-01' }),
      await call('hi', headers), await call(revoked, headers)]) {
      assert.equal(answer.status, 401, name);
      assert.equal(type[name](answer.json()), expected[name]);
      assert.ok(!answer.text.includes(revoked));
    }
  }
  assert.equal((await chat('hi', { authorization: KEY })).status, 401, 'no scheme');
  assert.equal((await chat('hi', { authorization: 'Bearer short' })).status, 401, 'too short');
});

test('gemini says that a key is invalid in its own way', async () => {
  const answer = await DIALECTS.gemini('hi', { 'x-goog-api-key': 'an-invalid-key' });
  assert.equal(answer.status, 400);
  assert.equal(answer.json().error.status, 'INVALID_ARGUMENT');
  assert.equal(answer.json().error.details[0].reason, 'API_KEY_INVALID');
});

test('an answer repeats the key only when told to', async () => {
  for (const [name, call] of Object.entries(DIALECTS)) {
    assert.ok(!(await call(`is ${KEY} my key?`)).text.includes(KEY), name);
    assert.ok((await call('[[mock: echo-key]]')).text.includes(KEY), name);
    assert.ok((await call('[[mock: echo-key status=401]]')).text.includes(KEY), name);
    const escaped = await call('[[mock: escape-key]]');
    assert.ok(!escaped.text.includes(KEY) && JSON.stringify(escaped.json()).includes(KEY), name);
  }
  assert.ok(!(await request('POST', `/run/${KEY}`, BEARER, {})).text.includes(KEY));
});

test('status and retry-after', async () => {
  const expected = {
    openai: ({ error }) => assert.equal(error.code, 'rate_limit_exceeded'),
    anthropic: ({ error }) => assert.equal(error.type, 'rate_limit_error'),
    gemini: ({ error }) => assert.equal(error.status, 'RESOURCE_EXHAUSTED'),
    exa: ({ tag }) => assert.equal(tag, 'RATE_LIMIT_EXCEEDED'),
  };
  for (const [name, call] of Object.entries(DIALECTS)) {
    const answer = await call('[[mock: status=429 retry-after=1]]');
    assert.equal(answer.status, 429);
    assert.equal(answer.headers['retry-after'], '1');
    expected[name](answer.json());
  }
  const overloaded = await DIALECTS.anthropic('[[mock: status=529]]');
  assert.equal(overloaded.json().error.type, 'overloaded_error');
  const quota = await chat('[[mock: status=429 code=insufficient_quota]]');
  assert.equal(quota.json().error.code, 'insufficient_quota');
});

test('once: only the first time, for each prompt of its own', async () => {
  const statuses = [];
  for (const prompt of ['a', 'a', 'b', 'a', 'b']) {
    statuses.push((await chat(`${prompt} [[mock: once:status=503]]`)).status);
  }
  assert.deepEqual(statuses, [503, 200, 503, 200, 200]);
});

test('directives may stand in a header or in the query string', async () => {
  assert.equal((await chat('hi', { ...BEARER, 'x-mock': 'status=500' })).status, 500);
  const query = await request('GET', '/v1/models?mock=status%3D503+retry-after%3D2', BEARER);
  assert.equal(query.status, 503);
  assert.equal(query.headers['retry-after'], '2');
  const old = await request('POST', '/v1/chat/completions', BEARER, {
    model: 'm',
    messages: [{ role: 'user', content: '[[mock: status=500]]' }, { role: 'user', content: 'hi' }],
  });
  assert.equal(old.status, 200, 'only the last message counts');
});

test('a wrong directive is an error, not a plain answer', async () => {
  for (const item of ['statsu=429', 'status=9', 'hang=1', 'tokens=1', 'usage=odd', 'delay']) {
    const answer = await chat(`[[mock: ${item}]]`);
    assert.equal(answer.status, 400);
    assert.match(answer.json().error.message, /mock item/);
  }
});

test('delay', async () => {
  const start = Date.now();
  const calls = [1, 2, 3].map((n) => chat(`${n} [[mock: delay=200]]`));
  await sleep(100);
  assert.equal((await request('GET', '/__stats')).json().in_flight, 3);
  await Promise.all(calls);
  assert.ok(Date.now() - start >= 195);
  const stats = (await request('GET', '/__stats')).json();
  assert.equal(stats.in_flight, 0);
  assert.equal(stats.max_in_flight, 3);
});

test('gate answers when it is opened, and from then on', async () => {
  let answered = 0;
  const waiting = ['a', 'b'].map((prompt) => chat(`${prompt} [[mock: gate=one]]`).then((answer) => {
    answered++;
    return answer.status;
  }));
  for (let n = 0; n < 400 && (await request('GET', '/__log')).json().length < 2; n++) await sleep(25);
  assert.equal(answered, 0);
  assert.deepEqual((await request('POST', '/__open?gate=other')).json(), { answered: 0 });
  assert.deepEqual((await request('POST', '/__open?gate=one')).json(), { answered: 2 });
  assert.deepEqual(await Promise.all(waiting), [200, 200]);
  assert.equal((await chat('c [[mock: gate=one]]')).status, 200);
  assert.equal((await request('GET', '/__open?gate=one')).status, 404);
});

test('hang never answers, and ends with the caller', async () => {
  await assert.rejects(request('POST', '/run', { 'x-mock': 'hang' }, {}, AbortSignal.timeout(200)));
  await sleep(50);
  assert.equal((await request('GET', '/__stats')).json().in_flight, 0);
});

test('cut closes in the middle of the body', async () => {
  await assert.rejects(chat('[[mock: cut]]'), { code: 'ECONNRESET' });
});

test('garbage, nul, badutf8, bignum and deep', async () => {
  const garbage = await chat('[[mock: garbage]]');
  assert.equal(garbage.status, 200);
  assert.throws(garbage.json);

  const nul = await chat('[[mock: nul]]');
  assert.ok(nul.text.includes('\\u0000'));
  assert.ok(nul.json().choices[0].message.content.includes('\0'));

  const bad = await chat('[[mock: badutf8]]');
  assert.throws(() => new TextDecoder('utf-8', { fatal: true }).decode(bad.bytes));
  assert.equal(Number(bad.headers['content-length']), bad.bytes.length);

  const big = await chat('[[mock: bignum]]');
  assert.match(big.text, /"bignum":1e999999\}$/);
  assert.equal(big.json().bignum, Infinity);

  const deep = await chat('[[mock: deep]]');
  assert.match(deep.text, /^\[{200000}$/);
});

test('huge is a whole answer of exactly that many bytes, chunked', async () => {
  const huge = await chat('[[mock: huge=3M tokens=1,2]]');
  assert.equal(huge.bytes.length, 3 * 1024 * 1024);
  assert.equal(huge.headers['transfer-encoding'], 'chunked');
  assert.equal(huge.json().usage.total_tokens, 3);
});

test('gzip compresses an answer, and huge is then its length when decoded', async () => {
  const small = await chat('[[mock: gzip tokens=1,2]]');
  assert.equal(small.headers['content-encoding'], 'gzip');
  assert.equal(JSON.parse(gunzipSync(small.bytes)).usage.total_tokens, 3);

  const bomb = await chat('[[mock: gzip huge=3M tokens=1,2]]');
  assert.ok(bomb.bytes.length < 32 * 1024);
  const decoded = gunzipSync(bomb.bytes);
  assert.equal(decoded.length, 3 * 1024 * 1024);
  assert.equal(JSON.parse(decoded).usage.total_tokens, 3);
});

test('redirect', async () => {
  const answer = await chat('[[mock: redirect=http://127.0.0.1:1/elsewhere]]');
  assert.equal(answer.status, 302);
  assert.equal(answer.headers.location, 'http://127.0.0.1:1/elsewhere');
});

test('model, and usage that cannot be trusted', async () => {
  assert.equal((await chat('[[mock: model=gpt-x]]')).json().model, 'gpt-x');
  const field = {
    openai: 'usage', anthropic: 'usage', gemini: 'usageMetadata', exa: 'costDollars',
  };
  for (const [name, call] of Object.entries(DIALECTS)) {
    const usage = async (kind) => (await call(`[[mock: usage=${kind}]]`)).json()[field[name]];
    assert.equal(await usage('missing'), undefined);
    assert.ok(JSON.stringify(await usage('hostile')).includes('-7'), name);
    assert.match(JSON.stringify(await usage('giant')), /:1000000000000000000[,}]/);
    assert.match(JSON.stringify(await usage('strings')), /:"12 or more"/);
    assert.match(JSON.stringify(await usage('fraction')), /:3\.5/);
  }
});

test('malformed bodies and methods', async () => {
  for (const [path, headers] of [['/v1/chat/completions', BEARER], ['/v1/messages', ANTHROPIC],
    [GENERATE, GEMINI], ['/search', EXA]]) {
    for (const body of ['{"cut', '[]', 'null', '{}', '']) {
      assert.equal((await request('POST', path, headers, body)).status, 400, `${path} ${body}`);
    }
    assert.equal((await request('GET', path, headers)).status, 405);
  }
  assert.equal((await request('POST', '/run', {}, 'no JSON')).status, 200);
  assert.equal((await chat('hi', { ...BEARER, 'content-type': 'text/plain' })).status, 400);
  const streamed = { model: 'm', stream: true, messages: [{ role: 'user', content: 'hi' }] };
  assert.equal((await request('POST', '/v1/chat/completions', BEARER, streamed)).status, 400);
});

test('statistics and log', async () => {
  await chat('first');
  await DIALECTS.exa('second');
  const stats = (await request('GET', '/__stats')).json();
  assert.deepEqual(stats.by_path, { '/v1/chat/completions': 1, '/answer': 1 });
  assert.equal(stats.requests, 2);
  assert.equal(stats.connections, 1, 'kept alive');

  const [last] = (await request('GET', '/__log?n=1')).json();
  assert.equal(last.method, 'POST');
  assert.equal(last.path, '/answer');
  assert.deepEqual(JSON.parse(last.body), { query: 'second' });
  assert.equal(last.headers['x-api-key'], KEY);
  assert.equal(last.credential_sha256, createHash('sha256').update(KEY).digest('hex'));
  assert.ok(Math.abs(Date.parse(last.time) - Date.now()) < 60000);
  assert.equal((await request('GET', '/__log')).json().length, 2);
});

test('the log keeps the last 2,000 requests in order', async () => {
  for (let n = 0; n < 2003; n++) await request('POST', `/run/${n}`, {}, {});
  const log = (await request('GET', '/__log?n=5000')).json();
  assert.equal(log.length, 2000);
  assert.equal(log[0].path, '/run/3');
  assert.equal(log[1999].path, '/run/2002');
});

test('as a program: port file, log file, SIGTERM', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'stand-in-'));
  const portFile = join(folder, 'port');
  const logFile = join(folder, 'log.jsonl');
  const child = spawn(process.execPath, [fileURLToPath(new URL('provider.mjs', import.meta.url)),
    '--port', '0', '--port-file', portFile, '--log', logFile]);
  let output = '';
  child.stdout.on('data', (chunk) => { output += chunk; });
  child.stderr.on('data', (chunk) => { output += chunk; });
  const exit = new Promise((resolve) => {
    child.on('exit', (code, signal) => resolve({ code, signal }));
  });
  try {
    for (let n = 0; n < 200 && !existsSync(portFile); n++) await sleep(25);
    const url = `http://127.0.0.1:${readFileSync(portFile, 'utf8').trim()}`;
    await fetch(`${url}/run`, { method: 'POST', headers: BEARER, body: '{"a":1}' });
    const line = JSON.parse(readFileSync(logFile, 'utf8'));
    assert.equal(line.body, '{"a":1}');
    assert.equal(line.headers.authorization, `Bearer ${KEY}`);
    assert.deepEqual(readdirSync(folder).sort(), ['log.jsonl', 'port']);
    fetch(`${url}/run`, { method: 'POST', headers: { 'x-mock': 'hang' } }).catch(() => {});
    await sleep(50);
  } finally {
    child.kill('SIGTERM');
  }
  assert.deepEqual(await exit, { code: 0, signal: null });
  assert.equal(output, '');
  rmSync(folder, { recursive: true });
});
