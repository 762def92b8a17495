-- Every grant of the extension. Nothing is PUBLIC's; access is given by grant_access.

CREATE FUNCTION keyvault._access_statements(access text) RETURNS SETOF text
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    app_functions text[] := '{act_as, store_api_key_reference, upsert_user, set_plan, suspend_user, resume_user, erase_user, uuidv7, _debit_tag, reconcile_request, unknown_requests}';
    user_functions text[] := '{test_api_key, store_api_key, store_api_keys, sealing_key, store_sealed_api_key, user_api_keys, user_api_key, delete_api_key, request, response, wait_response, call, cancel_request}';
    every_function text[] := '{current_user_id, _may_act_for_any_user, _may_read_all_usage, _may_administer, _period_bound, _period_number, _fresh_from, _fresh_until, usage_chart}';
    admin_functions text[] := '{upsert_user, set_plan, suspend_user, resume_user, erase_user, rotate_data_key, rotate_data_keys, retire_sealing_keys, store_platform_key, delete_platform_key, reconcile_request, unknown_requests, _are_context_tiers}';
    credit_functions text[] := CASE access
        WHEN 'app' THEN '{record_usage, reserve_credits, settle_credits, release_credits, grant_credits, refund_usage, set_budget}'
        WHEN 'admin' THEN '{grant_credits, refund_usage, set_budget, reset_due_credits, verify_ledger, _ledger, _budget_used}'
        WHEN 'analyst' THEN '{verify_ledger, _ledger, _budget_used}' END::text[]
        || '{_balance_now, _in_budget, _model_family, _budget_window, _budget_held, balance_at, explain_balance}'::text[];
    routines text[];
    member text;
BEGIN
    IF access IS NULL OR access NOT IN ('app', 'user', 'analyst', 'admin') THEN
        RAISE EXCEPTION 'access must be app, user, analyst or admin'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'See "Access" in doc/keyvault.md.';
    END IF;
    routines := every_function || credit_functions || ('_' || access) || CASE access
        WHEN 'app' THEN app_functions || user_functions
        WHEN 'user' THEN user_functions
        WHEN 'admin' THEN admin_functions END;
    RETURN NEXT 'USAGE ON SCHEMA keyvault';
    FOR member IN SELECT p.oid::regprocedure::text FROM pg_proc p
                   WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname = ANY (routines) ORDER BY 1 LOOP
        RETURN NEXT 'EXECUTE ON ROUTINE ' || member;
    END LOOP;
    RETURN NEXT 'SELECT ON keyvault.users, keyvault.credit_balances, keyvault.credit_holds, keyvault.plans, keyvault.providers, '
             || 'keyvault.model_prices, keyvault.credit_status, keyvault.usage_records, keyvault.usage_by_day';
    RETURN NEXT 'SELECT ON keyvault.credit_grants, keyvault.credit_periods, keyvault.credit_notices, keyvault.credit_budgets, '
             || 'keyvault.budget_status, keyvault.plan_prices, keyvault.usage_archived';
    RETURN NEXT 'SELECT ON keyvault.usage_by_model, keyvault.usage_by_month, keyvault.cost_by_payer, '
             || 'keyvault.usage_anomalies, keyvault.usage_daily, keyvault.usage_late, keyvault.usage_retired, keyvault.usage_rollup, keyvault._usage';
    IF access IN ('analyst', 'admin') THEN
        RETURN NEXT 'SELECT ON keyvault.revenue_by_user';
    END IF;
    IF access IN ('app', 'user') THEN
        RETURN NEXT 'SELECT (user_id, id, provider, model, type, path, payer, api_key_id, status, attempts, timeout_ms, hold_id, estimated_usd, '
                 || 'idempotency_key, queued_at, next_attempt_at, sent_at, finished_at, error, metadata, body) ON keyvault.requests';
        RETURN NEXT 'SELECT ON keyvault.responses, keyvault.request_status';
    END IF;
    IF access IN ('app', 'user', 'admin') THEN
        RETURN NEXT 'SELECT (user_id, id, provider, name, hint, source, status, expires_at, last_used_at, last_verified_at, rotated_at, '
                 || 'created_at, updated_at, problem, use_count) ON keyvault.api_keys';
        RETURN NEXT 'SELECT (user_id, id, status, problem, created_at) ON keyvault.key_replacements';
        RETURN NEXT 'SELECT ON keyvault.api_key_status, keyvault.api_keys_due';
    END IF;
    IF access = 'app' THEN
        -- debit_tag and hold_id stay out: with them, a writer could pass a row off as debited, or as settled past a budget.
        RETURN NEXT 'INSERT (user_id, created_at, id, type, provider, model, payer, input_tokens, cached_tokens, output_tokens, tokens, '
                 || 'credits, cost_usd, request_id, api_key_id, issued_key_id, idempotency_key, metadata, reasoning_tokens, units, member_id) ON keyvault.usage_records';
        RETURN NEXT 'SET ON PARAMETER "keyvault.user_id"';
    END IF;
    IF access = 'admin' THEN
        -- Where a provider is, and how it is given the key, is the superuser's: whoever sets that reads the keys.
        RETURN NEXT 'INSERT, UPDATE, DELETE ON keyvault.plans, keyvault.model_prices, keyvault.plan_prices';
        -- So is key_pattern: who sets it learns from what it refuses what others' keys look like.
        RETURN NEXT 'UPDATE (platform_paths, usd_per_request) ON keyvault.providers';
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._access_statements(text) IS 'The privileges of an access, each as what stands between GRANT and TO. Error: 22023.';

