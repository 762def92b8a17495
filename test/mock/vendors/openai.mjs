/*
 * openai.mjs
 *    The OpenAI dialect: chat completions, responses, embeddings, models.
 */

import { conversation, isObjectList, vector } from './content.mjs';

const ROUTES = {
  '/v1/chat/completions': 'chat',
  '/v1/responses': 'responses',
  '/v1/embeddings': 'embeddings',
  '/v1/models': 'models',
};

const MODELS = ['gpt-6-sol', 'gpt-5.4-mini', 'gpt-5-mini', 'gpt-4o-mini', 'text-embedding-3-small'];

const TYPES = {
  400: 'invalid_request_error', 401: 'invalid_request_error', 403: 'invalid_request_error',
  404: 'invalid_request_error', 405: 'invalid_request_error', 413: 'invalid_request_error',
  429: 'requests',
};
const CODES = { 401: 'invalid_api_key', 404: 'model_not_found', 429: 'rate_limit_exceeded' };

function chat({ id, now, model, text, tokens }) {
  return {
    id: `chatcmpl-${id}`,
    object: 'chat.completion',
    created: now,
    model,
    choices: [{
      index: 0,
      message: { role: 'assistant', content: text, refusal: null, annotations: [] },
      logprobs: null,
      finish_reason: 'stop',
    }],
    usage: {
      prompt_tokens: tokens.input,
      completion_tokens: tokens.output,
      total_tokens: tokens.input + tokens.output,
      prompt_tokens_details: {
        cached_tokens: tokens.cached, audio_tokens: 0, cache_write_tokens: tokens.cacheWrite,
      },
      completion_tokens_details: {
        reasoning_tokens: tokens.thoughts,
        audio_tokens: 0,
        accepted_prediction_tokens: 0,
        rejected_prediction_tokens: 0,
      },
    },
    service_tier: 'default',
    system_fingerprint: null,
  };
}

function responses({ id, now, body, model, text, tokens }) {
  const output = [{
    type: 'message',
    id: `msg_${id}`,
    status: 'completed',
    role: 'assistant',
    content: [{ type: 'output_text', text, annotations: [], logprobs: [] }],
  }];
  // A model that reasons puts that first, so the message is not always output[0].
  if (tokens.thoughts > 0) output.unshift({ type: 'reasoning', id: `rs_${id}`, summary: [] });

  return {
    id: `resp_${id}`,
    object: 'response',
    created_at: now,
    status: 'completed',
    background: false,
    completed_at: now,
    error: null,
    incomplete_details: null,
    instructions: body.instructions ?? null,
    max_output_tokens: body.max_output_tokens ?? null,
    max_tool_calls: null,
    model,
    output,
    parallel_tool_calls: true,
    previous_response_id: body.previous_response_id ?? null,
    prompt_cache_key: null,
    reasoning: { effort: null, summary: null },
    safety_identifier: null,
    service_tier: 'default',
    store: body.store ?? true,
    temperature: body.temperature ?? 1,
    text: { format: { type: 'text' }, verbosity: 'medium' },
    tool_choice: 'auto',
    tools: [],
    top_logprobs: 0,
    top_p: body.top_p ?? 1,
    truncation: 'disabled',
    usage: {
      input_tokens: tokens.input,
      input_tokens_details: {
        cached_tokens: tokens.cached, cache_write_tokens: tokens.cacheWrite,
      },
      output_tokens: tokens.output,
      output_tokens_details: { reasoning_tokens: tokens.thoughts },
      total_tokens: tokens.input + tokens.output,
    },
    user: null,
    metadata: body.metadata ?? {},
  };
}

function embeddings({ body, model, tokens }) {
  const inputs = Array.isArray(body.input) ? body.input : [body.input];
  const dimensions = body.dimensions ?? (model.includes('large') ? 3072 : 1536);
  return {
    object: 'list',
    data: inputs.map((input, index) => {
      const values = vector(String(input), dimensions);
      return {
        object: 'embedding',
        index,
        embedding: body.encoding_format === 'base64'
          ? Buffer.from(values.buffer).toString('base64') : Array.from(values),
      };
    }),
    model,
    usage: { prompt_tokens: tokens.input, total_tokens: tokens.input },
  };
}

function models({ now }) {
  return {
    object: 'list',
    data: MODELS.map((id) => ({ id, object: 'model', created: now, owned_by: 'system' })),
  };
}

const ANSWERS = { chat, responses, embeddings, models };

export const openai = {
  name: 'openai',
  usageField: 'usage',
  requestIdHeader: 'x-request-id',

  route(path) {
    const operation = ROUTES[path];
    return operation && { operation, method: operation === 'models' ? 'GET' : 'POST' };
  },

  credential(headers) {
    return /^Bearer (\S+)$/.exec(headers.authorization ?? '')?.[1];
  },

  refuse(kind) {
    return kind === 'missing'
      ? { status: 401, message: "You didn't provide an API key in an Authorization header." }
      : { status: 401, message: 'Incorrect API key provided.' };
  },

  check(operation, body) {
    if (operation === 'models') return undefined;
    if (typeof body.model !== 'string' || body.model === '') {
      return 'you must provide a model parameter';
    }
    if (operation === 'chat' && !isObjectList(body.messages)) {
      return "Missing required parameter: 'messages'.";
    }
    if (operation !== 'chat' && (body.input === undefined || body.input.length === 0)) {
      return "Missing required parameter: 'input'.";
    }
    if (operation === 'responses' && typeof body.input !== 'string' && !isObjectList(body.input)) {
      return "Invalid type for 'input'.";
    }
    return undefined;
  },

  prompt(operation, body) {
    if (operation === 'chat') return conversation('', body.messages);
    if (operation === 'responses') {
      return conversation(body.instructions ?? '',
        typeof body.input === 'string' ? [{ role: 'user', content: body.input }] : body.input);
    }
    if (operation === 'embeddings') {
      const texts = Array.isArray(body.input) ? body.input.map(String) : [String(body.input)];
      return { texts, last: texts[texts.length - 1] ?? '' };
    }
    return { texts: [], last: '' };
  },

  answer(operation, call) {
    return ANSWERS[operation](call);
  },

  error(status, message, { code }) {
    return {
      error: {
        message,
        type: code === 'insufficient_quota' ? code : TYPES[status] ?? 'server_error',
        param: null,
        code: code ?? CODES[status] ?? null,
      },
    };
  },
};
