-- Several managers on one database. The same rules as in 0001.

-- One row a manager. No clock of one is compared with another's: it lives as long as others see its beat grow.
CREATE TABLE manager (
    id TEXT NOT NULL PRIMARY KEY,
    addresses TEXT NOT NULL,             -- JSON array: where agents reach it
    beat BIGINT NOT NULL,                -- grows while it runs
    is_up BIGINT NOT NULL,               -- 0 once it has ended, or the others have given it up
    seen_ms BIGINT NOT NULL              -- its last beat, by its own clock
);

-- Whoever appends to the audit log holds this row until he commits.
INSERT INTO counter (name, value) VALUES ('audit', 0);
