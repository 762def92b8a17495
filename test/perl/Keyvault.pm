# What keyvault's TAP tests share: nodes with the library and a master key, and the stand-in provider.
package Keyvault;

use strict;
use warnings FATAL => 'all';
use Exporter 'import';
use File::Temp ();
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;

our @EXPORT = qw(new_master_key new_node start_mock use_mock mock_get wait_until state_of chat);

my @mocks;

# A master key file that only we can read; returns its path.
sub new_master_key
{
	my $path = File::Temp::tempdir(CLEANUP => 1) . '/master.key';
	my $old = umask 077;
	open my $file, '>', $path or die $!;
	print $file unpack('H*', join '', map { chr int rand 256 } 1 .. 32), "\n";
	close $file;
	umask $old;
	return $path;
}

# A node with keyvault preloaded; started, with the extension in postgres, unless init_only.
sub new_node
{
	my ($name, %option) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name);
	$node->init(%{ $option{init} // {} });
	$node->append_conf('postgresql.conf', "shared_preload_libraries = 'keyvault'\n");
	my $key = $option{master_key} // new_master_key();
	$node->append_conf('postgresql.conf', "keyvault.master_key_file = '$key'\n") if $key;
	$node->append_conf('postgresql.conf', $option{conf}) if $option{conf};
	return $node if $option{init_only};
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION keyvault CASCADE');
	return $node;
}

# Start the stand-in provider; returns its port.
sub start_mock
{
	my $directory = File::Temp::tempdir(CLEANUP => 1);
	my $pid = fork // die $!;
	if ($pid == 0)
	{
		open STDOUT, '>', "$directory/log";
		open STDERR, '>&', \*STDOUT;
		exec 'node', 'test/mock/provider.mjs', '--port', '0', '--port-file', "$directory/port" or die $!;
	}
	push @mocks, $pid;
	wait_until(sub { -s "$directory/port" }) or die 'the stand-in did not start';
	return PostgreSQL::Test::Utils::slurp_file("$directory/port") + 0;
}

# Send every provider's calls to the stand-in, and give the platform a key of each.
sub use_mock
{
	my ($node, $port, $database) = @_;
	$node->safe_psql($database // 'postgres', <<"SQL");
UPDATE keyvault.providers SET base_url = 'http://127.0.0.1:$port', allowed_host = '127.0.0.1:$port';
SELECT keyvault.store_platform_key(provider, 'platform-key-of-' || provider) FROM keyvault.providers;
SQL
	return;
}

# GET a path of the stand-in; returns the body.
sub mock_get
{
	my ($port, $path) = @_;
	my ($out, $err);
	run_log([ 'node', '-e', "fetch('http://127.0.0.1:$port$path').then(r => r.text()).then(t => process.stdout.write(t))" ],
		'>', \$out, '2>', \$err);
	return $out;
}

# Wait until a condition holds, 60 seconds at most; returns whether it does.
sub wait_until
{
	my ($condition) = @_;
	for (1 .. 1200)
	{
		return 1 if $condition->();
		sleep 0.05;
	}
	return 0;
}

# The SQLSTATE of the error that a statement ends with, '' without one.
sub state_of
{
	my ($node, $sql, $database) = @_;
	my ($code, $out, $err) = $node->psql($database // 'postgres', "\\set VERBOSITY sqlstate\n$sql", on_error_stop => 0);
	return $err =~ /ERROR:\s+(\w{5})/ ? $1 : '';
}

# The body of a chat request.
sub chat
{
	my ($text, $model) = @_;
	$model //= 'gpt-5-mini';
	return qq('{"model": "$model", "max_completion_tokens": 100, "messages": [{"role": "user", "content": "$text"}]}');
}

END
{
	my $status = $?;
	kill 'TERM', $_ foreach @mocks;
	waitpid $_, 0 foreach @mocks;
	$? = $status;
}

1;
