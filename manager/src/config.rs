//! `manager.toml`: read once, typed, and right if it exists.

use std::{
    fs, io,
    net::{Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use tm_protocol::{address::Address, log::Format};

use super::{
    agents::ca::DEFAULT_LIFE,
    forward::settings::{self, Export, ExportError, RawExport},
    limits::{self, Limits, RawLimits},
};

const DAY_S: u64 = 86_400;

/// What a manager runs with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Config {
    pub(crate) agent_listen: SocketAddr,
    pub(crate) admin_listen: SocketAddr,
    /// Where metrics are read without a token: on this machine only.
    pub(crate) metrics_listen: Option<SocketAddr>,
    /// Under which agents reach this manager: `None` means the port of `agent_listen`.
    pub(crate) public_names: Vec<(String, Option<u16>)>,
    pub(crate) database: Option<String>,
    /// Where the bytes of patterns are: `None` means `patterns` in the data folder. Managers of one fleet share it.
    pub(crate) patterns: Option<PathBuf>,
    /// How often agents and manager ping each other, 200 ms to 27 s (silence of twice that ends a session,
    /// and a dead link is to be seen within a minute).
    pub(crate) heartbeat: Duration,
    pub(crate) log: String,
    pub(crate) log_format: Format,
    /// How long a certificate is good for, 10 s to 825 days.
    pub(crate) certificate_life: Duration,
    pub(crate) limits: Limits,
    /// Where threat events go.
    pub(crate) exports: Vec<Export>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    agent_listen: String,
    admin_listen: String,
    metrics_listen: Option<String>,
    public_names: Vec<String>,
    database: Option<String>,
    patterns: Option<PathBuf>,
    #[serde(default = "default_heartbeat")]
    heartbeat: String,
    #[serde(default = "default_log")]
    log: String,
    log_format: Option<String>,
    #[serde(default = "default_life")]
    certificate_life: String,
    #[serde(default)]
    limits: RawLimits,
    #[serde(default)]
    export: Vec<RawExport>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read `{path}`")]
    Read { path: String, source: io::Error },
    #[error("`{path}` is not a configuration")]
    Syntax { path: String, source: Box<toml::de::Error> },
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error("`{key}`: `{value}` is not {expected}")]
    Value { key: &'static str, value: String, expected: &'static str },
}

impl Config {
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
        Self::read(&text, shown)
    }

    /// Reads a configuration that is not in its place.
    pub(crate) fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::read(text, "manager.toml".to_owned())
    }

    fn read(text: &str, shown: String) -> Result<Self, ConfigError> {
        let raw: Raw =
            toml::from_str(text).map_err(|e| ConfigError::Syntax { path: shown, source: Box::new(e) })?;
        raw.try_into()
    }

    /// Where the bytes of patterns are, for a manager in `data`.
    pub(crate) fn patterns(&self, data: &Path) -> PathBuf {
        self.patterns.clone().unwrap_or_else(|| data.join("patterns"))
    }

    /// Every address that agents may use, in order.
    pub(crate) fn addresses(&self) -> Vec<Address> {
        self.public_names
            .iter()
            .filter_map(|(host, port)| Address::new(host, port.unwrap_or(self.agent_listen.port())).ok())
            .collect()
    }

    /// The names that the manager's certificate is for.
    pub(crate) fn hosts(&self) -> Vec<String> {
        self.public_names.iter().map(|(host, _)| host.clone()).collect()
    }
}

impl TryFrom<Raw> for Config {
    type Error = ConfigError;

    fn try_from(raw: Raw) -> Result<Self, ConfigError> {
        let socket = |key, value: &str| {
            value.parse::<SocketAddr>().ok().filter(|s| s.port() != 0).ok_or_else(|| ConfigError::Value {
                key,
                value: value.to_owned(),
                expected: "an IP address and a port, like `0.0.0.0:4433`",
            })
        };
        let value =
            |key, value: &str, expected| ConfigError::Value { key, value: value.to_owned(), expected };
        let public_names = raw
            .public_names
            .iter()
            .map(|name| public_name(name).ok_or_else(|| value("public_names", name, expected_name(name))))
            .collect::<Result<_, _>>()?;
        let heartbeat = duration(&raw.heartbeat)
            .filter(|d| (Duration::from_millis(200)..=Duration::from_secs(27)).contains(d))
            .ok_or_else(|| value("heartbeat", &raw.heartbeat, "a time from `200ms` to `27s`"))?;
        let certificate_life = duration(&raw.certificate_life)
            .filter(|d| (Duration::from_secs(10)..=Duration::from_secs(825 * DAY_S)).contains(d))
            .ok_or_else(|| value("certificate_life", &raw.certificate_life, "a time from `10s` to `825d`"))?;
        Ok(Self {
            agent_listen: socket("agent_listen", &raw.agent_listen)?,
            admin_listen: socket("admin_listen", &raw.admin_listen)?,
            metrics_listen: raw.metrics_listen.as_deref().map(loopback).transpose()?,
            public_names,
            database: raw.database,
            patterns: raw.patterns.map(absolute).transpose()?,
            heartbeat,
            log: raw.log,
            log_format: match &raw.log_format {
                None => Format::default(),
                Some(word) => {
                    Format::from_word(word).ok_or_else(|| value("log_format", word, Format::WORDS))?
                }
            },
            certificate_life,
            limits: raw.limits.try_into()?,
            exports: settings::read(raw.export)?,
        })
    }
}

