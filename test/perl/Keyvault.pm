# What keyvault's TAP tests share: nodes with the library and a master key, the stand-in provider, requests and what became of them.
package Keyvault;

use strict;
use warnings FATAL => 'all';
use Exporter 'import';
use File::Temp ();
use HTTP::Tiny;
use IPC::Run ();
use JSON::PP ();
use MIME::Base64 ();
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;

our @EXPORT = qw(new_master_key new_node hostile_environment set_config start_mock start_vault write_secret use_mock mock_get mock_open mock_received
	wait_until state_of seal_key core_of shared_memory chat queue_request request_status ends_as worker_pid balances_are_sums run_pgbench checkpointer
	crash_while deadlock_between);

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

# A node with keyvault preloaded, of another PostgreSQL with install_path; started, with the extension in postgres,
# unless init_only.
sub new_node
{
	my ($name, %option) = @_;
	my $node = PostgreSQL::Test::Cluster->new($name, $option{install_path} ? (install_path => $option{install_path}) : ());
	$node->init(%{ $option{init} // {} });
	# No test waits for ever for a lock.
	$node->append_conf('postgresql.conf', "shared_preload_libraries = 'keyvault'\nstatement_timeout = '90s'\n");
	my $key = $option{master_key} // new_master_key();
	$node->append_conf('postgresql.conf', "keyvault.master_key_file = '$key'\n") if $key;
	$node->append_conf('postgresql.conf', $option{conf}) if $option{conf};
	return $node if $option{init_only};
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION keyvault CASCADE');
	return $node;
}

# An environment for a server in which libcurl would have everything go through proxies, none of which is there, and have the
# secrets of TLS recorded in a file.
sub hostile_environment
{
	my ($key_log) = @_;
	return ((map { $_ => 'http://127.0.0.1:1' } qw(http_proxy https_proxy HTTPS_PROXY all_proxy ALL_PROXY)),
		(map { $_ => '' } qw(no_proxy NO_PROXY)), SSLKEYLOGFILE => $key_log);
}

# Change a setting of a running node, undef for its default; returns when new sessions see it.
sub set_config
{
	my ($node, $name, $value) = @_;
	my $before = $node->safe_psql('postgres', 'SELECT pg_conf_load_time()');
	$node->safe_psql('postgres', defined $value ? "ALTER SYSTEM SET $name = '$value'" : "ALTER SYSTEM RESET $name");
	$node->reload;
	wait_until(sub { $node->safe_psql('postgres', 'SELECT pg_conf_load_time()') ne $before }) or die 'no reload';
	return;
}

# Write a file that only we can read; returns its path.
sub write_secret
{
	my ($path, $content, $mode) = @_;
	unlink $path;
	open my $file, '>', $path or die $!;
	print $file $content;
	close $file;
	chmod $mode // 0600, $path;
	return $path;
}

# Start the stand-in for a Vault server, with options of test/mock/vault.mjs; returns its port.
sub start_vault
{
	return start_stand_in('vault', @_);
}

# Start the stand-in provider; returns its port.
sub start_mock
{
	return start_stand_in('provider');
}

sub start_stand_in
{
	my ($name, @options) = @_;
	my $directory = File::Temp::tempdir(CLEANUP => 1);
	my $pid = fork // die $!;
	if ($pid == 0)
	{
		open STDOUT, '>', "$directory/log";
		open STDERR, '>&', \*STDOUT;
		exec 'node', "test/mock/$name.mjs", '--port', '0', '--port-file', "$directory/port", @options or die $!;
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

sub talk_to_mock
{
	my ($method, $port, $path) = @_;
	my $answer = HTTP::Tiny->new(proxy => undef, http_proxy => undef)->request($method, "http://127.0.0.1:$port$path");
	die "the stand-in answers $answer->{status}: $answer->{content}" unless $answer->{success};
	return $answer->{content};
}

# GET a path of the stand-in; returns the body.
sub mock_get { return talk_to_mock('GET', @_) }

# Let the stand-in answer what waits at a gate.
sub mock_open
{
	my ($port, $gate) = @_;
	return talk_to_mock('POST', $port, "/__open?gate=$gate");
}

# How many requests whose body contains a text have reached the stand-in.
sub mock_received
{
	my ($port, $text) = @_;
	return scalar grep { index($_->{body}, $text) >= 0 } @{ JSON::PP::decode_json(mock_get($port, '/__log')) };
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

# A box with a user's key, in hexadecimal digits.
sub seal_key
{
	my ($node, $user, $secret, $provider) = @_;
	my $parameters = JSON::PP::decode_json($node->safe_psql('postgres', 'SELECT keyvault.sealing_key()'));
	my ($out, $err) = ('', '');
	my $json = JSON::PP::encode_json([ [ 'makeBox', { public_key => unpack('H*', MIME::Base64::decode_base64($parameters->{public_key})),
		vault_id => $parameters->{vault_id}, user_id => $user, provider => $provider // 'openai', secret => $secret } ] ]);
	IPC::Run::run([ 'node', 'test/formats/formats.mjs' ], '<', \$json, '>', \$out, '2>', \$err) or die $err;
	return JSON::PP::decode_json($out)->[0];
}

# The memory of a process, undef when it is closed to us: what a core file of it has, without pages that are marked to stay out, or all.
sub core_of
{
	my ($pid, $all) = @_;
	no warnings 'portable';
	my ($content, @range) = ('');
	open my $maps, '<', "/proc/$pid/smaps" or return;
	open my $memory, '<:raw', "/proc/$pid/mem" or return;
	while (my $line = <$maps>)
	{
		@range = (hex $1, hex $2) if $line =~ /^([0-9a-f]+)-([0-9a-f]+) rw/;
		@range = () if $line =~ /^[0-9a-f]+-[0-9a-f]+ (?!rw)/;
		next unless $line =~ /^VmFlags:/ && @range && ($all || $line !~ / dd\b/);
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

# Everything in the memory that a process of the server shares with the others; undef when it is closed to us.
sub shared_memory
{
	my ($pid) = @_;
	no warnings 'portable';
	open my $maps, '<', "/proc/$pid/maps" or return;
	my @ranges = map { /^([0-9a-f]+)-([0-9a-f]+) rw-s .*(?:zero|SYSV|PostgreSQL)/ ? [ hex $1, hex $2 ] : () } <$maps>;
	open my $memory, '<:raw', "/proc/$pid/mem" or return;
	my $content = '';
	for (@ranges)
	{
		sysseek $memory, $_->[0], 0 or return;
		my $left = $_->[1] - $_->[0];
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

# The body of a chat request, as a literal.
sub chat
{
	my ($text, $model) = @_;
	$model //= 'gpt-5-mini';
	return qq('{"model": "$model", "max_completion_tokens": 100, "messages": [{"role": "user", "content": "$text"}]}');
}

# Queue a chat request of a user and commit; returns its id. Further arguments are SQL expressions.
sub queue_request
{
	my ($node, $user, $text, %argument) = @_;
	my $database = delete $argument{database} // 'postgres';
	my $arguments = join '', map { ", $_ => $argument{$_}" } sort keys %argument;
	return $node->safe_psql($database, "SELECT keyvault.request('openai', " . chat($text) . ", user_id => '$user'$arguments)");
}

sub request_status
{
	my ($node, $id, $database) = @_;
	return $node->safe_psql($database // 'postgres', "SELECT status FROM keyvault.requests WHERE id = '$id'");
}

# Test that a request comes to have a status.
sub ends_as
{
	my ($node, $id, $status, $name, $database) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $is = '';
	wait_until(sub { ($is = request_status($node, $id, $database)) eq $status });
	return is($is, $status, $name);
}

# The process id of a database's worker, '' when it has none.
sub worker_pid
{
	my ($node, $database) = @_;
	$database //= 'postgres';
	return $node->safe_psql('postgres', <<"SQL");
SELECT pid FROM pg_stat_activity WHERE backend_type = 'keyvault worker' AND datname = '$database'
SQL
}

# Test that every balance is the sum of its usage records and of its holds.
sub balances_are_sums
{
	my ($node, $name, $database) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return is($node->safe_psql($database // 'postgres', <<'SQL'), '', $name);
SELECT b.user_id, b.credits_used, u.credits, b.credits_held, h.amount
  FROM (SELECT user_id, sum(credits_used) AS credits_used, sum(credits_held) AS credits_held FROM keyvault.credit_balances GROUP BY user_id) b,
       LATERAL (SELECT coalesce(sum(r.credits), 0) AS credits FROM keyvault.usage_records r WHERE r.user_id = b.user_id) u,
       LATERAL (SELECT coalesce(sum(o.amount), 0) AS amount FROM keyvault.credit_holds o WHERE o.user_id = b.user_id) h
 WHERE b.credits_used <> u.credits OR b.credits_held <> h.amount
SQL
}

# Run pgbench with scripts, each [weight, text]; returns its exit status, output and errors.
sub run_pgbench
{
	my ($node, $options, @scripts) = @_;
	my $directory = PostgreSQL::Test::Utils::tempdir;
	my @files;
	foreach my $script (@scripts)
	{
		my $path = "$directory/script" . @files;
		append_to_file($path, $script->[1]);
		push @files, '-f', "$path\@$script->[0]";
	}
	my ($out, $err) = ('', '');
	IPC::Run::run([ 'pgbench', '-n', @$options, @files, $node->connstr('postgres') ], '>', \$out, '2>', \$err);
	return ($? >> 8, $out, $err);
}

# The process id of the checkpointer, '' while the server recovers.
sub checkpointer
{
	my ($node) = @_;
	my ($out, $err) = ('', '');
	$node->psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'", stdout => \$out, stderr => \$err);
	return $out;
}

# Kill a backend, with settings of its session, while it runs a SELECT, so that the postmaster reports what that was; returns
# what its client is told, when the server is back.
sub crash_while
{
	my ($node, $signal, $options, $sql) = @_;
	local $ENV{PGOPTIONS} = join ' ', map { "-c $_" } @$options;
	my ($out, $err) = ('', '');
	my $psql = IPC::Run::start([ 'psql', '-XAtq', '-c', "$sql, pg_sleep(60)", '-d', $node->connstr('postgres') ], '<', \'', '>', \$out, '2>', \$err);
	my $pid = '';
	wait_until(sub { $pid = $node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'") })
		or die 'the statement does not run';
	my $before = checkpointer($node);
	kill $signal, $pid;
	$psql->finish;
	wait_until(sub { checkpointer($node) !~ /^(|$before)$/ }) or die 'the server does not come back';
	return $err;
}

# Two sessions run a SELECT each and wait for each other: the second one notices, and logs both statements. The format is of
# an expression that takes a lock by its number. Returns what the second one is told.
sub deadlock_between
{
	my ($node, $options, $lock, @sql) = @_;
	my @session;
	foreach my $timeout ('60s', '10ms')
	{
		local $ENV{PGOPTIONS} = join ' ', map { "-c $_" } @$options, "deadlock_timeout=$timeout";
		push @session, $node->background_psql('postgres', on_error_stop => 0);
	}
	$session[$_]->query_safe('BEGIN; SELECT ' . sprintf $lock, $_ + 1) foreach 0, 1;
	$session[0]->query_until(qr/waiting/, sprintf "\\echo waiting\n%s, $lock;\n", $sql[0], 2);
	wait_until(sub { $node->safe_psql('postgres', 'SELECT count(*) FROM pg_locks WHERE NOT granted') ne '0' }) or die 'no wait';
	$session[1]->query(sprintf "%s, $lock", $sql[1], 1);
	my $error = $session[1]->{stderr};
	$session[1]->quit;
	$session[0]->query('COMMIT');
	$session[0]->quit;
	return $error;
}

END
{
	my $status = $?;
	kill 'TERM', $_ foreach @mocks;
	waitpid $_, 0 foreach @mocks;
	$? = $status;
}

1;
