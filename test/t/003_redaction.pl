# No key gets out: every way to hand one over, under every kind of log, and then each file that the server has written.
use strict;
use warnings FATAL => 'all';
use File::Find;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('leaks', conf => <<'CONF');
logging_collector = on
log_destination = 'stderr,csvlog,jsonlog'
log_statement = all
log_min_duration_statement = 0
log_parameter_max_length = -1
log_parameter_max_length_on_error = -1
log_min_error_statement = debug5
log_min_messages = info
log_error_verbosity = verbose
shared_preload_libraries = 'keyvault,auto_explain'
auto_explain.log_min_duration = 0
auto_explain.log_verbose = on
auto_explain.log_analyze = on
auto_explain.log_nested_statements = on
deadlock_timeout = 50ms
restart_after_crash = on
CONF
use_mock($node, $port);

# Markers have the shape of no known provider's key; the road that leaked is named after them.
my %road;
my $count = 0;

sub marker
{
	my ($road) = @_;
	my $marker = sprintf 'qz%03dvx%s', ++$count, join '', map { chr(97 + int rand 26) } 1 .. 16;
	$road{$marker} = $road;
	return $marker;
}

# Run SQL in which KEY stands for a fresh marker; errors are part of the road.
sub travel
{
	my ($road, $sql, %option) = @_;
	my $marker = marker($road);
	$sql =~ s/KEY/$marker/g;
	$node->psql('postgres', $sql, on_error_stop => 0, %option);
	return;
}

