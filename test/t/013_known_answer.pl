# The vault's formats against bytes that another program has written, and with every bit of their headers turned over.
use strict;
use warnings FATAL => 'all';
use JSON::PP ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $golden = JSON::PP::decode_json(slurp_file('test/golden/formats.json'));
my $file = PostgreSQL::Test::Utils::tempdir . '/master.key';
my $other = 'ee' x 32;
write_secret($file, "$other\n$golden->{master_key}\n");
my $node = new_node('golden', master_key => $file, conf => "keyvault.databases = 'none'\n");

sub sql { return $node->safe_psql('postgres', @_) }

is(`node test/golden/formats.mjs`, slurp_file('test/golden/formats.json'), 'the other program still writes these bytes') if `which node`;

sql(<<"SQL");
INSERT INTO keyvault.users (user_id) VALUES ('$golden->{user_id}');
INSERT INTO keyvault.vault (vault_id) VALUES ('$golden->{vault_id}');
INSERT INTO keyvault.master_keys (kek_id, version) VALUES ('\\x$golden->{kek_id}', $golden->{master_key_version});
INSERT INTO keyvault.data_keys (user_id, version, data_key_id, wrapped)
VALUES ('$golden->{user_id}', $golden->{data_key_version}, '$golden->{data_key_id}', '\\x$golden->{wrapped}');
INSERT INTO keyvault.api_keys (user_id, id, provider, ciphertext, hint, fingerprint)
VALUES ('$golden->{user_id}', '$golden->{secret_id}', '$golden->{provider}', '\\x$golden->{record}', '', '\\x$golden->{fingerprint}');
SQL
my $lookup = "keyvault.user_api_key('$golden->{provider}', '$golden->{user_id}')";
is(sql("SELECT $lookup"), $golden->{secret}, 'the golden wrap and record open');

# The same key again: the fingerprint that we compute is the golden one, so that the value counts as unchanged.
sql("SELECT keyvault.store_api_key('$golden->{provider}', '$golden->{secret}', user_id => '$golden->{user_id}')");
is(sql('SELECT encode(fingerprint, \'hex\'), rotated_at IS NULL FROM keyvault.api_keys'), "$golden->{fingerprint}|t", 'the golden fingerprint');
is(sql("SELECT encode(substr(ciphertext, 1, 24), 'hex') FROM keyvault.api_keys"), substr($golden->{record}, 0, 48), 'a record of ours begins as the golden one');
sql("UPDATE keyvault.api_keys SET ciphertext = '\\x$golden->{record}'");

# Every bit of either, one at a time, in a session of its own cache: refused, with the error that fits.
sql(<<"SQL");
CREATE FUNCTION outcome(change text) RETURNS text LANGUAGE plpgsql AS \$\$
DECLARE
	state text;
BEGIN
	EXECUTE change;
	PERFORM $lookup;
	RAISE EXCEPTION USING ERRCODE = 'T0000';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE;
	RETURN CASE state WHEN 'T0000' THEN 'opens' ELSE state END;
END \$\$;
SQL
is(sql("SELECT outcome('SELECT 1')"), 'opens', 'the test opens what is unchanged');
sub flipped
{
	my ($table, $column, $from, $to) = @_;
	return sql(<<"SQL");
SELECT string_agg(DISTINCT outcome(format('UPDATE keyvault.$table SET $column = set_bit($column, %s, 1 - get_bit($column, %s))', bit, bit)), ' ')
  FROM generate_series($from * 8, $to * 8 - 1) bit
SQL
}
is(flipped('data_keys', 'wrapped', 0, 8), 'KV005', 'wrap: every bit of magic, format, suite, source and version');
is(flipped('data_keys', 'wrapped', 8, 24), 'KV004', 'wrap: every bit of the master key\'s id');
is(flipped('data_keys', 'wrapped', 24, 84), 'KV005', 'wrap: every bit of nonce, key and tag');
is(flipped('api_keys', 'ciphertext', 0, length($golden->{record}) / 2), 'KV005', 'record: every bit');

