//! Tasks and their results.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tm_protocol::{
    report::{Failure, ItemVerdict, Tally, Verdict},
    task::{ScanLimits, ScanOptions, TaskState},
};

/// Whom an order is for. At least one of the three; endpoints named twice get it once.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Targets {
    /// Each an endpoint id, host name or address that means exactly one endpoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub targets: Vec<String>,
    /// Every endpoint that this search finds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
    /// Every endpoint of this group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Every endpoint that this query of the overview counts ([`crate::status::Query`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query: Option<crate::status::Query>,
}

/// How an order is given, whatever it orders.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    /// How long it may wait to be begun, in seconds (default one hour).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_s: Option<u64>,
    /// How long it may run, in seconds (default one hour).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_s: Option<u64>,
    /// Also for endpoints that are not connected now.
    #[serde(default)]
    pub when_connected: bool,
    /// Why, for the record.
    #[serde(default)]
    pub reason: String,
    /// Say what would be done on the endpoint and change nothing there.
    #[serde(default)]
    pub dry_run: bool,
}

/// `POST /v1/cleanups`: removes what was detected. One task for each endpoint (and for each thousand
/// detections of one). The answer is the list of tasks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunCleanup {
    /// For whom.
    pub to: Targets,
    /// Keys of detections (or unambiguous starts of them, eight digits or more) on those endpoints; empty
    /// means every detection of every incident there that awaits cleanup.
    #[serde(default)]
    pub detections: Vec<String>,
    /// The terms.
    #[serde(default)]
    pub terms: Terms,
}

/// `POST /v1/restores`: puts vaulted files back. One task for each endpoint concerned. The answer is the
/// list of tasks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRestore {
    /// Ids of vault items.
    pub items: Vec<String>,
    /// Where to put the one item instead: base64 of an absolute path's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_b64: Option<String>,
    /// Restore set-user-id and set-group-id bits and file capabilities too.
    #[serde(default)]
    pub set_id: bool,
    /// The terms.
    #[serde(default)]
    pub terms: Terms,
}

/// `POST /v1/scans`: one task for each target. The answer is the list of tasks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartScan {
    /// For whom.
    pub to: Targets,
    /// Absolute paths, each base64 of its exact bytes. None are needed where the options say what to look at.
    #[serde(default)]
    pub paths_b64: Vec<String>,
    /// Patterns by name or digest; empty means all that are imported (of each name the newest).
    #[serde(default)]
    pub patterns: Vec<String>,
    /// How far to go with one file.
    #[serde(default)]
    pub limits: ScanLimits,
    /// How to go about it.
    #[serde(default)]
    pub options: ScanOptions,
    /// How long it may wait to be begun, in seconds (default one hour).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_s: Option<u64>,
    /// How long it may run, in seconds (default 24 hours).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_s: Option<u64>,
    /// Also for endpoints that are not connected now.
    #[serde(default)]
    pub when_connected: bool,
    /// Why, for the record.
    #[serde(default)]
    pub reason: String,
}

/// `GET /v1/tasks`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskQuery {
    /// Only tasks of this endpoint (a target).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Only tasks in this state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<TaskState>,
    /// Most rows, newest first, 1 to 1000 (default 100).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// One task: a row of `GET /v1/tasks`, or `GET /v1/tasks/{id}`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskView {
    /// Its id.
    pub id: String,
    /// What it is (`scan`, `cleanup`, `restore`).
    pub kind: String,
    /// For which endpoint.
    pub endpoint: String,
    /// That endpoint's host name.
    pub host: String,
    /// How far it has come.
    pub state: TaskState,
    /// Why it failed or was refused.
    pub code: Option<String>,
    /// The same for people.
    pub message: Option<String>,
    /// While it runs.
    pub progress: Option<ProgressView>,
    /// What came of it, once it has ended (a cancelled task says what it had done by then).
    pub result: Option<TaskResult>,
    /// It was asked to change nothing and to say what it would do.
    #[serde(default)]
    pub dry_run: bool,
    /// Somebody called it off and its agent has not yet said what came of that.
    #[serde(default)]
    pub cancelling: bool,
    /// Who ordered it.
    pub issuer: String,
    /// Why.
    pub reason: String,
    /// When it was ordered.
    pub created_at: String,
    /// When its agent began.
    pub started_at: Option<String>,
    /// When it ended.
    pub finished_at: Option<String>,
    /// When it expires if it has not begun.
    pub expires_at: String,
    /// Where a scan looks (escaped), told of a task that is asked for by its id.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// What else it looks at and how it goes about it, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub options: Option<ScanOptions>,
    /// What was quoted for the same order before, likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quoted: Option<Box<QuotedView>>,
}

