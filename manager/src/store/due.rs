//! What is due for whom, and what is overdue.
//!
//! **Invariant:** a task is marked as sent, durably, before it is handed to its agent: what is not marked was
//! never heard of there and can be ended here alone.

use std::collections::{HashMap, HashSet};

use sqlx::{Row as _, any::AnyRow};
use tm_protocol::{
    ids::{EndpointId, TaskId},
    task::{ScanSpec, TaskKind, TaskSpec, TaskState},
};

use super::{
    PARTS, Store, StoreError, Tx,
    brake::{self, Stopped},
    outcomes::{self, End, Head},
    parts, places, specs,
    tasks::json,
};

/// A task that has not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LiveTask {
    pub(crate) task: TaskId,
    pub(crate) endpoint: EndpointId,
    /// Somebody called it off.
    pub(crate) is_cancelled: bool,
}

/// A task to be handed to its agent.
#[derive(Debug)]
pub(crate) struct DueTask {
    pub(crate) task: TaskId,
    pub(crate) endpoint: EndpointId,
    pub(crate) spec: TaskSpec,
    pub(crate) expires_ms: i64,
    pub(crate) deadline_ms: i64,
    pub(crate) issuer: String,
    pub(crate) reason: String,
    /// Its agent has said that it has it.
    pub(crate) is_accepted: bool,
    /// It was marked as sent just now.
    pub(crate) is_fresh: bool,
}

/// How long after every limit a task that nobody ended is given up.
const GRACE_MS: i64 = 600_000;
/// Tasks ended in one transaction.
const BATCH: i64 = 500;

