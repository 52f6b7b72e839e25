//! Settings of the agent: `agent.toml` in its state folder. Without the file, the defaults hold; with one that is
//! not right the agent works all the same, as [`Config::cautious`] says, and tells of it.

use std::{fs, io, time::Duration};

use serde::Deserialize;
use tm_protocol::log::Format;

use crate::{paths::Paths, vault};

/// What can be set, checked.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Config {
    /// How much the vault keeps, and for how long.
    pub(crate) vault: vault::Limits,
    /// How the log is written.
    pub(crate) log_format: Format,
}

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read `{path}`")]
    Read { path: String, source: io::Error },
    #[error("`{path}` is not valid: {message}")]
    Invalid { path: String, message: String },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    #[serde(default)]
    vault: RawVault,
    /// `text` or `json`.
    log_format: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawVault {
    /// A size (`5GiB`).
    quota: Option<String>,
    /// A duration (`90d`).
    retention: Option<String>,
}

impl Config {
    /// Reads the settings of a state folder.
    ///
    /// # Errors
    /// If there is a file and it is not right.
    pub(crate) fn load(paths: &Paths) -> Result<Self, ConfigError> {
        let file = paths.config();
        let path = file.display().to_string();
        match fs::read_to_string(&file) {
            Ok(text) => Self::parse(&text).map_err(|message| ConfigError::Invalid { path, message }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// What holds where nobody knows what was meant: the defaults, and nothing is removed for its age.
    pub(crate) fn cautious() -> Self {
        let mut config = Self::default();
        config.vault.retention = Duration::MAX;
        config
    }

    fn parse(text: &str) -> Result<Self, String> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| error.to_string())?;
        let mut config = Self::default();
        if let Some(text) = raw.vault.quota {
            config.vault.quota_bytes =
                size(&text).ok_or_else(|| format!("vault.quota: `{text}` is no size such as 5GiB"))?;
        }
        if let Some(text) = raw.vault.retention {
            config.vault.retention = duration(&text)
                .ok_or_else(|| format!("vault.retention: `{text}` is no duration such as 90d"))?;
        }
        if let Some(word) = raw.log_format {
            config.log_format = Format::from_word(&word)
                .ok_or_else(|| format!("log_format: `{word}` is not {}", Format::WORDS))?;
        }
        Ok(config)
    }
}

/// A whole number and `KiB`, `MiB`, `GiB` or `TiB`.
fn size(text: &str) -> Option<u64> {
    let (number, unit) = split(text)?;
    let factor: u64 = match unit {
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(factor)
}

/// A whole number and `s`, `m`, `h` or `d`.
fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = split(text)?;
    let factor: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return None,
    };
    number.checked_mul(factor).map(Duration::from_secs)
}

fn split(text: &str) -> Option<(u64, &str)> {
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at_checked(at)?;
    Some((number.parse().ok()?, unit.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_have_units_and_unknown_ones_are_refused() {
        let config = Config::parse("[vault]\nquota = \"2 MiB\"\nretention = \"36h\"").unwrap();
        assert_eq!(config.vault.quota_bytes, 2 << 20);
        assert_eq!(config.vault.retention, Duration::from_secs(36 * 3600));
        assert_eq!(Config::parse("log_format = \"json\"").unwrap().log_format, Format::Json);
        assert_eq!(Config::parse("").unwrap().log_format, Format::Text);
        assert_eq!(Config::parse("").unwrap().vault.quota_bytes, vault::Limits::default().quota_bytes);
        for text in [
            "[vault]\nquota = 5",
            "[vault]\nquota = \"5\"",
            "[vault]\nquota = \"5 GB\"",
            "[vault]\nquota = \"99999999999 TiB\"",
            "[vault]\nretention = \"soon\"",
            "[vault]\nretention = \"-1d\"",
            "[vaults]",
            "log_format = \"xml\"",
            "log_format = true",
            "quota = \"5GiB\"",
        ] {
            assert!(Config::parse(text).is_err(), "{text}");
        }
    }
}
