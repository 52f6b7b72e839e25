//! Exporters: threat events on their way to other systems.

use serde::{Deserialize, Serialize};

/// One exporter: a row of `GET /v1/exports`, by name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExportView {
    /// Its name in the managers' configuration.
    pub name: String,
    /// `syslog` or `webhook`.
    pub kind: String,
    /// Where it sends, without secrets.
    pub receiver: String,
    /// The manager that exports now; none if no manager that is up has it in its configuration, or while it waits after
    /// a failure.
    pub manager: Option<String>,
    /// Number of the last event that its receiver took.
    pub last_event: Option<i64>,
    /// When that was.
    pub last_sent_at: Option<String>,
    /// Number of the last event that is dealt with: taken, or not for this exporter.
    pub done: i64,
    /// Events after that one.
    pub lag_events: u64,
    /// Age of the first of them.
    pub lag_ms: u64,
    /// Since when it does not go on.
    pub failing_since: Option<String>,
    /// Why.
    pub error: Option<String>,
}
