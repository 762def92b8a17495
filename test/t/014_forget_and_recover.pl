# Users suspended and erased while they are busy, data keys rotated under load, and backups with the right and the wrong master key.
use strict;
use warnings FATAL => 'all';
use IPC::Run ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $file = new_master_key();
my $node = new_node('forget', master_key => $file, init => { allows_streaming => 1, has_archiving => 1 },
	conf => "max_connections = 60\ndeadlock_timeout = 100ms\n");
use_mock($node, $port);

sub sql { return $node->safe_psql('postgres', @_) }
sub error_of { return sql("SELECT error FROM keyvault.requests WHERE id = '$_[0]'") }

# Suspended with one call under way and another in the queue.
{
	sql("SELECT keyvault.upsert_user('busy')");
	set_config($node, 'keyvault.max_concurrent_requests_per_user', 1);
	my $sent = queue_request($node, 'busy', 'under way [[mock: gate=suspended]]');
	ends_as($node, $sent, 'sent', 'a call is under way');
	my $queued = queue_request($node, 'busy', 'in the queue');
	sql("SELECT keyvault.suspend_user('busy', 'test')");
	mock_open($port, 'suspended');
	ends_as($node, $sent, 'done', 'suspended: what was under way is answered');
	ends_as($node, $queued, 'failed', 'suspended: what was in the queue fails');
	like(error_of($queued), qr/^KV007: user "busy" is suspended/, 'with KV007');
	is(mock_received($port, 'in the queue'), 0, 'and was not sent');
	is(sql("SELECT credits_held FROM keyvault.credit_status WHERE user_id = 'busy'"), '0.000000', 'its credits are given back');
	sql("SELECT keyvault.resume_user('busy')");
	ends_as($node, queue_request($node, 'busy', 'resumed'), 'done', 'resumed: calls are made');
}

# Erased with one call under way and another in the queue.
{
	sql("SELECT keyvault.store_api_key('openai', 'sk-tap-of-the-erased-one', user_id => 'busy')");
	my $sent = queue_request($node, 'busy', 'private words [[mock: gate=erased]]', payer => "'platform'", metadata => q('{"name": "private"}'));
	ends_as($node, $sent, 'sent', 'a call is under way');
	my $queued = queue_request($node, 'busy', 'more private words');
	sql("SELECT keyvault.erase_user('busy')");
	mock_open($port, 'erased');
	ends_as($node, $sent, 'done', 'erased: what was under way ends');
	is(mock_received($port, 'more private words'), 0, 'what was in the queue was not sent');
	is(sql("SELECT count(*) FROM keyvault.requests WHERE id = '$queued'"), 0, 'and is gone');
	is(sql("SELECT body IS NULL FROM keyvault.responses WHERE id = '$sent'"), 't', 'the answer is dropped');
	cmp_ok(sql("SELECT credits FROM keyvault.usage_records WHERE request_id = '$sent'"), '>', 0, 'what it used is recorded');
	foreach my $table (qw(users requests responses usage_records api_keys))
	{
		is(sql("SELECT count(*) FROM keyvault.$table t WHERE t::text ~ 'private'"), 0, "nothing private is left in $table");
	}
	balances_are_sums($node, 'balances are sums');
	is(state_of($node, "SELECT keyvault.request('openai', " . chat('again') . ", user_id => 'busy')"), 'KV007', 'no further call');
	set_config($node, 'keyvault.max_concurrent_requests_per_user', undef);
}

# Nor does a request stay whose transaction ends behind an erasure.
{
	sql("SELECT keyvault.upsert_user('late')");
	my $session = $node->background_psql('postgres');
	$session->query_safe('BEGIN');
	my $late = $session->query_safe("SELECT keyvault.request('openai', " . chat('late private words') . q{, user_id => 'late', payer => 'platform', metadata => '{"name": "private"}')});
	sql("SELECT keyvault.erase_user('late')");
	$session->query_safe('COMMIT');
	$session->quit;
	ends_as($node, $late, 'failed', 'a request that an erasure could not see fails');
	is(mock_received($port, 'late private words'), 0, 'and was not sent');
	is(sql("SELECT body, metadata FROM keyvault.requests WHERE id = '$late'"), '{}|{"erased": true}', 'what it said is gone');
}

