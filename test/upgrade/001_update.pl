# ALTER EXTENSION keyvault UPDATE: the SQL of the version before works with this library, an update loses nothing, and
# its result is what CREATE EXTENSION makes.
use strict;
use warnings FATAL => 'all';
use Test::More;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Keyvault;

my @released = sort { version_key($a) cmp version_key($b) } map { m{--([^/]+)\.sql$} } glob 'sql/released/*.sql';
my $before = $released[-1];
my ($now) = slurp_file('keyvault.control') =~ /^default_version\s*=\s*'([^']+)'/m;
my $port = start_mock();
my $node = new_node('update');
# pg_dump takes a privilege that its extension's script left as given: roles that hold some tell whether an update did.
my @accesses = qw(app user analyst admin);
$node->safe_psql('postgres', "CREATE ROLE kv_$_ LOGIN") foreach @accesses;

is($node->safe_psql('postgres', "SELECT extversion FROM pg_extension WHERE extname = 'keyvault'"), $now, "CREATE EXTENSION installs $now");
give_accesses('postgres');
my %fresh = snapshot('postgres');
cmp_ok(scalar keys %fresh, '>', 1000, 'the snapshot has the extension');
is(join("\n", grep { /not described/ } sort keys %fresh), '', 'the snapshot describes every kind of object there is');

# Fresh install equals upgraded install.
foreach my $version (@released)
{
	my $database = "from_$version" =~ tr/./_/r;
	$node->safe_psql('postgres', "CREATE DATABASE $database");
	$node->safe_psql($database, "CREATE EXTENSION keyvault VERSION '$version' CASCADE");
	give_accesses($database);
	$node->safe_psql($database, 'ALTER EXTENSION keyvault UPDATE; SELECT * FROM keyvault.refresh_access()');
	my %updated = snapshot($database);
	is(differences(\%fresh, \%updated), '', "an update from $version makes what CREATE EXTENSION makes");
	is(differences({ schema_dump('postgres') }, { schema_dump($database) }), '', "a dump of the schema after an update from $version is one of a new install");
}

# The SQL of the version before, with this library.
$node->safe_psql('postgres', 'CREATE DATABASE used');
$node->safe_psql('used', "CREATE EXTENSION keyvault VERSION '$before' CASCADE");
give_accesses('used');
use_mock($node, $port, 'used');
# Up to 0.1.0 an insert could fail while a partition was made: it is made first.
$node->safe_psql('used', 'SELECT keyvault._make_usage_partitions()');
use_keyvault('old', "with the SQL of $before");
# What must outlast the update: a change of an administrator's, a key, and a request in the queue.
$node->safe_psql('used', "UPDATE keyvault.plans SET monthly_credits = 1234 WHERE plan = 'free'");
as_app("SELECT keyvault.store_api_key('gemini', 'AIza-key-of-before-the-update', user_id => 'keeper')");
set_config($node, 'keyvault.key_use_flush_interval', 0);
as_app("SELECT keyvault.user_api_key('gemini', 'keeper')");
ok(wait_until(sub { $node->safe_psql('used', "SELECT last_used_at IS NOT NULL FROM keyvault.api_keys WHERE user_id = 'keeper'") eq 't' }),
	"uses of keys are written with the SQL of $before");
set_config($node, 'keyvault.key_use_flush_interval', undef);
set_config($node, 'keyvault.databases', 'none');
wait_until(sub { worker_pid($node, 'used') eq '' }) or die 'the worker does not leave';
my $queued = as_app(q{SELECT keyvault.request('openai', '{"messages": [{"role": "user", "content": "queued"}]}', model => 'gpt-5-mini', user_id => 'keeper')});
my $status_columns = 'user_id, plan, monthly_credits, extra_credits, credits_used, credits_held, credits_remaining, credits_reset_at';
my $balances = $node->safe_psql('used', "SELECT $status_columns FROM keyvault.credit_status ORDER BY user_id");
my $usage = $node->safe_psql('used', 'SELECT id, user_id, credits, tokens FROM keyvault.usage_records ORDER BY id');

# A session that has plans of the version before goes on after the update.
my $update = "psql -X -q -U @{[ $node->safe_psql('postgres', 'SELECT current_user') ]} -d \"@{[ $node->connstr('used') ]}\" -c \"ALTER EXTENSION keyvault UPDATE\"";
my ($status, $out, $errors) = $node->psql('used', <<"SQL");
SET ROLE kv_app;
SELECT keyvault.user_api_key('gemini', 'keeper');
SELECT keyvault.store_api_key('exa', 'exa-key-in-an-open-session', user_id => 'keeper') IS NOT NULL;
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('session', 'api', 1);
-- The update does not wait for this transaction, which wrote nothing of the extension's yet.
BEGIN;
DO 'BEGIN PERFORM pg_current_xact_id(); END';
\\! $update
SELECT keyvault.user_api_key('gemini', 'keeper');
SELECT keyvault.store_api_key('exa', 'exa-key-in-an-open-session', user_id => 'keeper') IS NOT NULL;
INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('session', 'api', 1);
COMMIT;
SQL
is("$status $errors", '0 ', 'an open session goes on after the update');
is($out, join("\n", ('AIza-key-of-before-the-update', 't') x 2), '... with the same keys');
is($node->safe_psql('used', "SELECT sum(calls) FROM keyvault.usage_by_day WHERE user_id = 'session'"), '2', '... and all its usage is counted');
is($node->safe_psql('used', "SELECT extversion FROM pg_extension WHERE extname = 'keyvault'"), $now, "the database is at $now");
is($node->safe_psql('used', "SELECT string_agg(role || ' ' || access, ', ' ORDER BY access) FROM keyvault.refresh_access()"),
	'kv_admin admin, kv_analyst analyst, kv_app app, kv_user user', 'refresh_access finds every access');

