# Many sessions at once: nobody spends more than he has, nothing is debited twice or lost, and nobody deadlocks.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
# A deadlock would be found at once, and not mistaken for slowness.
my $node = new_node('race', conf => <<'CONF');
log_statement = none
deadlock_timeout = 100ms
max_connections = 50
CONF
use_mock($node, $port);

sub sql { return $node->safe_psql('postgres', @_) }

sub no_deadlock
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return unlike(slurp_file($node->logfile), qr/deadlock detected|40P01/, "$name: no deadlock");
}

# Credits used, and rows, of a user.
sub spent
{
	my ($user) = @_;
	return sql(<<"SQL");
SELECT sum(b.credits_used)::float8 || ' used, ' || (SELECT count(*) FROM keyvault.usage_records u WHERE u.user_id = '$user') || ' rows'
  FROM keyvault.credit_balances b WHERE b.user_id = '$user'
SQL
}

# The last credit is spent once: each of 16 clients wants more than there is, and so is refused in the end.
{
	sql("SELECT keyvault.upsert_user('limited')");
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '16', '-j', '2', '-t', '1001' ],
		[ 1, "INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('limited', 'race', 1);\n" ]);
	is(() = $err =~ /credit limit reached for user "limited"/g, 16, 'each of 16 clients is refused in the end');
	unlike($err, qr/ERROR:  (?!credit limit reached)/, 'for no other reason');
	is(spent('limited'), '1000 used, 1000 rows', 'of 1000 credits, 1000 are used');
}

# A user whom many debit at once is given further slots, and spends no more for it.
{
	sql("INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('busy', 20000)");
	sql("SELECT keyvault.upsert_user('busy', plan => 'busy')");
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '16', '-j', '2', '-t', '100' ],
		[ 1, "INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('busy', 'race', 1);\n" ]);
	is($code, 0, 'with room for all, all succeed') or diag($err);
	cmp_ok(sql("SELECT count(*) FROM keyvault.credit_balances WHERE user_id = 'busy'"), '>', 1, 'the balance was split');
	is(sql("SELECT sum(credits_used)::float8 FROM keyvault.credit_balances WHERE user_id = 'busy'"), '1600', 'nothing is lost');
	($code, $out, $err) = run_pgbench($node, [ '-c', '16', '-j', '2', '-t', '1000' ], [ 1, <<'SCRIPT' ]);
\set credits random(10, 30)
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('busy', 'race', :credits);
SCRIPT
	is(() = $err =~ /credit limit reached for user "busy"/g, 16, 'each of 16 clients is refused in the end');
	unlike($err, qr/ERROR:  (?!credit limit reached)/, 'for no other reason');
	is(sql(<<'SQL'), 't|t', 'the balance is the sum of the rows, and within the limit');
SELECT sum(credits_used) = (SELECT sum(credits) FROM keyvault.usage_records WHERE user_id = 'busy'), sum(credits_used) BETWEEN 19971 AND 20000
  FROM keyvault.credit_balances WHERE user_id = 'busy'
SQL
	no_deadlock('one busy user');
}

# Transactions that debit a busy user several times, up to his limit, past every threshold.
{
	sql("INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('busier', 40000)");
	sql("SELECT keyvault.upsert_user('busier', plan => 'busier')");
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '16', '-j', '2', '-t', '2000' ], [ 1, <<'SCRIPT' ]);
\set credits random(1, 3)
BEGIN;
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('busier', 'race', 1);
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('busier', 'race', :credits);
INSERT INTO keyvault.usage_records (user_id, type, credits) SELECT 'busier', 'race', 1 FROM generate_series(1, 3);
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('busier', 'race', :credits);
COMMIT;
SCRIPT
	is(() = $err =~ /credit limit reached for user "busier"/g, 16, 'each of 16 clients is refused in the end');
	unlike($err, qr/ERROR:  (?!credit limit reached)/, 'for no other reason');
	is(sql(<<'SQL'), 't|t', 'the balance is the sum of the rows, and within the limit');
SELECT sum(credits_used) = (SELECT sum(credits) FROM keyvault.usage_records WHERE user_id = 'busier'), sum(credits_used) BETWEEN 39991 AND 40000
  FROM keyvault.credit_balances WHERE user_id = 'busier'
SQL
	no_deadlock('several debits in a transaction');
}