# Every field that they are bound to.
foreach my $case ([ 'data_keys', "user_id = 'another'" ], [ 'data_keys', 'version = 8' ], [ 'data_keys', 'data_key_id = keyvault.uuidv7()' ],
	[ 'vault', 'vault_id = keyvault.uuidv7()' ], [ 'api_keys', 'id = keyvault.uuidv7()' ], [ 'api_keys', "user_id = 'another'" ],
	[ 'api_keys', "provider = 'exa'" ])
{
	my ($table, $change) = @$case;
	my $asked = $change =~ /provider/ ? $lookup =~ s/openai/exa/r : $change =~ /user_id/ && $table eq 'api_keys' ? $lookup =~ s/golden_user/another/r : $lookup;
	is(state_of($node, "BEGIN; UPDATE keyvault.$table SET $change; SELECT $asked"), 'KV005', "bound to $table.$change");
}
is(sql("SELECT $lookup"), $golden->{secret}, 'put back, they open');
# What a session keeps of a data key is forgotten when that changes, by replication, too.
is(state_of($node, "SELECT $lookup; SET session_replication_role = replica; BEGIN; UPDATE keyvault.data_keys SET data_key_id = keyvault.uuidv7(); SELECT $lookup"),
	'KV005', 'changed as a replica, in a session that knows the data key');

# And what it is for: a record that is otherwise this row's.
is(state_of($node, "BEGIN; UPDATE keyvault.api_keys SET ciphertext = '\\x$golden->{record_of_another_purpose}'; SELECT $lookup"), 'KV005',
	'bound to its purpose');
# One whose tag is right, as only a holder of the data key can make it, but not what it says of its key.
is(state_of($node, "BEGIN; UPDATE keyvault.api_keys SET ciphertext = '\\x$golden->{record_of_another_commitment}'; SELECT $lookup"), 'KV005',
	'the commitment to the key is compared');

# The platform's data key, the vault's sealing key, and a box that was sealed to it.
sql(<<"SQL");
INSERT INTO keyvault.data_keys (user_id, version, data_key_id, wrapped) VALUES ('', 1, '$golden->{platform_data_key_id}', '\\x$golden->{platform_wrapped}');
INSERT INTO keyvault.sealing_keys (key_id, id, public_key, ciphertext, retired_at) VALUES ('\\x$golden->{sealing_key_id}', '$golden->{sealing_id}',
	'\\x$golden->{sealing_public_key}', '\\x$golden->{sealing_record}', now() + interval '1 day');
INSERT INTO keyvault.users (user_id) VALUES ('another') ON CONFLICT DO NOTHING;
SQL
sub take { return "keyvault.store_sealed_api_key('$_[0]', '\\x$golden->{box}', user_id => '$_[1]')" }
my $take = take($golden->{box_provider}, $golden->{user_id});
is(sql("BEGIN; SELECT count($take); SELECT keyvault.user_api_key('$golden->{box_provider}', '$golden->{user_id}'); ROLLBACK"), "1\n$golden->{box_secret}",
	'the golden box opens, with the golden sealing key');
is(state_of($node, 'SELECT ' . take(@$_)), 'KV005', "a box is bound to its provider and user: not for @$_")
	foreach [ 'gemini', $golden->{user_id} ], [ $golden->{box_provider}, 'another' ];
foreach my $change ('vault SET vault_id = keyvault.uuidv7()', 'sealing_keys SET id = keyvault.uuidv7()',
	'sealing_keys SET public_key = set_bit(public_key, 9, 1 - get_bit(public_key, 9))', "data_keys SET user_id = 'another' WHERE user_id = ''",
	"data_keys SET version = 2 WHERE user_id = ''", "data_keys SET data_key_id = keyvault.uuidv7() WHERE user_id = ''")
{
	is(state_of($node, "BEGIN; UPDATE keyvault.$change; SELECT $take"), 'KV005', "a box and its sealing key are bound: $change");
}
sql(<<"SQL");
CREATE FUNCTION box_outcome(box bytea) RETURNS text LANGUAGE plpgsql AS \$\$
DECLARE
	state text;
