-- What agents tell unasked is numbered in a stream of its own, beside their reports.

ALTER TABLE endpoint ADD COLUMN notices_through BIGINT NOT NULL DEFAULT 0;  -- counts in `stream`, as stored_through does
