# The life of the worker: when it comes and goes, what it must not hold up, and what a stop or a crash leaves behind.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);
use Keyvault;

my $port = start_mock();
# Crashes are part of the test; autovacuum would disturb the counts of transactions.
my $node = new_node('worker', conf => <<'CONF');
restart_after_crash = on
max_worker_processes = 16
max_prepared_transactions = 5
autovacuum = off
CONF
use_mock($node, $port);

sub sql { return $node->safe_psql('postgres', @_) }

# A database with the extension whose calls go to the stand-in.
sub new_database
{
	my ($name) = @_;
	sql(qq(CREATE DATABASE "$name"));
	$node->safe_psql($name, 'CREATE EXTENSION keyvault CASCADE');
	use_mock($node, $port, $name);
	return;
}

sub count_requests
{
	my ($user, $status) = @_;
	return sql("SELECT count(*) FROM keyvault.requests WHERE user_id = '$user' AND status = '$status'");
}

# Queue a call that the stand-in answers when its gate is opened, and wait until it is sent.
sub send_gated
{
	my ($user, $gate, %argument) = @_;
	my $id = queue_request($node, $user, "of $user [[mock: gate=$gate]]", %argument);
	wait_until(sub { request_status($node, $id, $argument{database}) eq 'sent' && mock_received($port, "of $user [[mock: gate=$gate]]") })
		or die "the call of $user is not sent";
	return $id;
}

# As often as a process has gone to sleep of its own accord.
sub sleeps_of
{
	my ($pid) = @_;
	return slurp_file("/proc/$pid/status") =~ /^voluntary_ctxt_switches:\s+(\d+)/m ? $1 : die 'no count';
}

sub transactions
{
	return sql("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = 'postgres'");
}

sub commit_wakes
{
	sql("SELECT keyvault.upsert_user('commit')");
	my $session = $node->background_psql('postgres');
	$session->query_safe('BEGIN');
	my $open = $session->query_safe("SELECT keyvault.request('openai', " . chat('not yet committed') . ", user_id => 'commit')");
	ends_as($node, queue_request($node, 'other', 'a committed one'), 'done', 'a committed request is sent');
	is(mock_received($port, 'not yet committed'), 0, 'one of an open transaction is not');
	$session->query_safe('COMMIT');
	ends_as($node, $open, 'done', 'COMMIT wakes the worker');

	$session->query_safe('BEGIN');
	$session->query_safe("SELECT keyvault.request('openai', " . chat('rolled back') . ", user_id => 'commit')");
	$session->query_safe('ROLLBACK; BEGIN; SAVEPOINT s');
	$session->query_safe("SELECT keyvault.request('openai', " . chat('rolled back') . ", user_id => 'commit')");
	$session->query_safe('ROLLBACK TO SAVEPOINT s');
	my $kept = $session->query_safe("SELECT keyvault.request('openai', " . chat('kept') . ", user_id => 'commit')");
	$session->query_safe('COMMIT');
	$session->quit;
	ends_as($node, $kept, 'done', 'a request behind a savepoint that was rolled back is sent');
	is(mock_received($port, 'rolled back'), 0, 'rolled back requests never are');
	return;
}

# Autovacuum goes by the statistics, and a busy worker does not end, when they would be reported for it.
sub reports_statistics
{
	my $updates = "SELECT n_tup_upd FROM pg_stat_user_tables WHERE relid = 'keyvault.requests'::regclass";
	my $before = sql($updates);
	my $pid = worker_pid($node);
	ends_as($node, queue_request($node, 'counted', 'hello'), 'done', 'a request is sent');
	ok(wait_until(sub { sql($updates) > $before }), 'the statistics know of it');
	is(worker_pid($node), $pid, 'though the worker stays');
	return;
}

