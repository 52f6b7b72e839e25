//! `[[export]]` of `manager.toml`: where threat events go, and which.

use std::{collections::BTreeSet, fmt, path::PathBuf};

use serde::Deserialize;
use tm_api::event::{EventKind, EventStatus};
use tm_protocol::address::Address;

/// Most exporters.
const MOST: usize = 16;
/// Longest name.
const LONGEST_NAME: usize = 32;
/// Shortest secret, in bytes.
const SHORTEST_SECRET: usize = 16;
/// `local0`.
const FACILITY: u8 = 16;

/// The table as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawExport {
    name: String,
    kind: String,
    min_severity: Option<String>,
    kinds: Option<Vec<String>>,
    ca_file: Option<PathBuf>,
    // syslog
    address: Option<String>,
    server_name: Option<String>,
    client_certificate: Option<PathBuf>,
    client_key: Option<PathBuf>,
    facility: Option<u8>,
    confirm: Option<bool>,
    // webhook
    url: Option<String>,
    bearer_token: Option<Secret>,
    hmac_secret: Option<Secret>,
}

/// Where events go, and which.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Export {
    pub(crate) name: String,
    pub(crate) filter: Filter,
    pub(crate) to: To,
}

/// A receiver.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum To {
    Syslog(ToSyslog),
    Webhook(ToWebhook),
}

/// Syslog over TLS.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ToSyslog {
    pub(crate) address: Address,
    /// Whose certificate is expected.
    pub(crate) server_name: String,
    pub(crate) ca_file: PathBuf,
    /// Certificate chain and key.
    pub(crate) client: Option<(PathBuf, PathBuf)>,
    /// 0 to 23.
    pub(crate) facility: u8,
    /// Whether the receiver's `close_notify` is waited for.
    pub(crate) confirm: bool,
}

/// HTTPS.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ToWebhook {
    pub(crate) url: String,
    /// The part of `url` that is no secret.
    pub(crate) origin: String,
    pub(crate) ca_file: PathBuf,
    pub(crate) credential: Credential,
}

/// How a webhook's receiver knows us.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Credential {
    Bearer(Secret),
    Hmac(Secret),
}

/// A text that is not shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// How bad an event is, as syslog numbers it: less is worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Severity {
    Error = 3,
    Warning = 4,
    Notice = 5,
    Info = 6,
}

impl Severity {
    const ALL: [Self; 4] = [Self::Error, Self::Warning, Self::Notice, Self::Info];

    /// Of an event with this status.
    pub(crate) const fn of(status: EventStatus) -> Self {
        match status {
            EventStatus::Unsuccessful | EventStatus::RollbackFailed => Self::Error,
            EventStatus::Assessed => Self::Warning,
            EventStatus::Resolved | EventStatus::RolledBack | EventStatus::NoMitigation => Self::Notice,
            EventStatus::InProgress | EventStatus::Scanned | EventStatus::Noted => Self::Info,
        }
    }

    /// The word for it.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Notice => "notice",
            Self::Info => "info",
        }
    }

    /// Its number in RFC 5424.
    pub(crate) const fn number(self) -> u8 {
        match self {
            Self::Error => 3,
            Self::Warning => 4,
            Self::Notice => 5,
            Self::Info => 6,
        }
    }
}

/// Which events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filter {
    least: Severity,
    kinds: Vec<EventKind>,
}

impl Filter {
    /// Whether an event is for the receiver.
    pub(crate) fn wants(&self, kind: EventKind, status: EventStatus) -> bool {
        Severity::of(status) <= self.least && self.kinds.contains(&kind)
    }
}

/// Why an exporter cannot be.
#[derive(Debug, thiserror::Error)]
#[error("[[export]] `{name}`: `{key}`: {problem}")]
pub(crate) struct ExportError {
    name: String,
    key: &'static str,
    problem: String,
}

impl ExportError {
    pub(crate) fn new(name: &str, key: &'static str, problem: impl Into<String>) -> Self {
        let name = tm_protocol::text::escape_for_display(&name.chars().take(64).collect::<String>());
        Self { name, key, problem: problem.into() }
    }
}

