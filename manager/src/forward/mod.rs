//! Threat events on their way out: to a SIEM as syslog, to a program as webhook.
//!
//! Each exporter reads the log on from its mark in the database, hands what is wanted to its receiver, and moves the
//! mark when the receiver has it. One manager at a time does that for an exporter; when it is gone, another goes on
//! from the mark.
//!
//! **Invariant:** every wanted event is sent at least once, and none before an earlier one has been taken.
//! **Invariant:** one batch is in memory, whatever waits.

mod rfc5424;
pub(crate) mod settings;
mod syslog;
mod tls;
mod webhook;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tm_protocol::{
    ids::{FleetId, ManagerId},
    text::escape_for_display,
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::settings::{Export, ExportError, Filter, To};
use crate::{
    metrics::METRICS,
    store::{
        Store, StoreError,
        events::{EventFilter, EventRow},
    },
};

/// How often is looked whether anything is new, or free.
const POLL: Duration = Duration::from_secs(1);
/// How long one batch may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest rest after failures.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// One exporter, ready to go.
#[derive(Debug)]
pub(crate) struct Exporter {
    name: String,
    kind: &'static str,
    receiver: String,
    filter: Filter,
    sink: Sink,
}

#[derive(Debug)]
enum Sink {
    Syslog(syslog::Syslog),
    Webhook(Box<webhook::Webhook>),
}

/// Why a batch did not get to its receiver. The text is for people and has no secrets.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("TLS: {0}")]
    Tls(String),
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("the receiver closed without confirming (no close_notify); `confirm = false` does without")]
    Unconfirmed,
    #[error("the receiver answered {0}")]
    Status(u16),
    #[error("the receiver takes too long")]
    Slow,
}

/// How a round went.
enum Round {
    /// There is more to send.
    More,
    /// Nothing is left, for now.
    Idle,
    /// Another manager exports.
    NotOurs,
    Store(StoreError),
    Failed(SendError),
}

impl Exporter {
    /// Makes one from its settings; reads the files that they name.
    ///
    /// # Errors
    /// If a file cannot be used, by the key that names it.
    pub(crate) fn open(export: &Export, fleet: FleetId) -> Result<Self, ExportError> {
        let sink = match &export.to {
            To::Syslog(to) => Sink::Syslog(syslog::Syslog::open(&export.name, to)?),
            To::Webhook(to) => Sink::Webhook(Box::new(webhook::Webhook::open(&export.name, to, fleet)?)),
        };
        Ok(Self {
            name: export.name.clone(),
            kind: export.to.kind(),
            receiver: export.to.receiver(),
            filter: export.filter.clone(),
            sink,
        })
    }

    /// Says, in the log, the metrics and the store, that a batch did not get through.
    async fn tell(&self, error: &SendError, store: &Store, manager: ManagerId) {
        METRICS.export_failed(&self.name);
        let said = escape_for_display(&error.to_string());
        tracing::warn!(exporter = self.name, error = said, "Events are not exported; they wait.");
        if let Err(error) = store.exporter_failed(&self.name, manager, &said, now_ms()).await {
            tracing::warn!(exporter = self.name, %error, "Cannot note that.");
        }
    }

    async fn round(&self, store: &Store, manager: ManagerId) -> Round {
        match self.try_round(store, manager).await {
            Ok(round) => round,
            Err(error) => Round::Store(error),
        }
    }

    async fn try_round(&self, store: &Store, manager: ManagerId) -> Result<Round, StoreError> {
        let Some(done) = store.hold_exporter(&self.name, manager).await? else { return Ok(Round::NotOurs) };
        let most = self.sink.most();
        let filter = EventFilter { after: Some(done), ..EventFilter::default() };
        let events = store.events(&filter, false, most).await?;
        let Some(last) = events.last().map(|event| event.id) else { return Ok(Round::Idle) };
        let is_full = events.len() >= usize::try_from(most).unwrap_or(usize::MAX);
        let wanted: Vec<EventRow> =
            events.into_iter().filter(|event| self.filter.wants(event.kind, event.status)).collect();
        if !wanted.is_empty() {
            match timeout(PATIENCE, self.sink.send(&wanted)).await {
                Ok(Ok(())) => METRICS.exported(&self.name, wanted.len()),
                Ok(Err(error)) => return Ok(Round::Failed(error)),
                Err(_) => return Ok(Round::Failed(SendError::Slow)),
            }
        }
        let sent = wanted.last().map(|event| event.id);
        let moved = store.advance_exporter(&self.name, manager, (done, last), sent, now_ms()).await?;
        Ok(match (moved, is_full) {
            (false, _) => Round::NotOurs,
            (true, true) => Round::More,
            (true, false) => Round::Idle,
        })
    }
}

impl Sink {
    /// Events in one batch.
    const fn most(&self) -> u32 {
        match self {
            Self::Syslog(_) => 500,
            Self::Webhook(_) => 100,
        }
    }

    /// Sends a batch; returns when the receiver has it.
    async fn send(&self, events: &[EventRow]) -> Result<(), SendError> {
        match self {
            Self::Syslog(syslog) => syslog.send(events).await,
            Self::Webhook(webhook) => webhook.send(events).await,
        }
    }
}

/// Enters what the configuration names and lets go of what this manager held before.
///
/// # Errors
/// If the database refuses.
pub(crate) async fn enter(
    store: &Store,
    manager: ManagerId,
    exporters: &[Arc<Exporter>],
) -> Result<(), StoreError> {
    store.release_exporters(manager).await?;
    for exporter in exporters {
        store.enter_exporter(&exporter.name, exporter.kind, &exporter.receiver).await?;
        METRICS.exporter(&exporter.name);
    }
    Ok(())
}

/// Exports until the manager ends.
pub(crate) async fn run(
    exporter: Arc<Exporter>,
    store: Store,
    manager: ManagerId,
    ending: CancellationToken,
) {
    let mut failures: u32 = 0;
    loop {
        let round = tokio::select! {
            round = exporter.round(&store, manager) => round,
            () = ending.cancelled() => return,
        };
        let rest = match round {
            Round::More => {
                failures = 0;
                Duration::ZERO
            }
            Round::Idle => {
                failures = 0;
                POLL
            }
            Round::NotOurs => POLL,
            Round::Store(error) => {
                tracing::warn!(exporter = exporter.name, %error, "An exporter cannot use the store.");
                POLL
            }
            Round::Failed(error) => {
                exporter.tell(&error, &store, manager).await;
                failures = failures.saturating_add(1);
                rest_after(failures)
            }
        };
        tokio::select! {
            () = sleep(rest) => {}
            () = ending.cancelled() => return,
        }
    }
}

/// 1, 2, 4 … seconds.
fn rest_after(failures: u32) -> Duration {
    Duration::from_secs(1 << failures.saturating_sub(1).min(10)).min(LONGEST_REST)
}

/// Milliseconds since 1970.
fn now_ms() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}

/// The innermost reason of an error, which says most in the fewest words.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rests_grow_and_have_an_end() {
        let rests: Vec<u64> = [1, 2, 3, 5, 6, 99, u32::MAX].map(|n| rest_after(n).as_secs()).into();
        assert_eq!(rests, [1, 2, 4, 16, 30, 30, 30]);
    }
}
