SET client_min_messages = warning;
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('bench_usage', 999999999999);
SELECT count(keyvault.upsert_user('usage_' || i, plan => 'bench_usage')) FROM generate_series(1, :users) i \g /dev/null
SELECT keyvault._make_usage_partition(keyvault._period_bound(date_trunc('month', now(), 'UTC'), -i)) FROM generate_series(1, 3) i \g /dev/null
SELECT keyvault._make_usage_partitions() \g /dev/null
-- Straight into the partitions: the debit of old rows is not what is measured here.
SELECT format('ALTER TABLE %s DISABLE TRIGGER ALL', inhrelid::regclass) FROM pg_inherits WHERE inhparent = 'keyvault.usage_records'::regclass \gexec
INSERT INTO keyvault.usage_records (user_id, created_at, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens, credits, cost_usd, debit_tag)
SELECT 'usage_' || 1 + i::bigint * 7919 % :users, now() - interval '90 days' * (1 - i / :rows.0),
       (ARRAY['chat', 'chat', 'chat', 'api'])[1 + i % 4], (ARRAY['openai', 'anthropic', 'gemini'])[1 + i % 3],
       (ARRAY['gpt-5-mini', 'claude-haiku-4-5', 'gemini-3.8-flash'])[1 + i % 3], CASE WHEN i % 10 = 0 THEN 'user' ELSE 'platform' END,
       1000, 200, 300, 1300, 0.75, 0.00075, tag_base + i::bigint * (rolled_to - tag_base) / (:rows + 1)
  FROM generate_series(1, :rows) i, keyvault.usage_rollup WHERE i <= :rows - :rows / 1000;
SELECT format('ALTER TABLE %s ENABLE TRIGGER ALL', inhrelid::regclass) FROM pg_inherits WHERE inhparent = 'keyvault.usage_records'::regclass \gexec
SELECT format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', tgrelid::regclass, tgname) FROM pg_trigger t JOIN pg_inherits i ON i.inhrelid = t.tgrelid
 WHERE i.inhparent = 'keyvault.usage_records'::regclass \gexec
SELECT keyvault.rebuild_usage_daily() \g /dev/null
-- These stay for the views to add up.
INSERT INTO keyvault.usage_records (user_id, type, provider, model, input_tokens, output_tokens, tokens, credits, cost_usd)
SELECT 'usage_' || 1 + i::bigint * 7919 % :users, 'chat', 'openai', 'gpt-5-mini', 1000, 300, 1300, 0.75, 0.00075 FROM generate_series(1, :rows / 1000) i;
VACUUM ANALYZE keyvault.usage_records;
VACUUM ANALYZE keyvault.usage_daily;
CREATE TABLE bare_usage (LIKE keyvault.usage_records INCLUDING DEFAULTS, PRIMARY KEY (user_id, created_at, id)) PARTITION BY RANGE (created_at);
CREATE TABLE bare_usage_this_month PARTITION OF bare_usage
    FOR VALUES FROM (date_trunc('month', now(), 'UTC')) TO (date_trunc('month', now(), 'UTC') + interval '1 month');
CREATE INDEX ON bare_usage_this_month USING brin (debit_tag) WITH (pages_per_range = 32, autosummarize = on);
SELECT current_setting('data_directory') || '/usage.copy' AS file \gset
COPY (SELECT 'usage_' || 1 + i % 1000, 'chat', 'gpt-5-mini', 100, 0.25 FROM generate_series(1, 100000) i) TO :'file';
CHECKPOINT;
