//! `/metrics`, `/healthz` and `/readyz`: what monitoring asks.
//!
//! `/healthz` says that the process answers. `/readyz` says whether it can do its work, and with 503 what is
//! missing. Neither needs a token nor says more than fixed words: whoever reaches the port may ask, and however
//! often he does, the database is asked once a second.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Serialize;
use tm_protocol::ids::ManagerId;
use tokio::{
    sync::{Mutex, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{AppState, now_ms};
use crate::{
    metrics::METRICS,
    store::{Store, StoreError},
};

/// How long an answer about readiness holds.
const READY: Duration = Duration::from_secs(1);
/// How long counts from the database do.
const COUNTED: Duration = Duration::from_secs(5);
/// How long the database may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// Less free space than this and the disk is nearly full, in bytes.
const LEAST_SPACE: u64 = 128 << 20;
/// The same for files that can still be made.
const LEAST_FILES: u64 = 1000;
/// The text format of Prometheus.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What answers are made from.
#[derive(Debug)]
pub(crate) struct Probes {
    store: Store,
    manager: ManagerId,
    /// Folders whose disks must have room.
    folders: Vec<PathBuf>,
    ending: CancellationToken,
    /// Held by the one look at the disks that there is at a time: a disk that does not answer holds it for long.
    disks: Arc<Semaphore>,
    ready: Mutex<Option<(Instant, Vec<Failing>)>>,
    counted: Mutex<Option<Instant>>,
}

/// What is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Failing {
    check: &'static str,
    message: &'static str,
}

/// The answer to `/readyz`.
#[derive(Debug, Serialize)]
struct Ready {
    ready: bool,
    failing: Vec<Failing>,
}

impl Probes {
    /// Watches a manager whose files are in `folders`, until `ending`.
    pub(crate) fn new(
        store: Store,
        manager: ManagerId,
        folders: Vec<PathBuf>,
        ending: CancellationToken,
    ) -> Arc<Self> {
        let (disks, ready, counted) = (Arc::new(Semaphore::new(1)), Mutex::default(), Mutex::default());
        Arc::new(Self { store, manager, folders, ending, disks, ready, counted })
    }

    /// What keeps the manager from its work, as it was within the last second.
    async fn failing(&self) -> Vec<Failing> {
        let mut ready = self.ready.lock().await;
        if let Some((_, failing)) = ready.as_ref().filter(|(at, _)| at.elapsed() < READY) {
            return failing.clone();
        }
        let failing = self.look().await;
        *ready = Some((Instant::now(), failing.clone()));
        failing
    }

    async fn look(&self) -> Vec<Failing> {
        let mut failing = Vec::new();
        let mut miss = |check, message| failing.push(Failing { check, message });
        let database = timeout(PATIENCE, self.store.is_current()).await;
        METRICS.database_up.set(i64::from(matches!(database, Ok(Ok(true)))));
        match database {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => miss("schema", "the database has another schema than this version's"),
            Ok(Err(error)) => {
                tracing::warn!(%error, "Not ready.");
                miss("database", "the database does not answer");
            }
            Err(_) => miss("database", "the database does not answer in time"),
        }
        if METRICS.agent_port_listening.get() != 1 {
            miss("agent-port", "links of agents are not accepted");
        }
        if let Some(message) = self.full().await {
            miss("disk", message);
        }
        if self.ending.is_cancelled() {
            miss("ending", "the manager ends");
        }
        failing
    }

    /// What is wrong with the disks, if anything is.
    async fn full(&self) -> Option<&'static str> {
        const SILENT: &str = "a folder of the manager does not answer";
        let Ok(alone) = Arc::clone(&self.disks).try_acquire_owned() else { return Some(SILENT) };
        let folders = self.folders.clone();
        // A folder may be on storage that is elsewhere, and away.
        let look = tokio::task::spawn_blocking(move || {
            let found = folders.iter().find_map(|folder| full(folder));
            drop(alone);
            found
        });
        timeout(PATIENCE, look).await.unwrap_or(Ok(Some(SILENT))).unwrap_or(Some(SILENT))
    }

    /// Everything that is measured, with what is counted in the database as it was within the last seconds.
    async fn exposition(&self) -> String {
        // It tells the metrics whether the database answers.
        let failing = self.failing().await;
        let (used, idle) = self.store.connections();
        METRICS.connections(used, idle);
        let mut counted = self.counted.lock().await;
        let is_due = counted.is_none_or(|at| at.elapsed() >= COUNTED);
        if is_due && !failing.iter().any(|failing| matches!(failing.check, "database" | "schema")) {
            match timeout(PATIENCE, self.count()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "Cannot count what the metrics show."),
                Err(_) => tracing::warn!("Counting what the metrics show takes too long."),
            }
            *counted = Some(Instant::now());
        }
        drop(counted);
        METRICS.text()
    }

    async fn count(&self) -> Result<(), StoreError> {
        let figures = self.store.figures().await?;
        for (state, count) in figures.tasks {
            METRICS.tasks(state, count);
        }
        METRICS.endpoints.set(figures.endpoints);
        METRICS.incidents_open.set(figures.incidents_open);
        for row in self.store.exporters().await? {
            METRICS.export_lag(&row.name, row.lag_events, seconds_since(row.waiting_since_ms));
        }
        let own = self.store.own(self.manager).await?;
        for kind in ["authority", "manager"] {
            let ends = own.iter().filter(|own| own.what == kind).map(|own| own.end_ms);
            if let Some(first) = ends.min() {
                METRICS.certificate(kind, first);
            }
        }
        Ok(())
    }
}

