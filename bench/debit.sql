INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('bench', 999999999999);
SELECT count(keyvault.upsert_user('user_' || i, plan => 'bench')) FROM generate_series(1, 100000) i \g /dev/null
SELECT keyvault._make_usage_partitions() \g /dev/null
CREATE TABLE bare_records (LIKE keyvault.usage_records INCLUDING DEFAULTS INCLUDING CONSTRAINTS, PRIMARY KEY (user_id, created_at, id))
    PARTITION BY RANGE (created_at);
CREATE TABLE bare_records_this_month PARTITION OF bare_records
    FOR VALUES FROM (date_trunc('month', now(), 'UTC')) TO (date_trunc('month', now(), 'UTC') + interval '1 month');
CREATE TABLE bare_records_next_month PARTITION OF bare_records
    FOR VALUES FROM (date_trunc('month', now(), 'UTC') + interval '1 month') TO (date_trunc('month', now(), 'UTC') + interval '2 months');
CREATE TABLE bare_records_default PARTITION OF bare_records DEFAULT;
-- The same indexes; but the tag is the debit's.
CREATE INDEX ON bare_records_this_month USING brin (debit_tag) WITH (pages_per_range = 32, autosummarize = on);
ALTER TABLE bare_records ALTER debit_tag SET DEFAULT 0;
ALTER TABLE bare_records_this_month ALTER debit_tag SET DEFAULT 0;
VACUUM ANALYZE keyvault.credit_balances;
CHECKPOINT;
