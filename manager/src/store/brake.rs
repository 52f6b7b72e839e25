//! What stops a version of a pattern by itself, and what a stopped one takes with it.
//!
//! A rollout is watched while it runs. Its brake acts at once when the version hit a file of a package, and when more
//! than a set share of the endpoints that have looked with it have found something, [`FEWEST`] of them at least.
//!
//! **Invariant:** it is counted in the transaction of the report that tips it, so that no find is stored and not
//! counted, and counted once for an endpoint however often it is told.
//! **Invariant:** what is sent to an agent names no stopped version; a cleanup of what one found, ordered before it was
//! stopped, is not sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sqlx::{AssertSqlSafe, Row as _};
use tm_api::{
    event::{EventKind, EventStatus},
    rollout::{RolloutState, Share},
};
use tm_protocol::{
    ids::{EndpointId, Sha256, TaskId},
    report::{Failure, OwnedFile},
    task::{CleanupSpec, PatternRef, TaskSpec, TaskState},
    text,
};
use uuid::Uuid;

use super::{
    PARTS, Store, StoreError, Tx, agent_text,
    events::{self, NewEvent},
    outcomes::{self, End},
    parts, places,
    rollouts::{self, RolloutRow},
    specs,
};

/// Fewer endpoints with finds than this stop nothing, whatever their share: one of one says little.
const FEWEST: i64 = 3;
/// Longest reason that is kept, in bytes.
const MAX_REASON: usize = 1024;
/// Cleanups called off in one transaction.
const BATCH: i64 = 500;

/// A version that its brake watches.
#[derive(Debug, Clone, Copy)]
pub(super) struct Watched {
    id: Uuid,
    sha256: Sha256,
}

/// When each stopped version was stopped.
pub(super) type Stopped = HashMap<Sha256, i64>;

/// What is watched, read once a transaction: whether it still is, is looked at again before anything is stopped.
async fn watched(tx: &mut Tx, mut which: impl FnMut(Sha256) -> bool) -> Result<Vec<Watched>, StoreError> {
    if tx.watched.is_none() {
        let rows = sqlx::query("SELECT id, sha256 FROM rollout WHERE state = 'running' ORDER BY id")
            .fetch_all(&mut **tx)
            .await
            .map_err(StoreError::query("read what is watched"))?;
        let one = |row: &sqlx::any::AnyRow| {
            let (id, sha256): (String, String) = (row.get(0), row.get(1));
            Ok(Watched {
                id: id.parse().map_err(|_| StoreError::content("rollout id", id))?,
                sha256: sha256.parse().map_err(|_| StoreError::content("digest", sha256))?,
            })
        };
        tx.watched = Some(rows.iter().map(one).collect::<Result<_, StoreError>>()?);
    }
    let all = tx.watched.iter().flatten();
    Ok(all.filter(|watched| which(watched.sha256)).copied().collect())
}

/// An endpoint has looked with these.
///
/// # Errors
/// If the database refuses.
pub(super) async fn looked(
    tx: &mut Tx,
    endpoint: EndpointId,
    patterns: &[PatternRef],
) -> Result<(), StoreError> {
    for watched in watched(tx, |sha256| patterns.iter().any(|known| known.sha256 == sha256)).await? {
        note(tx, watched, endpoint, false).await?;
    }
    Ok(())
}

/// An endpoint has found something with these.
///
/// # Errors
/// If the database refuses.
pub(super) async fn hit(
    tx: &mut Tx,
    endpoint: EndpointId,
    patterns: &BTreeSet<Sha256>,
    now_ms: i64,
) -> Result<(), StoreError> {
    for watched in watched(tx, |sha256| patterns.contains(&sha256)).await? {
        if !note(tx, watched, endpoint, true).await? {
            continue;
        }
        // Two managers that count at once would each miss the other's find.
        rollouts::hold(tx).await?;
        let row = sqlx::query(
            "SELECT COUNT(*), CAST(COALESCE(SUM(is_hit), 0) AS BIGINT) FROM rollout_endpoint WHERE rollout_id = $1",
        )
        .bind(watched.id.to_string())
        .fetch_one(&mut **tx)
        .await
        .map_err(StoreError::query("count for a brake"))?;
        let (looked, hits): (i64, i64) = (row.get(0), row.get(1));
        let Some(rollout) = rollouts::read(tx, watched.id).await? else { continue };
        let share = i64::from(rollout.brake_share.hundredths());
        if hits >= FEWEST && hits.saturating_mul(i64::from(Share::PARTS)) > share.saturating_mul(looked) {
            let reason = format!(
                "it found something on {hits} of the {looked} endpoints that have looked with it, which is more than {}",
                rollout.brake_share
            );
            stop(tx, rollout, endpoint, None, ("brake-share", &reason), now_ms).await?;
        }
    }
    Ok(())
}