sub leaves_when_idle
{
	set_config($node, 'keyvault.worker_idle_timeout', '500ms');
	for my $time ('first', 'second')
	{
		ends_as($node, queue_request($node, 'idle', 'hello'), 'done', "the $time request is sent");
		ok(wait_until(sub { worker_pid($node) eq '' }), 'and the worker leaves');
	}

	# Requests just when it leaves: each must find it, or its successor.
	set_config($node, 'keyvault.worker_idle_timeout', '1ms');
	my ($code, $out, $err) = run_pgbench($node, [ '-t', '200' ], [ 1, <<'SCRIPT' ]);
\set pause random(0, 2500)
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_completion_tokens": 10}', user_id => 'idle') AS id \gset
SELECT 1 / (status IN ('done', 'failed'))::integer AS answered FROM keyvault.wait_response(':id', '20 s') \gset
\sleep :pause us
SCRIPT
	is($code, 0, 'no wake-up is lost while the worker leaves') or diag($err);
	set_config($node, 'keyvault.worker_idle_timeout', undef);
	return;
}

sub does_not_poll
{
	SKIP:
	{
		skip 'no /proc on this system', 2 unless -r "/proc/$$/status";
		ends_as($node, queue_request($node, 'quiet', 'hello'), 'done', 'a worker runs');
		my %pid = (
			worker => worker_pid($node),
			launcher => sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'keyvault launcher'"),
		);
		sleep 1;
		my %before = map { $_ => sleeps_of($pid{$_}) } keys %pid;
		sleep 3;
		cmp_ok(sleeps_of($pid{$_}) - $before{$_}, '<=', 2, "the $_ sleeps while there is nothing to do") foreach sort keys %pid;
	}
	return;
}

sub serves_every_database
{
	my @databases = ('one', 'two', 'Three Databases');
	new_database($_) foreach @databases;
	my %call = map { $_ => send_gated('everywhere', 'everywhere', database => $_) } @databases;
	is(sql(q(SELECT count(DISTINCT datname) FROM pg_stat_activity WHERE backend_type = 'keyvault worker' AND datname <> 'postgres')), 3,
		'each database has a worker of its own');
	mock_open($port, 'everywhere');
	ends_as($node, $call{$_}, 'done', "database $_ is served", $_) foreach @databases;

	set_config($node, 'keyvault.databases', 'one, "Three Databases"');
	my $unserved = queue_request($node, 'restricted', 'not served', database => 'two');
	ends_as($node, queue_request($node, 'restricted', 'hello', database => $_), 'done', "$_ is one of keyvault.databases", $_)
		foreach 'one', 'Three Databases';
	is(request_status($node, $unserved, 'two'), 'queued', 'another database is not served, though its worker was there');
	is(mock_received($port, 'not served'), 0, 'nothing of it was sent');
	set_config($node, 'keyvault.databases', undef);
	ends_as($node, $unserved, 'done', 'a reload that allows it again is enough', 'two');
	sql(qq(DROP DATABASE "$_")) foreach @databases;
	return;
}

