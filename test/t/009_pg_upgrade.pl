# pg_upgrade of a vault in use, with requests in the queue: to this PostgreSQL from the one of KEYVAULT_OLD_INSTALL, a
# folder with its bin and lib and keyvault installed, or else from this PostgreSQL itself.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $mock = start_mock();
my $master_key = new_master_key();
my $own_key = 'sk-tap-pg-upgrade-own-0123456789';
my $old_install = $ENV{KEYVAULT_OLD_INSTALL};
# From 18 on initdb turns checksums on unless told not to, and both clusters must agree.
my $plain_init = { no_data_checksums => 1 };
my $nowhere = "keyvault.databases = 'no_database_is_served'\n";

sub version_of
{
	my ($node) = @_;
	return $node->safe_psql('postgres', 'SHOW server_version');
}

# Every table's rows, as one text.
sub content
{
	my ($node) = @_;
	my $tables = $node->safe_psql('postgres', <<'SQL');
SELECT oid::regclass FROM pg_class WHERE relnamespace = 'keyvault'::regnamespace AND relkind = 'r' ORDER BY relname COLLATE "C"
SQL
	return [ map { "$_:\n" . $node->safe_psql('postgres', qq(SELECT * FROM $_ t ORDER BY t::text COLLATE "C")) } split /\n/, $tables ];
}

# The extension's objects but row types, which only some versions list, its version, and who may do what with them.
sub catalog
{
	my ($node) = @_;
	return [ split /\n/, $node->safe_psql('postgres', <<'SQL') ];
SELECT extversion FROM pg_extension WHERE extname = 'keyvault';
SELECT pg_describe_object(d.classid, d.objid, 0) COLLATE "C" AS member FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
 WHERE d.refclassid = 'pg_extension'::regclass AND d.classid <> 'pg_type'::regclass AND d.deptype = 'e' AND e.extname = 'keyvault' ORDER BY 1;
SELECT relname, relkind, relrowsecurity FROM pg_class WHERE relnamespace = 'keyvault'::regnamespace ORDER BY relname COLLATE "C";
SELECT c.relname COLLATE "C", a.grantee::regrole::text COLLATE "C", a.privilege_type
  FROM pg_class c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
 WHERE c.relnamespace = 'keyvault'::regnamespace AND c.relkind IN ('r', 'p', 'v') AND a.grantee <> c.relowner ORDER BY 1, 2, 3;
SELECT p.oid::regprocedure::text COLLATE "C", p.proconfig, a.grantee::regrole::text COLLATE "C"
  FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
 WHERE p.pronamespace = 'keyvault'::regnamespace ORDER BY 1, 3;
SELECT polrelid::regclass::text COLLATE "C", polname, pg_get_expr(polqual, polrelid) FROM pg_policy ORDER BY 1, 2;
SELECT tgrelid::regclass::text COLLATE "C", tgname, tgenabled FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1, 2;
SQL
}

# Some minor versions of PostgreSQL mark each column of every table with an option that minor versions of others do not
# know, so that pg_upgrade fails whatever the table is. Returns whether the marks had to be taken off.
sub unmark_columns
{
	my ($from_node, $to_node) = @_;
	my $marked = q(attoptions::text LIKE '{pg_attver=%}');
	return 0 if $from_node->safe_psql('postgres', "SELECT count(*) FROM pg_attribute WHERE $marked") eq '0';
	$to_node->start;
	my $unknown = state_of($to_node, 'CREATE TEMPORARY TABLE t (a int); ALTER TABLE t ALTER a SET (pg_attver = 1)') ne '';
	$to_node->stop;
	return 0 unless $unknown;
	$from_node->safe_psql($_, "UPDATE pg_attribute SET attoptions = NULL WHERE $marked") foreach qw(postgres template1);
	return 1;
}

my $old = new_node('old', master_key => $master_key, install_path => $old_install, init => $old_install ? {} : $plain_init);
my $from = version_of($old);

# A vault in use, with calls that are over.
use_mock($old, $mock);
$old->safe_psql('postgres', <<"SQL");
CREATE ROLE app_role;
CREATE ROLE analyst_role;
SELECT keyvault.grant_access('app_role', 'app'), keyvault.grant_access('analyst_role', 'analyst');
UPDATE keyvault.plans SET credits_per_usd = 2000 WHERE plan = 'pro';
SELECT keyvault.upsert_user('rich', plan => 'pro'), keyvault.upsert_user('poor');
SELECT keyvault.store_api_key('openai', '$own_key', user_id => 'rich'), keyvault.store_api_key('exa', 'tap-exa-pg-upgrade', user_id => 'rich');
INSERT INTO keyvault.usage_records (user_id, credits, created_at)
SELECT user_id, 1.5, created_at
  FROM unnest('{rich, poor}'::text[]) user_id, unnest(ARRAY[now(), now() - interval '2 years', now() + interval '1 month']) created_at;