/// A quote that was made for the same order, before it was given.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QuotedView {
    /// The task that made it.
    pub task: String,
    /// When that was ordered.
    pub created_at: String,
    /// What it said.
    pub quote: QuoteView,
}

/// What came of a scan with `dry_run`: what it would look at, and what that is likely to cost. Nothing was read for
/// it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuoteView {
    /// Files that it would look at, those that are known clean among them.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
    /// How many of them are known clean and would not be read.
    pub known: u64,
    /// Bytes of those.
    pub known_bytes: u64,
    /// What would be skipped, by reason, as far as it shows without reading.
    pub skipped: BTreeMap<String, u64>,
    /// What it is likely to cost; missing where there is no past scan to estimate from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<EstimateView>,
    /// Wall time of the quote itself, in seconds.
    pub elapsed_s: f64,
    /// CPU time of the quote itself, in seconds.
    pub cpu_s: f64,
}

/// What a scan is likely to cost, as past scans of the endpoint went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EstimateView {
    /// CPU time, in seconds.
    pub cpu_s: f64,
    /// Wall time, in seconds.
    pub elapsed_s: f64,
    /// From how many past scans.
    pub runs: u32,
    /// Whether they were with the same patterns; others tell less.
    pub same_patterns: bool,
}

/// How far a running scan is.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ProgressView {
    /// Files looked at.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
    /// Detections so far.
    pub detections: u64,
    /// Skips so far.
    pub skipped: u64,
}

impl TaskView {
    /// Its receipt, if it is a scan that has one.
    pub fn scan(&self) -> Option<&ScanResult> {
        self.result.as_ref().and_then(TaskResult::scan)
    }

    /// What it said, if it is a scan with `dry_run` that has ended well.
    pub fn quote(&self) -> Option<&QuoteView> {
        self.result.as_ref().and_then(TaskResult::quote)
    }

    /// Its sum, if it is a cleanup or a restore that has one.
    pub fn treatment(&self) -> Option<&Tally> {
        self.result.as_ref().and_then(TaskResult::treatment)
    }
}

/// What came of a task, by its kind.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TaskResult {
    /// Of a scan.
    Scan(ScanResult),
    /// Of a cleanup or a restore. Its items are at `GET /v1/tasks/{id}/items`.
    Treatment(Tally),
    /// Of a scan with `dry_run`.
    Quote(QuoteView),
}

impl TaskResult {
    /// A scan's receipt.
    pub const fn scan(&self) -> Option<&ScanResult> {
        match self {
            Self::Scan(scan) => Some(scan),
            Self::Treatment(_) | Self::Quote(_) => None,
        }
    }

    /// A cleanup's or restore's sum.
    pub const fn treatment(&self) -> Option<&Tally> {
        match self {
            Self::Scan(_) | Self::Quote(_) => None,
            Self::Treatment(tally) => Some(tally),
        }
    }

    /// What a scan with `dry_run` said.
    pub const fn quote(&self) -> Option<&QuoteView> {
        match self {
            Self::Scan(_) | Self::Treatment(_) => None,
            Self::Quote(quote) => Some(quote),
        }
    }
}

