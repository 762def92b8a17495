# Another master key in the place of the old one: under load, through crashes, against sessions that still know the old one only.
use strict;
use warnings FATAL => 'all';
use IPC::Run ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $users = 500;
my $port = start_mock();
my $directory = PostgreSQL::Test::Utils::tempdir;
my @keys = map { unpack 'H*', pack 'C*', map { int rand 256 } 1 .. 32 } 0 .. 9;
my $file = "$directory/master.key";
write_secret($file, "$keys[0]\n");
my $node = new_node('rotation', master_key => $file, conf => "max_connections = 60\nautovacuum = off\nmax_prepared_transactions = 5\nrestart_after_crash = on\n");
use_mock($node, $port);

sub sql { return $node->safe_psql('postgres', @_) }

# Put keys into the file, the first one primary, and have new sessions see them.
sub load_keys
{
	write_secret($file, join '', map { "$keys[$_]\n" } @_);
	my $before = sql('SELECT pg_conf_load_time()');
	$node->reload;
	return wait_until(sub { sql('SELECT pg_conf_load_time()') ne $before });
}

sub start_sql
{
	my ($statement) = @_;
	my %run = (out => '', err => '');
	$run{harness} = IPC::Run::start([ 'psql', '-XAtq', '-v', 'VERBOSITY=verbose', '-d', $node->connstr('postgres'), '-c', $statement ],
		'>', \$run{out}, '2>', \$run{err});
	return \%run;
}

sub waiting
{
	my ($pattern) = @_;
	return sql("SELECT pid FROM pg_stat_activity WHERE query LIKE '$pattern' AND wait_event_type = 'Lock'");
}

sub status { return sql('SELECT version, status, data_keys FROM keyvault.master_key_status ORDER BY version') }

# Whether the keys of all users open, and are what was stored.
sub all_open
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is(sql("SELECT count(*) FROM generate_series(1, $users) n WHERE keyvault.user_api_key('openai', 'u' || n) = 'sk-tap-key-of-user-number-' || n"),
		$users, "$name: every key opens");
}

sql("SELECT count(keyvault.store_api_key('openai', 'sk-tap-key-of-user-number-' || n, user_id => 'u' || n)) FROM generate_series(1, $users) n");
is(status(), '1|primary|' . ($users + 1), 'one master key');

# Two keys loaded: until the rotation is asked for, the old one wraps.
ok(load_keys(1, 0), 'a new first key');
sql("SELECT keyvault.store_api_key('openai', 'sk-tap-key-of-an-early-one', user_id => 'early')");
is(status(), '1|primary|' . ($users + 2), 'a new key at the front changes nothing by itself');
is(sql('SELECT keyvault.rotate_master_key()'), $users + 2, 'rotate_master_key() wraps every data key again');
is(status(), "1|retired|0\n2|primary|" . ($users + 2), 'and retires the old master key');
is(sql('SELECT keyvault.rotate_master_key()'), 0, 'once more, and there is nothing to do');
ok(load_keys(1), 'the old key is taken away');
all_open('without the old key');

# What is refused.
ok(load_keys(2), 'a third key, without the one in use');
foreach my $statement ('SELECT keyvault.rotate_master_key()', 'CALL keyvault.rotate_master_key(10)')
{
	my ($code, $out, $err) = $node->psql('postgres', "\\set VERBOSITY verbose\n$statement");
	like($err, qr/KV004: .*\n.*Expected key id [0-9a-f]{32}, loaded [0-9a-f]{32} from file/, "$statement: the key in use must be loaded");
}
ok(load_keys(0, 1), 'a retired key at the front');
is(state_of($node, 'SELECT keyvault.rotate_master_key()'), '55000', 'a retired key does not come back');
is(state_of($node, 'CALL keyvault.rotate_master_key(10)'), '55000', 'not with CALL either');
is(state_of($node, 'CALL keyvault.rotate_master_key(0)'), '22023', 'a batch of nothing');
is(state_of($node, 'BEGIN; CALL keyvault.rotate_master_key(10)'), '2D000', 'CALL within a transaction');
is(state_of($node, 'BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT keyvault.rotate_master_key()'), '25000', 'an isolation level with old snapshots');
is(status(), "1|retired|0\n2|primary|" . ($users + 2), 'nothing of it has changed anything');

