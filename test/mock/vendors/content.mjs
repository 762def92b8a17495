/*
 * content.mjs
 *    Reading prompts and making vectors: what the vendors' bodies have in common.
 */

/* The plain text of a content value: a string, or parts of which some carry `text`. */
export function plainText(content) {
  if (typeof content === 'string') return content;
  if (!Array.isArray(content)) return '';
  let text = '';
  for (const part of content) {
    if (typeof part === 'string') text += part;
    else if (typeof part?.text === 'string') text += part.text;
  }
  return text;
}

/*
 * Texts of a conversation, in order, and the last one that the user said.
 * `system` is what stands outside the messages; `contentOf` finds a message's content.
 */
export function conversation(system, messages, contentOf = (message) => message.content) {
  const texts = [];
  let last = '';
  const before = plainText(system);
  if (before !== '') texts.push(before);
  for (const message of messages) {
    const text = plainText(contentOf(message));
    texts.push(text);
    if (message.role === undefined || message.role === 'user') last = text;
  }
  return { texts, last };
}

/* Is this a list of objects, as all vendors want their messages to be? */
export function isObjectList(value) {
  return Array.isArray(value) && value.length > 0
    && value.every((item) => item !== null && typeof item === 'object');
}

/* A unit vector that depends on the text alone (FNV-1a seeds a linear congruential generator). */
export function vector(text, dimensions) {
  let seed = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) {
    seed = Math.imul(seed ^ text.charCodeAt(i), 0x01000193) >>> 0;
  }
  const values = new Float32Array(dimensions);
  let square = 0;
  for (let i = 0; i < dimensions; i++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    values[i] = seed / 0x80000000 - 1;
    square += values[i] * values[i];
  }
  const norm = Math.sqrt(square) || 1;
  for (let i = 0; i < dimensions; i++) values[i] /= norm;
  return values;
}
