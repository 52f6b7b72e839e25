//! Settings of the agent: `agent.toml` in its state folder. Without the file, the defaults hold; with one that is
//! not right the agent works all the same, as [`Config::cautious`] says, and tells of it.
//!
//! Keys: `proxy` (`http://[user:password@]host:port`, the way to the managers), `[vault]` with `quota` and `retention`.
//!
//! **Invariant:** a password that others than the file's owner may read, or that another user than the agent's or root
//! has set, is not used.
//! **Invariant:** no message of this module holds a line of the file: it could be the one with the password.

use std::{
    fs::File,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use tm_protocol::log::Format;

use crate::{
    connection::proxy::Proxy,
    paths::{Paths, replace},
    vault,
};

/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// What can be set, checked.
#[derive(Debug, Clone, Default)]
pub(crate) struct Config {
    /// The way to the managers, if it is not the direct one.
    pub(crate) proxy: Option<Arc<Proxy>>,
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
    #[error(
        "`{0}` holds the proxy's password, and others may read it, or have written it: give it to root and take the \
         rights of others away (chmod 600)"
    )]
    Exposed(String),
    #[error("cannot keep the proxy in `{path}`")]
    Keep { path: String, source: io::Error },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    proxy: Option<String>,
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
        let Some((text, is_private)) = read(paths)? else { return Ok(Self::default()) };
        let path = || paths.config().display().to_string();
        let config = Self::parse(&text).map_err(|message| ConfigError::Invalid { path: path(), message })?;
        if !is_private && config.proxy.as_ref().is_some_and(|proxy| proxy.has_credentials()) {
            return Err(ConfigError::Exposed(path()));
        }
        Ok(config)
    }

    /// What holds where nobody knows what was meant: the defaults, and nothing is removed for its age. A proxy that
    /// is set rightly counts: a mistake elsewhere must not cut the endpoint off.
    pub(crate) fn cautious(paths: &Paths) -> Self {
        let mut config = Self::default();
        config.vault.retention = Duration::MAX;
        if let Ok(Some((text, is_private))) = read(paths) {
            let table = text.parse::<toml::Table>().unwrap_or_default();
            let proxy = table.get("proxy").and_then(|value| value.as_str()?.parse::<Proxy>().ok());
            config.proxy = proxy.filter(|proxy| is_private || !proxy.has_credentials()).map(Arc::new);
        }
        config
    }

    fn parse(text: &str) -> Result<Self, String> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| fault(text, &error))?;
        let mut config = Self::default();
        if let Some(text) = raw.proxy {
            config.proxy = Some(Arc::new(text.parse().map_err(|error| format!("proxy: {error}"))?));
        }
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

/// The file's text, and whether it is for the agent's user alone; `None` if there is no file.
fn read(paths: &Paths) -> Result<Option<(String, bool)>, ConfigError> {
    let file = paths.config();
    let path = file.display().to_string();
    let whole = || -> io::Result<(String, bool)> {
        let file = File::open(&file)?;
        let about = file.metadata()?;
        let mut text = String::new();
        file.take(MAX_FILE).read_to_string(&mut text)?;
        let owner = about.uid();
        let is_owned = owner == 0 || owner == rustix::process::geteuid().as_raw();
        Ok((text, is_owned && about.mode() & 0o077 == 0))
    };
    match whole() {
        Ok(read) => Ok(Some(read)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::Read { path, source }),
    }
}

/// What is wrong with a text, and in which line, without the line itself.
fn fault(text: &str, error: &toml::de::Error) -> String {
    let at = error.span().and_then(|span| text.get(..span.start));
    let line = at.map_or(1, |before| before.matches('\n').count() + 1);
    // The first line says what was expected; a value of the file that is repeated in it is one of ours.
    let message = error.message().lines().next().unwrap_or_default();
    format!("line {line}: {message}")
}

/// Sets the proxy of a state folder, for the agent and all its connections.
///
/// # Errors
/// If the file is not right, or the disk does not take it. It is then as it was.
pub(crate) fn keep_proxy(paths: &Paths, setting: &str) -> Result<(), ConfigError> {
    let path = || paths.config().display().to_string();
    let text = read(paths)?.map(|(text, _)| text).unwrap_or_default();
    let new = with_proxy(&text, setting);
    Config::parse(&new).map_err(|message| ConfigError::Invalid { path: path(), message })?;
    replace(&paths.config(), new.as_bytes()).map_err(|source| ConfigError::Keep { path: path(), source })
}