impl Store {
    /// Every task that has not ended and has not expired unsent, oldest first, of connected endpoints.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn live_tasks(&self, now_ms: i64) -> Result<Vec<LiveTask>, StoreError> {
        // Those that are away are not asked about: there may be very many of them, for days.
        sqlx::query(
            "SELECT task.id, task.endpoint_id, task.cancel_ms FROM task
             JOIN endpoint ON endpoint.id = task.endpoint_id
             WHERE task.state IN ('queued', 'delivered', 'running') AND endpoint.manager_id IS NOT NULL
               AND (task.state <> 'queued' OR task.sent_ms IS NOT NULL OR task.expires_ms > $1)
             ORDER BY task.created_ms, task.id",
        )
        .bind(now_ms)
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::query("find due tasks"))?
        .iter()
        .map(|row| {
            let (task, endpoint): (String, String) = (row.get(0), row.get(1));
            Ok(LiveTask {
                task: task.parse().map_err(|_| StoreError::content("task id", task))?,
                endpoint: endpoint.parse().map_err(|_| StoreError::content("endpoint id", endpoint))?,
                is_cancelled: row.get::<Option<i64>, _>(2).is_some(),
            })
        })
        .collect()
    }

    /// Marks tasks as sent and gives what is to be sent. Left out is what was called off or has ended meanwhile;
    /// refused is what the endpoint's agent does not know.
    ///
    /// # Errors
    /// If the database refuses; nothing is then marked.
    pub(crate) async fn claim(&self, tasks: &[LiveTask], now_ms: i64) -> Result<Vec<DueTask>, StoreError> {
        let mut tx = self.begin().await?;
        let mut due = Vec::with_capacity(tasks.len());
        let stopped = brake::stopped(&mut tx).await?;
        for part in parts(tasks, PARTS[0]) {
            let fresh = mark(&mut tx, part, now_ms).await?;
            let mut rows = orders(&mut tx, part).await?;
            // Many tasks are of one order.
            let mut last: Option<(String, TaskSpec)> = None;
            for LiveTask { task, endpoint, .. } in part {
                let Some(row) = rows.remove(task) else { continue };
                let head = head(&row, *task, *endpoint)?;
                let kinds: Vec<u16> = json("task kinds", &row.get::<String, _>(6))?;
                if !kinds.contains(&head.kind.number()) {
                    outcomes::lock(&mut tx, *endpoint).await?;
                    let end = End::refused(outcomes::unsupported(head.kind));
                    outcomes::conclude(&mut tx, &head, end, now_ms).await?;
                    continue;
                }
                let text: String = row.get(0);
                let mut spec = match last.take() {
                    Some(last) if last.0 == text => last.1,
                    Some(_) | None => specs::from_json(&text)?,
                };
                last = Some((text, spec.clone()));
                if !stopped.is_empty() && head.state == TaskState::Queued {
                    let was_sent = !fresh.contains(task);
                    match self
                        .without_stopped(&mut tx, &stopped, &head, &spec, (&row, was_sent), now_ms)
                        .await?
                    {
                        Some(left) => spec = left,
                        None => continue,
                    }
                }
                due.push(DueTask {
                    task: *task,
                    endpoint: *endpoint,
                    spec,
                    expires_ms: row.get(1),
                    deadline_ms: row.get(2),
                    issuer: row.get(3),
                    reason: row.get(4),
                    is_accepted: head.state != TaskState::Queued,
                    is_fresh: fresh.contains(task),
                });
            }
        }
        Self::commit(tx).await?;
        Ok(due)
    }

    /// What is to be sent of a task that its agent has not accepted, without versions of patterns that were stopped;
    /// `None` if nothing is.
    async fn without_stopped(
        &self,
        tx: &mut Tx,
        stopped: &Stopped,
        head: &Head,
        spec: &TaskSpec,
        (row, was_sent): (&AnyRow, bool),
        now_ms: i64,
    ) -> Result<Option<TaskSpec>, StoreError> {
        match spec {
            TaskSpec::Scan(scan) if scan.patterns.iter().any(|p| stopped.contains_key(&p.sha256)) => {
                if was_sent {
                    // Its agent may have it as it was: with another order beside it, its receipt would look forged.
                    outcomes::lock(tx, head.endpoint).await?;
                    brake::call_off(tx, head.endpoint, head.id, now_ms).await?;
                    return Ok(None);
                }
                let (versions, group) = (self.versions().await?, row.get::<String, _>(11));
                let mut left = ScanSpec { patterns: Vec::new(), ..scan.clone() };
                for pattern in &scan.patterns {
                    let before = || versions.named(&pattern.name, head.endpoint, &group);
                    let chosen = if stopped.contains_key(&pattern.sha256) {
                        before().map(|row| row.reference.clone())
                    } else {
                        Some(pattern.clone())
                    };
                    left.patterns.extend(chosen.filter(|new| !left.patterns.contains(new)));
                }
                if left.patterns.is_empty() {
                    outcomes::lock(tx, head.endpoint).await?;
                    let failure = brake::because_stopped("it was to look with one pattern");
                    outcomes::conclude(tx, head, End::refused(failure), now_ms).await?;
                    return Ok(None);
                }
                let left = TaskSpec::Scan(left);
                sqlx::query("UPDATE task SET spec = $2 WHERE id = $1")
                    .bind(head.id.to_string())
                    .bind(specs::to_json(&left))
                    .execute(&mut **tx)
                    .await
                    .map_err(StoreError::query("take a stopped pattern out of an order"))?;
                Ok(Some(left))
            }
            TaskSpec::Cleanup(cleanup) if !cleanup.dry_run => {
                let created_ms = row.get(10);
                if !brake::is_condemned(tx, stopped, head.endpoint, cleanup, created_ms).await? {
                    return Ok(Some(spec.clone()));
                }
                // One that was sent before may have begun: `call_off_stopped` has its agent told.
                if !was_sent {
                    outcomes::lock(tx, head.endpoint).await?;
                    let failure = brake::because_stopped(brake::CLEANUP);
                    outcomes::conclude(tx, head, End::held_back(failure), now_ms).await?;
                }
                Ok(None)
            }
            TaskSpec::Scan(_) | TaskSpec::Cleanup(_) | TaskSpec::Restore(_) => Ok(Some(spec.clone())),
        }
    }

    /// Takes the mark back from tasks that could not be handed over after all.
    ///
    /// # Errors
    /// If the database refuses; they then count as sent, and are sent again.
    pub(crate) async fn unclaim(
        &self,
        tasks: &[(EndpointId, TaskId)],
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        for (endpoint, task) in tasks {
            outcomes::lock(&mut tx, *endpoint).await?;
            sqlx::query("UPDATE task SET sent_ms = NULL WHERE id = $1 AND state = 'queued'")
                .bind(task.to_string())
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("take a task back"))?;
            let called_off = sqlx::query("SELECT 1 FROM task WHERE id = $1 AND cancel_ms IS NOT NULL")
                .bind(task.to_string())
                .fetch_optional(&mut *tx)
                .await
                .map_err(StoreError::query("look whether a task was called off"))?;
            if called_off.is_some()
                && let Some(head) = outcomes::head(&mut tx, *endpoint, *task).await?
                && head.state == TaskState::Queued
            {
                outcomes::conclude(&mut tx, &head, End::cancelled(), now_ms).await?;
            }
        }
        Self::commit(tx).await
    }

    /// Ends what waited too long and what no agent ended. Returns how many.
    ///
    /// A task that was sent and not answered may have been begun: like one that was accepted, it is given up only
    /// when it must have ended by its own limits.
    ///
    /// # Errors
    /// If the database refuses; what was ended before that stays ended.
    pub(crate) async fn expire_tasks(&self, now_ms: i64) -> Result<u64, StoreError> {
        let mut ended = 0;
        loop {
            let mut tx = self.begin().await?;
            let late = late(&mut tx, now_ms).await?;
            let mut moved = 0;
            // All rows of endpoints, in order, before the event log's counter: as whoever stores reports does.
            for task in &late {
                outcomes::lock(&mut tx, task.endpoint).await?;
            }
            for task in &late {
                // As it is now that nobody else can move it.
                let Some(head) = outcomes::head(&mut tx, task.endpoint, task.id).await? else { continue };
                let end = match (head.state, task.was_sent) {
                    (TaskState::Queued, false) => End::expired(),
                    (_, _) => End::given_up(),
                };
                moved += u64::from(outcomes::conclude(&mut tx, &head, end, now_ms).await?);
            }
            Self::commit(tx).await?;
            ended += moved;
            if i64::try_from(late.len()).unwrap_or(i64::MAX) < BATCH || moved == 0 {
                return Ok(ended);
            }
        }
    }
}