/// An endpoint says that files in which a scan found something belong to packages.
///
/// # Errors
/// If the database refuses or holds a task that is not one.
pub(super) async fn owned(
    tx: &mut Tx,
    endpoint: EndpointId,
    task: TaskId,
    files: &[OwnedFile],
    now_ms: i64,
) -> Result<(), StoreError> {
    let watched = watched(tx, |sha256| files.iter().any(|file| file.pattern == sha256)).await?;
    if watched.is_empty() {
        return Ok(());
    }
    // An agent stops only what it was ordered to look with.
    let Some(head) = outcomes::head(tx, endpoint, task).await? else { return Ok(()) };
    let ordered = match head.order.as_ref().map(|order| specs::from_json(&order.spec)).transpose()? {
        Some(TaskSpec::Scan(scan)) if !head.dry_run => scan.patterns,
        Some(TaskSpec::Scan(_) | TaskSpec::Cleanup(_) | TaskSpec::Restore(_)) | None => return Ok(()),
    };
    for watched in watched {
        let Some(file) = files.iter().find(|file| file.pattern == watched.sha256) else { continue };
        if !ordered.iter().any(|pattern| pattern.sha256 == watched.sha256) {
            continue;
        }
        note(tx, watched, endpoint, true).await?;
        rollouts::hold(tx).await?;
        let Some(rollout) = rollouts::read(tx, watched.id).await? else { continue };
        let reason = format!(
            "it hit `{}`, which belongs to package `{}`",
            agent_text(&file.path.to_string(), MAX_REASON / 2),
            agent_text(&text::escape(file.package.as_bytes()), MAX_REASON / 4)
        );
        stop(tx, rollout, endpoint, Some(task), ("brake-package", &reason), now_ms).await?;
    }
    Ok(())
}

/// Notes that an endpoint has to do with a version; whether that is news.
async fn note(tx: &mut Tx, watched: Watched, endpoint: EndpointId, is_hit: bool) -> Result<bool, StoreError> {
    let done = sqlx::query(
        "INSERT INTO rollout_endpoint (rollout_id, endpoint_id, is_hit) VALUES ($1, $2, $3)
         ON CONFLICT (rollout_id, endpoint_id) DO UPDATE SET is_hit = 1
         WHERE rollout_endpoint.is_hit = 0 AND excluded.is_hit = 1",
    )
    .bind(watched.id.to_string())
    .bind(endpoint.to_string())
    .bind(i64::from(is_hit))
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("count an endpoint for a brake"))?;
    Ok(done.rows_affected() > 0)
}

/// Stops a version, unless nothing watches it any more.
async fn stop(
    tx: &mut Tx,
    mut rollout: RolloutRow,
    endpoint: EndpointId,
    task: Option<TaskId>,
    (code, reason): (&str, &str),
    now_ms: i64,
) -> Result<(), StoreError> {
    if !rollout.is_watched() {
        return Ok(());
    }
    let name = rollout.name.clone();
    let message = format!(
        "the rollout of pattern `{}` ({:.12}) was stopped by its brake: {reason}. Nobody is sent this version any \
         more, and endpoints go back to the one before with their next scan; cleanups ordered from it that have not \
         begun are called off",
        text::escape_for_display(&name),
        rollout.sha256.to_string(),
    );
    rollout.state = RolloutState::Stopped;
    rollout.next_ms = None;
    rollout.changed_ms = now_ms;
    rollout.stopped_code = Some(code.to_owned());
    rollout.stopped_reason = Some(agent_text(reason, MAX_REASON));
    rollouts::write(tx, &rollout).await?;
    tracing::warn!(rollout = %rollout.id, code, "A pattern was stopped by its brake.");
    let event = NewEvent {
        endpoint,
        kind: EventKind::PatternDeployment,
        status: EventStatus::Unsuccessful,
        detail: code,
        message: &message,
        task,
        incident: None,
        at_ms: now_ms,
    };
    events::append(tx, event).await
}

/// The versions that nobody is to be sent.
///
/// # Errors
/// If the database refuses or holds what is no digest.
pub(super) async fn stopped(tx: &mut Tx) -> Result<Stopped, StoreError> {
    let rows = sqlx::query("SELECT sha256, changed_ms FROM rollout WHERE state = 'stopped'")
        .fetch_all(&mut **tx)
        .await
        .map_err(StoreError::query("read what is stopped"))?;
    rows.iter()
        .map(|row| {
            let sha256: String = row.get(0);
            Ok((sha256.parse().map_err(|_| StoreError::content("digest", sha256))?, row.get(1)))
        })
        .collect()
}

/// Why a task that a stopped version is in is not carried out.
pub(super) fn because_stopped(what: &str) -> Failure {
    Failure::new("pattern-stopped", format!("{what}, and the rollout of that pattern was stopped"))
}