/// `GET /v1/tasks/{id}/items`: a page of these.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ItemView {
    /// Its number within the task, from 1; the position to page by.
    pub id: i64,
    /// The cleanup or restore.
    pub task: String,
    /// On which endpoint.
    pub endpoint: String,
    /// Escaped path.
    pub path: String,
    /// Exact bytes of the path.
    pub path_b64: String,
    /// Its item in the vault, where there is one.
    pub vault: Option<String>,
    /// Digest of the file, where known.
    pub sha256: Option<String>,
    /// Its size.
    pub size: u64,
    /// What came of it.
    pub verdict: ItemVerdict,
    /// Why, where it was refused or failed.
    pub failure: Option<Failure>,
    /// What an administrator should know besides.
    pub notes: Vec<Failure>,
    /// Keys of the detections it settles.
    pub detections: Vec<String>,
}

/// `GET /v1/vault`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VaultQuery {
    /// Only the vault of this endpoint (a target).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Only items before this one, for the next page.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// Most rows, newest first, 1 to 1000 (default 1000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// One vaulted file: a row of `GET /v1/vault`, newest first, as its agent last reported.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VaultItemView {
    /// Its id.
    pub id: String,
    /// On which endpoint.
    pub endpoint: String,
    /// That endpoint's host name.
    pub host: String,
    /// Escaped path.
    pub path: String,
    /// Exact bytes of the path.
    pub path_b64: String,
    /// Digest of the content.
    pub sha256: String,
    /// Size, in bytes.
    pub size: u64,
    /// When it was vaulted.
    pub vaulted_at: String,
}

/// What a scan found: the coverage receipt. Its detections are at `GET /v1/tasks/{id}/detections`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScanResult {
    /// clean, detected or incomplete.
    pub verdict: Verdict,
    /// Files looked at.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
    /// How many of those files were not read now: the same patterns had found them clean, and they have not
    /// changed since.
    #[serde(default)]
    pub known: u64,
    /// Detections in all.
    pub detections: u64,
    /// Skips by reason.
    pub skipped: BTreeMap<String, u64>,
    /// The first skips that leave a gap.
    pub skipped_paths: Vec<SkippedView>,
    /// Wall time, in seconds.
    pub elapsed_s: f64,
    /// CPU time, in seconds.
    pub cpu_s: f64,
    /// The endpoint's signature over it; missing of before there were receipts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Box<ReceiptView>>,
}

/// The signed receipt of a scan. Anybody can check it: the signature is ECDSA (P-256, SHA-256) in ASN.1 form over
/// the signed bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReceiptView {
    /// Whether the manager found the signature to be by the key of the endpoint's certificate.
    pub verified: bool,
    /// `unsigned` or `bad-signature` where it is not.
    pub problem: Option<String>,
    /// When the scan began, by the endpoint's clock.
    pub started_at: Option<String>,
    /// When it ended, likewise.
    pub ended_at: Option<String>,
    /// Base64 of the signature; empty if there is none.
    pub signature: String,
    /// Base64 of the endpoint's public key (SubjectPublicKeyInfo, DER).
    pub key: String,
    /// Base64 of what is signed: lines of text.
    pub signed_bytes_b64: String,
}

/// One thing that was not looked at.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SkippedView {
    /// Escaped path.
    pub path: String,
    /// Exact bytes of the path.
    pub path_b64: String,
    /// Escaped names of the member, outermost first.
    pub member: Vec<String>,
    /// Why.
    pub reason: String,
}

/// `GET /v1/tasks/{id}/detections`: a page of these.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DetectionView {
    /// Its number within the task, from 1; the position to page by.
    pub id: i64,
    /// Names what was found where ([`tm_protocol::report::Detection::key`]); a cleanup is ordered by it.
    pub key: String,
    /// The incident it belongs to.
    pub incident: Option<String>,
    /// The scan.
    pub task: String,
    /// On which endpoint.
    pub endpoint: String,
    /// Escaped path.
    pub path: String,
    /// Exact bytes of the path.
    pub path_b64: String,
    /// Escaped names of the member, outermost first.
    pub member: Vec<String>,
    /// The pattern's name.
    pub pattern: String,
    /// The pattern's digest.
    pub pattern_sha256: String,
    /// The rule.
    pub rule: String,
    /// Digest of the file on disk.
    pub sha256: String,
    /// Size of the file on disk.
    pub size: u64,
    /// When it was found, by the agent's clock.
    pub found_at: String,
}
