# Master keys from a command, and wrapped by Vault's Transit engine: fetched once for all sessions, and every failure a clear KV004.
use strict;
use warnings FATAL => 'all';
use HTTP::Tiny;
use JSON::PP ();
use MIME::Base64;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);
use Keyvault;

my $directory = PostgreSQL::Test::Utils::tempdir;
my $digits = 'c3' x 32;
my $store = "SELECT keyvault.store_api_key('openai', 'sk-tap-0123456789abcdef', user_id => 'u')";
my $lookup = "SELECT keyvault.user_api_key('openai', 'u')";
my $node = new_node('source', master_key => 0, conf => <<'CONF');
keyvault.databases = 'none'
max_connections = 60
CONF

# A program of our own that notes each run.
sub program
{
	my ($name, $script) = @_;
	return write_secret("$directory/$name", "#!/bin/sh\necho run >> $directory/runs\n$script\n", 0700);
}

sub runs
{
	return 0 unless -e "$directory/runs";
	my @lines = split /\n/, slurp_file("$directory/runs");
	return scalar @lines;
}

sub command_is
{
	my ($command, $reason, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	set_config($node, 'keyvault.master_key_command', $command);
	my ($code, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$store");
	like($err, qr/ERROR:  KV004: master key is not available/, "$name: KV004");
	return like($err, $reason, "$name: the reason");
}

# A command.
{
	set_config($node, 'keyvault.master_key_command', program('good', "echo $digits"));
	is(state_of($node, $store), '', 'a key is stored under the master key that a command prints');
	is($node->safe_psql('postgres', $lookup), 'sk-tap-0123456789abcdef', 'and opens in another session');
	is($node->safe_psql('postgres', 'SELECT get_byte(wrapped, 3) FROM keyvault.data_keys'), '2', 'the wrap says where the key came from');
	is(runs(), 1, 'the command ran once for all sessions');

	unlink "$directory/runs";
	$node->reload;
	ok(wait_until(sub { $node->safe_psql('postgres', $lookup); runs() == 1 }), 'and once more after a reload');

	# Many sessions at once after a reload share one run, or have one each at most when they are in a statement meanwhile.
	set_config($node, 'keyvault.master_key_command', program('slow', "sleep 0.5; echo $digits"));
	unlink "$directory/runs";
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '30', '-j', '2', '-t', '5', '-C' ], [ 1, "$lookup;\n" ]);
	is($code, 0, 'many new sessions get the key') or diag($err);
	is(runs(), 1, 'from one run');

	# Arguments, and no shell.
	set_config($node, 'keyvault.master_key_command', program('echo', 'echo $#:$1:$2 > ' . "$directory/arguments\necho $digits") . " one\t\$(id)  ");
	is($node->safe_psql('postgres', $lookup), 'sk-tap-0123456789abcdef', 'a command with arguments');
	is(slurp_file("$directory/arguments"), "2:one:\$(id)\n", 'which no shell has read');
	set_config($node, 'keyvault.master_key_command', program('look', "env > $directory/environment; ls -l /proc/self/fd > $directory/descriptors; cat >> $directory/input; echo $digits"));
	$node->safe_psql('postgres', $lookup);
	unlike(slurp_file("$directory/environment"), qr/^(PG|HOME|USER|LD_)/m, 'the environment is a short one');
	unlike(slurp_file("$directory/descriptors"), qr/ [4-9] -> | \d\d -> /, 'no descriptor of the server is open');
	is(slurp_file("$directory/input"), '', 'the input is empty');
}

