//! The overview and its queries.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A saved query over endpoints. Its count in the overview and its list come from the same condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Query {
    /// Have an incident that waits for a person to run cleanup.
    NeedsCleanup,
    /// Have an incident that a cleanup left unresolved.
    Unresolved,
    /// Have a session.
    Connected,
    /// Have none.
    Disconnected,
    /// Have an agent, which is away.
    AgentInstalled,
    /// Have none, or one that was revoked.
    Agentless,
}

impl Query {
    /// Every query, in the order of the overview.
    pub const ALL: [Self; 6] = [
        Self::NeedsCleanup,
        Self::Unresolved,
        Self::Connected,
        Self::Disconnected,
        Self::AgentInstalled,
        Self::Agentless,
    ];

    /// Its name.
    pub const fn word(self) -> &'static str {
        match self {
            Self::NeedsCleanup => "needs-cleanup",
            Self::Unresolved => "unresolved",
            Self::Connected => "connected",
            Self::Disconnected => "disconnected",
            Self::AgentInstalled => "agent-installed",
            Self::Agentless => "agentless",
        }
    }

    /// Reads [`Query::word`] back.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|query| query.word() == word)
    }
}

impl fmt::Display for Query {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// `GET /v1/status`: the overview.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StatusView {
    /// Each query with its count, in the order of [`Query::ALL`].
    pub queries: Vec<QueryCount>,
    /// Endpoints with a session.
    pub connected: u64,
    /// Endpoints without one.
    pub disconnected: u64,
    /// Endpoints without an agent.
    pub agentless: u64,
    /// Every endpoint.
    pub endpoints: u64,
    /// Tasks that wait for their endpoint.
    pub tasks_queued: u64,
    /// Tasks that an agent has and has not ended.
    pub tasks_running: u64,
    /// Incidents that are not resolved.
    pub incidents_open: u64,
    /// Certificates that end.
    #[serde(default)]
    pub certificates: crate::certificate::CertificateSummary,
}

/// One line of the overview.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QueryCount {
    /// The query.
    pub name: Query,
    /// Endpoints that it counts.
    pub count: u64,
    /// Endpoints for which the same work is ordered already and waits or runs.
    pub queued_automatically: u64,
}

/// `GET /v1/endpoints/{target}/why`: why an endpoint is what it is, and what to do next.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WhyView {
    /// The endpoint.
    pub endpoint: crate::endpoint::EndpointView,
    /// The overview's queries that count it.
    pub queries: Vec<Query>,
    /// Its incidents, open ones first, newest first; at most 100.
    pub incidents: Vec<crate::event::IncidentView>,
    /// Tasks that have not ended, and the newest that have; at most 20.
    pub tasks: Vec<crate::task::TaskView>,
    /// The newest threat events; at most 10.
    pub events: Vec<crate::event::EventView>,
    /// What to do next, most urgent first: a sentence and, in backquotes, the command. Empty if nothing waits.
    pub advice: Vec<String>,
}
