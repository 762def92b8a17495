/*
 * generic.mjs
 *    Any other JSON service: every path answers, with or without a credential.
 */

import { conversation, isObjectList, plainText } from './content.mjs';

export const generic = {
  name: 'generic',
  usageField: 'usage',
  requestIdHeader: 'x-request-id',
  needsNoCredential: true,

  route(path, headers, method) {
    return { operation: 'echo', method };
  },

  credential(headers) {
    return /^Bearer (\S+)$/.exec(headers.authorization ?? '')?.[1]
      ?? headers['x-api-key'] ?? headers['x-goog-api-key'] ?? headers['api-key'];
  },

  refuse() {
    return { status: 401, message: 'invalid credential' };
  },

  check() {
    return undefined;
  },

  prompt(operation, body) {
    if (isObjectList(body.messages)) return conversation('', body.messages);
    const text = plainText(body.prompt ?? body.query ?? body.input ?? body.text ?? '');
    return { texts: [text], last: text };
  },

  /* Text and usage only when a directive asks for something that has to stand in them. */
  answer(operation, { path, tokens, text, directives, suffix }) {
    const answer = { ok: true, path };
    if (suffix !== '') answer.text = text;
    if (directives.tokens !== undefined || directives.usage !== undefined) {
      answer.usage = {
        input_tokens: tokens.input,
        cached_tokens: tokens.cached,
        output_tokens: tokens.output,
        total_tokens: tokens.input + tokens.output,
      };
    }
    return answer;
  },

  error(status, message, { code, requestId }) {
    return { error: { status, message, code: code ?? null, request_id: requestId } };
  },
};
