-- The debit's own way to the balance, and balances in several slots.
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE EXTENSION IF NOT EXISTS keyvault CASCADE;
CREATE VIEW pg_temp.slots AS
SELECT user_id, count(*) AS slots, sum(credits_used) AS used, max(credits_lent) AS lent,
       sum(monthly_credits) FILTER (WHERE slot > 0) AS in_slots, max(notice_at) AS notice_at
  FROM keyvault.credit_balances GROUP BY user_id;
INSERT INTO keyvault.plans (plan, monthly_credits) VALUES ('bal_plan', 1000);
SELECT keyvault.upsert_user('bal_a', plan => 'bal_plan') AS a, keyvault.upsert_user('bal_b', plan => 'enterprise') AS b \gset

-- Split: three quarters of the room go to 32 slots.
UPDATE keyvault.credit_balances SET notice_at = NULL WHERE user_id LIKE 'bal_%';
SELECT keyvault._split_balance('bal_a', 0.1);
SELECT * FROM pg_temp.slots WHERE user_id = 'bal_a';
-- again: nothing more
SELECT keyvault._split_balance('bal_a', 0);
SELECT * FROM pg_temp.slots WHERE user_id = 'bal_a';
-- debits go to a slot, and the views know them
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_a', 0.5);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_a', 0.5);
SELECT count(*) FILTER (WHERE slot = 0) AS in_slot_0, count(*) FILTER (WHERE slot > 0) AS in_others
  FROM keyvault.credit_balances WHERE user_id = 'bal_a' AND credits_used > 0;
SELECT monthly_credits, credits_used, credits_remaining FROM keyvault.credit_status WHERE user_id = 'bal_a';
-- none are debited without a write
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_a', 0);
-- one that fits in no slot, with room for as many more, makes the balance one row again
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_a', 20);
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_a', 43);
SELECT * FROM pg_temp.slots WHERE user_id = 'bal_a';
-- the last credit of a split balance is spent, and no more
SELECT keyvault._split_balance('bal_a', 0.1);
INSERT INTO keyvault.usage_records (user_id, credits) SELECT 'bal_a', 1 FROM generate_series(1, 36);
DO $$ BEGIN FOR i IN 1 .. 900 LOOP INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_a', 1); END LOOP; END $$;
SELECT * FROM pg_temp.slots WHERE user_id = 'bal_a';
\set VERBOSITY sqlstate
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_a', 0.000001);
\set VERBOSITY terse
-- parts that would be small beside the amount are not made
SELECT keyvault._split_balance('bal_a', 0.000001);
SELECT slots FROM pg_temp.slots WHERE user_id = 'bal_a';

-- Nothing is lent beyond the next threshold.
UPDATE keyvault.credit_balances SET credits_used = 100, notice_at = 500 WHERE user_id = 'bal_a';
SELECT keyvault._split_balance('bal_a', 0.01);
SELECT * FROM pg_temp.slots WHERE user_id = 'bal_a';
SELECT (keyvault._gather_slots('bal_a')).notice_at;
SELECT * FROM pg_temp.slots WHERE user_id = 'bal_a';

-- An unlimited balance.
SELECT keyvault._split_balance('bal_b', 1000000);
SELECT * FROM pg_temp.slots WHERE user_id = 'bal_b';
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_b', 1000000);
SELECT * FROM pg_temp.slots WHERE user_id = 'bal_b';
SELECT keyvault.set_plan('bal_b', 'pro');
SELECT slots, used, lent FROM pg_temp.slots WHERE user_id = 'bal_b';
SELECT credits_remaining FROM keyvault.credit_status WHERE user_id = 'bal_b';

-- What an UPDATE would do beside the write is done: an administrator's trigger, index and CHECK.
SELECT keyvault.upsert_user('bal_c', plan => 'bal_plan') AS c \gset
CREATE FUNCTION pg_temp.tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'used %', NEW.credits_used; RETURN NEW; END $$;
CREATE TRIGGER tell BEFORE UPDATE OF credits_used ON keyvault.credit_balances FOR EACH ROW EXECUTE FUNCTION pg_temp.tell();
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_c', 3);
ALTER TABLE keyvault.credit_balances DISABLE TRIGGER tell;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_c', 3);
DROP TRIGGER tell ON keyvault.credit_balances;
CREATE INDEX bal_used ON keyvault.credit_balances (credits_used) WHERE credits_used > 5;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_c', 3);
SET enable_seqscan = off;
SELECT user_id, credits_used FROM keyvault.credit_balances WHERE credits_used > 5 AND user_id = 'bal_c';
RESET enable_seqscan;
DROP INDEX keyvault.bal_used;
ALTER TABLE keyvault.credit_balances ADD CONSTRAINT bal_check CHECK (credits_used < 10 OR user_id <> 'bal_c');
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('bal_c', 3);
ALTER TABLE keyvault.credit_balances DROP CONSTRAINT bal_check;
SELECT used FROM pg_temp.slots WHERE user_id = 'bal_c';

-- Users whose ids have one hash, by which balances are found, have their own balances.
SELECT hashtext('user_87903') = hashtext('user_104901') AS one_hash;
INSERT INTO keyvault.usage_records (user_id, credits) VALUES ('user_87903', 3), ('user_104901', 5), ('user_87903', 1);
SELECT user_id, credits_used FROM keyvault.credit_balances WHERE user_id IN ('user_87903', 'user_104901') ORDER BY 1;
