//! Views for tests, as a manager would give them.

use tm_api::task::{ItemView, TaskView};
use tm_protocol::{
    report::{Failure, ItemVerdict},
    task::TaskState,
};

/// A task of host `web`.
pub(super) fn task(kind: &str, state: TaskState) -> TaskView {
    let text = |text: &str| text.to_owned();
    TaskView {
        id: text("t"),
        kind: text(kind),
        endpoint: text("e"),
        host: text("web"),
        state,
        code: None,
        message: None,
        progress: None,
        result: None,
        dry_run: false,
        cancelling: false,
        issuer: text("ann"),
        reason: String::new(),
        created_at: text("2026-01-02T03:04:05.678Z"),
        started_at: None,
        finished_at: None,
        expires_at: text("2026-01-02T04:04:05.678Z"),
    }
}

/// An item at `path`; the failure is `code: message`.
pub(super) fn item(path: &str, verdict: ItemVerdict, failure: Option<&str>) -> ItemView {
    ItemView {
        id: 1,
        task: "t".into(),
        endpoint: "e".into(),
        path: path.into(),
        path_b64: String::new(),
        vault: None,
        sha256: None,
        size: 1024,
        verdict,
        failure: failure.map(failure_of),
        notes: Vec::new(),
        detections: Vec::new(),
    }
}

/// `code: message`.
pub(super) fn failure_of(text: &str) -> Failure {
    let (code, message) = text.split_once(": ").expect("a code and a message");
    Failure::new(code, message)
}
