# Prices against another's arithmetic. That of shipped models is @pydantic/genai-prices' own; as the shipped prices come from
# the same list, it is the arithmetic, the tiers and the dates that are compared. What that list does not have, prices of
# reasoning, of requests and of units, and those of plans, is worked out by test/mock/prices.mjs from prices made here.
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

# Every shipped model just before and after each instant at which a shipped price begins, and today; token counts below, at and
# above its tiers. Reasoning is output, and no shipped price is another for it.
my $uses = $node->safe_psql('postgres', <<'SQL');
CREATE TABLE uses AS
SELECT row_number() OVER (ORDER BY m.provider, m.model, at, input, cached, output, reasoning) AS n, m.provider, m.model, at, input, least(cached, input) AS cached, output,
       (keyvault._use_usd(keyvault._find_price(m.provider, m.model, at), input, least(cached, input), output, reasoning, NULL)).usd AS usd
  FROM (SELECT DISTINCT provider, model FROM keyvault.model_prices WHERE seeded) m,
       (SELECT '2026-11-21 12:00+00'::timestamptz UNION SELECT '2027-02-03 12:00+00' UNION
        SELECT valid_from + step FROM keyvault.model_prices, unnest('{-1 second, 0}'::interval[]) step WHERE seeded AND valid_from > '-infinity') i (at),
       unnest('{0, 1, 1234, 128000, 199999, 200000, 200001, 271999, 272000, 272001, 1000000}'::bigint[]) input,
       unnest('{0, 1000, 150000}'::bigint[]) cached, unnest('{0, 777, 64000}'::bigint[]) output,
       LATERAL (SELECT output * (m.provider < 'n')::integer / 2) r (reasoning)
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

# Prices of a plan, of every kind, and uses around their tiers; some prices are left out.
srand(my $seed = $ENV{KV_SEED} // int rand 1 << 30);
diag("KV_SEED=$seed");
$node->safe_psql('postgres', "INSERT INTO keyvault.plans (plan, monthly_credits, credits_per_usd, margin, infrastructure_usd) VALUES ('oracle', NULL, 1000, 0, 0)");
sub amount { return sprintf '%.6f', rand $_[0] }
sub maybe { return rand() < 0.4 ? undef : $_[0] }
my (@cases, @prices);
foreach my $n (1 .. 100)
{
	my %price = (input => amount(20), output => amount(50), cached_input => maybe(amount(5)), reasoning => maybe(amount(90)), per_request => maybe(amount(1)) // 0,
		per_unit => maybe(amount(1)) // 0);
	my @tiers = map { my $tier = { over => $_ }; foreach my $kind (qw(input cached_input output reasoning)) { my $p = maybe(amount(100)); $tier->{$kind} = $p + 0 if $p } $tier }
		(rand() < 0.3 ? () : (1000, 50_000)[ 0 .. int rand 2 ]);
	push @prices, sprintf "('oracle', 'exa', 'm%d', %s, '%s')", $n, join(', ', map { $_ // 'NULL' } @price{qw(input output cached_input reasoning per_request per_unit)}),
		JSON::PP::encode_json(\@tiers);
	foreach my $input (0, 999, 1000, 1001, 50_000, 50_001, 1_000_000)
	{
		my $output = int rand 10_000;
		push @cases, { model => "m$n", price => { %price, tiers => \@tiers }, input => $input, cached => int rand $input + 1, output => $output,
			reasoning => int rand $output + 1, units => maybe(amount(10)) };
	}
}
$node->safe_psql('postgres', 'INSERT INTO keyvault.plan_prices (plan, provider, model, input_usd_per_mtok, output_usd_per_mtok, cached_input_usd_per_mtok, '
		. 'reasoning_usd_per_mtok, usd_per_request, usd_per_unit, context_tiers) VALUES ' . join ', ', @prices);
my $given = JSON::PP::encode_json(\@cases);
($costs, $errors) = ('', '');
IPC::Run::run([ 'node', 'test/mock/prices.mjs' ], '<', \$given, '>', \$costs, '2>', \$errors) or die $errors;
$list = JSON::PP::decode_json($costs);
$values = join ', ', map { my $c = $cases[$_]; '(' . join(', ', "'m" . substr($c->{model}, 1) . "'", @$c{qw(input cached output reasoning)}, $c->{units} // 'NULL', $list->[$_]) . ')' } 0 .. $#cases;
is(scalar(grep { $_ > 0 } @$list), scalar(grep { $_ } @$list), 'the oracle prices uses of a plan');
# By way of usage records: what a plan's prices make of a use is credits, 1000 to the dollar.
is($node->safe_psql('postgres', <<"SQL"), '', 'a plan\'s users pay what the oracle says');
SELECT keyvault.upsert_user('buyer', plan => 'oracle') \\gset
CREATE TABLE bought (model text, input bigint, cached bigint, output bigint, reasoning bigint, units numeric, usd float8);
INSERT INTO bought VALUES $values;
INSERT INTO keyvault.usage_records (user_id, provider, model, payer, input_tokens, cached_tokens, output_tokens, reasoning_tokens, units)
SELECT 'buyer', 'exa', model, 'platform', input, cached, output, reasoning, units FROM bought;
SELECT r.model, r.input_tokens, r.cached_tokens, r.output_tokens, r.reasoning_tokens, r.units, r.credits, b.usd FROM keyvault.usage_records r JOIN bought b
    ON (r.model, r.input_tokens, r.cached_tokens, r.output_tokens, r.reasoning_tokens, coalesce(r.units, 0)) = (b.model, b.input, b.cached, b.output, b.reasoning, coalesce(b.units, 0))
 WHERE abs(r.credits - 1000 * b.usd) > 2e-6 LIMIT 10
SQL
is($node->safe_psql('postgres', "SELECT count(*) FROM keyvault.usage_records WHERE user_id = 'buyer' AND credits > 0"), scalar(grep { $_ > 0 } @$list), 'each of them');
$node->stop;

done_testing();