# Under load: lookups, first keys of users, calls with their own keys, while the master key changes and the old one is taken away.
{
	ok(load_keys(1), 'the key in use');
	my $load = "$directory/load";
	append_to_file("$load.lookup", <<"SCRIPT");
\\set n random(1, $users)
SELECT 1 / (keyvault.user_api_key('openai', 'u' || :n) = 'sk-tap-key-of-user-number-' || :n)::integer;
SELECT 1 / (keyvault.user_api_keys('u' || :n) ->> 'openai' = 'sk-tap-key-of-user-number-' || :n)::integer;
SCRIPT
	append_to_file("$load.store", <<'SCRIPT');
\set n random(1, 1000000000)
SELECT keyvault.store_api_key('openai', 'sk-tap-key-of-a-new-user-' || :n, user_id => 'new' || :n);
SELECT 1 / (keyvault.user_api_key('openai', 'new' || :n) = 'sk-tap-key-of-a-new-user-' || :n)::integer;
SCRIPT
	# A statement of many stores and lookups, which hears of no reload while it runs.
	append_to_file("$load.long", <<"SCRIPT");
SELECT count(1 / (keyvault.user_api_key('openai', 'u' || n) = 'sk-tap-key-of-user-number-' || n)::integer), count(pg_sleep(0.01)) FROM generate_series(1, 200) n;
SCRIPT
	append_to_file("$load.call", <<"SCRIPT");
\\set n random(1, $users)
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_completion_tokens": 10, "messages": [{"role": "user", "content": "rotation"}]}', user_id => 'u' || :n, payer => 'user');
SCRIPT
	my ($out, $err) = ('', '');
	my $pgbench = IPC::Run::start([ 'pgbench', '-n', '-c', '8', '-j', '2', '-T', '12', '-f', "$load.lookup\@8", '-f', "$load.store\@2", '-f', "$load.long\@1",
		'-f', "$load.call\@1", $node->connstr('postgres') ], '>', \$out, '2>', \$err);
	my $first = sql('SELECT count(*) FROM keyvault.data_keys');
	wait_until(sub { sql('SELECT count(*) FROM keyvault.data_keys') > $first });
	foreach my $next (3, 4)
	{
		load_keys($next, $next == 3 ? 1 : 3);
		is(state_of($node, 'CALL keyvault.rotate_master_key(20)'), '', 'a rotation under load');
		is(sql("SELECT count(*) FROM keyvault.master_key_status WHERE status = 'old' OR (status = 'retired' AND data_keys > 0)"), '0',
			'it leaves nothing to do');
		load_keys($next);
	}
	ok($pgbench->finish, 'no lookup and no store failed meanwhile') or diag($err);
	unlike($err, qr/ERROR/, 'no error at all');
	like($out, qr/number of transactions actually processed: [1-9]/, 'there was load');
	ok(wait_until(sub { sql('SELECT count(*) FROM keyvault.requests WHERE finished_at IS NULL') eq '0' }), 'every call ends');
	is(sql('SELECT DISTINCT status FROM keyvault.requests'), 'done', 'well');
	all_open('after two rotations under load');
}

# A session that stores a first key under the old master key, and has not committed, is waited for.
{
	load_keys(5, 4);
	my $session = $node->background_psql('postgres');
	$session->query_safe("BEGIN; SELECT keyvault.store_api_key('openai', 'sk-tap-key-of-a-slow-one', user_id => 'slow')");
	my $old = $node->background_psql('postgres');
	$old->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM keyvault.data_keys');
	my $rotation = start_sql('CALL keyvault.rotate_master_key(10)');
	ok(wait_until(sub { waiting('CALL keyvault.rotate%') ne '' }), 'a rotation waits for a first key that is not committed');
	is(sql("SELECT count(*) FROM keyvault.master_keys WHERE status = 'old'"), 1, 'and has not retired the key it is under');
	is(state_of($node, "SELECT keyvault.store_api_key('openai', 'sk-tap-key-of-another', user_id => 'meanwhile')"), '', 'others store first keys meanwhile');
	$session->query_safe('COMMIT');
	$rotation->{harness}->finish;
	is($rotation->{err}, '', 'then it ends');
	is(sql("SELECT count(*) FROM keyvault.master_key_status WHERE status <> 'primary' AND (status <> 'retired' OR data_keys > 0)"), 0, 'with nothing left over');
	$old->query_safe("SELECT keyvault.store_api_key('openai', 'sk-tap-key-of-an-old-snapshot', user_id => 'old_snapshot'); COMMIT");
	is(sql("SELECT count(*) FROM keyvault.master_key_status WHERE status = 'retired' AND data_keys > 0"), 0, 'an old snapshot does not wrap under the retired key');
	load_keys(5);
	is(sql("SELECT keyvault.user_api_key('openai', u) FROM unnest('{slow,meanwhile,old_snapshot}'::text[]) u"),
		"sk-tap-key-of-a-slow-one\nsk-tap-key-of-another\nsk-tap-key-of-an-old-snapshot", 'all open under the new key alone');
	$_->quit foreach $session, $old;

	# A prepared transaction is waited for, too.
	load_keys(6, 5);
	sql("BEGIN; SELECT keyvault.store_api_key('openai', 'sk-tap-key-of-a-prepared-one', user_id => 'prepared'); PREPARE TRANSACTION 'first'");
	$rotation = start_sql('CALL keyvault.rotate_master_key(10)');
	ok(wait_until(sub { waiting('CALL keyvault.rotate%') ne '' }), 'a prepared transaction is waited for');
	sql("COMMIT PREPARED 'first'");
	$rotation->{harness}->finish;
	load_keys(6);
	is(sql("SELECT keyvault.user_api_key('openai', 'prepared')"), 'sk-tap-key-of-a-prepared-one', 'and its key opens');
}

