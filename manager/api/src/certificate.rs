//! Certificates of agents, and when they end.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What is to be thought of an agent's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CertificateState {
    /// It is good for long, or is about to be renewed.
    Good,
    /// It ends soon, and its agent is away.
    Away,
    /// It ends soon, and its agent is connected and has not renewed it.
    Late,
    /// It has ended; its agent renews it as soon as it comes back, for 30 days.
    Ended,
    /// It ended more than 30 days ago: the endpoint has to be enrolled anew.
    NeedsEnrollment,
}

impl CertificateState {
    /// The word for it in every output.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Away => "away",
            Self::Late => "late",
            Self::Ended => "ended",
            Self::NeedsEnrollment => "needs-enrollment",
        }
    }
}

impl fmt::Display for CertificateState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// `GET /v1/certificates`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateQuery {
    /// Only those that end within so many days (0: have ended), at most 36,500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expiring_days: Option<u32>,
}

/// The certificate of an endpoint's agent: a row of `GET /v1/certificates`, the first to end first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CertificateView {
    /// Of which endpoint.
    pub endpoint: String,
    /// Its host name.
    pub host: String,
    /// Its group.
    pub group: String,
    /// Whether it can be reached.
    pub connectivity: crate::endpoint::Connectivity,
    /// When the manager last heard of it.
    pub last_seen_at: Option<String>,
    /// In lower-case hex.
    pub serial: String,
    /// SHA-256 of the authority that issued it.
    pub authority: String,
    /// When it was issued.
    pub issued_at: String,
    /// When it ends.
    pub ends_at: String,
    /// What is to be thought of it.
    pub state: CertificateState,
}

/// One of the manager's own certificates.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OwnCertificateView {
    /// `authority` or `manager`.
    pub what: String,
    /// An authority's SHA-256, a manager's id.
    pub name: String,
    /// Whether it is the authority that issues.
    pub issuing: bool,
    /// When it ends.
    pub ends_at: String,
}

/// What the overview says of certificates.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CertificateSummary {
    /// Agents' certificates that end soon or have ended and are not being renewed.
    pub ending: u64,
    /// Those among them that have 7 days or less.
    pub ending_7_days: u64,
    /// The manager's own.
    pub own: Vec<OwnCertificateView>,
    /// What to do something about, each a sentence.
    pub warnings: Vec<String>,
}
