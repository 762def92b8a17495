# Copies of a vault: a hot standby and its promotion, pg_dump and restore, logical replication of usage records.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $own_key = 'sk-tap-replica-and-dump-0123456789';
my $exa_key = 'tap-exa-replica-and-dump';

sub keyvault_processes
{
	my ($node) = @_;
	return $node->safe_psql('postgres', q(SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'keyvault%'));
}

# Keys, credits, usage of several months, requests and changed configuration.
sub fill
{
	my ($node) = @_;
	use_mock($node, $port);
	$node->safe_psql('postgres', <<"SQL");
UPDATE keyvault.plans SET credits_per_usd = 2000 WHERE plan = 'pro';
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('team', 777);
INSERT INTO keyvault.providers (provider, base_url) VALUES ('acme', 'https://api.acme.example');
UPDATE keyvault.model_prices SET input_usd_per_mtok = 123 WHERE provider = 'openai' AND model = 'gpt-5-mini';
INSERT INTO keyvault.model_prices (provider, model, input_usd_per_mtok, output_usd_per_mtok) VALUES ('acme', 'one', 1, 2);
SELECT keyvault.upsert_user('rich', plan => 'pro'), keyvault.upsert_user('poor'), keyvault.upsert_user('of_team', plan => 'team');
SELECT keyvault.store_api_key('openai', '$own_key', user_id => 'rich'), keyvault.store_api_key('exa', '$exa_key', user_id => 'rich');
SQL
	# The worker makes them too; neither waits long for the other's lock.
	wait_until(sub { ($node->psql('postgres', 'SELECT keyvault._make_usage_partitions()'))[0] == 0 }) or die 'no partitions';
	$node->safe_psql('postgres', <<'SQL');
INSERT INTO keyvault.usage_records (user_id, credits, created_at)
SELECT user_id, 1.5, created_at
  FROM unnest('{rich, poor}'::text[]) user_id, unnest(ARRAY[now(), now() - interval '2 years', now() + interval '1 month']) created_at,
       generate_series(1, 10);
SQL
	# A period that has ended, grants spent in part, an open hold, a budget and a threshold.
	$node->safe_psql('postgres', <<'SQL');
SELECT keyvault.grant_credits('poor', 100, 'spent in part'), keyvault.grant_credits('poor', 100, 'expires', now() + interval '1 year');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('poor', 1005);
UPDATE keyvault.credit_balances SET period_anchor = now() - interval '1 hour', period_start = period_start - interval '1 month',
       period_end = now() - interval '1 hour' WHERE user_id = 'poor';
SELECT keyvault.record_usage('chat', 'gpt-5-mini', 1000, 500, user_id => 'poor', idempotency_key => 'once'),
       keyvault.reserve_credits(3, '1 day', 'poor'), keyvault.set_budget('poor', 10000);
SELECT keyvault.refund_usage(usage_id, 'a bad answer', 'poor') FROM keyvault.usage_keys;
SQL
	ends_as($node, queue_request($node, 'poor', 'hello'), 'done', 'a call is done');
	ends_as($node, queue_request($node, 'poor', '[[mock: hang]]', timeout => "'200 ms'"), 'unknown', 'another keeps a hold');
	return;
}

