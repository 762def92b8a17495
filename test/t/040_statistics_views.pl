# Keys in the clear are in no statistics view, nor in the shared memory behind it, by whatever statement they come in.
#
# Every statement runs twice, each time with a key of its own: without redaction, where the
# key must be seen, or the statement would prove nothing; and with it.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

# KEY is the key, of no known provider's shape unless one stands before it. Utility statements keep their constants in pg_stat_statements.
my @statements = (
	[ 'SELECT', "SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'u')" ],
	[ 'dollar quotes', 'SELECT keyvault.store_api_key(\'exa\', $k$KEY$k$, user_id => \'u\')' ],
	[ 'several statements', "SELECT 1; SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'u'); SELECT 2" ],
	[ 'DO', "DO \$\$ BEGIN PERFORM keyvault.store_api_key('exa', 'KEY', user_id => 'u'); END \$\$" ],
	[ 'EXPLAIN', "EXPLAIN (COSTS off) SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'u')" ],
	[ 'PREPARE', "PREPARE p AS SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'u'); DEALLOCATE p" ],
	[ 'EXECUTE', "PREPARE p (text) AS SELECT keyvault.store_api_key('exa', \$1, user_id => 'u'); EXECUTE p('KEY'); DEALLOCATE p" ],
	[ 'CREATE TABLE AS', "CREATE TABLE made AS SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'u'); DROP TABLE made" ],
	[ 'COPY', "COPY (SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'u')) TO '/dev/null'" ],
	[ 'cursor', "BEGIN; DECLARE c CURSOR FOR SELECT keyvault.store_api_key('exa', 'KEY', user_id => 'u'); FETCH c; COMMIT" ],
	[ 'syntax error', "SELEC keyvault.store_api_key('exa', 'KEY', user_id => 'u')" ],
	[ 'run-time error', "SELECT keyvault.store_api_key('nosuch', 'KEY', user_id => 'u')" ],
	[ 'innocent function', "SELECT innocent('KEY')" ],
	[ 'CALL', q(CALL keyvault.call('exa', '{"query": "x"}', NULL, user_id => 'u', api_key => 'KEY')) ],
	[ 'SET', "SET app.key = 'sk-KEY'" ],
	[ 'long and then short', "SELECT keyvault.store_api_key('exa', /* " . 'x' x 300 . " */ 'KEY', user_id => 'u')" ],
);

my $port = start_mock();
my $n = 0;

# A key to look for: 24 characters, of which the middle ones are found nowhere else.
sub new_key { return sprintf 'marker-%08d-%08x', ++$n, int rand 0xffffffff }

sub statistics_files
{
	my ($node) = @_;
	return join '', map { slurp_file($_) } grep { -f } glob($node->data_dir . '/pg_stat*/*');
}

# Run a statement in an open session and look for its key everywhere; returns where it was found.
sub found_in
{
	my ($node, $session, $statement, $then) = @_;
	my $key = new_key();
	(my $text = $statement) =~ s/KEY/$key/g;
	# one message, not one for each statement
	$text =~ s/; /\\; /g unless $text =~ /^DO/;
	$session->query($text);
	my @found;
	push @found, 'pg_stat_activity'
		if $node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE '%' || reverse('" . reverse($key) . "') || '%'");
	$session->query('SELECT 1');
	my $memory = shared_memory(checkpointer($node));
	push @found, 'shared memory' if defined $memory && $memory =~ /\Q$key\E/;
	push @found, 'pg_stat_statements'
		if $node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_statements WHERE query LIKE '%' || reverse('" . reverse($key) . "') || '%'");
	push @found, 'files' if statistics_files($node) =~ /\Q$key\E/;
	return join ', ', @found;
}

# A session that goes on after an error.
sub open_session
{
	my ($node) = @_;
	return $node->background_psql('postgres', on_error_stop => 0);
}