/// A text with another proxy in it.
fn with_proxy(text: &str, setting: &str) -> String {
    let line = format!("proxy = {}", toml::Value::from(setting));
    let is_key = |line: &&str| {
        line.trim_start().strip_prefix("proxy").is_some_and(|rest| rest.trim_start().starts_with('='))
    };
    // Top-level keys come before every table.
    let is_table = |line: &str| line.trim_start().starts_with('[');
    let top = text.lines().take_while(|line| !is_table(line)).filter(|line| !is_key(line));
    let tables = text.lines().skip_while(|line| !is_table(line));
    std::iter::once(line.as_str()).chain(top).chain(tables).flat_map(|line| [line, "\n"]).collect()
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
    use std::{
        fs::{self, Permissions},
        os::unix::fs::PermissionsExt as _,
    };

    use super::*;

    fn scratch() -> (Paths, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        (Paths::new(folder.path().to_path_buf()), folder)
    }

    fn at(config: &Config) -> Option<String> {
        config.proxy.as_ref().map(|proxy| proxy.address().to_string())
    }

    #[test]
    fn a_password_that_others_may_read_is_not_used() {
        let (paths, _folder) = scratch();
        assert_eq!(at(&Config::load(&paths).unwrap()), None);
        let write = |text: &str, mode| {
            fs::write(paths.config(), text).unwrap();
            fs::set_permissions(paths.config(), Permissions::from_mode(mode)).unwrap();
        };
        let secret = "proxy = \"http://u:geheim@p:1\"\n";
        write(secret, 0o600);
        assert_eq!(at(&Config::load(&paths).unwrap()).as_deref(), Some("p:1"));
        for mode in [0o640, 0o604, 0o620, 0o644] {
            write(secret, mode);
            let error = Config::load(&paths).unwrap_err();
            assert!(matches!(error, ConfigError::Exposed(_)), "{mode:o}: {error}");
            assert_eq!(at(&Config::cautious(&paths)), None, "{mode:o}");
        }
        // What is no secret may be read.
        write("proxy = \"http://p:1\"\n", 0o644);
        assert_eq!(at(&Config::load(&paths).unwrap()).as_deref(), Some("p:1"));
    }

    #[test]
    fn a_mistake_elsewhere_does_not_take_the_proxy_away_and_no_message_shows_it() {
        let (paths, _folder) = scratch();
        let write = |text: &str| {
            fs::write(paths.config(), text).unwrap();
            fs::set_permissions(paths.config(), Permissions::from_mode(0o600)).unwrap();
        };
        for (text, proxy) in [
            ("proxy = \"http://u:geheim@p:1\"\n[vault]\nquota = \"5\"", Some("p:1")),
            ("proxy = \"http://u:geheim@p:1\"\n[walt]", Some("p:1")),
            ("proxy = \"http://u:geheim%@p:1\"", None),
            ("proxy = \"https://u:geheim@p:1\"", None),
            ("proxy = \"http://u:geheim@p:1\" x", None),
            ("proxy = http://u:geheim@p:1", None),
            ("proxy = [\"http://u:geheim@p:1\"]", None),
            ("proxy = \"http://u:geheim@p:1", None),
        ] {
            write(text);
            let error = crate::connection::chain(&Config::load(&paths).unwrap_err());
            assert!(!error.contains("geheim"), "{error}");
            assert_eq!(at(&Config::cautious(&paths)).as_deref(), proxy, "{text}");
        }
    }

    #[test]
    fn a_proxy_is_kept_in_the_file_and_the_rest_stays() {
        let (paths, _folder) = scratch();
        keep_proxy(&paths, "http://u:w@p:1").unwrap();
        let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(paths.config()), 0o600);
        let old = "# ours\nproxy = \"http://old:1\"\n[vault]\nquota = \"2 MiB\"\n# end\n";
        fs::write(paths.config(), old).unwrap();
        keep_proxy(&paths, "http://new:2").unwrap();
        let config = Config::load(&paths).unwrap();
        assert_eq!((at(&config).as_deref(), config.vault.quota_bytes), (Some("new:2"), 2 << 20));
        let text = fs::read_to_string(paths.config()).unwrap();
        assert_eq!(text, "proxy = \"http://new:2\"\n# ours\n[vault]\nquota = \"2 MiB\"\n# end\n");
        // What is wrong stays for its owner to mend.
        fs::write(paths.config(), "[vault").unwrap();
        keep_proxy(&paths, "http://new:2").unwrap_err();
        assert_eq!(fs::read_to_string(paths.config()).unwrap(), "[vault");
    }

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
