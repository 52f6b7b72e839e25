-- Revocation and renewal. The same rules as in 0001.

ALTER TABLE endpoint ADD COLUMN revoked_ms BIGINT;      -- when its agent was shut out for ever
CREATE INDEX endpoint_by_revocation ON endpoint (revoked_ms);

-- When it was first shown on a link: from then on the older ones of its endpoint are revoked.
ALTER TABLE certificate ADD COLUMN used_ms BIGINT;
