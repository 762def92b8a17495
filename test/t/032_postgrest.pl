# Users behind PostgREST: one login role, web roles that inherit nothing, each request a transaction with claims.
#
# The roles and the function before each request are those of doc/keyvault.md. Requests are made in the order of
# PostgREST's: BEGIN, settings of the transaction with the role among them, the function, a prepared statement, COMMIT.
use strict;
use warnings FATAL => 'all';
use JSON::PP ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $node = new_node('postgrest', init => { allows_streaming => 1 }, conf => "keyvault.databases = 'none'\n");
my ($setup) = slurp_file('doc/keyvault.md') =~ /^### PostgREST\n.*?^```\n(.*?)^```\n/ms;
ok($setup, 'doc/keyvault.md says how it is set up');
$node->safe_psql('postgres', $setup);
$node->safe_psql('postgres', <<'SQL');
SELECT keyvault.upsert_user('ann'), keyvault.upsert_user('ben', plan => 'pro');
SELECT keyvault.store_api_key('exa', 'key-of-ann-for-exa', user_id => 'ann'), keyvault.store_api_key('exa', 'key-of-ben-for-exa', user_id => 'ben');
SQL

# What an HTTP request becomes: statements that are prepared by the first request that needs them, and stay with the connection.
my %statements = (
	lookup => q{AS WITH source AS (SELECT c.v FROM (SELECT keyvault.user_api_keys() AS v) c) SELECT coalesce(json_agg(source.v) -> 0, 'null') FROM source},
	lookup_of => q{(json) AS SELECT keyvault.user_api_key(provider => b.provider, user_id => b.user_id)
		FROM json_to_record($1) AS b (provider text, user_id text)},
	store => q{(json) AS SELECT keyvault.store_api_key(provider => b.provider, key => b.key) IS NOT NULL
		FROM json_to_record($1) AS b (provider text, key text)},
	store_for => q{(json) AS SELECT keyvault.store_api_key(provider => b.provider, key => b.key, user_id => b.user_id)
		FROM json_to_record($1) AS b (provider text, key text, user_id text)},
	list => q{AS WITH source AS (SELECT user_id, provider, status FROM keyvault.api_key_status ORDER BY 1, 2)
		SELECT coalesce(json_agg(source), '[]') FROM source},
	credits => q{AS WITH source AS (SELECT user_id, plan FROM keyvault.credit_status) SELECT coalesce(json_agg(source), '[]') FROM source},
	others => q{AS SELECT count(*) FROM keyvault.users WHERE user_id <> keyvault.current_user_id()},
);

sub connection
{
	my ($server) = @_;
	# PostgREST's own login; it has no password here.
	my $session = $server->background_psql('postgres', on_error_stop => 0, extra_params => [ '-U', 'authenticator' ]);
	$session->query("\\set VERBOSITY sqlstate\nSET plan_cache_mode = force_generic_plan;");
	return $session;
}

# One request on a connection; the last line that it returns, or the SQLSTATE.
sub ask
{
	my ($connection, $subject, $statement, %option) = @_;
	my $claims = defined $subject ? JSON::PP->new->canonical->encode({ role => 'web_user', sub => $subject }) : '';
	my $role = $option{role} // (defined $subject ? 'web_user' : 'web_anon');
	my ($begin, $identify) = ('BEGIN' . ($option{read_only} ? ' READ ONLY' : ''), $option{without_identity} ? 'SELECT' : 'SELECT web.identify()');
	my ($name) = $statement =~ /^EXECUTE (\w+)/;
	my $prepare = $name && !$connection->query("SELECT 1 FROM pg_prepared_statements WHERE name = '$name'") ? "PREPARE $name $statements{$name};" : '';
	$connection->{stderr} = '';
	my $out = $connection->query(<<"SQL");
$begin;
SELECT set_config('search_path', 'web, public', true), set_config('role', '$role', true), set_config('request.jwt.claims', '$claims', true),
	set_config('request.method', 'GET', true), set_config('request.path', '/', true);
$identify;
$prepare
$statement;
COMMIT;
SQL
	return $1 if $connection->{stderr} =~ /ERROR:\s+(\w{5})/;
	return (split /\n/, $out)[-1] // '';
}

sub body { return "'" . JSON::PP->new->canonical->encode({@_}) . "'" }

my @pool = map { connection($node) } 1, 2;