/// What is wrong with a folder's disk, if anything is.
fn full(folder: &Path) -> Option<&'static str> {
    match rustix::fs::statvfs(folder) {
        Ok(disk) if disk.f_bavail.saturating_mul(disk.f_frsize) < LEAST_SPACE => {
            Some("less than 128 MiB are free where the manager keeps its files")
        }
        // Some file systems do not count files: they say that there are none at all.
        Ok(disk) if disk.f_files > 0 && disk.f_favail < LEAST_FILES => {
            Some("hardly any more files can be made where the manager keeps its files")
        }
        Ok(_) => None,
        Err(_) => Some("a folder of the manager is gone"),
    }
}

/// The age of what waits, in seconds.
#[expect(clippy::cast_precision_loss, reason = "a double tells milliseconds apart for 280,000 years")]
fn seconds_since(at_ms: Option<i64>) -> f64 {
    at_ms.map_or(0.0, |at| now_ms().saturating_sub(at).max(0) as f64 / 1000.0)
}

/// `/metrics` for whoever shows a token.
pub(super) async fn metrics(State(state): State<AppState>) -> Response {
    exposition(State(state.probes)).await
}

async fn exposition(State(probes): State<Arc<Probes>>) -> Response {
    ([(header::CONTENT_TYPE, TEXT)], probes.exposition().await).into_response()
}

async fn healthz() -> Response {
    Json(serde_json::json!({ "alive": true })).into_response()
}

async fn readyz(State(probes): State<Arc<Probes>>) -> Response {
    let failing = probes.failing().await;
    let status = if failing.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Ready { ready: failing.is_empty(), failing })).into_response()
}

/// What everybody may ask.
pub(super) fn open<S: Clone + Send + Sync + 'static>(probes: Arc<Probes>) -> Router<S> {
    Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz)).with_state(probes)
}

/// What programs on this machine may ask without a token.
pub(crate) fn local(probes: Arc<Probes>) -> Router {
    let metrics = Router::new().route("/metrics", get(exposition)).with_state(Arc::clone(&probes));
    open(probes).merge(metrics)
}

/// Counts a request, by its answer.
pub(super) async fn counted(request: Request, next: Next) -> Response {
    let begin = Instant::now();
    let response = next.run(request).await;
    METRICS.request(response.status().as_u16(), begin.elapsed());
    response
}
