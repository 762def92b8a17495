# Usage views beside writers, maintenance and crashes; the worker's own maintenance; pg_cron.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $seed = $ENV{KV_SEED} // int rand 1 << 30;
srand $seed;
diag("KV_SEED=$seed");

my ($share) = PostgreSQL::Test::Utils::run_command([ 'pg_config', '--sharedir' ]);
my $has_cron = -e "$share/extension/pg_cron.control";
my $node = new_node('usage', init_only => 1, conf => "max_connections = 40\nmax_prepared_transactions = 5\nkeyvault.maintenance_interval = 0\n");
$node->append_conf('postgresql.conf', "shared_preload_libraries = 'keyvault,pg_cron'\ncron.database_name = 'postgres'\ncron.host = '" . $node->host . "'\nmax_worker_processes = 20\n") if $has_cron;
$node->start;
$node->safe_psql('postgres', 'CREATE EXTENSION keyvault CASCADE');

sub sql { return $node->safe_psql('postgres', @_) }

# What the view and the plain query differ in, in one statement: both read one snapshot.
my $difference = <<'SQL';
WITH plain AS (
	SELECT user_id, (created_at AT TIME ZONE 'UTC')::date AS day, provider, model, type, payer, count(*) AS calls, sum(input_tokens)::bigint,
	       sum(cached_tokens)::bigint, sum(output_tokens)::bigint, sum(tokens)::bigint, sum(credits), sum(cost_usd), sum(credits_overrun)
	  FROM keyvault.usage_records GROUP BY 1, 2, 3, 4, 5, 6)
SELECT count(*) FROM ((TABLE plain EXCEPT TABLE keyvault.usage_by_day) UNION ALL (TABLE keyvault.usage_by_day EXCEPT TABLE plain)) d
SQL
sub views_are_exact { my ($name) = @_; local $Test::Builder::Level = $Test::Builder::Level + 1; return is(sql($difference), '0', $name); }

sql(<<'SQL');
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('unlimited', NULL);
SELECT keyvault.upsert_user('u' || i, plan => 'unlimited') FROM generate_series(0, 9) i;
CREATE FUNCTION use(amount int) RETURNS void LANGUAGE sql AS $$
INSERT INTO keyvault.usage_records (user_id, created_at, type, provider, model, payer, input_tokens, tokens, credits, cost_usd)
SELECT 'u' || floor(random() * 10), now() - CASE floor(random() * 3) WHEN 0 THEN interval '0' WHEN 1 THEN random() * interval '3 days' ELSE random() * interval '150 days' END,
       'chat', (ARRAY['openai', 'gemini', NULL])[1 + floor(random() * 3)], (ARRAY['a', 'b', NULL])[1 + floor(random() * 3)],
       CASE WHEN random() < 0.3 THEN 'user' ELSE 'platform' END, nullif(floor(random() * 5), 0), 7, round(random()::numeric, 3), 0.001
  FROM generate_series(1, amount) $$;
CREATE FUNCTION assert_exact() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	-- an assertion's failure ends pgbench with an error
	ASSERT (WITH plain AS (SELECT user_id, count(*) AS calls, sum(credits) AS credits FROM keyvault.usage_records GROUP BY 1),
	             seen AS (SELECT user_id, sum(calls)::bigint AS calls, sum(credits) AS credits FROM keyvault.usage_by_month GROUP BY 1)
	        SELECT count(*) FROM ((TABLE plain EXCEPT TABLE seen) UNION ALL (TABLE seen EXCEPT TABLE plain)) d) = 0, 'the view differs';
END $$;
SQL

