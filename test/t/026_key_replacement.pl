# keyvault.reveal = off: a sealed key that nobody can open yet takes a good key's place when it has proved to be good, and not before.
use strict;
use warnings FATAL => 'all';
use JSON::PP ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('replacement', conf => "keyvault.reveal = off\nautovacuum = off\nkeyvault.max_attempts = 1\nkeyvault.worker_idle_timeout = 1h\n");
use_mock($node, $port);

sub sql { return $node->safe_psql('postgres', @_) }

sub boxed { my ($user, $secret) = @_; return seal_key($node, $user, $secret) }

sub store_box
{
	my ($user, $box) = @_;
	return state_of($node, "SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => '$user')");
}

# What a user's key looks like to its owner.
sub told
{
	my ($user, $database) = @_;
	return $node->safe_psql($database // 'postgres', <<"SQL");
SELECT status, hint, coalesce(replacement, ''), coalesce(problem, '') FROM keyvault.api_key_status WHERE user_id = '$user'
SQL
}

sub becomes
{
	my ($user, $told, $name, $database) = @_;
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	return ok(wait_until(sub { told($user, $database) eq $told }), $name) || diag(told($user, $database));
}

# The key that the stand-in was called with for a text.
sub called_with
{
	my ($user, $text, $database) = @_;
	ends_as($node, queue_request($node, $user, $text, payer => "'user'", database => $database // 'postgres'), 'done', "$text: a call is made", $database);
	my ($call) = grep { index($_->{body}, $text) >= 0 } @{ JSON::PP::decode_json(mock_get($port, '/__log')) };
	return $call->{headers}{authorization} =~ s/^Bearer //r;
}

sub worker_leaves
{
	set_config($node, 'keyvault.databases', 'none');
	wait_until(sub { worker_pid($node) eq '' }) or die 'the worker stays';
	return;
}

sub worker_comes { set_config($node, 'keyvault.databases', undef); return }

my $dots = "\xe2\x80\xa6";

# With the worker there: what a bad box leaves of a good key.
my $altered = boxed('good', 'sk-altered-0123456789');
substr $altered, -1, 1, substr($altered, -1) eq '0' ? '1' : '0';
my %bad = (
	'an altered box' => [ $altered, 'It was altered, or sealed for another user, provider or vault.' ],
	'a box of another user' => [ boxed('other', 'sk-of-another-0123456789'), 'It was altered, or sealed for another user, provider or vault.' ],
	'a box of a key of another provider' =>
		[ boxed('good', 'sk-ant-of-another-provider-01'), 'It begins as keys of provider "anthropic" do, and those of "openai" do not.' ],
);
sql("SELECT keyvault.store_api_key('openai', 'sk-good-0123456789-good', user_id => 'good')");
becomes('good', "active|sk-${dots}good||", 'a key is kept');
foreach my $name (sort keys %bad)
{
	my ($box, $problem) = @{ $bad{$name} };
	my $row = sql("SELECT ciphertext, fingerprint, rotated_at FROM keyvault.api_keys WHERE user_id = 'good'");
	is(store_box('good', $box), '', "$name is taken unopened");
	ok(wait_until(sub { told('good') =~ /^active\|sk-\Q$dots\Egood\|refused\|\S/ }), "$name: the owner is told, of the box, and not of the key") or diag(told('good'));
	like(told('good'), $problem =~ /anthropic/ ? qr/It begins as keys of provider "anthropic" do/ : qr/\Q$problem\E/, "$name: and why") or diag(told('good'));
	is(sql("SELECT ciphertext, fingerprint, rotated_at FROM keyvault.api_keys WHERE user_id = 'good'"), $row, "$name: the key is as it was");
	is(called_with('good', "after $name"), 'sk-good-0123456789-good', "$name: it is called with");
	is(sql("SELECT box IS NULL FROM keyvault.key_replacements WHERE user_id = 'good'"), 't', "$name: the box is gone");
	is(store_box('good', $box), 'KV005', "$name: and is not taken again");
}
ends_as($node, queue_request($node, 'good', '[[mock: status=401]]', payer => "'user'"), 'failed', 'the provider refuses the key');
like(told('good'), qr/^failed\|.*\|refused\|/, 'which its owner is told beside it');
is(called_with('good', 'a good answer'), 'sk-good-0123456789-good', 'the provider takes it again');
like(told('good'), qr/^active\|.*\|refused\|/, 'and that, too');
is(store_box('good', boxed('good', 'sk-next-0123456789-next')), '', 'a good box');
becomes('good', "active|sk-${dots}next||", 'takes its place, and the problem is gone');
is(called_with('good', 'the next one'), 'sk-next-0123456789-next', 'and is called with');
is(sql("SELECT count(*), count(DISTINCT id) FROM keyvault.api_keys WHERE user_id = 'good'"), '1|1', 'in the same row');
foreach my $user (qw(good ends))
{
	my $box = boxed($user, 'sk-ends-0123456789-ends');
	sql("SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => '$user', expires_at => '2999-01-01 00:00+00')");
	becomes($user, "active|sk-${dots}ends||", "$user: a box of a key with an end");
	is(sql("SELECT expires_at = '2999-01-01 00:00+00' FROM keyvault.api_keys WHERE user_id = '$user'"), 't', "$user: keeps it");
}
is(store_box('good', boxed('good', 'sk-last-0123456789-last')), '', 'a box of one without');
becomes('good', "active|sk-${dots}last||", 'takes its place');
is(sql("SELECT expires_at IS NULL FROM keyvault.api_keys WHERE user_id = 'good'"), 't', 'and has none');

# Without the worker: what waits, and what no box may undo.
my %box;
my @users = qw(waits twice stored deleted erased snapshot expired dead none);
$box{$_} = [ map { boxed($_->[0], "sk-box-0123456789-$_->[1]") } [ $_, 'box1' ], [ $_, 'box2' ] ] foreach @users;
sql("SELECT keyvault.store_api_key('openai', 'sk-key-0123456789-$_', user_id => '$_')") foreach @users[ 0 .. 6 ];
is(store_box('dead', boxed('another', 'sk-of-another-0123456789')), '', 'a bad box where there is no key');
becomes('dead', "failed|$dots||It was altered, or sealed for another user, provider or vault.", 'is a key that failed');
ok(wait_until(sub { sql(q(SELECT count(*) FROM keyvault.api_keys WHERE fingerprint IS NULL AND status = 'active')) eq '0' }), 'all keys are records');
worker_leaves();
sql("UPDATE keyvault.api_keys SET expires_at = now() - interval '1 day' WHERE user_id = 'expired'");
my $session = $node->background_psql('postgres', on_error_stop => 0);
$session->query_safe("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM keyvault.api_keys");
foreach my $user (@users)
{
	my $id = sql("SELECT id FROM keyvault.api_keys WHERE user_id = '$user'");
	my $stored = sql("SELECT keyvault.store_sealed_api_key('openai', '\\x$box{$user}[0]', user_id => '$user')");
	is($stored, $id || sql("SELECT id FROM keyvault.api_keys WHERE user_id = '$user'"), "$user: a box is stored, under the key's id");
}
is(told($_), "active|sk-$dots" . substr("sk-key-0123456789-$_", -4) . '|waiting|', "$_: the box waits beside the key") foreach @users[ 0 .. 5 ];
is(told($_), "active|$dots||", "$_: where there is no key that could be used, it is the key") foreach @users[ 6 .. 8 ];
$session->query("SELECT keyvault.store_api_key('openai', 'sk-stored-0123456789-late', user_id => 'snapshot')");
like($session->{stderr}, qr/could not serialize access/, 'a transaction that does not see the box does not pass it');
$session->query('ROLLBACK');
$session->quit;
is(store_box('twice', $box{twice}[1]), '', 'a second box');
sql("SELECT keyvault.store_api_key('openai', 'sk-stored-0123456789-late', user_id => 'stored')");
sql("SELECT keyvault.delete_api_key('openai', user_id => 'deleted'), keyvault.erase_user('erased', 'asked')");
is(sql("SELECT string_agg(user_id, ' ' ORDER BY user_id) FROM keyvault.key_replacements WHERE status = 'waiting'"), 'snapshot twice waits',
	'no box waits for what was stored, deleted or erased since');

# Neither does the sealing key go that a waiting box needs, nor the box in a dump.
sql('UPDATE keyvault.sealing_keys SET retired_at = now()');
sql('UPDATE keyvault.api_keys SET ciphertext = set_byte(ciphertext, 1, 255 - get_byte(ciphertext, 1)) WHERE fingerprint IS NULL');
sql('SELECT keyvault._forget_sealing_keys()');
is(sql('SELECT count(*) FROM keyvault.sealing_keys'), '1', 'the sealing key of a waiting box stays');
sql('UPDATE keyvault.api_keys SET ciphertext = set_byte(ciphertext, 1, 255 - get_byte(ciphertext, 1)) WHERE fingerprint IS NULL');
my $directory = PostgreSQL::Test::Utils::tempdir;
command_ok([ 'pg_dump', '-f', "$directory/dump.sql", $node->connstr('postgres') ], 'pg_dump');
sql('CREATE DATABASE restored TEMPLATE template0');
command_ok([ 'psql', '-Xq', '-v', 'ON_ERROR_STOP=1', '-f', "$directory/dump.sql", $node->connstr('restored') ], 'restore');

# A lookup has the present key; who may only see his own keys sees only his own boxes.
set_config($node, 'keyvault.reveal', 'on');
is(sql("SELECT keyvault.user_api_key('openai', 'waits')"), 'sk-key-0123456789-waits', 'a lookup has the present key');
is(sql("SELECT keyvault.user_api_key('openai', 'none')"), 'sk-box-0123456789-box1', 'or the box, where that is the key');
sql(q(CREATE ROLE one LOGIN; SELECT keyvault.grant_access('one', 'user')));
is(sql('SET ROLE one; SELECT count(*) FROM keyvault.api_key_status'), '0', 'nobody sees the boxes of others');
is(state_of($node, 'SET ROLE one; SELECT box FROM keyvault.key_replacements'), '42501', 'or any box itself');
set_config($node, 'keyvault.reveal', undef);
set_config($node, 'keyvault.reveal', 'off');

worker_comes();
foreach my $database ('postgres', 'restored')
{
	my %hint = (waits => 'box1', twice => 'box2', stored => 'late', snapshot => 'box1', expired => 'box1', dead => 'box1', none => 'box1');
	becomes($_, "active|sk-$dots$hint{$_}||", "$database: $_: the right key is there in the end", $database) foreach sort keys %hint;
	is(told($_, $database), '', "$database: $_: and none that is gone") foreach 'deleted', 'erased';
	is($node->safe_psql($database, 'SELECT count(*) FROM keyvault.key_replacements'), '0', "$database: nothing waits any more");
}
is(called_with('twice', 'the last of two'), 'sk-box-0123456789-box2', 'of two boxes the last is called with');
is(called_with('expired', 'the one after an expired one'), 'sk-box-0123456789-box1', 'so is what replaced an expired key');
sql('SELECT keyvault._forget_sealing_keys()');
is(sql('SELECT count(*) FROM keyvault.sealing_keys WHERE retired_at <= now()'), '0', 'the sealing key can go then');

# A box whose key somebody has locked is passed over, and found again by maintenance, though nobody announces that it is free;
# with reveal on again, when no wake-up is about boxes any more, too.
my @boxes = map { boxed($_, "sk-box-0123456789-box1") } 'locked', 'unlocked';
sql("SELECT keyvault.store_api_key('openai', 'sk-key-0123456789-' || u, user_id => u) FROM unnest('{locked,unlocked}'::text[]) u");
becomes($_, "active|sk-${dots}cked||", "$_: a key") foreach 'locked', 'unlocked';
worker_leaves();
is(store_box($_, shift @boxes), '', "$_: a box") foreach 'locked', 'unlocked';
my $holder = $node->background_psql('postgres');
$holder->query_safe('BEGIN');
$holder->query_safe("SELECT FROM keyvault.api_keys WHERE user_id = 'locked' FOR UPDATE");
set_config($node, 'keyvault.maintenance_interval', '50ms');
set_config($node, 'keyvault.reveal', 'on');
worker_comes();
becomes('unlocked', "active|sk-${dots}box1||", 'one is opened');
is(told('locked'), "active|sk-${dots}cked|waiting|", 'beside one that is locked');
$holder->query_safe('COMMIT');
$holder->quit;
becomes('locked', "active|sk-${dots}box1||", 'which is opened when it is not');
set_config($node, 'keyvault.maintenance_interval', undef);
set_config($node, 'keyvault.reveal', 'off');

# Where keys can be opened, a box is opened at once, and what waited is forgotten.
$box{last} = [ map { boxed('last', "sk-box-0123456789-$_") } 'box1', 'box2' ];
sql("SELECT keyvault.store_api_key('openai', 'sk-key-0123456789-last', user_id => 'last')");
becomes('last', "active|sk-${dots}last||", 'a key');
worker_leaves();
is(store_box('last', $box{last}[0]), '', 'a box that waits');
set_config($node, 'keyvault.reveal', 'on');
is(store_box('last', $box{last}[1]), '', 'reveal on: a box');
is(told('last'), "active|sk-${dots}box2||", 'takes the place of both');
worker_comes();
is(called_with('last', 'the very last'), 'sk-box-0123456789-box2', 'for good');

$node->stop;
done_testing();
