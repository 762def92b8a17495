# Development mode: default keys are those of a .env file, in every way such a file can be written, and be hostile.
use strict;
use warnings FATAL => 'all';
use Fcntl qw(:flock);
use IPC::Run ();
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $directory = PostgreSQL::Test::Utils::tempdir;
my $env = "$directory/.env";
my $port = start_mock();
delete $ENV{DEBUG};
local $ENV{DEPLOY_ENV} = 'production';
my $node = new_node('development', conf => "log_min_messages = debug1\nwal_level = replica\nmax_wal_senders = 1\nkeyvault.env_file = '$env'\n");
use_mock($node, $port);

sub write_env
{
	my ($content) = @_;
	unlink $env;
	open my $file, '>:raw', $env or die $!;
	print $file $content;
	close $file;
	chmod 0600, $env;
	return;
}

sub env_is
{
	my ($content, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(slurp_file($env), $content, $name);
}

# What one session prints and is told.
sub session
{
	my ($sql) = @_;
	my ($code, $out, $err) = $node->psql('postgres', "SET client_min_messages = notice;\n$sql", on_error_stop => 0);
	return ($out, $err);
}

sub keys_of { return $node->safe_psql('postgres', "SELECT keyvault.user_api_keys('$_[0]')") }
sub in_log { return index(slurp_file($node->logfile), $_[0]) >= 0 }

# Production, which is the default: the file is never opened.
is($node->safe_psql('postgres', 'SHOW keyvault.mode'), 'production', 'the default is production');
write_env("GEMINI_API_KEY=file-gemini-1\n");
my $accessed = (stat $env)[8];
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('gemini', 'database-gemini-1', user_id => 'u')");
is(keys_of('u'), '{"gemini": "database-gemini-1"}', 'production reads the database');
env_is("GEMINI_API_KEY=file-gemini-1\n", 'and leaves the file alone');
ok(in_log('[PROD MODE] Using database for user u'), 'production says so at DEBUG1');
ok(!in_log('[DEV MODE]'), 'and nothing of development');
unlink $env;
mkdir $env;
is(keys_of('u'), '{"gemini": "database-gemini-1"}', 'what the path names does not matter then');
rmdir $env;

# Development.
set_config($node, 'keyvault.mode', 'development');
is(keys_of('u'), '{}', 'without a file there are no keys');
write_env("# mine\nGEMINI_API_KEY=file-gemini-1\nOTHER=x\nexport EXA_API_KEY = 'file-exa-1' # note\n");
is(keys_of('u'), '{"exa": "file-exa-1", "gemini": "file-gemini-1"}', 'the file is read');
is(keys_of('somebody_else'), '{"exa": "file-exa-1", "gemini": "file-gemini-1"}', 'for everybody');
is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('gemini', 'u'), keyvault.user_api_key('openai', 'u') IS NULL"),
	'file-gemini-1|t', 'one key, and one that is not there');
is(state_of($node, "SELECT keyvault.user_api_key('openia', 'u')"), '22023', 'an unknown provider');
is(state_of($node, 'SELECT keyvault.user_api_keys()'), '42501', 'who one is still counts');
ok(in_log('[DEV MODE] Using .env file'), 'the log says so');
is($node->safe_psql('postgres', <<'SQL'), 'file-gemini-1', 'a lookup is a pure read');
BEGIN READ ONLY;
SELECT keyvault.user_api_key('gemini', 'u');
COMMIT;
SQL
like($node->safe_psql('postgres', <<'SQL'), qr/^100\|file-gemini-1$/m, 'parallel workers read it too');
CREATE TABLE many WITH (parallel_workers = 2) AS SELECT 'gemini' AS provider FROM generate_series(1, 100);
SET parallel_setup_cost = 0;
SET parallel_tuple_cost = 0;
SET min_parallel_table_scan_size = 0;
SET parallel_leader_participation = off;
SELECT count(*), min(keyvault.user_api_key(provider, 'u')) FROM many;
SQL