sub lets_databases_go
{
	new_database('leaving');
	sql('CREATE ROLE stranger');
	my $call = send_gated('leaving', 'leaving', database => 'leaving');
	is(state_of($node, 'SET ROLE stranger; DROP DATABASE leaving'), '42501', 'who may not drop a database');
	is(request_status($node, $call, 'leaving'), 'sent', 'does not end its calls either');

	# Another database needs every process to take part, busy workers as well.
	sql('CREATE DATABASE bystander');
	my ($code, $out, $err) = $node->psql('postgres', "SET statement_timeout = '30s';\nDROP DATABASE bystander;");
	is($code, 0, 'another database can be dropped while a call hangs') or diag($err);

	is(state_of($node, 'ALTER DATABASE leaving RENAME TO left_behind'), '', 'a database can be renamed while a call hangs');
	ends_as($node, $call, 'unknown', 'that call is unknown', 'left_behind');
	ends_as($node, queue_request($node, 'renamed', 'hello', database => 'left_behind'), 'done', 'under its new name it is served',
		'left_behind');
	is(state_of($node, 'CREATE DATABASE copied TEMPLATE left_behind'), '', 'a database can be copied while its worker idles');
	ends_as($node, queue_request($node, 'original', 'hello', database => 'left_behind'), 'done', 'the original is served',
		'left_behind');
	ends_as($node, queue_request($node, 'copy', 'hello', database => 'copied'), 'done', 'and so is the copy', 'copied');
	is(state_of($node, 'ALTER DATABASE copied RENAME TO renamed'), '', 'a database can be renamed while its worker idles');
	$node->safe_psql('postgres', "SET allow_in_place_tablespaces = on; CREATE TABLESPACE elsewhere LOCATION ''");
	is(state_of($node, 'ALTER DATABASE renamed SET TABLESPACE elsewhere'), '', 'or moved');
	ends_as($node, queue_request($node, 'moved', 'hello', database => 'renamed'), 'done', 'where it is served, too', 'renamed');
	send_gated('dropped', 'never', database => 'left_behind');
	is(state_of($node, "DROP DATABASE $_"), '', "DROP DATABASE while a worker $_") foreach 'left_behind', 'renamed';
	sql("DROP $_") foreach 'ROLE stranger', 'TABLESPACE elsewhere';
	return;
}

# template1 has a worker when it has the extension and requests.
sub lets_templates_be_copied
{
	$node->safe_psql('template1', 'CREATE EXTENSION keyvault CASCADE');
	use_mock($node, $port, 'template1');
	sql('CREATE ROLE maker CREATEDB; CREATE ROLE nobody');
	my $serve = sub { ends_as($node, queue_request($node, 'template', 'hello', database => 'template1'), 'done', 'template1 has a worker', 'template1') };
	$serve->();
	my $pid = worker_pid($node, 'template1');
	is(state_of($node, 'SET ROLE nobody; CREATE DATABASE made'), '42501', 'who may not create databases');
	is(worker_pid($node, 'template1'), $pid, 'does not end it');
	is(state_of($node, 'CREATE DATABASE made'), '', 'a database can be created from it');
	$serve->();
	is(state_of($node, 'SET ROLE maker; CREATE DATABASE made_by_maker'), '', 'by others than its owner, too');
	$serve->();
	sql("DROP $_") foreach 'DATABASE made', 'DATABASE made_by_maker', 'ROLE maker', 'ROLE nobody';
	$node->safe_psql('template1', 'DROP EXTENSION keyvault; DROP EXTENSION pgcrypto');
	return;
}

# Databases are visited for maintenance; one that is gone is not.
sub forgets_what_is_gone
{
	new_database($_) foreach 'gone', 'visited';
	ends_as($node, queue_request($node, 'visited', 'hello', database => $_), 'done', "database $_ has a worker", $_) foreach 'gone', 'visited';
	my $begin = -s $node->logfile;
	is(state_of($node, 'DROP DATABASE gone'), '', 'it is dropped');
	my %setting = ('keyvault.worker_idle_timeout' => '10ms', 'keyvault.maintenance_interval' => '200ms');
	set_config($node, $_, $setting{$_}) foreach sort keys %setting;
	my %seen;
	ok(wait_until(sub { $seen{ sql("SELECT xact_commit FROM pg_stat_database WHERE datname = 'visited'") } = 1; keys %seen > 3 }), 'others are visited');
	set_config($node, $_, undef) foreach sort keys %setting;
	my @fatal = slurp_file($node->logfile, $begin) =~ /(FATAL: .*)/g;
	is(scalar(grep { !/terminating background worker/ } @fatal), 0, 'no worker goes where it was');
	cmp_ok(scalar(@fatal), '<=', 1, 'and the log tells of the end of one') or diag(join "\n", @fatal);
	sql('DROP DATABASE visited');
	return;
}

