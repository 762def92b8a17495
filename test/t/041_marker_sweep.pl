# Ten thousand keys, in by every road that takes many, and a search of everything that the server leaves behind.
#
# In each place that is searched, a plain table, or a server without redaction, has left keys too: a search that finds
# none of those would prove nothing. What a user makes of a key that he has read is his own: the known exceptions of
# doc/security.md are shown to be just these.
use strict;
use warnings FATAL => 'all';
use File::Find ();
use File::Temp ();
use IPC::Run ();
use JSON::PP ();
use MIME::Base64 ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

sub output_of
{
	my (@command) = @_;
	my ($out, $err) = ('', '');
	return IPC::Run::run(\@command, '<', \'', '>', \$out, '2>', \$err) ? $out : '';
}

(my $libraries = output_of('pg_config', '--pkglibdir')) =~ s/\s//g;
my $pgaudit = -e "$libraries/pgaudit.so";
my $master_key = new_master_key();
my $env_file = File::Temp::tempdir(CLEANUP => 1) . '/.env';
my $node = new_node('sweep', master_key => $master_key, init_only => 1, init => { allows_streaming => 1 }, conf => <<"CONF");
shared_preload_libraries = 'keyvault,auto_explain,pg_stat_statements${\($pgaudit ? ',pgaudit' : '')}'
wal_level = logical
shared_buffers = 16MB
autovacuum = off
logging_collector = on
log_destination = 'stderr,csvlog,jsonlog'
log_filename = 'server.log'
log_statement = all
log_min_duration_statement = 0
log_parameter_max_length_on_error = -1
log_min_messages = info
log_min_error_statement = info
log_error_verbosity = verbose
auto_explain.log_min_duration = 0
auto_explain.log_analyze = on
auto_explain.log_verbose = on
pg_stat_statements.track = all
restart_after_crash = on
keyvault.env_file = '$env_file'
keyvault.databases = 'none'
CONF
$node->append_conf('postgresql.conf', "pgaudit.log = 'all'\npgaudit.log_parameter = on\n") if $pgaudit;
# A server that may leave core files, where they go into the folder of the process.
my $leaves_cores = -f '/proc/sys/kernel/core_pattern' && slurp_file('/proc/sys/kernel/core_pattern') =~ m{^[^/|]+$} &&
	system("prlimit --core=unlimited --pid $$ 2> /dev/null") == 0;
{
	local $ENV{LANGUAGE} = 'de';
	$node->start;
}
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION keyvault CASCADE;
CREATE EXTENSION pg_stat_statements;
CREATE TABLE plain (t text);
CREATE TABLE staging (owner text, name text, what text);
CREATE FUNCTION unstage() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
	PERFORM keyvault.store_api_key('exa', NEW.what, NEW.name, NEW.owner);
	RETURN NULL;
END$$;
CREATE TRIGGER unstage BEFORE INSERT ON staging FOR EACH ROW EXECUTE FUNCTION unstage();
CREATE PUBLICATION everything FOR ALL TABLES;
SELECT pg_create_logical_replication_slot('text', 'test_decoding');
SELECT pg_create_logical_replication_slot('binary', 'pgoutput');
SQL
$node->safe_psql('postgres', 'CREATE EXTENSION pgaudit') if $pgaudit;

my $road = '';
my %road_of;	# the searched part of a key => where it belongs
my %found;		# where it belongs => place => how many of its keys
my $n_keys = 0;
my $shared_memory_is_open;

# A new key; the nine characters behind its beginning are searched for.
sub key
{
	my $part = join '', map { ('a' .. 'z', 0 .. 9)[ rand 36 ] } 1 .. 9;
	$road_of{$part} = $road;
	$n_keys++;
	return "Qz7${part}-" . 'z' x 12;
}

# Note the keys in a text: as they are, or in hexadecimal.
sub search
{
	my ($place, $text) = @_;
	my %seen;
	while ($text =~ /Qz7([a-z0-9]{9})/g) { $seen{$1} = 1 }
	while ($text =~ /517a37([0-9a-f]{18})/gi) { $seen{ pack 'H*', $1 } = 1 }
	$found{ $road_of{$_} }{$place}++ foreach grep { $road_of{$_} } keys %seen;
	return;
}

sub search_folder
{
	my ($folder, $prefix) = @_;
	my $look = sub {
		return unless -f $_ && !m{/core[^/]*$};
		my ($top) = m{^\Q$folder\E/(log/server\.\w+|base/pgsql_tmp|[^/]+)};
		search($prefix . $top, slurp_file($_));
	};
	File::Find::find({ no_chdir => 1, wanted => $look }, $folder);
	return;
}

