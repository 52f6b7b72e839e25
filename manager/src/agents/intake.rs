//! Reports of all sessions, committed together, so that durability does not cost one disk flush per agent.

use std::time::Duration;

use tm_protocol::{ids::EndpointId, message::Report};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout_at},
};

use super::now_ms;
use crate::store::{Store, StoreError};

/// Reports that wait to be committed; sessions wait when it is full.
const QUEUE: usize = 1024;
/// Most reports in one commit, and how long the first waits for others.
const BATCH: usize = 256;
const GATHER: Duration = Duration::from_millis(5);

/// Where sessions hand reports in.
#[derive(Debug, Clone)]
pub(crate) struct Intake(mpsc::Sender<Item>);

struct Item {
    endpoint: EndpointId,
    report: Report,
    stored: oneshot::Sender<Result<(), StoreError>>,
}

impl Intake {
    /// Starts the one writer.
    pub(crate) fn start(store: Store) -> Self {
        let (sender, queue) = mpsc::channel(QUEUE);
        tokio::spawn(write(store, queue));
        Self(sender)
    }

    /// Returns once the report is committed.
    pub(crate) async fn store(&self, endpoint: EndpointId, report: Report) -> Result<(), StoreError> {
        let (stored, answer) = oneshot::channel();
        let gone = || StoreError::content("writer", "it has ended");
        self.0.send(Item { endpoint, report, stored }).await.map_err(|_| gone())?;
        answer.await.unwrap_or_else(|_| Err(gone()))
    }
}

async fn write(store: Store, mut queue: mpsc::Receiver<Item>) {
    while let Some(first) = queue.recv().await {
        let mut items = vec![first];
        let until = Instant::now() + GATHER;
        while items.len() < BATCH
            && let Ok(Some(item)) = timeout_at(until, queue.recv()).await
        {
            items.push(item);
        }
        let (answers, reports): (Vec<_>, Vec<_>) =
            items.into_iter().map(|item| (item.stored, (item.endpoint, item.report))).unzip();
        let Err(error) = store.record_reports(&reports, now_ms()).await else {
            for answer in answers {
                let _ = answer.send(Ok(()));
            }
            continue;
        };
        tracing::warn!(%error, reports = reports.len(), "Cannot commit reports together; trying each alone.");
        // One report that the store cannot take must not stand in the way of everybody else's.
        for (answer, report) in answers.into_iter().zip(reports) {
            let _ = answer.send(store.record_reports(&[report], now_ms()).await);
        }
    }
}
