-- Users' provider keys and what encrypts them.

CREATE TABLE keyvault.vault (
    vault_id   uuid PRIMARY KEY,
    only_row   boolean NOT NULL DEFAULT true UNIQUE CHECK (only_row),
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE keyvault.vault IS
    'The vault''s own name, made when the first key is stored and part of every secret''s associated data. One row.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.vault', '');

CREATE TABLE keyvault.master_keys (
    kek_id     bytea PRIMARY KEY CHECK (octet_length(kek_id) = 16),
    version    integer NOT NULL UNIQUE CHECK (version > 0),
    created_at timestamptz NOT NULL DEFAULT now(),
    status     text NOT NULL DEFAULT 'primary' CHECK (status IN ('primary', 'old', 'retired')),
    retired_at timestamptz
);
CREATE UNIQUE INDEX master_keys_primary ON keyvault.master_keys (status) WHERE status = 'primary';
COMMENT ON TABLE keyvault.master_keys IS
    'Master keys that have wrapped data keys of this vault, known by an id derived from the key, never the key itself.';
COMMENT ON COLUMN keyvault.master_keys.status IS
    'primary: wraps new data keys; old: an earlier one, which still opens some; retired: wraps nothing, and never will again.';
COMMENT ON COLUMN keyvault.master_keys.retired_at IS 'From when on no data key of this database needs it; backups of before do.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.master_keys', '');

CREATE TABLE keyvault.data_keys (
    user_id     text COLLATE "C" NOT NULL,
    version     integer NOT NULL CHECK (version > 0),
    data_key_id uuid NOT NULL,
    wrapped     bytea NOT NULL CHECK (octet_length(wrapped) BETWEEN 36 AND 1024),
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (user_id, version)
);
ALTER TABLE keyvault.data_keys ALTER COLUMN wrapped SET STORAGE PLAIN;
-- Which master key wraps what: rotation finds what is left by it.
CREATE INDEX data_keys_kek_id ON keyvault.data_keys (substr(wrapped, 9, 16), user_id, version);
CREATE INDEX data_keys_created_at ON keyvault.data_keys (created_at);
COMMENT ON TABLE keyvault.data_keys IS 'Each user''s data key, wrapped by a master key. The user '''' is the platform.';
COMMENT ON COLUMN keyvault.data_keys.wrapped IS 'D | 1 | suite | source | master key version (4) | kek_id (16) | nonce (12) | wrapped key (32) | tag (16).';
SELECT pg_catalog.pg_extension_config_dump('keyvault.data_keys', '');

CREATE FUNCTION keyvault._forget_data_keys() RETURNS trigger
    LANGUAGE c
    AS 'MODULE_PATHNAME', 'keyvault_forget_data_keys';
COMMENT ON FUNCTION keyvault._forget_data_keys() IS
    'Trigger of data_keys: has every process forget the data keys that it keeps unwrapped.';
CREATE TRIGGER forget_data_keys AFTER UPDATE OR DELETE OR TRUNCATE ON keyvault.data_keys
    EXECUTE FUNCTION keyvault._forget_data_keys();
ALTER TABLE keyvault.data_keys ENABLE ALWAYS TRIGGER forget_data_keys;

CREATE TABLE keyvault.api_keys (
    user_id      text COLLATE "C" NOT NULL,
    id           uuid NOT NULL,
    provider     text COLLATE "C" NOT NULL,
    name         text COLLATE "C" NOT NULL DEFAULT 'default' CHECK (octet_length(name) BETWEEN 1 AND 63),
    ciphertext   bytea NOT NULL CHECK (octet_length(ciphertext) BETWEEN 100 AND 8192),
    hint         text NOT NULL,
    fingerprint  bytea CHECK (octet_length(fingerprint) = 16),
    source       text NOT NULL DEFAULT 'user' CHECK (source IN ('user', 'platform', 'reference')),
    status       text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'failed')),
    expires_at   timestamptz,
    last_used_at timestamptz,
    last_verified_at timestamptz,
    rotated_at   timestamptz,
    created_at   timestamptz NOT NULL DEFAULT now(),
    updated_at   timestamptz NOT NULL DEFAULT now(),
    problem      text,
    use_count    bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (user_id, id),
    CONSTRAINT api_keys_user_id_provider_name_key UNIQUE (user_id, provider, name)
) WITH (fillfactor = 70);  -- room for the uses that are noted, so that no index grows by them
ALTER TABLE keyvault.api_keys ALTER COLUMN ciphertext SET STORAGE EXTERNAL;
ALTER TABLE keyvault.api_keys ALTER name SET STATISTICS 0, ALTER hint SET STATISTICS 0, ALTER problem SET STATISTICS 0;  -- as of users
CREATE INDEX api_keys_boxes ON keyvault.api_keys (user_id, id) WHERE fingerprint IS NULL;
-- The lookups' ways: all of a user's keys, and one by its name.
CREATE INDEX api_keys_user_id ON keyvault.api_keys USING hash (user_id);
CREATE INDEX api_keys_hash_of_name ON keyvault.api_keys
    USING hash (hashtextextended(user_id, hashtextextended(provider, hashtextextended(name, 0))));
COMMENT ON TABLE keyvault.api_keys IS 'Provider keys that users handed over, encrypted. The user '''' is the platform.';
COMMENT ON COLUMN keyvault.api_keys.ciphertext IS 'Secret record, or a sealed box that the worker has yet to make a record of: see "Formats" in doc/keyvault.md.';
COMMENT ON COLUMN keyvault.api_keys.hint IS 'Enough of the key for its owner to recognise it: at most three first and four last characters.';
COMMENT ON COLUMN keyvault.api_keys.fingerprint IS 'Keyed hash under the user''s own data key: equal for equal keys of one user, and only there. NULL for a sealed box.';
COMMENT ON COLUMN keyvault.api_keys.last_used_at IS 'When the key was last looked up or called with; written within keyvault.key_use_flush_interval.';
COMMENT ON COLUMN keyvault.api_keys.use_count IS 'How often the key was looked up or called with, platform and user alike; written as last_used_at is.';
COMMENT ON COLUMN keyvault.api_keys.problem IS 'Why a sealed box could not be opened, or no record made of it.';
COMMENT ON COLUMN keyvault.api_keys.status IS 'active; failed: the provider refused it when it was last used, or it came sealed and is none, as problem says.';
COMMENT ON COLUMN keyvault.api_keys.source IS 'user; platform: its own; reference: what is encrypted names where the key is kept.';
COMMENT ON COLUMN keyvault.api_keys.rotated_at IS 'When the value last changed.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.api_keys', '');

