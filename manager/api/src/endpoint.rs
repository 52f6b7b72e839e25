//! Endpoints.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whether an endpoint can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connectivity {
    /// Its agent has a session.
    Connected,
    /// Its agent is away.
    Disconnected,
}

impl fmt::Display for Connectivity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connected => "connected",
            Self::Disconnected => "disconnected",
        })
    }
}

/// `GET /v1/endpoints`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointQuery {
    /// The search box's grammar ([`tm_protocol::search`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
    /// Only this group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Only these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connectivity: Option<Connectivity>,
    /// Only those that this query of the overview counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<crate::status::Query>,
}

/// One endpoint: a row of `GET /v1/endpoints`, or `GET /v1/endpoints/{target}` (id, host name or address).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EndpointView {
    /// Its id.
    pub id: String,
    /// Host name, as the agent last said.
    pub host: String,
    /// Addresses, as the agent last said.
    pub addresses: Vec<String>,
    /// The group it is in.
    pub group: String,
    /// Whether it can be reached.
    pub connectivity: Connectivity,
    /// Its network state; `free` until quarantine is built.
    pub quarantine: String,
    /// Why it waits for a restart.
    pub restart_reasons: Vec<String>,
    /// The agent's version.
    pub agent_version: String,
    /// Digests of the patterns it holds.
    pub patterns: Vec<String>,
    /// When it was enrolled.
    pub enrolled_at: String,
    /// When its agent was shut out for ever, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<String>,
    /// When the manager last heard of it.
    pub last_seen_at: Option<String>,
    /// Why its agent last failed to connect, as the agent said afterwards.
    pub last_failure: Option<FailureView>,
    /// Its facts, once its agent has sent them.
    pub inventory: Option<InventoryView>,
}

/// A failure, when, and why.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FailureView {
    /// What programs compare.
    pub code: String,
    /// What people read.
    pub message: String,
    /// When it was reported.
    pub at: String,
}

/// An endpoint's facts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InventoryView {
    /// Name and version of the operating system.
    pub os: String,
    /// Kernel release.
    pub kernel: String,
    /// Machine architecture.
    pub arch: String,
    /// CPU model.
    pub cpu: String,
    /// Logical processors.
    pub cpus: u32,
    /// Physical memory, in bytes.
    pub memory: u64,
    /// Local file systems.
    pub disks: Vec<tm_protocol::message::Disk>,
    /// Changes with each boot.
    pub boot_id: String,
}

/// `PUT /v1/endpoints/{target}/group`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetGroup {
    /// 1 to 64 characters: letters, digits, `.`, `-`, `_`. An endpoint is in exactly one group.
    pub group: String,
}

/// `POST /v1/endpoints/{target}/revoke`: shuts the agent out for ever.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoke {
    /// Why, for the audit log; at most 1024 bytes.
    #[serde(default)]
    pub reason: String,
}
