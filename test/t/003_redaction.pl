# Keys in the clear reach no log and no file, by whatever road they come in or go out.
#
# Every road is taken three times, each time with keys of its own: without redaction, where
# the log must have them, or the road would prove nothing; with it; and with it in another
# language. Then all that the server has written is searched.
use strict;
use warnings FATAL => 'all';
use File::Find ();
use IPC::Run ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $master_key = new_master_key();
my $node = new_node('redaction', master_key => $master_key, init_only => 1, conf => <<'CONF');
shared_preload_libraries = 'keyvault,auto_explain'
logging_collector = on
log_destination = 'stderr,csvlog,jsonlog'
log_filename = 'server.log'
log_statement = all
log_min_duration_statement = 0
log_parameter_max_length = -1
log_parameter_max_length_on_error = -1
log_min_messages = info
log_min_error_statement = info
log_error_verbosity = verbose
log_lock_waits = on
auto_explain.log_min_duration = 0
auto_explain.log_analyze = on
auto_explain.log_verbose = on
auto_explain.log_nested_statements = on
restart_after_crash = on
autovacuum = off
CONF
{
	# glibc takes translations from here for every locale but C.
	local $ENV{LANGUAGE} = 'de';
	$node->start;
}
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION keyvault CASCADE;
CREATE TABLE ordinary (t text);
CREATE TABLE locks (id integer PRIMARY KEY, n integer DEFAULT 0);
INSERT INTO locks VALUES (1), (2);
CREATE FUNCTION bump(integer) RETURNS void LANGUAGE plpgsql AS 'BEGIN UPDATE locks SET n = n + 1 WHERE id = $1; END';
CREATE FUNCTION innocent(text) RETURNS uuid LANGUAGE plpgsql AS $$BEGIN RETURN keyvault.store_api_key('exa', $1, user_id => 'u'); END$$;
CREATE FUNCTION innocent_sql(text) RETURNS uuid LANGUAGE sql AS $$SELECT keyvault.store_api_key('exa', $1, user_id => 'u')$$;
CREATE FUNCTION innocent_number() RETURNS integer LANGUAGE plpgsql AS $$BEGIN RETURN keyvault.user_api_key('exa', 'u'); END$$;
CREATE VIEW innocent_view AS SELECT keyvault.user_api_key('exa', 'u') AS t;
CREATE TABLE staging (owner text, what text);
CREATE FUNCTION unstage() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	PERFORM keyvault.store_api_key('exa', NEW.what, user_id => NEW.owner);
	RETURN NULL;
END$$;
CREATE TRIGGER unstage BEFORE INSERT ON staging FOR EACH ROW EXECUTE FUNCTION unstage();
SQL
use_mock($node, $port);

# Only what the road itself writes, nothing that logs whole statements.
my @silent = qw(log_statement=none log_min_duration_statement=-1 auto_explain.log_min_duration=-1);

my ($mode, $road);
my %road_of;	# half of a marker => where it belongs
my %shown;		# road => what of it was found where

