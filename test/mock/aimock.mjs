/*
 * aimock.mjs
 *    The providers as somebody else imagines them: a second opinion on our dialects.
 *
 *    node aimock.mjs --port-file FILE [--port 0] [--api-key KEY]
 *
 * Serves the OpenAI, Anthropic and Gemini dialects of @copilotkit/aimock with one fixture: any
 * prompt with the word `hello` gets ANSWER and the tokens below, any other prompt a 404. With
 * --api-key every request must carry that key, in any of the vendors' headers.
 */

import { createRequire } from 'node:module';
import { parseArgs } from 'node:util';

import { writePortFile } from './provider.mjs';

// The package as an ES module imports zlib.crc32 by name, which Node 18 does not have; as
// CommonJS it looks for it only in the dialects that need it.
const { LLMock } = createRequire(import.meta.url)('@copilotkit/aimock');

const ANSWER = 'Hello from an independent stand-in.';
const TOKENS = { input: 21, output: 6 };

/* Start it on 127.0.0.1. Returns its URL. */
async function startAimock(port, apiKey) {
  const mock = new LLMock({
    port,
    host: '127.0.0.1',
    ...(apiKey === undefined ? {} : { auth: { apiKeys: [apiKey] } }),
  });
  mock.onMessage('hello', {
    content: ANSWER,
    // Without these aimock guesses for OpenAI and reports zero for the others.
    usage: {
      prompt_tokens: TOKENS.input,
      completion_tokens: TOKENS.output,
      total_tokens: TOKENS.input + TOKENS.output,
    },
  });
  await mock.start();
  return mock.url;
}

async function main() {
  const { values } = parseArgs({
    options: {
      port: { type: 'string', default: '0' },
      'port-file': { type: 'string' },
      'api-key': { type: 'string' },
    },
  });
  const stop = () => process.exit(0);
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
  const { port } = new URL(await startAimock(Number(values.port), values['api-key']));
  if (values['port-file'] !== undefined) writePortFile(values['port-file'], port);
  else process.stderr.write(`listening on 127.0.0.1:${port}\n`);
}

await main();
