-- Signed patterns. The same rules as in 0001.

-- The fleet's signed metadata as one text; one row at most. A change names the generation that it was made from.
CREATE TABLE trust (
    id BIGINT PRIMARY KEY,               -- always 1
    generation BIGINT NOT NULL,
    bundle TEXT NOT NULL
);

-- When a role listed it; NULL for a draft and for what is no longer listed. What came before there were
-- signatures is a draft.
ALTER TABLE pattern ADD COLUMN published_ms BIGINT;
