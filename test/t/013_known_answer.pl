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

# A rotation writes the format that it reads.
sql('SELECT keyvault.rotate_master_key()');
is(sql("SELECT encode(substr(wrapped, 1, 8), 'hex') FROM keyvault.data_keys"), '44010101' . sprintf('%08x', $golden->{master_key_version} + 1),
	'wrapped again under the next version');
is(sql("SELECT $lookup"), $golden->{secret}, 'it opens');
$node->stop;

done_testing();