sub lets_the_extension_go
{
	new_database('emptied');
	send_gated('emptied', 'emptied', database => 'emptied');
	my ($code, $out, $err) = $node->psql('emptied', "SET lock_timeout = '20s';\nDROP EXTENSION keyvault;");
	is($code, 0, 'DROP EXTENSION while a call hangs') or diag($err);
	$node->safe_psql('emptied', 'CREATE EXTENSION keyvault');
	use_mock($node, $port, 'emptied');
	ends_as($node, queue_request($node, 'again', 'hello', database => 'emptied'), 'done', 'made again, it is served', 'emptied');
	mock_open($port, 'emptied');
	ends_as($node, queue_request($node, 'again', 'hello', database => 'emptied'), 'done',
		'also when the answer of the earlier call has come', 'emptied');
	is($node->safe_psql('emptied', "SELECT count(*) FROM keyvault.responses WHERE user_id = 'emptied'"), '0', 'which belongs to nobody');
	send_gated('emptied again', 'emptied_again', database => 'emptied');
	$node->safe_psql('emptied', 'DROP EXTENSION keyvault');
	mock_open($port, 'emptied_again');
	ok(wait_until(sub { worker_pid($node, 'emptied') eq '' }), 'an answer without an extension to go to makes the worker leave');
	sql('DROP DATABASE emptied');
	return;
}

sub takes_new_settings
{
	set_config($node, 'keyvault.max_concurrent_requests', 1);
	my $first = send_gated('reload', 'reload');
	my $second = queue_request($node, 'reload', 'second of reload');
	sleep 0.3;
	is(request_status($node, $second), 'queued', 'one call at a time');
	set_config($node, 'keyvault.max_concurrent_requests', undef);
	ends_as($node, $second, 'done', 'a reload takes effect while a call hangs');
	is(request_status($node, $first), 'sent', 'which goes on');
	mock_open($port, 'reload');
	ends_as($node, $first, 'done', 'and ends well');
	return;
}

# The hold of a call whose outcome is unknown ends by itself, not before it could be reconciled.
sub hold_ends
{
	my ($id, $name) = @_;
	return is(sql(<<"SQL"), 't', $name);
SELECT isfinite(h.expires_at) AND h.expires_at > now() + interval '1 hour'
  FROM keyvault.requests r JOIN keyvault.credit_holds h ON h.user_id = r.user_id AND h.id = r.hold_id WHERE r.id = '$id'
SQL
}

sub comes_back
{
	set_config($node, 'keyvault.max_concurrent_requests', 1);
	my $lost = send_gated('terminated', 'terminated');
	my $queued = queue_request($node, 'terminated', 'queued behind it');
	my $pid = worker_pid($node);
	sql("SELECT pg_terminate_backend($pid)");
	ends_as($node, $lost, 'unknown', 'a call that was under way when the worker was terminated is unknown');
	hold_ends($lost, 'its credits stay held, and not for ever');
	ends_as($node, $queued, 'done', 'what was queued is sent');
	isnt(worker_pid($node), $pid, 'by another worker');
	set_config($node, 'keyvault.max_concurrent_requests', undef);

	set_config($node, 'keyvault.worker_idle_timeout', '100ms');
	ok(wait_until(sub { worker_pid($node) eq '' }), 'no worker runs');
	sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'keyvault launcher'");
	ends_as($node, queue_request($node, 'terminated', 'hello'), 'done', 'the launcher comes back, too');
	set_config($node, 'keyvault.worker_idle_timeout', undef);
	return;
}

sub stops_and_starts
{
	set_config($node, 'keyvault.max_concurrent_requests', 2);
	my @hanging = map { send_gated("stop_$_", 'never') } 1, 2;
	my $queued = queue_request($node, 'stop_3', 'queued over a stop');
	is($node->stop('fast', fail_ok => 1), 1, 'a fast stop does not wait for hanging calls') or BAIL_OUT('the server does not stop');
	$node->start;
	ends_as($node, $_, 'unknown', 'such a call is unknown after the start') foreach @hanging;
	ends_as($node, $queued, 'done', 'and what was queued is sent with no further cause');
	set_config($node, 'keyvault.max_concurrent_requests', undef);
	return;
}

