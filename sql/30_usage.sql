-- What was used. The rows are the truth; balances are proved from them.

CREATE FUNCTION keyvault._debit_tag() RETURNS bigint
    LANGUAGE c STABLE PARALLEL RESTRICTED
    AS 'MODULE_PATHNAME', 'keyvault_debit_tag';
COMMENT ON FUNCTION keyvault._debit_tag() IS
    'The number of this transaction in this installation of the extension, the default of usage_records.debit_tag.';

-- No CHECK stands here, nor on the other tables that every call writes: PostgreSQL parses and
-- plans each of them anew for each statement, which costs more than the debit. The row
-- trigger checks the same in C, with SQLSTATE 23514.
CREATE TABLE keyvault.usage_records (
    user_id         text COLLATE "C" NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT now(),
    id              uuid NOT NULL DEFAULT keyvault.uuidv7(),
    type            text NOT NULL DEFAULT 'api',
    provider        text,
    model           text,
    payer           text NOT NULL DEFAULT 'platform',
    input_tokens    bigint,
    cached_tokens   bigint,
    output_tokens   bigint,
    tokens          bigint NOT NULL DEFAULT 0,
    credits         numeric(18,6) NOT NULL DEFAULT NULL,
    credits_overrun numeric(18,6) NOT NULL DEFAULT 0,
    cost_usd        numeric(18,9) NOT NULL DEFAULT 0,
    request_id      uuid,
    api_key_id      uuid,
    issued_key_id   uuid,
    idempotency_key text,
    metadata        jsonb NOT NULL DEFAULT '{}',
    debit_tag       bigint NOT NULL DEFAULT keyvault._debit_tag(),
    reasoning_tokens bigint,
    units           numeric(18,6),
    member_id       text,
    hold_id         uuid,
    price           jsonb,
    PRIMARY KEY (user_id, created_at, id)
) PARTITION BY RANGE (created_at);
COMMENT ON TABLE keyvault.usage_records IS
    'One row per use, append-only. An INSERT debits credits from the user''s balance in the same transaction, or fails with KV001. Partitioned by month of created_at, in UTC.';
COMMENT ON COLUMN keyvault.usage_records.user_id IS 'Whose use; the balance of this user is debited.';
COMMENT ON COLUMN keyvault.usage_records.created_at IS 'When the use was, in the years 1970 to 9999: now unless the INSERT says otherwise. It is debited in the period of the INSERT.';
COMMENT ON COLUMN keyvault.usage_records.id IS 'A UUID version 7, made by the INSERT unless it gives one.';
COMMENT ON COLUMN keyvault.usage_records.provider IS 'Whose service was used; NULL: not known, or none. Where the row is priced by its model, whose price it was.';
COMMENT ON COLUMN keyvault.usage_records.model IS 'The model that was used, at most 255 bytes, as provider; NULL: none is named.';
COMMENT ON COLUMN keyvault.usage_records.request_id IS 'The request whose answer this is; NULL: not a provider call.';
COMMENT ON COLUMN keyvault.usage_records.api_key_id IS 'The API key that the call used; NULL: not known, or a key for the call alone.';
COMMENT ON COLUMN keyvault.usage_records.issued_key_id IS 'The issued key that the use came with, as the application states it, for budgets.';
COMMENT ON COLUMN keyvault.usage_records.idempotency_key IS 'The caller''s own name for the use, for reference: record_usage() sees that it is recorded once, an INSERT does not.';
COMMENT ON COLUMN keyvault.usage_records.metadata IS 'The application''s own notes; erase_user empties them.';
COMMENT ON COLUMN keyvault.usage_records.type IS 'chat, api, automation, or the application''s own word of 1 to 63 bytes.';
COMMENT ON COLUMN keyvault.usage_records.payer IS 'Whose key was used: user, its own, or platform.';
COMMENT ON COLUMN keyvault.usage_records.input_tokens IS 'Tokens read, cached ones included.';
COMMENT ON COLUMN keyvault.usage_records.cached_tokens IS 'The part of input_tokens that came from the provider''s cache.';
COMMENT ON COLUMN keyvault.usage_records.output_tokens IS 'Tokens written, reasoning included.';
COMMENT ON COLUMN keyvault.usage_records.tokens IS 'All tokens together. Each count of a record is at most 1000000000000.';
COMMENT ON COLUMN keyvault.usage_records.credits IS
    'Credits debited by this row. An INSERT that leaves them out has the row priced, by its model and tokens or by the cost_usd it gives.';
COMMENT ON COLUMN keyvault.usage_records.credits_overrun IS
    'Credits a provider call cost beyond what the user had left, or that its answer claims beyond what is believed; not debited.';
COMMENT ON COLUMN keyvault.usage_records.cost_usd IS 'What the provider charges for it, in USD.';
COMMENT ON COLUMN keyvault.usage_records.reasoning_tokens IS 'The part of output_tokens that the model spent on thinking.';
COMMENT ON COLUMN keyvault.usage_records.units IS 'What is not counted in tokens: images, seconds, pages; model_prices.unit says what.';
COMMENT ON COLUMN keyvault.usage_records.member_id IS 'Who of an organization used it, for budgets.';
COMMENT ON COLUMN keyvault.usage_records.hold_id IS 'The hold, or the request, that this row settled. Budgets count such a row and do not refuse it.';
COMMENT ON COLUMN keyvault.usage_records.price IS
    'The price that was used: provider, model, valid_from, USD per million tokens, per request and per unit, the context tier, and what made credits of it; as unknown, what the plan did without a price; as claimed, what an answer states beyond what is believed. NULL for a row with credits of its own, and for a call that was charged as estimated.';
