# A name that the resolver is slow to look up holds up its own call alone: not the worker, not a session, not the end of either.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

# A library that is loaded before libc has the name hangs.test looked up for as long as a file is not there, or 20 seconds;
# mock.test is where the stand-in is.
my $directory = PostgreSQL::Test::Utils::tempdir;
my $library = "$directory/resolver.so";
write_secret("$directory/resolver.c", <<"C");
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <string.h>
#include <unistd.h>

static void
note(const char *path)
{
	int			fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

	(void) !write(fd, ".", 1);
	close(fd);
}

int
getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **result)
{
	int			(*next) (const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");

	if (host && strcmp(host, "mock.test") == 0)
		return next("127.0.0.1", service, hints, result);
	if (host == NULL || strcmp(host, "hangs.test") != 0)
		return next(host, service, hints, result);
	note("$directory/entered");
	for (int i = 0; i < 1000 && access("$directory/gate", F_OK) != 0; i++)
		usleep(20000);
	note("$directory/left");
	return EAI_NONAME;
}
C
plan skip_all => 'AddressSanitizer wants to be loaded first' if $ENV{KV_SANITIZER};
plan skip_all => 'before 7.87 libcurl waits for its resolver' if hex(substr `curl-config --vernum`, 0, 6) < 0x075700;
system_or_bail('cc', '-shared', '-fPIC', '-o', $library, "$directory/resolver.c", '-ldl');

my $port = start_mock();
my $node = new_node('resolver', init_only => 1, conf => <<"CONF");
keyvault.max_attempts = 1
keyvault.vault_token_file = '${\ write_secret("$directory/token", "a-token\n") }'
CONF
{
	local $ENV{LD_PRELOAD} = $library;
	$node->start;
}
$node->safe_psql('postgres', 'CREATE EXTENSION keyvault CASCADE');
use_mock($node, $port);
$node->safe_psql('postgres', "UPDATE keyvault.providers SET base_url = 'https://hangs.test', allowed_host = NULL WHERE provider = 'anthropic';
	UPDATE keyvault.providers SET base_url = 'http://mock.test:$port', allowed_host = 'mock.test:$port' WHERE provider = 'openai'");

sub count_of
{
	my ($what) = @_;
	return -s "$directory/$what" // 0;
}

# Queue calls to a host whose name is not found; returns the last one's id when their lookups are under way.
sub hang
{
	my ($timeout, $calls) = @_;
	my $before = count_of('entered');
	my $ids = $node->safe_psql('postgres',
		"SELECT keyvault.request('anthropic', " . chat('hello') . ", user_id => 'hanging', timeout => '$timeout') FROM generate_series(1, $calls)");
	ok(wait_until(sub { count_of('entered') >= $before + $calls }), "$calls lookups hang");
	return (split /\n/, $ids)[-1];
}

my $request = hang('300 ms', 1);
ends_as($node, $request, 'failed', 'a call ends when its time is over');
ends_as($node, queue_request($node, 'other', 'hello'), 'done', q(another user's call is answered));
is(count_of('left'), 0, 'meanwhile');

# libcurl has 20 threads for lookups of its own accord.
hang('60 s', 25);
ends_as($node, queue_request($node, 'other', 'hello'), 'done', 'another name is looked up');
is(count_of('left'), 0, 'meanwhile');
my $pid = worker_pid($node);
$node->safe_psql('postgres', "SELECT pg_terminate_backend($pid)");
ok(wait_until(sub { !kill 0, $pid }), 'the worker can be ended');
is(count_of('left'), 0, 'meanwhile');

# A session, which asks the Vault server for the master key.
my $file = $node->safe_psql('postgres', 'SHOW keyvault.master_key_file');
my $look_up = "SELECT keyvault.store_api_key('openai', 'sk-of-a-session-0123456789', user_id => 'session')";
my %transit = ('keyvault.vault_address' => 'https://hangs.test', 'keyvault.vault_transit_key' => 'transit/keyvault',
	'keyvault.master_key_file' => write_secret("$directory/wrapped", "vault:v1:AAAA\n"));
set_config($node, $_, $transit{$_}) foreach sort keys %transit;
set_config($node, 'keyvault.master_key_timeout', '300ms');
is(state_of($node, $look_up), 'KV004', 'a session is told that the Vault server is not reached in time');
set_config($node, 'keyvault.master_key_timeout', '60s');
is(state_of($node, "SET statement_timeout = '300ms'; $look_up"), '57014', 'or ends its lookup when it is canceled');
is(count_of('left'), 0, 'meanwhile');

# What the threads that were left behind find when they come back.
write_secret("$directory/gate", '');
$node->safe_psql('postgres', "ALTER SYSTEM RESET $_") foreach 'keyvault.vault_address', 'keyvault.vault_transit_key';
set_config($node, 'keyvault.master_key_file', $file);
$request = hang('60 s', 1);
ends_as($node, $request, 'failed', 'a name that does not exist ends its call');
ends_as($node, queue_request($node, 'other', 'hello'), 'done', 'others go on');
$node->stop;
unlike(slurp_file($node->logfile), qr/was terminated by signal|PANIC/, 'no process has crashed');
done_testing();
