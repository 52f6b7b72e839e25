-- Cleanup, restore, incidents, threat events. The same rules as in 0001.

-- Numbers that have to grow in the order of commits: whoever takes one holds its row until he commits.
CREATE TABLE counter (
    name TEXT NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO counter (name, value) VALUES ('event', 0);

ALTER TABLE task ADD COLUMN dry_run BIGINT NOT NULL DEFAULT 0;
ALTER TABLE task ADD COLUMN sent_ms BIGINT;      -- when it was first about to be handed to its agent
ALTER TABLE task ADD COLUMN cancel_ms BIGINT;    -- when somebody called it off

-- One endpoint's unit of mitigation work. There is one open incident for an endpoint, pattern and rule.
CREATE TABLE incident (
    id TEXT NOT NULL PRIMARY KEY,
    endpoint_id TEXT NOT NULL REFERENCES endpoint (id) ON DELETE CASCADE,
    pattern TEXT NOT NULL,               -- its name, or its digest where it has none here
    rule TEXT NOT NULL,
    state TEXT NOT NULL,
    before TEXT NOT NULL,                -- the state to which a cleanup that tried nothing gives it back
    detail TEXT NOT NULL,                -- why it is unresolved: the first item's code; else empty
    path BYTEA NOT NULL,                 -- of the first detection
    opened_ms BIGINT NOT NULL,
    changed_ms BIGINT NOT NULL,
    task_id TEXT                         -- the task that was ordered for it last
);
CREATE UNIQUE INDEX incident_open ON incident (endpoint_id, pattern, rule)
    WHERE state IN ('awaiting-cleanup', 'cleaning', 'unresolved');
CREATE INDEX incident_by_endpoint ON incident (endpoint_id, opened_ms);
CREATE INDEX incident_by_state ON incident (state, opened_ms);
CREATE INDEX incident_by_age ON incident (opened_ms);

-- Which tasks work or worked on which incidents; a large incident needs several.
CREATE TABLE task_incident (
    task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
    incident_id TEXT NOT NULL REFERENCES incident (id) ON DELETE CASCADE,
    PRIMARY KEY (task_id, incident_id)
);
CREATE INDEX task_incident_by_incident ON task_incident (incident_id);

ALTER TABLE detection ADD COLUMN incident_id TEXT;
ALTER TABLE detection ADD COLUMN settled_ms BIGINT;   -- when a cleanup removed it or found it gone
ALTER TABLE detection ADD COLUMN vault_id TEXT;       -- where its file was last put
ALTER TABLE detection ADD COLUMN refusal TEXT;        -- the code with which a cleanup last left it as it is
CREATE INDEX detection_by_key ON detection (endpoint_id, identity);
CREATE INDEX detection_by_incident ON detection (incident_id, settled_ms, identity);
CREATE INDEX detection_by_vault ON detection (vault_id);

-- One item of a cleanup or a restore, and what came of it.
CREATE TABLE task_item (
    task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
    ordinal BIGINT NOT NULL,             -- from 1 within the task
    identity TEXT NOT NULL,              -- names the item: a task that goes on after a crash repeats itself
    path BYTEA NOT NULL,
    vault_id TEXT,
    sha256 TEXT,
    size BIGINT NOT NULL,
    verdict TEXT NOT NULL,
    failure TEXT,                        -- JSON
    notes TEXT NOT NULL,                 -- JSON
    detections TEXT NOT NULL,            -- JSON array of keys
    PRIMARY KEY (task_id, ordinal),
    UNIQUE (task_id, identity)
);

-- What the endpoints' vaults hold, as their agents last said.
CREATE TABLE vault_item (
    id TEXT NOT NULL PRIMARY KEY,        -- time-ordered; an id belongs to the endpoint that named it first
    endpoint_id TEXT NOT NULL REFERENCES endpoint (id) ON DELETE CASCADE,
    path BYTEA NOT NULL,
    sha256 TEXT NOT NULL,
    size BIGINT NOT NULL,
    vaulted_ms BIGINT NOT NULL
);
CREATE INDEX vault_item_by_endpoint ON vault_item (endpoint_id, id);

-- The Threat Event Log. It outlives what it tells of.
CREATE TABLE event (
    id BIGINT NOT NULL PRIMARY KEY,      -- grows in the order of commits
    at_ms BIGINT NOT NULL,
    endpoint_id TEXT NOT NULL,
    host TEXT NOT NULL,                  -- as it was
    kind TEXT NOT NULL,
    status TEXT NOT NULL,
    detail TEXT NOT NULL,
    message TEXT NOT NULL,
    task_id TEXT,
    incident_id TEXT
);
CREATE INDEX event_by_endpoint ON event (endpoint_id, id);
CREATE INDEX event_by_kind ON event (kind, id);
CREATE INDEX event_by_status ON event (status, id);
CREATE INDEX event_by_kind_and_status ON event (kind, status, id);
CREATE INDEX event_by_time ON event (at_ms, id);
