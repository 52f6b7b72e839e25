//! Orders: as the frames that the journal keeps, and what none may ask for. Pure.

use bytes::BytesMut;
use tm_protocol::{
    message::{Assign, ToAgent},
    report::Failure,
    task::{CleanupSpec, RestoreSpec, ScanSpec, TaskSpec},
};

/// The frame of an order; `None` if it is too long for one.
pub(super) fn encode_order(assign: &Assign) -> Option<Vec<u8>> {
    let mut bytes = BytesMut::new();
    ToAgent::from(assign.clone()).encode(&mut bytes).ok()?;
    Some(bytes.to_vec())
}

pub(super) fn decode_order(frame: &[u8]) -> Option<Assign> {
    let mut bytes = BytesMut::from(frame);
    let frame = tm_protocol::frame::take(&mut bytes, ToAgent::limit).ok()??;
    match ToAgent::decode(&frame).ok()?? {
        ToAgent::Assign(assign) => Some(assign),
        ToAgent::Welcome(_)
        | ToAgent::Ping(_)
        | ToAgent::Pong(_)
        | ToAgent::ReportStored(_)
        | ToAgent::Goodbye(_)
        | ToAgent::EnrollReply(_)
        | ToAgent::Renewed(_)
        | ToAgent::Authorities(_)
        | ToAgent::Held(_)
        | ToAgent::NewIdentity(_)
        | ToAgent::RenewNow(_)
        | ToAgent::Cancel(_)
        | ToAgent::NoticesStored(_) => None,
    }
}

/// What an agent will not do, whoever orders it.
pub(super) fn invalid(spec: &TaskSpec) -> Option<Failure> {
    let is_path = |path: &tm_protocol::report::PathBytes| {
        path.0.starts_with(b"/") && path.0.len() <= ScanSpec::MAX_PATH && !path.0.contains(&0)
    };
    let (is_sound, what) = match spec {
        TaskSpec::Scan(scan) => match scan.options.contradiction(scan.paths.len()) {
            Some(why) => (false, why),
            None => (
                scan.paths.len() <= ScanSpec::MAX_PATHS
                    && scan.paths.iter().all(is_path)
                    && (1..=ScanSpec::MAX_PATTERNS).contains(&scan.patterns.len()),
                "a scan needs absolute paths and patterns, within their limits",
            ),
        },
        TaskSpec::Cleanup(cleanup) => (
            (1..=CleanupSpec::MAX_DETECTIONS).contains(&cleanup.detections.len()),
            "a cleanup needs detections, within their limit",
        ),
        TaskSpec::Restore(restore) => (
            (1..=RestoreSpec::MAX_ITEMS).contains(&restore.items.len())
                && restore.to.as_ref().is_none_or(|to| restore.items.len() == 1 && is_path(to)),
            "a restore needs vault items, within their limit, and one at most for another place",
        ),
    };
    (!is_sound).then(|| Failure::new("invalid", what))
}
