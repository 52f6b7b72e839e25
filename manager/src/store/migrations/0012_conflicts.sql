-- Agents that came with the identity of another one that answered. The same rules as in 0001.

CREATE TABLE conflict (
    id TEXT NOT NULL PRIMARY KEY,
    endpoint_id TEXT NOT NULL REFERENCES endpoint (id) ON DELETE CASCADE,
    key_digest TEXT NOT NULL,            -- SHA-256 of the key that it made for an identity of its own
    host TEXT NOT NULL,                  -- what it says of itself
    addresses TEXT NOT NULL,             -- JSON array
    boot_id TEXT NOT NULL,
    agent_version TEXT NOT NULL,
    first_ms BIGINT NOT NULL,
    seen_ms BIGINT NOT NULL,             -- grows while it is held
    approved_ms BIGINT,
    approved_as TEXT,                    -- the endpoint that it became
    renewed_ms BIGINT,                   -- when the first one was seen with a newer key than the copied one
    UNIQUE (endpoint_id, key_digest)
);
CREATE INDEX conflict_by_approval ON conflict (approved_ms, renewed_ms);