/// Reads every table.
///
/// # Errors
/// If one is not right, by its name and key.
pub(crate) fn read(tables: Vec<RawExport>) -> Result<Vec<Export>, ExportError> {
    let mut names = BTreeSet::new();
    if let Some(first_too_many) = tables.get(MOST) {
        return Err(ExportError::new(&first_too_many.name, "name", format!("more than {MOST} exporters")));
    }
    tables
        .into_iter()
        .map(|raw| {
            let export = one(raw)?;
            if names.insert(export.name.clone()) {
                Ok(export)
            } else {
                Err(ExportError::new(&export.name, "name", "it is there twice"))
            }
        })
        .collect()
}

fn one(raw: RawExport) -> Result<Export, ExportError> {
    let name = raw.name.clone();
    let wrong = |key, problem: &str| ExportError::new(&name, key, problem);
    let is_name = (1..=LONGEST_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if !is_name {
        return Err(wrong("name", "it is not 1 to 32 lower-case letters, digits and dashes"));
    }
    let filter = filter(&raw, &wrong)?;
    let ca_file = raw.ca_file.clone().ok_or_else(|| wrong("ca_file", "it is missing"))?;
    let (given, foreign): (&str, [(&'static str, bool); 6]) = match raw.kind.as_str() {
        "syslog" => (
            "syslog",
            [
                ("url", raw.url.is_some()),
                ("bearer_token", raw.bearer_token.is_some()),
                ("hmac_secret", raw.hmac_secret.is_some()),
                ("", false),
                ("", false),
                ("", false),
            ],
        ),
        "webhook" => (
            "webhook",
            [
                ("address", raw.address.is_some()),
                ("server_name", raw.server_name.is_some()),
                ("client_certificate", raw.client_certificate.is_some()),
                ("client_key", raw.client_key.is_some()),
                ("facility", raw.facility.is_some()),
                ("confirm", raw.confirm.is_some()),
            ],
        ),
        _ => return Err(wrong("kind", "it is not `syslog` or `webhook`")),
    };
    if let Some((key, _)) = foreign.into_iter().find(|(_, is_there)| *is_there) {
        return Err(wrong(key, &format!("an exporter of the kind {given} has none")));
    }
    let to = if given == "syslog" {
        To::Syslog(to_syslog(raw, ca_file, &wrong)?)
    } else {
        To::Webhook(to_webhook(raw, ca_file, &wrong)?)
    };
    Ok(Export { name, filter, to })
}

fn filter(
    raw: &RawExport,
    wrong: &impl Fn(&'static str, &str) -> ExportError,
) -> Result<Filter, ExportError> {
    let least = match &raw.min_severity {
        None => Severity::Info,
        Some(word) => Severity::ALL
            .into_iter()
            .find(|severity| severity.word() == word)
            .ok_or_else(|| wrong("min_severity", "it is not `error`, `warning`, `notice` or `info`"))?,
    };
    let kinds = match &raw.kinds {
        None => EventKind::ALL.to_vec(),
        Some(words) if words.is_empty() => return Err(wrong("kinds", "it is empty")),
        Some(words) => {
            words.iter().map(|word| EventKind::from_word(word)).collect::<Option<_>>().ok_or_else(|| {
                wrong("kinds", "one of them is no kind of event (`tmctl event list --help`)")
            })?
        }
    };
    Ok(Filter { least, kinds })
}

fn to_syslog(
    raw: RawExport,
    ca_file: PathBuf,
    wrong: &impl Fn(&'static str, &str) -> ExportError,
) -> Result<ToSyslog, ExportError> {
    let address: Address =
        raw.address
            .as_deref()
            .ok_or_else(|| wrong("address", "it is missing"))?
            .parse()
            .map_err(|_| wrong("address", "it is not a host and a port, like `siem.example:6514`"))?;
    let client = match (raw.client_certificate, raw.client_key) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (Some(_), None) => return Err(wrong("client_key", "it is missing beside `client_certificate`")),
        (None, Some(_)) => return Err(wrong("client_certificate", "it is missing beside `client_key`")),
    };
    let facility = raw.facility.unwrap_or(FACILITY);
    if facility > 23 {
        return Err(wrong("facility", "it is not a number from 0 to 23"));
    }
    let server_name = raw.server_name.unwrap_or_else(|| address.host().to_owned());
    Ok(ToSyslog { address, server_name, ca_file, client, facility, confirm: raw.confirm.unwrap_or(true) })
}

fn to_webhook(
    raw: RawExport,
    ca_file: PathBuf,
    wrong: &impl Fn(&'static str, &str) -> ExportError,
) -> Result<ToWebhook, ExportError> {
    let text = raw.url.ok_or_else(|| wrong("url", "it is missing"))?;
    let bad = || wrong("url", "it is not an address that begins with `https://`");
    let url = reqwest::Url::parse(&text).map_err(|_| bad())?;
    let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return Err(bad()) };
    if url.scheme() != "https" {
        return Err(bad());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong(
            "url",
            "it holds a password; `bearer_token` or `hmac_secret` is the place for secrets",
        ));
    }
    let credential = match (raw.bearer_token, raw.hmac_secret) {
        (Some(token), None) => {
            if token.expose().is_empty() || !token.expose().bytes().all(|b| b.is_ascii_graphic()) {
                return Err(wrong("bearer_token", "it is empty or holds what a header cannot"));
            }
            Credential::Bearer(token)
        }
        (None, Some(secret)) => {
            if secret.expose().len() < SHORTEST_SECRET {
                return Err(wrong("hmac_secret", "it is shorter than 16 bytes"));
            }
            Credential::Hmac(secret)
        }
        (Some(_), Some(_)) => return Err(wrong("hmac_secret", "there is a `bearer_token` already")),
        (None, None) => return Err(wrong("bearer_token", "it or `hmac_secret` is missing")),
    };
    let origin = format!("https://{host}:{port}");
    Ok(ToWebhook { url: text, origin, ca_file, credential })
}

impl To {
    /// The word for its kind.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Syslog(_) => "syslog",
            Self::Webhook(_) => "webhook",
        }
    }

    /// Where it is, without secrets.
    pub(crate) fn receiver(&self) -> String {
        match self {
            Self::Syslog(to) => to.address.to_string(),
            Self::Webhook(to) => to.origin.clone(),
        }
    }
}

/// What `init` writes of it.
pub(crate) const TEMPLATE: &str = r#"
# Threat events to other systems; as many tables as there are receivers (manager/README.md says more).
# [[export]]
# name = "siem"
# kind = "syslog"                      # RFC 5424 over TLS (RFC 5425)
# address = "siem.example:6514"
# ca_file = "/etc/ssl/certs/ca-certificates.crt"
# min_severity = "notice"              # error, warning, notice, info
#
# [[export]]
# name = "hook"
# kind = "webhook"                     # HTTPS POST of JSON
# url = "https://soar.example/threats"
# ca_file = "/etc/ssl/certs/ca-certificates.crt"
# hmac_secret = "at least sixteen bytes"
# kinds = ["cleanup", "restore"]
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Tables {
        export: Vec<RawExport>,
    }

    fn parse(text: &str) -> Result<Vec<Export>, String> {
        let tables: Tables = toml::from_str(text).map_err(|error| error.to_string())?;
        read(tables.export).map_err(|error| error.to_string())
    }

    const SYSLOG: &str = "[[export]]\nname = \"siem\"\nkind = \"syslog\"\naddress = \"siem.example:6514\"\nca_file = \"/ca\"\n";
    const HOOK: &str = "[[export]]\nname = \"hook\"\nkind = \"webhook\"\nurl = \"https://h.example/x?key=1\"\nca_file = \"/ca\"\nhmac_secret = \"0123456789abcdef\"\n";

    #[test]
    fn what_init_writes_is_right_once_it_is_uncommented() {
        let text =
            TEMPLATE.lines().skip(2).map(|line| line.trim_start_matches('#')).collect::<Vec<_>>().join("\n");
        let exports = parse(&text).unwrap();
        assert_eq!(exports.len(), 2);
        assert!(exports[0].filter.wants(EventKind::Agent, EventStatus::Resolved));
        assert!(!exports[0].filter.wants(EventKind::Agent, EventStatus::Noted));
        assert!(!exports[1].filter.wants(EventKind::Agent, EventStatus::Unsuccessful));
        assert!(exports[1].filter.wants(EventKind::Cleanup, EventStatus::InProgress));
    }

    #[test]
    fn defaults_are_said_and_secrets_are_not_shown() {
        let exports = parse(&format!("{SYSLOG}{HOOK}")).unwrap();
        let To::Syslog(to) = &exports[0].to else { panic!("{exports:?}") };
        assert_eq!((to.facility, to.confirm, to.server_name.as_str()), (16, true, "siem.example"));
        assert_eq!(exports[0].to.receiver(), "siem.example:6514");
        assert_eq!(exports[1].to.receiver(), "https://h.example:443", "the path may be a secret");
        assert!(!format!("{:?}", exports[1].to).contains("0123456789"));
        for status in EventStatus::ALL {
            let severity = Severity::of(*status);
            assert_eq!(severity.number(), severity as u8);
        }
        assert!(Severity::Error < Severity::Info);
    }

    #[test]
    fn what_is_wrong_is_named_by_its_key() {
        for (base, from, to, key) in [
            (SYSLOG, "\"siem\"", "\"SIEM\"", "name"),
            (SYSLOG, "\"siem\"", "\"\"", "name"),
            (SYSLOG, "\"syslog\"", "\"syslog-ng\"", "kind"),
            (SYSLOG, "siem.example:6514", "siem.example", "address"),
            (SYSLOG, "address = \"siem.example:6514\"\n", "", "address"),
            (SYSLOG, "ca_file = \"/ca\"\n", "", "ca_file"),
            (SYSLOG, "ca_file", "client_key = \"/k\"\nca_file", "client_certificate"),
            (SYSLOG, "ca_file", "client_certificate = \"/k\"\nca_file", "client_key"),
            (SYSLOG, "ca_file", "facility = 24\nca_file", "facility"),
            (SYSLOG, "ca_file", "url = \"https://x\"\nca_file", "url"),
            (SYSLOG, "ca_file", "min_severity = \"debug\"\nca_file", "min_severity"),
            (SYSLOG, "ca_file", "kinds = [\"scan\"]\nca_file", "kinds"),
            (SYSLOG, "ca_file", "kinds = []\nca_file", "kinds"),
            (SYSLOG, "ca_file", "ca_fil = \"/x\"\nca_file", "ca_fil"),
            (HOOK, "https://h.example", "http://h.example", "url"),
            (HOOK, "https://h.example", "https://a:b@h.example", "url"),
            (HOOK, "https://h.example/x", "h.example", "url"),
            (HOOK, "0123456789abcdef", "short", "hmac_secret"),
            (HOOK, "hmac_secret = \"0123456789abcdef\"", "bearer_token = \"a b\"", "bearer_token"),
            (HOOK, "hmac_secret = \"0123456789abcdef\"", "", "bearer_token"),
            (HOOK, "hmac_secret", "bearer_token = \"x\"\nhmac_secret", "hmac_secret"),
            (HOOK, "hmac_secret", "confirm = true\nhmac_secret", "confirm"),
        ] {
            assert!(base.contains(from), "{from}");
            let refused = parse(&base.replacen(from, to, 1)).unwrap_err();
            assert!(refused.contains(&format!("`{key}`")), "{to}: {refused}");
        }
        assert!(parse(&format!("{SYSLOG}{SYSLOG}")).unwrap_err().contains("twice"));
        let many: String = (0..17).map(|n| SYSLOG.replace("siem\"", &format!("siem{n}\""))).collect();
        assert!(parse(&many).unwrap_err().contains("more than 16"));
    }
}
