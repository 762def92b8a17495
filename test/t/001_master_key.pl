# Loading the library, and every way a master key can be missing or wrong: a clear error, and the server always starts.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $store = "SELECT keyvault.store_api_key('openai', 'sk-tap-0123456789abcdef', user_id => 'u')";

# Not preloaded.
my $bare = PostgreSQL::Test::Cluster->new('bare');
$bare->init;
$bare->start;
my ($code, $out, $err) = $bare->psql('postgres', 'CREATE EXTENSION keyvault CASCADE');
isnt($code, 0, 'CREATE EXTENSION fails without the library preloaded');
like($err, qr/ERROR:  keyvault must be loaded when the server starts/, 'and says why');
like($err, qr/HINT:  .*shared_preload_libraries = 'keyvault'/, 'and the line to add');
is($bare->safe_psql('postgres', 'SELECT 1'), '1', 'the server lives on');
$bare->stop;

# Preloaded, without a master key.
my $node = new_node('keyless', master_key => 0);
is(state_of($node, $store), 'KV004', 'storing a key without a master key');
($code, $out, $err) = $node->psql('postgres', $store);
like($err, qr/openssl rand -hex 32/, 'the hint has the command that makes one');
like($err, qr/keyvault\.master_key_file/, 'and the setting');
is($node->safe_psql('postgres', 'SELECT count(*) FROM keyvault.users'), '0', 'nothing was left behind');
is($node->safe_psql('postgres', "SELECT keyvault.user_api_keys('u')"), '{}', 'a lookup without keys needs no master key');

# Every unusable file.
sub key_file_is
{
	my ($path, $reason, $name) = @_;
	$node->safe_psql('postgres', "ALTER SYSTEM SET keyvault.master_key_file = '$path'");
	$node->restart;
	my ($code, $out, $err) = $node->psql('postgres', $store);
	like($err, qr/master key is not available/, "$name: refused");
	like($err, $reason, "$name: the reason");
	is(state_of($node, $store), 'KV004', "$name: SQLSTATE");
}

my $digits = 'a1' x 32;
my $directory = PostgreSQL::Test::Utils::tempdir;
key_file_is("$directory/none", qr/No such file/, 'missing');
key_file_is($directory, qr/is not a regular file/, 'a directory');
key_file_is(write_secret("$directory/short", 'a1' x 31, 0600), qr/64 hexadecimal digits/, 'short');
key_file_is(write_secret("$directory/long", 'a1' x 33, 0600), qr/64 hexadecimal digits/, 'long');
key_file_is(write_secret("$directory/longer", 'a1' x 5000, 0600), qr/too long/, 'far too long');
key_file_is(write_secret("$directory/seventeen", "$digits\n" x 17, 0600), qr/more than 16 master keys/, 'more keys than there can be');
key_file_is(write_secret("$directory/tail", "$digits\n$digits 0", 0600), qr/64 hexadecimal digits/, 'something behind the keys');
key_file_is(write_secret("$directory/not_hex", 'zz' x 32, 0600), qr/64 hexadecimal digits/, 'not hexadecimal');
key_file_is(write_secret("$directory/empty", '', 0600), qr/64 hexadecimal digits/, 'empty');
key_file_is(write_secret("$directory/world", $digits, 0644), qr/can be read by others/, 'readable by the world');
key_file_is(write_secret("$directory/group", $digits, 0640), qr/can be read by others/, 'readable by the group');
key_file_is(write_secret($node->data_dir . '/key', $digits, 0600), qr/lies in the data directory/, 'in the data directory');
symlink $node->data_dir . '/key', "$directory/link";
key_file_is("$directory/link", qr/lies in the data directory/, 'a link into the data directory');
POSIX::mkfifo("$directory/fifo", 0600);
key_file_is("$directory/fifo", qr/is not a regular file/, 'a FIFO');
unlike(slurp_file($node->logfile), qr/$digits/, 'no key was logged');

$node->safe_psql('postgres', 'ALTER SYSTEM SET keyvault.allow_master_key_in_data_directory = on');
$node->safe_psql('postgres', "ALTER SYSTEM SET keyvault.master_key_file = '" . $node->data_dir . "/key'");
$node->reload;
ok(wait_until(sub { state_of($node, $store) eq '' }), 'an explicit override is taken, with no restart');

# A good one, then another: named by id, never a pile of tag failures.
write_secret("$directory/good", "\n$digits \n", 0600);
write_secret("$directory/other", 'b2' x 32, 0600);
my $key_id = $node->safe_psql('postgres', "SELECT encode(kek_id, 'hex') FROM keyvault.master_keys");
like($key_id, qr/^[0-9a-f]{32}$/, 'the master key is known by an id');
foreach my $case ([ "$directory/missing", 'is missing' ], [ write_secret("$directory/cut", 'b2' x 31, 0600), 'is too short' ],
	[ write_secret("$directory/open", "$digits\n", 0644), 'can be read by others' ], [ '', 'is not set' ])
{
	set_config($node, 'keyvault.master_key_file', $case->[0]);
	foreach my $sql ("SELECT keyvault.user_api_keys('u')", $store)
	{
		(undef, undef, $err) = $node->psql('postgres', $sql);
		like($err, qr/master key is not available\nDETAIL:  .* Expected key id $key_id, loaded none\./, "the file $case->[1]: the error names the key that is expected");
	}
}
$node->safe_psql('postgres', "ALTER SYSTEM SET keyvault.master_key_file = '$directory/other'");
$node->restart;
($code, $out, $err) = $node->psql('postgres', "SELECT keyvault.user_api_keys('u')");
like($err, qr/Expected key id $key_id, loaded [0-9a-f]{32}/, 'another master key: expected and loaded id');
is(state_of($node, "SELECT keyvault.user_api_keys('u')"), 'KV004', 'another master key: lookup');
is(state_of($node, "SELECT keyvault.store_api_key('exa', 'tap-new-key', user_id => 'u2')"), 'KV004',
	'another master key: no new data key is wrapped by it');
$node->safe_psql('postgres', "ALTER SYSTEM SET keyvault.master_key_file = '$directory/good'");
$node->reload;
ok(wait_until(sub { state_of($node, "SELECT keyvault.user_api_keys('u')") eq '' }), 'a reload takes the right key');
is($node->safe_psql('postgres', "SELECT keyvault.user_api_key('openai', 'u')"), 'sk-tap-0123456789abcdef',
	'and what was stored opens: digits and white space around them mean the same key');
$node->stop;

done_testing();
