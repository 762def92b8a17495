# test_api_key: the provider's word on a key.
use strict;
use warnings FATAL => 'all';
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('key_test');
use_mock($node, $port);

sub store
{
	my ($user, $provider, $key) = @_;
	$node->safe_psql('postgres', "SELECT keyvault.store_api_key('$provider', '$key', user_id => '$user')");
	return;
}

sub test_key
{
	my ($user, $provider) = @_;
	return $node->safe_psql('postgres', "SELECT keyvault.test_api_key('$provider', user_id => '$user')");
}

sub status
{
	my ($user) = @_;
	return $node->safe_psql('postgres', "SELECT status, last_verified_at IS NOT NULL FROM keyvault.api_keys WHERE user_id = '$user'");
}

store($_, $_, "good-key-of-$_-01234567") foreach qw(openai anthropic gemini);
foreach my $provider (qw(openai anthropic gemini))
{
	my $id = test_key($provider, $provider);
	ends_as($node, $id, 'done', "$provider: a good key passes");
	is(status($provider), 'active|t', "$provider: it is verified");
}
my @calls = @{ JSON::PP::decode_json(mock_get($port, '/__log')) };
is(scalar(grep { $_->{method} eq 'GET' && $_->{body} eq '' } @calls), 3, 'tests are GETs without a body');

# The stand-in refuses some keys.
store('refused', 'openai', 'sk-invalid-0123456789abcdef');
ends_as($node, test_key('refused', 'openai'), 'failed', 'a refused key fails');
is(status('refused'), 'failed|t', 'and is marked');
store('refused', 'openai', 'sk-good-0123456789abcdef');
is(status('refused'), 'active|f', 'a new key is active, and not verified yet');
ends_as($node, test_key('refused', 'openai'), 'done', 'until it is tested');
is(status('refused'), 'active|t', 'then it is');
store('refused', 'openai', 'sk-good-0123456789abcdef');
is(status('refused'), 'active|t', 'stored again unchanged, it still is');

# A provider that is down says nothing about the key.
$node->safe_psql('postgres', "UPDATE keyvault.providers SET test_path = '/v1/messages' WHERE provider = 'anthropic'; UPDATE keyvault.api_keys SET last_verified_at = NULL");
ends_as($node, test_key('anthropic', 'anthropic'), 'failed', 'another answer is no verdict');
is(status('anthropic'), 'active|f', 'the key stays as it was');

# A key that ends, or is deleted, while its request waits is not sent.
store($_, 'openai', "sk-of-$_-0123456789abcdef") foreach qw(lasting ended gone);
set_config($node, 'keyvault.databases', 'none');
wait_until(sub { worker_pid($node) eq '' }) or die 'the worker stays';
my %waiting = map { $_ => test_key($_, 'openai') } qw(lasting ended gone);
$node->safe_psql('postgres', "UPDATE keyvault.api_keys SET expires_at = now() WHERE user_id = 'ended'; SELECT keyvault.delete_api_key('openai', user_id => 'gone')");
set_config($node, 'keyvault.databases', undef);
ends_as($node, $waiting{lasting}, 'done', 'a key that lasts is tested');
foreach my $user (qw(ended gone))
{
	ends_as($node, $waiting{$user}, 'failed', "$user: a key that is no more is not");
	like($node->safe_psql('postgres', "SELECT error FROM keyvault.requests WHERE id = '$waiting{$user}'"), qr/^KV003/, 'for that reason');
}
@calls = @{ JSON::PP::decode_json(mock_get($port, '/__log')) };
my $sent = join ' ', map { JSON::PP::encode_json($_) } @calls;
is(join(' ', $sent =~ /sk-of-(\w+)-/g), 'lasting', 'and the provider has not seen it');

# It costs nothing.
is($node->safe_psql('postgres', 'SELECT count(*) FROM keyvault.usage_records'), '0', 'no usage');
is($node->safe_psql('postgres', 'SELECT coalesce(sum(credits_used + credits_held), 0) FROM keyvault.credit_balances'), '0.000000', 'no credits');

# Errors.
is(state_of($node, "SELECT keyvault.test_api_key('openia', user_id => 'openai')"), '22023', 'unknown provider');
is(state_of($node, "SELECT keyvault.test_api_key('exa', user_id => 'openai')"), '22023', 'a provider without a test_path');
is(state_of($node, "SELECT keyvault.test_api_key('openai', user_id => 'gemini')"), 'KV003', "no key of one's own, though the platform has one");
is(state_of($node, "SELECT keyvault.test_api_key('openai', 'other', 'openai')"), 'KV003', 'no key of that name');
is(state_of($node, "SELECT keyvault.test_api_key('openai')"), '42501', 'nobody to test it for');
is(state_of($node, "SELECT keyvault.test_api_key('openai', NULL, 'openai')"), '22004', 'no name');
$node->safe_psql('postgres', "UPDATE keyvault.users SET status = 'suspended' WHERE user_id = 'openai'");
is(state_of($node, "SELECT keyvault.test_api_key('openai', user_id => 'openai')"), 'KV007', 'a suspended user');
$node->stop;
done_testing();
