# Many keys at once, and the recovery drill: export, decrypt with gpg alone, restore into another vault.
use strict;
use warnings FATAL => 'all';
use File::Temp ();
use IPC::Run ();
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $master_key = new_master_key();
my $logs_all = "log_statement = all\nlog_min_duration_statement = 0\nlog_parameter_max_length = -1\n";
my $node = new_node('batch', master_key => $master_key, conf => $logs_all);

sub keys_of
{
	my ($user) = @_;
	return $node->safe_psql('postgres', "SELECT keyvault.user_api_keys('$user')");
}

sub batch
{
	my ($keys, $user) = @_;
	return "SELECT provider FROM keyvault.store_api_keys('$keys', '$user')";
}

# A batch.
is($node->safe_psql('postgres', batch('{"openai": "sk-batch-openai-0123456789", "gemini": "AIza-batch-gemini-0123456789", "exa": "batch-exa-0123456789"}', 'b')),
	"exa\ngemini\nopenai", 'every key of a batch is stored');
is(keys_of('b'), '{"exa": "batch-exa-0123456789", "gemini": "AIza-batch-gemini-0123456789", "openai": "sk-batch-openai-0123456789"}', 'and found');
is($node->safe_psql('postgres', "SELECT count(*) = 3 FROM keyvault.store_api_keys('{\"exa\": \"batch-exa-0123456789\", \"gemini\": \"AIza-batch-gemini-0123456789\", \"openai\": \"sk-batch-openai-0123456789\"}', 'b') s JOIN keyvault.api_keys k USING (id) WHERE k.user_id = 'b' AND k.provider = s.provider AND rotated_at IS NULL"),
	't', 'stored again, it keeps the ids');
is($node->safe_psql('postgres', batch('{}', 'b')), '', 'an empty batch stores nothing');

# All or none, and the error names the provider.
my (undef, undef, $error) = $node->psql('postgres', batch('{"exa": "batch-other-0123456789", "openai": "sk-ant-batch-wrong-0123456789"}', 'b'));
like($error, qr/ERROR:  API key for provider "openai" is malformed\nDETAIL:  It begins as keys of provider "anthropic" do/, 'an error names the provider');
unlike($error, qr/batch-/, 'and no key');
is(JSON::PP::decode_json(keys_of('b'))->{exa}, 'batch-exa-0123456789', 'a bad key keeps the others out, too');
foreach my $bad ([ '["sk-batch-openai-0123456789"]', 'an array' ], [ '"sk-batch-openai-0123456789"', 'a string' ], [ '{"exa": 12345678}', 'a number' ],
	[ '{"exa": null}', 'no key' ], [ '{"exa": {"key": "batch-exa-0123456789"}}', 'an object' ], [ '{"sk-batch-openai-0123456789": "openai"}', 'a key for a provider' ])
{
	is(state_of($node, batch($bad->[0], 'b')), '22023', "$bad->[1] is refused");
}
is(state_of($node, "SELECT keyvault.store_api_keys(NULL, 'b')"), '22004', 'so is nothing');
is(state_of($node, q(SELECT keyvault.store_api_keys('{"exa": "batch-exa-0123456789"}'))), '42501', 'and nobody');
is(state_of($node, batch('{"exa": "a\u0000bcdefgh"}', 'b')) ne '', 1, 'and a zero byte');

# The recovery drill.
$node->safe_psql('postgres', <<'SQL');
SELECT keyvault.store_api_key('exa', 'quote"back\slash''12', 'odd "name"', 'jörg', now() + interval '1 year');
SELECT keyvault.store_platform_key('openai', 'sk-platform-0123456789abcdef');
SELECT keyvault.store_api_key('exa', 'key-that-is-broken', user_id => user_id) FROM unnest('{broken,data_key,master_key}'::text[]) user_id;
UPDATE keyvault.api_keys SET ciphertext = set_byte(ciphertext, 90, 255 - get_byte(ciphertext, 90)) WHERE user_id = 'broken';
-- An altered data key, and one under a master key that is not there.
UPDATE keyvault.data_keys SET wrapped = set_byte(wrapped, 40, 255 - get_byte(wrapped, 40)) WHERE user_id = 'data_key';
UPDATE keyvault.data_keys SET wrapped = set_byte(wrapped, 8, 255 - get_byte(wrapped, 8)) WHERE user_id = 'master_key';
SQL
my $home = File::Temp::tempdir('kvXXXX', TMPDIR => 1, CLEANUP => 1);
chmod 0700, $home;

