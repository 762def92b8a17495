# Keys that are kept on a Vault server, and named here.
use strict;
use warnings FATAL => 'all';
use File::Temp ();
use HTTP::Tiny;
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $directory = File::Temp::tempdir(CLEANUP => 1);
my $vault = start_vault('--token', 'right-token');
my $http = HTTP::Tiny->new(proxy => undef, http_proxy => undef, default_headers => { 'X-Vault-Token' => 'right-token' });
my $token_file = "$directory/token";
write_token('right-token');
my $node = new_node('reference', conf => <<"CONF");
keyvault.vault_address = 'http://127.0.0.1:$vault/'
keyvault.vault_token_file = '$token_file'
keyvault.master_key_timeout = 1s
keyvault.max_attempts = 2
log_statement = all
CONF
$node->safe_psql('postgres', "UPDATE keyvault.providers SET base_url = 'http://127.0.0.1:$port', allowed_host = '127.0.0.1:$port'");

sub write_token { return write_secret($token_file, "$_[0]\n") }

sub put_secret
{
	my ($path, %fields) = @_;
	my $answer = $http->post("http://127.0.0.1:$vault/v1/$path", { content => JSON::PP::encode_json({ data => \%fields }) });
	die $answer->{content} unless $answer->{success};
	return;
}

