# More calls at once than the server may open files for: the others wait, none fails.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('open_files', init_only => 1, conf => <<'CONF');
keyvault.max_concurrent_requests = 1000
keyvault.max_concurrent_requests_per_user = 1000
keyvault.per_host_connections = 1000
keyvault.max_attempts = 1
log_statement = none
CONF
# What this process may open, its children may.
plan skip_all => 'no prlimit' if system('prlimit', '--pid', $$, '--nofile=160:') != 0;
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION keyvault CASCADE');
use_mock($node, $port);

sub count_of
{
	my ($status) = @_;
	return $node->safe_psql('postgres', "SELECT count(*) FROM keyvault.requests WHERE status = '$status'");
}

$node->safe_psql('postgres', "SELECT keyvault.request('openai', " . chat('[[mock: gate=files]]') . ", user_id => 'user' || n) FROM generate_series(1, 300) n");
my $places = 0;
ok(wait_until(sub {
		($places) = slurp_file($node->logfile) =~ /max_concurrent_requests is 1000, but the limit of open files is enough for (\d+) calls at once/;
	}), 'the log says how many calls there can be') or BAIL_OUT('no limit');
ok(wait_until(sub { mock_received($port, 'gate=files') >= $places }), 'as many are under way');
is(count_of('queued'), 300 - $places, 'the others wait');
mock_open($port, 'files');
ok(wait_until(sub { count_of('done') + count_of('failed') == 300 }), 'all end');
is(count_of('done'), 300, 'well');
ok(slurp_file($node->logfile) !~ /Too many open files|out of file descriptors/, 'no file was one too many');
$node->stop;
done_testing();
