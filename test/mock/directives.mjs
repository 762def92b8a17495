/*
 * directives.mjs
 *    What a test asks of the stand-in: `[[mock: status=429 retry-after=1]]`.
 *
 * The directive stands in the prompt because the worker under test cannot add headers; a client
 * that can may send the same items in the header x-mock. An item nobody knows is an error, so
 * that a typing mistake in a test cannot pass for a working one.
 */

const USAGE = ['missing', 'hostile', 'negative', 'giant', 'strings', 'fraction'];
const BLOCK = /\[\[mock:([\s\S]*?)\]\]/g;
const NONE = Object.freeze({});

function whole(text) {
  if (!/^\d{1,12}$/.test(text ?? '')) throw new Error('a whole number is wanted');
  return Number(text);
}

function bytes(text) {
  const [, digits, unit] = /^(\d{1,12})([kMG]?)$/.exec(text ?? '') ?? [];
  if (digits === undefined) throw new Error('bytes are a whole number with k, M or G at most');
  return Number(digits) * { '': 1, k: 1024, M: 1024 ** 2, G: 1024 ** 3 }[unit];
}

function pair(text) {
  const [input, output, rest] = (text ?? '').split(',');
  if (rest !== undefined) throw new Error('IN,OUT is wanted');
  return { input: whole(input), output: whole(output) };
}

function status(text) {
  const value = whole(text);
  if (value < 200 || value > 599) throw new Error('a final HTTP status is wanted');
  return value;
}

function oneOf(values) {
  return (text) => {
    if (!values.includes(text)) throw new Error(`one of ${values.join(', ')} is wanted`);
    return text;
  };
}

function string(text) {
  if (!text) throw new Error('a value is wanted');
  return text;
}

function amount(text) {
  if (!/^-?\d+(\.\d+)?$/.test(text ?? '')) throw new Error('an amount is wanted');
  return Number(text);
}

function flag(text) {
  if (text !== undefined) throw new Error('no value is wanted');
  return true;
}

const ITEMS = {
  status, 'retry-after': string, code: string, delay: whole, gate: string, hang: flag, cut: flag,
  garbage: flag, nul: flag, badutf8: flag, bignum: flag, deep: flag, gzip: flag, huge: bytes, redirect: string, tokens: pair,
  cached: whole, 'cache-write': whole, thoughts: whole, usage: oneOf(USAGE), model: string,
  cost: amount, 'echo-key': flag, 'escape-key': flag,
};

/*
 * Read the items of a header value and of every directive in a text.
 * Returns { always, once }: items that hold each time, and items for the first time only.
 * Throws an Error whose message names the item that is wrong.
 */
export function parseDirectives(header, text) {
  const hasBlock = text.includes('[[mock:');
  if (header === undefined && !hasBlock) return { always: NONE, once: NONE };

  const words = header === undefined ? [] : header.split(/\s+/);
  if (hasBlock) for (const [, block] of text.matchAll(BLOCK)) words.push(...block.split(/\s+/));

  const always = {};
  const once = {};
  for (const word of words) {
    if (word === '') continue;
    const first = word.startsWith('once:');
    const item = first ? word.slice(5) : word;
    const equals = item.indexOf('=');
    const name = equals < 0 ? item : item.slice(0, equals);
    const value = equals < 0 ? undefined : item.slice(equals + 1);
    if (!Object.hasOwn(ITEMS, name)) throw new Error(`unknown mock item "${name}"`);
    try {
      (first ? once : always)[name] = ITEMS[name](value);
    } catch (error) {
      throw new Error(`mock item "${name}": ${error.message}`);
    }
  }
  return { always, once };
}

/* The text without its directives: what a model would have been asked. */
export function withoutDirectives(text) {
  return text.includes('[[mock:') ? text.replace(BLOCK, '').trim() : text;
}
