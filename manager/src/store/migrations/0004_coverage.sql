-- Signed receipts, and what was looked at when. The same rules as in 0001.

-- SubjectPublicKeyInfo (DER) in base64; NULL for certificates of before there were receipts.
ALTER TABLE certificate ADD COLUMN public_key TEXT;

-- One path that a scan that was begun was ordered for, when the scan ended.
CREATE TABLE covered (
    task_id TEXT NOT NULL REFERENCES task (id) ON DELETE CASCADE,
    endpoint_id TEXT NOT NULL REFERENCES endpoint (id) ON DELETE CASCADE,
    path TEXT NOT NULL,                  -- hexadecimal, without superfluous slashes and dots
    is_whole BIGINT NOT NULL,            -- 1 if it went through and left no gap
    looked_ms BIGINT NOT NULL,           -- when it began, or earlier
    PRIMARY KEY (task_id, path)
);
CREATE INDEX covered_by_endpoint ON covered (endpoint_id, path, is_whole, looked_ms);
