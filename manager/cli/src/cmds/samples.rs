//! Views for tests, as a manager would give them.

use tm_api::{
    endpoint::{Connectivity, EndpointView},
    event::{EventKind, EventStatus, EventView, IncidentState, IncidentView},
    task::{ItemView, TaskView},
};
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
        paths: Vec::new(),
        options: None,
        quoted: None,
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

/// The endpoint that [`task`] is of.
pub(super) fn endpoint() -> EndpointView {
    let text = |text: &str| text.to_owned();
    EndpointView {
        id: text("e"),
        host: text("web"),
        addresses: vec![text("10.0.0.7"), text("::1")],
        group: text("default"),
        connectivity: Connectivity::Connected,
        quarantine: text("free"),
        restart_reasons: Vec::new(),
        agent_version: text("0.1.0"),
        patterns: Vec::new(),
        enrolled_at: text("2026-01-01T00:00:00Z"),
        revoked_at: None,
        last_seen_at: Some(text("2026-01-02T03:04:05Z")),
        last_failure: None,
        inventory: None,
    }
}

/// An incident on it that waits, with 2 of 3 detections open.
pub(super) fn incident() -> IncidentView {
    let text = |text: &str| text.to_owned();
    IncidentView {
        id: text("i"),
        endpoint: text("e"),
        host: text("web"),
        pattern: text("p.yar"),
        rule: text("Rule"),
        state: IncidentState::AwaitingCleanup,
        detections: 3,
        open_detections: 2,
        path: text("/srv/x"),
        opened_at: text("2026-01-01T00:00:00Z"),
        changed_at: text("2026-01-02T00:00:00Z"),
        task: None,
    }
}

/// An event of it.
pub(super) fn event(id: i64, message: &str) -> EventView {
    let text = |text: &str| text.to_owned();
    EventView {
        id,
        at: text("2026-01-02T03:04:05.678Z"),
        endpoint: text("e"),
        host: text("web"),
        kind: EventKind::Cleanup,
        status: EventStatus::InProgress,
        detail: text("d"),
        message: text(message),
        advice: String::new(),
        task: None,
        incident: None,
    }
}