/// A folder whose meaning does not depend on where the manager is started.
fn absolute(path: PathBuf) -> Result<PathBuf, ConfigError> {
    if path.is_absolute() {
        return Ok(path);
    }
    let value = path.display().to_string();
    Err(ConfigError::Value { key: "patterns", value, expected: "a path from the root (`/…`)" })
}

/// An address that only this machine reaches.
fn loopback(text: &str) -> Result<SocketAddr, ConfigError> {
    let address = text.parse::<SocketAddr>().ok().filter(|at| at.port() != 0 && at.ip().is_loopback());
    address.ok_or_else(|| ConfigError::Value {
        key: "metrics_listen",
        value: text.to_owned(),
        expected: "a loopback address and a port, like `127.0.0.1:9433` (elsewhere, read /metrics on `admin_listen` \
                   with a token)",
    })
}

/// Whether a text is an IPv6 address of one link (fe80::/10), with or without a zone, brackets and a port. Whoever is
/// told it would look on a link of his own.
pub(crate) fn is_of_one_link(text: &str) -> bool {
    let host = text.strip_prefix('[').map_or(text, |rest| rest.split(']').next().unwrap_or(rest));
    let address = host.split('%').next().unwrap_or(host);
    address.parse::<Ipv6Addr>().is_ok_and(|address| address.is_unicast_link_local())
}

/// What is expected of a public name, where `text` is none.
pub(crate) fn expected_name(text: &str) -> &'static str {
    if is_of_one_link(text) {
        "an address that agents elsewhere could use (fe80::/10 means the own link of whoever hears it)"
    } else {
        "a host name or an IP address, with or without a port"
    }
}

/// A name alone, or one with the port of whatever forwards to the manager.
pub(crate) fn public_name(text: &str) -> Option<(String, Option<u16>)> {
    if is_of_one_link(text) {
        return None;
    }
    if Address::new(text, 1).is_ok() {
        return Some((text.to_owned(), None));
    }
    let address: Address = text.parse().ok()?;
    Some((address.host().to_owned(), Some(address.port())))
}

fn default_heartbeat() -> String {
    "25s".to_owned()
}

fn default_life() -> String {
    format!("{}d", DEFAULT_LIFE.as_secs() / DAY_S)
}

fn default_log() -> String {
    "info".to_owned()
}

fn duration(text: &str) -> Option<Duration> {
    let at = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(at);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "h" => Some(Duration::from_secs(number.checked_mul(3600)?)),
        "d" => Some(Duration::from_secs(number.checked_mul(DAY_S)?)),
        _ => None,
    }
}

/// A configuration with another database.
pub(crate) fn with_database(text: &str, url: &str) -> String {
    let is_old = |line: &&str| {
        let key = line.trim_start().strip_prefix("database");
        key.is_some_and(|rest| rest.trim_start().starts_with('='))
    };
    // Top-level keys come before every table.
    let rest: Vec<&str> = text.lines().filter(|line| !is_old(line)).collect();
    format!("database = {url:?}\n{}\n", rest.join("\n"))
}