# Writers of all kinds, readers who compare, roll-ups and moves of months, all at once; then a crash in their midst.
my @scripts = (
	[ 6, "SELECT use(3);\n" ],
	[ 2, "BEGIN;\nSELECT use(2);\nSAVEPOINT a;\nSELECT use(2);\nROLLBACK TO a;\n\\sleep 3 ms\nSELECT use(1);\nCOMMIT;\n" ],
	[ 1, "BEGIN;\nSELECT use(5);\n\\sleep 20 ms\nROLLBACK;\n" ],
	[ 1, "INSERT INTO keyvault.usage_records (user_id, credits, debit_tag) SELECT 'u1', 1, debit_tag FROM keyvault.usage_records TABLESAMPLE SYSTEM (1) LIMIT 3;\n" ],
	[ 2, "CALL keyvault.maintain('roll-up');\n" ],
	[ 1, "CALL keyvault.maintain('partitions');\n" ],
	[ 2, "SELECT assert_exact();\n" ]);
{
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '12', '-j', '2', '-t', '25' ], @scripts);
	is($code, 0, 'the views are exact beside writers and maintenance') or diag($err);
	views_are_exact('and after them');
	sql("CALL keyvault.maintain()");
	views_are_exact('and when all is added up');
	cmp_ok(sql('SELECT sum(calls) FROM keyvault.usage_daily'), '>', 100, 'it is added up');
	foreach my $round (1 .. 2)
	{
		my $directory = PostgreSQL::Test::Utils::tempdir;
		my @files = map { append_to_file("$directory/s$_", $scripts[$_][1]); ('-f', "$directory/s$_\@$scripts[$_][0]") } 0 .. $#scripts;
		my $bench = IPC::Run::start([ 'pgbench', '-n', '-c', '8', '-j', '2', '-T', '60', @files, $node->connstr('postgres') ], '>', \my $o, '2>', \my $e);
		my $before = sql('SELECT count(*) FROM keyvault.usage_records');
		wait_until(sub { sql('SELECT count(*) FROM keyvault.usage_records') > $before + 200 + int rand 300 });
		$node->stop('immediate');
		$bench->finish;
		$node->start;
		views_are_exact("crash $round: the views are exact");
		sql("CALL keyvault.maintain()");
		views_are_exact("crash $round: when all is added up, too");
	}
	sql("BEGIN; INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('prepared', 1); PREPARE TRANSACTION 'open'");
	sql("SELECT use(4); CALL keyvault.maintain('roll-up')");
	views_are_exact('beside a prepared transaction');
	sql("COMMIT PREPARED 'open'");
	views_are_exact('which commits after the roll-up has looked');
	sql("CALL keyvault.maintain('roll-up')");
	views_are_exact('and is added up');
}

# A restored dump has the same views, from a roll-up of its own; for logical replication see 051_replication.pl.
{
	sql("SELECT use(10)");
	my $seen = 'SELECT * FROM keyvault.usage_by_day ORDER BY 1, 2, 3, 4, 5, 6';
	sql('CREATE DATABASE restored TEMPLATE template0');
	my $directory = PostgreSQL::Test::Utils::tempdir;
	command_ok([ 'pg_dump', '-Fc', '-f', "$directory/dump", $node->connstr('postgres') ], 'pg_dump');
	command_ok([ 'pg_restore', '--exit-on-error', '-d', $node->connstr('restored'), "$directory/dump" ], 'pg_restore');
	is($node->safe_psql('restored', $seen), sql($seen), 'restored: the views are the same');
	$node->safe_psql('restored', "SELECT use(20); CALL keyvault.maintain()");
	is($node->safe_psql('restored', $difference), '0', 'restored: and exact after more of it');
	isnt($node->safe_psql('restored', 'SELECT tag_base FROM keyvault.usage_rollup'), sql('SELECT tag_base FROM keyvault.usage_rollup'),
		'restored: it tells its records from those of the other');
	$node->safe_psql('postgres', 'DROP DATABASE restored');
}

