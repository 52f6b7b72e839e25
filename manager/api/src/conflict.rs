//! Agents that are held because another one with their identity answers.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a held agent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConflictState {
    /// It waits at a manager for somebody to decide.
    Held,
    /// It was held, and is away.
    Away,
    /// It is an endpoint of its own; the first agent still has the key that was copied.
    Approved,
    /// It is an endpoint of its own, and the copied key is good for nothing.
    Settled,
}

impl ConflictState {
    /// The word for it in every output.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Away => "away",
            Self::Approved => "approved",
            Self::Settled => "settled",
        }
    }
}

impl fmt::Display for ConflictState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// One such agent: a row of `GET /v1/conflicts`, the newest first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ConflictView {
    /// Its id, to name one of several.
    pub id: String,
    /// How it stands.
    pub state: ConflictState,
    /// The endpoint whose identity it came with.
    pub endpoint: String,
    /// The host name of that endpoint.
    pub endpoint_host: String,
    /// The held agent's host name, as it says.
    pub host: String,
    /// Its addresses, as it says.
    pub addresses: Vec<String>,
    /// Its boot id, as it says.
    pub boot_id: String,
    /// Its version, as it says.
    pub agent_version: String,
    /// When it came.
    pub first_seen_at: String,
    /// When it was last heard of.
    pub last_seen_at: String,
    /// The endpoint that it became.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approved_as: Option<String>,
}

/// `POST /v1/endpoints/{target}/approve`: makes the agent that is held with this endpoint's identity an endpoint of its
/// own. The answer is the new endpoint.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Approve {
    /// Which, if several are held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<String>,
}
