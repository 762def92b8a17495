# What roles that are not trusted try: other users' rows, functions in the place of trusted ones, the worker's logs.
use strict;
use warnings FATAL => 'all';
use File::Temp ();
use IPC::Run ();
use PostgreSQL::Test::Utils;
use Test::More;
use Keyvault;

my $node = new_node('attack', init_only => 1, conf => <<'CONF');
shared_preload_libraries = 'keyvault,auto_explain'
auto_explain.log_min_duration = 0
auto_explain.log_verbose = on
auto_explain.log_nested_statements = on
log_min_messages = info
keyvault.reveal = off
keyvault.maintenance_interval = 0
CONF
$node->start;

# A tenant who may create in the database makes pgcrypto, and members of it that the catalogue's index has before the real ones.
$node->safe_psql('postgres', 'CREATE ROLE tenant LOGIN; GRANT CREATE ON DATABASE postgres TO tenant');
my $impostor = '';
$node->psql('postgres', <<'SQL', extra_params => [ '-U', 'tenant' ], stderr => \$impostor);
CREATE SCHEMA trap;
CREATE EXTENSION pgcrypto SCHEMA trap;
CREATE TABLE trap.caught (t text);
GRANT ALL ON SCHEMA trap TO PUBLIC;
GRANT ALL ON trap.caught TO PUBLIC;
CREATE FUNCTION trap.dearmor(boolean) RETURNS bytea LANGUAGE plpgsql AS $$BEGIN INSERT INTO trap.caught VALUES (current_user); RETURN ''; END$$;
CREATE FUNCTION trap.pgp_pub_encrypt_bytea(boolean, boolean, boolean) RETURNS bytea LANGUAGE plpgsql AS $$BEGIN INSERT INTO trap.caught VALUES (current_user); RETURN ''; END$$;
CREATE FUNCTION trap.catch() RETURNS void LANGUAGE plpgsql AS $$BEGIN INSERT INTO trap.caught VALUES (current_user); END$$;
CREATE FUNCTION trap.compare(numeric, integer) RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$BEGIN PERFORM trap.catch(); RETURN true; END$$;
CREATE FUNCTION trap.compute(integer, numeric) RETURNS numeric LANGUAGE plpgsql IMMUTABLE AS $$BEGIN PERFORM trap.catch(); RETURN 0; END$$;
DO $$
DECLARE
    o text;
BEGIN
    FOREACH o IN ARRAY '{>=,>,<,<=,<>,=}'::text[] LOOP
        EXECUTE format('CREATE OPERATOR trap.%s (FUNCTION = trap.compare, LEFTARG = numeric, RIGHTARG = integer)', o);
    END LOOP;
    FOREACH o IN ARRAY '{+,-,*,/}'::text[] LOOP
        EXECUTE format('CREATE OPERATOR trap.%s (FUNCTION = trap.compute, LEFTARG = integer, RIGHTARG = numeric)', o);
    END LOOP;
END $$;
ALTER EXTENSION pgcrypto ADD FUNCTION trap.dearmor(boolean);
ALTER EXTENSION pgcrypto ADD FUNCTION trap.pgp_pub_encrypt_bytea(boolean, boolean, boolean);
SQL
is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_depend d JOIN pg_proc p ON p.oid = d.objid
	WHERE d.deptype = 'e' AND p.proname IN ('dearmor', 'pgp_pub_encrypt_bytea') AND p.prolang <> (SELECT oid FROM pg_language WHERE lanname = 'c')}),
	'2', 'the trap is set') or diag $impostor;
$node->safe_psql('postgres', 'CREATE EXTENSION keyvault CASCADE');
is($node->safe_psql('postgres', 'SELECT count(*) FROM trap.caught'), '0', 'the installation calls no operator of the tenant');
is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_depend d LEFT JOIN pg_operator o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
	LEFT JOIN pg_proc p ON d.refclassid = 'pg_proc'::regclass AND p.oid = d.refobjid WHERE 'trap'::regnamespace IN (o.oprnamespace, p.pronamespace)
	AND d.classid <> 'pg_operator'::regclass}), '0', 'and refers to none');

