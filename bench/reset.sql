INSERT INTO keyvault.users (user_id) SELECT 'reset_' || i FROM generate_series(1, :users) i;
INSERT INTO keyvault.credit_balances (user_id, monthly_credits, credits_used, period_anchor, period_start, period_end, due_at)
SELECT 'reset_' || i, 1000, 1, a.anchor, a.anchor, keyvault._period_bound(a.anchor, 1), keyvault._period_bound(a.anchor, 1)
  FROM generate_series(1, :users) i, date_trunc('month', now(), 'UTC') a(anchor);
SELECT keyvault._make_usage_partitions() \g /dev/null
VACUUM ANALYZE keyvault.users, keyvault.credit_balances;
CHECKPOINT;
