/*
 * exa.mjs
 *    The Exa dialect: search, contents, answer. Exa bills in dollars, not in tokens.
 */

const ROUTES = { '/search': 'search', '/contents': 'contents', '/answer': 'answer' };

/* Dollars per search or answer, and per page of contents. */
const PRICE = { search: 0.007, page: 0.001, answer: 0.005 };

const TAGS = {
  400: 'INVALID_REQUEST_BODY', 401: 'INVALID_API_KEY', 402: 'NO_MORE_CREDITS',
  403: 'ACCESS_DENIED', 404: 'NOT_FOUND', 405: 'METHOD_NOT_ALLOWED', 429: 'RATE_LIMIT_EXCEEDED',
  500: 'INTERNAL_ERROR', 502: 'BAD_GATEWAY', 503: 'SERVICE_UNAVAILABLE',
};

function result(url, title, text) {
  return {
    id: url,
    title,
    url,
    publishedDate: '2026-01-01T00:00:00.000Z',
    author: 'Stand-in',
    ...(text === undefined ? {} : { text }),
  };
}

function dollars(cost, total, parts) {
  return cost === undefined ? { total, ...parts } : { total: cost };
}

function search({ id, body, text, cost }) {
  const count = Math.min(body.numResults ?? 10, 100);
  const withText = body.contents?.text !== undefined && body.contents.text !== false;
  const results = [];
  for (let n = 1; n <= count; n++) {
    results.push(result(`https://example.com/${n}`, `Result ${n}`, withText ? text : undefined));
  }
  return {
    requestId: id,
    resolvedSearchType: 'neural',
    results,
    searchTime: 12.5,
    costDollars: dollars(cost, PRICE.search, { search: { neural: PRICE.search } }),
  };
}

function contents({ id, body, text, cost }) {
  const urls = body.urls ?? body.ids;
  const total = Math.round(urls.length * PRICE.page * 1000) / 1000;
  return {
    requestId: id,
    results: urls.map((url) => result(String(url), 'Page', text)),
    statuses: urls.map((url) => ({ id: String(url), status: 'success', source: 'cached' })),
    costDollars: dollars(cost, total, { contents: { text: total } }),
  };
}

function answer({ id, text, cost }) {
  return {
    requestId: id,
    answer: text,
    citations: [result('https://example.com/1', 'Result 1')],
    costDollars: dollars(cost, PRICE.answer, {}),
  };
}

const ANSWERS = { search, contents, answer };

export const exa = {
  name: 'exa',
  usageField: 'costDollars',
  requestIdHeader: 'x-request-id',

  route(path) {
    const operation = ROUTES[path];
    return operation && { operation, method: 'POST', model: 'exa' };
  },

  credential(headers) {
    return headers['x-api-key'];
  },

  refuse(kind) {
    const message = kind === 'missing' ? 'x-api-key is required' : 'Invalid API key';
    return { status: 401, message };
  },

  check(operation, body) {
    if (operation === 'contents') {
      const urls = body.urls ?? body.ids;
      return Array.isArray(urls) && urls.length > 0 ? undefined : 'urls: Required';
    }
    return typeof body.query === 'string' && body.query !== '' ? undefined : 'query: Required';
  },

  prompt(operation, body) {
    const texts = operation === 'contents' ? (body.urls ?? body.ids).map(String) : [body.query];
    return { texts, last: texts[texts.length - 1] };
  },

  answer(operation, call) {
    return ANSWERS[operation](call);
  },

  error(status, message, { code, requestId }) {
    return { requestId, error: message, tag: code ?? TAGS[status] ?? 'UNKNOWN_ERROR' };
  },
};