# What a copy must have in common with the original, by name.
my %content = (
	balances => 'SELECT * FROM keyvault.credit_balances ORDER BY user_id',
	grants => 'SELECT * FROM keyvault.credit_grants ORDER BY user_id, id',
	periods => 'SELECT * FROM keyvault.credit_periods ORDER BY user_id, id',
	notices => 'SELECT * FROM keyvault.credit_notices ORDER BY user_id, period_start, percent',
	budgets => 'SELECT * FROM keyvault.budget_status ORDER BY user_id, id',
	ledger => 'SELECT * FROM keyvault.verify_ledger()',
	'usage keys' => 'SELECT * FROM keyvault.usage_keys ORDER BY user_id, idempotency_key',
	holds => 'SELECT * FROM keyvault.credit_holds ORDER BY user_id, id',
	credit_status => 'SELECT * FROM keyvault.credit_status ORDER BY user_id',
	users => 'SELECT * FROM keyvault.users ORDER BY user_id',
	plans => 'SELECT * FROM keyvault.plans ORDER BY plan',
	providers => 'SELECT provider, base_url, allowed_host, seeded FROM keyvault.providers ORDER BY provider',
	'number of prices' => 'SELECT count(*) FROM keyvault.model_prices',
	'changed prices' => 'SELECT * FROM keyvault.model_prices WHERE NOT seeded ORDER BY provider, model, valid_from',
	'usage records' => 'SELECT user_id, count(*), sum(credits), min(created_at), max(created_at) FROM keyvault.usage_records GROUP BY user_id ORDER BY user_id',
	partitions => q(SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'keyvault.usage_records'::regclass ORDER BY 1),
	requests => 'SELECT user_id, id, status, hold_id FROM keyvault.requests ORDER BY id',
	responses => 'SELECT user_id, id, status, body, credits FROM keyvault.responses ORDER BY id',
	keys => q(SELECT keyvault.user_api_keys('rich')),
);

