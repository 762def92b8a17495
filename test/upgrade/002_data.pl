# ALTER EXTENSION keyvault UPDATE from 0.1.0 carries over what users and administrators have: keys, balances, holds, usage
# and configuration. The server has this library all the time, so that rows get the debit_tags of 0.1.0's library by hand.
use strict;
use warnings FATAL => 'all';
use Test::More;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Keyvault;

my $node = new_node('data', conf => "keyvault.databases = 'none'\n");
$node->safe_psql('postgres', 'DROP EXTENSION keyvault');
sql("CREATE EXTENSION keyvault VERSION '0.1.0'; SELECT keyvault._make_usage_partitions(1)");

# Every plan, and every state that a balance of 0.1.0 can be in.
sql(<<'SQL');
SELECT keyvault.upsert_user(u, plan => p) FROM (VALUES ('past', 'free'), ('overdue', 'free'), ('extra', 'free'),
    ('extra_overdue', 'free'), ('smaller', 'pro'), ('open', 'enterprise'), ('hot', 'pro'), ('holder', 'pro'), ('during', 'free')) v(u, p);
UPDATE keyvault.credit_balances SET extra_credits = 500 WHERE user_id LIKE 'extra%';
INSERT INTO keyvault.usage_records (user_id, created_at, type, model, credits, tokens, cost_usd) VALUES
    ('past', now() - interval '100 days', 'chat', 'm', 10, 1, 0.1), ('past', now() - interval '70 days', 'chat', NULL, 20.5, 2, 0.2),
    ('overdue', now() - interval '40 days', 'api', 'm', 7, 3, 0.3), ('extra', now(), 'api', 'm', 1200, 4, 0),
    ('extra_overdue', now() - interval '40 days', 'api', 'm', 1200, 5, 0), ('smaller', now(), 'chat', NULL, 2000, 6, 0),
    ('open', now(), 'api', NULL, 3.25, 7, 9);
SELECT keyvault.set_plan('smaller', 'free');
-- Periods that went by: those of past have begun anew, those of the others wait for their next debit.
UPDATE keyvault.credit_balances
   SET period_anchor = keyvault._period_bound(period_anchor, -4), credits_used = 0 WHERE user_id = 'past';
UPDATE keyvault.credit_balances
   SET period_anchor = keyvault._period_bound(period_anchor, -2), period_start = keyvault._period_bound(period_anchor, -2),
       period_end = keyvault._period_bound(period_anchor, -1) WHERE user_id LIKE '%overdue';
INSERT INTO keyvault.usage_records (user_id, credits, tokens) VALUES ('past', 600, 9);
INSERT INTO keyvault.usage_records (user_id, credits, tokens) SELECT 'hot', 0.001, 1 FROM generate_series(1, 32767);
INSERT INTO keyvault.credit_holds (user_id, amount, expires_at) VALUES ('holder', 5, now() + interval '1 day'), ('holder', 6, '-infinity');
UPDATE keyvault.credit_balances SET credits_held = 11 WHERE user_id = 'holder';
SELECT keyvault.store_platform_key('openai', 'sk-proj-the-key-of-the-platform');
SELECT keyvault.store_api_key('gemini', 'AIza-the-key-of-' || u, user_id => u) FROM unnest('{past,open}'::text[]) u;
SELECT keyvault.request('openai', '{"messages": [{"role": "user", "content": "queued"}]}', model => 'gpt-5-mini', user_id => 'holder');
-- What is an administrator's own now.
UPDATE keyvault.plans SET price_usd = 21 WHERE plan = 'pro';
UPDATE keyvault.model_prices SET input_usd_per_mtok = 77 WHERE model = 'gpt-5.5';
INSERT INTO keyvault.model_prices (provider, model, valid_from, input_usd_per_mtok, output_usd_per_mtok)
VALUES ('gemini', 'gemini-3.8-flash', '2027-01-01 00:00+00', 88, 88);
UPDATE keyvault.providers SET env_variable = 'MY_KEY' WHERE provider = 'exa';
-- A tag of 0.1.0 is any number: here one in each range that an installation may choose for its own, below and above its xid.
ALTER TABLE keyvault.usage_records DISABLE TRIGGER refuse_change;
UPDATE keyvault.usage_records r SET debit_tag = (n.number << 48) + 1000000000
  FROM (SELECT id, row_number() OVER (ORDER BY id) AS number FROM keyvault.usage_records WHERE user_id = 'hot') n WHERE r.id = n.id AND n.number < 32768;
UPDATE keyvault.usage_records SET debit_tag = hashtextextended(id::text, 0) WHERE user_id <> 'hot';
ALTER TABLE keyvault.usage_records ENABLE ALWAYS TRIGGER refuse_change;
SQL

my $status = q{SELECT user_id, plan, monthly_credits, extra_credits, credits_used, credits_held, credits_remaining::numeric(18,6), credits_reset_at
                 FROM keyvault.credit_status WHERE user_id <> 'during' ORDER BY user_id};
my $usage = q{SELECT user_id, day, provider, model, type, payer, calls, input_tokens, cached_tokens, output_tokens, tokens, credits, cost_usd
                FROM keyvault.usage_by_day WHERE user_id <> 'during' ORDER BY user_id, day, model, type};
my ($status_before, $usage_before) = (sql($status), sql($usage));

