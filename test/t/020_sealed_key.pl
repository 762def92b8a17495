# Keys that a client sealed, and every format against an implementation of its own.
use strict;
use warnings FATAL => 'all';
use File::Temp ();
use IPC::Run ();
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $master_key = new_master_key();
my $node = new_node('sealed', master_key => $master_key, conf => <<'CONF');
log_statement = all
log_parameter_max_length = -1
CONF
(my $digits = slurp_file($master_key)) =~ s/\s//g;

# The results of operations of formats.mjs, each [name, {arguments}].
sub formats
{
	my (@operations) = @_;
	my ($out, $err) = ('', '');
	my $json = JSON::PP->new->encode(\@operations);
	utf8::downgrade($json);		# its strings are bytes
	IPC::Run::run([ 'node', 'test/formats/formats.mjs' ], '<', \$json, '>', \$out, '2>', \$err)
		or die $err;
	return @{ JSON::PP::decode_json($out) };
}

sub sealing_key
{
	return JSON::PP::decode_json($node->safe_psql('postgres', 'SELECT keyvault.sealing_key()'));
}

# Boxes for [user, provider, secret] each.
sub boxes
{
	my (@keys) = @_;
	my $parameters = sealing_key();
	my $public_key = unpack 'H*', decode_base64($parameters->{public_key});
	return formats(map { [ 'makeBox', { public_key => $public_key, vault_id => $parameters->{vault_id},
		user_id => $_->[0], provider => $_->[1], secret => $_->[2] } ] } @keys);
}

sub decode_base64 { require MIME::Base64; return MIME::Base64::decode_base64($_[0]) }

# The SQLSTATE of storing a box, '' for none.
sub store
{
	my ($box, $user, $provider, $name) = @_;
	$name //= 'default';
	return state_of($node, "SELECT keyvault.store_sealed_api_key('$provider', '\\x$box', '$name', '$user')");
}

sub key_of
{
	my ($user, $provider, $name) = @_;
	$name //= 'default';
	return $node->safe_psql('postgres', "SELECT keyvault.user_api_key('$provider', '$user', '$name')");
}

# What sealing_key() says.
my $parameters = sealing_key();
is_deeply($parameters, sealing_key(), 'the sealing key stays');
is(length decode_base64($parameters->{public_key}), 65, 'a point on P-256');
is($node->safe_psql('postgres', 'SELECT substr(sha256(public_key), 1, 4) = key_id FROM keyvault.sealing_keys'), 't', 'its id is derived from it');
is($node->safe_psql('postgres', 'BEGIN READ ONLY; SELECT keyvault.sealing_key() IS NOT NULL'), 't', 'asking for it is a pure read');

# A box of the other implementation.
my ($box, $second, $unicode) = boxes([ 'a', 'openai', 'sk-sealed-first-0123456789' ], [ 'a', 'openai', 'sk-sealed-second-012345678' ],
	[ "j\xc3\xb6rg", 'exa', 'sealed-for-a-name' ]);
is(store($box, 'a', 'openai'), '', 'a box is stored');
is(key_of('a', 'openai'), 'sk-sealed-first-0123456789', 'and opens');
is($node->safe_psql('postgres', "SELECT hint, status FROM keyvault.api_key_status WHERE user_id = 'a'"), "sk-\xe2\x80\xa66789|active", 'with its hint');
is($node->safe_psql('postgres', "SELECT substr(ciphertext, 1, 1) FROM keyvault.api_keys WHERE user_id = 'a'"), '\x4b', 'it is kept as a record');

# Not twice, whatever became of it.
is(store($box, 'a', 'openai'), 'KV005', 'a replay is refused');
is(store($box, 'a', 'openai', 'other'), 'KV005', 'a replay under another name is refused');
is(store($second, 'a', 'openai'), '', 'the key is replaced by a second box');
is(store($box, 'a', 'openai'), 'KV005', 'and the first does not bring the old key back');
$node->safe_psql('postgres', "SELECT keyvault.delete_api_key('openai', user_id => 'a')");
is(store($second, 'a', 'openai'), 'KV005', 'nor the second a deleted one');

# Only for whom it was sealed: "ab" and "c" are not "a" and "bc".
$node->safe_psql('postgres', "INSERT INTO keyvault.providers (provider, base_url) VALUES ('bc', 'https://b.example'), ('c', 'https://c.example')");
my ($elsewhere, $own) = boxes([ 'a', 'bc', 'sealed-for-a-and-bc' ], [ 'b', 'exa', 'sealed-for-b-and-exa' ]);
is(store($elsewhere, 'ab', 'c'), 'KV005', 'user and provider are told apart by their lengths');
is(store($own, 'c', 'exa'), 'KV005', 'a box for one user does not open for another');
is(store($own, 'b', 'openai'), 'KV005', 'nor for another provider');
is(store($own, 'b', 'exa'), '', 'it opens where it belongs: a refusal has not used it up');
is(store(unpack('H*', pack 'H*', $unicode), "j\xc3\xb6rg", 'exa'), '', 'a user_id is UTF-8');