# Statements in one session; returns what went wrong, so that it was not for nothing.
sub run_sql
{
	my (@statements) = @_;
	my ($out, $err) = ('', '');
	$node->psql('postgres', join("\n", @statements, ''), stdout => \$out, stderr => \$err, on_error_stop => 0);
	return $err;
}

sub store { return sprintf q{SELECT keyvault.store_api_key('exa', '%s', 'n%d', 'u%d');}, key(), $_[0] % 50, $_[0] / 50 }

# Bind parameters of the extended protocol, many to a statement.
sub bind
{
	my ($n) = @_;
	my (@options, @calls);
	foreach (1 .. $n)
	{
		push @options, '-D', "k$_=" . key();
		push @calls, "keyvault.store_api_key('exa', :k$_, 'b$_', 'bound')";
	}
	my @messages;
	while (my @some = splice @calls, 0, 50) { push @messages, 'SELECT ' . join(', ', @some) . ";\n" }
	my ($status, undef, $err) = run_pgbench($node, [ '-M', 'extended', '-t', 1, @options ], [ 1, join '', @messages ]);
	return $status ? $err : '';
}

sub boxes
{
	my ($n) = @_;
	my $public = JSON::PP::decode_json($node->safe_psql('postgres', 'SELECT keyvault.sealing_key()'));
	my @operations = map { [ 'makeBox', { public_key => unpack('H*', MIME::Base64::decode_base64($public->{public_key})),
		vault_id => $public->{vault_id}, user_id => 'sealed', provider => 'exa', secret => key() } ] } 1 .. $n;
	my ($out, $err) = ('', '');
	IPC::Run::run([ 'node', 'test/formats/formats.mjs' ], '<', \JSON::PP::encode_json(\@operations), '>', \$out, '2>', \$err) or return $err;
	my $i = 0;
	return run_sql(map { $i++; "SELECT keyvault.store_sealed_api_key('exa', '\\x$_', 'n$i', 'sealed');" } @{ JSON::PP::decode_json($out) });
}

# A file or a program in the place of the master key's that yields something else.
sub bad_source
{
	my ($setting, $value) = @_;
	set_config($node, 'keyvault.master_key_file', $setting eq 'keyvault.master_key_file' ? $value : '');
	set_config($node, $setting, $value) if $setting ne 'keyvault.master_key_file';
	my $error = run_sql(store(0));
	set_config($node, $setting, undef);
	set_config($node, 'keyvault.master_key_file', $master_key);
	return $error;
}

sub development
{
	my ($n) = @_;
	set_config($node, 'keyvault.mode', 'development');
	my $error = run_sql((map { sprintf q{SELECT keyvault.store_api_key('exa', '%s', user_id => 'd');}, key() } 1 .. $n),
		q{SELECT keyvault.user_api_keys('d') ->> 'exa' LIKE 'Qz%';}, q{SELECT (keyvault.user_api_keys('d') ->> 'exa')::integer;});
	# Lines that are none, and a value that is no key.
	write_secret($env_file, join "\n", 'EXA_API_KEY="' . key() . ' x"', key(), 'export ' . key() . '=1', "OPENAI_API_KEY='" . key());
	$error .= run_sql(q{SELECT keyvault.user_api_keys('d') = '{}';}, q{SELECT keyvault.user_api_key('exa', 'd');},
		sprintf q{SELECT keyvault.store_api_key('openai', '%s', user_id => 'd');}, key());
	set_config($node, 'keyvault.mode', undef);
	unlink $env_file;
	return $error;
}

# Export all, encrypted to a key of gpg's.
sub bundle
{
	my $home = File::Temp::tempdir('kvXXXX', TMPDIR => 1, CLEANUP => 1);
	chmod 0700, $home;
	my @gpg = ('gpg', '--homedir', $home, '--batch', '--quiet', '--no-tty');
	my $parameters = "%no-protection\nKey-Type: RSA\nKey-Length: 2048\nSubkey-Type: RSA\nSubkey-Length: 2048\nName-Real: recovery\nExpire-Date: 0\n%commit\n";
	eval { IPC::Run::run([ @gpg, '--generate-key' ], '<', \$parameters, '2>', \my $err) };
	my $public = output_of(@gpg, '--armor', '--export');
	output_of('gpgconf', '--homedir', $home, '--kill', 'all');
	return $public ? run_sql("SELECT length(keyvault.export_recovery_bundle('$public'));") : '';
}