/// Whether a cleanup that was ordered then removes what a version found that was stopped since.
///
/// # Errors
/// If the database refuses.
pub(super) async fn is_condemned(
    tx: &mut Tx,
    stopped: &Stopped,
    endpoint: EndpointId,
    cleanup: &CleanupSpec,
    created_ms: i64,
) -> Result<bool, StoreError> {
    if !stopped.values().any(|at| created_ms <= *at) {
        return Ok(false);
    }
    for part in parts(&cleanup.detections, PARTS[0]) {
        let sql = format!(
            "SELECT DISTINCT pattern_sha256 FROM detection WHERE endpoint_id = $1 AND identity IN {}",
            places(2, part.len())
        );
        let mut query = sqlx::query(AssertSqlSafe(sql)).bind(endpoint.to_string());
        for key in part {
            query = query.bind(key.to_string());
        }
        let rows = query.fetch_all(&mut **tx).await;
        for row in rows.map_err(StoreError::query("look a cleanup's patterns up"))? {
            let sha256: String = row.get(0);
            let sha256 = sha256.parse().map_err(|_| StoreError::content("digest", sha256))?;
            if stopped.get(&sha256).is_some_and(|at| created_ms <= *at) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

impl Store {
    /// Whether nobody is to be sent this version.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn is_stopped(&self, sha256: Sha256) -> Result<bool, StoreError> {
        sqlx::query("SELECT 1 FROM rollout WHERE sha256 = $1 AND state = 'stopped'")
            .bind(sha256.to_string())
            .fetch_optional(self.reader())
            .await
            .map(|row| row.is_some())
            .map_err(StoreError::query("read what is stopped"))
    }

    /// Calls off cleanups of what stopped versions found, as far as they have not begun and were ordered before; how
    /// many. Of one that its agent may have, the agent has the last word.
    ///
    /// # Errors
    /// If the database refuses; nothing is then called off.
    pub(crate) async fn call_off_stopped(&self, now_ms: i64) -> Result<usize, StoreError> {
        const WAITING: &str = "task.kind = 'cleanup' AND task.dry_run = 0
             AND task.state IN ('queued', 'delivered') AND task.cancel_ms IS NULL";
        let sql = format!(
            "SELECT DISTINCT task.id, task.endpoint_id, task.spec, task.created_ms FROM task
             JOIN task_incident ON task_incident.task_id = task.id
             JOIN detection ON detection.incident_id = task_incident.incident_id
             JOIN rollout ON rollout.sha256 = detection.pattern_sha256
             WHERE rollout.state = 'stopped' AND task.created_ms <= rollout.changed_ms AND {WAITING}
             ORDER BY task.endpoint_id LIMIT {BATCH}"
        );
        let is_any = sqlx::query("SELECT 1 FROM rollout WHERE state = 'stopped' LIMIT 1")
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::query("read what is stopped"))?;
        if is_any.is_none() {
            return Ok(0);
        }
        let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(self.reader()).await;
        let rows = rows.map_err(StoreError::query("find cleanups of a stopped pattern"))?;
        if rows.is_empty() {
            return Ok(0);
        }
        let mut tx = self.begin().await?;
        let stopped = stopped(&mut tx).await?;
        let mut waiting: BTreeMap<(EndpointId, TaskId), (String, i64)> = BTreeMap::new();
        for row in &rows {
            let (task, endpoint): (String, String) = (row.get(0), row.get(1));
            let task = task.parse().map_err(|_| StoreError::content("task id", task))?;
            let endpoint = endpoint.parse().map_err(|_| StoreError::content("endpoint id", endpoint))?;
            waiting.insert((endpoint, task), (row.get(2), row.get(3)));
        }
        // All rows of endpoints, in order, before anything else: as whoever stores reports does.
        for endpoint in waiting.keys().map(|(endpoint, _)| *endpoint).collect::<BTreeSet<_>>() {
            outcomes::lock(&mut tx, endpoint).await?;
        }
        let mut called_off = 0;
        for ((endpoint, task), (spec, created_ms)) in waiting {
            let TaskSpec::Cleanup(cleanup) = specs::from_json(&spec)? else { continue };
            if !is_condemned(&mut tx, &stopped, endpoint, &cleanup, created_ms).await? {
                continue;
            }
            called_off += usize::from(call_off(&mut tx, endpoint, task, now_ms).await?);
        }
        Self::commit(tx).await?;
        Ok(called_off)
    }
}

/// Calls a task off, if it has not begun and nobody did before; whether it did. Whoever calls holds the endpoint's row.
///
/// # Errors
/// If the database refuses.
pub(super) async fn call_off(
    tx: &mut Tx,
    endpoint: EndpointId,
    task: TaskId,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let marked = sqlx::query(
        "UPDATE task SET cancel_ms = $2
         WHERE id = $1 AND cancel_ms IS NULL AND state IN ('queued', 'delivered') RETURNING sent_ms",
    )
    .bind(task.to_string())
    .bind(now_ms)
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("call a task off"))?;
    let Some(marked) = marked else { return Ok(false) };
    if marked.get::<Option<i64>, _>(0).is_none()
        && let Some(head) = outcomes::head(tx, endpoint, task).await?
        && head.state == TaskState::Queued
    {
        outcomes::conclude(tx, &head, End::held_back(because_stopped(CLEANUP)), now_ms).await?;
    }
    Ok(true)
}

/// What a cleanup that is called off was to do.
pub(super) const CLEANUP: &str = "it was to remove what a pattern found";
