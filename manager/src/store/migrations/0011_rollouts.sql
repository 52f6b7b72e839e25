-- Groups by name, and versions of patterns that reach a fleet in waves. The same rules as in 0001.

-- Groups that were made; one that an endpoint or a token is in, and `default`, there are without a row.
CREATE TABLE endpoint_group (
    name TEXT NOT NULL PRIMARY KEY,
    created_by TEXT NOT NULL,
    created_ms BIGINT NOT NULL
);

-- One version of a pattern on its way. Of one digest at most one is not withdrawn; a listed version without one
-- reaches all.
CREATE TABLE rollout (
    id TEXT NOT NULL PRIMARY KEY,        -- time-ordered; decides, with an endpoint's id, in which share it is
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    previous_sha256 TEXT,                -- what the name meant before
    group_name TEXT,                     -- NULL: every group
    waves TEXT NOT NULL,                 -- JSON array of shares, in hundredths of a percent, growing
    wave BIGINT NOT NULL,                -- which of them it has come to, from 1
    state TEXT NOT NULL,
    brake_share BIGINT NOT NULL,         -- of the endpoints that have looked with it, in hundredths of a percent
    is_brake_off BIGINT NOT NULL,
    every_ms BIGINT,                     -- how long a wave takes; NULL: a person says when
    next_ms BIGINT,                      -- when the next one begins
    started_by TEXT NOT NULL,
    started_ms BIGINT NOT NULL,
    changed_ms BIGINT NOT NULL,
    stopped_code TEXT,
    stopped_reason TEXT
);
CREATE INDEX rollout_by_digest ON rollout (sha256, state);
CREATE INDEX rollout_by_name ON rollout (name, started_ms);
CREATE INDEX rollout_by_state ON rollout (state);

-- Who has looked with it, and found something.
CREATE TABLE rollout_endpoint (
    rollout_id TEXT NOT NULL REFERENCES rollout (id) ON DELETE CASCADE,
    endpoint_id TEXT NOT NULL REFERENCES endpoint (id) ON DELETE CASCADE,
    is_hit BIGINT NOT NULL,
    PRIMARY KEY (rollout_id, endpoint_id)
);
CREATE INDEX rollout_endpoint_by_hit ON rollout_endpoint (rollout_id, is_hit);

-- Whoever counts for a brake or moves a rollout holds this row until he commits.
INSERT INTO counter (name, value) VALUES ('rollout', 0);
