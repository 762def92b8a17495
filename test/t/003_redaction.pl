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
	# glibc takes the language of messages from here, in every locale but C.
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
CREATE FUNCTION innocent_parallel(integer) RETURNS text STABLE PARALLEL SAFE LANGUAGE plpgsql AS $$BEGIN RETURN keyvault.user_api_key('exa', 'u'); END$$;
CREATE TABLE big AS SELECT generate_series(1, 5000) n;
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
my %road_of;	# half of a key => where it belongs
my %shown;		# where it belongs => channel => what stands around it there

# A new key. Its halves are searched for one by one, as half a key is a leak, too.
sub key
{
	my ($prefix) = @_;
	my @halves = map { join '', map { ('a' .. 'z', 0 .. 9)[ rand 36 ] } 1 .. 9 } 1, 2;
	$road_of{$_} = "$mode: $road" foreach @halves;
	return "${prefix}Qz7$halves[0]Xk4$halves[1]";
}

# Put keys into a text: <key>, <key sk-> for one that begins so, <store> for the usual way to store one.
sub with_keys
{
	my ($text) = @_;
	$text =~ s/<store>/keyvault.store_api_key('exa', '<key>', user_id => 'u')/g;
	$text =~ s/<key ?([^>]*)>/key($1)/ge;
	return $text;
}

# Each string is one message to the server, sent as it stands, all in one session. Returns the errors.
sub run_sql
{
	my ($options, @strings) = @_;
	local $ENV{PGOPTIONS} = join ' ', map { "-c $_" } @$options;
	my ($out, $err) = ('', '');
	IPC::Run::run([ 'psql', '-XAtq', (map { ('-c', with_keys($_)) } @strings), '-d', $node->connstr('postgres') ],
		'<', \'', '>', \$out, '2>', \$err);
	return $err;
}