BEGIN
	PERFORM keyvault.store_sealed_api_key('$golden->{box_provider}', box, user_id => '$golden->{user_id}');
	RAISE EXCEPTION USING ERRCODE = 'T0000';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE;
	RETURN CASE state WHEN 'T0000' THEN 'opens' ELSE state END;
END \$\$;
CREATE FUNCTION sealing_outcome(nth integer) RETURNS text LANGUAGE plpgsql AS \$\$
DECLARE
	state text;
BEGIN
	UPDATE keyvault.sealing_keys SET ciphertext = set_bit(ciphertext, nth, 1 - get_bit(ciphertext, nth));
	PERFORM $take;
	RAISE EXCEPTION USING ERRCODE = 'T0000';
EXCEPTION WHEN OTHERS THEN
	GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE;
	RETURN CASE state WHEN 'T0000' THEN 'opens' ELSE state END;
END \$\$;
SQL
is(sql("SELECT box_outcome('\\x$golden->{box}')"), 'opens', 'the test opens the box that is unchanged');
is(sql(<<"SQL"), 'KV005', 'box: every bit but those of the version');
SELECT string_agg(DISTINCT box_outcome(set_bit(box, bit, 1 - get_bit(box, bit))), ' ')
  FROM (VALUES ('\\x$golden->{box}'::bytea)) b (box), generate_series(8, octet_length(box) * 8 - 1) bit
SQL
like(sql(<<"SQL"), qr/^(22023|KV005|22023 KV005)$/, 'box: every bit of the version');
SELECT string_agg(DISTINCT box_outcome(set_bit(box, bit, 1 - get_bit(box, bit))), ' ' ORDER BY box_outcome(set_bit(box, bit, 1 - get_bit(box, bit))))
  FROM (VALUES ('\\x$golden->{box}'::bytea)) b (box), generate_series(0, 7) bit
SQL
is(sql("SELECT string_agg(DISTINCT sealing_outcome(bit), ' ') FROM keyvault.sealing_keys, generate_series(0, octet_length(ciphertext) * 8 - 1) bit"), 'KV005',
	'sealing key: every bit');

# Keys for one call that were moved to another request, or to another user's: these calls fail, and the provider is not asked.
my $port = start_mock();
use_mock($node, $port);
my ($first, $second, $others, $own) = map { queue_request($node, $_->[0], "$_->[1] is asked", api_key => "'sk-for-one-call-$_->[1]-0123'") }
	[ 'another', 'first' ], [ 'another', 'second' ], [ $golden->{user_id}, 'third' ], [ $golden->{user_id}, 'fourth' ];
sql(<<"SQL");
UPDATE keyvault.requests r SET call_key = k.call_key FROM keyvault.requests k
 WHERE (r.id, k.id) IN (('$first', '$second'), ('$second', '$others'), ('$others', '$first'));
SQL
set_config($node, 'keyvault.databases', 'postgres');
ends_as($node, $own, 'done', 'a key for one call opens for its request');
ends_as($node, $first, 'failed', 'not for another request of its user');
ends_as($node, $second, 'failed', 'nor for one of another user');
ends_as($node, $others, 'failed', 'nor the other way');
is(mock_received($port, "$_ is asked"), 0, "the provider has not seen the $_ request") foreach 'first', 'second', 'third';
set_config($node, 'keyvault.databases', 'none');

# A rotation writes the format that it reads.
sql('SELECT keyvault.rotate_master_key()');
is(sql("SELECT DISTINCT encode(substr(wrapped, 1, 8), 'hex') FROM keyvault.data_keys"), '44010101' . sprintf('%08x', $golden->{master_key_version} + 1),
	'wrapped again under the next version');
is(sql("SELECT $lookup"), $golden->{secret}, 'it opens');
$node->stop;

done_testing();
