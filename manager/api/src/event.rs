//! Threat events and incidents.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl $name {
            /// Every one.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The word for it in every output and in the store.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            /// Reads the word back.
            pub fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|one| one.word() == word)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}

words! {
    /// What a threat event is about. More kinds come with the capabilities they tell of.
    EventKind {
        /// A scan that an administrator ordered.
        ScanAdministrator = "scan-administrator",
        /// Removing what was detected.
        Cleanup = "cleanup",
        /// Putting a vaulted file back.
        Restore = "restore",
        /// Something an agent told of itself (a damaged journal, notices lost, a recovered vault).
        Agent = "agent",
        /// A certificate that ends and is not being renewed.
        Certificate = "certificate",
        /// A version of a pattern on its way to endpoints.
        PatternDeployment = "pattern-deployment",
    }
}

words! {
    /// How far what an event is about has come.
    EventStatus {
        /// It has begun or waits.
        InProgress = "in-progress",
        /// Nothing is done, by rule.
        NoMitigation = "no-mitigation",
        /// The threat is no more.
        Resolved = "resolved",
        /// Looked at, and no threat found.
        Scanned = "scanned",
        /// A threat was found and waits for a person.
        Assessed = "assessed",
        /// It did not succeed.
        Unsuccessful = "unsuccessful",
        /// What had been removed is back.
        RolledBack = "rolled-back",
        /// It could not be brought back.
        RollbackFailed = "rollback-failed",
        /// For the record; nothing has to be done.
        Noted = "noted",
    }
}

words! {
    /// How far an incident is.
    IncidentState {
        /// A threat was found and waits for cleanup.
        AwaitingCleanup = "awaiting-cleanup",
        /// A cleanup is ordered or runs.
        Cleaning = "cleaning",
        /// Everything was removed, and that was checked.
        Resolved = "resolved",
        /// A cleanup could not remove everything.
        Unresolved = "unresolved",
        /// A removed file was put back by order.
        RolledBack = "rolled-back",
        /// Putting it back did not succeed.
        RollbackFailed = "rollback-failed",
    }
}

impl IncidentState {
    /// Whether a further detection of the same rule joins it.
    pub const fn is_open(self) -> bool {
        match self {
            Self::AwaitingCleanup | Self::Cleaning | Self::Unresolved => true,
            Self::Resolved | Self::RolledBack | Self::RollbackFailed => false,
        }
    }
}

/// `GET /v1/events`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventQuery {
    /// Only those of this endpoint (a target).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Only those of endpoints that this search finds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
    /// Only this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<EventKind>,
    /// Only this status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<EventStatus>,
    /// Only those at or after this time, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<i64>,
    /// Only those before this time, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until_ms: Option<i64>,
    /// Only those after this number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<i64>,
    /// The newest that fit instead of the oldest; the answer is still oldest first.
    #[serde(default)]
    pub newest: bool,
    /// Most rows, 1 to 1000 (default 1000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// One line of the Threat Event Log: a row of `GET /v1/events` (a page, oldest first).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EventView {
    /// Its number; the position to page by.
    pub id: i64,
    /// When the manager wrote it down.
    pub at: String,
    /// On which endpoint.
    pub endpoint: String,
    /// That endpoint's host name, as it was.
    pub host: String,
    /// What it is about.
    pub kind: EventKind,
    /// How far that has come.
    pub status: EventStatus,
    /// More of the status: a failure's code or a stable word (`no-threat-found`, `manual-cleanup-needed`).
    pub detail: String,
    /// What happened, in a sentence.
    pub message: String,
    /// What to do next, with the command for it; empty if nothing.
    pub advice: String,
    /// The task it is of.
    pub task: Option<String>,
    /// The incident it is of.
    pub incident: Option<String>,
}

/// `GET /v1/incidents`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncidentQuery {
    /// Only those of this endpoint (a target).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Only those in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<IncidentState>,
    /// Most rows, newest first, 1 to 1000 (default 100).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// One incident.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct IncidentView {
    /// Its id.
    pub id: String,
    /// On which endpoint.
    pub endpoint: String,
    /// That endpoint's host name.
    pub host: String,
    /// The pattern's name.
    pub pattern: String,
    /// The rule that matched.
    pub rule: String,
    /// How far it is.
    pub state: IncidentState,
    /// Detections that belong to it.
    pub detections: u64,
    /// Of these, those that no cleanup has settled.
    pub open_detections: u64,
    /// Escaped path of the first detection.
    pub path: String,
    /// When it was opened.
    pub opened_at: String,
    /// When it last changed.
    pub changed_at: String,
    /// The task that works on it.
    pub task: Option<String>,
}
