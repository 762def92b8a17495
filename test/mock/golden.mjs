/*
 * golden.mjs
 *    Record what the vendors' own SDKs send, for the dialects of the extension to be held against.
 *
 *    node golden.mjs            write ../golden/requests.json
 *    node golden.mjs --check    compare with it; exit 1 and show the difference
 *
 * Each SDK calls the stand-in, so a run also proves that it can read the stand-in's answers. The
 * credential never gets into the file: a header that carries it shows `{key}` in its place.
 */

import { strict as assert } from 'node:assert';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';

import Anthropic from '@anthropic-ai/sdk';
import Anthropic2023 from 'anthropic-sdk-2023-06-01';
import Exa from 'exa-js';
import { GoogleGenAI } from '@google/genai';
import OpenAI from 'openai';

import { startProvider } from './provider.mjs';

const FILE = new URL('../golden/requests.json', import.meta.url);
const KEY = 'golden-key-0123456789abcdef';

/* Headers that depend on the machine, the runtime or the connection, not on the API. */
const VOLATILE = new Set(['host', 'connection', 'content-length', 'user-agent', 'accept-encoding',
  'accept-language', 'sec-fetch-mode', 'x-goog-api-client']);
const VOLATILE_PREFIX = 'x-stainless-';

/* Tokens for each kind a vendor reports, so that no two of them can be mixed up unseen. */
const PROMPT = 'Say hello. [[mock: tokens=120,30 cached=20 thoughts=10]]';
const OPENAI_MODEL = 'gpt-5.4-mini';
const EMBEDDING_MODEL = 'text-embedding-3-small';
const ANTHROPIC_MODEL = 'claude-opus-5-5';
const GEMINI_MODEL = 'gemini-2.5-flash';
const GEMINI_EMBEDDING_MODEL = 'gemini-embedding-001';

function installedVersion(name) {
  const file = new URL(`node_modules/${name}/package.json`, import.meta.url);
  return JSON.parse(readFileSync(file, 'utf8')).version;
}

function heard(model) {
  return `Model ${model} heard: Say hello.`;
}

/* An SDK, how to make its client, and the calls to record, each with a check of its answer. */
function openaiCalls(url) {
  const client = new OpenAI({ apiKey: KEY, baseURL: `${url}/v1`, maxRetries: 0 });
  return {
    'openai chat completion': async () => {
      const { choices, usage } = await client.chat.completions.create({
        model: OPENAI_MODEL,
        messages: [
          { role: 'system', content: 'Be short.' },
          { role: 'user', content: PROMPT },
        ],
        max_completion_tokens: 64,
      });
      assert.equal(choices[0].message.content, heard(OPENAI_MODEL));
      assert.equal(choices[0].finish_reason, 'stop');
      assert.equal(usage.prompt_tokens, 120);
      assert.equal(usage.completion_tokens, 30);
      assert.equal(usage.total_tokens, 150);
      assert.equal(usage.prompt_tokens_details.cached_tokens, 20);
      assert.equal(usage.completion_tokens_details.reasoning_tokens, 10);
    },
    'openai response': async () => {
      const { output_text: text, usage } = await client.responses.create({
        model: OPENAI_MODEL, instructions: 'Be short.', input: PROMPT, max_output_tokens: 64,
      });
      assert.equal(text, heard(OPENAI_MODEL));
      assert.equal(usage.input_tokens, 120);
      assert.equal(usage.output_tokens, 30);
      assert.equal(usage.input_tokens_details.cached_tokens, 20);
      assert.equal(usage.output_tokens_details.reasoning_tokens, 10);
    },
    'openai embedding': async () => {
      const { data, usage } = await client.embeddings.create({
        model: EMBEDDING_MODEL, input: 'Say hello. [[mock: tokens=4,0]]',
      });
      assert.equal(data[0].embedding.length, 1536);
      assert.equal(usage.prompt_tokens, 4);
    },
    'openai models': async () => {
      const { data } = await client.models.list();
      assert.equal(data[0].object, 'model');
    },
  };
}

function anthropicCalls(url, Client, version) {
  const client = new Client({ apiKey: KEY, baseURL: url, maxRetries: 0 });
  return {
    [`anthropic message, ${version}`]: async () => {
      const { content, usage } = await client.messages.create({
        model: ANTHROPIC_MODEL,
        max_tokens: 64,
        system: 'Be short.',
        messages: [{ role: 'user', content: PROMPT }],
      });
      assert.deepEqual(content.map(({ type }) => type), ['thinking', 'text']);
      assert.equal(content[1].text, heard(ANTHROPIC_MODEL));
      assert.equal(usage.input_tokens, 100);
      assert.equal(usage.cache_read_input_tokens, 20);
      assert.equal(usage.output_tokens, 30);
    },
    [`anthropic models, ${version}`]: async () => {
      const { data } = await client.models.list();
      assert.equal(data[0].type, 'model');
    },
  };
}

