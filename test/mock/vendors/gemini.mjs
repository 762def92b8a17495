/*
 * gemini.mjs
 *    The Gemini dialect: generateContent, embedContent, batchEmbedContents, models.
 */

import { conversation, isObjectList, plainText, vector } from './content.mjs';

const CALL = /^\/v1beta\/models\/([^/:]+):(generateContent|embedContent|batchEmbedContents)$/;
const MODELS = ['gemini-3.6-flash', 'gemini-2.5-flash', 'gemini-embedding-001'];

const STATUS = {
  400: 'INVALID_ARGUMENT', 401: 'UNAUTHENTICATED', 403: 'PERMISSION_DENIED', 404: 'NOT_FOUND',
  405: 'UNIMPLEMENTED', 429: 'RESOURCE_EXHAUSTED', 500: 'INTERNAL', 503: 'UNAVAILABLE',
  504: 'DEADLINE_EXCEEDED',
};

function details(modality, tokenCount) {
  return [{ modality, tokenCount }];
}

function generate({ id, model, text, tokens }) {
  const usage = {
    promptTokenCount: tokens.input,
    // Thinking is billed as output but is not part of the candidates.
    candidatesTokenCount: Math.max(0, tokens.output - tokens.thoughts),
    totalTokenCount: tokens.input + tokens.output,
    promptTokensDetails: details('TEXT', tokens.input),
  };
  // The vendor leaves out what is zero.
  if (tokens.cached > 0) {
    usage.cachedContentTokenCount = tokens.cached;
    usage.cacheTokensDetails = details('TEXT', tokens.cached);
  }
  if (tokens.thoughts > 0) usage.thoughtsTokenCount = tokens.thoughts;
  return {
    candidates: [{
      content: { parts: [{ text }], role: 'model' },
      finishReason: 'STOP',
      index: 0,
    }],
    usageMetadata: usage,
    modelVersion: model,
    responseId: id,
  };
}

function embedding(content, request) {
  const dimensions = request.outputDimensionality
    ?? request.embedContentConfig?.outputDimensionality ?? 3072;
  return { values: Array.from(vector(plainText(content?.parts), dimensions)) };
}

function models() {
  return {
    models: MODELS.map((name) => ({
      name: `models/${name}`,
      version: '001',
      displayName: name,
      description: 'A model of the stand-in.',
      inputTokenLimit: 1048576,
      outputTokenLimit: 65536,
      supportedGenerationMethods: [name.includes('embedding') ? 'embedContent' : 'generateContent'],
    })),
  };
}

export const gemini = {
  name: 'gemini',
  usageField: 'usageMetadata',
  requestIdHeader: undefined,

  route(path) {
    if (path === '/v1beta/models') return { operation: 'models', method: 'GET' };
    if (!path.startsWith('/v1beta/models/')) return undefined;
    const [, model, operation] = CALL.exec(path) ?? [];
    return operation && { operation, method: 'POST', model };
  },

  // A key in the query string works with the vendor too; here it does not, since it would end up
  // in the logs of every proxy on the way.
  credential(headers) {
    return headers['x-goog-api-key'];
  },

  refuse(kind) {
    if (kind === 'invalid') {
      return {
        status: 400,
        message: 'API key not valid. Please pass a valid API key.',
        details: [{
          '@type': 'type.googleapis.com/google.rpc.ErrorInfo',
          reason: 'API_KEY_INVALID',
          domain: 'googleapis.com',
          metadata: { service: 'generativelanguage.googleapis.com' },
        }],
      };
    }
    return {
      status: 401,
      message: 'Request had invalid authentication credentials.',
      details: [{
        '@type': 'type.googleapis.com/google.rpc.ErrorInfo',
        reason: kind === 'missing' ? 'CREDENTIALS_MISSING' : 'ACCESS_TOKEN_TYPE_UNSUPPORTED',
        domain: 'googleapis.com',
      }],
    };
  },

  check(operation, body) {
    if (operation === 'generateContent' && !isObjectList(body.contents)) {
      return '* GenerateContentRequest.contents: contents is not specified';
    }
    if (operation === 'embedContent' && !Array.isArray(body.content?.parts)) {
      return '* EmbedContentRequest.content: contents is not specified';
    }
    if (operation === 'batchEmbedContents' && !isObjectList(body.requests)) {
      return '* BatchEmbedContentsRequest.requests: is not specified';
    }
    return undefined;
  },

  prompt(operation, body) {
    if (operation === 'generateContent') {
      return conversation(body.systemInstruction?.parts ?? '', body.contents, ({ parts }) => parts);
    }
    if (operation === 'embedContent') return conversation('', [body.content], ({ parts }) => parts);
    if (operation === 'batchEmbedContents') {
      return conversation('', body.requests, ({ content }) => content?.parts);
    }
    return { texts: [], last: '' };
  },

  answer(operation, call) {
    const { body, tokens } = call;
    if (operation === 'generateContent') return generate(call);
    if (operation === 'models') return models();
    const usageMetadata = { promptTokenCount: tokens.input, totalTokenCount: tokens.input };
    if (operation === 'embedContent') {
      return { embedding: embedding(body.content, body), usageMetadata };
    }
    return {
      embeddings: body.requests.map((request) => embedding(request.content, request)),
      usageMetadata,
    };
  },

  error(status, message, { code, details: more }) {
    const error = { code: status, message, status: code ?? STATUS[status] ?? 'UNKNOWN' };
    if (more !== undefined) error.details = more;
    return { error };
  },
};