$node->safe_psql('postgres', <<'SQL');
CREATE TABLE staging (provider text, key text);
CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM keyvault.store_api_key(NEW.provider, NEW.key, user_id => 'leaks'); RETURN NULL; END $$;
CREATE TRIGGER keep BEFORE INSERT ON staging FOR EACH ROW EXECUTE FUNCTION keep();
CREATE FUNCTION innocent(text) RETURNS uuid LANGUAGE plpgsql AS $$
BEGIN RETURN keyvault.store_api_key('exa', $1, 'wrapped', 'leaks'); END $$;
CREATE FUNCTION innocent_dynamic(text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN EXECUTE format('SELECT keyvault.store_api_key(%L, %L, user_id => %L)', 'exa', $1, 'leaks'); END $$;
SQL

travel('literal', q(SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'leaks')));
travel('escape string', q(SELECT keyvault.store_api_key('exa', E'KEY', user_id => 'leaks')));
travel('dollar quotes', q(SELECT keyvault.store_api_key('exa', $q$KEY$q$, user_id => 'leaks')));
travel('comment with an apostrophe', q(SELECT /* don't */ keyvault.store_api_key('exa', 'KEY', user_id => 'leaks')));
travel('alias with an apostrophe', q(SELECT 1 AS "it's", keyvault.store_api_key('exa', 'KEY', user_id => 'leaks')));
travel('identifier with dollars', q(SELECT 1 AS a$x$, keyvault.store_api_key('exa', 'w$x$KEY', user_id => 'leaks')));
travel('non-standard strings', q(SET standard_conforming_strings = off; SELECT 'it\'s', keyvault.store_api_key('exa', 'KEY', user_id => 'leaks')));
travel('quoted names', q(SELECT "keyvault"."store_api_key"('exa', 'KEY', 'default', 'leaks')));
travel('escaped names', q(SELECT keyvault.U&"store\005fapi\005fkey"('exa', 'KEY', 'default', 'leaks')));
travel('search_path', q(SET search_path = keyvault; SELECT store_api_key('exa', 'KEY', user_id => 'leaks')));
travel('platform key', q(SELECT keyvault.store_platform_key('exa', 'KEY')));
travel('DO', q(DO $$BEGIN PERFORM keyvault.store_api_key('exa', 'KEY', user_id => 'leaks'); END$$));
# What log_statement prints before a statement runs is known to be sensitive by its text alone: a wrapper's
# call is not (doc/keyvault.md says so). All that is logged once the function has run is withheld.
travel('wrapper function', q(SET log_statement = none; SELECT innocent('KEY')));
travel('wrapper with dynamic SQL', q(SET log_statement = none; SELECT innocent_dynamic('KEY')));
travel('several statements', q(SELECT 1; SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'leaks'); SELECT 2));
travel('cursor', q(BEGIN; DECLARE c CURSOR FOR SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'leaks'); FETCH c; COMMIT));
travel('EXPLAIN', q(EXPLAIN (ANALYZE, VERBOSE) SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'leaks')));
travel('PREPARE and EXECUTE', q(PREPARE p AS SELECT keyvault.store_api_key('exa', $1, user_id => 'leaks'); EXECUTE p('KEY')));
travel('EXECUTE with a comment', q(PREPARE p AS SELECT keyvault.store_api_key('exa', $1, user_id => 'leaks'); EXECUTE/**/p('KEY')));
travel('EXECUTE with too many arguments', q(PREPARE p AS SELECT keyvault.store_api_key('exa', $1, user_id => 'leaks'); EXECUTE "p"('KEY', 'x')));
travel('COPY and a trigger', "COPY staging FROM stdin;\nexa\tKEY\n\\.\n");
travel('COPY of a malformed key', "COPY staging FROM stdin;\nexa\tKEY with a space\n\\.\n");
travel('INSERT and a trigger', q(SET log_statement = none; INSERT INTO staging VALUES ('exa', 'KEY')));
travel('a key for one call', q(SELECT keyvault.request('openai', '{}', user_id => 'leaks', api_key => 'KEY')));
travel('a key for one call, by position', q(SELECT keyvault.request('openai', '{}', NULL, NULL, 'leaks', 'auto', 'KEY')));
travel('quoted request', q(SELECT "keyvault"."request"('openai', '{}', NULL, NULL, 'leaks', 'auto', 'KEY')));
travel('request and a comment', q(SELECT keyvault.request/* /* */ */('openai', '{}', NULL, NULL, 'leaks', 'auto', 'KEY')));
travel('call', q(CALL keyvault.call('openai', '{"messages": []}', NULL, user_id => 'leaks', api_key => 'KEY')));
travel('an answer that echoes the key', q(CALL keyvault.call('openai', '{"messages": [{"role": "user", "content": "[[mock: echo-key]]"}]}', NULL, user_id => 'leaks', api_key => 'KEY')));
travel('a refused key', q(CALL keyvault.call('openai', '{"messages": [{"role": "user", "content": "[[mock: status=401]]"}]}', NULL, user_id => 'leaks', api_key => 'KEY')));
# errors
travel('malformed', q(SELECT keyvault.store_api_key('exa', 'KEY with a space', user_id => 'leaks')));
travel('arguments swapped', q(SELECT keyvault.store_api_key('KEY', 'exa', user_id => 'leaks')));
travel('as a name', q(SELECT keyvault.store_api_key('exa', 'exa-key-0', 'KEYKEYKEYKEY', 'leaks')));
travel('as a time', q(SELECT keyvault.store_api_key('exa', 'exa-key-0', user_id => 'leaks', expires_at => 'KEY')));
travel('as a body', q(SELECT keyvault.request('openai', 'KEY', user_id => 'leaks', api_key => 'exa-key-0')));
travel('syntax error', q(SELECT keyvault.store_api_key('exa', 'KEY' user_id => 'leaks')));
travel('broken quotes', q(SELECT keyvault.store_api_key('exa', 'it's KEY', user_id => 'leaks')));
travel('no such function', q(SELECT keyvault.store_api_key('exa', 'KEY', 1, 2, 3)));
travel('read back into a number', q(SELECT keyvault.store_api_key('exa', 'KEY', 'back', 'leaks'); SELECT keyvault.user_api_key('exa', 'leaks', 'back')::int));
travel('read back in plpgsql', q(SELECT keyvault.store_api_key('exa', 'KEY', 'back', 'leaks');
DO $$DECLARE k text; i int; BEGIN k := keyvault.user_api_key('exa', 'leaks', 'back'); i := k::int; END$$));
travel('debug_print', q(SET debug_print_parse = on; SET debug_print_plan = on; SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'leaks')));
travel('debug_print and a wrapper', q(SET log_statement = none; SET debug_print_plan = on; SELECT innocent('KEY')));
travel('two-phase commit', q(BEGIN; SELECT keyvault.store_api_key('exa', 'KEY', 'two-phase', 'leaks'); ROLLBACK));
travel("a known prefix in somebody else's statement", q(SELECT 'sk-proj-KEY', E'\nAIzaKEY', 'xan_live_KEY'));

# Bind parameters, of unnamed and named prepared statements.
foreach my $mode ('extended', 'prepared')
{
	my $key = marker("bind parameter, $mode");
	my $bad = marker("bind parameter of an error, $mode");
	my $script = PostgreSQL::Test::Utils::tempdir . "/$mode.sql";
	append_to_file($script, q(SELECT keyvault.store_api_key('exa', :key, user_id => 'leaks');
SELECT "keyvault"."request"('openai', '{}', NULL, NULL, 'leaks', 'auto', :key);
SELECT keyvault.store_api_key('exa', 'exa-key-0', user_id => 'leaks', expires_at => :bad);
));
	$node->command_checks_all(
		[ 'pgbench', '-n', '-t', 1, '-M', $mode, '-D', "key=$key", '-D', "bad=$bad", '-f', $script, '-p', $node->port, '-h', $node->host, 'postgres' ],
		2, [], [], "bind parameters, $mode");
}

# A deadlock report prints the statement of another session.
{
	my @run;
	$node->safe_psql('postgres', 'CREATE TABLE lock_a (); CREATE TABLE lock_b ()');
	foreach my $tables ([ 'lock_a', 'lock_b' ], [ 'lock_b', 'lock_a' ])
	{
		my ($out, $err);
		my $sql = "BEGIN; LOCK $tables->[0]; SELECT pg_sleep(1); DO \$\$BEGIN PERFORM 'a secret'; LOCK $tables->[1]; END\$\$;";
		push @run, IPC::Run::start([ 'psql', '-X', '-h', $node->host, '-p', $node->port, '-d', 'postgres', '-c', $sql ], '>', \$out, '2>', \$err);
	}
	$_->finish foreach @run;
	like(slurp_logs(), qr/deadlock detected/, 'there was a deadlock');
	unlike(slurp_logs(), qr/Process \d+: BEGIN/, 'its report prints no statement');
}

# So does the postmaster's report of a crash.
{
	my $key = marker('crash');
	my ($out, $err);
	my $sleeper = IPC::Run::start([ 'psql', '-X', '-h', $node->host, '-p', $node->port, '-d', 'postgres',
		'-c', 'SET log_statement = none', '-c', "SELECT innocent('$key'), pg_sleep(60)" ], '>', \$out, '2>', \$err);
	my $pid;
	ok(wait_until(sub { $pid = $node->safe_psql('postgres', q(SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep')) }), 'a session sleeps behind a key');
	kill 'KILL', $pid;
	$sleeper->finish;
	ok(wait_until(sub { $node->psql('postgres', 'SELECT 1') == 0 }), 'the server is back after a crash');
	like(slurp_logs(), qr/terminated by signal 9/, 'the crash is reported');
}

# Controls: what is no secret is found, in each kind of file.
my $in_log = marker('control');
my $in_table = marker('control');
delete @road{ $in_log, $in_table };
$node->safe_psql('postgres', "SELECT '$in_log'");
$node->safe_psql('postgres', "CREATE TABLE plain AS SELECT 'qz'::text || substr('$in_table', 3) AS key");
$node->safe_psql('postgres', 'CHECKPOINT');
$node->stop;

sub slurp_logs
{
	return join '', map { slurp_file($_) } glob($node->data_dir . '/log/*.log'), glob($node->data_dir . '/log/*.csv'), glob($node->data_dir . '/log/*.json'), $node->logfile;
}

my %found;
find({ no_chdir => 1, wanted => sub {
	return unless -f $_ && !-l $_;
	my $content = slurp_file($_);
	my $kind = m{/log/.*\.(\w+)$} ? "log $1" : m{/pg_wal/} ? 'WAL' : m{/base/} ? 'heap' : 'other';
	foreach my $marker (keys %road, $in_log, $in_table)
	{
		push @{ $found{$marker} }, $kind if index($content, $marker) >= 0;
	}
} }, $node->data_dir);
foreach my $kind ('log log', 'log csv', 'log json')
{
	ok(scalar(grep { $_ eq $kind } @{ $found{$in_log} // [] }), "control: an ordinary literal is in the $kind");
}
foreach my $kind ('heap', 'WAL')
{
	ok(scalar(grep { $_ eq $kind } @{ $found{$in_table} // [] }), "control: an ordinary value is in the $kind");
}
foreach my $marker (sort keys %road)
{
	my %kinds = map { $_ => 1 } @{ $found{$marker} // [] };
	is(join(', ', sort keys %kinds), '', "$road{$marker}: nowhere");
}
cmp_ok(scalar(keys %road), '>=', 45, 'the roads are many');

done_testing();