# Only what reports a deadlock or a crash, nothing that logs whole statements.
my @silent = qw(log_statement=none log_min_duration_statement=-1 auto_explain.log_min_duration=-1 pg_stat_statements.track=none);
push @silent, 'pgaudit.log=none' if $pgaudit;

sub deadlocks
{
	my ($n) = @_;
	return join '', map { deadlock_between($node, \@silent, 'pg_advisory_xact_lock(%d)', map { store($_) =~ s/;//r } 100, 200) } 1 .. $n;
}

my @providers = split /\n/, $node->safe_psql('postgres', 'SELECT provider FROM keyvault.providers');

sub batch { return sprintf q{SELECT count(*) FROM keyvault.store_api_keys('{%s}', 'batch%d');}, join(', ', map { qq("$_": ") . key() . '"' } @providers), $_[0] }

sub restored
{
	my ($n) = @_;
	return run_sql('SELECT keyvault.restore_api_keys($lines$' . join("\n", map {
		sprintf '{"user_id": "restored%d", "provider": "exa", "name": "n%d", "key": "%s", "expires_at": null}', $_ % 100, $_, key() } 1 .. $n) . '$lines$);');
}

# The roads: a name, what takes n keys along it and returns the errors, how often, and what errors there must be.
my $none = qr/^$/;
my @roads = (
	[ 'literals', sub { run_sql(map { store($_) } 1 .. $_[0]) }, 2000, $none ],
	[ 'bind parameters', \&bind, 3000, $none ],
	[ 'batches', sub { run_sql(map { batch($_) } 1 .. $_[0]) }, 200, $none ],
	[ 'COPY into a trigger', sub { run_sql('COPY staging FROM STDIN;', (map { "copied\tn$_\t" . key() } 1 .. $_[0]), '\.') }, 1400, $none ],
	[ 'restored', \&restored, 1400, $none ],
	[ 'sealed boxes', \&boxes, 30, $none ],
	[ 'keys for one call', sub { run_sql(map { sprintf q{SELECT keyvault.request('exa', '{}', user_id => 'u1', api_key => '%s');}, key() } 1 .. $_[0]) },
		200, $none ],
	[ 'platform keys', sub { run_sql(map { sprintf q{SELECT keyvault.store_platform_key('exa', '%s');}, key() } 1 .. $_[0]) }, 50, $none ],
	[ 'deadlocks', \&deadlocks, 20, qr/deadlock|Verklemmung/ ],
	[ 'DO', sub { run_sql(map { 'DO $$BEGIN PERFORM ' . substr(store($_), 7) . ' END$$;' } 1 .. $_[0]) }, 100, $none ],
	[ 'references that are keys', sub { run_sql(map { sprintf q{SELECT keyvault.store_api_key_reference('exa', '%s', user_id => 'u1');}, key() } 1 .. $_[0]) },
		50, qr/malformed/ ],
	[ 'malformed keys', sub { run_sql(map { (my $s = store($_)) =~ s/-z/ z/; $s } 1 .. $_[0]) }, 100, qr/malformed/ ],
	[ 'arguments the wrong way round', sub { run_sql(map { sprintf q{SELECT keyvault.store_api_key('%s', 'exa', user_id => 'u1');}, key() } 1 .. $_[0]) },
		50, qr/provider/ ],
	[ 'casts', sub { run_sql(map { (store(0), q{SELECT keyvault.user_api_key('exa', 'u0', 'n0')::integer;}) } 1 .. $_[0]) }, 50, qr/integer|withheld/ ],
	[ 'a bundle to no key', sub { run_sql(map { sprintf q{SELECT keyvault.export_recovery_bundle('%s');}, key() } 1 .. $_[0]) }, 10, qr/ERROR|FEHLER/ ],
	[ 'a bad master key file', sub { bad_source('keyvault.master_key_file', write_secret(File::Temp::tempdir(CLEANUP => 1) . '/k', key())) }, 1, qr/master key/ ],
	[ 'a bad master key command', sub { bad_source('keyvault.master_key_command', '/bin/cat ' . write_secret(File::Temp::tempdir(CLEANUP => 1) . '/k', key())) },
		1, qr/master key/ ],
	[ 'development mode', \&development, 20, qr/integer|withheld/ ],
	[ 'a recovery bundle', \&bundle, 1, $none ],
);
# What never reaches SQL is in no log without redaction either.
my %quiet = map { $_ => 1 } 'sealed boxes', 'a recovery bundle';

sub take_roads
{
	my ($title, $fewer) = @_;
	foreach (@roads)
	{
		my ($name, $take, $n, $errors) = @$_;
		$road = "$title: $name";
		my $end = $take->($fewer ? 1 : $n);
		# Redaction withholds what the server's own functions say.
		like($end, $end eq '' ? $errors : qr/$errors|withheld/, "$road: as it should end");
	}
	return;
}

# The views as they are now, while sessions that took keys are still there.
sub search_views
{
	search('pg_stat_activity', $node->safe_psql('postgres', 'SELECT query FROM pg_stat_activity WHERE pid <> pg_backend_pid()'));
	search('pg_stat_statements', $node->safe_psql('postgres', 'SELECT query FROM pg_stat_statements'));
	my $memory = shared_memory(checkpointer($node));
	$shared_memory_is_open = defined $memory;
	search('shared memory', $memory // '');
	return;
}

sub open_session
{
	my ($title) = @_;
	$road = $title;
	my $session = $node->background_psql('postgres');
	$session->query_safe(store(0) =~ s/;//r);
	return $session;
}

# Without redaction, in a plain table, and announced: what the search must find.
set_config($node, 'keyvault.redact_logs', 'off');
take_roads('not redacted', 1);
my $open = open_session('not redacted: an open session');
search_views();
$open->quit;
set_config($node, 'keyvault.redact_logs', undef);
set_config($node, 'lc_messages', 'C.UTF-8');
my $listener = $node->background_psql('postgres');
$listener->query_safe('LISTEN news');
$road = 'control';
run_sql(map { sprintf "INSERT INTO plain VALUES ('%s'); NOTIFY news, '%s';", key(), key() } 1 .. 5);

take_roads('redacted', 0);
cmp_ok($n_keys, '>', 10_000, "$n_keys keys were made");
cmp_ok($node->safe_psql('postgres', 'SELECT count(*) FROM keyvault.api_keys'), '>', 8000, 'most of them are kept');
$open = open_session('redacted: an open session');
search_views();

# The known exceptions: a key that was read, and then kept outside of the vault.
$road = 'exception: a held cursor';
run_sql(sprintf q{SELECT keyvault.store_api_key('exa', '%s', user_id => 'exception');}, key());
$open->query_safe(q{BEGIN; SET LOCAL work_mem = '64kB';
	DECLARE c CURSOR WITH HOLD FOR SELECT keyvault.user_api_key('exa', 'exception') FROM generate_series(1, 5000); COMMIT;});
search_folder($node->data_dir . '/base/pgsql_tmp', 'pgsql_tmp/');
$open->query_safe('CLOSE c');
$road = 'exception: a table';
run_sql(sprintf(q{SELECT keyvault.store_api_key('exa', '%s', user_id => 'table');}, key()), q{CREATE TABLE own AS SELECT keyvault.user_api_key('exa', 'table');});

search('logical decoding', $node->safe_psql('postgres', q{SELECT data FROM pg_logical_slot_get_changes('text', NULL, NULL)}));
search('logical replication', $node->safe_psql('postgres',
	q{SELECT encode(data, 'hex') FROM pg_logical_slot_get_binary_changes('binary', NULL, NULL, 'proto_version', '1', 'publication_names', 'everything')}));
search('NOTIFY', $listener->query('SELECT 1'));
$listener->quit;
search('pg_dump', output_of('pg_dump', '-d', $node->connstr('postgres')));
my $backup = File::Temp::tempdir(CLEANUP => 1);
output_of('pg_dump', '-Fc', '-Z0', '-f', "$backup/custom", '-d', $node->connstr('postgres'));
search('pg_dump -Fc', slurp_file("$backup/custom"));
output_of('pg_basebackup', '-c', 'fast', '-D', "$backup/base", '-d', $node->connstr('postgres'));
search_folder("$backup/base", 'base backup: ');

$open->quit;

# Backends that are killed while they take a key: the postmaster reports what they ran.
foreach my $title ('not redacted', 'redacted')
{
	set_config($node, 'keyvault.redact_logs', $title eq 'redacted' ? undef : 'off');
	$road = "$title: crashes";
	like(crash_while($node, 'KILL', \@silent, store(300) =~ s/;//r), qr/connection|Verbindung/, "$road: as it should end") foreach 1 .. ($title eq 'redacted' ? 3 : 1);
}

# A process that opened keys crashes; its core file has what it said last, but not what opens keys.
my ($control, $core) = ("core-control-$$", '');
my @secrets;
if ($leaves_cores)
{
	my $wrap = $node->safe_psql('postgres', <<'SQL');
SELECT json_build_object('vault_id', vault_id, 'user_id', user_id, 'version', version, 'data_key_id', data_key_id, 'wrapped', wrapped)
  FROM keyvault.vault, keyvault.data_keys WHERE user_id = 'u0'
SQL
	(my $digits = slurp_file($master_key)) =~ s/\s//g;
	$wrap = { %{ JSON::PP::decode_json($wrap) }, master_key => $digits };
	my ($out, $err) = ('', '');
	IPC::Run::run([ 'node', 'test/formats/formats.mjs' ], '<', \JSON::PP::encode_json([ [ 'openWrap', $wrap ] ]), '>', \$out, '2>', \$err) or die $err;
	@secrets = (master => pack('H*', $digits), digits => $digits, 'data key' => pack 'H*', JSON::PP::decode_json($out)->[0]);
	$open = $node->background_psql('postgres');
	$open->query_safe(qq{SET application_name = '$control'; SELECT keyvault.user_api_key('exa', 'u0', 'n' || i) FROM generate_series(1, 20) i});
	my $pid = $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE application_name = '$control'");
	my $before = checkpointer($node);
	kill 'SEGV', $pid;
	wait_until(sub { checkpointer($node) !~ /^(|$before)$/ }) or die 'the server does not come back';
	$core = join '', map { slurp_file($_) } glob $node->data_dir . '/core*';
}
$open->{run}->finish if $leaves_cores;
$node->stop;
search_folder($node->data_dir, '');

sub places { my ($title) = @_; return join ', ', sort keys %{ $found{$title} // {} } }

my $logs = 'log/server.csv, log/server.json, log/server.log';
foreach (@roads)
{
	my $name = $_->[0];
	like(places("not redacted: $name"), $quiet{$name} ? qr/^$/ : qr{\Q$logs\E}, "not redacted: $name: the logs have the key");
	is(places("redacted: $name"), '', "redacted: $name: no key is anywhere") or diag(explain($found{"redacted: $name"}));
}
like(places('not redacted: crashes'), qr{\Q$logs\E}, 'the report of a crash has the key without redaction');
is(places('redacted: crashes'), '', 'and no other');
is(places('redacted: an open session'), '', 'nor that of an open session');
like(places('not redacted: an open session'), qr/pg_stat_activity/, 'pg_stat_activity has it without redaction');
like(places('not redacted: DO'), qr/pg_stat_statements/, 'so has pg_stat_statements');
SKIP:
{
	skip 'the memory of other processes is closed to us', 2 unless $shared_memory_is_open;
	like(places('not redacted: an open session'), qr/shared memory/, 'and the shared memory behind pg_stat_activity');
	like(places('control'), qr/shared memory/, 'and what is in a plain table is found in shared buffers');
}
like(places('control'), qr/(^|, )\Q$_\E(,|$)/, "$_: what is in a plain table, or announced, is found there")
	foreach 'base', 'pg_wal', 'base backup: base', 'logical decoding', 'logical replication', 'NOTIFY', 'pg_dump', 'pg_dump -Fc',
	'log/server.csv', 'log/server.json', 'log/server.log';
is(places('exception: a held cursor'), 'pgsql_tmp/' . (split m{/}, places('exception: a held cursor'))[-1], 'a held cursor: a temporary file alone');
like(places('exception: a table'), qr/^base, base backup: base,.* pg_wal/, 'a table of a user\'s own: wherever tables are');
unlike(places('exception: a table'), qr/log\//, 'but no log');
SKIP:
{
	skip 'pgaudit is not installed', 1 unless $pgaudit;
	like(slurp_file($node->data_dir . '/log/server.log'), qr/AUDIT: SESSION,.*Qz7/, 'pgaudit was there, and logs keys without redaction');
}
SKIP:
{
	skip 'no core files here', 4 unless $leaves_cores;
	cmp_ok(index($core, $control), '>=', 0, 'a core file has what the process knew');
	while (my ($what, $bytes) = splice @secrets, 0, 2)
	{
		is(index($core, $bytes), -1, "but not the $what");
	}
}

done_testing();
