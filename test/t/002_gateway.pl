# Provider calls through the worker: each dialect, whose key is used, failures and retries, and what a hostile answer can do.
use strict;
use warnings FATAL => 'all';
use JSON::PP;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('gateway', conf => "keyvault.max_response_size = '1MB'\nkeyvault.max_attempts = 2\n");
use_mock($node, $port);
$node->safe_psql('postgres', "SELECT keyvault.upsert_user('tap', plan => 'pro')");

# The answer to a request, as a hash of the responses row.
sub answer
{
	my ($provider, $body, %argument) = @_;
	my $arguments = join '', map { ", $_ => " . $argument{$_} } sort keys %argument;
	$arguments .= ", user_id => 'tap'" unless exists $argument{user_id};
	my $id = $node->safe_psql('postgres', "SELECT keyvault.request('$provider', $body$arguments)");
	my $json = $node->safe_psql('postgres', "SELECT to_jsonb(r) FROM keyvault.wait_response('$id', '30 s') r");
	return decode_json($json || '{}');
}

sub usage_of
{
	my ($id) = @_;
	my $json = $node->safe_psql('postgres', "SELECT to_jsonb(u) FROM keyvault.usage_records u WHERE request_id = '$id'");
	return decode_json($json || '{}');
}

sub last_call { return decode_json(mock_get($port, '/__log?n=1'))->[0] }

# Each dialect sends what its vendor's own SDK sends: method, path, authentication, body.
my $golden = decode_json(slurp_file('test/golden/requests.json'));
my @recorded = ref $golden eq 'ARRAY' ? @$golden : @{ $golden->{requests} };
my %by_path;
push @{ $by_path{ $_->{path} } }, $_ foreach @recorded;
sub sends_as_sdk
{
	my ($provider, $path, $header, $key) = @_;
	my ($sdk) = grep { exists $_->{headers}{$header} } @{ $by_path{$path} // [] };
	ok($sdk, "$provider: the SDK's request to $path is recorded") or return;
	my $json = JSON::PP->new->canonical;
	my $body = $sdk->{body};
	$body = $json->encode($body) if ref $body;
	$body =~ s/'/''/g;
	my %argument = (path => "'$path'", payer => "'platform'");
	my $answer = answer($provider, "'$body'", %argument);
	is($answer->{status}, 'done', "$provider: $path is answered");
	my $sent = last_call();
	is($sent->{method}, $sdk->{method}, "$provider: method");
	is($sent->{path}, $sdk->{path}, "$provider: path");
	(my $value = $sdk->{headers}{$header}) =~ s/\{key\}/$key/;
	is($sent->{headers}{$header}, $value, "$provider: $header");
	like($sent->{headers}{'content-type'}, qr{^application/json}, "$provider: content-type");
	my $sent_body = ref $sent->{body} ? $sent->{body} : decode_json($sent->{body});
	is($json->encode($sent_body), $json->encode(ref $sdk->{body} ? $sdk->{body} : decode_json($sdk->{body})), "$provider: body");
	return $answer;
}
sends_as_sdk('openai', '/v1/chat/completions', 'authorization', 'platform-key-of-openai');
sends_as_sdk('openai', '/v1/responses', 'authorization', 'platform-key-of-openai');
sends_as_sdk('openai', '/v1/embeddings', 'authorization', 'platform-key-of-openai');
sends_as_sdk('anthropic', '/v1/messages', 'x-api-key', 'platform-key-of-anthropic');
is(last_call()->{headers}{'anthropic-version'}, '2023-06-01', 'anthropic: anthropic-version');
my ($gemini_path) = grep { /generateContent$/ } keys %by_path;
sends_as_sdk('gemini', $gemini_path, 'x-goog-api-key', 'platform-key-of-gemini');
sends_as_sdk('exa', '/search', 'x-api-key', 'platform-key-of-exa');

# Usage is read as each vendor states it: input with cached tokens, output with reasoning.
my %prompt = (
	openai => sub { chat("[[mock: $_[0]]]") },
	anthropic => sub { qq('{"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": "[[mock: $_[0]]]"}]}') },
	gemini => sub { qq('{"contents": [{"role": "user", "parts": [{"text": "[[mock: $_[0]]]"}]}]}') },
);
foreach my $provider (sort keys %prompt)
{
	my %argument = $provider eq 'gemini' ? (model => "'gemini-3.5-flash'") : ();
	my $answer = answer($provider, $prompt{$provider}->('tokens=1000,200 cached=400'), %argument);
	my $usage = usage_of($answer->{id});
	is("@$usage{qw(input_tokens cached_tokens output_tokens tokens)}", '1000 400 200 1200', "$provider: token counts");
	cmp_ok($usage->{cost_usd}, '>', 0, "$provider: priced");
	is($usage->{credits}, $usage->{cost_usd} * 1000, "$provider: debited at the plan's rate");
	is($answer->{credits}, $usage->{credits}, "$provider: the answer says what it cost");
}
# Thinking is part of the output, with a price of its own where there is one.
$node->safe_psql('postgres', <<'SQL');
INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, cached_input_usd_per_mtok, output_usd_per_mtok, reasoning_usd_per_mtok)
SELECT u.plan, p.provider, p.model, 1, 0.1, 4, 9
  FROM keyvault.users u, (VALUES ('openai', 'gpt-5-mini'), ('anthropic', 'claude-haiku-4-5'), ('gemini', 'gemini-3.5-flash')) p(provider, model) WHERE u.user_id = 'tap';