CREATE TABLE keyvault.key_replacements (
    user_id    text COLLATE "C" NOT NULL,
    id         uuid NOT NULL,
    status     text NOT NULL DEFAULT 'waiting' CHECK (status IN ('waiting', 'refused')),
    box        bytea CHECK (octet_length(box) BETWEEN 100 AND 8192),
    problem    text,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    PRIMARY KEY (user_id, id),
    FOREIGN KEY (user_id, id) REFERENCES keyvault.api_keys ON UPDATE CASCADE ON DELETE CASCADE,
    CHECK ((box IS NULL) = (status = 'refused'))
);
CREATE INDEX key_replacements_waiting ON keyvault.key_replacements (user_id, id) WHERE status = 'waiting';
COMMENT ON TABLE keyvault.key_replacements IS 'Sealed boxes that wait to take the place of a key, which goes on until then, and why those that could not did not.';
COMMENT ON COLUMN keyvault.key_replacements.id IS 'The id in api_keys of the key that is to be replaced.';
COMMENT ON COLUMN keyvault.key_replacements.status IS 'waiting: for the worker to open the box; refused: the box was bad, and is gone.';
COMMENT ON COLUMN keyvault.key_replacements.box IS 'Sealed box: see "Formats" in doc/keyvault.md.';
COMMENT ON COLUMN keyvault.key_replacements.problem IS 'Why the box was refused, or is not yet a record.';
COMMENT ON COLUMN keyvault.key_replacements.created_at IS 'When the box was stored.';
COMMENT ON COLUMN keyvault.key_replacements.expires_at IS 'When the key in the box is to expire; NULL for never.';
SELECT pg_catalog.pg_extension_config_dump('keyvault.key_replacements', '');

ALTER TABLE keyvault.vault ENABLE ROW LEVEL SECURITY;
ALTER TABLE keyvault.data_keys ENABLE ROW LEVEL SECURITY;
ALTER TABLE keyvault.api_keys ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.api_keys FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.api_keys FOR SELECT
    USING ((SELECT keyvault._may_administer()));

ALTER TABLE keyvault.key_replacements ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON keyvault.key_replacements FOR SELECT
    USING (user_id = (SELECT keyvault.current_user_id()));
CREATE POLICY read_by_access ON keyvault.key_replacements FOR SELECT
    USING ((SELECT keyvault._may_administer()));

CREATE FUNCTION keyvault.store_api_key(provider text, key text, name text = 'default', user_id text = NULL, expires_at timestamptz = NULL) RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_api_key';
COMMENT ON FUNCTION keyvault.store_api_key(text, text, text, text, timestamptz) IS
    'Encrypts and keeps a user''s key for a provider, replacing the one of the same name; returns its id. Pass the key as a bind parameter. Errors: KV004 no master key, KV005 the user''s data key cannot be opened, KV009 malformed key, 22004 and 22023 bad argument, 40001 retry, 42501 not allowed to act for user_id.';

CREATE FUNCTION keyvault.store_platform_key(provider text, key text, name text = 'default') RETURNS uuid
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_store_platform_key';
COMMENT ON FUNCTION keyvault.store_platform_key(text, text, text) IS
    'Encrypts and keeps the platform''s own key for a provider, used for users who bring none; returns its id. Access admin. Errors: KV004, KV009, 22023.';

CREATE FUNCTION keyvault.user_api_keys(user_id text = NULL) RETURNS jsonb
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_user_api_keys';
COMMENT ON FUNCTION keyvault.user_api_keys(text) IS
    'The user''s keys named ''default'' as {"provider": "key"}, {} when there is none; NULL is the acting user. Expired keys are left out; one that cannot be opened is left out with a warning KV005. Errors: KV004, 42501.';