# A command that fails.
{
	my $secret = 'd4' x 32;
	my $out;
	command_is(program('status', "echo $secret; exit 3"), qr/The command ".*status" exited with status 3\./, 'exit status');
	command_is(program('signal', 'kill -9 $$'), qr/was ended by signal 9/, 'signal');
	command_is(program('empty', 'true'), qr/printed nothing/, 'no output');
	command_is(program('large', 'head -c 100000 /dev/zero'), qr/printed more than 2048 bytes/, 'too much output');
	command_is(program('endless', 'yes'), qr/printed more than 2048 bytes/, 'output without end');
	command_is(program('garbage', "echo not $secret"), qr/does not hold master keys/, 'output that is no key');
	command_is(program('seventeen', "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17; do echo $secret; done"),
		qr/more than 16 master keys/, 'too many keys');
	command_is('/nowhere/at/all', qr/could not be executed: No such file/, 'no such program');
	command_is(write_secret("$directory/not_executable", '', 0600), qr/could not be executed: Permission denied/, 'not executable');
	command_is(write_secret("$directory/no_format", "\1\2", 0700), qr/could not be executed/, 'not a program');
	command_is('relative', qr/is not an absolute path/, 'no absolute path');
	command_is('   ', qr/is not an absolute path/, 'white space alone');
	set_config($node, 'keyvault.master_key_timeout', '300ms');
	command_is(program('hanging', 'sleep 100'), qr/did not end in time/, 'a command that hangs');
	command_is(program('lingering', "echo $digits; exec >&-; sleep 100"), qr/did not end in time/, 'a command that closes its output and hangs');
	command_is(program('daemon', "sleep 100 & echo $digits"), qr/did not end in time/, 'a command whose child keeps the output');
	unlike(slurp_file($node->logfile), qr/$secret/, 'what a failing command prints is not logged');
	ok(wait_until(sub { system("pgrep -f '[s]leep 100' -u \$(id -u) > /dev/null") != 0 }), 'nothing of them is left running');

	set_config($node, 'keyvault.master_key_timeout', '60s');
	set_config($node, 'keyvault.master_key_command', program('hanging', 'sleep 101'));
	my $began = time;
	is(state_of($node, "SET statement_timeout = '500ms'; $lookup"), '57014', 'waiting for a command can be canceled');
	cmp_ok(time - $began, '<', 20, 'at once');
	ok(wait_until(sub { system("pgrep -f '[s]leep 101' -u \$(id -u) > /dev/null") != 0 }), 'which ends the command');
	set_config($node, 'keyvault.master_key_timeout', '300ms');
	(undef, $out) = $node->psql('postgres', "$lookup;\nCREATE TEMP TABLE children (state text);\nCOPY children FROM PROGRAM 'ps -o stat= --ppid \$PPID';\n"
		. "SELECT count(*), count(*) FILTER (WHERE state LIKE 'Z%') FROM children;", on_error_stop => 0);
	is($out, '1|0', 'the session has no child left, nor a zombie, but the one that counts');

	# A failure is everybody's for a moment: sessions do not wait for it in turn.
	set_config($node, 'keyvault.master_key_timeout', '2s');
	unlink "$directory/runs";
	$began = time;
	run_pgbench($node, [ '-c', '20', '-j', '2', '-t', '1' ], [ 1, "$lookup;\n" ]);
	cmp_ok(time - $began, '<', 15, '20 sessions fail together');
	cmp_ok(runs(), '<=', 3, 'after a run or two');

	set_config($node, 'keyvault.master_key_timeout', undef);
	set_config($node, 'keyvault.master_key_command', "$directory/good");
	is($node->safe_psql('postgres', $lookup), 'sk-tap-0123456789abcdef', 'a good command again, and all is well');
}

# One source only; a file with the same key is as good.
{
	set_config($node, 'keyvault.master_key_file', write_secret("$directory/file", "$digits\n"));
	my ($code, $out, $err) = $node->psql('postgres', $lookup);
	like($err, qr/Both keyvault.master_key_file and keyvault.master_key_command are set/, 'two sources are an error');
	set_config($node, 'keyvault.master_key_command', undef);
	is($node->safe_psql('postgres', $lookup), 'sk-tap-0123456789abcdef', 'the same key from a file opens what was wrapped');
}

