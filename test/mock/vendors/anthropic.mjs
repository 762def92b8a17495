/*
 * anthropic.mjs
 *    The Anthropic dialect: messages, models.
 *
 * The vendor takes the key in x-api-key or as a bearer token, and wants anthropic-version in any
 * case. Version 2026-10-21 refuses the sampling parameters that 2023-06-01 still takes.
 */

import { conversation, isObjectList } from './content.mjs';

const VERSIONS = ['2023-06-01', '2026-10-21'];
const SAMPLING = ['temperature', 'top_p', 'top_k'];
const MODELS = ['claude-opus-5-5', 'claude-sonnet-5', 'claude-haiku-4-5'];

const TYPES = {
  401: 'authentication_error', 402: 'billing_error', 403: 'permission_error',
  404: 'not_found_error', 409: 'conflict_error', 413: 'request_too_large',
  429: 'rate_limit_error', 504: 'timeout_error', 529: 'overloaded_error',
};

function messages({ id, model, text, tokens }) {
  const content = [{ type: 'text', text }];
  // A model that thinks puts that first, so the text is not always content[0].
  if (tokens.thoughts > 0) {
    content.unshift({ type: 'thinking', thinking: '', signature: 'c3RhbmQtaW4=' });
  }
  return {
    id: `msg_${id}`,
    type: 'message',
    role: 'assistant',
    model,
    content,
    stop_reason: 'end_turn',
    stop_sequence: null,
    usage: {
      // Here, and only here, the cached part is not counted among the input tokens.
      input_tokens: Math.max(0, tokens.input - tokens.cached - tokens.cacheWrite),
      cache_creation_input_tokens: tokens.cacheWrite,
      cache_read_input_tokens: tokens.cached,
      cache_creation: {
        ephemeral_5m_input_tokens: tokens.cacheWrite, ephemeral_1h_input_tokens: 0,
      },
      output_tokens: tokens.output,
      output_tokens_details: tokens.thoughts > 0 ? { thinking_tokens: tokens.thoughts } : null,
      server_tool_use: null,
      service_tier: 'standard',
    },
  };
}

function models() {
  return {
    data: MODELS.map((id) => ({
      type: 'model', id, display_name: id, created_at: '2026-01-01T00:00:00Z',
    })),
    has_more: false,
    first_id: MODELS[0],
    last_id: MODELS[MODELS.length - 1],
  };
}

export const anthropic = {
  name: 'anthropic',
  usageField: 'usage',
  requestIdHeader: 'request-id',

  route(path, headers) {
    if (path === '/v1/messages') return { operation: 'messages', method: 'POST' };
    // OpenAI has the same path; the headers tell the two apart.
    if (path === '/v1/models' && (headers['x-api-key'] ?? headers['anthropic-version'])) {
      return { operation: 'models', method: 'GET' };
    }
    return undefined;
  },

  credential(headers) {
    return headers['x-api-key'] ?? /^Bearer (\S+)$/.exec(headers.authorization ?? '')?.[1];
  },

  refuse(kind) {
    return kind === 'missing'
      ? { status: 401, message: 'x-api-key header is required' }
      : { status: 401, message: 'invalid x-api-key' };
  },

  check(operation, body, headers) {
    const version = headers['anthropic-version'];
    if (version === undefined) return 'anthropic-version: header is required';
    if (!VERSIONS.includes(version)) return 'anthropic-version: is not a valid version';
    if (operation === 'models') return undefined;

    if (typeof body.model !== 'string' || body.model === '') return 'model: Field required';
    if (!Number.isInteger(body.max_tokens)) return 'max_tokens: Field required';
    if (!isObjectList(body.messages)) return 'messages: Field required';
    if (version !== '2023-06-01') {
      for (const name of SAMPLING) {
        if (body[name] !== undefined) return `${name}: Extra inputs are not permitted`;
      }
    }
    return undefined;
  },

  prompt(operation, body) {
    return operation === 'messages' ? conversation(body.system, body.messages)
      : { texts: [], last: '' };
  },

  answer(operation, call) {
    return operation === 'messages' ? messages(call) : models();
  },

  error(status, message, { code, requestId }) {
    const type = code ?? TYPES[status] ?? (status < 500 ? 'invalid_request_error' : 'api_error');
    return { type: 'error', error: { type, message }, request_id: requestId };
  },
};
