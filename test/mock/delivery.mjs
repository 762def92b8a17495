/*
 * delivery.mjs
 *    Send an answer, or spoil it on the way as a directive asks.
 */

import { createGzip, gzipSync } from 'node:zlib';

/* An overlong NUL, a lone surrogate, and bytes that no UTF-8 text has. */
const BAD_BYTES = Buffer.from([0xc0, 0x80, 0xed, 0xa0, 0x80, 0xff, 0xfe]);
const BLOCK = Buffer.alloc(64 * 1024, 'x');
const JSON_TYPE = 'application/json; charset=utf-8';

function withBadBytes(json, marker) {
  const pieces = json.split(marker);
  const buffers = [];
  pieces.forEach((piece, index) => {
    if (index > 0) buffers.push(BAD_BYTES);
    buffers.push(Buffer.from(piece));
  });
  return Buffer.concat(buffers);
}

/* The answer with one more member, `pad`, that makes the body `bytes` long; chunked. With gzip, that is its length when decoded. */
function sendPadded(res, status, headers, json, bytes, gzip) {
  const head = Buffer.from(`${json.slice(0, -1)},"pad":"`);
  const tail = '"}';
  let left = Math.max(0, bytes - head.length - tail.length);
  const out = gzip ? createGzip() : res;
  const pump = () => {
    while (left > 0) {
      if (res.destroyed) return;
      const n = Math.min(left, BLOCK.length);
      left -= n;
      if (!out.write(n === BLOCK.length ? BLOCK : BLOCK.subarray(0, n))) {
        out.once('drain', pump);
        return;
      }
    }
    out.end(tail);
  };
  res.writeHead(status, headers);
  if (gzip) out.pipe(res);
  out.write(head);
  pump();
}

/* Promise a whole body, send half of it, and close. */
function sendHalf(res, status, headers, body) {
  res.writeHead(status, { ...headers, 'content-length': body.length });
  res.write(body.subarray(0, body.length >> 1), () => res.socket?.destroy());
}

function send(res, { status, headers, json: whole, directives }, marker) {
  if (res.destroyed) return;
  if (whole === undefined || status === 204) {
    res.writeHead(status, status === 204 ? headers : { ...headers, 'content-length': 0 });
    res.end();
    return;
  }
  headers['content-type'] = JSON_TYPE;

  let json = directives.garbage ? '<!doctype html><title>not JSON</title>' : whole;
  if (directives.deep) json = '['.repeat(200_000);
  if (directives.bignum) json = `${json.slice(0, -1)},"bignum":1e999999}`;
  if (directives.gzip) headers['content-encoding'] = 'gzip';
  if (directives.huge !== undefined) {
    sendPadded(res, status, headers, json, directives.huge, directives.gzip);
    return;
  }
  if (directives.cut) {
    sendHalf(res, status, headers, Buffer.from(json));
    return;
  }
  // A string leaves in one write together with the headers, a buffer does not.
  const plain = directives.badutf8 ? withBadBytes(json, marker) : json;
  const body = directives.gzip ? gzipSync(plain) : plain;
  headers['content-length'] = Buffer.byteLength(body);
  res.writeHead(status, headers);
  res.end(body);
}

/* Send a reply of provider.mjs: now, after the delay it asks for, or never. */
export function deliver(res, reply, marker) {
  const { directives } = reply;
  if (directives.hang) return;
  if (directives.delay > 0) setTimeout(send, directives.delay, res, reply, marker);
  else send(res, reply, marker);
}
