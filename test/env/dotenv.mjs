// Compares how keyvault (dump.c, compiled, named by the first argument) and the npm package dotenv read .env texts:
// chosen ones, and random ones. Prints TAP. Arguments: PROGRAM [NUMBER-OF-RANDOM-TEXTS [SEED]]
import { spawnSync } from 'node:child_process';
import { createRequire } from 'node:module';

const [program, count = '50000', seed = '1'] = process.argv.slice(2);
const dotenv = createRequire(new URL('../mock/package.json', import.meta.url))('dotenv');

let state = Number(seed);
// A linear congruential generator: the texts are the same in every run.
const random = (n) => {
	state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
	return Math.floor((state / 2 ** 32) * n);
};

const cases = {
	plain: 'A=1\nB=two words\n',
	quotes: `A='single'\nB="double"\nC=\`back\`\nD="it's"\nE='say "hi"'\n`,
	export: 'export A=1\nexport  B = 2\nexport=3\n',
	crlf: 'A=1\r\nB="2"\r\n\r\nC=3\r\n',
	cr: 'A=1\rB=2\r',
	bom: '\ufeffA=1\nB=2\n',
	comments: '# A=0\nA=1 # one\nB="2 # two" # three\nC=3#four\n   # D=5\n',
	multiline: 'A="one\ntwo"\nB=\'three\r\nfour\'\nC=`five\nsix` # seven\n',
	escapes: 'A="1\\n2\\r3\\t4\\"5"\nB=\'1\\n2\'\nC=1\\n2\nD="1\\\\n2"\n',
	duplicates: 'A=1\nA=2\nA=\nB=1\n',
	empty: 'A=\nB=""\nC=   \nD=# comment\nE=\'\'\n',
	yaml: 'A: 1\nB:2\nC : 3\nD:\nE=5\n',
	unclosed: 'A="one\nB=\'two\nC=`three\nD=4\n',
	two: 'A="a" b\nB="a" and "b"\nC=\'a\' # "b"\n',
	'next line': 'A=\n"one"\nB\n= two\nC=\n\n\'three\'\n',
	names: 'a.b-c=1\n1A=2\nA B=3\n=4\n-=5\n',
	empty_file: '',
	no_line_break: 'A=1',
};
const pieces = ['A', 'B', 'KEY', '=', '=', ' = ', ':', ': ', '"', '"', "'", "'", '`', '\\', '\\n', '\\"', "\\'", '#', ' ', '\t', '\n', '\n', '\n',
	'\r\n', '\r', 'export ', 'export', 'x', 'sk-1', '.', '$', '\v'];
for (let i = 0; i < Number(count); i++) {
	let text = '';
	for (let n = 1 + random(25); n > 0; n--) text += pieces[random(pieces.length)];
	cases[`random ${i}`] = text;
}

const input = [];
for (const text of Object.values(cases)) {
	const bytes = Buffer.from(text);
	const size = Buffer.alloc(4);
	size.writeUInt32BE(bytes.length);
	input.push(size, bytes);
}
const run = spawnSync(program, [], { input: Buffer.concat(input), maxBuffer: 2 ** 30 });
if (run.status !== 0) {
	console.log(`not ok - ${program} ends with ${run.status} ${run.stderr}`);
	process.exit(1);
}
const answers = run.stdout.toString().split('\n');
let line = 0;
let wrong = 0;
for (const [name, text] of Object.entries(cases)) {
	const ours = {};
	for (; answers[line] !== ''; line++) {
		const [, key, value] = answers[line].split(' ').map((hex) => Buffer.from(hex, 'hex').toString());
		ours[key] = value;
	}
	line++;
	const theirs = dotenv.parse(Buffer.from(text));
	const same = JSON.stringify(Object.entries(ours).sort()) === JSON.stringify(Object.entries(theirs).sort());
	if (!name.startsWith('random')) console.log(`${same ? 'ok' : 'not ok'} - ${name}`);
	if (same) continue;
	wrong++;
	if (wrong <= 5) console.log(`# ${name}: ${JSON.stringify(text)}\n#  ours ${JSON.stringify(ours)}\n#  dotenv ${JSON.stringify(theirs)}`);
}
console.log(`${wrong ? 'not ok' : 'ok'} - ${Object.keys(cases).length} texts, ${wrong} read differently`);
process.exit(wrong ? 1 : 0);
