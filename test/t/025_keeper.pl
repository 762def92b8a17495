# keyvault.reveal = off: what a bad box, or a source of the master key that fails, does to calls and to other keys.
use strict;
use warnings FATAL => 'all';
use IO::Socket::INET ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('keeper', conf => "keyvault.reveal = off\nautovacuum = off\nkeyvault.max_attempts = 1\n");
use_mock($node, $port);

sub sql { return $node->safe_psql('postgres', @_) }

sub store_sealed
{
	my ($user, $secret, %option) = @_;
	my $box = seal_key($node, $option{sealed_for} // $user, $secret);
	return state_of($node, "SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => '$user')");
}

sub error_of
{
	my ($request) = @_;
	return sql("SELECT error FROM keyvault.requests WHERE id = '$request'");
}

# What the owner of a key is told.
sub told
{
	my ($user) = @_;
	return sql("SELECT status, coalesce(problem, '') FROM keyvault.api_key_status WHERE user_id = '$user'");
}

# What cannot be a key reaches no header, whether the worker has looked at the box before or not.
sub sends_no_malformed_key
{
	my %sealed = (
		"sk-split-0123456789\r\nX-Evil: 1" => [ 'split', qr/^KV005: /, qr/^failed\|Byte 20 of its 30 is a line break;/ ],
		'sk-ant-of-another-provider-01' => [ 'strange', qr/^KV009: /, qr/^failed\|It begins as keys of provider "anthropic" do/ ],
	);
	foreach my $secret (sort keys %sealed)
	{
		my ($user, $error, $told) = @{ $sealed{$secret} };
		is(store_sealed($user, $secret), '', "$user: the box is taken unopened");
		ok(wait_until(sub { told($user) =~ $told }), 'its owner is told what is wrong') or diag(told($user));
		my $request = queue_request($node, $user, "of $user", payer => "'user'");
		ends_as($node, $request, 'failed', 'no call is made with it');
		like(error_of($request), $error, 'and the error says why');
		is(mock_received($port, "of $user"), 0, 'nothing was sent');
		like(told($user), $told, 'the key stays failed');
	}
	return;
}

# The answer of a call that had the key before a bad box took its place.
sub answer_does_not_clear_a_problem
{
	is(store_sealed('late', 'sk-good-key-0123456789'), '', 'a good key');
	my $request = queue_request($node, 'late', 'of late [[mock: gate=late]]', payer => "'user'");
	ok(wait_until(sub { mock_received($port, 'of late') }), 'is under way');
	sql("UPDATE keyvault.api_keys SET status = 'failed', problem = 'bad box' WHERE user_id = 'late'");
	mock_open($port, 'late');
	ends_as($node, $request, 'done', 'is answered');
	is(told('late'), 'failed|bad box', 'which says nothing of what was stored since');
	return;
}

# Late answers about keys that were replaced since, by transactions older than the calls.
sub answer_is_about_its_own_key
{
	is(store_sealed('replaced', 'sk-first-key-0123456789'), '', 'a key');
	my $status = sub { sql("SELECT status, last_verified_at IS NULL FROM keyvault.api_keys WHERE user_id = 'replaced'") };
	my $session = $node->background_psql('postgres');
	sql("UPDATE keyvault.providers SET test_path = '/v1/models?mock=gate%3Dverdict' WHERE provider = 'openai'");
	foreach my $kind ('call', 'test')
	{
		$session->query_safe('BEGIN; SELECT now()');
		my $seen = mock_received($port, '');
		my $request = $kind eq 'call' ? queue_request($node, 'replaced', 'of replaced [[mock: gate=refusal status=401]]', payer => "'user'")
			: sql("SELECT keyvault.test_api_key('openai', user_id => 'replaced')");
		ok(wait_until(sub { mock_received($port, '') > $seen }), "a $kind is under way");
		$session->query_safe("SELECT keyvault.store_api_key('openai', 'sk-next-key-$kind-0123456789', user_id => 'replaced'); COMMIT");
		mock_open($port, $kind eq 'call' ? 'refusal' : 'verdict');
		ends_as($node, $request, $kind eq 'call' ? 'failed' : 'done', "the $kind is answered");
		is($status->(), 'active|t', 'which says nothing about the key that came in its place');
	}
	$session->quit;
	ends_as($node, queue_request($node, 'replaced', '[[mock: status=401]]', payer => "'user'"), 'failed', 'a refusal of that key itself');
	is($status->(), 'failed|t', 'does');
	sql("UPDATE keyvault.providers SET test_path = '/v1/models' WHERE provider = 'openai'");
	return;
}

# A box that an error keeps from becoming a record leaves the others alone, and the sealing key.
sub one_bad_row_stops_no_other
{
	my $converted = sub { my ($user) = @_; sql("SELECT coalesce(bool_and(fingerprint IS NOT NULL), false) FROM keyvault.api_keys WHERE user_id = '$user'") eq 't' };
	is(store_sealed('bad row', 'sk-key-of-a-bad-row-0123456'), '', 'a key of a user');
	ok(wait_until(sub { $converted->('bad row') }), 'becomes a record');
	my $wrapped = sql("SELECT wrapped FROM keyvault.data_keys WHERE user_id = 'bad row'");
	sql("UPDATE keyvault.data_keys SET wrapped = set_byte(wrapped, 40, 255 - get_byte(wrapped, 40)) WHERE user_id = 'bad row'");
	is(store_sealed($_, 'sk-key-of-a-bad-row-0123456'), '', "a box for $_") foreach 'bad row', 'good row';
	ok(wait_until(sub { $converted->('good row') }), 'one whose data key was altered does not hold up another');
	like(told('bad row'), qr/^active\|KV005: /, 'its owner is told') or diag(told('bad row'));
	ends_as($node, queue_request($node, 'bad row', 'of a box', payer => "'user'"), 'done', 'the box itself is good for calls');
	sql("UPDATE keyvault.sealing_keys SET created_at = created_at - interval '91 days'");
	my $before = sql('SELECT key_id FROM keyvault.sealing_keys ORDER BY created_at DESC LIMIT 1');
	queue_request($node, 'late', 'of a wake-up');
	ok(wait_until(sub { sql('SELECT key_id FROM keyvault.sealing_keys ORDER BY created_at DESC LIMIT 1') ne $before }), 'nor the sealing key');
	sql("UPDATE keyvault.data_keys SET wrapped = '$wrapped' WHERE user_id = 'bad row'");
	$node->reload;
	ok(wait_until(sub { $converted->('bad row') }), 'when its data key is whole again it becomes a record');
	is(told('bad row'), 'active|', 'and has no problem');
	is(state_of($node, "UPDATE keyvault.providers SET key_pattern = '(' WHERE provider = 'openai'"), '2201B', 'a key_pattern that does not compile is refused');
	return;
}

# The worker wraps data keys again batch by batch; a row that somebody has locked is in the last one.
sub rotates_in_batches
{
	sql("SELECT keyvault.store_api_key('openai', 'sk-key-of-a-rotated-user-' || n, user_id => 'z' || n) FROM generate_series(11, 20) n");
	ok(wait_until(sub { sql("SELECT count(*) FROM keyvault.api_keys WHERE user_id LIKE 'z%' AND fingerprint IS NOT NULL") eq '10' }), 'ten data keys');
	my $file = sql('SHOW keyvault.master_key_file');
	write_secret($file, unpack('H*', join '', map { chr int rand 256 } 1 .. 32) . "\n" . slurp_file($file));
	$node->reload;
	my $total = sql('SELECT count(*) FROM keyvault.data_keys');
	my $rotated = sub { sql("SELECT coalesce(sum(data_keys), 0) FROM keyvault.master_key_status WHERE version = 2 AND status = 'primary'") };
	my $session = $node->background_psql('postgres');
	$session->query_safe('BEGIN');
	$session->query_safe("SELECT FROM keyvault.data_keys WHERE user_id = 'z20' FOR UPDATE");
	sql('CALL keyvault.rotate_master_key(3)');
	my $before = $total - ($total % 3 || 3);
	ok(wait_until(sub { $rotated->() == $before }), 'all batches but the locked one are there to be seen') or diag($rotated->() . " of $total");
	is(sql('SELECT count(*) FROM keyvault.rotation_requests'), '1', 'the rotation is not done yet');
	ends_as($node, queue_request($node, 'z11', 'of a rotated one'), 'done', 'calls go on');
	$session->query_safe('COMMIT');
	$session->quit;
	sql('CALL keyvault.rotate_master_key(3)');
	ok(wait_until(sub { sql(q(SELECT string_agg(status, ',' ORDER BY version) FROM keyvault.master_keys)) eq 'retired,primary' }), 'then the old key is retired');
	is($rotated->(), sql('SELECT count(*) FROM keyvault.data_keys'), 'and wraps nothing');
	ok(wait_until(sub { sql('SELECT count(*) FROM keyvault.rotation_requests') eq '0' }), 'and the rotation is done');
	return;
}

# Everything of the calls of users whose id begins so: how often handed to the network, status, and the SQLSTATE why they wait.
sub waiting
{
	my ($users) = @_;
	return sql("SELECT DISTINCT attempts, status, left(error, 5) FROM keyvault.requests WHERE user_id LIKE '$users%'");
}

# A lock on what opens keys while calls are claimed, as VACUUM FULL has it.
sub waits_for_a_lock
{
	set_config($node, 'keyvault.databases', 'none');
	ok(wait_until(sub { worker_pid($node) eq '' }), 'no worker');
	my $request = queue_request($node, 'locked', 'of locked');
	my $session = $node->background_psql('postgres');
	$session->query_safe('BEGIN');
	$session->query_safe('LOCK TABLE keyvault.data_keys IN ACCESS EXCLUSIVE MODE');
	set_config($node, 'keyvault.databases', undef);
	ok(wait_until(sub { waiting('locked') eq '0|queued|55P03' }), 'a call whose key is behind a lock goes back into the queue') or diag(waiting('locked'));
	$session->query_safe('COMMIT');
	$session->quit;
	ends_as($node, $request, 'done', 'and is made when the lock is gone');
	return;
}

# A server that starts while the source of its master key is down, and slow to fail.
sub waits_for_the_master_key
{
	my $directory = PostgreSQL::Test::Utils::tempdir;
	my $key = $node->safe_psql('postgres', 'SHOW keyvault.master_key_file');
	my $program = write_secret("$directory/source", <<"SH", 0700);
#!/bin/sh
echo run >> $directory/runs
[ ! -e $directory/down ] || { sleep 1; exit 1; }
cat $key
SH
	sql("ALTER SYSTEM SET keyvault.master_key_file = ''");
	sql("ALTER SYSTEM SET keyvault.master_key_command = '$program'");
	write_secret("$directory/down", '');
	$node->restart;
	sql("SELECT keyvault.request('openai', " . chat('of a waiting one') . ", user_id => 'waiting' || n) FROM generate_series(1, 20) n");
	ok(wait_until(sub { waiting('waiting') eq '0|queued|KV004' }), 'calls wait for a master key that is not there now') or diag(waiting('waiting'));
	cmp_ok(scalar(() = slurp_file("$directory/runs") =~ /run/g), '<', 10, 'whose source is not asked anew for each of them');
	unlink "$directory/down";
	ok(wait_until(sub { waiting('waiting') =~ /^1\|done\|/ }), 'and are made when it is') or diag(waiting('waiting'));
	is(mock_received($port, 'of a waiting one'), 20, 'each once');

	# A call whose key is under a master key that is not among those of the source has nothing to wait for.
	write_secret($key, unpack('H*', join '', map { chr int rand 256 } 1 .. 32) . "\n");
	$node->restart;
	my $another = queue_request($node, 'another', 'of another');
	ends_as($node, $another, 'failed', 'another master key is not waited for');
	like(sql("SELECT error FROM keyvault.requests WHERE id = '$another'"), qr/^KV004: .*: Expected key id [0-9a-f]{32}, loaded [0-9a-f]{32} from/,
		'and the error says which was expected');
	return;
}

# Fetching the master key, which takes its time after a reload, locks nothing: what has ended is settled before.
sub settles_before_it_fetches
{
	my $directory = PostgreSQL::Test::Utils::tempdir;
	my $key = sql('SHOW keyvault.master_key_file');
	my $program = write_secret("$directory/source", <<"SH", 0700);
#!/bin/sh
[ ! -e $directory/held ] || echo run >> $directory/runs
while [ -e $directory/held ]; do sleep 0.05; done
cat $key
SH
	my %setting = (master_key_file => '', master_key_command => $program, master_key_timeout => '60s', max_concurrent_requests => 1);
	sql("ALTER SYSTEM SET keyvault.$_ = '$setting{$_}'") foreach sort keys %setting;
	$node->restart;
	my $ending = queue_request($node, 'ending', 'of ending [[mock: gate=ending]]');
	ok(wait_until(sub { mock_received($port, 'of ending') }), 'the only call that may be under way is');
	write_secret("$directory/held", '');
	$node->reload;
	ok(wait_until(sub { sql("SELECT max(state_change) > pg_conf_load_time() FROM pg_stat_activity WHERE backend_type = 'keyvault worker'") eq 't' }),
		'the worker has dropped the master key in a turn after a reload');
	my $next = queue_request($node, 'next', 'of next');
	mock_open($port, 'ending');
	ok(wait_until(sub { -s "$directory/runs" }), 'the worker fetches it for the next call');
	is(request_status($node, $ending), 'done', 'the one that has ended is settled');
	is(state_of($node, "SET lock_timeout = '3s'; INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('ending', 'use', 1)"), '',
		'and its user is debited by others');
	is(request_status($node, $next), 'queued', 'while it is fetched');
	unlink "$directory/held";
	ends_as($node, $next, 'done', 'then the next call is made');
	sql("ALTER SYSTEM RESET keyvault.$_") foreach sort keys %setting;
	sql("ALTER SYSTEM SET keyvault.master_key_file = '$key'");
	$node->restart;
	return;
}

# A Vault server that takes connections and answers nothing, while the launcher renews its token.
sub renewal_keeps_no_worker_waiting
{
	my $silent = IO::Socket::INET->new(Listen => 64, LocalAddr => '127.0.0.1') or die $!;
	my $directory = PostgreSQL::Test::Utils::tempdir;
	sql("ALTER SYSTEM SET keyvault.vault_address = 'http://127.0.0.1:" . $silent->sockport . "'");
	sql("ALTER SYSTEM SET keyvault.vault_token_file = '" . write_secret("$directory/token", 'a-token') . "'");
	sql("ALTER SYSTEM SET keyvault.master_key_timeout = '10min'");
	$node->restart;
	ends_as($node, queue_request($node, 'z11', 'of an impatient one'), 'done', 'a call is made while the Vault server is silent');
	ok(wait_until(sub { slurp_file($node->logfile) =~ /WARNING:  token for the Vault server is not renewed/ }), 'about which there is a warning');
	sql("ALTER SYSTEM RESET keyvault.$_") foreach qw(vault_address vault_token_file master_key_timeout);
	$node->reload;
	return;
}

sends_no_malformed_key();
answer_does_not_clear_a_problem();
answer_is_about_its_own_key();
one_bad_row_stops_no_other();
rotates_in_batches();
renewal_keeps_no_worker_waiting();
settles_before_it_fetches();
waits_for_a_lock();
waits_for_the_master_key();
$node->stop;
done_testing();
