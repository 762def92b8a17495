# A database in another encoding than UTF-8: providers are sent UTF-8, and their answers are stored in the database's characters.
use strict;
use warnings FATAL => 'all';
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $port = start_mock();
my $node = new_node('encoding');
$node->safe_psql('postgres', q(CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0));
$node->safe_psql('latin', 'CREATE EXTENSION keyvault CASCADE');
use_mock($node, $port, 'latin');

# chr() speaks the database's encoding; the file that is read here stays ASCII.
sub ask
{
	my ($character) = @_;
	my $messages = "jsonb_build_array(jsonb_build_object('role', 'user', 'content', 'say ' || $character))";
	my $body = "jsonb_build_object('model', 'gpt-5-mini', 'messages', $messages)";
	my $id = $node->safe_psql('latin', "SELECT keyvault.request('openai', $body, user_id => 'tap')");
	return $node->safe_psql('latin',
		"SELECT status || ' ' || (body #>> '{choices,0,message,content}' LIKE '%say ' || $character)::text FROM keyvault.wait_response('$id', '30 s')");
}

is(ask('chr(252)'), 'done true', 'a character of the encoding goes there and comes back');
$node->safe_psql('latin', q(SELECT keyvault.store_api_key('gemini', 'AIzaxxxxxxxxxxxxxxxxxxzzzz', user_id => 'tap')));
is($node->safe_psql('latin', q(SELECT hint FROM keyvault.api_key_status WHERE user_id = 'tap')), 'AIz...zzzz',
	'a hint needs no character beyond ASCII');
my ($code, $out, $err) = $node->psql('latin', "CALL keyvault.call('openai', " . chat('price in \\u20ac') . ", NULL, user_id => 'tap')");
unlike($err, qr/server closed|terminated/, 'a character that the database cannot hold does no harm');
is(ask('chr(228)'), 'done true', 'and the worker goes on');
$node->stop;

done_testing();
