TRUNCATE keyvault.requests, keyvault.responses;
SELECT count(keyvault.request('openai', '{"model": "gpt-5-mini", "max_completion_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}',
                              user_id => 'gateway_' || 1 + i % 100))
  FROM generate_series(1, :size) i \g /dev/null
SELECT count(w.status) FROM (SELECT id FROM keyvault.requests) r, keyvault.wait_response(r.id, '60 s') w \g /dev/null
SELECT round(count(*) / extract(epoch FROM max(finished_at) - min(sent_at))) FROM keyvault.requests WHERE status = 'done';