# Storing writes both, and keeps all else byte for byte.
my $stored = $node->safe_psql('postgres', "SELECT keyvault.store_api_key('gemini', 'stored-gemini-2', user_id => 'u') IS NOT NULL");
is($stored, 't', 'storing returns an id');
env_is("# mine\nGEMINI_API_KEY=stored-gemini-2\nOTHER=x\nexport EXA_API_KEY = 'file-exa-1' # note\n", 'the line is changed, the rest kept');
is(sprintf('%o', (stat $env)[2] & 0777), '600', 'the file is for its owner alone');
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('exa', 'stored#exa-2', user_id => 'u'), keyvault.store_api_key('openai', 'stored-openai-2', user_id => 'u')");
env_is("# mine\nGEMINI_API_KEY=stored-gemini-2\nOTHER=x\nexport EXA_API_KEY = 'stored#exa-2' # note\nOPENAI_API_KEY=stored-openai-2\n",
	'a value is quoted where it has to be, a new variable comes last');
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('openai', 'stored-second-2', 'second', user_id => 'u')");
is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('openai', 'u', 'second')"), 'stored-second-2', 'keys with another name are in the database');
is($node->safe_psql('postgres', "SELECT keyvault.delete_api_key('exa', user_id => 'u'), keyvault.delete_api_key('exa', user_id => 'u')"), 't|f', 'deleting');
env_is("# mine\nGEMINI_API_KEY=stored-gemini-2\nOTHER=x\nOPENAI_API_KEY=stored-openai-2\n", 'removes the line');
$node->safe_psql('postgres', "INSERT INTO keyvault.providers (provider, base_url) VALUES ('my-own', 'https://own.example')");
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('my-own', 'stored-own-1', user_id => 'u')");
like(slurp_file($env), qr/^MY_OWN_API_KEY=stored-own-1$/m, 'a provider without env_var has a variable by its name');
$node->safe_psql('postgres', "SELECT keyvault.delete_api_key('my-own', user_id => 'u')");
my $batch = q(SELECT provider, id IS NOT NULL FROM keyvault.store_api_keys('{"exa": "batch-exa-1", "gemini": "batch-gemini-1"}', 'batch'));
my $without_batch = slurp_file($env);
is($node->safe_psql('postgres', $batch), "exa|t\ngemini|t", 'a batch is kept');
is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'u'), keyvault.user_api_key('gemini', 'u')"), 'batch-exa-1|batch-gemini-1', 'and in the file, too');
is(state_of($node, q(SELECT keyvault.store_api_keys('{"exa": "batch-exa-2", "gemini": "sk-ant-batch"}', 'batch'))), 'KV009', 'a bad key in a batch');
is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'u')"), 'batch-exa-1', 'keeps the others out of the file');
write_env($without_batch);
set_config($node, 'keyvault.mode', 'production');
is(keys_of('u'), '{"gemini": "stored-gemini-2", "openai": "stored-openai-2"}', 'the database has what was stored, and not what was deleted');
set_config($node, 'keyvault.mode', 'development');

# The file follows the transaction.
my $before = slurp_file($env);
($_) = session(<<'SQL');
BEGIN;
SELECT keyvault.store_api_key('gemini', 'rolled-back-3', user_id => 'u') IS NOT NULL;
SELECT keyvault.user_api_key('gemini', 'u');
ROLLBACK;
SQL
is($_, "t\nrolled-back-3", 'a transaction sees what it stored');
env_is($before, 'and a rollback leaves the file alone');
session(<<'SQL');
BEGIN;
SELECT keyvault.store_api_key('gemini', 'kept-gemini-4', user_id => 'u');
SAVEPOINT s;
SELECT keyvault.store_api_key('gemini', 'rolled-back-4', user_id => 'u');
SELECT keyvault.delete_api_key('openai', user_id => 'u');
ROLLBACK TO s;
SAVEPOINT s2;
SELECT keyvault.store_api_key('exa', 'kept-exa-4', user_id => 'u');
RELEASE s2;
COMMIT;
SQL
env_is("# mine\nGEMINI_API_KEY=kept-gemini-4\nOTHER=x\nOPENAI_API_KEY=stored-openai-2\nEXA_API_KEY=kept-exa-4\n", 'so does a rolled back savepoint');