foreach my $n (0, 1)
{
	my $it = $pool[$n];
	is(ask($it, 'ann', 'EXECUTE lookup', read_only => 1), '{"exa": "key-of-ann-for-exa"}', "connection $n: GET looks up");
	is(ask($it, 'ben', 'EXECUTE lookup', read_only => 1), '{"exa": "key-of-ben-for-exa"}', 'the next request is another user\'s, through the same plan');
	is(ask($it, undef, 'EXECUTE lookup', read_only => 1), '42501', 'one without a token has nothing of his');
	is(ask($it, undef, 'SELECT coalesce(keyvault.current_user_id(), $$nobody$$)', role => 'web_user'), 'nobody', 'nor an identity, whatever its role');
	is(ask($it, undef, 'EXECUTE lookup', role => 'web_user'), '42501', 'nor keys');
	is(ask($it, undef, 'EXECUTE list', role => 'web_user'), '[]', 'nor rows');
	is(ask($it, 'ben', 'EXECUTE lookup', without_identity => 1), '42501', 'claims alone are no identity');
	is(ask($it, 'ann', 'EXECUTE list', read_only => 1), '[{"user_id":"ann","provider":"exa","status":"active"}]', 'GET lists');
	is(ask($it, 'ben', 'EXECUTE credits', read_only => 1), '[{"user_id":"ben","plan":"pro"}]', 'and shows credits');
	is(ask($it, 'ben', 'EXECUTE others', read_only => 1), '0', 'no other user is seen');
	is(ask($it, 'ann', 'EXECUTE lookup_of(' . body(provider => 'exa') . ')'), 'key-of-ann-for-exa', 'POST to a function with one\'s own key');
	is(ask($it, 'ann', 'EXECUTE lookup_of(' . body(provider => 'exa', user_id => 'ben') . ')'), '42501', 'and with another\'s');
	is(ask($it, 'ann', 'EXECUTE store_for(' . body(provider => 'exa', user_id => 'ben', key => 'key-of-somebody-else') . ')'), '42501', 'nothing is stored for another');
	is(ask($it, 'ann', 'SELECT keyvault.act_as($$ben$$)'), '42501', 'nor is another\'s identity to be had');
	is(ask($it, 'ann', 'SELECT set_config($$keyvault.user_id$$, $$ben$$, true)'), '42501', 'not by its setting either');
	is(ask($it, 'ann', 'SELECT set_config($$request.jwt.claims$$, $${"sub": "ben"}$$, true); SELECT web.identify()'), '42501', 'nor by asking twice');
	is(ask($it, 'ann', 'EXECUTE lookup'), '{"exa": "key-of-ann-for-exa"}', 'after errors the connection serves on');
	is($it->query('SELECT current_user, keyvault.current_user_id()') . $it->{stderr} =~ s/^.*ERROR:\s+(\w{5}).*$/$1/sr, '42501',
		'between requests the login has no access of its own');
	is($it->query(q{SELECT current_setting('keyvault.user_id', true), current_setting('request.jwt.claims', true), current_user}), '||authenticator',
		'nor an identity, claims or a role');
}

# Both connections at once, in open transactions.
$pool[0]->query(q{BEGIN; SELECT set_config('role', 'web_user', true), set_config('request.jwt.claims', '{"sub": "ann"}', true); SELECT web.identify()});
is(ask($pool[1], 'ben', 'EXECUTE lookup'), '{"exa": "key-of-ben-for-exa"}', 'two requests at once have an identity each');
is($pool[0]->query('EXECUTE lookup; ROLLBACK;'), '{"exa": "key-of-ann-for-exa"}', 'and keep it');

# Writes, and the READ ONLY transaction of a GET.
is(ask($pool[0], 'ann', 'EXECUTE store(' . body(provider => 'openai', key => 'sk-of-ann-0123456789') . ')', read_only => 1), '25006', 'GET stores nothing');
is(ask($pool[0], 'ann', 'EXECUTE store(' . body(provider => 'openai', key => 'sk-of-ann-0123456789') . ')'), 't', 'POST does');
is(ask($pool[1], 'ann', 'EXECUTE lookup', read_only => 1), '{"exa": "key-of-ann-for-exa", "openai": "sk-of-ann-0123456789"}', 'another connection has it');
is(ask($pool[1], 'ben', 'EXECUTE list'), '[{"user_id":"ben","provider":"exa","status":"active"}]', 'the other user does not');
is(ask($pool[1], 'new', 'EXECUTE store(' . body(provider => 'exa', key => 'key-of-a-new-user') . ')'), '22023', 'a web role makes no users');

# A hot standby.
$node->backup('copy');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($node, 'copy', has_streaming => 1);
$standby->start;
my $there = connection($standby);
is(ask($there, 'ann', 'EXECUTE lookup', read_only => 1), '{"exa": "key-of-ann-for-exa", "openai": "sk-of-ann-0123456789"}', 'a standby looks up');
is(ask($there, 'ben', 'EXECUTE lookup'), '{"exa": "key-of-ben-for-exa"}', 'for the next user, too, whatever the transaction');
is(ask($there, 'ben', 'EXECUTE list', read_only => 1), '[{"user_id":"ben","provider":"exa","status":"active"}]', 'and lists');
is(ask($there, 'ann', 'EXECUTE lookup_of(' . body(provider => 'exa', user_id => 'ben') . ')', read_only => 1), '42501', 'each his own');
is(ask($there, undef, 'EXECUTE list', role => 'web_user', read_only => 1), '[]', 'and nobody none');
is(ask($there, 'ann', 'EXECUTE store(' . body(provider => 'exa', key => 'key-of-a-standby') . ')'), '25006', 'and stores nothing');

$_->quit foreach @pool, $there;
$standby->stop('immediate');
$node->stop;
done_testing();