SQL
ends_as($old, queue_request($old, 'poor', 'before the upgrade'), 'done', 'a call is done in the old cluster');
ends_as($old, queue_request($old, 'poor', '[[mock: hang]]', timeout => "'200 ms'"), 'unknown', 'another keeps its hold');

# Requests that nobody takes.
$old->append_conf('postgresql.conf', $nowhere);
$old->restart;
my $of_rich = queue_request($old, 'rich', 'queued with the own key');
my $of_poor = queue_request($old, 'poor', 'queued with a hold', payer => "'platform'");
my $once = queue_request($old, 'rich', 'queued with a key for one call', api_key => "'sk-for-one-call-0123456789abcdef'");
is($old->safe_psql('postgres', q(SELECT count(*) FROM keyvault.requests WHERE status = 'queued')), '3', 'requests wait in the old cluster');
is($old->safe_psql('postgres', q(SELECT count(*) FROM keyvault.credit_holds WHERE user_id = 'poor')), '2', 'and holds');

my %before = (content => content($old), catalog => catalog($old), keys => $old->safe_psql('postgres', q(SELECT keyvault.user_api_keys('rich'))));
like($before{keys}, qr/\Q$own_key\E/, 'keys open in the old cluster');

# While pg_upgrade runs both servers, a worker would take the requests if one started.
$old->append_conf('postgresql.conf', "keyvault.databases = ''\n");
my $new = new_node('new', master_key => $master_key, init_only => 1, init => $plain_init);
note 'without pg_attver' if unmark_columns($old, $new);
$old->stop;
my $new_bin = $new->config_data('--bindir');
my @pg_upgrade = (
	'pg_upgrade', '--old-datadir', $old->data_dir, '--new-datadir', $new->data_dir,
	'--old-bindir', $old_install ? "$old_install/bin" : $new_bin, '--new-bindir', $new_bin,
	'--old-port', $old->port, '--new-port', $new->port, '--socketdir', $new->host);
# It leaves a script where it runs.
chdir $PostgreSQL::Test::Utils::tmp_check or die $!;
$new->command_ok([ @pg_upgrade, '--check' ], 'pg_upgrade has no objection');
$new->command_ok(\@pg_upgrade, 'and upgrades');
is(mock_received($mock, 'queued with'), 0, 'no worker runs meanwhile');

$new->append_conf('postgresql.conf', $nowhere);
$new->start;
note "$from became " . version_of($new);
is_deeply(catalog($new), $before{catalog}, 'the extension has the same objects, privileges and version');
is_deeply(content($new), $before{content}, 'and the same rows');
is($new->safe_psql('postgres', q(SELECT keyvault.user_api_keys('rich'))), $before{keys}, 'keys open under the same master key');
balances_are_sums($new, 'balances are the sums of usage and holds');

# What waited goes on.
set_config($new, 'keyvault.databases', '');
ends_as($new, $of_rich, 'done', 'the worker sends what was queued before');
ends_as($new, $of_poor, 'done', 'also what has a hold');
ends_as($new, $once, 'failed', 'a key for one call does not outlive the server');
is(mock_received($mock, 'queued with the own key'), 1, 'once');
is(mock_received($mock, 'queued with a key for one call'), 0, 'and without its key not at all');
ends_as($new, queue_request($new, 'poor', 'after the upgrade'), 'done', 'new requests are sent');
is($new->safe_psql('postgres', q(SELECT count(*) FROM keyvault.credit_holds WHERE user_id = 'poor')), '1', 'holds of what is done are gone');
$new->safe_psql('postgres', q(SELECT keyvault.store_api_key('openai', 'sk-tap-after-pg-upgrade-012345', user_id => 'poor')));
is($new->safe_psql('postgres', q(SELECT keyvault.user_api_key('openai', 'poor'))), 'sk-tap-after-pg-upgrade-012345', 'keys are stored and opened');
balances_are_sums($new, 'balances are the sums of usage and holds at the end');

done_testing();