# A new key. Its halves are searched for one by one, as half a key is a leak, too.
sub key
{
	my ($prefix) = @_;
	my @halves = map { join '', map { ('a' .. 'z', 0 .. 9)[ rand 36 ] } 1 .. 9 } 1, 2;
	$road_of{$_} = "$mode: $road" foreach @halves;
	return ($prefix // '') . "Qz7$halves[0]Xk4$halves[1]";
}

# Each string is one message to the server, sent as it stands, all in one session.
sub run_sql
{
	my ($options, @strings) = @_;
	local $ENV{PGOPTIONS} = join ' ', map { "-c $_" } @$options;
	my ($out, $err) = ('', '');
	IPC::Run::run([ 'psql', '-XAtq', (map { ('-c', $_) } @strings), $node->connstr('postgres') ], '<', \'', '>', \$out, '2>', \$err);
	return $err;
}

sub run_with_parameters
{
	my ($protocol, $key, $sql) = @_;
	return (run_pgbench($node, [ '-M', $protocol, '-t', '1', '-D', "key=$key" ], [ 1, "$sql;\n" ]))[2];
}

# A literal that stores a key in the usual way.
sub store
{
	my ($literal) = @_;
	return "keyvault.store_api_key('exa', $literal, user_id => 'u')";
}

sub checkpointer
{
	my ($out, $err) = ('', '');
	$node->psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'", stdout => \$out, stderr => \$err);
	return $out;
}

# A backend dies while it runs a statement: the postmaster reports what that was.
sub crash
{
	my ($signal, $key) = @_;
	local $ENV{PGOPTIONS} = join ' ', map { "-c $_" } @silent;
	my ($out, $err) = ('', '');
	my $sql = 'SELECT ' . store("'$key'") . ', pg_sleep(60)';
	my $psql = IPC::Run::start([ 'psql', '-XAtq', '-c', $sql, $node->connstr('postgres') ], '<', \'', '>', \$out, '2>', \$err);
	my $pid = '';
	wait_until(sub { $pid = $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'") })
		or die 'the statement does not run';
	my $before = checkpointer();
	kill $signal, $pid;
	$psql->finish;
	wait_until(sub { checkpointer() !~ /^(|$before)$/ }) or die 'the server does not come back';
	return $err;
}

# Two sessions wait for each other; the second one notices, and logs both statements.
sub deadlock
{
	my ($first_key, $second_key) = @_;
	my @session;
	foreach my $timeout ('60s', '10ms')
	{
		local $ENV{PGOPTIONS} = join ' ', map { "-c $_" } @silent, "deadlock_timeout=$timeout";
		push @session, $node->background_psql('postgres', on_error_stop => 0);
	}
	$session[$_]->query_safe('BEGIN; SELECT bump(' . ($_ + 1) . ')') foreach 0, 1;
	my $store = "keyvault.store_api_key('exa', '%s', user_id => 'deadlock%d')";
	$session[0]->query_until(qr/waiting/, "\\echo waiting\nSELECT " . sprintf($store, $first_key, 1) . ", bump(2);\n");
	wait_until(sub { $node->safe_psql('postgres', 'SELECT count(*) FROM pg_locks WHERE NOT granted') ne '0' }) or die 'no wait';
	$session[1]->query('SELECT ' . sprintf($store, $second_key, 2) . ', bump(1)');
	my $error = $session[1]->{stderr};
	$session[1]->quit;
	$session[0]->query('COMMIT');
	$session[0]->quit;
	return $error;
}

# Store a key, then have a statement fail on it.
sub read_back
{
	my ($sql) = @_;
	my $key = key();
	run_sql(\@silent, 'SELECT ' . store("'$key'"));
	return run_sql([], $sql);
}

# A call whose answer repeats the key.
sub echo
{
	my ($directive, %argument) = @_;
	my $key = key();
	$node->safe_psql('postgres', "SELECT keyvault.store_api_key('openai', '$key', user_id => 'echo')");
	my $id = queue_request($node, 'echo', "[[mock: echo-key $directive]]");
	$node->safe_psql('postgres', "SELECT status FROM keyvault.wait_response('$id', '60 s')");
	return $node->safe_psql('postgres', "SELECT status, body FROM keyvault.responses WHERE id = '$id'");
}

my $innocent = [ 'log_statement=none' ];
my $debug = [ qw(debug_print_parse=on debug_print_rewritten=on debug_print_plan=on log_statement_stats=on) ];

# The roads: name, what to do, and what its outcome must look like, which shows that it was the road meant.
my @roads = (
	[ 'a literal', sub { run_sql([], 'SELECT ' . store("'" . key() . "'")) }, qr/^$/ ],
	[ 'a literal of several lines', sub { my $k = key(); run_sql([], 'SELECT ' . store("'" . substr($k, 0, 12) . "'\n'" . substr($k, 12) . "'")) }, qr/^$/ ],
	[ 'an E string', sub { run_sql([], 'SELECT ' . store(q(E'\x61) . key() . "'")) }, qr/^$/ ],
	[ 'a U& string', sub { run_sql([], 'SELECT ' . store(q(U&'\0061) . key() . "'")) }, qr/^$/ ],
	[ 'dollar quotes', sub { run_sql([], 'SELECT ' . store('$$' . key() . '$$') . ', ' . store('$it$' . key() . '$it$')) }, qr/^$/ ],
	[ 'an apostrophe in a comment', sub { run_sql([], "/* it's */ SELECT " . store("'" . key() . "'"), "-- it's\nSELECT " . store("'" . key() . "'")) }, qr/^$/ ],
	[ 'an apostrophe in an alias', sub { run_sql([], q(SELECT 1 AS "it's", ) . store("'" . key() . "'") . q( AS "it's too")) }, qr/^$/ ],
	[ 'capitals', sub { run_sql([], q(SELECT KEYVAULT.STORE_API_KEY('exa', ') . key() . q(', USER_ID => 'u'))) }, qr/^$/ ],
	[ 'quoted identifiers', sub { run_sql([], q(SELECT "keyvault"."store_api_key"('exa', ') . key() . q(', "user_id" => 'u'))) }, qr/^$/ ],
	[ 'Unicode identifiers', sub { run_sql([], q(SELECT keyvault.U&"store\005Fapi\005Fkey"('exa', ') . key() . q(', user_id => 'u'))) }, qr/^$/ ],
	[ 'a search path', sub { run_sql([], 'SET search_path = keyvault', q(SELECT store_api_key ('exa', ') . key() . q(', user_id => 'u'))) }, qr/^$/ ],
	[ 'several statements in one string', sub { run_sql([], 'SELECT 1; SELECT ' . store("'" . key() . "'") . '; SELECT 2') }, qr/^$/ ],
	[ 'an error behind it in one string', sub { run_sql([], 'SELECT ' . store("'" . key() . "'") . '; SELECT 1 / 0') }, qr/division by zero|durch Null/ ],
	[ 'EXPLAIN', sub { run_sql([], 'EXPLAIN (ANALYZE, VERBOSE) SELECT ' . store("'" . key() . "'")) }, qr/^$/ ],
	[ 'COPY TO', sub { run_sql([], 'COPY (SELECT ' . store("'" . key() . "'") . ') TO STDOUT') }, qr/^$/ ],
	[ 'CREATE TABLE AS', sub { run_sql([], 'CREATE TEMPORARY TABLE t AS SELECT ' . store("'" . key() . "'") . ' AS id') }, qr/^$/ ],
	[ 'a cursor', sub { run_sql([], 'BEGIN', 'DECLARE c CURSOR FOR SELECT ' . store("'" . key() . "'"), 'FETCH c', 'CLOSE c', 'COMMIT') }, qr/^$/ ],
	[ 'parse and plan trees', sub { run_sql([ @silent, @$debug ], 'SELECT ' . store("'" . key() . "'")) }, qr/^$/ ],
	[ 'parse and plan trees of a prepared statement', sub { run_sql([ @silent, @$debug ], 'PREPARE p AS SELECT ' . store("'" . key() . "'"), 'EXECUTE p') }, qr/^$/ ],

	[ 'request, api_key by name', sub { run_sql([], q(SELECT keyvault.request('exa', '{"query": "q"}', user_id => 'u', api_key => ') . key() . q('))) }, qr/^$/ ],
	[ 'request, api_key by position', sub { run_sql([], q(SELECT keyvault.request('exa', '{"query": "q"}', NULL, NULL, 'u', 'auto', ') . key() . q('))) }, qr/^$/ ],
	[ 'request, in quotes', sub { run_sql([], q(SELECT "keyvault"."request"('exa', '{"query": "q"}', NULL, NULL, 'u', 'auto', ') . key() . q('))) }, qr/^$/ ],
	[ 'request, a comment in between', sub { run_sql([], qq(SELECT keyvault.request /* it's ( */ -- it's\n ('exa', '{"query": "q"}', NULL, NULL, 'u', 'auto', ') . key() . q('))) }, qr/^$/ ],
	[ 'request, a comment in a comment', sub { run_sql([], q(SELECT keyvault.request/* a /* b */ c */('exa', '{"query": "q"}', NULL, NULL, 'u', 'auto', ') . key() . q('))) }, qr/^$/ ],
	[ 'CALL, api_key by name', sub { run_sql([], q(CALL keyvault.call('exa', '{"query": "q"}', user_id => 'u', api_key => ') . key() . q('))) }, qr/^$/ ],
	[ 'CALL, api_key by position', sub { run_sql([], q(CALL "keyvault"."call" ('exa', '{"query": "q"}', NULL, NULL, NULL, 'u', 'auto', ') . key() . q('))) }, qr/^$/ ],
	[ 'a platform key', sub { run_sql([], q(SELECT keyvault.store_platform_key('copilotkit', ') . key() . q('))) }, qr/^$/ ],

	[ 'DO', sub { run_sql([], 'DO $$BEGIN PERFORM ' . store("'" . key() . "'") . '; END$$') }, qr/^$/ ],
	[ 'DO, a dynamic statement', sub { run_sql([], q(DO $$BEGIN EXECUTE 'SELECT keyvault.store' || '_api' || '_key($1, $2, user_id => $3)' USING 'exa', ') . key() . q(', 'u'; END$$)) }, qr/^$/ ],
	[ 'DO, an error behind it', sub { run_sql([], 'DO $$BEGIN PERFORM ' . store("'" . key() . "'") . '; PERFORM 1 / 0; END$$') }, qr/division by zero|durch Null/ ],
	# The server logs a statement before it runs, and all it has then is its text: for these, it logs what has run.
	[ 'a function with an innocent name', sub { run_sql($innocent, "SELECT innocent('" . key() . "')") }, qr/^$/ ],
	[ 'an SQL function with an innocent name', sub { run_sql($innocent, "SELECT innocent_sql('" . key() . "')") }, qr/^$/ ],
	[ 'a function with an innocent name, an error behind it', sub { run_sql($innocent, "SELECT innocent('" . key() . "'), 1 / (random() < 0)::integer") }, qr/division by zero|durch Null/ ],
	[ 'a trigger with an innocent name', sub { run_sql($innocent, "INSERT INTO staging VALUES ('u', '" . key() . "')") }, qr/^$/ ],
	[ 'a function with an innocent name and a bind parameter', sub { my $k = key(); local $ENV{PGOPTIONS} = '-c log_statement=none'; run_with_parameters('extended', $k, 'SELECT innocent(:key)') }, qr/^$/ ],

	[ 'EXECUTE', sub { run_sql([], 'PREPARE p(text) AS SELECT ' . store('$1'), "EXECUTE p('" . key() . "')") }, qr/^$/ ],
	[ 'EXECUTE, white space', sub { run_sql([], 'PREPARE p(text) AS SELECT ' . store('$1'), "/* it's */ execute\n\tp\n('" . key() . "')") }, qr/^$/ ],
	[ 'EXECUTE, quotes', sub { run_sql([], 'PREPARE "it\'s" (text) AS SELECT ' . store('$1'), q(EXECUTE"it's"(') . key() . "')") }, qr/^$/ ],
	[ 'EXECUTE of an innocent function', sub { run_sql([], 'PREPARE p(text) AS SELECT innocent($1)', "EXECUTE p('" . key() . "')") }, qr/^$/ ],
	[ 'EXECUTE of a statement named function', sub { run_sql([], 'PREPARE "function"(text) AS SELECT ' . store('$1'), q(EXECUTE "function"(') . key() . "')") }, qr/^$/ ],
	[ 'EXPLAIN EXECUTE', sub { run_sql([], 'PREPARE p(text) AS SELECT ' . store('$1'), "EXPLAIN (ANALYZE, VERBOSE) EXECUTE p('" . key() . "')") }, qr/^$/ ],
	[ 'CREATE TABLE AS EXECUTE', sub { run_sql([], 'PREPARE p(text) AS SELECT ' . store('$1') . ' AS id', "CREATE TEMPORARY TABLE t AS EXECUTE p('" . key() . "')") }, qr/^$/ ],
	[ 'EXECUTE, an error', sub { run_sql([], 'PREPARE p(integer) AS SELECT ' . store('$1::text'), "EXECUTE p('" . key() . "')") }, qr/integer/ ],
	[ 'a bind parameter', sub { run_with_parameters('extended', key(), 'SELECT ' . store(':key')) }, qr/^$/ ],
	[ 'a bind parameter of a prepared statement', sub { run_with_parameters('prepared', key(), 'SELECT ' . store(':key')) }, qr/^$/ ],
	[ 'a malformed bind parameter', sub { run_with_parameters('extended', key() . ' x', 'SELECT ' . store(':key')) }, qr/malformed/ ],
	[ 'a bind parameter of the wrong type', sub { run_with_parameters('extended', key(), q(SELECT keyvault.store_api_key('exa', 'tap-not-a-marker', user_id => 'u', expires_at => :key))) }, qr/timestamp/ ],
	[ 'a bind parameter that does not cast', sub { run_with_parameters('prepared', key(), 'SELECT ' . store('(:key::text)::integer::text')) }, qr/integer/ ],

	[ 'COPY into a table with a trigger', sub { run_sql([], 'COPY staging FROM STDIN') if 0; my ($k, $out, $err) = (key(), '', ''); $node->psql('postgres', "COPY staging FROM STDIN;\nu\t$k\n\\.\n", stdout => \$out, stderr => \$err); $err }, qr/^$/, 'quiet' ],
	[ 'COPY of a malformed key', sub { my ($k, $out, $err) = (key(), '', ''); $node->psql('postgres', "COPY staging FROM STDIN;\nu\t$k x\n\\.\n", stdout => \$out, stderr => \$err); $err }, qr/malformed/ ],

	[ 'a malformed key', sub { run_sql([], 'SELECT ' . store("'" . key() . " x'")) }, qr/malformed/ ],
	[ 'a malformed key, from a function with an innocent name', sub { run_sql($innocent, "SELECT innocent('" . key() . " x')") }, qr/malformed/ ],
	[ 'a malformed key for one call', sub { run_sql([], q(SELECT keyvault.request('exa', '{"query": "q"}', user_id => 'u', api_key => ') . key() . q( x'))) }, qr/malformed/ ],
	[ 'a malformed platform key', sub { run_sql([], q(SELECT keyvault.store_platform_key('exa', ') . key() . q( x'))) }, qr/malformed/ ],
	[ 'swapped arguments', sub { run_sql([], q(SELECT keyvault.store_api_key(') . key() . q(', 'exa', user_id => 'u'))) }, qr/unknown provider/ ],
	[ 'the key as user_id', sub { run_sql([], q(SET keyvault.create_users = off; SELECT keyvault.store_api_key('exa', 'tap-not-a-marker', user_id => ') . key() . q('))) }, qr/does not exist/ ],
	[ 'the key as payer', sub { run_sql([], q(SELECT keyvault.request('exa', '{"query": "q"}', NULL, NULL, 'u', ') . key() . q('))) }, qr/payer/ ],
	[ 'a cast', sub { run_sql([], 'SELECT ' . store("'" . key() . "'::integer::text")) }, qr/integer/ ],
	[ 'the key as expires_at', sub { run_sql([], q(SELECT keyvault.store_api_key('exa', 'tap-not-a-marker', user_id => 'u', expires_at => ') . key() . q('))) }, qr/timestamp/ ],
	[ 'the key as body', sub { run_sql([], q(SELECT keyvault.request('exa', ') . key() . q(', user_id => 'u'))) }, qr/json/ ],
	[ 'a syntax error behind the key', sub { run_sql([], 'SELECT ' . store("'" . key() . "'") . ' FROM WHERE') }, qr/WHERE/ ],
	[ 'a syntax error at the key', sub { run_sql([], q(SELECT keyvault.store_api_key('exa') ') . key() . "'") }, qr/Qz7/ ],
	[ 'a string without an end', sub { run_sql([], q(SELECT keyvault.store_api_key('exa', ') . key()) }, qr/Qz7/ ],
	[ 'missing arguments', sub { run_sql([], q(SELECT keyvault.store_api_key(') . key() . q('))) }, qr/store_api_key\(unknown\)/ ],
	[ 'too many arguments', sub { run_sql([], q(SELECT keyvault.store_api_key('exa', ') . key() . q(', 'x', 'u', NULL, NULL))) }, qr/store_api_key\(/ ],
	[ 'a column that does not exist', sub { run_sql([], 'SELECT ' . store('"' . key() . '"')) }, qr/Qz7/ ],
	[ 'a time-out', sub { run_sql([ 'statement_timeout=300ms' ], 'SELECT ' . store("'" . key() . "'") . ', pg_sleep(60)') }, qr/statement|Anfrage/ ],
	[ 'a terminated session', sub { run_sql([], 'SELECT ' . store("'" . key() . "'") . ', pg_terminate_backend(pg_backend_pid())') }, qr/terminating|abgebrochen|geschlossen/ ],
	[ 'no master key', sub {
		set_config($node, 'keyvault.master_key_file', "$master_key.gone");
		my $error = run_sql([], 'SELECT ' . store("'" . key() . "'"));
		set_config($node, 'keyvault.master_key_file', $master_key);
		return $error;
	}, qr/master key is not available/ ],

	[ 'read back into a cast', sub { read_back(q(SELECT keyvault.user_api_key('exa', 'u')::integer)) }, qr/integer.*Qz7/ ],
	[ 'read back as jsonb into a cast', sub { read_back(q(SELECT (keyvault.user_api_keys('u') ->> 'exa')::integer)) }, qr/integer.*Qz7/ ],
	[ 'read back by a function with an innocent name', sub { read_back('SELECT innocent_number()') }, qr/integer.*Qz7/ ],
	[ 'read back by a view with an innocent name', sub { read_back('SELECT t::integer FROM innocent_view') }, qr/integer.*Qz7/ ],
	[ 'read back into a dynamic statement', sub { read_back(q(DO $$BEGIN EXECUTE format('SELECT %L', keyvault.user_api_key('exa', 'u')); END$$)) }, qr/^$/ ],
	[ 'read back into a dynamic statement that fails', sub { read_back(q(DO $$BEGIN EXECUTE format('SELECT %I', keyvault.user_api_key('exa', 'u')); END$$)) }, qr/Qz7/ ],

	[ 'an answer that echoes the key', sub { echo('') }, qr/^done\|.*\*{20}/, 'quiet' ],
	[ 'an error that echoes the key', sub { echo('status=400') }, qr/^failed\|.*\*{20}/, 'quiet' ],

	(map { my $prefix = $_; [ "a key that begins with $prefix, in any statement", sub { run_sql([], "SELECT '" . key($prefix) . "'", "SELECT innocent('" . key($prefix) . "')", "SELECT '" . key($prefix) . "'::integer") }, qr/integer/ ] }
		'sk-', 'sk-ant-api03-', 'AIza', 'xai-', 'gsk_', 'xan_live_', 'xan_test_'),
	[ 'a key of a known shape as a bind parameter of any statement', sub { run_with_parameters('extended', key('sk-'), 'SELECT :key::text') }, qr/^$/ ],
	[ 'a key of a known shape in JSON', sub { run_sql([], q(SELECT '{"k": ") . key('sk-') . q("}'::jsonb)) }, qr/^$/ ],

	[ 'both statements of a deadlock', sub { deadlock(key(), key()) }, qr/deadlock|Verklemmung/ ],
	[ 'a killed backend', sub { crash('KILL', key()) }, qr/server|Server/ ],
	[ 'a crashed backend', sub { crash('SEGV', key()) }, qr/server|Server/ ],
);

sub take_roads
{
	my ($title, %config) = @_;
	$mode = $title;
	set_config($node, $_, $config{$_}) foreach sort keys %config;
	foreach (@roads)
	{
		($road, my ($take, $outcome)) = @$_;
		like(scalar $take->(), $outcome, "$mode: $road: as it should end");
	}
	# Statements without a secret are logged, and stored, as ever.
	$road = 'control';
	run_sql([], "INSERT INTO ordinary VALUES ('" . key() . "')");
	return;
}

sub note_hit
{
	my ($channel, $half, $place) = @_;
	my $where = $road_of{$half} or return;
	$shown{$where}{$channel} //= $place;
	return;
}

# Search a file for every half of every key: as it is, in hexadecimal, and as a tree prints bytes.
sub search_file
{
	my ($channel, $path) = @_;
	open my $file, '<:raw', $path or return;
	my $text = '';
	while (read $file, $text, 1 << 20, length $text)
	{
		while ($text =~ /(?:Qz7|Xk4)([a-z0-9]{9})/g) { note_hit($channel, $1, substr $text, $-[0] > 60 ? $-[0] - 60 : 0, 120) }
		while ($text =~ /(?:517a37|586b34)([0-9a-f]{18})/g) { note_hit($channel, pack('H*', $1), "hexadecimal in $path") }
		while ($text =~ /(?:81 122 55|88 107 52)((?: \d+){9})/g) { note_hit($channel, pack('C*', grep { length } split / /, $1), 'a tree') }
		$text = substr $text, -200 if length $text > 200;
	}
	return;
}

sub search_everything
{
	$node->safe_psql('postgres', 'CHECKPOINT');
	my $data = $node->data_dir;
	File::Find::find({ no_chdir => 1, wanted => sub {
		return unless -f $_;
		my ($channel) = m{^\Q$data\E/(pg_wal|base|log/server\.\w+)};
		search_file($channel // 'other files', $_);
	} }, $data);
	search_file('other files', $node->logfile);
	return;
}

my $logs = 'log/server.csv log/server.json log/server.log';
sub judge
{
	my ($title, $redacted) = @_;
	foreach (@roads)
	{
		my ($name, $quiet) = @$_[0, 3];
		my $hits = $shown{"$title: $name"} // {};
		is(join(' ', sort keys %$hits), $redacted || $quiet ? '' : $logs, "$title: $name: where the key was written")
			or diag(map { "$_: $hits->{$_}\n" } sort keys %$hits);
	}
	is(join(' ', sort keys %{ $shown{"$title: control"} // {} }), "base $logs pg_wal", "$title: other statements are written everywhere");
	return;
}

take_roads('not redacted', 'keyvault.redact_logs' => 'off');
take_roads('redacted', 'keyvault.redact_logs' => 'on');
my $german = run_sql([ 'lc_messages=C.UTF-8' ], 'SELECT 1 / 0') =~ /durch Null/;
take_roads('in German', lc_messages => 'C.UTF-8', 'auto_explain.log_format' => 'json') if $german;
search_everything();
judge('not redacted', 0);
judge('redacted', 1);
SKIP:
{
	skip 'the German messages of PostgreSQL, or the locale C.UTF-8, are not installed', 1 unless $german;
	judge('in German', 1);
}
$node->stop;

done_testing();