# Transit.
my $port = start_vault('--token', 'tap-token', '--namespace', 'team');
sub vault_api
{
	my ($path, $body, $token) = @_;
	my $answer = HTTP::Tiny->new(proxy => undef)->request('POST', "http://127.0.0.1:$port/$path",
		{ headers => { 'X-Vault-Token' => $token // 'tap-token', 'X-Vault-Namespace' => 'team' }, content => $body // '' });
	return JSON::PP::decode_json($answer->{content});
}

sub wrap { return vault_api('v1/transit/encrypt/keyvault', '{"plaintext": "' . encode_base64($_[0], '') . '"}')->{data}{ciphertext} }

sub vault_is
{
	my ($mode, $reason, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	vault_api("__mode?mode=$mode");
	$node->reload;
	my $err;
	ok(wait_until(sub { (undef, undef, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$lookup"); $err =~ $reason }), "$name: the reason")
		or diag($err);
	return like($err, qr/ERROR:  KV004: master key is not available/, "$name: KV004");
}

{
	my $wrapped = "$directory/wrapped";
	write_secret($wrapped, wrap(pack('H*', $digits)) . "\n");
	write_secret("$directory/token", "tap-token\n");
	set_config($node, 'keyvault.vault_address', "http://127.0.0.1:$port/");
	set_config($node, 'keyvault.vault_token_file', "$directory/token");
	set_config($node, 'keyvault.vault_namespace', 'team');
	set_config($node, 'keyvault.vault_transit_key', 'transit/keyvault');
	set_config($node, 'keyvault.master_key_file', $wrapped);
	is($node->safe_psql('postgres', $lookup), 'sk-tap-0123456789abcdef', 'the same key, wrapped by Transit, opens what was wrapped');
	$node->safe_psql('postgres', $lookup);
	is(vault_api('__stats')->{'transit/decrypt/keyvault'}, 1, 'Vault was asked once');

	write_secret($wrapped, wrap('e5' x 32) . "\n" . wrap("$digits\n") . "\n");
	$node->reload;
	ok(wait_until(sub { $node->safe_psql('postgres', $lookup) eq 'sk-tap-0123456789abcdef' }), 'several, written as digits, in one file');
	my $made = vault_api('v1/transit/datakey/wrapped/keyvault')->{data}{ciphertext};
	write_secret($wrapped, "$made\n" . wrap(pack('H*', $digits)));
	is(state_of($node, $lookup), '', 'one that Vault has made');

	vault_is('sealed', qr/the Vault server is sealed/, 'sealed');
	vault_is('error', qr/the Vault server answered with status 500/, 'an error of its own');
	vault_is('malformed', qr/the Vault server gave an answer that is not JSON/, 'not JSON');
	vault_is('empty', qr/did not decrypt line 1/, 'no plaintext');
	vault_is('short', qr/did not decrypt line 1/, 'a plaintext that is too short');
	vault_is('huge', qr/the answer is longer than/, 'an answer that is too long');
	vault_is('redirect', qr/the Vault server answered with status 307/, 'a redirect is not followed');
	is(vault_api('__stats')->{elsewhere}, undef, 'at all');
	set_config($node, 'keyvault.master_key_timeout', '300ms');
	vault_is('slow', qr/could not be reached: .*(timed out|Timeout)/i, 'slow');
	set_config($node, 'keyvault.master_key_timeout', undef);
	my $began = time;
	is(state_of($node, "SET statement_timeout = '500ms'; $lookup"), '57014', 'waiting for Vault can be canceled');
	cmp_ok(time - $began, '<', 9, 'at once');

	vault_api('__token?token=another');
	vault_is('ok', qr/the Vault server denied access \(status 403\)/, 'a token that is good no more');
	write_secret("$directory/token", "another");
	$node->reload;
	ok(wait_until(sub { state_of($node, $lookup) eq '' }), 'a new token in the file is taken');
	symlink $node->data_dir . '/token', "$directory/token_link";
	foreach my $case ([ write_secret($node->data_dir . '/token', 'another'), qr/the token's file .* lies in the data directory/ ],
		[ "$directory/token_link", qr/lies in the data directory/ ],
		[ write_secret("$directory/world_token", 'another', 0644), qr/can be read by others/ ],
		[ write_secret("$directory/empty_token", " \n"), qr/does not hold a token/ ],
		[ write_secret("$directory/split_token", "an\1other"), qr/does not hold a token/ ], [ "$directory/none", qr/No such file/ ], [ undef, qr/vault_token_file is empty/ ])
	{
		set_config($node, 'keyvault.vault_token_file', $case->[0]);
		vault_is('ok', $case->[1], 'token file ' . ($case->[0] // 'not set'));
	}
	set_config($node, 'keyvault.vault_token_file', $node->data_dir . '/token');
	set_config($node, 'keyvault.allow_master_key_in_data_directory', 'on');
	ok(wait_until(sub { state_of($node, $lookup) eq '' }), 'a token in the data directory is taken where a master key would be');
	set_config($node, 'keyvault.allow_master_key_in_data_directory', undef);
	set_config($node, 'keyvault.vault_token_file', "$directory/token");
	foreach my $case ([ 'vault_transit_key', 'keyvault', qr/is not written as mount\/name/ ], [ 'vault_transit_key', 'transit/key?vault', qr/is not written as/ ],
		[ 'vault_transit_key', 'transit/other', qr/refused the request as malformed \(status 400\)/ ],
		[ 'vault_namespace', undef, qr/status 403/ ], [ 'vault_address', undef, qr/vault_address is empty/ ],
		[ 'vault_address', "http://192.0.2.1:$port", qr/must begin with https/ ], [ 'vault_address', 'ftp://127.0.0.1', qr/must begin with https/ ],
		[ 'vault_address', "https://127.0.0.1:$port", qr/could not be reached/ ], [ 'vault_address', 'http://127.0.0.1:1', qr/could not be reached/ ],
		[ 'master_key_file', "$directory/file", qr/does not hold 1 to 16 lines of Transit ciphertext/ ], [ 'master_key_file', undef, qr/master_key_file is empty/ ])
	{
		my ($setting, $value, $reason) = @$case;
		my $before = $node->safe_psql('postgres', "SHOW keyvault.$setting");
		set_config($node, "keyvault.$setting", $value);
		vault_is('ok', $reason, "$setting " . ($value // 'not set'));
		set_config($node, "keyvault.$setting", $before);
	}
	is($node->safe_psql('postgres', $lookup), 'sk-tap-0123456789abcdef', 'put right, all is well');

	# Over TLS, with certificates of our own.
	system_or_bail('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1',
		'-keyout', "$directory/tls.key", '-out', "$directory/tls.crt");
	$port = start_vault('--cert', "$directory/tls.crt", '--key', "$directory/tls.key", '--token', 'another', '--namespace', 'team');
	set_config($node, 'keyvault.vault_address', "https://127.0.0.1:$port");
	my (undef, undef, $err) = $node->psql('postgres', $lookup);
	like($err, qr/could not be reached: .*certificate/i, 'a certificate of nobody known is refused');
	set_config($node, 'keyvault.vault_ca_file', "$directory/tls.crt");
	(undef, undef, $err) = $node->psql('postgres', $lookup);
	like($err, qr/status 400/, 'and accepted when keyvault.vault_ca_file has it');

	# The launcher keeps the token alive, and says when it cannot.
	$port = start_vault('--token', 'another', '--namespace', 'team', '--lease', '2');
	set_config($node, 'keyvault.vault_address', "http://127.0.0.1:$port");
	ok(wait_until(sub { (vault_api('__stats', '', 'another')->{'auth/token/renew-self'} // 0) >= 3 }), 'the token is renewed again and again');
	vault_api('__mode?mode=sealed');
	ok(wait_until(sub { slurp_file($node->logfile) =~ /WARNING:  token for the Vault server is not renewed\n.*DETAIL:  The Vault server is sealed/ }),
		'a token that is not renewed is a warning');

	my $log = slurp_file($node->logfile);
	unlike($log, qr/$_/, 'neither token nor key was logged') foreach 'tap-token', $digits, 'another"', 'vault:v1:[A-Za-z0-9]';
}
$node->stop;

done_testing();
