-- Limits beside the plan's: for a user, one of its members, an issued key or a model, per day or month.

CREATE TABLE keyvault.credit_budgets (
    user_id      text COLLATE "C" NOT NULL,
    id           uuid NOT NULL DEFAULT keyvault.uuidv7(),
    scope        text NOT NULL CHECK (scope IN ('user', 'member', 'issued_key', 'model')),
    target       text COLLATE "C" NOT NULL DEFAULT '',
    per          text NOT NULL CHECK (per IN ('day', 'month')),
    unit         text NOT NULL CHECK (unit IN ('credits', 'usd')),
    amount       numeric(18,6) NOT NULL CHECK (amount >= 0 AND amount < 'Infinity'),
    spent        numeric(24,9) NOT NULL DEFAULT 0,
    window_start timestamptz NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    spent_apart  numeric(24,9) NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, id),
    CONSTRAINT credit_budgets_target UNIQUE (user_id, scope, target, per, unit),
    CHECK ((scope = 'user') = (target = ''))
);
COMMENT ON TABLE keyvault.credit_budgets IS
    'What a user, or a part of its use, may spend in a UTC day or month. A debit beyond it fails with KV001, the plan''s credits notwithstanding.';
COMMENT ON COLUMN keyvault.credit_budgets.scope IS 'What is limited: user, all use; member, issued_key, model: the use that names target.';
COMMENT ON COLUMN keyvault.credit_budgets.target IS 'The member_id, issued_key_id or model, whose dated names count too; empty for scope user.';
COMMENT ON COLUMN keyvault.credit_budgets.unit IS 'credits, or usd: provider cost, cost_usd of usage records.';
COMMENT ON COLUMN keyvault.credit_budgets.spent IS 'Spent since window_start, to the nine decimal places of cost_usd; nothing once that day or month is over.';
COMMENT ON COLUMN keyvault.credit_budgets.spent_apart IS
    'The part of spent that is for records with a created_at before window_start, less what those with a later one were counted for in an earlier day or month, and less refunds: the proof of spent.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.credit_budgets', '');

ALTER TABLE keyvault.credit_budgets ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.credit_budgets FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.credit_budgets FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));

CREATE FUNCTION keyvault._model_family(model text) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN regexp_replace(model, '-([0-9]{8}|[0-9]{4}-[0-9]{2}-[0-9]{2}|latest)$', '');
COMMENT ON FUNCTION keyvault._model_family(text) IS
    'The model that a dated or "latest" name stands for, in prices and budgets; any other name as it is.';

CREATE FUNCTION keyvault._in_budget(budget keyvault.credit_budgets, model text, issued_key_id uuid, member_id text) RETURNS boolean
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN CASE budget.scope WHEN 'user' THEN true
                             WHEN 'model' THEN coalesce(budget.target IN (model, keyvault._model_family(model)), false)
                             WHEN 'issued_key' THEN coalesce(issued_key_id::text = budget.target, false)
                             ELSE coalesce(member_id = budget.target, false) END;
COMMENT ON FUNCTION keyvault._in_budget(keyvault.credit_budgets, text, uuid, text) IS 'True when a use counts in a budget.';

CREATE FUNCTION keyvault._budget_window(budget keyvault.credit_budgets) RETURNS timestamptz
    LANGUAGE sql STABLE PARALLEL SAFE
    RETURN greatest(date_trunc(budget.per, now(), 'UTC'), budget.window_start);
COMMENT ON FUNCTION keyvault._budget_window(keyvault.credit_budgets) IS
    'When the day or month began that a budget is in; the one that it is in already when the clock went back.';

CREATE FUNCTION keyvault._budget_held(budget keyvault.credit_budgets) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT coalesce(sum(CASE budget.unit WHEN 'usd' THEN h.cost_usd ELSE h.amount END), 0)
              FROM keyvault.credit_holds h
             WHERE h.user_id = budget.user_id AND h.expires_at > now()
               AND keyvault._in_budget(budget, h.model, h.issued_key_id, h.member_id));
