-- Digest lists among the patterns. The same rules as in 0001.

-- How many digests a list holds; all 0 for rules.
ALTER TABLE pattern ADD COLUMN md5 BIGINT NOT NULL DEFAULT 0;
ALTER TABLE pattern ADD COLUMN sha1 BIGINT NOT NULL DEFAULT 0;
ALTER TABLE pattern ADD COLUMN sha256s BIGINT NOT NULL DEFAULT 0;