# Who stores a key at the same time is before or behind an erasure, and leaves nothing under it.
{
	sql("SELECT keyvault.upsert_user('racer')");
	my $session = $node->background_psql('postgres');
	$session->query_safe("BEGIN; SELECT keyvault.store_api_key('openai', 'sk-tap-stored-before-erasure', user_id => 'racer')");
	my ($out, $err) = ('', '');
	my $erasure = IPC::Run::start([ 'psql', '-XAtq', '-d', $node->connstr('postgres'), '-c', "SELECT keyvault.erase_user('racer')" ], '>', \$out, '2>', \$err);
	ok(wait_until(sub { sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT keyvault.erase%' AND wait_event_type = 'Lock'") }),
		'an erasure waits for who is storing a key');
	$session->query_safe('COMMIT');
	$erasure->finish;
	is($err, '', 'then it is done');
	is(sql("SELECT (SELECT count(*) FROM keyvault.api_keys WHERE user_id = 'racer') + (SELECT count(*) FROM keyvault.data_keys WHERE user_id = 'racer')"),
		0, 'and nothing is left');
	$session->quit;
}

# Data keys of the same few users rotated, stored under and looked up, all at once, and users erased.
{
	sql("SELECT keyvault.store_api_key('openai', 'sk-tap-constant-key-of-' || n, user_id => 'hot' || n) FROM generate_series(1, 5) n");
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '12', '-j', '2', '-t', '60' ],
		[ 3, <<'SCRIPT' ], [ 3, <<'SCRIPT' ], [ 6, <<'SCRIPT' ], [ 1, <<'SCRIPT' ], [ 1, <<'SCRIPT' ]);
\set n random(1, 5)
SELECT keyvault.rotate_data_key('hot' || :n);
SCRIPT
\set n random(1, 5)
\set m random(1, 3)
SELECT keyvault.store_api_key('exa', 'tap-changing-key-' || :client_id || '-' || :m, 'name' || :m, 'hot' || :n);
SCRIPT
\set n random(1, 5)
SELECT 1 / (keyvault.user_api_key('openai', 'hot' || :n) = 'sk-tap-constant-key-of-' || :n)::integer;
SELECT count(*), 1 / (count(*) = count(keyvault.user_api_key('exa', user_id, name)))::integer FROM keyvault.api_keys WHERE user_id = 'hot' || :n AND provider = 'exa';
SCRIPT
SELECT keyvault.rotate_data_keys('0 s', 3);
SCRIPT
\set n random(1, 1000000)
SELECT keyvault.store_api_key('openai', 'sk-tap-soon-to-be-erased', user_id => 'erased' || :n);
SELECT keyvault.erase_user('erased' || :n);
SCRIPT
	is($code, 0, 'rotations, stores, lookups and erasures at once all succeed') or diag($err);
	unlike($err, qr/ERROR|WARNING/, 'with no word about a key that does not open');
	is(sql(q(SELECT count(*) FROM keyvault.api_keys WHERE user_id LIKE 'hot%' AND keyvault.user_api_key(provider, user_id, name) IS NULL)), 0, 'every key opens');
	is(sql("SELECT count(*) FROM keyvault.api_keys k WHERE user_id LIKE 'erased%'"), 0, 'nothing of the erased is left');
	is(sql("SELECT max(n) FROM (SELECT count(*) AS n FROM keyvault.data_keys WHERE user_id LIKE 'hot%' GROUP BY user_id) v"), 1, 'one version each is left');
	unlike(slurp_file($node->logfile), qr/deadlock detected/, 'no deadlock');
}

# One user's, by so many that who waits for one rotation is overtaken by the next: there is one data key at any time, and
# what is stored is sealed under it.
{
	sql("SELECT keyvault.store_api_key('openai', 'sk-tap-of-the-hottest', user_id => 'hottest')");
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '12', '-j', '2', '-t', '100' ], [ 1, <<'SCRIPT' ], [ 1, <<'SCRIPT' ], [ 1, <<'SCRIPT' ]);
SELECT keyvault.rotate_data_key('hottest');
SCRIPT
\set m random(1, 8)
SELECT keyvault.store_api_key('exa', 'tap-changing-key-' || :client_id || '-' || :m, 'name' || :m, 'hottest');
SCRIPT
SELECT 1 / (count(*) = 1)::integer FROM keyvault.data_keys WHERE user_id = 'hottest';
SCRIPT
	is($code, 0, 'rotations and stores of one user all succeed') or diag($err);
	unlike($err, qr/ERROR|WARNING/, 'and nothing is said of a key that does not open');
	is(sql(q(SELECT count(*), count(keyvault.user_api_key(provider, user_id, name)) FROM keyvault.api_keys WHERE user_id = 'hottest')), '9|9', 'every key opens');
}

# A base backup, and a point in time: the same master key opens what was there then, another does not.
{
	sql("SELECT keyvault.store_api_key('openai', 'sk-tap-before-the-backup', user_id => 'kept')");
	$node->backup('base');
	sql("SELECT keyvault.store_api_key('exa', 'tap-before-the-point-in-time', user_id => 'kept')");
	sql("SELECT pg_create_restore_point('then')");
	sql("SELECT keyvault.store_api_key('exa', 'tap-after-the-point-in-time', user_id => 'kept')");
	sql("SELECT keyvault.erase_user('kept')");
	sql('SELECT pg_switch_wal()');
	my $expected = sql("SELECT kek_id FROM keyvault.master_key_status WHERE status = 'primary'");
	foreach my $case ([ 'same', $file ], [ 'other', new_master_key() ], [ 'none', '' ])
	{
		my ($name, $key) = @$case;
		my $copy = PostgreSQL::Test::Cluster->new("copy_$name");
		$copy->init_from_backup($node, 'base', has_restoring => 1, standby => 0);
		$copy->append_conf('postgresql.conf', <<"CONF");
recovery_target_name = 'then'
recovery_target_action = 'promote'
archive_mode = off
keyvault.databases = 'none'
keyvault.master_key_file = '$key'
CONF
		$copy->start;
		ok(wait_until(sub { $copy->safe_psql('postgres', 'SELECT pg_is_in_recovery()') eq 'f' }), "$name master key: restored");
		if ($name eq 'same')
		{
			is($copy->safe_psql('postgres', "SELECT keyvault.user_api_keys('kept')"),
				'{"exa": "tap-before-the-point-in-time", "openai": "sk-tap-before-the-backup"}', 'same master key: the keys of then open, the erased too');
			is(state_of($copy, "SELECT keyvault.store_api_key('exa', 'tap-in-the-copy', user_id => 'kept')"), '', 'and others are stored');
		}
		else
		{
			my ($code, $out, $err) = $copy->psql('postgres', "\\set VERBOSITY verbose\nSELECT keyvault.user_api_keys('kept')");
			like($err, qr/ERROR:  KV004/, "$name master key: KV004");
			like($err, qr/Expected key id $expected, loaded [0-9a-f]{32}/, 'it names both') if $name eq 'other';
		}
		$copy->stop;
	}
}
$node->stop;

done_testing();