# Test that a database has all of another's, and that its ledger is sound.
sub is_copy_of
{
	my ($copy, $database, $original, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	foreach my $part (sort keys %content)
	{
		is($copy->safe_psql($database, $content{$part}), $original->safe_psql('postgres', $content{$part}), "$name: $part");
	}
	is($copy->safe_psql($database, $content{ledger}), '', "$name: the ledger is sound");
	return;
}

sub credits_used
{
	my ($node, $user, $database) = @_;
	return $node->safe_psql($database // 'postgres', "SELECT credits_used FROM keyvault.credit_balances WHERE user_id = '$user'");
}

# Test that a usage record, inserted there, is debited, through the parent and through a partition.
sub still_debits
{
	my ($node, $database, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $before = credits_used($node, 'rich', $database);
	my $partition = $node->safe_psql($database, 'SELECT tableoid::regclass FROM keyvault.usage_records ORDER BY created_at DESC LIMIT 1');
	isnt($partition, 'keyvault.usage_records_default', "$name: a month has a partition");
	$node->safe_psql($database, <<"SQL");
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('rich', 2), ('rich', 3);
INSERT INTO $partition (user_id, credits, created_at) SELECT 'rich', 7, max(created_at) FROM keyvault.usage_records;
SQL
	is(credits_used($node, 'rich', $database) - $before, 12, "$name: further usage is debited");
	is(state_of($node, "INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('poor', 2000)", $database), 'KV001',
		"$name: and limited");
	return;
}

# The query by which doc/keyvault.md has a restore checked.
my ($check) = slurp_file('doc/keyvault.md') =~ /^(SELECT \(SELECT count\(\*\) FROM keyvault\.users\).*?;)$/ms or die 'no such query';

# A hot standby.
{
	my $primary = new_node('primary', init => { allows_streaming => 1 });
	fill($primary);
	$primary->backup('base');
	my $standby = PostgreSQL::Test::Cluster->new('standby');
	$standby->init_from_backup($primary, 'base', has_streaming => 1);
	$standby->start;
	$primary->safe_psql('postgres', "SELECT keyvault.store_api_key('exa', 'tap-stored-after-the-backup', user_id => 'later')");
	$primary->wait_for_catchup($standby);
	is_copy_of($standby, 'postgres', $primary, 'standby');
	is($standby->safe_psql('postgres', "SELECT keyvault.user_api_key('exa', 'later')"), 'tap-stored-after-the-backup',
		'standby: a key stored later opens');
	is($standby->safe_psql('postgres', "BEGIN; SET LOCAL keyvault.user_id = 'rich'; SELECT keyvault.user_api_key('exa'); COMMIT"), $exa_key,
		'standby: an identity can be taken');
	is(state_of($standby, "SELECT keyvault.store_api_key('exa', 'tap-not-on-a-standby', user_id => 'rich')"), '25006',
		'standby: a key cannot be stored');
	is(state_of($standby, "SELECT keyvault.request('openai', " . chat('hello') . ", user_id => 'rich')"), '25006',
		'standby: a request cannot be queued');
	isnt(keyvault_processes($primary), '0', 'the primary has a launcher');
	is(keyvault_processes($standby), '0', 'the standby has none, and no worker');

	# A call under way keeps the others in the queue.
	set_config($primary, 'keyvault.max_concurrent_requests', 1);
	my $sent = queue_request($primary, 'poor', 'before the promotion [[mock: hang]]');
	ends_as($primary, $sent, 'sent', 'a call is under way');
	my @queued = map { queue_request($primary, 'poor', "queued $_ before the promotion") } 1 .. 3;
	$primary->wait_for_catchup($standby);
	is(mock_received($port, 'queued 1 before'), 0, 'nothing of the queue was sent');
	$primary->stop('immediate');
	$standby->promote;
	ends_as($standby, $sent, 'unknown', 'promoted: what was under way is unknown');
	ends_as($standby, $_, 'done', 'promoted: what was queued is sent') foreach @queued;
	is(mock_received($port, 'before the promotion'), 4, 'each once');
	is($standby->safe_psql('postgres', 'SELECT * FROM keyvault.verify_ledger()'), '', 'promoted: the ledger is sound');
	still_debits($standby, 'postgres', 'promoted');
	$standby->stop;
}

my $master_key = new_master_key();
my $source = new_node('source', init => { allows_streaming => 'logical' }, master_key => $master_key);
fill($source);

# pg_dump and restore.
{
	my $directory = PostgreSQL::Test::Utils::tempdir;
	my $target = new_node('target', master_key => $master_key, init_only => 1);
	$target->start;
	command_ok([ 'pg_dump', '-f', "$directory/plain.sql", $source->connstr('postgres') ], 'pg_dump as SQL');
	command_ok([ 'pg_dump', '-Fc', '-f', "$directory/custom", $source->connstr('postgres') ], 'pg_dump as an archive');
	my $dump = slurp_file("$directory/plain.sql");
	like($dump, qr/^COPY keyvault\.api_keys /m, 'the dump has the keys');
	unlike($dump, qr/\Q$_\E/, 'but not in the clear') foreach $own_key, $exa_key, 'platform-key-of-';

	# As over a slow line: the worker that CREATE EXTENSION starts is there before the tables.
	(my $slow = $dump) =~ s/^(CREATE EXTENSION [^;]*keyvault[^;]*;)$/$1\nSELECT pg_sleep(1);/m;
	isnt($slow, $dump, 'the dump makes the extension');
	append_to_file("$directory/slow.sql", $slow);

	$target->safe_psql('postgres', "CREATE DATABASE $_ TEMPLATE template0") foreach 'plain', 'slow', 'custom';
	foreach my $database ('plain', 'slow', 'custom')
	{
		my @restore = $database eq 'custom'
			? ('pg_restore', '--exit-on-error', '-d', $target->connstr($database), "$directory/custom")
			: ('psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', "$directory/$database.sql", $target->connstr($database));
		ok(run_log(\@restore), "$database: restored") or next;
		is_copy_of($target, $database, $source, $database);
		is($target->safe_psql($database, $check), $source->safe_psql('postgres', $check), "$database: the check of a restore agrees");
		still_debits($target, $database, $database);
		$target->safe_psql($database, "SELECT keyvault.store_api_key('exa', 'tap-stored-after-the-restore', user_id => 'rich')");
		is($target->safe_psql($database, "SELECT keyvault.user_api_key('exa', 'rich')"), 'tap-stored-after-the-restore',
			"$database: a key can be stored");
		ends_as($target, queue_request($target, 'poor', 'restored', database => $database), 'done', "$database: calls are made", $database);
	}

	# Who has to keep to row-level security dumps nothing, and is told only when not asking for it.
	$source->safe_psql('postgres', "CREATE ROLE dumper LOGIN; GRANT pg_read_all_data TO dumper; SELECT keyvault.grant_access('dumper', 'user')");
	my $as_dumper = $source->connstr('postgres') . ' user=dumper';
	command_fails_like([ 'pg_dump', '-f', "$directory/refused.sql", $as_dumper ], qr/row-level security/, 'pg_dump of a role without BYPASSRLS fails');
	command_ok([ 'pg_dump', '--enable-row-security', '--no-privileges', '-f', "$directory/partial.sql", $as_dumper ], 'and with --enable-row-security it does not');
	$target->safe_psql('postgres', 'CREATE DATABASE partial TEMPLATE template0');
	ok(run_log([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', "$directory/partial.sql", $target->connstr('partial') ]), 'nor does its restore');
	like($target->safe_psql('partial', $check), qr/^0\|\d+\|0\|0\|.*\|0$/, 'the check shows that users and keys are missing, sound as the ledger is');

	# The keys open with no other master key, and the error says which one they need.
	my $expected = $source->safe_psql('postgres', "SELECT encode(kek_id, 'hex') FROM keyvault.master_keys");
	set_config($target, 'keyvault.master_key_file', new_master_key());
	my ($code, $out, $err) = $target->psql('plain', "SELECT keyvault.user_api_keys('rich')");
	like($err, qr/Expected key id $expected, loaded (?!$expected)[0-9a-f]{32}/, 'another master key: expected and loaded id');
	is(state_of($target, "SELECT keyvault.user_api_key('openai', 'rich')", 'plain'), 'KV004', 'another master key: SQLSTATE');
	is(state_of($target, "SELECT keyvault.store_api_key('exa', 'tap-under-another-key', user_id => 'rich')", 'plain'), 'KV004',
		'another master key: nothing is stored under it');
	unlike($target->safe_psql('plain', "SELECT keyvault.user_api_keys('of_team')"), qr/\w/, 'another master key: who has no keys needs none');
	$target->stop;
}

# Logical replication.
{
	my $subscriber = new_node('subscriber', init => { allows_streaming => 'logical' });
	$subscriber->safe_psql('postgres', "SELECT keyvault.upsert_user('rich', plan => 'pro'), keyvault._make_usage_partitions()");
	$source->safe_psql('postgres', 'CREATE PUBLICATION usage FOR TABLE keyvault.usage_records WITH (publish_via_partition_root)');
	$subscriber->safe_psql('postgres', "CREATE SUBSCRIPTION usage CONNECTION '" . $source->connstr . " dbname=postgres' PUBLICATION usage");
	$subscriber->wait_for_subscription_sync($source, 'usage');
	my $count = 'SELECT count(*), sum(credits) FROM keyvault.usage_records';
	is($subscriber->safe_psql('postgres', $count), $source->safe_psql('postgres', $count), 'subscriber: the first copy');
	is(credits_used($subscriber, 'rich'), '0.000000', 'subscriber: it is not debited');
	is(credits_used($subscriber, 'poor'), '', 'subscriber: no user is made for it');

	my $before = credits_used($source, 'rich');
	$source->safe_psql('postgres', "INSERT INTO keyvault.usage_records (user_id, credits) SELECT u, 4 FROM unnest('{rich, poor}'::text[]) u, generate_series(1, 5)");
	$source->wait_for_catchup('usage');
	is($subscriber->safe_psql('postgres', $count), $source->safe_psql('postgres', $count), 'subscriber: what follows');
	is(credits_used($subscriber, 'rich'), '0.000000', 'subscriber: is not debited either');
	is(credits_used($source, 'rich') - $before, 20, 'it was debited where it was inserted');
	$subscriber->safe_psql('postgres', "INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('rich', 6)");
	is(credits_used($subscriber, 'rich'), '6.000000', 'subscriber: a row of its own is debited');
	$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION usage');
	$subscriber->stop;
}
$source->stop;

done_testing();
