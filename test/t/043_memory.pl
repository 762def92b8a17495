# What processes keep in memory that goes into core files: never the master key, wherever it came from.
use strict;
use warnings FATAL => 'all';
use HTTP::Tiny;
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

# What a core file of a process has: its memory but for pages that are marked to stay out. undef when it is closed to us.
sub core_of
{
	my ($pid) = @_;
	no warnings 'portable';
	my ($content, @range) = ('');
	open my $maps, '<', "/proc/$pid/smaps" or return;
	open my $memory, '<:raw', "/proc/$pid/mem" or return;
	while (<$maps>)
	{
		@range = (hex $1, hex $2) if /^([0-9a-f]+)-([0-9a-f]+) rw/;
		@range = () if /^[0-9a-f]+-[0-9a-f]+ (?!rw)/;
		next unless /^VmFlags:/ && @range && !/ dd\b/;
		sysseek $memory, $range[0], 0 or return;
		my $left = $range[1] - $range[0];
		while ($left > 0)
		{
			my $read = sysread $memory, my $chunk, $left > 1048576 ? 1048576 : $left;
			last unless $read;
			$content .= $chunk;
			$left -= $read;
		}
	}
	return $content;
}

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

my $node = new_node('memory', master_key => write_secret("$directory/key", "$digits\n"), conf => "keyvault.databases = 'none'\n");
$node->safe_psql('postgres', $store);

# From a file.
{
	my $session = $node->background_psql('postgres');
	$session->query_safe($lookup);
	keeps_no_master_key($session, 'file');
	$session->quit;
}

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

$node->stop;
done_testing();