sub gpg
{
	my ($input, @arguments) = @_;
	my ($out, $err) = ('', '');
	IPC::Run::run([ 'gpg', '--homedir', $home, '--batch', '--quiet', @arguments ], '<', \$input, '>', \$out, '2>', \$err) or diag $err;
	return $out;
}

sub make_gpg_key
{
	my ($name, $type, $parameters) = @_;
	gpg("%no-protection\n$parameters\nName-Real: $name\nExpire-Date: 0\n%commit\n", '--generate-key');
	return gpg('', '--armor', '--export', $name);
}
my $public_key = make_gpg_key('Recovery', 'rsa', "Key-Type: RSA\nKey-Length: 2048\nSubkey-Type: RSA\nSubkey-Length: 2048\nSubkey-Usage: encrypt");
like($public_key, qr/BEGIN PGP PUBLIC KEY/, 'there is a recovery key');

sub export
{
	my ($users) = @_;
	my ($out, $err) = ('', '');
	$node->psql('postgres', "SELECT public.armor(keyvault.export_recovery_bundle('$public_key', $users))", stdout => \$out, stderr => \$err);
	return ($out, $err);
}
my ($bundle, $warning) = export('NULL');
like($bundle, qr/^-----BEGIN PGP MESSAGE-----/, 'a bundle is an OpenPGP message');
like($warning, qr/WARNING:  API key of user "$_" for provider "exa" cannot be opened, and is left out/, "a key that cannot be opened is left out, with a warning: $_")
	foreach qw(broken data_key master_key);
like($warning, qr/DETAIL:  Expected key id [0-9a-f]{32}, loaded/, 'which says which master key is missing');
like($warning, qr/WARNING:  3 of 8 API keys are not in the bundle/, 'and how many are left out');
my $lines = gpg($bundle, '--decrypt');
my @keys = map { JSON::PP::decode_json($_) } split /\n/, $lines;
is_deeply([ map { "$_->{user_id} $_->{provider} $_->{name} $_->{key}" } @keys ], [
		' openai default sk-platform-0123456789abcdef', 'b exa default batch-exa-0123456789', 'b gemini default AIza-batch-gemini-0123456789',
		'b openai default sk-batch-openai-0123456789', "j\x{f6}rg exa odd \"name\" quote\"back\\slash'12" ],
	'gpg alone opens it: every key');
my ($some) = export("ARRAY['b']");
is(scalar(() = gpg($some, '--decrypt') =~ /\n/g), 3, "a bundle of one user's keys");
$node->safe_psql('postgres', "SELECT keyvault.upsert_user('keyless')");
my ($none) = export("ARRAY['keyless']");
is(gpg($none, '--decrypt'), '', 'a bundle of none');
($none, $warning) = export("ARRAY['b', 'B', 'nobody', '']");
is($none, '', 'no bundle of users who are not there');
like($warning, qr/ERROR:  2 of user_ids do not exist\nDETAIL:  Among them: "B", nobody\./, 'and they are named');

# Keys of which none opens are an error, with what is wrong.
foreach my $lost ([ 'master_key', 'KV004' ], [ 'data_key', 'KV005' ], [ "master_key', 'data_key", 'KV005' ])
{
	is(state_of($node, "SELECT keyvault.export_recovery_bundle('$public_key', ARRAY['$lost->[0]'])"), $lost->[1], "no bundle where nothing opens: $lost->[1]");
}
($none, $warning) = export("ARRAY['master_key']");
like($warning, qr/ERROR:  none of 1 API keys can be opened, and no recovery bundle is made\nDETAIL:  Expected key id [0-9a-f]{32}, loaded/, 'which says why');
$node->psql('postgres', "\\set VERBOSITY verbose\nSELECT keyvault.export_recovery_bundle('$public_key', '{b,master_key}') IS NULL", stderr => \$warning);
like($warning, qr/WARNING:  KV004: 1 of 4 API keys are not in the bundle/, 'a count has the SQLSTATE of what it counts');