/// The file that `init` writes.
pub(crate) fn render(
    agent: SocketAddr,
    admin: SocketAddr,
    names: &[String],
    database: Option<&str>,
    patterns: Option<&Path>,
) -> String {
    let names = names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    let database = match database {
        Some(url) => format!("database = {url:?}"),
        None => "# database = \"sqlite:/path/to/manager.db\"".to_owned(),
    };
    let patterns = match patterns {
        Some(folder) => format!("patterns = {:?}", folder.display().to_string()),
        None => "# patterns = \"/path/to/patterns\"".to_owned(),
    };
    format!(
        r#"# Threat Management manager. `tm-manager check-config --data DIR` says whether it is right.

# Where agents connect, and where administrators (tmctl) do.
agent_listen = "{agent}"
admin_listen = "{admin}"

# Where /metrics, /healthz and /readyz are read without TLS and without a token: an address of this machine only.
# They are on admin_listen too, where /metrics needs an account's token.
# metrics_listen = "127.0.0.1:9433"

# Names and addresses under which agents reach this manager; they stand in enrollment tokens. With a port
# ("m.example:443", "[2001:db8::1]:443") where something forwards from another one.
public_names = [{names}]

# The database. Without this line: manager.db in this folder.
{database}

# The folder for the bytes of patterns. Without this line: patterns in this folder. Managers of one fleet (on one
# PostgreSQL) need the same one, on storage that all of them reach.
{patterns}

# How often agents and manager ask each other "are you there?".
heartbeat = "25s"

# How long a certificate is good for. Agents renew theirs, with a new key, after two thirds of that time.
certificate_life = "90d"

# What is logged: error, warn, info, debug, trace, or a tracing filter.
log = "info"

# How: "text" for people, or "json", one object a line (timestamp, level, target, fields).
log_format = "text"

{}{}"#,
        limits::TEMPLATE,
        settings::TEMPLATE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_written_configuration_reads_back() {
        let text = render(
            "[::]:4433".parse().unwrap(),
            "127.0.0.1:4434".parse().unwrap(),
            &[
                "m.example".to_owned(),
                "2001:db8::1".to_owned(),
                "f.example:9".to_owned(),
                "[::1]:8".to_owned(),
            ],
            None,
            Some(Path::new("/srv/patterns")),
        );
        let config = Config::try_from(toml::from_str::<Raw>(&text).unwrap()).unwrap();
        assert_eq!(
            (config.heartbeat, config.log.as_str(), config.database.clone(), config.certificate_life),
            (Duration::from_secs(25), "info", None, Duration::from_secs(90 * DAY_S))
        );
        assert_eq!(config.patterns.as_deref(), Some(Path::new("/srv/patterns")));
        let addresses: Vec<String> = config.addresses().iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["m.example:4433", "[2001:db8::1]:4433", "f.example:9", "[::1]:8"]);
        assert_eq!(config.hosts(), ["m.example", "2001:db8::1", "f.example", "::1"]);
        assert_eq!(config.limits, limits::tests::defaults());
    }

    #[test]
    fn a_configuration_gets_another_database() {
        let listen = |text: &str| text.parse().unwrap();
        for old in [None, Some("postgres://a/b")] {
            let text = render(listen("[::]:1"), listen("[::]:2"), &["m".to_owned()], old, None);
            let config = Config::parse(&with_database(&text, "sqlite:/x y\"z")).unwrap();
            assert_eq!(config.database.as_deref(), Some("sqlite:/x y\"z"));
            assert_eq!(config.public_names.len(), 1);
        }
    }

    #[test]
    fn an_address_of_one_link_is_no_name_for_others() {
        for text in ["fe80::1", "fe80::1%eth0", "[fe80::1]:4433", "[fe80::1%2]:4433", "FEBF::1"] {
            assert!(public_name(text).is_none(), "{text}");
            assert!(expected_name(text).contains("fe80::/10"), "{text}");
        }
        for text in ["fec0::1", "[2001:db8::1]:4433", "fe80.example"] {
            assert!(public_name(text).is_some(), "{text}");
        }
        assert!(!expected_name("a b").contains("fe80"), "that is wrong for another reason");
    }

    #[test]
    fn wrong_values_are_named() {
        let good = render("[::]:1".parse().unwrap(), "[::]:2".parse().unwrap(), &[], None, None);
        for (from, to) in [
            ("25s", "60s"),
            ("90d", "9s"),
            ("90d", "826d"),
            ("90d", "99999999999999999d"),
            ("[::]:1", "nowhere"),
            ("log =", "logg ="),
            ("format = \"text", "format = \"xml"),
            ("# metrics_listen = \"127.0.0.1", "metrics_listen = \"0.0.0.0"),
            ("# metrics_listen = \"127.0.0.1:9433", "metrics_listen = \"127.0.0.1:0"),
            ("# metrics_listen = \"127.0.0.1:9433", "metrics_listen = \"localhost:9433"),
            ("names = []", "names = [\"m:0\"]"),
            ("names = []", "names = [\"a b\"]"),
            ("# patterns = \"/", "patterns = \""),
            ("# rows_burst = 10000", "rows_burst = 1"),
        ] {
            assert!(good.contains(from), "{from}");
            let text = good.replace(from, to);
            assert!(toml::from_str::<Raw>(&text).map_or(true, |raw| Config::try_from(raw).is_err()), "{to}");
        }
    }
}