for my $libraries ('keyvault,pg_stat_statements', 'pg_stat_statements,keyvault')
{
	my $name = $libraries =~ /^keyvault/ ? 'statistics_after' : 'statistics_before';
	my $node = new_node($name, init_only => 1, conf => <<"CONF");
shared_preload_libraries = '$libraries'
pg_stat_statements.track = all
shared_buffers = 2MB
log_statement = none
log_min_messages = panic
CONF
	$node->start;
	$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION keyvault CASCADE;
CREATE EXTENSION pg_stat_statements;
CREATE FUNCTION innocent(text) RETURNS uuid LANGUAGE plpgsql AS $$BEGIN RETURN keyvault.store_api_key('exa', $1, user_id => 'u'); END$$;
SELECT keyvault.upsert_user('u');
SQL
	use_mock($node, $port);
	set_config($node, 'keyvault.redact_logs', 'off');
	my $session = open_session($node);
	my %seen;
	for (@statements)
	{
		my $found = found_in($node, $session, $_->[1]);
		like($found, qr/pg_stat_activity/, "$libraries: $_->[0]: seen in pg_stat_activity without redaction");
		$seen{$_}++ for split /, /, $found;
	}
	$session->quit;
	# From 16 on constants of most utility statements are replaced.
	my $least = $node->pg_version < 16 ? 3 : 2;
	cmp_ok($seen{pg_stat_statements}, '>=', $least, "$libraries: statements seen in pg_stat_statements without redaction");
	cmp_ok($seen{files}, '>=', $least, "$libraries: and in its file");
	SKIP:
	{
		skip 'the memory of other processes is closed to us', 1 unless defined shared_memory(checkpointer($node));
		cmp_ok($seen{'shared memory'} // 0, '>=', 1, "$libraries: the end of a longer text stays in shared memory without redaction");
	}
	$node->safe_psql('postgres', 'SELECT pg_stat_statements_reset()');
	set_config($node, 'keyvault.redact_logs', undef);
	$session = open_session($node);
	is(found_in($node, $session, $_->[1]), '', "$libraries: $_->[0]: found nowhere") for @statements;
	$session->quit;
	is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'u') LIKE 'marker-%'"), 't', 'keys were stored all the same');

	# Where a savepoint's or a transaction's failure leaves the text for as long as the session waits.
	for ([ 'in a savepoint, a statement that does not parse', 'BEGIN; SAVEPOINT a', "SELEC keyvault.store_api_key('exa', 'KEY')" ],
		[ 'in a savepoint, a statement of a table that is not there', 'BEGIN; SAVEPOINT a', "SELECT keyvault.store_api_key('exa', 'KEY') FROM nowhere" ],
		[ 'in a transaction that has failed', 'BEGIN; SELECT 1/0', "SELECT keyvault.store_api_key('exa', 'KEY')" ])
	{
		my ($what, $before, $statement) = @$_;
		# Only the log hook hears of that one.
		set_config($node, 'log_min_messages', 'error') if $before =~ m{1/0};
		$session = open_session($node);
		$session->query($before);
		is(found_in($node, $session, $statement), '', "$libraries: $what: found nowhere");
		$session->quit;
	}

	# While it runs, not only when it has ended; a text without a literal is left to see.
	my $key = new_key();
	$session = open_session($node);
	$session->query_until(qr/now/, "\\echo now\nSELECT keyvault.store_api_key('exa', '$key', user_id => 'u'), pg_sleep(60);\n");
	my $running = q(SELECT query FROM pg_stat_activity WHERE wait_event = 'PgSleep');
	ok(wait_until(sub { $node->safe_psql('postgres', $running) ne '' }), 'a statement runs');
	is($node->safe_psql('postgres', $running), '[withheld by keyvault]', 'its text is withheld');
	$node->safe_psql('postgres', q(SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'));
	$session->quit;
	$session = $node->background_psql('postgres');
	$session->query_safe('PREPARE lookup (text, text) AS SELECT keyvault.user_api_key($1, $2)');
	is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'PREPARE%$1, $2)%' AND pid <> pg_backend_pid()}),
		'1', 'a text without a literal is not withheld');
	$session->quit;
	$node->stop;
	unlike(statistics_files($node), qr/marker-\d{8}-/, "$libraries: nothing in the files of a stopped server");
}

done_testing();
