# Shipped prices against an independent price list, @pydantic/genai-prices, whose data and arithmetic are its authors' own.
use strict;
use warnings FATAL => 'all';
use IPC::Run ();
use JSON::PP ();
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

plan skip_all => 'npm package @pydantic/genai-prices is not installed in test/mock'
	unless -d 'test/mock/node_modules/@pydantic/genai-prices';

my $node = new_node('prices');

# Every shipped model at each time that its price changes and away from peak hours; token counts below, at and above its tiers.
my $uses = $node->safe_psql('postgres', <<'SQL');
CREATE TABLE uses AS
SELECT row_number() OVER (ORDER BY m.provider, m.model, at, input, cached, output) AS n, m.provider, m.model, at, input, least(cached, input) AS cached, output,
       (keyvault._use_usd(keyvault._find_price(m.provider, m.model, at), input, least(cached, input), output, NULL, NULL)).usd AS usd
  FROM (SELECT DISTINCT provider, model FROM keyvault.model_prices WHERE seeded) m,
       unnest('{2026-11-21 12:00+00, 2027-02-03 12:00+00}'::timestamptz[]) at,
       unnest('{0, 1, 1234, 128000, 199999, 200000, 200001, 271999, 272000, 272001, 1000000}'::bigint[]) input,
       unnest('{0, 1000, 150000}'::bigint[]) cached, unnest('{0, 777, 64000}'::bigint[]) output
 WHERE output = 0 OR m.model !~ 'embed'; -- embeddings write no tokens
SELECT json_agg(json_build_object('provider', provider, 'model', model, 'at', to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'),
                                  'input', input, 'cached', cached, 'output', output) ORDER BY n)::text FROM uses;
SQL
my ($costs, $errors) = ('', '');
IPC::Run::run([ 'node', 'test/mock/prices.mjs' ], '<', \$uses, '>', \$costs, '2>', \$errors) or die $errors;
my $list = JSON::PP::decode_json($costs);
my $values = join ',', map { '(' . ($_ + 1) . ',' . ($list->[$_] // 'NULL') . ')' } 0 .. $#$list;
$node->safe_psql('postgres', "CREATE TABLE oracle (n bigint, usd float8); INSERT INTO oracle VALUES $values");

cmp_ok(scalar @$list, '>', 10_000, 'many uses of many models');
is($node->safe_psql('postgres', 'SELECT DISTINCT provider, model FROM uses JOIN oracle USING (n) WHERE oracle.usd IS NULL'), '',
	'the oracle knows every shipped model');
# Its numbers are floating point, ours have nine decimal places.
is($node->safe_psql('postgres', <<'SQL'), '', 'both say the same of each use');
SELECT provider, model, at, input, cached, output, uses.usd, oracle.usd FROM uses JOIN oracle USING (n)
 WHERE abs(uses.usd - oracle.usd) > 1e-9 + 1e-12 * oracle.usd ORDER BY n LIMIT 10
SQL
$node->stop;

done_testing();