sub mode { return $http->post("http://127.0.0.1:$vault/__mode?mode=$_[0]") }
sub fetches { my ($path) = @_; return JSON::PP::decode_json($http->get("http://127.0.0.1:$vault/__stats")->{content})->{$path} // 0 }

sub refer
{
	my ($user, $reference) = @_;
	$node->safe_psql('postgres', "SELECT keyvault.store_api_key_reference('openai', '$reference', user_id => '$user')");
	return;
}

sub called_with
{
	my ($text) = @_;
	my ($call) = grep { index($_->{body}, $text) >= 0 } reverse @{ JSON::PP::decode_json(mock_get($port, '/__log')) };
	return $call ? $call->{headers}{authorization} =~ s/^Bearer //r : '';
}

sub error_of { return $node->safe_psql('postgres', "SELECT error FROM keyvault.requests WHERE id = '$_[0]'") }

# A call with a key that is fetched, and one more with the same.
put_secret('secret/data/team/openai', api_key => 'sk-kept-elsewhere-0123456789', other => 5);
refer('r', 'vault:secret/team/openai#api_key');
my $first = queue_request($node, 'r', 'first-by-reference');
ends_as($node, $first, 'done', 'a call is made');
is(called_with('first-by-reference'), 'sk-kept-elsewhere-0123456789', 'with the key of the reference');
ends_as($node, queue_request($node, 'r', 'second-by-reference'), 'done', 'another call');
is(fetches('secret/data/team/openai'), 2, 'it is kept for a while: one POST of ours, one fetch');

# What is stored is the reference.
is($node->safe_psql('postgres', "SELECT hint, source, status FROM keyvault.api_key_status WHERE user_id = 'r'"), 'vault:secret/team/openai#api_key|reference|active',
	'the owner sees the reference');
is(state_of($node, "SELECT keyvault.user_api_key('openai', 'r')"), '0A000', 'a lookup says that the key is elsewhere');
is($node->safe_psql('postgres', "SELECT keyvault.user_api_keys('r')"), '{}', 'and the list leaves it out');
ends_as($node, $node->safe_psql('postgres', "SELECT keyvault.test_api_key('openai', user_id => 'r')"), 'done', 'it can be tested');
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('exa', 'vault:secret/team/openai#api_key', user_id => 'r')");
is($node->safe_psql('postgres', "SELECT keyvault.user_api_keys('r')"), '{"exa": "vault:secret/team/openai#api_key"}', 'a key that looks like a reference is a key');

# The key is replaced where it is kept: a refused one is fetched anew.
put_secret('secret/data/rotated', api_key => 'sk-invalid-soon-0123456789');
refer('rotated', 'vault:secret/rotated#api_key');
ends_as($node, queue_request($node, 'rotated', 'with-the-old-one'), 'failed', 'a refused key');
is($node->safe_psql('postgres', "SELECT status FROM keyvault.api_keys WHERE user_id = 'rotated'"), 'failed', 'is marked');
put_secret('secret/data/rotated', api_key => 'sk-valid-now-0123456789');
ends_as($node, queue_request($node, 'rotated', 'with-the-new-one'), 'done', 'the next call fetches it again');

# A key that was fetched for an earlier call, and has been replaced since: the call itself fetches it anew.
put_secret('secret/data/warm', api_key => 'sk-invalid-by-now-0123456789');
$node->safe_psql('postgres', "UPDATE keyvault.providers SET test_path = '/__log' WHERE provider = 'exa'");
$node->safe_psql('postgres', "SELECT keyvault.store_api_key_reference(p, 'vault:secret/warm#api_key', user_id => 'warm') FROM unnest('{exa,openai}'::text[]) p");
ends_as($node, $node->safe_psql('postgres', "SELECT keyvault.test_api_key('exa', user_id => 'warm')"), 'done', 'a key is known');
put_secret('secret/data/warm', api_key => 'sk-valid-by-now-0123456789');
my $again = queue_request($node, 'warm', 'after-rotation');
ends_as($node, $again, 'done', 'a call with the known key is not lost');
is(called_with('after-rotation'), 'sk-valid-by-now-0123456789', 'it ends with the new one');
is($node->safe_psql('postgres', "SELECT attempts FROM keyvault.requests WHERE id = '$again'"), '2', 'at its second attempt');

# Nothing is kept when that is what is asked for.
set_config($node, 'keyvault.reference_cache_ttl', '0');
my $fetches = fetches('secret/data/team/openai');
ends_as($node, queue_request($node, 'r', "not-kept-$_"), 'done', "call $_ without a cache") foreach 1, 2;
is(fetches('secret/data/team/openai'), $fetches + 2, 'each call fetches the key');
set_config($node, 'keyvault.reference_cache_ttl', undef);

# What can go wrong: clear text, in the request.
sub fails_with
{
	my ($name, $user, $pattern) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $id = queue_request($node, $user, "fails-$name");
	ends_as($node, $id, 'failed', "$name: the call fails");
	like(error_of($id), qr/reference to its key cannot be resolved: the Vault server .*$pattern/, "$name: and says why");
	is(mock_received($port, "fails-$name"), 0, "$name: nothing was sent to the provider");
	return;
}
refer('missing', 'vault:secret/no/such#api_key');
fails_with('missing', 'missing', 'status 404');
refer('field', 'vault:secret/team/openai#nothing');
fails_with('no field', 'field', 'no text in the field "nothing"');
refer('number', 'vault:secret/team/openai#other');
fails_with('no text', 'number', 'no text in the field "other"');
put_secret('secret/data/spaced', api_key => "sk-with a space\r\nX-Injected: 1");
refer('spaced', 'vault:secret/spaced#api_key');
fails_with('no key', 'spaced', 'cannot be a key');
put_secret('secret/data/foreign', api_key => 'sk-ant-anthropic-key-0123456789');
$node->safe_psql('postgres', "SELECT keyvault.store_api_key_reference(p, 'vault:secret/foreign#api_key', user_id => 'foreign') FROM unnest('{openai,anthropic}'::text[]) p");
my $foreign = queue_request($node, 'foreign', 'fails-foreign');
ends_as($node, $foreign, 'failed', "another provider's key: the call fails");
is(error_of($foreign), 'KV009: what the reference to its key names is malformed for provider "openai": It begins as keys of provider "anthropic" do.', 'and says why');
ends_as($node, $node->safe_psql('postgres', "SELECT keyvault.test_api_key('anthropic', user_id => 'foreign')"), 'done', 'its own provider takes it');
$foreign = queue_request($node, 'foreign', 'fails-foreign');
ends_as($node, $foreign, 'failed', 'now that it is known, too');
is(mock_received($port, 'fails-foreign'), 0, 'nothing was sent to the provider');
refer('down', 'vault:secret/team/openai#api_key2');
put_secret('secret/data/team/openai', api_key => 'sk-kept-elsewhere-0123456789', api_key2 => 'sk-another-0123456789');
foreach my $down ([ sealed => 'sealed or down' ], [ error => 'status 500' ], [ malformed => 'not JSON' ], [ redirect => 'status 307' ], [ huge => 'could not be reached' ])
{
	mode($down->[0]);
	fails_with($down->[0], 'down', $down->[1]);
}
mode('slow');
my $slow = queue_request($node, 'down', 'waits-for-the-server');
wait_until(sub { request_status($node, $slow) eq 'sent' });
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('openai', 'sk-own-key-0123456789', user_id => 'quick')");
ends_as($node, queue_request($node, 'quick', 'meanwhile'), 'done', 'others are served while the server is slow');
ends_as($node, $slow, 'failed', 'a server that does not answer');
like(error_of($slow), qr/Vault server could not be reached: .*tim(?:e|ed)[ -]?out/i, 'is given up');
set_config($node, 'keyvault.max_attempts', '100');
mode('sealed');
my $recovers = queue_request($node, 'down', 'comes-back');
wait_until(sub { $node->safe_psql('postgres', "SELECT attempts > 0 AND status = 'queued' FROM keyvault.requests WHERE id = '$recovers'") eq 't' or request_status($node, $recovers) eq 'failed' });
mode('ok');
wait_until(sub { request_status($node, $recovers) =~ /done|failed/ });
is(request_status($node, $recovers), 'done', 'a sealed server is asked again');
set_config($node, 'keyvault.max_attempts', undef);
write_token('wrong-token');
refer('denied', 'vault:secret/team/denied#api_key');
fails_with('denied', 'denied', 'status 403');
unlink $token_file;
fails_with('no token', 'denied', 'token');
write_token('right-token');
set_config($node, 'keyvault.vault_address', '');
fails_with('no address', 'denied', 'keyvault.vault_address is empty');
set_config($node, 'keyvault.vault_address', 'http://10.1.2.3:8200');
fails_with('plain http', 'denied', 'plain http is for a loopback address only');
set_config($node, 'keyvault.vault_address', undef);

# With reveal off it works as well.
set_config($node, 'keyvault.reveal', 'off');
refer('off', 'vault:secret/team/openai#api_key');
is($node->safe_psql('postgres', "SELECT hint, source FROM keyvault.api_keys WHERE user_id = 'off'"), 'vault:secret/team/openai#api_key|reference', 'reveal off: a reference is stored');
ends_as($node, queue_request($node, 'off', 'with-reveal-off'), 'done', 'and used');
is(called_with('with-reveal-off'), 'sk-kept-elsewhere-0123456789', 'with its key');
ok(wait_until(sub { $node->safe_psql('postgres', "SELECT fingerprint IS NOT NULL AND hint LIKE 'vault:%' FROM keyvault.api_keys WHERE user_id = 'off'") eq 't' }), 'the worker makes a record of it');
set_config($node, 'keyvault.reveal', undef);
ends_as($node, queue_request($node, 'off', 'with-reveal-on-again'), 'done', 'which opens');

# References that are none, and who may store them.
foreach my $bad ('sk-no-reference-0123456789', 'vault:', 'vault:secret#f', 'vault:secret/#f', 'vault:secret/a', 'vault:secret/a#', 'vault:secret/a#b.c', 'vault:secret/../sys/x#f',
	'vault:secret//a#f', 'vault:/a#f', 'vault:secret/a?x#f', 'vault:secret/a%2f#f', 'vault:secret/a b#f', 'vault:secret/./a#f', 'vault:secret/' . 'a' x 400 . '#f', 'vault:secret#a/b', '')
{
	is(state_of($node, "SELECT keyvault.store_api_key_reference('openai', '$bad', user_id => 'r')"), '22023', "refused: '" . substr($bad, 0, 30) . "'");
}
$node->safe_psql('postgres', "CREATE ROLE an_app; CREATE ROLE a_user; SELECT keyvault.grant_access('an_app', 'app'), keyvault.grant_access('a_user', 'user')");
is(state_of($node, "SET ROLE an_app; SELECT keyvault.store_api_key_reference('openai', 'vault:secret/a.b/c-d_e#f_g-h', user_id => 'by_app')"), '', 'a trusted application stores references');
is(state_of($node, "BEGIN; SELECT keyvault.act_as('r'); SET LOCAL ROLE a_user; SELECT keyvault.store_api_key_reference('openai', 'vault:secret/victim#key')"), '42501',
	'a user does not: it would choose whose key is used');
is(state_of($node, "SELECT keyvault.store_api_key_reference('nobody', 'vault:secret/a#f', user_id => 'r')"), '22023', 'an unknown provider');
unlike(slurp_file($node->logfile), qr/sk-kept-elsewhere|right-token/, 'neither key nor token in the log');
$node->stop;
done_testing();