# The same with other errors behind the debit, in the statement's transaction and in a subtransaction of it.
{
	sql(<<'SQL');
CREATE FUNCTION use_one(fails boolean) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('failing', 'race', 1);
	IF fails THEN
		RAISE EXCEPTION 'random error' USING ERRCODE = 'XX001';
	END IF;
	RETURN 'used';
EXCEPTION
	WHEN SQLSTATE 'KV001' THEN RETURN 'refused';
	WHEN SQLSTATE 'XX001' THEN RETURN 'failed';
END $$;
SELECT keyvault.upsert_user('failing');
SQL
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '16', '-j', '2', '-t', '150' ],
		[ 3, "SELECT use_one(random() < 0.2);\n" ],
		[ 1, "BEGIN;\nSELECT use_one(random() < 0.2);\nSELECT use_one(random() < 0.2);\nROLLBACK;\n" ]);
	is($code, 0, 'errors behind the debit are only those that were raised') or diag($err);
	is(spent('failing'), '1000 used, 1000 rows', 'of 1000 credits, 1000 are used all the same');
	no_deadlock('one user');
}

# Statements over many users, in any order.
{
	sql("SELECT keyvault.upsert_user('many' || n, plan => 'pro') FROM generate_series(1, 20) n");
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '16', '-j', '2', '-t', '100' ], [ 1, <<'SCRIPT' ]);
INSERT INTO keyvault.usage_records (user_id, type, credits) SELECT 'many' || n, 'race', n / 100.0 FROM generate_series(1, 20) n, generate_series(1, 2) ORDER BY random();
SCRIPT
	is($code, 0, 'statements over 20 users in random order all succeed') or diag($err);
	no_deadlock('many users');
	is(sql("SELECT count(*), sum(credits)::float8 FROM keyvault.usage_records WHERE user_id LIKE 'many%'"), '64000|6720', 'no row is lost');
	balances_are_sums($node, 'balances are sums');
}

# Usage, plans, calls and their settlement, all at the same time.
{
	sql("SELECT keyvault.upsert_user('mixed' || n, plan => 'pro') FROM generate_series(0, 9) n");
	my ($code, $out, $err) = run_pgbench($node, [ '-c', '16', '-j', '2', '-t', '100' ],
		[ 4, <<'SCRIPT' ], [ 1, <<'SCRIPT' ], [ 2, <<'SCRIPT' ], [ 1, <<'SCRIPT' ]);
INSERT INTO keyvault.usage_records (user_id, type, credits) SELECT 'mixed' || n, 'race', 0.01 FROM generate_series(0, 9) n ORDER BY random();
SCRIPT
\set n random(0, 9)
SELECT keyvault.set_plan('mixed' || :n, CASE WHEN random() < 0.5 THEN 'pro' ELSE 'enterprise' END);
SCRIPT
\set n random(0, 9)
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_completion_tokens": 100, "messages": [{"role": "user", "content": "race"}]}', user_id => 'mixed' || :n, payer => 'platform');
SCRIPT
\set n random(0, 9)
BEGIN;
SELECT keyvault.request('openai', '{"model": "gpt-5-mini", "max_completion_tokens": 100, "messages": [{"role": "user", "content": "[[mock: status=400]]"}]}', user_id => 'mixed' || :n, payer => 'platform');
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('mixed' || :n, 'race', 0.02);
COMMIT;
SCRIPT
	is($code, 0, 'usage, plans and requests at the same time all succeed') or diag($err);
	ok(wait_until(sub { sql('SELECT count(*) FROM keyvault.requests WHERE finished_at IS NULL') eq '0' }), 'every call ends');
	my $outcomes = sql('SELECT DISTINCT status, body->\'messages\'->0->>\'content\' FROM keyvault.requests ORDER BY 1');
	is($outcomes, "done|race\nfailed|[[mock: status=400]]", 'as it should');
	is(sql(<<'SQL'), '', 'a usage record for each call that was done');
SELECT r.id, r.status, count(u.id)
  FROM keyvault.requests r LEFT JOIN keyvault.usage_records u ON u.user_id = r.user_id AND u.request_id = r.id
 GROUP BY r.id, r.status HAVING count(u.id) <> (r.status = 'done')::integer
SQL
	cmp_ok(sql("SELECT min(credits_used) FROM keyvault.credit_balances WHERE user_id LIKE 'mixed%' AND slot = 0"), '>', 0, 'every user has used some');
	is(sql('SELECT count(*) FROM keyvault.credit_holds'), '0', 'no hold is left');
	balances_are_sums($node, 'all balances are sums');
	no_deadlock('all at once');
	is(sql("SELECT deadlocks FROM pg_stat_database WHERE datname = 'postgres'"), '0', 'the statistics know of none either');
	unlike(slurp_file($node->logfile), qr/ WARNING: /, 'the worker had nothing to warn of');
}
$node->stop;

done_testing();