# Boxes become records in the worker, whose log has no statement to be judged by.
my $key = 'marker-of-the-worker-0123456789';
$node->safe_psql('postgres', "UPDATE keyvault.providers SET key_pattern = '^marker' WHERE provider = 'exa'");
$node->safe_psql('postgres', "SELECT keyvault.store_api_key('exa', '$key', user_id => 'victim')");
ok(wait_until(sub { $node->safe_psql('postgres', q{SELECT fingerprint IS NOT NULL FROM keyvault.api_keys WHERE user_id = 'victim'}) eq 't' }),
	'the worker makes a record of a box');
my $log = slurp_file($node->logfile);
like($log, qr/SELECT key_pattern FROM keyvault\.providers/, 'auto_explain logs what it runs for that');
unlike($log, qr/marker-of-the-worker/, 'without the key');

# The bundle is made by pgcrypto's own functions.
set_config($node, 'keyvault.reveal', 'on');
my (undef, undef, $error) = $node->psql('postgres', "SELECT keyvault.export_recovery_bundle('no key')");
like($error, qr/ERROR/, 'a bundle to no key is refused');
is($node->safe_psql('postgres', 'SELECT * FROM trap.caught'), '', 'and the trap has caught nothing');

# Something of the victim's in every table that there is a way to write.
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE mallory;
SELECT keyvault.grant_access('mallory', 'user');
SELECT keyvault.upsert_user(u, u || '@example.com', 'name of ' || u) FROM unnest('{victim,mallory}'::text[]) u;
SELECT keyvault.grant_credits('victim', 100, 'gift'), keyvault.set_budget('victim', 1000000), keyvault.set_plan('victim', 'pro');
SELECT keyvault.record_usage('chat', 'gpt-5-mini', 1000, 1000, credits => 40000, user_id => 'victim');
SELECT keyvault.reserve_credits(1, user_id => 'victim');
SELECT keyvault.request('exa', '{"query": "of the victim"}', user_id => 'victim', payer => 'user');
-- Usage of many days, the last of them unlike the others; a key that ends soon; a period that is over.
INSERT INTO keyvault.usage_records (user_id, created_at, model, tokens, credits)
SELECT 'victim', now() - make_interval(days => d), 'gpt-5-mini', CASE d WHEN 1 THEN 100000 ELSE 10 END, 1 FROM generate_series(1, 20) d;
SELECT keyvault.store_api_key('gemini', 'AIza' || repeat('0', 35), user_id => 'victim', expires_at => now() + interval '1 day');
UPDATE keyvault.credit_balances SET period_anchor = now() - interval '1 minute', period_start = period_start - interval '1 month',
       period_end = now() - interval '1 minute' WHERE user_id = 'victim';
SELECT keyvault.reset_due_credits();
-- What only maintenance, a restore or a provider's answer writes.
SELECT keyvault.run_maintenance('roll-up');
INSERT INTO keyvault.usage_retired (user_id, day, provider, model, type, payer, calls, tokens, credits, credits_overrun, cost_usd)
VALUES ('victim', '2020-01-01', '', '', 'chat', 'user', 1, 1, 1, 0, 0);
INSERT INTO keyvault.usage_late (user_id, day, provider, model, type, payer, calls, tokens, credits, credits_overrun, cost_usd)
VALUES ('victim', '2020-01-01', '', '', 'chat', 'user', 1, 1, 1, 0, 0);
INSERT INTO keyvault.usage_archived (user_id, partition, calls, credits) VALUES ('victim', 'one', 1, 1);
INSERT INTO keyvault.key_replacements (user_id, id, status, problem)
SELECT user_id, id, 'refused', 'as a bad box' FROM keyvault.api_keys WHERE user_id = 'victim' AND provider = 'gemini';
INSERT INTO keyvault.responses (user_id, id, status, payer) SELECT user_id, id, 'done', payer FROM keyvault.requests WHERE user_id = 'victim'
    ON CONFLICT DO NOTHING;
SQL
sub as_mallory
{
	my ($sql) = @_;
	my ($out, $err) = ('', '');
	$node->psql('postgres', "BEGIN; SELECT keyvault.act_as('mallory'); SET LOCAL ROLE mallory;\n$sql", stdout => \$out, stderr => \$err, on_error_stop => 0);
	$out =~ s/^mallory\n?//;
	return ($out, $err);
}