/// Marks tasks as sent; those that were not.
async fn mark(tx: &mut Tx, tasks: &[LiveTask], now_ms: i64) -> Result<HashSet<TaskId>, StoreError> {
    // The tasks are found by their ids: a function of the state has no index.
    let sql = format!(
        "UPDATE task SET sent_ms = $1
         WHERE id IN {} AND COALESCE(state, '') = 'queued' AND sent_ms IS NULL AND cancel_ms IS NULL RETURNING id",
        places(2, tasks.len())
    );
    let mut query = sqlx::query(tx.engine.listed(sql)).bind(now_ms);
    for live in tasks {
        query = query.bind(live.task.to_string());
    }
    let rows = query.fetch_all(&mut **tx).await.map_err(StoreError::query("mark tasks as sent"))?;
    rows.iter().map(|row| id(row, 0)).collect()
}

/// What is to be sent of tasks that may be.
async fn orders(tx: &mut Tx, tasks: &[LiveTask]) -> Result<HashMap<TaskId, AnyRow>, StoreError> {
    let sql = format!(
        "SELECT task.spec, task.expires_ms, task.deadline_ms, task.issuer, task.reason, task.kind,
                endpoint.task_kinds, task.dry_run, task.state, task.id, task.created_ms, endpoint.group_name
         FROM task JOIN endpoint ON endpoint.id = task.endpoint_id
         WHERE task.id IN {} AND task.cancel_ms IS NULL
           AND COALESCE(task.state, '') IN ('queued', 'delivered', 'running')",
        places(1, tasks.len())
    );
    let mut query = sqlx::query(tx.engine.listed(sql));
    for live in tasks {
        query = query.bind(live.task.to_string());
    }
    let rows = query.fetch_all(&mut **tx).await.map_err(StoreError::query("read due tasks"))?;
    rows.into_iter().map(|row| Ok((id(&row, 9)?, row))).collect()
}

fn id(row: &AnyRow, column: usize) -> Result<TaskId, StoreError> {
    let text: String = row.get(column);
    text.parse().map_err(|_| StoreError::content("task id", text))
}

fn head(row: &AnyRow, id: TaskId, endpoint: EndpointId) -> Result<Head, StoreError> {
    let (kind, state): (String, String) = (row.get(5), row.get(8));
    let kind: TaskKind = outcomes::kind(&kind)?;
    let state = TaskState::from_word(&state).ok_or_else(|| StoreError::content("task state", state))?;
    let dry_run = row.get::<i64, _>(7) != 0;
    Ok(Head { id, endpoint, kind, dry_run, state, stored: state, order: None })
}

struct Late {
    id: TaskId,
    endpoint: EndpointId,
    was_sent: bool,
}

async fn late(tx: &mut Tx, now_ms: i64) -> Result<Vec<Late>, StoreError> {
    sqlx::query(
        "SELECT id, endpoint_id, sent_ms FROM task
         WHERE state IN ('queued', 'delivered', 'running') AND expires_ms <= $1
           AND ((state = 'queued' AND sent_ms IS NULL) OR expires_ms + deadline_ms + $2 <= $1)
         ORDER BY endpoint_id LIMIT $3",
    )
    .bind(now_ms)
    .bind(GRACE_MS)
    .bind(BATCH)
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("find what waited too long"))?
    .iter()
    .map(|row| {
        let (id, endpoint): (String, String) = (row.get(0), row.get(1));
        Ok(Late {
            id: id.parse().map_err(|_| StoreError::content("task id", id))?,
            endpoint: endpoint.parse().map_err(|_| StoreError::content("endpoint id", endpoint))?,
            was_sent: row.get::<Option<i64>, _>(2).is_some(),
        })
    })
    .collect()
}