# kill -9 in the middle.
{
	load_keys(7, 6);
	my $session = $node->background_psql('postgres');
	$session->query_safe("BEGIN; SELECT FROM keyvault.data_keys WHERE user_id = 'u77' FOR UPDATE");
	my $rotation = start_sql('CALL keyvault.rotate_master_key(10)');
	ok(wait_until(sub { waiting('CALL keyvault.rotate%') ne '' }), 'a rotation is under way');
	my $half = sql("SELECT data_keys FROM keyvault.master_key_status WHERE status = 'primary'");
	cmp_ok($half, '>', 0, 'some data keys are wrapped again');
	cmp_ok(sql("SELECT data_keys FROM keyvault.master_key_status WHERE status = 'old'"), '>', 0, 'others are not');
	kill 'KILL', waiting('CALL keyvault.rotate%');
	$rotation->{harness}->finish;
	eval { $session->quit };
	ok(wait_until(sub { ($node->psql('postgres', 'SELECT 1'))[0] == 0 }), 'the server recovers from the crash');
	is(sql("SELECT data_keys FROM keyvault.master_key_status WHERE status = 'primary'"), $half, 'what was done is done');
	all_open('half way');
	is(sql('SELECT keyvault.rotate_master_key()'), sql('SELECT count(*) FROM keyvault.data_keys') - $half, 'another call does the rest');
	is(sql("SELECT count(*) FROM keyvault.master_key_status WHERE status = 'old'"), 0, 'and retires the old key');
	load_keys(7);
	all_open('after the crash');
}

# One data key that cannot be opened does not stop the others, and keeps its master key from being retired.
{
	sql("UPDATE keyvault.data_keys SET wrapped = set_byte(wrapped, 40, 255 - get_byte(wrapped, 40)) WHERE user_id IN ('u5', 'u400')");
	load_keys(8, 7);
	my ($code, $out, $err) = $node->psql('postgres', 'CALL keyvault.rotate_master_key(7)');
	is($code, 0, 'a rotation over two broken data keys ends');
	like($err, qr/WARNING:  data key of user "u$_" cannot be opened/, "and names u$_") foreach 5, 400;
	is(sql("SELECT data_keys FROM keyvault.master_key_status WHERE status = 'old'"), 2, 'their master key is not retired');
	sql("DELETE FROM keyvault.data_keys WHERE user_id IN ('u5', 'u400')");
	is(sql('SELECT keyvault.rotate_master_key()'), 0, 'when they are gone');
	is(sql("SELECT count(*) FROM keyvault.master_key_status WHERE status = 'old'"), 0, 'it is');
}

# No nonce is used twice: of wraps of many users, of several of one user, before a rotation and after it.
{
	my $keep = 'INSERT INTO wraps SELECT wrapped FROM keyvault.data_keys';
	sql("CREATE TABLE wraps (wrapped bytea); $keep");
	sql("SELECT keyvault.rotate_data_key('u' || n) FROM generate_series(101, 150) n");
	sql($keep);
	load_keys(9, 8);
	sql('SELECT keyvault.rotate_master_key()');
	sql($keep);
	my ($wraps, $nonces) = split /\|/, sql('SELECT count(DISTINCT wrapped), count(DISTINCT substr(wrapped, 25, 12)) FROM wraps');
	cmp_ok($wraps, '>', 2 * $users, 'wraps under two master keys');
	is($nonces, $wraps, 'each have a nonce of their own');
}
$node->stop;

done_testing();