END $$;
COMMENT ON FUNCTION keyvault._budget_held(keyvault.credit_budgets) IS 'What open holds set aside of a budget, in its unit.';

CREATE FUNCTION keyvault._budget_used(budget keyvault.credit_budgets, since timestamptz, except_tag bigint = NULL) RETURNS numeric
    LANGUAGE plpgsql STABLE
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN (SELECT coalesce(sum(CASE budget.unit WHEN 'usd' THEN r.cost_usd ELSE r.credits END), 0)
              FROM keyvault.usage_records r
             WHERE r.user_id = budget.user_id AND r.created_at >= since AND r.debit_tag IS DISTINCT FROM except_tag
               AND keyvault._in_budget(budget, r.model, r.issued_key_id, r.member_id));
END $$;
COMMENT ON FUNCTION keyvault._budget_used(keyvault.credit_budgets, timestamptz, bigint) IS
    'What usage records with a created_at of since or later come to in a budget, in its unit, without those with the debit_tag except_tag.';

CREATE FUNCTION keyvault._require_budget(budget keyvault.credit_budgets, amount numeric) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    spent numeric := CASE WHEN keyvault._budget_window(budget) = budget.window_start THEN budget.spent ELSE 0 END;
    held numeric;
BEGIN
    IF amount = 0 THEN
        RETURN;
    END IF;
    held := keyvault._budget_held(budget);
    IF spent + held + amount > budget.amount THEN
        RAISE EXCEPTION 'budget of % % per % reached for % of user "%"', trim_scale(budget.amount), budget.unit, budget.per,
              CASE budget.scope WHEN 'user' THEN 'all use'
                                ELSE format('%s "%s"', replace(budget.scope, '_', ' '), budget.target) END, budget.user_id
            USING ERRCODE = 'KV001',
                  DETAIL = format('%s asked for; %s spent and %s held of %s.', trim_scale(amount), trim_scale(spent), trim_scale(held),
                                  trim_scale(budget.amount)),
                  HINT = format('The budget begins anew at %s UTC; keyvault.set_budget() changes it.',
                                to_char((keyvault._budget_window(budget) AT TIME ZONE 'UTC') + ('1 ' || budget.per)::interval,
                                        'YYYY-MM-DD HH24:MI'));
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._require_budget(keyvault.credit_budgets, numeric) IS 'Raises KV001, naming the budget, unless amount is left of it.';

CREATE FUNCTION keyvault._check_budgets(user_id text, model text, issued_key_id uuid, member_id text, credits numeric, cost_usd numeric)
    RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    budget keyvault.credit_budgets;
BEGIN
    FOR budget IN SELECT * FROM keyvault.credit_budgets g WHERE g.user_id = $1 ORDER BY g.id LOOP
        IF keyvault._in_budget(budget, $2, $3, $4) THEN
            PERFORM keyvault._require_budget(budget, CASE budget.unit WHEN 'usd' THEN $6 ELSE $5 END);
        END IF;
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault._check_budgets(text, text, uuid, text, numeric, numeric) IS
    'Sees that a use fits into its user''s budgets. The caller holds the balance''s row lock. Error: KV001.';

CREATE FUNCTION keyvault._rows_owed(user_id text)
    RETURNS TABLE (model text, issued_key_id uuid, member_id text, credits numeric, cost_usd numeric, created_at timestamptz, settled boolean)
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_rows_owed';
COMMENT ON FUNCTION keyvault._rows_owed(text) IS
    'The usage records of a user that the debit under way is for; settled: they end a hold. No rows outside of a debit.';

CREATE FUNCTION keyvault._charge_budgets(user_id text) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    budget keyvault.credit_budgets;
    begins timestamptz;
    added numeric;
    settled numeric;
    apart numeric;