CREATE FUNCTION keyvault.user_api_key(provider text, user_id text = NULL, name text = 'default') RETURNS text
    LANGUAGE c STABLE PARALLEL SAFE
    AS 'MODULE_PATHNAME', 'keyvault_user_api_key';
COMMENT ON FUNCTION keyvault.user_api_key(text, text, text) IS
    'The user''s key for a provider, NULL when there is none or it has expired. Errors: KV004, KV005 it cannot be opened, 22023 unknown provider, 42501.';

CREATE FUNCTION keyvault.delete_api_key(provider text, name text = 'default', user_id text = NULL) RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_delete_api_key';
COMMENT ON FUNCTION keyvault.delete_api_key(text, text, text) IS
    'Deletes a user''s key; true if there was one. Old row versions leave the disk with VACUUM, WAL and backups with their retention, encrypted all the while. Errors: 22023, 42501.';

CREATE FUNCTION keyvault.delete_platform_key(provider text, name text = 'default') RETURNS boolean
    LANGUAGE c VOLATILE PARALLEL UNSAFE
    AS 'MODULE_PATHNAME', 'keyvault_delete_platform_key';
COMMENT ON FUNCTION keyvault.delete_platform_key(text, text) IS
    'Deletes the platform''s key for a provider; true if there was one. Requests that would use it fail with KV003 from then on. Old row versions leave the disk as those of delete_api_key do. Access admin. Errors: 22004, 22023 unknown provider, 42501.';

CREATE VIEW keyvault.api_key_status WITH (security_invoker = true, security_barrier = true) AS
SELECT k.user_id, k.provider, k.name, k.hint, k.status, k.source, k.id,
       k.expires_at, k.last_used_at, k.last_verified_at, k.rotated_at, k.created_at,
       coalesce(m.calls, 0) AS calls_this_month,
       coalesce(m.cost_usd, 0) AS cost_usd_this_month,
       coalesce(w.problem, k.problem) AS problem, k.use_count, w.status AS replacement, w.created_at AS replacement_at
  FROM keyvault.api_keys k
  LEFT JOIN keyvault.key_replacements w ON w.user_id = k.user_id AND w.id = k.id
  LEFT JOIN LATERAL (
       SELECT count(*) AS calls, sum(r.cost_usd) AS cost_usd
         FROM keyvault.usage_records r
        WHERE r.user_id = k.user_id AND r.api_key_id = k.id
          AND r.created_at >= date_trunc('month', now(), 'UTC')) m ON true;
COMMENT ON VIEW keyvault.api_key_status IS
    'The acting user''s keys without their values: hint, status and this month''s calls (UTC). Where a sealed key is to take a key''s place, replacement says how that stands (waiting, refused), replacement_at when it was stored, and problem why not; status is the present key''s. Access admin sees every user''s.';
COMMENT ON COLUMN keyvault.api_key_status.user_id IS 'Whose key; '''' is the platform.';
COMMENT ON COLUMN keyvault.api_key_status.provider IS 'Whose service the key is for.';
COMMENT ON COLUMN keyvault.api_key_status.name IS 'Tells a user''s keys of a provider apart; default is used where none is named.';
COMMENT ON COLUMN keyvault.api_key_status.hint IS 'How the key begins and ends, for people.';
COMMENT ON COLUMN keyvault.api_key_status.status IS 'active; failed: the provider refused it when it was last used, or it came sealed and is none, as problem says.';
COMMENT ON COLUMN keyvault.api_key_status.source IS 'How it came.';
COMMENT ON COLUMN keyvault.api_key_status.id IS 'The id of the key, as usage_records.api_key_id has it.';
COMMENT ON COLUMN keyvault.api_key_status.expires_at IS 'From then on it is not used; NULL: never.';
COMMENT ON COLUMN keyvault.api_key_status.last_used_at IS 'When it was last opened, some seconds late; NULL: never.';
COMMENT ON COLUMN keyvault.api_key_status.last_verified_at IS 'When the provider last took it; NULL: never.';
COMMENT ON COLUMN keyvault.api_key_status.rotated_at IS 'When its value last changed.';
COMMENT ON COLUMN keyvault.api_key_status.created_at IS 'When it was first stored.';
COMMENT ON COLUMN keyvault.api_key_status.calls_this_month IS 'Usage records of the UTC month that used it.';
COMMENT ON COLUMN keyvault.api_key_status.cost_usd_this_month IS 'What the provider charges for them, in USD.';
COMMENT ON COLUMN keyvault.api_key_status.problem IS 'What is wrong with it, or with the key that is to take its place; NULL: nothing.';
COMMENT ON COLUMN keyvault.api_key_status.use_count IS 'How often it was opened.';
COMMENT ON COLUMN keyvault.api_key_status.replacement IS 'How a sealed key stands that is to take its place: waiting or refused; NULL: there is none.';
COMMENT ON COLUMN keyvault.api_key_status.replacement_at IS 'When that was stored.';
