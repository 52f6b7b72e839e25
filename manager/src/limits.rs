//! How much one agent may hand in: the `[limits]` of `manager.toml`.
//!
//! **Invariant:** a limit delays and never drops: an agent above it is read more slowly, and is told nothing
//! wrong. Only [`Limits::detections_per_task`] leaves something out, and what it leaves out is counted.

use serde::Deserialize;

use super::config::ConfigError;

/// A steady rate, and how much may come at once after a quiet time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rate {
    /// Per second, more than 0.
    pub(crate) per_second: f64,
    /// At once, at least 1.
    pub(crate) burst: f64,
}

/// What one agent may hand in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Limits {
    /// Messages of every kind.
    pub(crate) messages: Rate,
    /// Bytes of frames.
    pub(crate) bytes: Rate,
    /// Rows to store: a report counts as one and one for each detection or item in it.
    pub(crate) rows: Rate,
    /// The same over a day: what one agent can fill of the disk.
    pub(crate) daily_rows: Rate,
    /// Detections stored of one task.
    pub(crate) detections_per_task: u64,
    /// Bytes of patterns and files, of all agents together.
    pub(crate) bulk: Rate,
}

/// The table as it is written; what is left out has its default.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawLimits {
    messages_per_second: u64,
    messages_burst: u64,
    bytes_per_second: String,
    bytes_burst: String,
    rows_per_second: u64,
    rows_burst: u64,
    rows_per_day: u64,
    detections_per_task: u64,
    bulk_bytes_per_second: String,
}

impl Default for RawLimits {
    fn default() -> Self {
        Self {
            messages_per_second: 500,
            messages_burst: 2000,
            bytes_per_second: "4MiB".to_owned(),
            bytes_burst: "16MiB".to_owned(),
            rows_per_second: 1000,
            rows_burst: 10_000,
            rows_per_day: 2_000_000,
            detections_per_task: 1_000_000,
            bulk_bytes_per_second: "128MiB".to_owned(),
        }
    }
}

impl TryFrom<RawLimits> for Limits {
    type Error = ConfigError;

    fn try_from(raw: RawLimits) -> Result<Self, ConfigError> {
        let mebibyte = 1 << 20;
        let bytes = |key, text: &str| {
            byte_size(text).filter(|n| (mebibyte / 4..=mebibyte << 20).contains(n)).ok_or_else(|| {
                ConfigError::Value {
                    key,
                    value: text.to_owned(),
                    expected: "a size from `256KiB` to `1024GiB`",
                }
            })
        };
        let bulk = real(bytes("bulk_bytes_per_second", &raw.bulk_bytes_per_second)?);
        let daily = within("rows_per_day", raw.rows_per_day, 100_000, "a number from 100000 on")?;
        Ok(Self {
            messages: Rate {
                // Heartbeats, acknowledgements and outcomes have to get through.
                per_second: within("messages_per_second", raw.messages_per_second, 10, TEN)?,
                burst: within("messages_burst", raw.messages_burst, 10, TEN)?,
            },
            bytes: Rate {
                per_second: real(bytes("bytes_per_second", &raw.bytes_per_second)?),
                burst: real(bytes("bytes_burst", &raw.bytes_burst)?),
            },
            rows: Rate {
                per_second: within("rows_per_second", raw.rows_per_second, 10, TEN)?,
                burst: within("rows_burst", raw.rows_burst, 10, TEN)?,
            },
            daily_rows: Rate { per_second: daily / 86_400.0, burst: daily },
            detections_per_task: raw.detections_per_task.max(1),
            bulk: Rate { per_second: bulk, burst: bulk / 20.0 },
        })
    }
}

const TEN: &str = "a number from 10 to 1000000000";

fn within(key: &'static str, value: u64, least: u64, expected: &'static str) -> Result<f64, ConfigError> {
    if (least..=1_000_000_000).contains(&value) {
        Ok(real(value))
    } else {
        Err(ConfigError::Value { key, value: value.to_string(), expected })
    }
}

/// Exact up to 2^53, and a limit does not need to be exact.
#[expect(clippy::cast_precision_loss, reason = "limits are far below 2^53")]
fn real(n: u64) -> f64 {
    n as f64
}

fn byte_size(text: &str) -> Option<u64> {
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(at);
    let number: u64 = number.parse().ok()?;
    let shift = match unit {
        "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

impl Limits {
    /// What the limits mean, for `check-config`.
    pub(crate) fn explain(&self) -> String {
        format!(
            "One agent may hand in {} messages, {} KiB and {} rows a second ({} messages, {} KiB and {} rows at \
             once after a quiet time), and {} rows a day; above that it is read more slowly. Of one task, {} \
             detections are stored. Patterns and files travel at {} KiB a second, of all agents together.",
            self.messages.per_second,
            self.bytes.per_second / 1024.0,
            self.rows.per_second,
            self.messages.burst,
            self.bytes.burst / 1024.0,
            self.rows.burst,
            self.daily_rows.burst,
            self.detections_per_task,
            self.bulk.per_second / 1024.0,
        )
    }
}

/// The table as `init` writes it: the defaults, said but not set.
pub(crate) const TEMPLATE: &str = "\
# What one agent may hand in before it is read more slowly. Nothing is lost by these limits: an agent keeps
# what it has not handed in. The last one bounds what is stored of one task; what is left out is counted.
[limits]
# messages_per_second = 500
# messages_burst = 2000
# bytes_per_second = \"4MiB\"
# bytes_burst = \"16MiB\"
# rows_per_second = 1000
# rows_burst = 10000
# rows_per_day = 2000000
# detections_per_task = 1000000
# How fast patterns and files travel, of all agents together; tasks and heartbeats are not held up by them.
# bulk_bytes_per_second = \"128MiB\"
";

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The defaults.
    pub(crate) fn defaults() -> Limits {
        RawLimits::default().try_into().expect("the defaults are right")
    }

    #[test]
    fn the_written_table_says_the_defaults() {
        let text: String = TEMPLATE
            .lines()
            .filter_map(|line| line.strip_prefix("# ").filter(|l| l.contains(" = ")))
            .fold(String::new(), |text, line| text + line + "\n");
        assert_eq!(text.lines().count(), 9, "every key: {text}");
        let said: Limits = toml::from_str::<RawLimits>(&text).unwrap().try_into().unwrap();
        assert_eq!(said, defaults());
        assert!(
            said.explain().contains("500 messages, 4096 KiB and 1000 rows a second"),
            "{}",
            said.explain()
        );
    }

    #[test]
    fn wrong_limits_are_named() {
        for wrong in [
            "messages_per_second = 0",
            "messages_burst = 9",
            "rows_per_day = 99999",
            "bytes_per_second = \"4\"",
            "bytes_burst = \"1KiB\"",
            "bytes_burst = \"99999999999999GiB\"",
            "rows_burst = -1",
            "rows_burst = 20000000000",
            "row_burst = 100",
        ] {
            let read = toml::from_str::<RawLimits>(wrong).ok().map(Limits::try_from);
            assert!(!matches!(read, Some(Ok(_))), "{wrong}");
        }
    }
}