SQL
foreach my $provider (sort keys %prompt)
{
	my %argument = $provider eq 'gemini' ? (model => "'gemini-3.5-flash'") : ();
	my $thought = $provider eq 'anthropic' ? 0 : 50;
	my $answer = answer($provider, $prompt{$provider}->("tokens=1000,200 cached=400 thoughts=50"), %argument);
	my $usage = usage_of($answer->{id});
	is("@$usage{qw(input_tokens cached_tokens output_tokens reasoning_tokens)}", "1000 400 200 $thought", "$provider: thinking");
	is($usage->{credits} + 0, (600 * 1 + 400 * 0.1 + (200 - $thought) * 4 + $thought * 9) / 1000, "$provider: has its price");
}
$node->safe_psql('postgres', 'DELETE FROM keyvault.plan_prices');
my $exa = answer('exa', q('{"query": "postgres [[mock: cost=0.007]]"}'));
is(usage_of($exa->{id})->{cost_usd}, 0.007, 'exa: the cost that the answer states is taken');

# An independent stand-in, by the community of another SDK, agrees.
SKIP:
{
	my $directory = PostgreSQL::Test::Utils::tempdir;
	skip 'npm packages of test/mock are not installed', 3 unless -d 'test/mock/node_modules/@copilotkit/aimock';
	my $pid = fork // die $!;
	if ($pid == 0)
	{
		open STDOUT, '>', "$directory/log";
		open STDERR, '>&', \*STDOUT;
		exec 'node', 'test/mock/aimock.mjs', '--port', '0', '--port-file', "$directory/port" or die $!;
	}
	ok(wait_until(sub { -s "$directory/port" }), 'aimock runs');
	my $aimock = slurp_file("$directory/port") + 0;
	$node->safe_psql('postgres', "UPDATE keyvault.providers SET base_url = 'http://127.0.0.1:$aimock', allowed_host = '127.0.0.1'");
	foreach my $call ([ 'openai', chat('hello') ],
		[ 'anthropic', q('{"model": "claude-haiku-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}') ],
		[ 'gemini', q('{"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}'), model => "'gemini-3.5-flash'" ])
	{
		my ($provider, $body, %argument) = @$call;
		my $answer = answer($provider, $body, %argument);
		is("$answer->{status} $answer->{input_tokens} $answer->{output_tokens}", 'done 21 6', "aimock: $provider");
	}
	kill 'TERM', $pid;
	waitpid $pid, 0;
	$node->safe_psql('postgres', "UPDATE keyvault.providers SET base_url = 'http://127.0.0.1:$port', allowed_host = '127.0.0.1'");
}