CREATE FUNCTION keyvault._change_access(role regrole, access text, change text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    privilege text;
BEGIN
    IF role IS NULL THEN
        RAISE EXCEPTION 'role must not be NULL' USING ERRCODE = 'null_value_not_allowed', HINT = 'Pass the name of a role.';
    END IF;
    FOR privilege IN SELECT keyvault._access_statements(access) LOOP
        EXECUTE format(change, privilege, role);
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault._change_access(regrole, text, text) IS
    'Carries out a change, with %s for each privilege of an access and for a role: GRANT %s TO %s or REVOKE %s FROM %s. Errors: 22004, 22023, 42501.';

CREATE FUNCTION keyvault.grant_access(role regrole, access text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    PERFORM keyvault._change_access(role, access, 'GRANT %s TO %s');
END $$;
COMMENT ON FUNCTION keyvault.grant_access(regrole, text) IS
    'Gives a role an access: app (trusted application, acts for any user), user (acts as the user it proved to be), analyst (everyone''s usage, no keys), admin (plans, prices, users, platform keys, what a provider costs, and which paths the platform pays for, metadata of keys; never plaintext). A superuser calls it. Errors: 22004, 22023, 42501.';

CREATE FUNCTION keyvault.revoke_access(role regrole, access text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    other text;
BEGIN
    PERFORM keyvault._change_access(role, access, 'REVOKE %s FROM %s');
    -- Accesses overlap: what another one that the role keeps also gives is given again.
    FOR other IN SELECT substr(p.proname, 2) FROM pg_proc p, aclexplode(p.proacl) a
                  WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname IN ('_app', '_user', '_analyst', '_admin')
                    AND a.grantee = role LOOP
        PERFORM keyvault.grant_access(role, other);
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault.revoke_access(regrole, text) IS
    'Takes an access from a role; other accesses that it was given stay whole. A superuser calls it. Errors: 22004, 22023, 42501.';

CREATE FUNCTION keyvault.refresh_access() RETURNS TABLE (role regrole, access text)
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    FOR role, access IN SELECT DISTINCT a.grantee, substr(p.proname, 2) FROM pg_proc p, aclexplode(p.proacl) a
                         WHERE p.pronamespace = 'keyvault'::regnamespace AND p.proname IN ('_app', '_user', '_analyst', '_admin')
                           AND a.grantee NOT IN (0, p.proowner)
                         ORDER BY 1, 2 LOOP
        PERFORM keyvault.grant_access(role, access);
        -- What 0.1.0 gave and no access has any more.
        EXECUTE format('REVOKE UPDATE (key_pattern) ON keyvault.providers FROM %s', role);
        RETURN NEXT;
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault.refresh_access() IS
    'Gives every role the accesses that it has once more, and returns them: after ALTER EXTENSION keyvault UPDATE, which grants nothing, so that they cover what the update brought, and takes what an access no longer has. A superuser calls it. Error: 42501.';

REVOKE ALL ON ALL ROUTINES IN SCHEMA keyvault FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA keyvault FROM PUBLIC;
