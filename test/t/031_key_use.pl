# Uses of keys are noted without a write per use, and written in batches: none lost, none counted twice.
use strict;
use warnings FATAL => 'all';
use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
# Nothing is flushed but by request: the interval is a day, and a worker stays.
my $node = new_node('key_use', init => { allows_streaming => 1 },
	conf => "keyvault.key_use_flush_interval = '1d'\nkeyvault.worker_idle_timeout = '1d'\nautovacuum = off\n");
use_mock($node, $port);
$node->safe_psql('postgres', "SELECT keyvault.store_api_key(p, 'key-of-' || u || '-for-' || p, user_id => u) FROM unnest('{a,b,c}'::text[]) u, unnest('{exa,mistral}'::text[]) p");

sub uses
{
	return $node->safe_psql('postgres',
		"SELECT string_agg(user_id || ' ' || provider || ' ' || use_count, ', ' ORDER BY user_id, provider) FROM keyvault.api_keys WHERE use_count > 0 AND user_id <> ''");
}
sub flush { return $node->safe_psql('postgres', 'SELECT keyvault._flush_key_use()') }

is(uses(), '', 'storing a key is no use');
$node->safe_psql('postgres', <<'SQL');
SELECT keyvault.user_api_key('exa', 'a');
BEGIN READ ONLY;
SELECT keyvault.user_api_keys('a');
COMMIT;
BEGIN;
SELECT keyvault.user_api_key('exa', 'b');
ROLLBACK;
SELECT keyvault.user_api_key('exa', 'nobody'), keyvault.user_api_key('openai', 'a');
SQL
is($node->safe_psql('postgres', "BEGIN; SELECT keyvault.user_api_key('exa', 'b'); SELECT pg_current_xact_id_if_assigned() IS NULL; COMMIT"),
	"key-of-b-for-exa\nt", 'a lookup writes nothing');
is(uses(), '', 'nor does the end of its transaction');
is(flush(), '3', 'a flush writes what was noted');
is(uses(), 'a exa 2, a mistral 1, b exa 2', 'every use, those of a read only and of a rolled back transaction too');
is($node->safe_psql('postgres', "SELECT count(*) FROM keyvault.api_keys WHERE last_used_at BETWEEN now() - interval '1 minute' AND now()"), '3',
	'and when it was');
is(flush(), '0', 'once');
is($node->safe_psql('postgres', "SELECT use_count FROM keyvault.api_key_status WHERE user_id = 'a' AND provider = 'exa'"), '2', 'the view shows it');

# A flush that fails loses nothing.
$node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'a')");
is($node->safe_psql('postgres', "BEGIN; SELECT keyvault._flush_key_use(); ROLLBACK"), '1', 'a flush that is rolled back');
is(uses(), 'a exa 2, a mistral 1, b exa 2', 'writes nothing');
is($node->safe_psql('postgres', "BEGIN; SAVEPOINT s; SELECT keyvault._flush_key_use(); ROLLBACK TO s; COMMIT"), '1', 'so does one in a savepoint, and the note is still there');
is($node->safe_psql('postgres', "BEGIN; SAVEPOINT s; SELECT keyvault._flush_key_use(); RELEASE s; ROLLBACK"), '1', 'and one in a released savepoint');
is(flush(), '1', 'the next one has it');
is(uses(), 'a exa 3, a mistral 1, b exa 2', 'once');

# Rows that somebody has locked wait.
$node->safe_psql('postgres', "SELECT keyvault.user_api_keys('a')");
my ($in, $out, $err) = ('', '', '');
my $session = IPC::Run::start([ 'psql', '-XAtq', '-f', '-', '-d', $node->connstr('postgres') ], '<', \$in, '>', \$out, '2>', \$err);
$in .= "BEGIN; SELECT 'locked' FROM keyvault.api_keys WHERE user_id = 'a' AND provider = 'exa' FOR UPDATE;\n";
$session->pump until $out =~ /locked/;
is(flush(), '1', 'a flush passes over a locked row');
$in .= "ROLLBACK; SELECT 'free';\n";
$session->pump until $out =~ /free/;
is(flush(), '1', 'and writes it when it is free');
is(uses(), 'a exa 4, a mistral 2, b exa 2', 'each once');
$node->safe_psql('postgres', "SELECT keyvault.user_api_key('mistral', 'a'); SELECT keyvault.delete_api_key('mistral', user_id => 'a')");
flush();
is(flush(), '0', 'the use of a key that is gone is forgotten');