# Another vault's key.
my $foreign = '04' . '6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296'
	. '4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5';
my ($lost) = formats([ 'makeBox', { public_key => $foreign, vault_id => $parameters->{vault_id}, user_id => 'b', provider => 'exa', secret => 'x' x 20 } ]);
is(store($lost, 'b', 'exa'), 'KV005', 'a box for another key');

# Sealed for another vault, though to this one's key.
my ($other_vault) = formats([ 'makeBox', { public_key => unpack('H*', decode_base64($parameters->{public_key})),
	vault_id => '01933333-3333-7333-8333-333333333333', user_id => 'b', provider => 'exa', secret => 'x' x 20 } ]);
is(store($other_vault, 'b', 'exa'), 'KV005', 'a box for another vault');

# Every byte counts.
my ($fragile) = boxes([ 'm', 'exa', 'sealed-fragile-key' ]);
is($node->safe_psql('postgres', <<"SQL"), 'KV005|' . length($fragile) / 2, 'every mutated byte is refused');
CREATE FUNCTION store_state(box bytea) RETURNS text LANGUAGE plpgsql AS \$\$
BEGIN
	PERFORM keyvault.store_sealed_api_key('exa', box, 'default', 'm');
	RETURN 'stored';
EXCEPTION WHEN OTHERS THEN
	RETURN SQLSTATE;