# A key as the parameter :key of a statement in the extended protocol.
sub bind_key
{
	my ($protocol, $sql, $key) = @_;
	return (run_pgbench($node, [ '-M', $protocol, '-t', '1', '-D', 'key=' . with_keys($key // '<key>') ], [ 1, "$sql;\n" ]))[2];
}

sub copy
{
	my ($data) = @_;
	my ($out, $err) = ('', '');
	$node->psql('postgres', "COPY staging FROM STDIN;\n" . with_keys($data) . "\n\\.\n", stdout => \$out, stderr => \$err);
	return $err;
}

sub crash
{
	my ($signal) = @_;
	return crash_while($node, $signal, \@silent, with_keys('SELECT <store>'));
}

sub deadlock
{
	my $store = q~SELECT keyvault.store_api_key('exa', '<key>', user_id => 'deadlock%d')~;
	return deadlock_between($node, \@silent, 'bump(%d)', map { with_keys(sprintf $store, $_) } 1, 2);
}

# Store a key with nothing logged, then run a statement on it.
sub read_back
{
	my ($sql, @options) = @_;
	return run_sql(\@silent, 'SELECT <store>') . run_sql(\@options, $sql);
}

sub without_master_key
{
	my ($sql) = @_;
	set_config($node, 'keyvault.master_key_file', "$master_key.gone");
	my $error = run_sql([], $sql);
	set_config($node, 'keyvault.master_key_file', $master_key);
	return $error;
}

# A call whose answer repeats the key; returns the answer.
sub echo
{
	my ($directive) = @_;
	run_sql(\@silent, q~SELECT keyvault.store_api_key('openai', '<key>', user_id => 'echo')~);
	my $id = queue_request($node, 'echo', "[[mock: echo-key $directive]]");
	$node->safe_psql('postgres', "SELECT status FROM keyvault.wait_response('$id', '60 s')");
	return $node->safe_psql('postgres', "SELECT status, body FROM keyvault.responses WHERE id = '$id'");
}

# The server logs a statement before it runs, and all it has then is its text. Where that tells nothing, only what has run is logged.
my $has_run = [ 'log_statement=none' ];
my $trees = [ @silent, qw(debug_print_parse=on debug_print_rewritten=on debug_print_plan=on log_statement_stats=on) ];
my $parallel = [ qw(parallel_leader_participation=off parallel_setup_cost=0 parallel_tuple_cost=0 min_parallel_table_scan_size=0) ];
my $divided = qr/division by zero|durch Null/;

# The roads: a name; messages to the server, or what else to do; how it ends, if not without
# an error, so that it was the road meant; settings; whether there is nothing to log anyway.
my @roads = (
	[ 'a literal', [ q~SELECT <store>~ ] ],
	[ 'a literal of two lines', [ qq~SELECT keyvault.store_api_key('exa', 'x'\n'<key>', user_id => 'u')~ ] ],
	[ 'an E string', [ q~SELECT keyvault.store_api_key('exa', E'\\x61<key>', user_id => 'u')~ ] ],
	[ 'a U& string', [ q~SELECT keyvault.store_api_key('exa', U&'\\0061<key>', user_id => 'u')~ ] ],
	[ 'dollar quotes', [ q~SELECT keyvault.store_api_key('exa', $$<key>$$, 'one', 'u'), keyvault.store_api_key('exa', $it$<key>$it$, 'two', 'u')~ ] ],
	[ 'an apostrophe in a comment', [ q~/* it's */ SELECT <store>~, qq~-- it's\nSELECT <store>~ ] ],
	[ 'an apostrophe in an alias', [ q~SELECT 1 AS "it's", <store> AS "it's too"~ ] ],
	[ 'capitals', [ q~SELECT KEYVAULT.STORE_API_KEY('exa', '<key>', USER_ID => 'u')~ ] ],
	[ 'quoted identifiers', [ q~SELECT "keyvault"."store_api_key"('exa', '<key>', "user_id" => 'u')~ ] ],
	[ 'Unicode identifiers', [ q~SELECT keyvault.U&"store\\005Fapi\\005Fkey"('exa', '<key>', user_id => 'u')~ ] ],
	[ 'a search path', [ q~SET search_path = keyvault~, q~SELECT store_api_key ('exa', '<key>', user_id => 'u')~ ] ],
	[ 'several statements in one string', [ q~SELECT 1; SELECT <store>; SELECT 2~ ] ],
	[ 'an error behind it in one string', [ q~SELECT <store>; SELECT 1 / 0~ ], error => $divided ],
	[ 'EXPLAIN', [ q~EXPLAIN (ANALYZE, VERBOSE) SELECT <store>~ ] ],
	[ 'COPY TO', [ q~COPY (SELECT <store>) TO STDOUT~ ] ],
	[ 'CREATE TABLE AS', [ q~CREATE TEMPORARY TABLE t AS SELECT <store> AS id~ ] ],
	[ 'a cursor', [ q~BEGIN~, q~DECLARE c CURSOR FOR SELECT <store>~, q~FETCH c~, q~CLOSE c~, q~COMMIT~ ] ],
	[ 'parse and plan trees', [ q~SELECT <store>~ ], options => $trees ],
	[ 'trees of a prepared statement', [ q~PREPARE p AS SELECT <store>~, q~EXECUTE p~ ], options => $trees ],

	[ 'request, api_key by name', [ q~SELECT keyvault.request('exa', '{"query": "q"}', user_id => 'u', api_key => '<key>')~ ] ],
	[ 'request, api_key by position', [ q~SELECT keyvault.request('exa', '{"query": "q"}', NULL, NULL, 'u', 'auto', '<key>')~ ] ],
	[ 'request, in quotes', [ q~SELECT "keyvault"."request"('exa', '{"query": "q"}', NULL, NULL, 'u', 'auto', '<key>')~ ] ],
	[ 'request, a comment in between',
		[ qq~SELECT keyvault.request /* it's ( */ -- it's\n ('exa', '{"query": "q"}', NULL, NULL, 'u', 'auto', '<key>')~ ] ],
	[ 'request, a comment in a comment',
		[ q~SELECT keyvault.request/* a /* b */ c */('exa', '{"query": "q"}', NULL, NULL, 'u', 'auto', '<key>')~ ] ],
	[ 'CALL, api_key by name', [ q~CALL keyvault.call('exa', '{"query": "q"}', user_id => 'u', api_key => '<key>')~ ] ],
	[ 'CALL, api_key by position', [ q~CALL "keyvault"."call" ('exa', '{"query": "q"}', NULL, NULL, NULL, 'u', 'auto', '<key>')~ ] ],
	[ 'a platform key', [ q~SELECT keyvault.store_platform_key('copilotkit', '<key>')~ ] ],

	[ 'a batch', [ q~SELECT count(*) FROM keyvault.store_api_keys('{"exa": "<key>", "copilotkit": "<key>"}', 'u')~ ] ],
	[ 'a bind parameter of a batch', sub {
		bind_key('extended', q~SELECT count(*) FROM keyvault.store_api_keys(jsonb_build_object('exa', :key::text), 'u')~) } ],
	[ 'a malformed key in a batch', [ q~SELECT keyvault.store_api_keys('{"exa": "<key> x"}', 'u')~ ], error => qr/malformed/ ],
	[ 'a batch the wrong way round', [ q~SELECT keyvault.store_api_keys('{"<key>": "exa"}', 'u')~ ], error => qr/provider/ ],
	[ 'a batch that is no JSON', [ q~SELECT keyvault.store_api_keys('<key>', 'u')~ ], error => qr/json/ ],
	[ 'restored keys',
		[ q~SELECT keyvault.restore_api_keys('{"user_id": "u", "provider": "exa", "name": "restored", "key": "<key>"}')~ ] ],
	[ 'restored keys with a bad line', [ q~SELECT keyvault.restore_api_keys('{"key": "<key>')~ ], error => qr/line 1/ ],

	[ 'DO', [ q~DO $$BEGIN PERFORM <store>; END$$~ ] ],
	[ 'DO, a dynamic statement',
		[ q~DO $$BEGIN EXECUTE 'SELECT keyvault.store' || '_api' || '_key($1, $2, user_id => $3)' USING 'exa', '<key>', 'u'; END$$~ ] ],
	[ 'DO, an error behind it', [ q~DO $$BEGIN PERFORM <store>; PERFORM 1 / 0; END$$~ ], error => $divided ],
	[ 'an innocent function', [ q~SELECT innocent('<key>')~ ], options => $has_run ],
	[ 'an innocent SQL function', [ q~SELECT innocent_sql('<key>')~ ], options => $has_run ],
	[ 'an innocent function, an error behind it', [ q~SELECT innocent('<key>'), 1 / (random() < 0)::integer~ ],
		options => $has_run, error => $divided ],
	[ 'an innocent function in DO', [ q~DO $$BEGIN PERFORM innocent('<key>'); END$$~ ], options => $has_run ],
	[ 'an innocent trigger', [ q~INSERT INTO staging VALUES ('u', '<key>')~ ], options => $has_run ],
	[ 'a bind parameter of an innocent function, an error behind it', sub {
		local $ENV{PGOPTIONS} = join ' ', map { "-c $_" } @silent;
		return bind_key('extended', q~SELECT innocent(:key), 1 / (random() < 0)::integer~);
	}, error => $divided ],

	[ 'PREPARE', [ q~PREPARE p AS SELECT <store>~, q~EXECUTE p~, q~DEALLOCATE p~ ] ],
	[ 'EXECUTE', [ q~PREPARE p(text) AS SELECT keyvault.store_api_key('exa', $1, user_id => 'u')~, q~EXECUTE p('<key>')~ ] ],
	[ 'EXECUTE, white space',
		[ q~PREPARE p(text) AS SELECT keyvault.store_api_key('exa', $1, user_id => 'u')~, qq~/* it's */ execute\n\tp\n('<key>')~ ] ],
	[ 'EXECUTE, quotes',
		[ q~PREPARE "it's"(text) AS SELECT keyvault.store_api_key('exa', $1, user_id => 'u')~, q~EXECUTE"it's"('<key>')~ ] ],
	[ 'EXECUTE of a statement named function',
		[ q~PREPARE "function"(text) AS SELECT keyvault.store_api_key('exa', $1, user_id => 'u')~, q~EXECUTE "function"('<key>')~ ] ],
	[ 'EXECUTE of an innocent function', [ q~PREPARE p(text) AS SELECT innocent($1)~, q~EXECUTE p('<key>')~ ] ],
	[ 'EXPLAIN EXECUTE', [ q~PREPARE p(text) AS SELECT innocent($1)~, q~EXPLAIN (ANALYZE, VERBOSE) EXECUTE p('<key>')~ ] ],
	[ 'CREATE TABLE AS EXECUTE',
		[ q~PREPARE p(text) AS SELECT innocent($1) AS id~, q~CREATE TEMPORARY TABLE t AS EXECUTE p('<key>')~ ] ],
	[ 'EXECUTE, an error', [ q~PREPARE p(integer) AS SELECT innocent($1::text)~, q~EXECUTE p('<key>')~ ], error => qr/integer/ ],
	[ 'a bind parameter', sub { bind_key('extended', q~SELECT keyvault.store_api_key('exa', :key, user_id => 'u')~) } ],
	[ 'a bind parameter of a prepared statement',
		sub { bind_key('prepared', q~SELECT keyvault.store_api_key('exa', :key, user_id => 'u')~) } ],
	[ 'a malformed bind parameter', sub { bind_key('extended', q~SELECT keyvault.store_api_key('exa', :key, user_id => 'u')~, '<key> x') },
		error => qr/malformed/ ],
	[ 'a bind parameter of the wrong type',
		sub { bind_key('extended', q~SELECT keyvault.store_api_key('exa', 'tap-no-marker', user_id => 'u', expires_at => :key)~) },
		error => qr/timestamp/ ],
	[ 'a bind parameter that does not cast',
		sub { bind_key('prepared', q~SELECT keyvault.store_api_key('exa', (:key::text)::integer::text, user_id => 'u')~) },
		error => qr/integer/ ],
	[ 'COPY into an innocent trigger', sub { copy("u\t<key>") } ],
	[ 'COPY of a malformed key', sub { copy("u\t<key> x") }, error => qr/malformed/ ],

	[ 'a malformed key', [ q~SELECT keyvault.store_api_key('exa', '<key> x', user_id => 'u')~ ], error => qr/malformed/ ],
	[ 'a malformed key in an innocent function', [ q~SELECT innocent('<key> x')~ ], options => $has_run, error => qr/malformed/ ],
	[ 'a malformed key for one call', [ q~SELECT keyvault.request('exa', '{"query": "q"}', user_id => 'u', api_key => '<key> x')~ ],
		error => qr/malformed/ ],
	[ 'a malformed platform key', [ q~SELECT keyvault.store_platform_key('exa', '<key> x')~ ], error => qr/malformed/ ],
	[ 'swapped arguments', [ q~SELECT keyvault.store_api_key('<key>', 'exa', user_id => 'u')~ ], error => qr/provider/ ],
	[ 'the key as payer', [ q~SELECT keyvault.request('exa', '{"query": "q"}', NULL, NULL, 'u', '<key>', 'tap-no-marker')~ ],
		error => qr/payer/ ],
	[ 'the key as expires_at', [ q~SELECT keyvault.store_api_key('exa', 'tap-no-marker', user_id => 'u', expires_at => '<key>')~ ],
		error => qr/timestamp/ ],
	[ 'the key as body', [ q~SELECT keyvault.request('exa', '<key>', user_id => 'u')~ ], error => qr/json/ ],
	[ 'a cast', [ q~SELECT keyvault.store_api_key('exa', '<key>'::integer::text, user_id => 'u')~ ], error => qr/integer/ ],
	[ 'a syntax error behind the key', [ q~SELECT <store> FROM WHERE~ ], error => qr/WHERE/ ],
	[ 'a syntax error at the key', [ q~SELECT keyvault.store_api_key('exa') '<key>'~ ], error => qr/Qz7/ ],
	[ 'a string without an end', [ q~SELECT keyvault.store_api_key('exa', '<key>~ ], error => qr/Qz7/ ],
	[ 'missing arguments', [ q~SELECT keyvault.store_api_key('<key>')~ ], error => qr/store_api_key\(unknown\)/ ],
	[ 'too many arguments', [ q~SELECT keyvault.store_api_key('exa', '<key>', 'x', 'u', NULL, NULL)~ ], error => qr/store_api_key\(/ ],
	[ 'the key as a column', [ q~SELECT keyvault.store_api_key('exa', "<key>", user_id => 'u')~ ], error => qr/Qz7/ ],
	[ 'a time-out', [ q~SELECT <store>, pg_sleep(60)~ ], options => [ 'statement_timeout=300ms' ], error => qr/timeout|Zeit/ ],
	[ 'a terminated session', [ q~SELECT <store>, pg_terminate_backend(pg_backend_pid())~ ], error => qr/FATAL/ ],
	[ 'no master key', sub { without_master_key('SELECT <store>') }, error => qr/master key is not available/ ],

	[ 'read back into a cast', sub { read_back(q~SELECT keyvault.user_api_key('exa', 'u')::integer~) }, error => qr/integer.*Qz7/ ],
	[ 'read back as jsonb into a cast', sub { read_back(q~SELECT (keyvault.user_api_keys('u') ->> 'exa')::integer~) },
		error => qr/integer.*Qz7/ ],
	[ 'read back in an innocent function', sub { read_back(q~SELECT innocent_number()~) }, error => qr/integer.*Qz7/ ],
	[ 'read back in an innocent view', sub { read_back(q~SELECT t::integer FROM innocent_view~) }, error => qr/integer.*Qz7/ ],
	[ 'read back by parallel workers', sub { read_back(q~SELECT max(innocent_parallel(n))::integer FROM big WHERE n <= 20~, @$parallel) },
		error => qr/integer.*Qz7/ ],
	[ 'read back into a dynamic statement',
		sub { read_back(q~DO $$BEGIN EXECUTE format('SELECT %L::text', keyvault.user_api_key('exa', 'u')); END$$~) } ],
	[ 'read back into a dynamic statement that fails',
		sub { read_back(q~DO $$BEGIN EXECUTE format('SELECT %I', keyvault.user_api_key('exa', 'u')); END$$~) }, error => qr/Qz7/ ],

	[ 'an answer that echoes the key', sub { echo('') }, error => qr/^done\|.*\*{20}/, quiet => 1 ],
	[ 'an error that echoes the key', sub { echo('status=400') }, error => qr/^failed\|.*\*{20}/, quiet => 1 ],

	# What has the shape of a key is kept out of whatever is logged.
	(map { [ "$_, in any statement", [ qq~SELECT '<key $_>'~, qq~SELECT innocent('<key $_>')~, qq~SELECT '<key $_>'::integer~ ],
			error => qr/integer/ ] } 'sk-', 'sk-ant-api03-', 'AIza', 'xai-', 'gsk_', 'xan_live_', 'xan_test_'),
	[ 'sk-, as a bind parameter of any statement', sub { bind_key('extended', 'SELECT :key::text', '<key sk->') } ],
	[ 'sk-, in JSON', [ q~SELECT '{"k": "<key sk->"}'::jsonb~ ] ],

	[ 'both statements of a deadlock', \&deadlock, error => qr/deadlock|Verklemmung/ ],
	[ 'a killed backend', sub { crash('KILL') }, error => qr/connection|Verbindung/ ],
	[ 'a crashed backend', sub { crash('SEGV') }, error => qr/connection|Verbindung/ ],
);

sub take_roads
{
	my ($title, %config) = @_;
	$mode = $title;
	set_config($node, $_, $config{$_}) foreach sort keys %config;
	foreach (@roads)
	{
		($road, my ($steps, %option)) = @$_;
		my $end = eval { ref $steps eq 'CODE' ? $steps->() : run_sql($option{options} // [], @$steps) } // "died: $@";
		wait_until(sub { checkpointer($node) ne '' }) or BAIL_OUT('the server does not come back') if $end =~ /connection|Verbindung/;
		# Redaction withholds from the client, too, what the server's own functions say.
		my $error = $option{error} // qr/^$/;
		like($end, $title eq 'not redacted' || !$option{error} ? $error : qr/$error|withheld by keyvault/, "$mode: $road: as it should end");
	}
	# Statements without a secret are logged, and stored, as ever.
	$road = 'control';
	run_sql([], q~INSERT INTO ordinary VALUES ('<key>')~);
	return;
}

sub note_hit
{
	my ($channel, $half, $around) = @_;
	my $where = $road_of{$half} or return;
	$shown{$where}{$channel} //= $around;
	return;
}

# Search a file for every half of every key: as it is, in hexadecimal, and as a tree spells bytes.
sub search_file
{
	my ($channel, $path) = @_;
	open my $file, '<:raw', $path or return;
	my $text = '';
	while (read $file, $text, 1 << 20, length $text)
	{
		while ($text =~ /(?:Qz7|Xk4)([a-z0-9]{9})/g) { note_hit($channel, $1, substr $text, $-[0] > 60 ? $-[0] - 60 : 0, 120) }
		while ($text =~ /(?:517a37|586b34)([0-9a-f]{18})/g) { note_hit($channel, pack('H*', $1), 'in hexadecimal') }
		while ($text =~ /(?:81 122 55|88 107 52)((?: \d+){9})/g) { note_hit($channel, pack('C*', split ' ', $1), 'in a tree') }
		$text = substr $text, -200 if length $text > 200;
	}
	return;
}

sub search_everything
{
	$node->safe_psql('postgres', 'CHECKPOINT');
	my $data = $node->data_dir;
	my $search = sub {
		my ($channel) = m{^\Q$data\E/(pg_wal|base|log/server\.\w+)};
		search_file($channel // 'other files', $_) if -f $_;
	};
	File::Find::find({ no_chdir => 1, wanted => $search }, $data);
	search_file('other files', $node->logfile);
	return;
}

my $logs = 'log/server.csv log/server.json log/server.log';

sub judge
{
	my ($title, $redacted) = @_;
	foreach (@roads)
	{
		my ($name, undef, %option) = @$_;
		my $hits = $shown{"$title: $name"} // {};
		is(join(' ', sort keys %$hits), $redacted || $option{quiet} ? '' : $logs, "$title: $name: where the key was written")
			or diag(map { "$_: $hits->{$_}\n" } sort keys %$hits);
	}
	is(join(' ', sort keys %{ $shown{"$title: control"} // {} }), "base $logs pg_wal", "$title: other statements are written everywhere");
	return;
}

# What ordinary statements are told of their errors.
like(run_sql([], q~CREATE FUNCTION pg_temp.dynamic() RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE ''SELECT 1::text::date''; END'~,
		'SELECT pg_temp.dynamic()'),
	qr/invalid input syntax for type date: "1"/, 'an error under EXECUTE of PL/pgSQL keeps its message');
like(run_sql([], q~MERGE INTO innocent_view t USING (SELECT 1) s ON true WHEN NOT MATCHED THEN DO NOTHING~),
	qr/cannot execute MERGE/, 'and so does one of the server that begins with "cannot execute"') if $node->pg_version < 17;
like(run_sql([], q~PREPARE p(integer) AS SELECT $1~, q~EXECUTE p('it may be a key')~),
	qr/withheld by keyvault/, 'that of a prepared statement is withheld');

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
# Redaction works inside of error reporting, where a mistake would take the server down.
is(() = slurp_file($node->data_dir . '/log/server.log') =~ /\(PID \d+\) (?:was terminated by signal|wurde von Signal)/g,
	2 * ($german ? 3 : 2), 'no process has crashed but those that were killed');

# The names of the memory of plans, which the server prints when memory is short, where a message of the protocol makes the plan.
foreach my $protocol (qw(extended prepared))
{
	my ($code, $out, $err) = run_pgbench($node, [ '-M', $protocol, '-t', '2' ], [ 1, <<'SQL' ]);
SELECT keyvault.store_api_key('exa', 'tap-literal-in-a-plan', user_id => 'plan');
SELECT 1 / (count(*) = 0)::int FROM pg_backend_memory_contexts WHERE ident ~ 'literal-in-a-pla[n]';
SELECT 1 / (count(*) > 0)::int FROM pg_backend_memory_contexts WHERE ident ~ 'withheld by keyvaul[t]';
SQL
	is($code, 0, "$protocol protocol: no key in the names of a session's memory") or diag($err);
}
$node->stop;

done_testing();
