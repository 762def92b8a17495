# keyvault.reveal = off: only the worker can open keys, and all but reading them works.
use strict;
use warnings FATAL => 'all';
no warnings 'portable';		# addresses have 64 bits
use IPC::Run ();
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('reveal', conf => "log_statement = all\n");
$node->safe_psql('postgres', "UPDATE keyvault.providers SET base_url = 'http://127.0.0.1:$port', allowed_host = '127.0.0.1:$port'");
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('openai', 'sk-stored-while-on-0123456789', user_id => 'before')");

# The key that the stand-in was called with for a text, '' for none.
sub called_with
{
	my ($text) = @_;
	my ($call) = grep { index($_->{body}, $text) >= 0 } @{ JSON::PP::decode_json(mock_get($port, '/__log')) };
	return $call ? $call->{headers}{authorization} =~ s/^Bearer //r : '';
}

sub row_of
{
	my ($user) = @_;
	return $node->safe_psql('postgres', <<"SQL");
SELECT substr(ciphertext, 1, 1), fingerprint IS NOT NULL, k.hint, k.status, coalesce(problem, '') FROM keyvault.api_keys k WHERE user_id = '$user'
SQL
}

# A session that has opened a key while it could.
my ($in, $out, $err) = ('', '', '');
my $session = IPC::Run::start([ 'psql', '-XAtq', '-f', '-', '-d', $node->connstr('postgres') ], '<', \$in, '>', \$out, '2>', \$err);
$in .= "SELECT pg_backend_pid();\nSELECT keyvault.user_api_key('openai', 'before');\n";
$session->pump until $out =~ /sk-stored/;
my ($holder) = $out =~ /^(\d+)/;
set_config($node, 'keyvault.databases', 'none');
wait_until(sub { worker_pid($node) eq '' }) or die 'the worker stays';
set_config($node, 'keyvault.reveal', 'off');

# Reading is refused, whoever asks.
is(state_of($node, "SELECT keyvault.user_api_keys('before')"), '42501', 'user_api_keys is refused');
is(state_of($node, "SELECT keyvault.user_api_key('openai', 'before')"), '42501', 'user_api_key is refused');
is(state_of($node, "SELECT keyvault.user_api_keys('nobody_yet')"), '42501', 'for a user without keys, too');
$in .= "SELECT keyvault.user_api_key('openai', 'before');\n";
$session->pump until $err =~ /keyvault\.reveal is off/;
pass('a session that could is refused after the reload');

# Storing works: the row holds a box until the worker has made a record of it.
is(state_of($node, "SELECT keyvault.store_api_key('openai', 'sk-stored-while-off-0123456789', user_id => 'after')"), 'KV004',
	'without a worker there is no key to seal to, and the error says so');
