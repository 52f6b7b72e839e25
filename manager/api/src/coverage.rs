//! What has been looked at, and what nobody has looked at for how long.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tm_protocol::{report::Verdict, task::TaskState};

use crate::status::Query;

/// `GET /v1/coverage`. What is not named does not narrow it down.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoverageQuery {
    /// Only these endpoints: targets, separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub targets: Option<String>,
    /// Only those that a search finds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
    /// Only those of this group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Only those that a query of the overview counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<Query>,
    /// How old a look may be, in days, 1 to [`CoverageQuery::MAX_DAYS`] (default 7).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub days: Option<u32>,
    /// The absolute path that has to be looked at as a whole, base64 of its exact bytes (default `/`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_b64: Option<String>,
}

impl CoverageQuery {
    /// Most days.
    pub const MAX_DAYS: u32 = 36_500;
    /// Days if none are named.
    pub const DAYS: u32 = 7;
    /// Most targets.
    pub const MAX_TARGETS: usize = 1000;
}

/// The answer: counts and the endpoints that they count.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CoverageView {
    /// Escaped path.
    pub path: String,
    /// Its exact bytes.
    pub path_b64: String,
    /// How old a look may be.
    pub days: u32,
    /// How many endpoints stand how.
    pub counts: Counts,
    /// All of them, by host name.
    pub endpoints: Vec<EndpointCoverage>,
}

/// How many endpoints stand how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// [`Standing::Covered`].
    pub covered: u64,
    /// [`Standing::Stale`].
    pub stale: u64,
    /// [`Standing::Incomplete`].
    pub incomplete: u64,
    /// [`Standing::Never`].
    pub never: u64,
}

/// How an endpoint stands towards the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// The whole of it was looked at within the days.
    Covered,
    /// The whole of it was looked at, but longer ago.
    Stale,
    /// It was not looked at as a whole within the days, and the newest scan of it left gaps.
    Incomplete,
    /// No scan of it has ever ended.
    Never,
}

/// One endpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EndpointCoverage {
    /// Its id.
    pub id: String,
    /// Its host name.
    pub host: String,
    /// How it stands.
    pub standing: Standing,
    /// The newest scan that looked at the whole of the path.
    pub whole: Option<Look>,
    /// The newest scan of the path, however it ended.
    pub last: Option<Look>,
}

/// One scan of the path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Look {
    /// The task.
    pub task: String,
    /// When it began.
    pub looked_at: String,
    /// How long ago that is, in seconds.
    pub age_s: u64,
    /// How the task ended.
    pub state: TaskState,
    /// Why it failed, where it did.
    pub code: Option<String>,
    /// What it may say; missing if it failed.
    pub verdict: Option<Verdict>,
    /// The patterns it looked with, by name.
    pub patterns: Vec<String>,
    /// What leaves a gap and was skipped, by reason.
    pub gaps: BTreeMap<String, u64>,
    /// Whether its receipt is signed by the endpoint's key.
    pub verified: bool,
}
