INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('bench', 999999999999);
SELECT count(keyvault.upsert_user('user_' || i, plan => 'bench')) FROM generate_series(1, 100000) i \g /dev/null
SELECT keyvault._make_usage_partitions() \g /dev/null
-- usage_records without the debit, and a bare table with its columns and indexes.
SELECT format($$
CREATE TABLE %1$s (LIKE keyvault.usage_records INCLUDING DEFAULTS INCLUDING CONSTRAINTS, PRIMARY KEY (user_id, created_at, id))
    PARTITION BY RANGE (created_at);
CREATE TABLE %1$s_this_month PARTITION OF %1$s
    FOR VALUES FROM (date_trunc('month', now(), 'UTC')) TO (date_trunc('month', now(), 'UTC') + interval '1 month');
CREATE TABLE %1$s_next_month PARTITION OF %1$s
    FOR VALUES FROM (date_trunc('month', now(), 'UTC') + interval '1 month') TO (date_trunc('month', now(), 'UTC') + interval '2 months');
CREATE TABLE %1$s_default PARTITION OF %1$s DEFAULT;
CREATE INDEX ON %1$s_this_month USING brin (debit_tag) WITH (pages_per_range = 32, autosummarize = on)$$, name)
  FROM unnest('{bare_records, undebited_records}'::text[]) name \gexec
ALTER TABLE bare_records ALTER debit_tag SET DEFAULT 0;
ALTER TABLE bare_records_this_month ALTER debit_tag SET DEFAULT 0;
CREATE TRIGGER price_usage BEFORE INSERT ON undebited_records FOR EACH ROW EXECUTE FUNCTION keyvault._price_usage();
SELECT current_setting('data_directory') || '/usage.copy' AS rows \gset
COPY (SELECT 'user_' || (i % 1000 + 1), 'chat', 'gpt-5-mini', 100, 0.25 FROM generate_series(1, 100000) i) TO :'rows';
VACUUM ANALYZE keyvault.credit_balances;
CHECKPOINT;