function geminiCalls(url) {
  const client = new GoogleGenAI({ apiKey: KEY, httpOptions: { baseUrl: url } });
  return {
    'gemini generateContent': async () => {
      const answer = await client.models.generateContent({
        model: GEMINI_MODEL,
        contents: PROMPT,
        config: { systemInstruction: 'Be short.', maxOutputTokens: 64 },
      });
      assert.equal(answer.text, heard(GEMINI_MODEL));
      assert.equal(answer.modelVersion, GEMINI_MODEL);
      assert.equal(answer.usageMetadata.promptTokenCount, 120);
      assert.equal(answer.usageMetadata.cachedContentTokenCount, 20);
      assert.equal(answer.usageMetadata.candidatesTokenCount, 20);
      assert.equal(answer.usageMetadata.thoughtsTokenCount, 10);
      assert.equal(answer.usageMetadata.totalTokenCount, 150);
    },
    'gemini embedContent': async () => {
      const { embeddings } = await client.models.embedContent({
        model: GEMINI_EMBEDDING_MODEL, contents: 'Say hello.',
        config: { outputDimensionality: 768 },
      });
      assert.equal(embeddings[0].values.length, 768);
    },
    'gemini models': async () => {
      const { page } = await client.models.list();
      assert.match(page[0].name, /^models\//);
    },
  };
}

function exaCalls(url) {
  const client = new Exa(KEY, url);
  return {
    'exa search': async () => {
      const { results, costDollars } = await client.search('Say hello.', { numResults: 3 });
      assert.equal(results.length, 3);
      assert.equal(results[0].text, heard('exa'));
      assert.equal(costDollars.total, 0.007);
    },
    'exa contents': async () => {
      const { results, costDollars } = await client.getContents(['https://example.com/1'],
        { text: true });
      assert.equal(results[0].url, 'https://example.com/1');
      assert.equal(costDollars.total, 0.001);
    },
    'exa answer': async () => {
      const { answer, costDollars } = await client.answer('Say hello.');
      assert.equal(answer, heard('exa'));
      assert.equal(costDollars.total, 0.005);
    },
  };
}

/* Each SDK takes the stand-in's refusal of a key for what its vendor says in that case. */
async function checkRefusals(url) {
  const apiKey = 'revoked-key-0123456789';
  const options = { apiKey, baseURL: url, maxRetries: 0 };
  const calls = [
    () => new OpenAI({ ...options, baseURL: `${url}/v1` }).models.list(),
    () => new Anthropic(options).models.list(),
    () => new Anthropic2023(options).models.list(),
    () => new GoogleGenAI({ apiKey, httpOptions: { baseUrl: url } }).models.list(),
    () => new Exa(apiKey, url).search('Say hello.'),
  ];
  for (const call of calls) {
    await assert.rejects(call, (error) => {
      assert.equal(error.status ?? error.statusCode, 401);
      assert.ok(!error.message.includes(apiKey), 'the refusal does not repeat the key');
      return true;
    });
  }
}

/* The request as it is recorded: headers sorted, nothing volatile, no credential. */
function recorded({ method, path, headers, body }) {
  const kept = {};
  for (const name of Object.keys(headers).sort()) {
    if (VOLATILE.has(name) || name.startsWith(VOLATILE_PREFIX)) continue;
    kept[name] = headers[name].split(KEY).join('{key}');
  }
  return { method, path, headers: kept, body: body === '' ? null : JSON.parse(body) };
}

async function record() {
  const provider = await startProvider();
  const { url } = provider;
  const sdks = [
    ['openai', 'openai', openaiCalls(url)],
    ['@anthropic-ai/sdk', '@anthropic-ai/sdk', anthropicCalls(url, Anthropic, '2026-10-21')],
    ['@anthropic-ai/sdk', 'anthropic-sdk-2023-06-01',
      anthropicCalls(url, Anthropic2023, '2023-06-01')],
    ['@google/genai', '@google/genai', geminiCalls(url)],
    ['exa-js', 'exa-js', exaCalls(url)],
  ];

  const requests = [];
  try {
    for (const [sdk, folder, calls] of sdks) {
      const version = installedVersion(folder);
      for (const [name, call] of Object.entries(calls)) {
        const before = requests.length;
        try {
          await call();
        } catch (error) {
          throw new Error(`${name} (${sdk} ${version}): ${error.message}`, { cause: error });
        }
        const log = await (await fetch(`${url}/__log?n=2000`)).json();
        assert.equal(log.length, before + 1, `${name}: one call is one request`);
        requests.push({ name, sdk, version, ...recorded(log[before]) });
      }
    }
    await checkRefusals(url);
  } finally {
    await provider.close();
  }
  const text = `${JSON.stringify({ requests }, null, 2)}\n`;
  assert.ok(!text.includes(KEY), 'the credential is not in the record');
  return text;
}

/* Say per request what differs, field by field. Returns whether anything does. */
function showDifference(expected, found) {
  const byName = (text) => new Map(JSON.parse(text).requests.map((r) => [r.name, r]));
  const [old, now] = [byName(expected), byName(found)];
  let differs = false;
  const say = (line) => {
    differs = true;
    process.stderr.write(`${line}\n`);
  };
  const compare = (path, a, b) => {
    const branch = (value) => value !== null && typeof value === 'object';
    if (branch(a) && branch(b)) {
      for (const key of new Set([...Object.keys(a), ...Object.keys(b)])) {
        compare(`${path}.${key}`, a[key], b[key]);
      }
    } else if (a !== b) {
      const show = (value) => JSON.stringify(value) ?? '(absent)';
      say(`${path}\n  - ${show(a)}\n  + ${show(b)}`);
    }
  };
  for (const name of new Set([...old.keys(), ...now.keys()])) {
    if (!old.has(name)) say(`${name}\n  + new request`);
    else if (!now.has(name)) say(`${name}\n  - request no longer recorded`);
    else compare(name, old.get(name), now.get(name));
  }
  if (!differs && expected !== found) say('the requests stand in another order or layout');
  return differs;
}

const found = await record();
if (process.argv.includes('--check')) {
  if (showDifference(readFileSync(FILE, 'utf8'), found)) process.exit(1);
} else {
  mkdirSync(new URL('.', FILE), { recursive: true });
  writeFileSync(FILE, found);
}
process.stderr.write(`${JSON.parse(found).requests.length} requests\n`);
