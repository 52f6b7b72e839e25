//! The REST contract: what the manager's administrators' port takes and gives.
//!
//! Shared by the server and its clients, so that neither can disagree with the other. Views are what is
//! shown; records stay in the manager's store. All times are RFC 3339 in UTC or milliseconds where a name
//! ends in `_ms`; all sizes are bytes.
//!
//! **Invariant:** parameters deny unknown fields, views ignore them: an old client can read a newer
//! manager, and a manager never misreads a client.

pub mod account;
pub mod certificate;
pub mod conflict;
pub mod coverage;
pub mod endpoint;
pub mod error;
pub mod event;
pub mod export;
pub mod group;
pub mod pattern;
pub mod rollout;
pub mod status;
pub mod task;
pub mod token;
pub mod trust;

use serde::{Deserialize, Serialize};

/// Every route begins with this.
pub const PREFIX: &str = "/v1";

/// `GET /v1/version`: who answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VersionView {
    /// The manager's program version.
    pub version: String,
    /// Its id.
    pub manager: String,
    /// The fleet it serves.
    pub fleet: String,
    /// The account whose token was used.
    pub account: String,
    /// That account's role.
    pub role: account::Role,
}

/// A page of a list that grows without bound.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Page<T> {
    /// The rows, oldest first.
    pub items: Vec<T>,
    /// Pass as `after` to go on; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<i64>,
}

/// How a list that grows without bound is asked for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    /// Rows after this position (default 0: from the beginning).
    #[serde(default)]
    pub after: i64,
    /// Most rows in the answer, 1 to 1000 (default 1000).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// `GET /v1/audit`: one [`tm_protocol::audit::AuditRecord`] a row, by sequence.
pub type AuditPage = Page<tm_protocol::audit::AuditRecord>;