BEGIN
    FOR budget IN SELECT * FROM keyvault.credit_budgets g WHERE g.user_id = $1 ORDER BY g.id LOOP
        begins := keyvault._budget_window(budget);
        SELECT coalesce(sum(u.amount) FILTER (WHERE NOT u.settled), 0), coalesce(sum(u.amount) FILTER (WHERE u.settled), 0),
               coalesce(sum(u.amount) FILTER (WHERE u.created_at < begins), 0)
          INTO added, settled, apart
          FROM (SELECT CASE budget.unit WHEN 'usd' THEN r.cost_usd ELSE r.credits END AS amount, r.settled, r.created_at
                  FROM keyvault._rows_owed($1) r
                 WHERE keyvault._in_budget(budget, r.model, r.issued_key_id, r.member_id)) u;
        -- What was reserved has happened: it is counted, not refused.
        PERFORM keyvault._require_budget(budget, added);
        IF added + settled > 0 THEN
            IF budget.window_start < begins THEN
                -- What this transaction inserted is counted from here on.
                budget.spent := 0;
                budget.spent_apart := -keyvault._budget_used(budget, begins, keyvault._debit_tag());
            END IF;
            UPDATE keyvault.credit_budgets g
               SET spent = budget.spent + added + settled, spent_apart = budget.spent_apart + apart, window_start = begins
             WHERE g.user_id = $1 AND g.id = budget.id;
        END IF;
    END LOOP;
END $$;
COMMENT ON FUNCTION keyvault._charge_budgets(text) IS
    'Counts the debit under way in its user''s budgets. The caller holds the balance''s row lock. Error: KV001.';

CREATE FUNCTION keyvault._await_free_uses(user_id text) RETURNS void
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_await_free_uses';
COMMENT ON FUNCTION keyvault._await_free_uses(text) IS
    'Waits for transactions under way that have recorded uses of no credits of a user, or of one of its 1/128 of all users; further ones go by the balance''s row lock until the transaction ends. To be called before that is locked.';

CREATE FUNCTION keyvault._budget_used_by_now(user_id text, id uuid) RETURNS numeric
    LANGUAGE c VOLATILE PARALLEL UNSAFE STRICT
    AS 'MODULE_PATHNAME', 'keyvault_budget_used_by_now';
COMMENT ON FUNCTION keyvault._budget_used_by_now(text, uuid) IS
    'What usage records of a budget''s day or month come to, in its unit, of those that are committed when it is called; NULL for no such budget.';

CREATE FUNCTION keyvault._set_budget(user_id text, amount numeric, per text, unit text, scope text, target text, may_create boolean) RETURNS uuid
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    budget keyvault.credit_budgets;
    the_target text := coalesce($6, '');
BEGIN
    IF $3 IS NULL OR $3 NOT IN ('day', 'month') OR $4 IS NULL OR $4 NOT IN ('credits', 'usd')
       OR $5 IS NULL OR $5 NOT IN ('user', 'member', 'issued_key', 'model') OR ($5 = 'user') <> (the_target = '')
    THEN
        RAISE EXCEPTION 'a budget is per day or month, in credits or usd, for a user, or for a member, an issued_key or a model that target names'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'See "Budgets" in doc/keyvault.md.';
    END IF;
    IF octet_length(the_target) > 255 THEN
        RAISE EXCEPTION 'target of a budget must be at most 255 bytes long'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Pass what usage records have as member_id, issued_key_id or model.';
    END IF;
    budget.amount := $2;
    budget.window_start := date_trunc($3, now(), 'UTC');
    IF $5 = 'issued_key' THEN
        BEGIN
            the_target := the_target::uuid::text;
        EXCEPTION
            WHEN invalid_text_representation THEN
                RAISE EXCEPTION 'target of a budget for an issued key must be its id, a uuid'
                    USING ERRCODE = 'invalid_text_representation', HINT = 'Pass what usage records have as issued_key_id.';
        END;
    END IF;
    PERFORM keyvault._await_free_uses($1);
    -- Nobody is made to have a budget removed.
    PERFORM keyvault._lock_balance($1, $7 AND $2 IS NOT NULL);
    IF $2 IS NULL THEN
        DELETE FROM keyvault.credit_budgets
         WHERE user_id = $1 AND scope = $5 AND target = the_target AND per = $3 AND unit = $4 RETURNING id INTO budget.id;
    ELSE
        PERFORM keyvault._check_amount($2, 0, CASE $4 WHEN 'usd' THEN 'USD' ELSE 'credits' END);
        INSERT INTO keyvault.credit_budgets AS g (user_id, scope, target, per, unit, amount, window_start)
        VALUES ($1, $5, the_target, $3, $4, $2, budget.window_start)
        ON CONFLICT (user_id, scope, target, per, unit) DO UPDATE SET amount = excluded.amount, updated_at = now()
        RETURNING * INTO budget;
        IF budget.created_at = budget.updated_at THEN
            -- What this day or month has seen already counts.
            UPDATE keyvault.credit_budgets g SET spent = keyvault._budget_used_by_now($1, budget.id), spent_apart = 0
             WHERE g.user_id = $1 AND g.id = budget.id;
        END IF;
    END IF;
    PERFORM keyvault._save_balance(keyvault._gather_slots($1));
    RETURN budget.id;