COMMENT ON COLUMN keyvault.usage_records.debit_tag IS
    'Names the transaction that debited the row: 15 bits of the installation, 48 of the transaction id. A row that arrives with another transaction''s tag, by pg_restore or logical replication, is not debited again.';

CREATE TABLE keyvault.usage_records_default PARTITION OF keyvault.usage_records DEFAULT;
COMMENT ON TABLE keyvault.usage_records_default IS 'Usage of months that have no partition of their own.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.usage_records_default', '');

ALTER TABLE keyvault.usage_records ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.usage_records FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.usage_records FOR SELECT
    USING ((SELECT keyvault._may_read_all_usage()));
CREATE POLICY record_for_any_user ON keyvault.usage_records FOR INSERT
    WITH CHECK ((SELECT keyvault._may_act_for_any_user()));
ALTER TABLE keyvault.usage_records_default ENABLE ROW LEVEL SECURITY;

-- The row trigger, which every partition inherits, adds up per user; the statement trigger
-- debits each user once, in user_id order. A partition needs a statement trigger of its own
-- for rows inserted into it by name.
CREATE FUNCTION keyvault._collect_debit() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_collect_debit';
COMMENT ON FUNCTION keyvault._collect_debit() IS 'Row trigger of usage_records: checks the row, and adds its credits to what its statement owes. Error: 23514.';

CREATE FUNCTION keyvault._flush_debits() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_flush_debits';
COMMENT ON FUNCTION keyvault._flush_debits() IS 'Statement trigger of usage_records: debits what its statement owes. Errors: KV001, 22023.';

CREATE FUNCTION keyvault._price_usage() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_price_usage';
COMMENT ON FUNCTION keyvault._price_usage() IS
    'Row trigger of usage_records: prices a row without credits. Error: 22023 for an unknown model on a plan that refuses it.';

CREATE FUNCTION keyvault._refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.metadata = '{}' AND to_jsonb(NEW) - 'metadata' = to_jsonb(OLD) - 'metadata' THEN
            RETURN NEW;
        END IF;
    -- A month that was detached is a table of its own, which whoever keeps it may empty.
    ELSIF TG_OP = 'TRUNCATE' AND TG_RELID <> 'keyvault.usage_records'::regclass
          AND NOT EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = TG_RELID AND i.inhparent = 'keyvault.usage_records'::regclass)
    THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION 'usage records are append-only'
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = 'Correct a record with a further one; retire old months by detaching their partition.';
END $$;
COMMENT ON FUNCTION keyvault._refuse_change() IS 'Trigger that refuses UPDATE, DELETE and TRUNCATE of usage_records with 55000; only metadata may be emptied, as erase_user does.';

CREATE TRIGGER collect_debit AFTER INSERT ON keyvault.usage_records
    FOR EACH ROW EXECUTE FUNCTION keyvault._collect_debit();
ALTER TABLE keyvault.usage_records ENABLE ALWAYS TRIGGER collect_debit;
-- In C, without WHEN: PostgreSQL would plan a condition anew for every statement.
CREATE TRIGGER price_usage BEFORE INSERT ON keyvault.usage_records
    FOR EACH ROW EXECUTE FUNCTION keyvault._price_usage();
ALTER TABLE keyvault.usage_records ENABLE ALWAYS TRIGGER price_usage;
CREATE TRIGGER refuse_change BEFORE UPDATE OR DELETE ON keyvault.usage_records
    FOR EACH ROW EXECUTE FUNCTION keyvault._refuse_change();
ALTER TABLE keyvault.usage_records ENABLE ALWAYS TRIGGER refuse_change;

CREATE FUNCTION keyvault._guard_partition(partition regclass) RETURNS void
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER flush_debits AFTER INSERT ON %s EXECUTE FUNCTION keyvault._flush_debits()', partition);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER flush_debits', partition);
    EXECUTE format('CREATE TRIGGER refuse_truncate BEFORE TRUNCATE ON %s EXECUTE FUNCTION keyvault._refuse_change()', partition);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER refuse_truncate', partition);
    -- Not an index of the parent: a dump would make the partitions' ones again that ATTACH has made.
    IF partition <> 'keyvault.usage_records'::regclass THEN
        EXECUTE format('CREATE INDEX ON %s USING brin (debit_tag) WITH (pages_per_range = 32, autosummarize = on)', partition);
    END IF;
END $$;
COMMENT ON FUNCTION keyvault._guard_partition(regclass) IS
    'Gives a table of usage records what partitions do not inherit: the statement triggers, and an index by which the roll-up finds new rows.';
SELECT keyvault._guard_partition('keyvault.usage_records');
SELECT keyvault._guard_partition('keyvault.usage_records_default');