sub is_up
{
	my ($out, $err) = ('', '');
	return $node->psql('postgres', 'SELECT 1', stdout => \$out, stderr => \$err) == 0;
}

# What every request has come to, as "done 3, failed 1".
sub outcomes
{
	my ($users) = @_;
	return sql(<<"SQL");
SELECT string_agg(status || ' ' || n, ', ' ORDER BY status)
  FROM (SELECT status, count(*) AS n FROM keyvault.requests WHERE user_id LIKE '$users' GROUP BY status) s
SQL
}

# One answer per request, one usage record per call that was done, nothing debited twice.
sub accounts_are_sound
{
	my ($users, $name) = @_;
	is(sql(<<"SQL"), '', "$name: an answer for each request, a usage record for each done");
SELECT r.user_id, r.status, count(DISTINCT p.id), count(u.id)
  FROM keyvault.requests r
  LEFT JOIN keyvault.responses p ON p.user_id = r.user_id AND p.id = r.id AND p.status = r.status
  LEFT JOIN keyvault.usage_records u ON u.user_id = r.user_id AND u.request_id = r.id
 WHERE r.user_id LIKE '$users'
 GROUP BY r.user_id, r.id, r.status
HAVING count(DISTINCT p.id) <> 1 OR count(u.id) <> (r.status = 'done')::integer
SQL
	return balances_are_sums($node, "$name: balances are sums");
}