# Many sessions, and parallel workers.
my ($code) = run_pgbench($node, [ '-c', '8', '-j', '2', '-t', '200' ], [ 1, "SELECT keyvault.user_api_key('exa', 'c');\nSELECT keyvault.user_api_keys('b');\n" ]);
is($code, 0, 'eight sessions look up');
flush();
is(uses(), 'a exa 4, b exa 1602, b mistral 1600, c exa 1600', 'and every use is counted');
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE many WITH (parallel_workers = 2) AS SELECT 'mistral' AS provider FROM generate_series(1, 100);
SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0; SET parallel_leader_participation = off;
SELECT count(keyvault.user_api_key(provider, 'c')) FROM many;
SQL
flush();
is(uses(), 'a exa 4, b exa 1602, b mistral 1600, c exa 1600, c mistral 100', 'those of parallel workers too');

# More keys in one transaction than a process notes by itself.
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('cohere', 'key-of-many-' || i, 'many' || i, user_id => 'm') FROM generate_series(1, 200) i");
$node->safe_psql('postgres', "SELECT count(keyvault.user_api_key('cohere', 'm', 'many' || i)) FROM generate_series(1, 200) i, generate_series(1, 2)");
is(flush(), '200', 'many keys in one transaction');
is($node->safe_psql('postgres', "SELECT min(use_count), max(use_count) FROM keyvault.api_keys WHERE user_id = 'm'"), '2|2', 'each counted');

# The worker's calls.
my $id = queue_request($node, 'caller', 'on the platform');
ends_as($node, $id, 'done', 'a call');
flush();
is($node->safe_psql('postgres', "SELECT use_count FROM keyvault.api_keys WHERE user_id = '' AND provider = 'openai'"), '1', 'a call is a use');

# A standby reads, and notes nothing.
$node->backup('copy');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'copy', has_streaming => 1);
$standby->start;
is($standby->safe_psql('postgres', "SELECT keyvault.user_api_keys('b')"), '{"exa": "key-of-b-for-exa", "mistral": "key-of-b-for-mistral"}', 'a standby looks up');
is($standby->safe_psql('postgres', "BEGIN READ ONLY; SELECT keyvault.user_api_key('exa', 'b')"), 'key-of-b-for-exa', 'in a READ ONLY transaction, too');
$standby->promote;
is($standby->safe_psql('postgres', 'SELECT keyvault._flush_key_use()'), '0', 'and had noted nothing');
$standby->stop('immediate');

# By itself: the first note wakes the launcher, and that the worker, one that runs or a new one.
set_config($node, 'keyvault.key_use_flush_interval', '0');
isnt(worker_pid($node), '', 'with a worker that runs');
$node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'a')");
ok(wait_until(sub { uses() =~ /^a exa 5,/ }), 'a use is written by the worker');
set_config($node, 'keyvault.worker_idle_timeout', '0');
wait_until(sub { worker_pid($node) eq '' });
$node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'a')");
ok(wait_until(sub { uses() =~ /^a exa 6,/ }), 'with no worker one is started for it');
wait_until(sub { worker_pid($node) eq '' });
set_config($node, 'keyvault.databases', 'another_database');
$node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'a')");
ok(wait_until(sub { uses() =~ /^a exa 7,/ }), 'in a database whose requests are not sent, too');
set_config($node, 'keyvault.key_use_flush_interval', '1d');
wait_until(sub { worker_pid($node) eq '' });

# A worker that leaves takes the notes along.
set_config($node, 'keyvault.databases', undef);
wait_until(sub { worker_pid($node) eq '' });
$node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'a')");
ends_as($node, queue_request($node, 'caller', 'wakes a worker'), 'done', 'a call starts a worker');
ok(wait_until(sub { uses() =~ /^a exa 8,/ }), 'which writes the uses before it leaves');

# A table that is too small loses uses, and no lookup fails.
$node->append_conf('postgresql.conf', "keyvault.key_use_table_size = 16\n");
$node->restart;
is($node->safe_psql('postgres', "SELECT count(keyvault.user_api_key('cohere', 'm', 'many' || i)) FROM generate_series(1, 200) i"), '200', 'more keys than the table takes');
ok(wait_until(sub { $node->safe_psql('postgres', "SELECT count(*) FROM keyvault.api_keys WHERE user_id = 'm' AND use_count = 3") >= 16 }),
	'those that it takes are written within seconds, though the interval is a day');
$node->append_conf('postgresql.conf', "keyvault.key_use_table_size = 0\n");
$node->restart;
is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'a'); SELECT keyvault._flush_key_use()"), "key-of-a-for-exa\n0", 'without a table nothing is noted');
$node->stop;

done_testing();
