-- One schema for SQLite and PostgreSQL. Ids and digests are text, times milliseconds since 1970 (BIGINT),
-- truth values 0/1 (BIGINT), structured values JSON text. No column relies on an engine's own types.

CREATE TABLE meta (
    key TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE account (
    name TEXT NOT NULL PRIMARY KEY,
    role TEXT NOT NULL,
    token_digest TEXT NOT NULL UNIQUE,
    created_ms BIGINT NOT NULL,
    last_used_ms BIGINT
);

CREATE TABLE audit (
    sequence BIGINT NOT NULL PRIMARY KEY,
    at_ms BIGINT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL
);

CREATE TABLE enrollment_token (
    id TEXT NOT NULL PRIMARY KEY,
    secret_digest TEXT NOT NULL UNIQUE,
    group_name TEXT NOT NULL,
    uses BIGINT NOT NULL,
    used BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,
    revoked_ms BIGINT
);

CREATE TABLE endpoint (
    id TEXT NOT NULL PRIMARY KEY,
    host TEXT NOT NULL,
    host_key TEXT NOT NULL,              -- the host name in lower case, for searches
    group_name TEXT NOT NULL,
    agent_version TEXT NOT NULL,
    enrolled_ms BIGINT NOT NULL,
    token_id TEXT NOT NULL,
    last_seen_ms BIGINT,
    manager_id TEXT,                     -- who holds its session; NULL while it is away
    session_epoch BIGINT NOT NULL,       -- counts sessions: a late "closed" of an older one changes nothing
    boot_id TEXT,
    task_kinds TEXT NOT NULL,            -- JSON array of TaskKind numbers
    inventory TEXT,                      -- JSON
    failure_code TEXT,
    failure_message TEXT,
    failure_ms BIGINT,
    stream TEXT,                         -- the report stream that stored_through counts in
    stored_through BIGINT NOT NULL
);
CREATE INDEX endpoint_by_host ON endpoint (host_key);
CREATE INDEX endpoint_by_group ON endpoint (group_name);
CREATE INDEX endpoint_by_manager ON endpoint (manager_id);

CREATE TABLE endpoint_address (
    endpoint_id TEXT NOT NULL REFERENCES endpoint (id) ON DELETE CASCADE,
    address_key TEXT NOT NULL,           -- tm_protocol::search::address_key: text order is address order
    address TEXT NOT NULL,
    PRIMARY KEY (endpoint_id, address_key)
);
CREATE INDEX endpoint_address_by_key ON endpoint_address (address_key);

CREATE TABLE certificate (
    serial TEXT NOT NULL PRIMARY KEY,    -- lower-case hex
    endpoint_id TEXT NOT NULL REFERENCES endpoint (id) ON DELETE CASCADE,
    issued_ms BIGINT NOT NULL,
    not_after_ms BIGINT NOT NULL,
    revoked_ms BIGINT
);
CREATE INDEX certificate_by_endpoint ON certificate (endpoint_id);

CREATE TABLE pattern (
    sha256 TEXT NOT NULL PRIMARY KEY,    -- names the bytes in the blob folder
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    size BIGINT NOT NULL,
    rules BIGINT NOT NULL,
    warnings TEXT NOT NULL,              -- JSON array
    imported_by TEXT NOT NULL,
    imported_ms BIGINT NOT NULL,
    import_number BIGINT NOT NULL        -- the newest import under a name is the one the name means
);
CREATE INDEX pattern_by_name ON pattern (name);

CREATE TABLE task (
    id TEXT NOT NULL PRIMARY KEY,
    endpoint_id TEXT NOT NULL REFERENCES endpoint (id) ON DELETE CASCADE,
    kind TEXT NOT NULL,
    spec TEXT NOT NULL,                  -- JSON, of store::tasks' own making
    state TEXT NOT NULL,
    code TEXT,
    message TEXT,
    progress TEXT,                       -- JSON
    result TEXT,                         -- JSON
    issuer TEXT NOT NULL,
    reason TEXT NOT NULL,
    created_ms BIGINT NOT NULL,
    expires_ms BIGINT NOT NULL,          -- when it expires if its agent has not taken it
    deadline_ms BIGINT NOT NULL,         -- how long it may run, a duration
    started_ms BIGINT,
    finished_ms BIGINT
);
CREATE INDEX task_by_endpoint ON task (endpoint_id, state);
CREATE INDEX task_by_state ON task (state, expires_ms);
CREATE INDEX task_by_age ON task (created_ms);

CREATE TABLE detection (
    task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
    ordinal BIGINT NOT NULL,             -- from 1 within the task
    endpoint_id TEXT NOT NULL,
    path BYTEA NOT NULL,
    member TEXT NOT NULL,                -- JSON array of base64 texts
    pattern_sha256 TEXT NOT NULL,
    rule TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    size BIGINT NOT NULL,
    found_ms BIGINT NOT NULL,
    identity TEXT NOT NULL,              -- digest of what was found where: a scan that is begun again repeats itself
    PRIMARY KEY (task_id, ordinal),
    UNIQUE (task_id, identity)
);
CREATE INDEX detection_by_endpoint ON detection (endpoint_id);