set_config($node, 'keyvault.databases', undef);
my $box = seal_key($node, 'boxed', 'sk-sealed-while-off-0123456789');
set_config($node, 'keyvault.databases', 'none');
wait_until(sub { worker_pid($node) eq '' }) or die 'the worker stays';
is(state_of($node, "SELECT keyvault.store_api_key('openai', 'sk-stored-while-off-0123456789', user_id => 'after')"), '', 'a key is stored');
is(row_of('after'), "\\x01|f|sk-\xe2\x80\xa66789|active|", 'as a box, with its hint');
{
	my $first = $node->background_psql('postgres');
	my $id = $first->query_safe("BEGIN; SELECT keyvault.store_api_key('openai', 'sk-first-of-its-name-0123456789', 'raced', 'after')");
	my ($none, $second) = ('', '');
	my $racer = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c',
		"SELECT keyvault.store_api_key('openai', 'sk-other-of-its-name-0123456789', 'raced', 'after')" ], '<', \$none, '>', \$second, '2>', \$second);
	ok(wait_until(sub { $node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'") eq '1' }), 'one waits who stores the same name');
	$first->query_safe('COMMIT');
	$first->quit;
	$racer->finish;
	is($second, "$id\n", 'and gets the id that stays');
	$node->safe_psql('postgres', "SELECT keyvault.delete_api_key('openai', 'raced', 'after')");
}
is(state_of($node, "SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => 'boxed')"), '', 'a sealed key is stored');
is(state_of($node, "SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => 'boxed')"), 'KV005', 'once');
my $bad = seal_key($node, 'bad', 'sk-ant-another-providers-0123', 'exa');
is(state_of($node, "SELECT keyvault.store_sealed_api_key('openai', '\\x$bad', user_id => 'bad')"), '', 'so is one that will not open');
is(state_of($node, "SELECT keyvault.store_api_key('openai', 'sk-ant-another-providers-0123', user_id => 'after')"), 'KV009', 'plain keys are still checked');
is(state_of($node, "SELECT keyvault.store_api_key('openai', 'sk-of-a-forgotten-user-0123456', user_id => 'forgotten')"), '', 'another user stores one');
$node->safe_psql('postgres', "CREATE TABLE saved_key AS SELECT * FROM keyvault.api_keys WHERE user_id = 'forgotten'; CREATE TABLE saved_sealing AS TABLE keyvault.sealing_keys");
$node->safe_psql('postgres', "SELECT keyvault.erase_user('forgotten')");
my $call = queue_request($node, 'call', 'with-a-call-key', api_key => "'sk-only-for-this-call-0123456789'");
is($node->safe_psql('postgres', "SELECT substr(call_key, 1, 2) FROM keyvault.requests WHERE id = '$call'"), '\x4201', 'a key for one call is in a box');
my @requests = map { queue_request($node, $_, "call-of-$_") } qw(before after boxed);
set_config($node, 'keyvault.databases', undef);
ends_as($node, $_, 'done', 'a call is made') foreach $call, @requests;
is(called_with('with-a-call-key'), 'sk-only-for-this-call-0123456789', 'with the key for this call');
is(called_with('call-of-before'), 'sk-stored-while-on-0123456789', 'with a key stored before');
is(called_with('call-of-after'), 'sk-stored-while-off-0123456789', 'with one stored since');
is(called_with('call-of-boxed'), 'sk-sealed-while-off-0123456789', 'with a sealed one');
ok(wait_until(sub { row_of('boxed') =~ /^\\x4b\|t/ }), 'the worker makes a record of a box');
is(row_of('boxed'), "\\x4b|t|sk-\xe2\x80\xa66789|active|", 'with its hint and fingerprint');
is(row_of('after'), "\\x4b|t|sk-\xe2\x80\xa66789|active|", 'of one that the server sealed, too');
is(row_of('bad'), "\\x01|f|\xe2\x80\xa6|failed|It was altered, or sealed for another user, provider or vault.", 'one that does not open is marked');
is($node->safe_psql('postgres', "SELECT keyvault.delete_api_key('openai', user_id => 'bad')"), 't', 'deleting works');
is(state_of($node, "SELECT keyvault.store_platform_key('exa', 'platforms-own-key')"), '', 'so does storing a key of the platform');

# Rotation is left to the worker.
{
	my $version = "SELECT max(version) FROM keyvault.data_keys WHERE user_id = 'after'";
	is($node->safe_psql('postgres', "SELECT coalesce(keyvault.rotate_data_key('after'), -1)"), '-1', 'rotate_data_key leaves it to the worker');
	ok(wait_until(sub { $node->safe_psql('postgres', $version) eq '2' }), 'who does it');
	is($node->safe_psql('postgres', "SELECT keyvault.rotate_data_key('nobody') IS NULL"), 't', 'nothing for a user without a data key');
	is($node->safe_psql('postgres', "SELECT keyvault.rotate_data_keys('0', 100) > 3, keyvault.rotate_data_keys('0', 100)"), 't|0', 'so does rotate_data_keys, once');
	ok(wait_until(sub { $node->safe_psql('postgres', $version) eq '3' }), 'who does those');
	my $file = $node->safe_psql('postgres', 'SHOW keyvault.master_key_file');
	write_secret($file, unpack('H*', join '', map { chr int rand 256 } 1 .. 32) . "\n" . slurp_file($file));
	$node->reload;
	is($node->safe_psql('postgres', 'SELECT keyvault.rotate_master_key() IS NULL'), 't', 'rotate_master_key leaves it to the worker');
	ok(wait_until(sub { $node->safe_psql('postgres', q(SELECT string_agg(status, ',' ORDER BY version) FROM keyvault.master_keys)) eq 'retired,primary' }), 'who does it');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM keyvault.rotation_requests'), '0', 'nothing is left to do');
	set_config($node, 'keyvault.maintenance_interval', '0');
	$node->safe_psql('postgres', "SELECT keyvault.rotate_data_key('after'), keyvault.rotate_data_key('boxed')");
	ok(wait_until(sub { $node->safe_psql('postgres', "$version AND NOT EXISTS (SELECT FROM keyvault.rotation_requests)") eq '4' }), 'without maintenance, too');
	set_config($node, 'keyvault.databases', 'none');
	wait_until(sub { worker_pid($node) eq '' }) or die 'the worker stays';
	$node->safe_psql('postgres', "SELECT keyvault.rotate_data_key('after')");
	set_config($node, 'keyvault.reveal', undef);
	set_config($node, 'keyvault.databases', undef);
	ok(wait_until(sub { $node->safe_psql('postgres', "$version AND NOT EXISTS (SELECT FROM keyvault.rotation_requests)") eq '5' }), 'and when reveal has been turned on since');
	set_config($node, 'keyvault.reveal', 'off');
	set_config($node, 'keyvault.maintenance_interval', undef);
	$node->safe_psql('postgres', 'CREATE DATABASE userless');
	$node->safe_psql('userless', 'CREATE EXTENSION keyvault CASCADE');
	$node->safe_psql('userless', "SELECT keyvault.store_platform_key('exa', 'platforms-own-key')");
	$node->safe_psql('userless', "SELECT keyvault.rotate_data_key('')");
	ok(wait_until(sub { $node->safe_psql('userless', "SELECT max(version) FROM keyvault.data_keys WHERE user_id = ''") eq '2' }), 'and in a database without users');
	ends_as($node, queue_request($node, 'after', 'call-after-rotation'), 'done', 'calls go on');
	is(called_with('call-after-rotation'), 'sk-stored-while-off-0123456789', 'with the same key');
}

# Forgetting who was stored in a box: what a backup has of it opens until the sealing key and the platform's data key are gone.
{
	my $erasure = "FROM keyvault.erasure_status WHERE user_id = 'forgotten'";
	is($node->safe_psql('postgres', "SELECT master_key_version, master_key_retired_at IS NULL, boxes_destroyed_at IS NULL $erasure"), '2|t|t', 'an erasure that is not complete');
	my $storing = $node->background_psql('postgres');
	$storing->query_safe("BEGIN; SELECT keyvault.store_api_key('openai', 'sk-stored-meanwhile-0123456789', user_id => 'meanwhile')");
	is($node->safe_psql('postgres', 'SELECT keyvault.retire_sealing_keys()'), '0', 'a key that a box is just being sealed to stays');
	$storing->query_safe('COMMIT');
	ok(wait_until(sub { row_of('meanwhile') =~ /^\\x4b\|t/ }), 'and the worker opens that box');
	cmp_ok($node->safe_psql('postgres', 'SELECT keyvault.retire_sealing_keys()'), '>', 0, 'sealing keys are deleted early');
	my $call = $storing->query_safe(<<'SQL');
BEGIN;
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "messages": [{"role": "user", "content": "called meanwhile"}]}',
	user_id => 'meanwhile', api_key => 'sk-called-meanwhile-0123456789');
SQL
	is($node->safe_psql('postgres', 'SELECT keyvault.retire_sealing_keys()'), '0', 'one that a key for a call is sealed to stays, too');
	$storing->query_safe('COMMIT');
	$storing->quit;
	ends_as($node, $call, 'done', 'that call');
	$node->safe_psql('postgres', "SELECT keyvault.rotate_data_key('')");
	ok(wait_until(sub { $node->safe_psql('postgres', "SELECT boxes_destroyed_at IS NOT NULL $erasure") eq 't' }), 'then the worker rotates what sealed them');
	is($node->safe_psql('postgres', "SELECT master_key_version, master_key_retired_at IS NULL $erasure"), '2|t', 'the master key of that time is still to be retired');
}