# The drill of the reference, each command as it stands there: a key that is kept elsewhere, a bundle, and its restore into a
# vault on another server, which has another master key. What a person would type, a passphrase, gpg takes from a file.
my $other = new_node('other', conf => $logs_all);
$other->safe_psql('postgres', 'CREATE DATABASE newdb');
$other->safe_psql('newdb', 'CREATE EXTENSION keyvault CASCADE');
my ($drill) = slurp_file('doc/keyvault.md') =~ /^The drill, which a test runs:\n\n```sh\n(.*?)^```\n/ms;
my @steps = split /^(?=# )/m, $drill // '';
is(scalar @steps, 3, 'the drill of the reference has three steps');
like($steps[1], qr/-d mydb /, 'of which the second is for a database of its own name');
$steps[1] =~ s/-d mydb /-d postgres /;
write_secret("$home/passphrase", "of the recovery key\n");
write_secret("$home/gpg.conf", "batch\nno-tty\npinentry-mode loopback\npassphrase-file $home/passphrase\n");
my $told_by_drill = '';
foreach my $step (map { [ $steps[$_], (undef, $node, $other)[$_] ] } 0 .. 2)
{
	my ($commands, $server) = @$step;
	local %ENV = (%ENV, GNUPGHOME => $home, $server ? (PGHOST => $server->host, PGPORT => $server->port) : ());
	my ($out, $err) = ('', '');
	ok(IPC::Run::run([ 'bash', '-euo', 'pipefail', '-c', "cd $home\n$commands" ], '<', \'', '>', \$out, '2>', \$err), (split /\n/, $commands)[0]) or diag($err);
	$told_by_drill = $out;
}
like($told_by_drill, qr/^\s+5$/m, 'the drill restores every key that can be opened');
like(slurp_file("$home/bundle.asc"), qr/^-----BEGIN PGP MESSAGE-----/, 'from a bundle that is a file');
unlink "$home/gpg.conf";
my $kek = 'SELECT kek_id FROM keyvault.master_keys';
isnt($other->safe_psql('newdb', $kek), $node->safe_psql('postgres', $kek), 'the other vault has another master key');
is($other->safe_psql('newdb', "SELECT keyvault.user_api_keys('b')"), keys_of('b'), 'the keys of a user are the same there');
my $all = "SELECT user_id, provider, name, hint, source, date_trunc('second', expires_at) FROM keyvault.api_key_status WHERE user_id NOT IN ('broken', 'data_key', 'master_key') ORDER BY 1, 2, 3";
is($other->safe_psql('newdb', $all), $node->safe_psql('postgres', $all), 'names, hints and ends, too');
is($other->safe_psql('newdb', q{SELECT keyvault.user_api_key('exa', 'jörg', 'odd "name"')}), q{quote"back\slash'12}, 'quotes and all');
is($other->safe_psql('newdb', "SELECT vault_id FROM keyvault.vault") ne $node->safe_psql('postgres', "SELECT vault_id FROM keyvault.vault"), 1, 'it is another vault');

# Users and keys that this vault does not take any more are left out; the others come back.
$other->safe_psql('newdb', <<'SQL');
SELECT keyvault.upsert_user(user_id) FROM unnest('{gone,later}'::text[]) user_id;
SELECT keyvault.suspend_user('later', 'unpaid'), keyvault.erase_user('gone');
UPDATE keyvault.providers SET key_pattern = '^AIza.{35}$' WHERE provider = 'gemini';
SQL
my @lines = map { sprintf '{"user_id": "%s", "provider": "%s", "name": "default", "key": "restored-secret-0%s"}', @$_ }
	[ 'first', 'exa', '1' ], [ 'later', 'exa', '2' ], [ 'gone', 'exa', '3' ], [ 'first', 'gemini', '4' ], [ 'first', 'restored-secret', '5' ], [ 'last', 'exa', '6' ];
my (undef, $restored, $told) = $other->psql('newdb', "\\set VERBOSITY verbose\nSELECT keyvault.restore_api_keys('" . join("\n", @lines) . "')");
is($restored, 2, 'what can be restored is');
is($other->safe_psql('newdb', "SELECT keyvault.user_api_key('exa', 'first'), keyvault.user_api_key('exa', 'last')"), 'restored-secret-01|restored-secret-06', 'and opens');
like($told, qr/WARNING:  $_/, 'a warning says what is not')
	foreach 'KV007: line 2: API key of user "later" for provider "exa" is not restored: user "later" is suspended', 'KV007: line 3: .*"gone"',
	'KV009: line 4: API key of user "first" for provider "gemini" is not restored: API key for provider "gemini" is malformed',
	'22023: line 5: API key of user "first" for provider "\?" is not restored: unknown provider', '01000: 4 of 6 API keys are not restored';
unlike($told, qr/restored-secret/, 'without what might be a key');
set_config($_, 'keyvault.master_key_file', '/nowhere') foreach $node, $other;
is(state_of($other, "SELECT keyvault.restore_api_keys('$lines[0]')", 'newdb'), 'KV004', 'without a master key nothing is');
is(state_of($node, "SELECT keyvault.export_recovery_bundle('$public_key')"), 'KV004', 'nor exported');
set_config($node, 'keyvault.master_key_file', $master_key);
set_config($other, 'keyvault.master_key_file', undef);

# An old version of a data key that does not open takes the keys under it along, and no others.
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE good AS SELECT * FROM keyvault.api_keys WHERE user_id = 'b' AND provider = 'exa';
UPDATE keyvault.api_keys SET ciphertext = set_byte(ciphertext, 90, 255 - get_byte(ciphertext, 90)) WHERE user_id = 'b' AND provider = 'exa';
SELECT keyvault.rotate_data_key('b');
UPDATE keyvault.api_keys k SET ciphertext = good.ciphertext FROM good WHERE k.user_id = good.user_id AND k.id = good.id;
SQL
is(scalar(keys %{ JSON::PP::decode_json(keys_of('b')) }), 3, 'keys under two versions of a data key');
$node->safe_psql('postgres', "UPDATE keyvault.data_keys SET wrapped = set_byte(wrapped, 40, 255 - get_byte(wrapped, 40)) WHERE user_id = 'b' AND version = 1");
my ($code, $out, $err) = $node->psql('postgres', "SELECT keyvault.user_api_keys('b')");
is($out, '{"gemini": "AIza-batch-gemini-0123456789", "openai": "sk-batch-openai-0123456789"}', 'with the older one altered those under the newer one open');
like($err, qr/WARNING:  API key of user "b" for provider "exa" cannot be opened/, 'and a warning names the other');
is(state_of($node, "SELECT keyvault.user_api_key('exa', 'b')"), 'KV005', 'by itself it is an error');
is(state_of($node, "SELECT keyvault.rotate_data_key('data_key')"), 'KV005', 'a data key that does not open gets no successor');

# Lines that are none: nothing is stored, and the error quotes nothing.
foreach my $bad ('{"user_id": "x", "provider": "exa", "name": "n"}', '{"user_id": "x", "provider": "exa", "name": "n", "key": 5}', 'restored-secret-0123',
	'["restored-secret-0123"]', '{"user_id": "x", "provider": "exa", "name": "", "key": "restored-secret-0123"}',
	'{"user_id": "' . 'x' x 256 . '", "provider": "exa", "name": "n", "key": "restored-secret-0123"}', '{"key": "restored-secret-0123"')
{
	my (undef, undef, $refused) = $other->psql('newdb',
		qq(\\set VERBOSITY verbose\nSELECT keyvault.restore_api_keys('{"user_id": "x", "provider": "exa", "name": "first", "key": "restored-first-01"}\n$bad')));
	like($refused, qr/22023: line 2 is not a key of a recovery bundle/, 'a bad line is named');
	unlike($refused =~ s/LINE \d+:.*|STATEMENT:.*//gr, qr/restored-(?:secret|first)/, 'and not quoted');
}
is($other->safe_psql('newdb', "SELECT count(*) FROM keyvault.api_keys WHERE user_id = 'x'"), '0', 'and stores nothing');

# Damaged and hostile ones. What keyvault itself says quotes nothing, though nothing is withheld here.
sub restore
{
	my ($database, @bundle) = @_;
	my $text = join "\n", @bundle;
	my (undef, $count, $told) = $other->psql($database, "\\set VERBOSITY verbose\nSELECT keyvault.restore_api_keys(\$bundle\$$text\$bundle\$)");
	return ($count, $told);
}
set_config($other, 'keyvault.redact_logs', 'off');
my $sound = '"user_id": "x", "provider": "exa", "name": "n"';
foreach my $bad (
	[ 'a key twice', qq({$sound, "key": "swapped-secret-1", "key": "swapped-secret-2"}), 'It has more than one "key".' ],
	[ 'a user twice, one of them escaped', qq({$sound, "\\u0075ser_id": "swapped-secret", "key": "swapped-secret-2"}), 'It has more than one "user_id".' ],
	[ 'no name at last', qq({$sound, "key": "swapped-secret-1", "name": null}), 'It has more than one "name".' ],
	[ 'an end that is no time', qq({$sound, "key": "swapped-secret-1", "expires_at": "swapped-secret-2"}), 'Its "expires_at" is no time.' ],
	[ 'an end that is a number', qq({$sound, "key": "swapped-secret-1", "expires_at": 1}), 'It has no string "expires_at".' ],
	[ 'an object for a key', qq({$sound, "key": {"key": "swapped-secret-1"}}), 'It has no string "key".' ],
	[ 'a list for a user', q({"user_id": ["swapped-secret"], "provider": "exa", "name": "n", "key": "swapped-secret-1"}), 'It has no string "user_id".' ],
	[ 'a zero byte', qq({$sound, "key": "swapped\\u0000secret"}), 'It is no JSON object, or has characters that this database cannot hold.' ],
	[ 'half a character', qq({$sound, "key": "swapped\\ud800secret"}), 'It is no JSON object, or has characters that this database cannot hold.' ],
	[ 'nesting without end', '[' x 200_000, 'It is no JSON object, or has characters that this database cannot hold.' ],
	[ 'a field inside another', qq({"a": {$sound, "key": "swapped-secret-1"}}), 'It has no string "user_id".' ],
	[ 'more behind it', qq({$sound, "key": "swapped-secret-1"} swapped-secret-2), 'It is no JSON object, or has characters that this database cannot hold.' ],
	[ 'a line without end', qq({$sound, "key": ") . 'swapped-secret-' x 20_000 . '"}', 'It is longer than 256 kB.' ])
{
	my ($name, $text, $detail) = @$bad;
	my (undef, $refused) = restore('newdb', qq({$sound, "key": "swapped-secret-0"}), '', $text);
	like($refused, qr/ERROR:  22023: line 3 is not a key of a recovery bundle\nDETAIL:  \Q$detail\E\n/, "$name: the error says so");
	unlike($refused, qr/swapped|secret/, "$name: and quotes nothing");
}
is($other->safe_psql('newdb', "SELECT count(*) FROM keyvault.api_keys WHERE user_id = 'x'"), '0', 'none of them stores anything');

# Fields in each other's place: a user or a provider is named when there is one.
my ($count, $said) = restore('newdb', '{"user_id": "swapped-secret-1", "provider": "exa", "name": "n", "key": "x"}',
	'{"user_id": "first", "provider": "swapped-secret-1", "name": "n", "key": "exa-exa-exa"}', qq({$sound, "key": "restored-unasked-1", "more": [{"key": 1}]}));
is($count, 1, 'what is sound is restored');
like($said, qr/WARNING:  $_/, 'the rest is told of') foreach 'KV009: line 1: API key of user "\?" for provider "exa"', '22023: line 2: API key of user "first" for provider "\?"';
unlike($said, qr/swapped/, 'with nothing quoted');
$other->safe_psql('newdb', 'ALTER DATABASE newdb SET keyvault.create_users = off');
($count, $said) = restore('newdb', '{"user_id": "swapped-secret-1", "provider": "exa", "name": "n", "key": "restored-unasked-2"}');
like($said, qr/WARNING:  22023: line 1: API key of user "\?" for provider "\?" is not restored: unknown user\n/, 'nor where users are not made');
unlike($said, qr/swapped/, 'is the user quoted');

# Databases in other encodings: bytes that are no UTF-8 where any are taken, and a name from UTF-8.
$other->safe_psql('postgres', "CREATE DATABASE $_->[0] ENCODING '$_->[1]' LOCALE 'C' TEMPLATE template0") foreach [ 'latin', 'LATIN1' ], [ 'bytes', 'SQL_ASCII' ];
$other->safe_psql($_, 'CREATE EXTENSION keyvault CASCADE') foreach 'latin', 'bytes';
(undef, $said) = restore('bytes', qq({$sound, "key": "\xf0swapped-secret-1"}));
like($said, qr/ERROR:  22023: line 1 is not a key of a recovery bundle\nDETAIL:  It is no JSON object/, 'bytes that are no UTF-8');
unlike($said, qr/swapped|0xf0/, 'are not quoted, either');
foreach my $database ('latin', 'bytes')
{
	local $ENV{PGCLIENTENCODING} = $database eq 'latin' ? 'UTF8' : 'SQL_ASCII';
	($count) = restore($database, qq({"user_id": "j\xc3\xb6rg", "provider": "exa", "name": "n", "key": "restored-unasked-3", "expires_at": "2999-01-01T00:00:00Z"}));
	is($count, 1, "$database: a line with a name");
	is($other->safe_psql($database, "SELECT user_id, date_part('year', expires_at) FROM keyvault.api_key_status"), "j\xc3\xb6rg|2999", "$database: is that user's");
}

set_config($other, 'keyvault.redact_logs', undef);

# Keys that pgcrypto cannot encrypt to.
isnt(state_of($node, "SELECT keyvault.export_recovery_bundle('nonsense')"), '', 'no OpenPGP key');
my $curve = make_gpg_key('Curve', 'ecc', "Key-Type: EDDSA\nKey-Curve: ed25519\nSubkey-Type: ECDH\nSubkey-Curve: cv25519");
$node->psql('postgres', "\\set VERBOSITY verbose\nSELECT keyvault.export_recovery_bundle('$curve')", stderr => \$warning);
like($warning, qr/ERROR:  39000: nothing can be encrypted to this public key\nDETAIL:  pgcrypto says: .*\nHINT:  .*RSA or ElGamal/, 'a key on a curve, which pgcrypto does not know');

# Who may.
$node->safe_psql('postgres', "CREATE ROLE an_app; SELECT keyvault.grant_access('an_app', 'app'), keyvault.grant_access('an_app', 'admin')");
is(state_of($node, "SET ROLE an_app; SELECT keyvault.export_recovery_bundle('$public_key')"), '42501', 'no access exports');
is(state_of($node, "SET ROLE an_app; SELECT keyvault.restore_api_keys('')"), '42501', 'nor restores');
set_config($node, 'keyvault.reveal', 'off');
is(state_of($node, "SELECT keyvault.export_recovery_bundle('$public_key')"), '42501', 'with reveal off nobody exports');

my $log = slurp_file($node->logfile) . slurp_file($other->logfile);
like($log, qr/recovery bundle of 5 API keys made by role/, 'the log says who made a bundle');
unlike($log, qr/batch-(?:openai|gemini|exa|other|wrong)-|platform-0123|back.slash|restored-(?:secret|first)/, 'no key in the log');
$_->stop foreach $node, $other;
done_testing();