END $$;
COMMENT ON FUNCTION keyvault._set_budget(text, numeric, text, text, text, text, boolean) IS 'set_budget, after its caller was checked.';

CREATE FUNCTION keyvault.set_budget(user_id text, amount numeric, per text = 'month', unit text = 'credits', scope text = 'user',
                                    target text = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_set_budget';
COMMENT ON FUNCTION keyvault.set_budget(text, numeric, text, text, text, text) IS
    'Limits what a user (scope user), or its use that names target as member_id, issued_key_id or model, may spend per UTC day or month, in credits or USD of provider cost; returns the budget''s id. A budget of the same scope, target, per and unit is changed; amount NULL removes it. Errors: 42501 without the right to act for any user or access admin, 22004, 22023 bad argument, or a user that does not exist and has a budget removed, 22P02 for an issued key that is no uuid.';

CREATE VIEW keyvault.budget_status WITH (security_invoker = true, security_barrier = true) AS
SELECT g.user_id, g.id, g.scope, nullif(g.target, '') AS target, g.per, g.unit, g.amount, s.spent, s.held,
       greatest(g.amount - s.spent - s.held, 0) AS remaining, keyvault._budget_window(g) AS window_start,
       ((keyvault._budget_window(g) AT TIME ZONE 'UTC') + ('1 ' || g.per)::interval) AT TIME ZONE 'UTC' AS resets_at
  FROM keyvault.credit_budgets g
 CROSS JOIN LATERAL (SELECT CASE WHEN keyvault._budget_window(g) = g.window_start THEN g.spent ELSE 0 END AS spent,
                            keyvault._budget_held(g) AS held) s;
COMMENT ON VIEW keyvault.budget_status IS
    'Budgets of the acting user, of every user for access analyst or admin: what is spent, held by open holds, and left, in the budget''s unit.';
COMMENT ON COLUMN keyvault.budget_status.user_id IS 'Whose budget.';
COMMENT ON COLUMN keyvault.budget_status.id IS 'The id that set_budget() returned.';
COMMENT ON COLUMN keyvault.budget_status.scope IS 'What is limited: user, all use; member, issued_key, model: the use that names target.';
COMMENT ON COLUMN keyvault.budget_status.target IS 'The member_id, issued_key_id or model, whose dated names count too; NULL for scope user.';
COMMENT ON COLUMN keyvault.budget_status.per IS 'day or month, in UTC.';
COMMENT ON COLUMN keyvault.budget_status.unit IS 'credits, or usd: provider cost.';
COMMENT ON COLUMN keyvault.budget_status.amount IS 'What may be spent per day or month, in that unit.';
COMMENT ON COLUMN keyvault.budget_status.spent IS 'Spent since window_start, in that unit.';
COMMENT ON COLUMN keyvault.budget_status.held IS 'Set aside by open holds, in that unit.';
COMMENT ON COLUMN keyvault.budget_status.remaining IS 'What is left of amount after both; 0 when nothing is.';
COMMENT ON COLUMN keyvault.budget_status.window_start IS 'When the day or month under way began.';
COMMENT ON COLUMN keyvault.budget_status.resets_at IS 'When it ends, and spent begins anew.';
