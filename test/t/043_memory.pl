# What processes keep in memory: in what goes into core files never the master key, wherever it came from; elsewhere until it is taken away.
use strict;
use warnings FATAL => 'all';
use Digest::SHA qw(hmac_sha256);
use HTTP::Tiny;
use IPC::Run ();
use JSON::PP ();
use MIME::Base64;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $directory = PostgreSQL::Test::Utils::tempdir;
my $digits = unpack 'H*', join '', map { chr int rand 256 } 1 .. 32;
my @seed = ('--seed', "of this run $$", '--token', "token-of-this-run-$$");
my $store = "SELECT keyvault.store_api_key('openai', 'sk-tap-0123456789abcdef', user_id => 'u')";
my $lookup = "SELECT keyvault.user_api_key('openai', 'u')";

# The forms in which a process may have the master key, and what it says last, which has to be found.
my $key = pack 'H*', $digits;
my @forms = (bytes => $key, digits => $digits, base64 => encode_base64($key, ''), 'digits in base64' => encode_base64("$digits\n", ''));

sub keeps_no_master_key
{
	my ($session, $name) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	$session->query_safe("SELECT 'control-of-$name'");
	my $core = core_of($pid);
  SKIP:
	{
		skip 'the memory of other processes cannot be read here', 6 unless defined $core;
		cmp_ok(index($core, "control-of-$name"), '>=', 0, "$name: the search finds what is there");
		for (my $i = 0; $i < @forms; $i += 2)
		{
			is(index($core, $forms[ $i + 1 ]), -1, "$name: no master key as $forms[$i]");
		}
		is(index($core, $seed[3]), -1, "$name: nor the token");
	}
	return;
}

my %hostile = hostile_environment("$directory/tls.secrets");
my $node;
{
	local @ENV{ keys %hostile } = values %hostile;
	$node = new_node('memory', master_key => write_secret("$directory/key", "$digits\n"), conf => "keyvault.databases = 'none'\n");
}
$node->safe_psql('postgres', $store);

# From a file.
{
	my $session = $node->background_psql('postgres');
	$session->query_safe($lookup);
	keeps_no_master_key($session, 'file');
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
  SKIP:
	{
		# AddressSanitizer makes mlock() do nothing.
		skip 'no memory may be locked here', 1 if $ENV{KV_SANITIZER} || slurp_file("/proc/$pid/limits") =~ /Max locked memory\s+0\s/;
		like(slurp_file("/proc/$pid/status"), qr/^VmLck:\s+[1-9]/m, 'what opens keys stays out of swap');
	}
	$session->quit;
}

# What a session keeps when the master key is taken away: everything while it is idle, nothing after its next statement.
# The data key of the user, and the key of his record.
sub keys_below
{
	my $wrap = JSON::PP::decode_json($node->safe_psql('postgres', <<'SQL'));
SELECT json_build_object('vault_id', vault_id, 'user_id', user_id, 'version', version, 'data_key_id', data_key_id, 'wrapped', wrapped)
  FROM keyvault.vault, keyvault.data_keys WHERE user_id = 'u'
SQL
	my ($out, $err) = ('', '');
	IPC::Run::run([ 'node', 'test/formats/formats.mjs' ], '<', \JSON::PP::encode_json([ [ 'openWrap', { %$wrap, master_key => $digits } ] ]), '>', \$out, '2>', \$err) or die $err;
	my $data_key = pack 'H*', JSON::PP::decode_json($out)->[0];
	my $record = pack 'H*', $node->safe_psql('postgres', "SELECT encode(ciphertext, 'hex') FROM keyvault.api_keys WHERE user_id = 'u'");
	my $extracted = hmac_sha256($data_key, substr $record, 24, 16);
	return ('data key' => $data_key, 'extracted key' => $extracted, 'state of its hash' => pack('V8', unpack 'N8', $extracted), 'record key' => hmac_sha256('keyvault/v1/record' . substr($record, 2, 1) . substr($record, 8, 16) . "\1", $extracted));
}