# In the transaction that updates, usage goes on.
sql(<<'SQL');
BEGIN;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('during', 1);
ALTER EXTENSION keyvault UPDATE;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('during', 2);
COMMIT;
SQL
is(sql($status), $status_before, 'credits are as before');
is(sql($usage), $usage_before, 'usage by day is as before');
is(sql("SELECT credits_used FROM keyvault.credit_status WHERE user_id = 'during'"), '3.000000', 'usage of the updating transaction is debited');
is(sql("SELECT sum(credits), sum(calls) FROM keyvault.usage_by_day WHERE user_id = 'during'"), '3.000000|2', '... and counted');
is(sql('SELECT * FROM keyvault.verify_ledger()'), '', 'the ledger is sound');
is(sql('SELECT count(*) FROM keyvault.usage_records, keyvault.usage_rollup WHERE debit_tag >= rolled_to AND debit_tag < tag_base + (1::bigint << 48)'),
	'1', "no row's tag of before passes for one of this installation");
my $plain = q{SELECT user_id, count(*), sum(tokens), sum(credits), sum(cost_usd) FROM keyvault.usage_records GROUP BY 1 ORDER BY 1};
my $added_up = q{SELECT user_id, sum(calls)::bigint, sum(tokens)::bigint, sum(credits), sum(cost_usd) FROM keyvault.usage_by_day GROUP BY 1 ORDER BY 1};
is(sql($added_up), sql($plain), 'usage views are plain sums');
sql('CALL keyvault.maintain()');
is(sql($added_up), sql($plain), '... when the roll-up has run, too');
is(sql(q{SELECT count(*) FROM pg_inherits i WHERE i.inhparent = 'keyvault.usage_records'::regclass
            AND NOT EXISTS (SELECT FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid JOIN pg_am a ON a.oid = c.relam
                             WHERE x.indrelid = i.inhrelid AND a.amname = 'brin')}), '0', 'every partition has the index of the roll-up');

# History and thresholds.
is(sql("SELECT period_start < now() - interval '60 days', credits_used, extra_spent FROM keyvault.credit_periods WHERE user_id = 'past' ORDER BY period_start"),
	"t|10.000000|0.000000\nt|20.500000|0.000000", 'periods that ended have what was used in them');
is(sql("SELECT notice_at FROM keyvault.credit_balances WHERE user_id = 'past'"), '799.999999', 'the next threshold is the first that was not reached');
is(sql("SELECT string_agg(user_id || ' ' || percent, ', ' ORDER BY user_id, percent) FROM keyvault.credit_notices"),
	'extra 50, extra 80, past 50, smaller 50, smaller 80, smaller 100', 'thresholds that were reached are noted');
sql("INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('past', 200)");
is(sql("SELECT max(percent) FROM keyvault.credit_notices WHERE user_id = 'past'"), '80', '... and the next one when it is');

# Due periods have begun with what 0.1.0 would have left.
is(sql('SELECT count(*) FROM keyvault.credit_balances WHERE period_end <= now()'), '0', 'maintenance began the periods that were due');
is(sql($status) =~ s/^past.*//mr, $status_before =~ s/^past.*//mr, '... as they would have');
is(sql('SELECT * FROM keyvault.verify_ledger()'), '', '... with a sound ledger');
is(sql("SELECT remaining FROM keyvault.credit_grants WHERE user_id = 'extra_overdue'"), '300.000000', '... and extra credits paid for what was beyond the plan');

# Configuration.
is(sql("SELECT string_agg(plan || ' ' || seeded, ', ' ORDER BY plan) FROM keyvault.plans"), 'enterprise true, free true, pro false', 'changed plans stay changed');
is(sql("SELECT input_usd_per_mtok, context_tiers, seeded FROM keyvault.model_prices WHERE model = 'gpt-5.5'"), '77.000000000||f', 'a changed price stays, and gets no tiers');
is(sql("SELECT input_usd_per_mtok, seeded FROM keyvault.model_prices WHERE model = 'gemini-3.8-flash' AND valid_from > '2026-12-31'"), '88.000000000|f', 'a row of the administrator stays where a shipped one came');
is(sql("SELECT count(*), bool_and(seeded) FROM keyvault.model_prices WHERE model IN ('claude-sonnet-4-5') AND context_tiers IS NOT NULL"), '1|t', 'shipped prices have their tiers');
is(sql("SELECT env_var, seeded FROM keyvault.providers WHERE provider = 'exa'"), 'MY_KEY|f', 'the environment variable of a provider stays');

# What is new works on what is old.
is(sql("SELECT keyvault.user_api_key('gemini', 'past')"), 'AIza-the-key-of-past', 'keys open');
is(sql("SELECT keyvault.rotate_data_key('past'); SELECT keyvault.user_api_key('gemini', 'past')"), "2\nAIza-the-key-of-past", '... when their data key was rotated, too');
sql("SELECT keyvault.grant_credits('extra', 50, 'thanks')");
is(sql("SELECT extra_credits, credits_remaining FROM keyvault.credit_status WHERE user_id = 'extra'"), '550.000000|350.000000', 'a grant adds to extra credits');
is(sql("SELECT reserved = amount, model, cost_usd > 0 FROM keyvault.credit_holds WHERE user_id = 'holder' AND expires_at = 'infinity'"), 't|gpt-5-mini|t', "a queued request's hold says what it is for");
is(sql("SELECT keyvault.settle_credits(id, 4) IS NOT NULL FROM keyvault.credit_holds WHERE user_id = 'holder' AND amount = 5"), 't', 'a hold is settled');
is(sql("SELECT keyvault.cancel_request(id) FROM keyvault.requests"), 't', 'a queued request is cancelled');
is(sql('SELECT * FROM keyvault.verify_ledger()'), '', 'the ledger is sound after all of it');
is(sql($added_up), sql($plain), 'usage views are plain sums after all of it');
done_testing();

sub sql { return $node->safe_psql('postgres', $_[0]) }