# The worker's memory is its own. The control is a session, where the system lets us look at that.
sub memory_is_readable
{
	my ($pid) = @_;
	open my $memory, '<', "/proc/$pid/mem" or return 0;
	open my $maps, '<', "/proc/$pid/maps" or return 0;
	my ($start) = (readline $maps // '') =~ /^([0-9a-f]+)/ or return 0;
	return defined sysseek($memory, hex $start, 0) && (sysread($memory, my $bytes, 16) // 0) == 16 ? 1 : 0;
}
my $worker = worker_pid($node);
isnt($worker, '', 'the worker is there');
my $readable = memory_is_readable($holder);
note('the system does not let one process read the memory of another at all') unless $readable;
is(memory_is_readable($worker), 0, "the worker's memory cannot be read by its own user");
SKIP:
{
	skip 'ptrace is called by number on x86-64 only', 1 unless `uname -m` =~ /^x86_64/;
	my ($ptrace, $attach) = (101, 16);
	my $result = syscall $ptrace, $attach, $worker + 0, 0, 0;
	is($result, -1, 'nor can the worker be traced');
}
is((stat "/proc/$worker/mem")[4], 0, 'its files in /proc are root\'s');
isnt((stat "/proc/$holder/mem")[4], 0, 'those of a session are not');
SKIP:
{
	# AddressSanitizer makes mlock() do nothing.
	skip 'no memory may be locked here', 1 if $ENV{KV_SANITIZER} || slurp_file("/proc/$worker/limits") =~ /Max locked memory\s+0\s/;
	like(slurp_file("/proc/$worker/status"), qr/^VmLck:\s+[1-9]/m, 'its keys stay out of swap');
}
like(slurp_file("/proc/$worker/limits"), qr/Max core file size\s+0\s+0/, 'it leaves no core file');

# A session that opened keys has forgotten the master key: its memory is searched where that is possible.
SKIP:
{
	# AddressSanitizer maps terabytes.
	skip 'memory of other processes cannot be read here', 1 unless $readable && !$ENV{KV_SANITIZER};
	my $file = $node->safe_psql('postgres', 'SHOW keyvault.master_key_file');
	(my $digits = slurp_file($file)) =~ s/\s//g;
	is(count_in_memory($holder, pack 'H*', $digits), 0, 'the master key is gone from a session that held it');
}

# A data key that has grown too old is rotated by itself; a shorter interval holds from the reload on.
{
	my $version = "SELECT max(version) FROM keyvault.data_keys WHERE user_id = 'after'";
	set_config($node, 'keyvault.reveal', undef);
	set_config($node, 'keyvault.maintenance_interval', '1h');
	$node->safe_psql('postgres', 'SELECT keyvault._wake_worker()');
	wait_until(sub { worker_pid($node) ne '' }) or die 'no worker';
	$node->safe_psql('postgres', "UPDATE keyvault.data_keys SET created_at = now() - interval '2 days' WHERE user_id = 'after'");
	set_config($node, 'keyvault.data_key_max_age', '1d');
	set_config($node, 'keyvault.maintenance_interval', '200ms');
	ok(wait_until(sub { $node->safe_psql('postgres', $version) eq '5' }), 'a data key is rotated when it is older than keyvault.data_key_max_age');
	is($node->safe_psql('postgres', "SELECT max(version) FROM keyvault.data_keys WHERE user_id = 'before'"), '2', 'and others are not');
	set_config($node, $_, undef) foreach qw(keyvault.data_key_max_age keyvault.maintenance_interval);
	set_config($node, 'keyvault.reveal', 'off');
}

# Everything is back when it is turned on again.
set_config($node, 'keyvault.reveal', undef);
is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('openai', 'boxed')"), 'sk-sealed-while-off-0123456789', 'on again: keys can be read');
$node->safe_psql('postgres', <<'SQL');
UPDATE keyvault.users SET status = 'active' WHERE user_id = 'forgotten';
INSERT INTO keyvault.sealing_keys TABLE saved_sealing;
INSERT INTO keyvault.api_keys TABLE saved_key;
SQL
is(state_of($node, "SELECT keyvault.user_api_key('openai', 'forgotten')"), 'KV005', 'rows of a backup do not bring back the key of an erased user');
$in .= "SELECT keyvault.user_api_key('openai', 'after');\n\\q\n";
$session->finish;
like($out, qr/sk-stored-while-off/, 'in the session from before, too');
unlike(slurp_file($node->logfile), qr/while-off-0123|for-this-call-01/, 'no key in the log');
$node->stop;

# How often bytes stand in what another process has written to.
sub count_in_memory
{
	my ($pid, $bytes) = @_;
	my $found = 0;
	open my $memory, '<:raw', "/proc/$pid/mem" or die $!;
	foreach my $line (split /\n/, slurp_file("/proc/$pid/maps"))
	{
		my ($start, $end) = $line =~ /^([0-9a-f]+)-([0-9a-f]+) rw/ or next;
		next if $line =~ /\[v(?:var|syscall)|\/dev\/zero|\/dev\/shm|SYSV/;
		sysseek $memory, hex $start, 0;
		sysread($memory, my $content, hex($end) - hex $start) // next;
		$found++ while $content =~ /\Q$bytes\E/g;
	}
	return $found;
}

done_testing();
