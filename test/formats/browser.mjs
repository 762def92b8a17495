/*
 * browser.mjs
 *    Serve the example that seals a key to headless Chromium, and print the box it makes.
 *
 *    node browser.mjs CHROMIUM PROFILE-DIRECTORY < {"parameters", "user", "provider", "key"} > box in hexadecimal digits
 *
 * WebCrypto needs a secure context: localhost is one.
 */

import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import http from 'node:http';

const [chromium, profile] = process.argv.slice(2);
const input = readFileSync(0, 'utf8').trim();
const page = `<!doctype html><title>seal</title><script type="module">
import { sealApiKey } from './seal.mjs';
const input = ${input};
try {
  const box = await sealApiKey(input.parameters, input.user, input.provider, input.key);
  await fetch('/box', { method: 'POST', body: Array.from(box, (b) => b.toString(16).padStart(2, '0')).join('') });
} catch (error) {
  await fetch('/error', { method: 'POST', body: String(error) });
}
</script>`;

let browser;
const server = http.createServer((request, response) => {
  let body = '';
  request.on('data', (chunk) => { body += chunk; });
  request.on('end', () => {
    if (request.method === 'POST') {
      response.end();
      if (request.url === '/box') process.stdout.write(body);
      else process.stderr.write(body);
      process.exitCode = request.url === '/box' ? 0 : 1;
      browser.kill();
      server.close();
      server.closeAllConnections();
    } else if (request.url === '/seal.mjs') {
      response.setHeader('Content-Type', 'text/javascript').end(readFileSync(new URL('../../examples/seal/seal.mjs', import.meta.url)));
    } else if (request.url === '/') {
      response.setHeader('Content-Type', 'text/html').end(page);
    } else {
      response.statusCode = 404;
      response.end();
    }
  });
});

server.listen(0, '127.0.0.1', () => {
  browser = spawn(chromium, ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-dev-shm-usage',
    '--disable-background-networking', '--disable-component-update', '--disable-sync', `--user-data-dir=${profile}`,
    '--remote-debugging-port=0', `http://localhost:${server.address().port}/`], { stdio: 'ignore' });
  browser.on('error', (error) => { process.stderr.write(String(error)); process.exit(1); });
  setTimeout(() => { process.stderr.write('the page did not answer'); browser.kill('SIGKILL'); process.exit(1); }, 60000).unref();
});