END \$\$;
SELECT store_state(set_byte(box, i, get_byte(box, i) # (1 << (i % 8)))), count(*)
  FROM (VALUES ('\\x$fragile'::bytea)) b(box), generate_series(0, octet_length(box) - 1) i GROUP BY 1;
SQL
is($node->safe_psql('postgres', "SELECT string_agg(DISTINCT store_state(substr('\\x$fragile'::bytea, 1, i)), ' ') FROM generate_series(0, "
		. (length($fragile) / 2 - 1) . ') i'), '22023 KV005', 'every shorter one, too');
is(store($fragile . '00', 'm', 'exa'), 'KV005', 'and a longer one');
is(store($fragile, 'm', 'exa'), '', 'the whole one is taken');

# What is in a box is checked as any key.
my ($short, $spaced, $wrong, $nul) = boxes([ 's', 'exa', 'tooshrt' ], [ 's', 'exa', 'with a space' ], [ 's', 'openai', 'sk-ant-somebodys-key' ],
	[ 's', 'exa', "before\0after" ]);
is(store($short, 's', 'exa'), '22023', 'a box of a key that is too short');
is(store($spaced, 's', 'exa'), 'KV009', 'a sealed key with a space');
is(store($wrong, 's', 'openai'), 'KV009', "a sealed key of another provider's shape");
is(store($nul, 's', 'exa'), 'KV005', 'a sealed key with a zero byte');
is(state_of($node, "SELECT keyvault.store_sealed_api_key('exa', NULL, user_id => 's')"), '22004', 'no box');
is(store($short, 's', 'nobody'), '22023', 'an unknown provider');

# The sealing key grows old, gets a successor, and is forgotten with its boxes.
my ($late, $too_late) = boxes([ 'o', 'exa', 'sealed-to-the-old-key' ], [ 'o', 'exa', 'sealed-to-the-old-key' ]);
$node->safe_psql('postgres', "UPDATE keyvault.sealing_keys SET created_at = now() - interval '91 days'");
my $successor = sealing_key();
isnt($successor->{key_id}, $parameters->{key_id}, 'an old sealing key gets a successor');
is(store($late, 'o', 'exa'), '', 'boxes for the old one are still taken');
$node->safe_psql('postgres', "UPDATE keyvault.sealing_keys SET retired_at = now() WHERE created_at < now() - interval '90 days'");
is(store($too_late, 'o', 'exa'), 'KV005', 'until it retires');
$node->safe_psql('postgres', "UPDATE keyvault.sealing_keys SET created_at = now() - interval '90 days'");
sealing_key();
is($node->safe_psql('postgres', 'SELECT count(*), count(*) FILTER (WHERE retired_at <= now()) FROM keyvault.sealing_keys'), '2|0', 'a retired one is deleted');
is($node->safe_psql('postgres', 'SELECT count(*) FROM keyvault.sealed_boxes'), '0', 'and the digests of its boxes');
is(key_of('o', 'exa'), 'sealed-to-the-old-key', 'what was stored stays');

# The example: in Node, and in a browser.
sub example
{
	my ($user, $key, @program) = @_;
	my ($out, $err) = ('', '');
	my $input = JSON::PP::encode_json({ parameters => sealing_key(), user => $user, provider => 'openai', key => $key });
	IPC::Run::run(\@program, '<', \$input, '>', \$out, '2>', \$err) or diag $err;
	return $out;
}
is(store(example('node', 'sk-sealed-in-node-0123456789', 'node', '--input-type=module', '-e', <<'JS'), 'node', 'openai'), '', 'the example seals in Node');
import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';
const { sealApiKey } = await import(pathToFileURL('examples/seal/seal.mjs'));
const { parameters, user, provider, key } = JSON.parse(readFileSync(0, 'utf8'));
process.stdout.write(Buffer.from(await sealApiKey(parameters, user, provider, key)).toString('hex'));
JS
is(key_of('node', 'openai'), 'sk-sealed-in-node-0123456789', 'and it opens');
SKIP:
{
	my ($chromium) = grep { -x } map { ("$_/chromium", "$_/google-chrome") } split /:/, $ENV{PATH};
	skip 'no Chromium here: script/bootstrap installs it', 2 unless $chromium;
	my $profile = File::Temp::tempdir(CLEANUP => 1);
	local $ENV{HOME} = $profile;
	is(store(example('web', 'sk-sealed-in-a-browser-01234', 'node', 'test/formats/browser.mjs', $chromium, $profile), 'web', 'openai'), '',
		'the example seals in a browser');
	is(key_of('web', 'openai'), 'sk-sealed-in-a-browser-01234', 'and it opens');
}

# What C wrote, the other implementation reads.
my $rows = JSON::PP->new->decode($node->safe_psql('postgres', <<'SQL'));
SELECT json_agg(json_build_object('master_key', '', 'vault_id', v.vault_id, 'user_id', k.user_id, 'id', k.id, 'provider', k.provider, 'purpose', 'api_key',
	'record', k.ciphertext, 'fingerprint', k.fingerprint, 'wrapped', d.wrapped, 'version', d.version, 'data_key_id', d.data_key_id,
	'secret', keyvault.user_api_key(k.provider, k.user_id, k.name)))
  FROM keyvault.api_keys k JOIN keyvault.data_keys d USING (user_id), keyvault.vault v
SQL
$_->{master_key} = $digits foreach @$rows;
cmp_ok(scalar @$rows, '>=', 5, 'there are records to read');
is_deeply([ formats(map { [ 'openRecord', $_ ] } @$rows) ], [ map { unpack 'H*', $_->{secret} } @$rows ], 'every record opens by the document alone');
is_deeply([ map { "\\x$_" } formats(map { [ 'fingerprint', $_ ] } @$rows) ], [ map { $_->{fingerprint} } @$rows ], 'and every fingerprint is as documented');

# What the other implementation writes, C reads: golden bytes, which never change.
my %golden = (master_key => 'c0' x 32, kek_version => 1, vault_id => '01933333-3333-7333-8333-333333333333', user_id => 'golden', version => 7,
	data_key_id => '01944444-4444-7444-8444-444444444444', data_key => 'd5' x 32, nonce => '0a' x 12, salt => '0b' x 16, record_nonce => '0c' x 12,
	id => '01955555-5555-7555-8555-555555555555', provider => 'openai', purpose => 'api_key', secret => 'sk-golden-0123456789');
my ($wrapped, $record) = formats([ 'makeWrap', \%golden ], [ 'makeRecord', \%golden ]);
is($wrapped, slurp_golden('wrap'), 'the golden wrap has not changed');
is($record, slurp_golden('record'), 'nor the golden record');
my $golden_node = new_node('golden', init_only => 1, master_key => golden_master_key());
$golden_node->start;
$golden_node->safe_psql('postgres', <<"SQL");
CREATE EXTENSION keyvault CASCADE;
INSERT INTO keyvault.vault VALUES ('$golden{vault_id}');
INSERT INTO keyvault.data_keys (user_id, version, data_key_id, wrapped) VALUES ('golden', 7, '$golden{data_key_id}', '\\x$wrapped');
INSERT INTO keyvault.api_keys (user_id, id, provider, ciphertext, hint, fingerprint)
VALUES ('golden', '$golden{id}', 'openai', '\\x$record', '', decode(repeat('00', 16), 'hex'));
SQL
is($golden_node->safe_psql('postgres', "SELECT keyvault.user_api_key('openai', 'golden')"), 'sk-golden-0123456789', 'the golden record opens');
$golden_node->stop;

sub slurp_golden
{
	my ($name) = @_;
	return JSON::PP::decode_json(slurp_file('test/golden/vault.json'))->{$name};
}

sub golden_master_key
{
	my $path = new_master_key();
	open my $file, '>', $path or die $!;
	print $file $golden{master_key};
	close $file;
	return $path;
}

# The plaintext never reached SQL.
my $log = slurp_file($node->logfile);
unlike($log, qr/sealed-(?:first|second|fragile|in-node|in-a-browser|to-the-old)/, 'no sealed key in the log, though it logs every statement');
$node->stop;
done_testing();
