# A subscriber with balances is its publisher's copy: nothing is debited, reset or counted twice, and it can take over.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $master_key = new_master_key();
my $publisher = new_node('publisher', master_key => $master_key, init => { allows_streaming => 'logical' }, conf => "keyvault.maintenance_interval = 0\n");
my $subscriber = new_node('subscriber', master_key => $master_key, init => { allows_streaming => 'logical' }, conf => "keyvault.maintenance_interval = 200ms\nkeyvault.worker_idle_timeout = 100ms\n");

sub here { return $publisher->safe_psql('postgres', @_) }
sub there { return $subscriber->safe_psql('postgres', @_) }

# What the reference says to run, taken from it.
my ($publication) = slurp_file('doc/keyvault.md') =~ /^(CREATE PUBLICATION keyvault FOR TABLE\n.*?;)/ms;
my ($truncation) = slurp_file('doc/keyvault.md') =~ /^(TRUNCATE keyvault\.plans.*?;)/m;
my ($release) = slurp_file('doc/keyvault.md') =~ /`(SELECT keyvault\.release_credits\(id, user_id\)[^`]*)`/;
my @tables = $publication =~ /keyvault\.(\w+)/g;

sub is_copy
{
	my ($name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	$publisher->wait_for_catchup('keyvault');
	foreach my $table (@tables)
	{
		# Columns that an index, not the data, puts in an order
		my $content = "SELECT md5(coalesce(string_agg(t::text, E'\\n' ORDER BY t::text COLLATE \"C\"), '')) || count(*) FROM keyvault.$table t";
		is(there($content), here($content), "$name: $table");
	}
	is(there('SELECT * FROM keyvault.credit_status ORDER BY 1'), here('SELECT * FROM keyvault.credit_status ORDER BY 1'), "$name: credit_status");
	is(there('SELECT * FROM keyvault.usage_by_day ORDER BY 1, 2, 3, 4, 5, 6'), here('SELECT * FROM keyvault.usage_by_day ORDER BY 1, 2, 3, 4, 5, 6'),
		"$name: usage_by_day");
	is(here('SELECT * FROM keyvault.verify_ledger()') . there('SELECT * FROM keyvault.verify_ledger()'), '', "$name: both ledgers are sound");
	return;
}

# Let a user's period have ended.
sub end_period
{
	my ($user) = @_;
	here("UPDATE keyvault.credit_balances SET period_anchor = now() - interval '1 hour', period_start = period_start - interval '1 month',
		period_end = now() - interval '1 hour' WHERE user_id = '$user'");
	return;
}

here(<<'SQL');
UPDATE keyvault.plans SET credits_per_usd = 2000 WHERE plan = 'pro';
INSERT INTO keyvault.plans (plan, monthly_credits, overage) VALUES ('postpaid', 100, 'report');
SELECT keyvault.upsert_user('rich', plan => 'pro'), keyvault.upsert_user('poor'), keyvault.upsert_user('later', plan => 'postpaid');
SELECT keyvault.store_api_key('exa', 'tap-exa-replicated', user_id => 'rich');
INSERT INTO keyvault.usage_records (user_id, credits) SELECT u, 30 FROM unnest('{rich, poor, later}'::text[]) u, generate_series(1, 10);
SELECT keyvault.grant_credits('poor', 100, 'bought'), keyvault.reserve_credits(3, '1 day', 'poor'), keyvault.set_budget('rich', 10000);
SQL
end_period('poor');
my $box = seal_key($publisher, 'rich', 'sk-tap-sealed-and-replicated', 'openai');
here("SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => 'rich')");
here($publication);
is(here(<<'SQL'), 'requests,responses,rotation_requests,usage_archived,usage_daily,usage_late,usage_retired,usage_rollup', 'the reference lists all but these');
SELECT string_agg(c.relname, ',' ORDER BY c.relname) FROM pg_class c
 WHERE c.relnamespace = 'keyvault'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
   AND NOT EXISTS (SELECT FROM pg_publication_tables t WHERE t.schemaname = 'keyvault' AND t.tablename = c.relname)
SQL
# Of what each server keeps for itself, the subscriber passes over what comes all the same.
here('ALTER PUBLICATION keyvault ADD TABLE keyvault.usage_rollup, keyvault.usage_daily, keyvault.usage_late');
my $base = there('SELECT tag_base FROM keyvault.usage_rollup');
there($truncation);
there("CREATE SUBSCRIPTION keyvault CONNECTION '" . $publisher->connstr . " dbname=postgres' PUBLICATION keyvault");
$subscriber->wait_for_subscription_sync($publisher, 'keyvault');
there('SELECT keyvault._wake_worker()');
is_copy('copied');

# A period that is over is begun once, by the publisher.
there('CALL keyvault.maintain()');
is(there("SELECT string_agg(job || ': ' || detail, ', ') FROM keyvault.run_maintenance() WHERE job IN ('reset', 'purge', 'rotation')"),
	'reset: left to the publisher, purge: left to the publisher, rotation: left to the publisher', 'the subscriber leaves balances alone');
is(there("SELECT count(*) FROM keyvault.credit_periods WHERE user_id = 'poor'"), '0', 'and begins no period');
is_copy('maintained there');
here(<<'SQL');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('poor', 7), ('rich', 1), ('later', 2);
SELECT keyvault.grant_credits('later', 50, 'top-up'), keyvault.set_plan('rich', 'free');
SQL
end_period('later');
there('CALL keyvault.maintain()');
here('CALL keyvault.maintain()');
is_copy('reset here');
is(there("SELECT user_id, ended_by FROM keyvault.credit_periods WHERE credits_used > 0 ORDER BY 1, id"), "later|grant\nlater|period\npoor|period\nrich|plan", 'each period ended once');

# Records that move to a partition of their month, here and there, and what comes late.
here(<<'SQL');
INSERT INTO keyvault.usage_records (user_id, credits, created_at) SELECT 'rich', 1, '2021-05-05 00:00+00'::timestamptz + i * interval '1 hour' FROM generate_series(1, 20) i;
CALL keyvault.maintain();
SQL
is(here("SELECT DISTINCT tableoid::regclass FROM keyvault.usage_records WHERE created_at < '2022-01-01'"), 'keyvault.usage_records_2021_05', 'moved here');
is_copy('moved here');
ok(wait_until(sub { there("SELECT DISTINCT tableoid::regclass FROM keyvault.usage_records WHERE created_at < '2022-01-01'") eq 'keyvault.usage_records_2021_05' }),
	'moved there by its own maintenance');
is_copy('moved there');
ok(wait_until(sub { there('SELECT sum(calls) FROM keyvault.usage_daily') eq here('SELECT count(*) FROM keyvault.usage_records') }), 'usage is added up there');
is_copy('added up');
is(there('SELECT tag_base FROM keyvault.usage_rollup'), $base, 'by a roll-up of its own');
# The publisher makes its row, which was lost, again.
here('BEGIN; DELETE FROM keyvault.usage_rollup; SELECT keyvault.rebuild_usage_daily(); COMMIT');
is_copy('rebuilt here');
is(there('SELECT tag_base FROM keyvault.usage_rollup'), $base, 'the subscriber keeps its own');

# It takes over.
my $used = there("SELECT credits_used FROM keyvault.credit_balances WHERE user_id = 'poor'");
end_period('poor');
here("SELECT keyvault._hold_credits('rich', 5, 'infinity', false)");
is_copy('before it takes over');
there('DROP SUBSCRIPTION keyvault');
there($release);
is(there("SELECT count(*) FROM keyvault.credit_holds WHERE expires_at = 'infinity'"), '0', 'what requests had held is given back');
ok(wait_until(sub { there("SELECT count(*) FROM keyvault.credit_periods WHERE user_id = 'poor'") eq '2' }), 'it begins periods by itself');
there("INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('poor', 11)");
is(there("SELECT credits_used FROM keyvault.credit_balances WHERE user_id = 'poor'"), '11.000000', 'it debits');
is(there('SELECT * FROM keyvault.verify_ledger()'), '', 'its ledger is sound');
is(there("SELECT keyvault.user_api_key('exa', 'rich')"), 'tap-exa-replicated', 'keys open there');
is(state_of($subscriber, "SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => 'rich')"), 'KV005', 'a box that was taken before is not taken again');
unlike(slurp_file($subscriber->logfile), qr/maintenance of keyvault failed/, 'no job has failed');
$subscriber->stop;
$publisher->stop;

done_testing();
