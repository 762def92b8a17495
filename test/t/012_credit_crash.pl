# Crash recovery in the middle of debits, holds, grants, resets, changes of plan and refunds by 16 clients: each time the
# ledger is sound, nobody is overdrawn, nobody deadlocks, and what a client was told is there.
# KV_CRASHES says how often to crash; 5 without it.
use strict;
use warnings FATAL => 'all';
use IPC::Run ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(sleep);
use Keyvault;

my $crashes = $ENV{KV_CRASHES} // 5;
my $node = new_node('crash', conf => <<'CONF');
log_statement = none
log_min_error_statement = panic
deadlock_timeout = 100ms
max_connections = 60
restart_after_crash = on
CONF

sub sql { return $node->safe_psql('postgres', @_) }

# One operation of every kind; a refusal is an outcome like another. Few users, so that they meet, some of them busy enough to be split.
sql(<<'SQL');
CREATE TABLE done (op text, outcome text);
UPDATE keyvault.plans SET monthly_credits = CASE plan WHEN 'free' THEN 50 ELSE 500 END WHERE plan IN ('free', 'pro');
INSERT INTO keyvault.plans (plan, monthly_credits, overage) VALUES ('postpaid', 300, 'report');
SELECT keyvault.upsert_user('u' || i) FROM generate_series(1, 6) i;
SELECT keyvault.set_budget('u1', 5000), keyvault.set_budget('u2', 100, 'day', scope => 'model', target => 'small');
CREATE FUNCTION act(op int, who text, amount numeric) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
	outcome text := 'done';
BEGIN
	BEGIN
		CASE
			WHEN op <= 40 THEN INSERT INTO keyvault.usage_records (user_id, model, credits) VALUES (who, 'large', amount);
			WHEN op <= 50 THEN INSERT INTO keyvault.usage_records (user_id, model, credits)
				SELECT 'u' || i % 6 + 1, CASE i WHEN 3 THEN 'small' ELSE 'large' END, amount FROM generate_series(6, 1, -1) i;
			WHEN op <= 55 THEN PERFORM keyvault.record_usage('chat', 'gpt-5-mini', 1000, 500, user_id => who, idempotency_key => (amount * 1000)::int::text);
			WHEN op <= 65 THEN PERFORM keyvault.reserve_credits(amount * 3, '3 s', who);
			WHEN op <= 73 THEN PERFORM keyvault.settle_credits(h.id, amount * 2) FROM keyvault.credit_holds h WHERE h.user_id = who ORDER BY random() LIMIT 1;
			WHEN op <= 78 THEN PERFORM keyvault.release_credits(h.id) FROM keyvault.credit_holds h WHERE h.user_id = who ORDER BY random() LIMIT 1;
			WHEN op <= 84 THEN PERFORM keyvault.grant_credits(who, amount, 'more', CASE WHEN amount > 5 THEN now() + interval '2 s' END);
			WHEN op <= 88 THEN PERFORM keyvault.refund_usage(r.id, 'bad', who) FROM keyvault.usage_records r WHERE r.user_id = who AND r.credits > 0 LIMIT 1;
			WHEN op <= 92 THEN PERFORM keyvault.set_plan(who, (ARRAY['free', 'pro', 'enterprise', 'postpaid'])[1 + amount::int % 4]);
			WHEN op <= 96 THEN
				PERFORM keyvault._gather_slots(who);
				UPDATE keyvault.credit_balances SET period_anchor = now(), period_start = now() - interval '1 month', period_end = now() WHERE user_id = who AND slot = 0;
			ELSE PERFORM keyvault.reset_due_credits(3);
		END CASE;
	EXCEPTION WHEN SQLSTATE 'KV001' OR SQLSTATE '22023' THEN
		outcome := SQLSTATE;
	END;
	INSERT INTO done VALUES (op, outcome);
END $$;
SQL
my $script = PostgreSQL::Test::Utils::tempdir . '/act.sql';
append_to_file($script, <<'SCRIPT');
\set op random(1, 100)
\set who random(1, 6)
\set amount random(1, 10000)
SELECT act(:op, 'u' || :who, :amount / 1000.0);
SCRIPT

# Let 16 clients work, crash in the middle, and return how many operations they were told are done.
sub crash_in_the_middle
{
	my ($whole_server) = @_;
	my ($out, $err) = ('', '');
	my $clients = IPC::Run::start([ 'pgbench', '-n', '-c', '16', '-j', '2', '-T', '60', '-f', $script, $node->connstr('postgres') ],
		'>', \$out, '2>', \$err);
	sleep 0.3 + rand 0.9;
	if ($whole_server)
	{
		$node->kill9;
	}
	else
	{
		my ($code, $pid) = $node->psql('postgres', q(SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY random() LIMIT 1));
		kill 'KILL', $pid if $pid;
	}
	$clients->finish;
	if ($whole_server)
	{
		# Its children may still be leaving: then it does not start.
		my @start = ('pg_ctl', '-w', '-D', $node->data_dir, '-l', $node->logfile, '-o', '--cluster-name=crash', 'start');
		wait_until(sub { IPC::Run::run(\@start, '>', \my $started, '2>&1') }) or die 'the server does not start';
		$node->_update_pid(1);
	}
	wait_until(sub { ($node->psql('postgres', 'SELECT 1'))[0] == 0 }) or die 'the server does not recover';
	return $out =~ /transactions actually processed: (\d+)/ ? $1 : 0;
}

my $told = 0;
my ($unsound, $lost) = (0, 0);
for my $crash (1 .. $crashes)
{
	my $before = sql('SELECT count(*) FROM done');
	my $now_told = crash_in_the_middle($crash % 2);
	my $faults = sql('SELECT * FROM keyvault.verify_ledger()');
	my $done = sql('SELECT count(*) FROM done') - $before;
	if ($faults ne '')
	{
		$unsound++;
		diag("crash $crash: $faults");
	}
	if ($done < $now_told)
	{
		$lost++;
		diag("crash $crash: $now_told operations told, $done there");
	}
	$told += $now_told;
}
is($unsound, 0, "after each of $crashes crashes the ledger is sound, and nobody is overdrawn");
is($lost, 0, "of $told operations, none that a client was told of is lost");
cmp_ok($told, '>', $crashes * 10, 'clients have worked in between');
unlike(slurp_file($node->logfile), qr/deadlock detected|40P01/, 'no deadlock');
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|signal 11/, 'no crash but those asked for');
my $kinds = sql(q(SELECT string_agg(DISTINCT outcome, ' ' ORDER BY outcome) FROM done));
like($kinds, qr/KV001.*done/, 'some operations were refused, some were not');
is(sql(q(SELECT count(DISTINCT op) > 50 FROM done)), 't', 'of every kind');
is(sql(q(SELECT count(*) FROM keyvault.usage_records GROUP BY user_id, idempotency_key HAVING idempotency_key IS NOT NULL AND count(*) > 1)), '',
	'nothing is recorded twice under one key');
is(sql(q(SELECT count(*) FROM keyvault.credit_holds h JOIN keyvault.usage_records r ON r.user_id = h.user_id AND r.hold_id = h.id)), '0',
	'a hold is open or settled');
is(sql(q(SELECT count(*) > 0 FROM keyvault.credit_periods)), 't', 'periods have ended');
$node->stop;

done_testing();