sub survives_a_crash
{
	ends_as($node, queue_request($node, 'crash_done', 'hello'), 'done', 'before the crash: one is done');
	ends_as($node, queue_request($node, 'crash_failed', '[[mock: status=400]]'), 'failed', 'one has failed');
	ends_as($node, queue_request($node, 'crash_unknown', '[[mock: hang]]', timeout => "'200 ms'"), 'unknown', 'one is unknown');
	set_config($node, 'keyvault.max_concurrent_requests', 3);
	my @sent = map { send_gated("crash_sent$_", 'crash') } 1 .. 2;
	my $retried = queue_request($node, 'crash_retried', 'of crash_retried [[mock: once:status=503 retry-after=2]]');
	ok(wait_until(sub { sql("SELECT status = 'queued' AND attempts = 1 FROM keyvault.requests WHERE id = '$retried'") eq 't' }),
		'one waits for its second attempt');
	push @sent, send_gated('crash_sent3', 'crash');
	my @queued = map { queue_request($node, "crash_queued$_", "of crash_queued$_") } 1 .. 3;
	my $once = queue_request($node, 'crash_once', 'of crash_once', api_key => "'sk-tap-for-one-call-only'");
	my $canceled = queue_request($node, 'crash_canceled', 'of crash_canceled');
	is(sql("SELECT keyvault.cancel_request('$canceled')"), 't', 'one is canceled');
	is(outcomes('crash%'), 'canceled 1, done 1, failed 1, queued 5, sent 3, unknown 1', 'every state is there');

	my $pid = worker_pid($node);
	kill 'KILL', $pid;
	# The server may take a connection yet before it knows of the crash, and end it.
	ok(wait_until(sub { is_up() && (eval { worker_pid($node) } // '') !~ /^(|$pid)$/ }), 'the server comes back, and so does the worker');
	ends_as($node, $_, 'unknown', 'a call that was under way is unknown') foreach @sent;
	hold_ends($sent[0], 'its credits stay held, and not for ever');
	ends_as($node, $_, 'done', 'what was queued is sent') foreach @queued;
	ends_as($node, $retried, 'done', 'what was to be tried again is');
	ends_as($node, $once, 'failed', 'a key for one call does not outlive the crash');
	like(sql("SELECT error FROM keyvault.requests WHERE id = '$once'"), qr/^KV005: the key for this call alone/, 'which its error says');
	is(outcomes('crash%'), 'canceled 1, done 5, failed 2, unknown 4', 'nothing is lost');
	is(mock_received($port, "of crash_sent$_ "), 1, 'and no call that may have been made is made again') foreach 1 .. 3;
	accounts_are_sound('crash%', 'after the crash');
	set_config($node, 'keyvault.max_concurrent_requests', undef);
	return;
}

sub survives_an_immediate_stop
{
	set_config($node, 'keyvault.max_concurrent_requests', 20);
	# One call in five waits for its gate, so that the stop comes before all are done.
	sql(<<'SQL');
SELECT keyvault.request('openai', format('{"model": "gpt-5-mini", "max_completion_tokens": 100, "messages": [{"role": "user",
	"content": "stop <%s> [[mock: %s]]"}]}', n, CASE WHEN n % 5 = 0 THEN 'gate=stop' ELSE 'delay=50' END)::jsonb,
	user_id => 'immediate' || n % 10)
  FROM generate_series(1, 50) n
SQL
	ok(wait_until(sub { sql("SELECT count(*) FROM keyvault.requests WHERE user_id LIKE 'immediate%' AND status = 'done'") >= 10 }),
		'some of 50 calls are done');
	$node->stop('immediate');
	mock_open($port, 'stop');
	$node->start;
	ok(wait_until(sub { sql("SELECT count(*) FROM keyvault.requests WHERE user_id LIKE 'immediate%' AND finished_at IS NULL") eq '0' }),
		'after an immediate stop and a start, every request ends');
	like(outcomes('immediate%'), qr/^done \d+, unknown \d+$/, 'done, or unknown');
	accounts_are_sound('immediate%', 'after an immediate stop');
	is(scalar(grep { mock_received($port, "stop <$_>") > 1 } 1 .. 50), 0, 'no call was made twice');
	set_config($node, 'keyvault.max_concurrent_requests', undef);
	return;
}

sub locked_balances_wait
{
	my @locked = map { send_gated("locked_$_", 'locked') } 'open', 'prepared';
	my $session = $node->background_psql('postgres');
	$session->query_safe("BEGIN; SELECT FROM keyvault.credit_balances WHERE user_id = 'locked_open' FOR UPDATE");
	sql("BEGIN; SELECT FROM keyvault.credit_balances WHERE user_id = 'locked_prepared' FOR UPDATE; PREPARE TRANSACTION 'locked'");
	mock_open($port, 'locked');
	ends_as($node, queue_request($node, "unlocked$_", 'hello'), 'done', q(a locked balance does not hold up another user's call))
		foreach 1 .. 3;
	is(request_status($node, $_), 'sent', 'its own user waits') foreach @locked;
	$session->query_safe('COMMIT');
	ends_as($node, $locked[0], 'done', 'until the transaction ends');
	sql("COMMIT PREPARED 'locked'");
	ends_as($node, $locked[1], 'done', 'or the prepared transaction');
	$session->quit;
	accounts_are_sound('%locked%', 'after the locks');
	return;
}

sub late_answers_change_nothing
{
	my $id = send_gated('late', 'late');
	is(sql("SELECT keyvault._abandon_request('late', '$id', 1, 'given up')"), 't', 'a call is given up');
	mock_open($port, 'late');
	ends_as($node, queue_request($node, 'in_time', 'hello'), 'done', 'another is done');
	ok(wait_until(sub { mock_get($port, '/__stats') =~ /"in_flight":0/ }), 'the late answer has come');
	ends_as($node, queue_request($node, 'in_time', 'hello'), 'done', 'and was taken');
	is(request_status($node, $id), 'unknown', 'it changes nothing');
	accounts_are_sound('late', 'after the late answer');
	return;
}

sub deleted_keys_fail
{
	sql("SELECT keyvault.store_api_key('openai', 'sk-tap-deleted-while-queued', user_id => 'deleted')");
	my $id = sql('BEGIN; SELECT keyvault.request(' . "'openai', " . chat('deleted key') . ", user_id => 'deleted');"
			. "DO \$\$ BEGIN PERFORM keyvault.delete_api_key('openai', user_id => 'deleted'); END \$\$; COMMIT");
	ends_as($node, $id, 'failed', 'a request whose key was deleted since fails');
	is(sql("SELECT error FROM keyvault.responses WHERE id = '$id'"),
		'KV003: the API key was deleted or has expired since the request was queued', 'its error says why, and nothing else');
	is(mock_received($port, 'deleted key'), 0, 'nothing was sent');
	accounts_are_sound('deleted', 'after the deletion');
	return;
}

sub one_user_is_capped
{
	sql(<<'SQL');
SELECT keyvault.request('openai', format('{"model": "gpt-5-mini", "max_completion_tokens": 100, "messages": [{"role": "user",
	"content": "capped %s [[mock: gate=capped]]"}]}', n)::jsonb, user_id => 'capped')
  FROM generate_series(1, 60) n
SQL
	ok(wait_until(sub { count_requests('capped', 'sent') >= 50 }), 'a user has 50 calls under way');
	ends_as($node, queue_request($node, 'uncapped', 'hello'), 'done', q(another user's call is sent));
	is(count_requests('capped', 'sent'), '50', 'the cap holds');
	my $before = transactions();
	sleep 3;
	# The two readings are transactions themselves; a worker that polled ten times a second would make 30 more.
	cmp_ok(transactions() - $before, '<=', 10, 'the worker waits, it does not look again and again');
	mock_open($port, 'capped');
	ok(wait_until(sub { count_requests('capped', 'done') eq '60' }), 'the others follow when there is room');
	accounts_are_sound('capped', 'after the cap');
	return;
}

sub greedy_users_share
{
	set_config($node, 'keyvault.max_concurrent_requests', 20);
	sql(<<'SQL');
SELECT keyvault.request('openai', format('{"model": "gpt-5-mini", "max_completion_tokens": 100, "messages": [{"role": "user",
	"content": "greedy %s [[mock: gate=greedy]]"}]}', n)::jsonb, user_id => 'greedy' || n % 2)
  FROM generate_series(1, 60) n
SQL
	my ($sent, $still) = (0, 0);
	wait_until(sub {
		my $now = sql("SELECT count(*) FROM keyvault.requests WHERE user_id LIKE 'greedy%' AND status = 'sent'");
		$still = $now >= 10 && $now == $sent ? $still + 1 : 0;
		$sent = $now;
		return $still >= 10;
	}) or die 'the calls are not sent';
	cmp_ok($sent, '<=', 20, 'two users take what there is');
	# Before and behind them in the order of users, and again when it was the one served last.
	ends_as($node, queue_request($node, $_, 'hello'), 'done', "user $_ is served all the same")
		foreach 'modest', 'modest', 'a modest one', 'a modest one', 'modest';
	set_config($node, 'keyvault.max_concurrent_requests', undef);
	mock_open($port, 'greedy');
	ok(wait_until(sub { sql("SELECT count(*) FROM keyvault.requests WHERE user_id LIKE 'greedy%' AND status = 'done'") eq '60' }),
		'in the end all are done');
	return;
}

commit_wakes();
reports_statistics();
leaves_when_idle();
does_not_poll();
serves_every_database();
lets_databases_go();
lets_templates_be_copied();
forgets_what_is_gone();
lets_the_extension_go();
takes_new_settings();
comes_back();
stops_and_starts();
survives_a_crash();
survives_an_immediate_stop();
locked_balances_wait();
late_answers_change_nothing();
deleted_keys_fail();
one_user_is_capped();
greedy_users_share();
unlike(slurp_file($node->logfile), qr/ WARNING: /, 'the log has no warning');
$node->stop;

done_testing();
