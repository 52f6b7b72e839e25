//! Hands out what is due, expires what waited too long, flushes what was heard.
//!
//! One path serves every case: a nudge carries no data, and a pass asks the store what is due for whoever is
//! connected here. After a restart or a failure the next pass does what was left.

use std::{sync::Arc, time::Duration};

use tm_protocol::{
    ids::EndpointId,
    message::{Assign, ToAgent},
};
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    agents::{now_ms, registry::Registry},
    store::{Store, StoreError, due::DueTask},
};

/// How often a pass runs without a nudge.
const PASS: Duration = Duration::from_secs(5);
/// How often progress is written down.
const PROGRESS: Duration = Duration::from_secs(1);

/// Runs until the manager ends.
pub(crate) async fn run(store: Store, registry: Registry, nudge: Arc<Notify>, ending: CancellationToken) {
    while !ending.is_cancelled() {
        if let Err(error) = pass(&store, &registry).await {
            tracing::warn!(%error, "A dispatch pass failed; the next one does its work.");
        }
        tokio::select! {
            () = nudge.notified() => {}
            () = sleep(PASS) => {}
            () = ending.cancelled() => {}
        }
    }
}

/// Flushes and expires until the manager ends.
pub(crate) async fn sweep(store: Store, registry: Registry, ending: CancellationToken) {
    let mut round: u32 = 0;
    while !ending.is_cancelled() {
        tokio::select! {
            () = sleep(PROGRESS) => {}
            () = ending.cancelled() => {}
        }
        round = round.wrapping_add(1);
        let whole = round.is_multiple_of(5) || ending.is_cancelled();
        let seen = if whole { registry.take_seen() } else { Vec::new() };
        let now = now_ms();
        let done = async {
            store.flush_seen(&seen, &registry.take_progress(), now).await?;
            if whole { store.expire_tasks(now).await } else { Ok(0) }
        };
        if let Err(error) = done.await {
            tracing::warn!(%error, "A sweep failed.");
        }
    }
}

async fn pass(store: &Store, registry: &Registry) -> Result<(), StoreError> {
    for endpoint in registry.connected() {
        let now = now_ms();
        for due in store.due_tasks(endpoint, now).await? {
            if registry.was_sent(endpoint, due.task) {
                continue;
            }
            let task = due.task;
            if !registry.assign(endpoint, task, assign(endpoint, due, now)) {
                break;
            }
        }
    }
    Ok(())
}

/// The order as it goes over the wire: times become what is left of them.
fn assign(endpoint: EndpointId, due: DueTask, now_ms: i64) -> ToAgent {
    let left = |until: i64| u64::try_from(until.saturating_sub(now_ms)).unwrap_or(0);
    Assign {
        task: due.task,
        endpoint,
        spec: due.spec,
        // A task that its agent had accepted before is begun again whatever it waited meanwhile.
        expires_in_ms: left(due.expires_ms).max(1000),
        deadline_ms: u64::try_from(due.deadline_ms).unwrap_or(0),
        issuer: due.issuer,
        reason: due.reason,
    }
    .into()
}