# Which of the keys are in the memory of a session.
sub kept
{
	my ($pid, %keys) = @_;
	my $memory = core_of($pid, 1);
	return join ', ', grep { index($memory, $keys{$_}) >= 0 } sort keys %keys;
}

SKIP:
{
	skip 'the memory of other processes cannot be read here', 12 unless defined core_of($$);
	my %keys = ('master key' => $key, keys_below());
	foreach my $case ([ 'master_key_file', '/nowhere', 'the file is gone' ], [ 'reveal', 'off', 'reveal is off' ])
	{
		my ($setting, $value, $name) = @$case;
		set_config($node, 'keyvault.master_key_file', "$directory/key");
		my ($session, $idle) = map { $node->background_psql('postgres') } 1 .. 2;
		my ($pid, $idle_pid) = map { $_->query_safe('SELECT pg_backend_pid()') } $session, $idle;
		$_->query_safe($lookup) foreach $session, $idle;
		is(kept($pid, %keys), 'master key, record key', 'a session that has opened a key keeps what opens it, and no data key');
		set_config($node, "keyvault.$setting", $value);
		is(kept($_, %keys), 'master key, record key', "$name: an idle session still does") foreach $pid, $idle_pid;
		$session->query_safe('SELECT 1');
		is(kept($pid, %keys), '', "$name: after its next statement, whatever it is, it does not");
		$node->safe_psql('postgres', <<'SQL');
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE backend_type = 'client backend' AND state_change < pg_conf_load_time() AND pid <> pg_backend_pid()
SQL
		ok(wait_until(sub { !-e "/proc/$idle_pid" }), 'and sessions that have run nothing since can be ended');
		ok(-e "/proc/$pid", 'apart from others');
		$session->quit;
		eval { $idle->quit };
	}
}
set_config($node, 'keyvault.reveal', undef);

# From a Vault server, as bytes and as digits, in the clear and over TLS.
my $port = start_vault(@seed);
sub wrap
{
	my $answer = HTTP::Tiny->new(proxy => undef)->request('POST', "http://127.0.0.1:$port/v1/transit/encrypt/keyvault",
		{ headers => { 'X-Vault-Token' => $seed[3] }, content => '{"plaintext": "' . encode_base64($_[0], '') . '"}' });
	return JSON::PP::decode_json($answer->{content})->{data}{ciphertext};
}
my %file = (bytes => write_secret("$directory/bytes", wrap($key) . "\n"), digits => write_secret("$directory/digits", wrap("$digits\n") . "\n"));
system_or_bail('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1',
	'-keyout', "$directory/tls.key", '-out', "$directory/tls.crt");
my $tls_port = start_vault(@seed, '--cert', "$directory/tls.crt", '--key', "$directory/tls.key");
set_config($node, 'keyvault.vault_token_file', write_secret("$directory/token", "$seed[3]\n"));
set_config($node, 'keyvault.vault_ca_file', "$directory/tls.crt");
set_config($node, 'keyvault.vault_transit_key', 'transit/keyvault');
foreach my $address ("http://127.0.0.1:$port", "https://127.0.0.1:$tls_port")
{
	foreach my $form (sort keys %file)
	{
		my ($scheme) = $address =~ /^(\w+)/;
		set_config($node, 'keyvault.vault_address', $address);
		set_config($node, 'keyvault.master_key_file', $file{$form});
		my $session = $node->background_psql('postgres');
		is($session->query_safe($lookup), 'sk-tap-0123456789abcdef', "Transit, $scheme, $form: this session asks the server");
		keeps_no_master_key($session, "Transit, $scheme, $form");
		$session->quit;
	}
}
ok(!-e "$directory/tls.secrets", 'the environment had no secrets of TLS recorded, nor anything sent through a proxy');

$node->stop;
done_testing();