# A transaction that fails at its very end leaves the file alone, too.
{
	$before = slurp_file($env);
	$node->safe_psql('postgres', 'CREATE TABLE skew AS SELECT 1 AS x');
	my @skewed = map { $node->background_psql('postgres', on_error_stop => 0) } 1 .. 2;
	$_->query('BEGIN ISOLATION LEVEL SERIALIZABLE; SELECT sum(x) FROM skew; INSERT INTO skew VALUES (1)') foreach @skewed;
	$skewed[0]->query("SELECT keyvault.store_api_key('gemini', 'not-serialized-5', user_id => 'u')");
	$skewed[1]->query('COMMIT');
	$skewed[0]->query('COMMIT');
	like($skewed[0]->{stderr}, qr/could not serialize access/, 'a transaction fails at its COMMIT');
	$_->quit foreach @skewed;
	env_is($before, 'and leaves the file alone');
	is(join(' ', grep { /env\.keyvault-/ } glob "$env*"), '', 'with nothing beside it');
}

# What a writer leaves that is killed between writing the file and putting it in place: waiting for a standby is between the two.
{
	my $beside = sub { return join ' ', map { s/^\Q$env\E//r } sort grep { /env\..*keyvault-/ } glob "$env*" };
	my $commit = sub {
		my ($key) = @_;
		my $writer = $node->background_psql('postgres', on_error_stop => 0);
		my $pid = $writer->query('SELECT pg_backend_pid()');
		$writer->query_until(qr/now/, "\\echo now\nSELECT keyvault.store_api_key('gemini', '$key', user_id => 'u');\n");
		wait_until(sub { $beside->() =~ /\.keyvault-$pid$/ }) or die 'no commit waits';
		return ($writer, $pid);
	};
	set_config($node, 'synchronous_standby_names', 'nobody');
	my ($writer, $pid) = $commit->('held-gemini-6');
	local $ENV{PGOPTIONS} = '-c synchronous_commit=local';

	# An editor has replaced the file, and so nobody waits for that writer's lock on the old one.
	write_env("GEMINI_API_KEY=of-an-editor-6\n");
	$node->safe_psql('postgres', "SELECT keyvault.store_api_key('exa', 'beside-exa-6', user_id => 'u')");
	is($beside->(), ".keyvault-$pid", 'a file that a live writer has is left alone');
	env_is("GEMINI_API_KEY=of-an-editor-6\nEXA_API_KEY=beside-exa-6\n", 'by another, who writes his own');
	my $before = checkpointer($node);
	$node->safe_psql('postgres', 'ALTER SYSTEM SET restart_after_crash = on');
	$node->reload;
	kill 'KILL', $pid;
	wait_until(sub { checkpointer($node) !~ /^(|$before)$/ }) or die 'the server does not come back';
	eval { $writer->quit };
	is($beside->(), ".keyvault-$pid", 'one that was killed leaves his');
	like(slurp_file("$env.keyvault-$pid"), qr/held-gemini-6/, 'with a key in it');

	# Nothing else is a writer's.
	my @others = map { "$env.keyvault-$_" } '', '12a', 'x', '-1', '7', '8', '9', '10';
	symlink "$directory/elsewhere", "$env.keyvault-8";
	mkdir "$env.keyvault-7";
	POSIX::mkfifo("$env.keyvault-9", 0600);
	append_to_file($_, 'mine') foreach grep { !-p && !-d } @others, "$env.other.keyvault-11";
	open my $held, '<', "$env.keyvault-10" or die $!;
	flock $held, LOCK_EX or die $!;
	append_to_file("$env.keyvault-4000000000", 'left');
	$node->safe_psql('postgres', "SELECT keyvault.store_api_key('exa', 'after-exa-6', user_id => 'u')");
	is($beside->(), '.keyvault- .keyvault--1 .keyvault-10 .keyvault-12a .keyvault-7 .keyvault-8 .keyvault-9 .keyvault-x .other.keyvault-11',
		'the next writer removes what was left, and only that');
	is(slurp_file("$directory/elsewhere"), 'mine', 'and follows no link');
	ok(in_log("removed \"$env.keyvault-$pid\""), 'which the log tells');
	close $held;
	$node->safe_psql('postgres', "SELECT keyvault.delete_api_key('exa', user_id => 'u')");
	unlike($beside->(), qr/-10 /, 'what somebody had goes when he has it no longer');
	rmdir "$env.keyvault-7";
	unlink "$directory/elsewhere", "$env.other.keyvault-11", @others;
	set_config($node, 'synchronous_standby_names', undef);
}

# How files are written.
foreach my $case (
	[ 'BOM and CRLF', "\xEF\xBB\xBFGEMINI_API_KEY=crlf-gemini\r\nA=1\r\n", 'crlf-gemini',
		"\xEF\xBB\xBFGEMINI_API_KEY=written-key\r\nA=1\r\n", "\xEF\xBB\xBFA=1\r\n" ],
	[ 'no line break at the end', "A=1\r\nB=2", '', "A=1\r\nB=2\r\nGEMINI_API_KEY=written-key\r\n", "A=1\r\nB=2" ],
	[ 'duplicates', "GEMINI_API_KEY=first-key\nA=1\n GEMINI_API_KEY=second-key#x", 'second-key',
		"GEMINI_API_KEY=first-key\nA=1\n GEMINI_API_KEY=written-key #x", "A=1\n" ],
	[ 'quotes around many lines', "A='\nGEMINI_API_KEY=hidden-key\n'\nGEMINI_API_KEY=`back-ticks` # x\n", 'back-ticks',
		"A='\nGEMINI_API_KEY=hidden-key\n'\nGEMINI_API_KEY=written-key # x\n", "A='\nGEMINI_API_KEY=hidden-key\n'\n" ],
	[ 'an empty value', "GEMINI_API_KEY=\n", '', "GEMINI_API_KEY=written-key\n", '' ],
	[ 'a separator that takes the next line', "A:\n", '', "A:\n\nGEMINI_API_KEY=written-key\n", "A:\n" ],
	[ 'bytes that are no text', "\xff\xfe\0=1\nGEMINI_API_KEY=good-gemini\n\0\n", 'good-gemini',
		"\xff\xfe\0=1\nGEMINI_API_KEY=written-key\n\0\n", "\xff\xfe\0=1\n\0\n" ])
{
	my ($name, $text, $key, $written, $removed) = @$case;
	write_env($text);
	is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('gemini', 'u')"), $key, "$name: read");
	$node->safe_psql('postgres', "SELECT keyvault.store_api_key('gemini', 'written-key', user_id => 'w')");
	env_is($written, "$name: written");
	is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('gemini', 'u')"), 'written-key', "$name: read again");
	write_env($text);
	$node->safe_psql('postgres', "SELECT keyvault.delete_api_key('gemini', user_id => 'w')");
	env_is($removed, "$name: removed");
}

# Values that are no keys are passed over, and told of without being shown.
foreach my $case ([ 'with spaces', 'Marker with spaces' ], [ 'too short', 'Marker' ], [ 'with a NUL byte', "Marker\0padding" ], [ 'not ASCII', "Marker\xc3\xa4padding" ])
{
	my ($name, $value) = @$case;
	write_env("\n# x\nGEMINI_API_KEY=$value\nEXA_API_KEY=good-exa-1\n");
	my ($out, $err) = session("SELECT keyvault.user_api_keys('u')");
	is($out, '{"exa": "good-exa-1"}', "a value $name is no key");
	like($err, qr/WARNING:  variable "GEMINI_API_KEY" in line 3 of the \.env file is no API key/, "a value $name: the variable and the line");
	unlike($err, qr/Marker/, "a value $name is not shown");
}
ok(!in_log('Marker'), 'nor logged');
write_env("OPENAI_API_KEY=sk-ant-belongs-to-another\n");
is(keys_of('u'), '{}', 'a key of another provider is passed over');

# What is not a file, or no bearable one.
my $select = "SELECT keyvault.user_api_keys('u')";
my $store = "SELECT keyvault.store_api_key('gemini', 'refused-gemini', user_id => 'refused')";
unlink $env;
mkdir $env;
is(state_of($node, $select), '42809', 'a directory: read');
is(state_of($node, $store), '42809', 'a directory: write');
rmdir $env;
POSIX::mkfifo($env, 0600);
is(state_of($node, $select), '42809', 'a FIFO: read');
is(state_of($node, $store), '42809', 'a FIFO: write');
unlink $env;
write_env("A=1\n");
truncate $env, 1024 * 1024 * 1024;
is(state_of($node, $select), '54000', '1 GB: read');
is(state_of($node, $store), '54000', '1 GB: write');
is(-s $env, 1024 * 1024 * 1024, '1 GB: left alone');
write_env("GEMINI_API_KEY=unreadable-1\n");
chmod 0, $env;
is(state_of($node, $select), '42501', 'a file that the server may not read');
is($node->safe_psql('postgres', "SELECT count(*) FROM keyvault.api_keys WHERE user_id = 'refused'"), '0', 'what is not written to the file is not in the database');
write_env("GEMINI_API_KEY=readable-1\n");
chmod 0644, $env;
my ($out, $err) = session("SELECT keyvault.user_api_key('gemini', 'u'); SELECT keyvault.user_api_key('gemini', 'u')");
is(scalar(() = $err =~ /WARNING:  \.env file .* can be read by everybody/g), 1, 'a warning, once, for a file that everybody may read');

# A link is followed, and stays.
rename $env, "$directory/real";
symlink "$directory/real", $env;
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('gemini', 'through-a-link', user_id => 'u')");
ok(-l $env, 'a link stays');
is(slurp_file("$directory/real"), "GEMINI_API_KEY=through-a-link\n", 'and what it names is written');
unlink "$directory/real";
is(keys_of('u'), '{}', 'a link to nowhere: no keys');
isnt(state_of($node, $store), '', 'a link to nowhere: not written');
unlink $env;
is(join(' ', grep { -f } glob "$directory/.* $directory/*"), '', 'no file is left beside it');

# Writers lose nothing, of one server or of several programs that lock the file.
my $keys = join ' ', map { "MANY_${_}_API_KEY" } 1 .. 8;
$node->safe_psql('postgres', "INSERT INTO keyvault.providers (provider, base_url) SELECT 'many-' || i, 'https://many.example' FROM generate_series(1, 8) i");
my ($code) = run_pgbench($node, [ '-c', '8', '-j', '2', '-t', '25' ],
	[ 1, q{\set n :client_id + 1} . "\nSELECT keyvault.store_api_key('many-' || :n, 'many-key-' || :n, user_id => 'writer_' || :n);\n" ]);
is($code, 0, 'eight sessions write at once');
is(join(' ', sort map { /^(\w+)=/ ? $1 : () } split /\n/, slurp_file($env)), $keys, 'and none loses another\'s line');

# The worker calls with the file's key.
write_env("OPENAI_API_KEY=sk-of-the-file-1\n");
my $id = queue_request($node, 'caller', 'with the file');
ends_as($node, $id, 'done', 'a call with the key of the file');
my ($call) = grep { index($_->{body}, 'with the file') >= 0 } @{ JSON::PP::decode_json(mock_get($port, '/__log')) };
is($call->{headers}{authorization}, 'Bearer sk-of-the-file-1', 'which the provider got');
is($node->safe_psql('postgres', "SELECT payer FROM keyvault.requests WHERE id = '$id'"), 'user', 'it counts as the user\'s own');
write_env('');
is(state_of($node, "SELECT keyvault.request('openai', " . chat('x') . ", user_id => 'caller', payer => 'user')"), 'KV003', 'without a key in the file: KV003');

# Without a master key.
set_config($node, 'keyvault.master_key_file', '');
write_env("GEMINI_API_KEY=no-master-key-1\n");
is(keys_of('u'), '{"gemini": "no-master-key-1"}', 'lookups need no master key');
($out, $err) = session("SELECT keyvault.store_api_key('exa', 'file-alone-1', user_id => 'alone') IS NULL");
is($out, 't', 'storing without a master key returns NULL');
like($err, qr/NOTICE:  the key is kept in the \.env file alone/, 'and says why');
env_is("GEMINI_API_KEY=no-master-key-1\nEXA_API_KEY=file-alone-1\n", 'the file has it');
foreach my $write (q(keyvault.store_api_key('exa', 'read-only-1', user_id => 'alone')), q(keyvault.delete_api_key('exa', user_id => 'alone')))
{
	is(state_of($node, "BEGIN READ ONLY; SELECT $write"), '25006', 'a READ ONLY transaction changes no file, either');
}
is($node->safe_psql('postgres', $batch), "exa|f\ngemini|f", 'a batch likewise');
env_is("GEMINI_API_KEY=batch-gemini-1\nEXA_API_KEY=batch-exa-1\n", 'is in the file alone');
is(state_of($node, "SELECT keyvault.store_api_key('exa', 'file-alone-1', 'second', user_id => 'alone')"), 'KV004', 'a key that is not for the file needs one');

write_env("GEMINI_API_KEY=no-master-key-1\n");

# The setting.
set_config($node, 'keyvault.env_file', '');
is(state_of($node, $select), '55000', 'no file is set');
set_config($node, 'keyvault.env_file', '.env');
is(state_of($node, $select), '55000', 'a relative path');
set_config($node, 'keyvault.env_file', undef);

# auto: what the environment of the server says.
set_config($node, 'keyvault.mode', 'auto');
foreach my $case (
	[ undef, undef, 'development' ], [ 'true', undef, 'development' ], [ 'false', undef, 'development' ],
	[ 'true', 'production', 'development' ], [ 'false', 'production', 'production' ], [ undef, 'production', 'production' ],
	[ 'yes', 'production', 'production' ], [ 'TRUE', 'production', 'production' ], [ '', '', 'production' ])
{
	my ($debug, $deploy, $mode) = @$case;
	delete @ENV{qw(DEBUG DEPLOY_ENV)};
	$ENV{DEBUG} = $debug if defined $debug;
	$ENV{DEPLOY_ENV} = $deploy if defined $deploy;
	$node->restart;
	is(keys_of('auto'), $mode eq 'development' ? '{"gemini": "no-master-key-1"}' : '{}',
		sprintf 'DEBUG %s and DEPLOY_ENV %s: %s', $debug // 'unset', $deploy // 'unset', $mode);
}
unlike(slurp_file($node->logfile), qr/no-master-key-1|file-gemini-1|sk-of-the-file|stored-gemini|through-a-link/, 'no value was ever logged')
  or diag(grep { /no-master-key-1|file-gemini-1|sk-of-the-file|stored-gemini|through-a-link/ } split /^/, slurp_file($node->logfile));
$node->stop;

# The convention: texts that keyvault and npm's dotenv read alike.
SKIP:
{
	skip 'node package dotenv is not there', 1 unless -d 'test/mock/node_modules/dotenv';
	my $program = "$directory/dump";
	my $include = `pg_config --includedir-server` =~ s/\s+$//r;
	is(system('cc', '-Isrc', "-I$include", '-o', $program, 'test/env/dump.c', 'src/vault/env_file.c'), 0, 'the reader compiles by itself');
	my $tap = `node test/env/dotenv.mjs $program`;
	is($?, 0, 'keyvault and dotenv read the same') or diag($tap);
}

done_testing();
