-- Certificates: whose they are, and when their end was warned of. The same rules as in 0001.

-- SHA-256 of the authority's certificate; NULL until a manager of this version has started.
ALTER TABLE certificate ADD COLUMN authority TEXT;
-- At how many days before its end (30, then 7) that end was last warned of.
ALTER TABLE certificate ADD COLUMN warned_days BIGINT;
CREATE INDEX certificate_by_end ON certificate (not_after_ms);