# pg_cron: in its own database, and in another.
ok($has_cron || $node->pg_version >= 16, 'pg_cron is there on PostgreSQL 15, for which script/bootstrap installs it');
SKIP:
{
	skip 'pg_cron is not installed', 12 unless $has_cron;
	is(state_of($node, 'SELECT keyvault.schedule_jobs()'), '55000', 'without CREATE EXTENSION pg_cron: an error');
	sql('CREATE EXTENSION pg_cron');
	my $jobs = "SELECT jobid, jobname, schedule, command, database, active FROM cron.job ORDER BY jobid";
	is(sql('SELECT count(*) FROM keyvault.schedule_jobs()'), '6', 'pg_cron: six jobs');
	my $registered = sql($jobs);
	is(sql("SELECT count(*) FROM keyvault.schedule_jobs()") . "\n" . sql($jobs), "6\n$registered", 'pg_cron: again, the same jobs');
	# pg_cron itself runs each job, by a connection and by a worker of its own: at its start, as the least of its other
	# intervals is a minute in 1.4. A job with the schedule of another is the same but for when it runs.
	sql("UPDATE cron.job SET schedule = '\@reboot'");
	foreach my $workers ('off', 'on')
	{
		my $how = "pg_cron, workers $workers";
		sql('SELECT use(10); TRUNCATE cron.job_run_details');
		$node->append_conf('postgresql.conf', "cron.use_background_workers = $workers\n");
		$node->restart;
		wait_until(sub { sql("SELECT count(*) FROM cron.job_run_details WHERE status IN ('succeeded', 'failed')") >= 6 });
		is(sql('SELECT j.jobname, string_agg(DISTINCT d.status, \' \') FROM cron.job j LEFT JOIN cron.job_run_details d USING (jobid, command) GROUP BY 1 ORDER BY 1'),
			sql(q{SELECT jobname || '|succeeded' FROM cron.job ORDER BY 1}), "$how: each job succeeds")
			or diag(sql('SELECT command, status, return_message FROM cron.job_run_details'));
		is(sql("SELECT sum(calls) FROM keyvault.usage_daily"), sql('SELECT count(*) FROM keyvault.usage_records'), "$how: and has done its work");
	}
	is(sql("SELECT count(*) FROM keyvault.schedule_jobs()") . "\n" . sql($jobs), "6\n$registered", 'pg_cron: to schedule them puts the times back');
	$node->safe_psql('postgres', 'CREATE DATABASE elsewhere TEMPLATE template0');
	$node->safe_psql('elsewhere', 'CREATE EXTENSION keyvault CASCADE');
	my ($code, $out, $err) = $node->psql('elsewhere', 'SELECT keyvault.schedule_jobs()');
	like($err, qr/job_statements\(\) returns in database "postgres"/, 'pg_cron: from another database, the hint says how');
	my $statements = $node->safe_psql('elsewhere', 'SELECT keyvault.job_statements()');
	sql($statements) for 1 .. 2;
	is(sql("SELECT count(*) FROM cron.job WHERE database = 'elsewhere' AND command LIKE 'CALL keyvault.maintain(%'"), '6', 'pg_cron: jobs of another database');
	is(sql('SELECT keyvault.unschedule_jobs() || \' \' || keyvault.unschedule_jobs()'), '6 0', 'pg_cron: jobs are taken out');
	is(sql('SELECT count(*) FROM cron.job'), '6', 'pg_cron: those of the other database stay');
	sql('SELECT cron.unschedule(jobid) FROM cron.job');
}

# The worker by itself: in a database with a worker, and, when that has left, by visits.
{
	sql('SELECT use(10)');
	# The worker has an isolation level of its own.
	set_config($node, 'default_transaction_isolation', 'repeatable read');
	set_config($node, 'keyvault.worker_idle_timeout', '100ms');
	set_config($node, 'keyvault.maintenance_interval', '200ms');
	my $added_up = sub { sql('SELECT (SELECT sum(calls) FROM keyvault.usage_daily) = (SELECT count(*) FROM keyvault.usage_records)') eq 't' };
	ok(wait_until($added_up), 'the worker adds usage up');
	ok(wait_until(sub { worker_pid($node) eq '' }), 'and leaves');
	sql('SELECT use(10)');
	ok(wait_until($added_up), 'a visit adds up what came since');
	sql("INSERT INTO keyvault.usage_records (user_id, created_at, credits) VALUES ('old', '2019-05-05', 1)");
	ok(wait_until(sub { sql("SELECT tableoid::regclass FROM keyvault.usage_records WHERE created_at < '2020-01-01'") eq 'keyvault.usage_records_2019_05' }),
		'and moves a month out of the default partition');
	set_config($node, 'keyvault.usage_retention', 12);
	ok(wait_until(sub { sql("SELECT count(*) FROM keyvault.usage_records WHERE created_at < '2020-01-01'") eq '0' }), 'and retires old months');
	is(sql("SELECT calls FROM keyvault.usage_by_month WHERE user_id = 'old' AND month = '2019-05-01'"), '1', 'which stay counted');
	# Rows that were copied above by hand were not debited; this user has none.
	is(sql("SELECT count(*) FROM keyvault.verify_ledger() WHERE user_id = 'old'"), '0', 'and proved');
	unlike(slurp_file($node->logfile), qr/maintenance of keyvault failed/, 'no job has failed');
}
$node->stop;

done_testing();
