# keyvault.reveal = off: what a bad box, or a source of the master key that fails, does to calls and to other keys.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('keeper', conf => "keyvault.reveal = off\nautovacuum = off\n");
use_mock($node, $port);

sub sql { return $node->safe_psql('postgres', @_) }

sub store_sealed
{
	my ($user, $secret, %option) = @_;
	my $box = seal_key($node, $option{sealed_for} // $user, $secret);
	return state_of($node, "SELECT keyvault.store_sealed_api_key('openai', '\\x$box', user_id => '$user')");
}

sub error_of
{
	my ($request) = @_;
	return sql("SELECT error FROM keyvault.requests WHERE id = '$request'");
}

# What the owner of a key is told.
sub told
{
	my ($user) = @_;
	return sql("SELECT status, coalesce(problem, '') FROM keyvault.api_key_status WHERE user_id = '$user'");
}

# What cannot be a key reaches no header, whether the worker has looked at the box before or not.
sub sends_no_malformed_key
{
	my %sealed = (
		"sk-split-0123456789\r\nX-Evil: 1" => [ 'split', qr/^KV005: /, qr/^failed\|Byte 20 of its 30 is a line break;/ ],
		'sk-ant-of-another-provider-01' => [ 'strange', qr/^KV009: /, qr/^failed\|It begins as keys of provider "anthropic" do/ ],
	);
	foreach my $secret (sort keys %sealed)
	{
		my ($user, $error, $told) = @{ $sealed{$secret} };
		is(store_sealed($user, $secret), '', "$user: the box is taken unopened");
		ok(wait_until(sub { told($user) =~ $told }), 'its owner is told what is wrong') or diag(told($user));
		my $request = queue_request($node, $user, "of $user", payer => "'user'");
		ends_as($node, $request, 'failed', 'no call is made with it');
		like(error_of($request), $error, 'and the error says why');
		is(mock_received($port, "of $user"), 0, 'nothing was sent');
		like(told($user), $told, 'the key stays failed');
	}
	return;
}

# The answer of a call that had the key before a bad box took its place.
sub answer_does_not_clear_a_problem
{
	is(store_sealed('late', 'sk-good-key-0123456789'), '', 'a good key');
	my $request = queue_request($node, 'late', 'of late [[mock: gate=late]]', payer => "'user'");
	ok(wait_until(sub { mock_received($port, 'of late') }), 'is under way');
	sql("UPDATE keyvault.api_keys SET status = 'failed', problem = 'bad box' WHERE user_id = 'late'");
	mock_open($port, 'late');
	ends_as($node, $request, 'done', 'is answered');
	is(told('late'), 'failed|bad box', 'which says nothing of what was stored since');
	return;
}

sends_no_malformed_key();
answer_does_not_clear_a_problem();
$node->stop;
done_testing();