my @relations = split /\n/, $node->safe_psql('postgres', <<'SQL');
SELECT a.attrelid::regclass FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
 WHERE c.relnamespace = 'keyvault'::regnamespace AND c.relkind IN ('r', 'p', 'v') AND a.attname = 'user_id'
   AND has_column_privilege('mallory', c.oid, a.attnum, 'SELECT') ORDER BY 1
SQL
cmp_ok(scalar @relations, '>', 12, 'there are ' . @relations . ' relations to look into');
my @empty;
foreach my $relation (@relations)
{
	my $rows = $node->safe_psql('postgres', "SELECT count(*) FROM $relation WHERE user_id = 'victim'");
	push @empty, $relation if $rows eq '0';
	my ($seen, $err) = as_mallory("SELECT count(user_id) FROM $relation WHERE user_id <> 'mallory';");
	is("$seen$err", '0', "$relation: of $rows rows of another user none is seen");
	my ($out) = $node->psql('postgres', "SET ROLE mallory; SELECT count(user_id) FROM $relation", stdout => \my $nobody);
	is($nobody, '0', "$relation: nobody sees nothing");
}
is("@empty", '', 'each of them has rows of that user');

# Accesses add up: who also reads everyone's usage sees no more of their keys and requests.
$node->safe_psql('postgres', "SELECT keyvault.grant_access('mallory', 'analyst')");
foreach my $relation (@relations)
{
	my ($seen) = as_mallory("SELECT count(user_id) > 0 FROM $relation WHERE user_id = 'victim';");
	is($seen, $relation =~ /api_key|key_replacement|request|response/ ? 'f' : 't', "$relation: with access analyst, too");
}
$node->safe_psql('postgres', "SELECT keyvault.revoke_access('mallory', 'analyst')");

# Every function that takes a user, for the other one, with something in each other argument.
my @calls = split /\n/, $node->safe_psql('postgres', <<'SQL');
SELECT format('%s keyvault.%I(%s)', CASE p.prokind WHEN 'p' THEN 'CALL' ELSE 'SELECT * FROM' END, p.proname, string_agg(
       CASE WHEN a.name = 'user_id' THEN quote_literal('victim') WHEN a.name = 'measure' THEN quote_literal('credits')
            ELSE CASE a.type::regtype::text WHEN 'text' THEN quote_literal('exa') WHEN 'uuid' THEN quote_literal(gen_random_uuid())
                 WHEN 'jsonb' THEN quote_literal('{}') WHEN 'integer' THEN quote_literal(7) WHEN 'interval' THEN quote_literal('1 s') WHEN 'bytea' THEN quote_literal('\x01' || repeat('00', 150))
                 WHEN 'timestamp with time zone' THEN quote_literal('2100-01-01') ELSE 'NULL' END END || '::' || a.type::regtype, ', ' ORDER BY a.i))
  FROM pg_proc p CROSS JOIN LATERAL unnest(p.proargtypes::oid[], p.proargnames[1:p.pronargs]) WITH ORDINALITY a (type, name, i)
 WHERE p.pronamespace = 'keyvault'::regnamespace AND has_function_privilege('mallory', p.oid, 'EXECUTE')
 GROUP BY p.oid HAVING bool_or(a.name = 'user_id') ORDER BY 1
SQL
cmp_ok(scalar @calls, '>', 8, 'there are ' . @calls . ' functions to try');
foreach my $call (@calls)
{
	# What commits runs outside of a transaction, and so as nobody.
	my ($out, $err) = $call =~ /^CALL/ ? ('', ($node->psql('postgres', "SET ROLE mallory;\n$call"))[2]) : as_mallory("$call;");
	my ($name) = $call =~ /(keyvault\.\w+)/;
	# Nothing, zeros, or a chart of zeros.
	$out =~ s/\d{4}-\d\d-\d\d//g;
	ok($err =~ /not allowed to act for another user/ || ($err eq '' && $out !~ /[1-9]/), "$name does nothing for another user")
		or diag "$call: $out $err";
}
$node->stop;

done_testing();
