# Calls that cannot go as they were queued, and answers that cannot be stored: each ends with a status, and the worker goes on.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('unsettled');
use_mock($node, $port);

# A provider that goes while its request waits behind another one of the user's.
set_config($node, 'keyvault.max_concurrent_requests', 1);
my $first = queue_request($node, 'a', '[[mock: gate=first]]');
ends_as($node, $first, 'sent', 'a request is under way');
$node->safe_psql('postgres', "INSERT INTO keyvault.providers (provider, base_url) VALUES ('gone', 'http://127.0.0.1:$port'); SELECT keyvault.store_api_key('gone', 'key-of-a-provider-that-goes', user_id => 'a')");
my $orphan = $node->safe_psql('postgres', q(SELECT keyvault.request('gone', '{}', path => '/x', user_id => 'a')));
$node->safe_psql('postgres', "DELETE FROM keyvault.providers WHERE provider = 'gone'");
mock_open($port, 'first');
ends_as($node, $first, 'done', 'it is answered');
ends_as($node, $orphan, 'failed', 'a request whose provider was removed meanwhile fails');
like($node->safe_psql('postgres', "SELECT error FROM keyvault.responses WHERE id = '$orphan'"), qr/provider was removed/, '... and says so');
is($node->safe_psql('postgres', "SELECT count(*) FROM keyvault.credit_holds"), '0', '... and holds nothing');

# An answer that the database refuses to store.
my $log = -s $node->logfile;
$node->safe_psql('postgres', <<'SQL');
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no room for answers'; END $$;
CREATE TRIGGER refuse BEFORE INSERT ON keyvault.responses FOR EACH ROW WHEN (NEW.status_code = 200) EXECUTE FUNCTION refuse();
SQL
my $unstored = queue_request($node, 'a', 'an answer without a place');
my $failing = queue_request($node, 'a', '[[mock: status=400]]');
ends_as($node, $unstored, 'unknown', 'an answer that cannot be stored leaves its request unknown');
ends_as($node, $failing, 'failed', 'the next one is settled as usual');
like($node->safe_psql('postgres', "SELECT error FROM keyvault.responses WHERE id = '$unstored'"), qr/could not be stored/, '... and says so');
like(slurp_file($node->logfile, $log), qr/WARNING:  answer of a provider call cannot be stored: no room for answers/, 'the log says why');
is(mock_received($port, 'an answer without a place'), 1, 'it was not called twice');
$node->safe_psql('postgres', 'DROP TRIGGER refuse ON keyvault.responses');
my $last = queue_request($node, 'a', 'as ever');
ends_as($node, $last, 'done', 'the worker goes on');
balances_are_sums($node, 'balances are sums');

# Answers are kept for an hour, say: an unknown outcome is kept for its day all the same, to be reconciled.
set_config($node, 'keyvault.response_retention', 3600);
$node->safe_psql('postgres', <<"SQL");
UPDATE keyvault.requests SET id = '018e0000-0000-7000-8000-000000000001', finished_at = now() - interval '2 hours' WHERE id = '$unstored';
UPDATE keyvault.requests SET id = '018e0000-0000-7000-8000-000000000002', finished_at = now() - interval '2 hours' WHERE id = '$failing';
SELECT keyvault._purge(100);
SQL
is($node->safe_psql('postgres', "SELECT status FROM keyvault.requests WHERE id < '018e0000-0000-7000-8000-00000000000f'"), 'unknown',
	'what ended is purged, what is unknown waits to be reconciled');
is($node->safe_psql('postgres', "SELECT keyvault.reconcile_request(id, 'release') FROM keyvault.unknown_requests() WHERE user_id = 'a'"), 't', 'it can be');
balances_are_sums($node, 'balances are sums again');

# On a plan that charges for what is unknown, a request whose charge fails is kept until it can be charged, and holds nothing else up.
my $charged = queue_request($node, 'a', 'to be charged later');
ends_as($node, $charged, 'done', 'one more call');
$node->safe_psql('postgres', <<"SQL");
UPDATE keyvault.plans SET unknown_outcome = 'charge';
UPDATE keyvault.requests SET id = '018e0000-0000-7000-8000-000000000003', status = 'unknown', finished_at = now() - interval '2 days' WHERE id = '$charged';
CREATE FUNCTION public.refuse_usage() RETURNS trigger LANGUAGE plpgsql AS \$\$BEGIN RAISE EXCEPTION 'no room for usage'; END\$\$;
CREATE TRIGGER refuse BEFORE INSERT ON keyvault.usage_records FOR EACH ROW EXECUTE FUNCTION public.refuse_usage();
SQL
my (undef, undef, $warning) = $node->psql('postgres', 'SELECT keyvault._purge(100)');
like($warning, qr/WARNING:  request 018e0000-0000-7000-8000-000000000003 could not be charged: no room for usage/, 'a charge that fails is a warning of the purge');
is($node->safe_psql('postgres', "SELECT status FROM keyvault.requests WHERE id = '018e0000-0000-7000-8000-000000000003'"), 'unknown', 'and its request is kept');
$node->safe_psql('postgres', 'DROP TRIGGER refuse ON keyvault.usage_records; SELECT keyvault._purge(100)');
is($node->safe_psql('postgres', "SELECT count(*) FROM keyvault.usage_records WHERE request_id = '018e0000-0000-7000-8000-000000000003'"), '1', 'until it is charged');
done_testing();