is($node->safe_psql('used', q{SELECT monthly_credits FROM keyvault.plans WHERE plan = 'free'}), '1234.000000', "an administrator's change stays");
is($node->safe_psql('used', qq{SELECT $status_columns FROM keyvault.credit_status WHERE user_id <> 'session' ORDER BY user_id}), $balances, 'credits are as before');
is($node->safe_psql('used', q{SELECT id, user_id, credits, tokens FROM keyvault.usage_records WHERE user_id <> 'session' ORDER BY id}), $usage, 'usage is as before');
is(request_status($node, $queued, 'used'), 'queued', 'a queued request is still queued');
set_config($node, 'keyvault.databases', undef);
ends_as($node, $queued, 'done', '... and is sent', 'used');
use_keyvault('new', 'after the update');
balances_are_sums($node, 'balances are sums', 'used');
$node->safe_psql('used', 'DROP EXTENSION keyvault');
is($node->safe_psql('used', "SELECT count(*) FROM pg_namespace WHERE nspname = 'keyvault'"), '0', 'DROP EXTENSION removes an updated install whole');
done_testing();

sub version_key { return join '.', map { sprintf '%06d', $_ } $_[0] =~ /(\d+)/g }

sub give_accesses
{
	my ($database) = @_;
	$node->safe_psql($database, "SELECT keyvault.grant_access('kv_$_', '$_')") foreach @accesses;
	return;
}

# The facts of a database's extension: {"object | property | value" => 1}.
sub snapshot
{
	my ($database) = @_;
	my $lines = $node->safe_psql($database, slurp_file('test/upgrade/snapshot.sql'));
	return map { $_ => 1 } split /\n/, $lines;
}

# By object, what one snapshot has and the other has not; '' when they are the same.
sub differences
{
	my ($fresh, $updated) = @_;
	my %by_object;
	foreach my $side ([ 'CREATE EXTENSION', $fresh, $updated ], [ 'UPDATE', $updated, $fresh ])
	{
		my ($name, $has, $other) = @$side;
		foreach my $fact (grep { !$other->{$_} } keys %$has)
		{
			my ($object, $property, $value) = split / \| /, $fact, 3;
			push @{ $by_object{$object} }, sprintf "%s\0    %-17s %s: %s", $property, "$name:", $property, substr $value, 0, 400;
		}
	}
	return '' unless %by_object;
	return join "\n", scalar(keys %by_object) . ' objects differ; a line says who has it, CREATE EXTENSION or UPDATE:',
		map { ($_, map { s/.*\0//r } sort @{ $by_object{$_} }) } sort keys %by_object;
}

# The lines of a dump as facts. PostgreSQL puts a new random word into its \restrict lines.
sub schema_dump
{
	my ($database) = @_;
	my ($dump) = run_command([ 'pg_dump', '--schema-only', $node->connstr($database) ]);
	cmp_ok(length $dump, '>', 1000, "$database is dumped");
	return map { ("dump | line | $_" => 1) } grep { !/^\\(?:un)?restrict / } split /\n/, $dump;
}

sub as_app
{
	my ($sql) = @_;
	return $node->safe_psql('used', "SET ROLE kv_app; $sql");
}

# What an application does all day, for users whose names begin with a prefix.
sub use_keyvault
{
	my ($prefix, $when) = @_;
	my $user = "${prefix}_user";
	is(as_app("SELECT keyvault.store_api_key('openai', 'sk-proj-key-of-$user', user_id => '$user') IS NOT NULL; SELECT keyvault.user_api_keys('$user')"),
		qq(t\n{"openai": "sk-proj-key-of-$user"}), "keys are stored and looked up $when");
	as_app("SELECT keyvault.set_plan('$user', 'pro')");
	as_app("INSERT INTO keyvault.usage_records (user_id, type, tokens, credits) VALUES ('$user', 'chat', 10, 2.5)");
	is($node->safe_psql('used', "SELECT plan, credits_used FROM keyvault.credit_status WHERE user_id = '$user'"), 'pro|2.500000', "usage is debited $when");
	my (undef, undef, $refused) = $node->psql('used', "\\set VERBOSITY sqlstate\nSET ROLE kv_app; INSERT INTO keyvault.usage_records (user_id, type, credits) VALUES ('$user', 'chat', 50000)");
	like($refused, qr/KV001/, "the limit holds $when");
	my $id = as_app("SELECT keyvault.request('openai', '{\"messages\": [{\"role\": \"user\", \"content\": \"$when\"}]}', model => 'gpt-5-mini', user_id => '$user', payer => 'platform')");
	is(as_app("SELECT status FROM keyvault.wait_response('$id')"), 'done', "a call is made $when");
	is($node->safe_psql('used', "SELECT count(*) FROM keyvault.usage_records WHERE request_id = '$id' AND credits > 0"), '1', "... and debited");
	is(as_app("SELECT keyvault.delete_api_key('openai', user_id => '$user'); SELECT keyvault.user_api_keys('$user')"), "t\n{}", "a key is deleted $when");
	return;
}