# Whose key: the user's own, which costs no credits; a key for one call; the platform's.
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('openai', 'sk-tap-own-key-of-the-user', user_id => 'tap')");
my $own = answer('openai', chat('hello'));
is(last_call()->{headers}{authorization}, 'Bearer sk-tap-own-key-of-the-user', 'the own key is used first');
is("$own->{payer} " . usage_of($own->{id})->{credits}, 'user 0', 'and costs no credits');
cmp_ok(usage_of($own->{id})->{cost_usd}, '>', 0, 'though what the provider charges is recorded');
answer('openai', chat('hello'), payer => "'platform'");
is(last_call()->{headers}{authorization}, 'Bearer platform-key-of-openai', q(the platform's key when asked for));
my $once = answer('openai', chat('hello'), api_key => "'sk-tap-key-for-one-call'");
is(last_call()->{headers}{authorization}, 'Bearer sk-tap-key-for-one-call', 'a key for this call alone');
is($node->safe_psql('postgres', "SELECT call_key IS NULL FROM keyvault.requests WHERE id = '$once->{id}'"), 't', 'is gone after it');

# Failures.
my $refused = answer('openai', chat('hello'), api_key => "'sk-tap-revoked-key'");
is("$refused->{status} $refused->{status_code}", 'failed 401', 'a refused key');
ok($refused->{body}{error}, q(the provider's own words are kept));
is(usage_of($refused->{id})->{credits}, undef, 'a failure costs nothing');
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('openai', 'sk-tap-revoked-own-key', user_id => 'tap')");
answer('openai', chat('hello'));
is($node->safe_psql('postgres', "SELECT status FROM keyvault.api_key_status WHERE user_id = 'tap'"), 'failed', '401 marks the key failed');
my $status = "SELECT status FROM keyvault.api_key_status WHERE user_id = 'tap' AND provider = 'openai'";
$node->safe_psql('postgres', q(SELECT keyvault.store_api_key('openai', 'sk-tap-own-key-of-the-user', user_id => 'tap')));
$node->safe_psql('postgres', q(UPDATE keyvault.api_keys SET status = 'failed' WHERE user_id = 'tap' AND provider = 'openai'));
answer('openai', chat('[[mock: status=501]]'));
is($node->safe_psql('postgres', $status), 'failed', q(a provider's own trouble says nothing of the key));
answer('openai', chat('[[mock: status=400]]'));
is($node->safe_psql('postgres', $status), 'active', 'another answer does');
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('gemini', 'invalid-own-key', user_id => 'tap')");
answer('gemini', $prompt{gemini}->('delay=1'), model => "'gemini-3.5-flash'");
is($node->safe_psql('postgres', "SELECT status FROM keyvault.api_key_status WHERE user_id = 'tap' AND provider = 'gemini'"), 'failed',
	q(so does Google's 400 for a bad key));
$node->safe_psql('postgres', "SELECT keyvault.delete_api_key(provider, user_id => 'tap') FROM unnest('{openai,gemini}'::text[]) provider");

my $passing = answer('openai', chat('passing [[mock: once:status=503 retry-after=1]]'));
is($passing->{status}, 'done', '503 is tried again');
is($node->safe_psql('postgres', "SELECT attempts FROM keyvault.requests WHERE id = '$passing->{id}'"), '2', 'once');
my $busy = answer('openai', chat('[[mock: status=429 retry-after=1]]'));
is("$busy->{status} $busy->{status_code}", 'failed 429', 'max_attempts ends it');
is($node->safe_psql('postgres', "SELECT attempts FROM keyvault.requests WHERE id = '$busy->{id}'"), '2', 'after two attempts');
is(answer('openai', chat('[[mock: status=400]]'))->{status_code}, 400, 'an error of ours is not tried again');

# What a hostile or broken answer can do: nothing but fail, or cost the estimate.
foreach my $case (
	[ 'garbage', 'failed', qr/something else than JSON/ ], [ 'nul', 'failed', qr/something else than JSON/ ],
	[ 'badutf8', 'failed', qr/something else than JSON/ ], [ 'deep', 'failed', qr/something else than JSON/ ],
	[ 'huge=5000000', 'failed', qr/larger than keyvault.max_response_size/ ],
	[ 'redirect=http://127.0.0.1:1/', 'failed', qr/HTTP status 302/ ], [ 'cut', 'unknown', qr/openai: / ])
{
	my ($directive, $status, $error) = @$case;
	my $answer = answer('openai', chat("[[mock: $directive]]"));
	is($answer->{status}, $status, "$directive: status");
	like($answer->{error}, $error, "$directive: error");
}

# An answer that names a model of more than 255 bytes, which no usage record takes, names none; one of 255 it names.
{
	my $asked = answer('openai', chat('[[mock: model=' . 'm' x 256 . ']]'));
	unlike($asked->{model}, qr/mm/, 'an overlong model of an answer is none');
	is($asked->{status}, 'done', 'the call is settled');
	is(answer('openai', chat('[[mock: model=' . 'm' x 255 . ']]'))->{model}, 'm' x 255, 'the longest model of an answer');
}

# The limit is that of the decoded answer, and holds while it is decoded.
{
	my $small = answer('openai', chat('[[mock: gzip tokens=10,5]]'));
	is("$small->{status} $small->{input_tokens} $small->{output_tokens}", 'done 10 5', 'a compressed answer is read');
	my $peak = sub { slurp_file('/proc/' . worker_pid($node) . '/status') =~ /^VmHWM:\s+(\d+) kB/m ? $1 : die 'no peak' };
	my $before = $peak->();
	my $bomb = answer('openai', chat('[[mock: gzip huge=64M]]'));
	like("$bomb->{status}: $bomb->{error}", qr/^failed: .*larger than keyvault.max_response_size/, 'one of 64 kB that is 64 MB decoded fails');
	cmp_ok($peak->() - $before, '<', 16 * 1024, '... and is not decoded into memory');
}
foreach my $directive ('usage=hostile', 'usage=negative', 'usage=giant', 'usage=strings', 'usage=missing')
{
	my $answer = answer('openai', chat("[[mock: $directive]]"));
	my $estimate = $node->safe_psql('postgres', "SELECT estimated_usd FROM keyvault.requests WHERE id = '$answer->{id}'");
	is($answer->{status}, 'done', "$directive: stored");
	cmp_ok(usage_of($answer->{id})->{cost_usd}, '<=', $estimate, "$directive: never more than estimated");
	cmp_ok(usage_of($answer->{id})->{cost_usd}, '>', 0, "$directive: never free");
}
my $claim = answer('openai', chat('[[mock: tokens=999999999,999999999]]'));
my $believed = usage_of($claim->{id});
is("@$claim{qw(input_tokens output_tokens)}", '999999999 999999999', 'plausible but absurd: stored as the answer states it');
is($believed->{output_tokens}, 100 + 4096, '... output is believed up to the limit asked for and what may come beside it');
cmp_ok($believed->{input_tokens}, '<', 401_000, '... input up to the window and the body');
cmp_ok($believed->{credits}, '<', 200, '... and no more is charged');
cmp_ok($believed->{credits_overrun}, '>', 1_000_000, '... the rest is overrun');
my $echo = answer('openai', chat('[[mock: echo-key]]'));
my $stored = $node->safe_psql('postgres', "SELECT body FROM keyvault.responses WHERE id = '$echo->{id}'");
unlike($stored, qr/platform-key-of-openai/, 'an echoed key is not stored');
like($stored, qr/\*{20}/, 'but overwritten');
my $escaped = answer('openai', chat('[[mock: escape-key]]'));
$stored = $node->safe_psql('postgres', "SELECT body FROM keyvault.responses WHERE id = '$escaped->{id}'");
unlike($stored, qr/platform-key-of-openai/, 'nor is one that is spelled with JSON escapes');
like($stored, qr/chatcmpl.*\*{20}/s, 'but overwritten in the answer');
my $slow = answer('openai', chat('[[mock: hang]]'), timeout => "'300 ms'");
is($slow->{status}, 'unknown', 'a call that timed out after it was sent is unknown');
is($node->safe_psql('postgres', "SELECT count(*) FROM keyvault.credit_holds h JOIN keyvault.requests r ON r.hold_id = h.id WHERE r.id = '$slow->{id}'"),
	'1', 'and its credits stay held');

# Where calls may go.
foreach my $case (
	[ "base_url = 'http://127.0.0.1:$port', allowed_host = NULL", qr/plain http is only for a host/ ],
	[ "base_url = 'http://127.0.0.1:$port', allowed_host = '127.0.0.1:1'", qr/plain http is only for a host/ ],
	[ "base_url = 'https://127.0.0.1:$port', allowed_host = NULL", qr/private or loopback address/ ],
	[ "base_url = 'https://localhost:$port', allowed_host = NULL", qr/private or loopback address/ ],
	[ "base_url = 'https://[::1]:$port', allowed_host = NULL", qr/private or loopback address/ ],
	[ "base_url = 'https://[::ffff:10.0.0.1]', allowed_host = NULL", qr/private or loopback address/ ],
	[ "base_url = 'https://169.254.169.254', allowed_host = NULL", qr/private or loopback address/ ],
	[ "base_url = 'https://2130706433', allowed_host = NULL", qr/private or loopback address/ ],
	# IPv4 inside IPv6 (NAT64, 6to4, compatible), link-local, unique local, documentation, Teredo
	(map { [ "base_url = 'https://[$_]', allowed_host = NULL", qr/private or loopback address/ ] }
		qw(64:ff9b::7f00:1 2002:a00:1::1 ::7f00:1 fe80::1 fd00::1 2001:db8::1 2001::1)),
	[ "base_url = 'http://127.0.0.1:99999', allowed_host = NULL", qr/do not make a URL/ ])
{
	my ($change, $error) = @$case;
	$node->safe_psql('postgres', "UPDATE keyvault.providers SET $change WHERE provider = 'mistral'");
	my $answer = answer('mistral', chat('hello'));
	like($answer->{error}, $error, $change);
	is("$answer->{status} $answer->{credits}", 'failed 0', "$change: nothing charged");
}

# call() does it all in one, and fails with KV008.
like($node->safe_psql('postgres', 'CALL keyvault.call(' . "'openai', " . chat('hello') . ", user_id => 'tap')"),
	qr/chatcmpl/, 'call() returns the answer');
is(state_of($node, 'CALL keyvault.call(' . "'openai', " . chat('[[mock: status=400]]') . ", NULL, user_id => 'tap')"), 'KV008',
	'call() fails with KV008');
is(state_of($node, 'CALL keyvault.call(' . "'openai', " . chat('[[mock: delay=2000]]') . ", NULL, user_id => 'tap', timeout => '100 ms')"),
	'KV008', 'also when it takes too long');

# Two-phase commit wakes the worker, too.
$node->append_conf('postgresql.conf', 'max_prepared_transactions = 5');
$node->restart;
# The worker has looked at the queue already.
is(answer('openai', chat('hello'))->{status}, 'done', 'the worker runs');
$node->safe_psql('postgres', "BEGIN; SELECT keyvault.request('openai', " . chat('prepared') . ", user_id => 'tap'); PREPARE TRANSACTION 'tap'");
$node->safe_psql('postgres', "COMMIT PREPARED 'tap'");
ok(wait_until(sub { $node->safe_psql('postgres', q(SELECT count(*) FROM keyvault.requests WHERE body::text LIKE '%prepared%' AND status = 'done')) eq '1' }),
	'COMMIT PREPARED wakes the worker');

is($node->safe_psql('postgres', q(
	SELECT count(*) FROM keyvault.credit_balances b
	 WHERE credits_used <> (SELECT coalesce(sum(credits), 0) FROM keyvault.usage_records u WHERE u.user_id = b.user_id)
	    OR credits_held <> (SELECT coalesce(sum(amount), 0) FROM keyvault.credit_holds h WHERE h.user_id = b.user_id))), '0',
	'every balance is the sum of its rows');
$node->stop;

done_testing();
