UPDATE keyvault.providers SET base_url = 'http://127.0.0.1:' || :'port', allowed_host = '127.0.0.1' WHERE provider = 'openai';
SELECT keyvault.store_platform_key('openai', 'sk-bench-platform-key') \g /dev/null
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('gateway', 999999999999);
SELECT count(keyvault.upsert_user('gateway_' || i, plan => 'gateway')) FROM generate_series(1, 100) i \g /dev/null

CREATE PROCEDURE one_call() LANGUAGE plpgsql AS $$
DECLARE
    answer jsonb;
BEGIN
    CALL keyvault.call('openai', '{"model": "gpt-5-mini", "max_completion_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}',
                       answer, user_id => 'gateway_1');
END $$;

-- Latency: enqueue to visible response, median of 300 calls one after the other.
CREATE TABLE latency (ms numeric);
DO $$
DECLARE
    started timestamptz;
BEGIN
    FOR i IN 1 .. 320 LOOP
        started := clock_timestamp();
        CALL one_call();
        IF i > 20 THEN
            INSERT INTO latency VALUES (extract(epoch FROM clock_timestamp() - started) * 1000);
            COMMIT;
        END IF;
    END LOOP;
END $$;
\pset format unaligned
\pset tuples_only on
SELECT format('gateway: added latency of a call %s ms median, %s ms at the 95th percentile',
              round(percentile_cont(0.5) WITHIN GROUP (ORDER BY ms)::numeric, 2),
              round(percentile_cont(0.95) WITHIN GROUP (ORDER BY ms)::numeric, 2))
  FROM latency;
