# What the worker keeps in its memory of the keys that it has called with, of those it has fetched, and of the token that it fetches them with.
use strict;
use warnings FATAL => 'all';
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

# Its memory is closed to everybody. A library that is loaded before libc leaves it open, for this test alone.
my $directory = PostgreSQL::Test::Utils::tempdir;
my $library = "$directory/open.so";
write_secret("$directory/open.c", <<'C');
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int
prctl(int operation, ...)
{
	unsigned long argument[4];
	va_list		list;

	if (operation == PR_SET_DUMPABLE)
		return 0;
	va_start(list, operation);
	for (int i = 0; i < 4; i++)
		argument[i] = va_arg(list, unsigned long);
	va_end(list);
	return syscall(SYS_prctl, operation, argument[0], argument[1], argument[2], argument[3]);
}
C
plan skip_all => 'AddressSanitizer maps terabytes, and wants to be loaded first' if $ENV{KV_SANITIZER};
system_or_bail('cc', '-shared', '-fPIC', '-o', $library, "$directory/open.c");

my $port = start_mock();
my $token = "token-of-this-run-$$";
system_or_bail('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1',
	'-keyout', "$directory/tls.key", '-out', "$directory/tls.crt");
my $vault = start_vault('--token', $token, '--cert', "$directory/tls.crt", '--key', "$directory/tls.key");
my $node = new_node('worker_memory', init_only => 1, conf => <<"CONF");
keyvault.reveal = off
keyvault.vault_address = 'https://127.0.0.1:$vault/'
keyvault.vault_token_file = '${\ write_secret("$directory/token", "$token\n") }'
keyvault.vault_ca_file = '$directory/tls.crt'
keyvault.reference_cache_ttl = 0
CONF
{
	my %hostile = hostile_environment("$directory/tls.secrets");
	local @ENV{ keys %hostile, 'LD_PRELOAD' } = (values %hostile, $library);
	$node->start;
}
$node->safe_psql('postgres', 'CREATE EXTENSION keyvault CASCADE');
use_mock($node, $port);

sub copies
{
	my ($bytes) = @_;
	my $memory = core_of(worker_pid($node), 1) // die 'closed';
	my $n = () = $memory =~ /\Q$bytes\E/g;
	return $n;
}

# Test that a key is in the worker's memory while a call with it is under way, and how often when it has ended.
sub leaves
{
	my ($name, $key, $user, $left, %argument) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my ($mock, $end, $gate) = map { delete $argument{$_} } qw(mock end gate);
	$gate //= "gate-of-$user";
	my $text = "of $user [[mock: gate=$gate " . ($mock // '') . ']]';
	my $request = queue_request($node, $user, $text, payer => "'user'", %argument);
	ok(wait_until(sub { mock_received($port, "of $user ") }), "$name: a call is under way");
	cmp_ok(copies($key), '>', 0, "$name: the search finds the key then");
	mock_open($port, $gate) unless $gate eq 'shut';
	ends_as($node, $request, $end // 'done', "$name: the call has ended");
	is(copies($key), $left, "$name: copies of the key that are left");
	return;
}
# Made of parts, so that no page of this test's own has been copied to the server.
sub key { return join '-', 'sk', @_, $$, 'secret' }
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('openai', '" . key('own') . "', user_id => 'own')");
leaves('own key', key('own'), 'own', 0);
my $n = 0;
foreach my $case ([ 'an answer that repeats it', 'echo-key' ], [ 'an answer that spells it with escapes', 'escape-key' ], [ 'a long answer that repeats it', 'huge=300k echo-key' ],
	[ 'an error that repeats it', 'status=400 echo-key', 'failed' ], [ 'a refusal', 'status=401 echo-key', 'failed' ], [ 'a redirect', 'redirect=http://127.0.0.1:9/', 'failed' ],
	[ 'a broken answer', 'garbage echo-key', 'failed' ], [ 'a retry', 'once:status=503 echo-key' ], [ 'a time-out', '', 'unknown', timeout => "'1 s'", gate => 'shut' ])
{
	my ($name, $mock, $end, %argument) = @$case;
	my $user = 'case' . ++$n;
	$node->safe_psql('postgres', "SELECT keyvault.store_api_key('openai', '" . key($user) . "', user_id => '$user')");
	leaves($name, key($user), $user, 0, mock => $mock, end => $end, %argument);
}
my $box = seal_key($node, 'sealed', key('sealed'));
$node->safe_psql('postgres', "SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => 'sealed')");
leaves('sealed key', key('sealed'), 'sealed', 0);
leaves('call key', key('once'), 'once', 0, api_key => "'" . key('once') . "'");
# Node speaks TLS wherever the tests run; Perl does not.
sub put_secret
{
	my ($user) = @_;
	my $content = JSON::PP::encode_json({ data => { api_key => key($user) } });
	local $ENV{NODE_TLS_REJECT_UNAUTHORIZED} = '0';
	return system_or_bail('node', '--no-warnings', '-e',
		"fetch('https://127.0.0.1:$vault/v1/secret/data/$user', { method: 'POST', headers: { 'X-Vault-Token': '$token' }, body: '$content' })"
		  . '.then((answer) => process.exit(answer.ok ? 0 : 1))');
}
foreach my $user (qw(fetched kept))
{
	put_secret($user);
	$node->safe_psql('postgres', "SELECT keyvault.store_api_key_reference('openai', 'vault:secret/$user#api_key', user_id => '$user')");
}
leaves('referenced key', key('fetched'), 'fetched', 0);
set_config($node, 'keyvault.reference_cache_ttl', '1h');
leaves('kept referenced key', key('kept'), 'kept', 1);
is(copies($token), 0, 'and no token');
ok(!-e "$directory/tls.secrets", 'the environment had no secrets of TLS recorded, nor anything sent through a proxy');
$node->stop;
done_testing();
