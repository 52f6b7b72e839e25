-- Threat events on their way to other systems. The same rules as in 0001.

-- One row for each exporter that a configuration has ever named.
CREATE TABLE exporter (
    name TEXT NOT NULL PRIMARY KEY,
    kind TEXT NOT NULL,                  -- syslog, webhook
    receiver TEXT NOT NULL,              -- where it goes, without secrets; for people
    done BIGINT NOT NULL,                -- number of the last event that its receiver has, or that is not for it
    sent_event BIGINT,                   -- number of the last event that its receiver has
    sent_ms BIGINT,                      -- when it took that
    error TEXT,                          -- why it does not go on; NULL when it does
    failing_ms BIGINT,                   -- since when
    holder TEXT                          -- the manager that exports; another takes over when that one is not up
);
