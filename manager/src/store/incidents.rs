//! Incidents: the rows behind `mitigation::incident`, moved inside the transaction of what happened.
//!
//! **Invariant:** an endpoint has at most one open incident for a pattern and a rule.
//! **Invariant:** an incident is `cleaning` only while a cleanup that is no dry run and has not ended is linked
//! to it.

use std::collections::BTreeMap;

use sqlx::{AssertSqlSafe, Row as _, any::AnyRow};
use tm_api::event::IncidentState;
use tm_protocol::ids::{EndpointId, IncidentId, Sha256, TaskId};

use super::{Store, StoreError, Tx, agent_text};
use crate::mitigation::incident::{Happened, step};

/// Longest name of a rule in an incident, in bytes: it is part of a key.
const MAX_RULE: usize = 512;

/// An incident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IncidentRow {
    pub(crate) id: IncidentId,
    pub(crate) endpoint: EndpointId,
    pub(crate) host: String,
    pub(crate) pattern: String,
    pub(crate) rule: String,
    pub(crate) state: IncidentState,
    /// Why it is unresolved; empty otherwise.
    pub(crate) detail: String,
    /// The path of its first detection.
    pub(crate) path: Vec<u8>,
    pub(crate) opened_ms: i64,
    pub(crate) changed_ms: i64,
    pub(crate) task: Option<String>,
    /// Its detections, each counted once however often it was found.
    pub(crate) detections: u64,
    /// Of these, those that are not settled.
    pub(crate) open: u64,
}

/// Which incidents; all by default.
#[derive(Debug, Clone, Default)]
pub(crate) struct IncidentFilter {
    pub(crate) endpoint: Option<EndpointId>,
    pub(crate) state: Option<IncidentState>,
    /// Open ones before the others.
    pub(crate) open_first: bool,
}

/// What the end of a cleanup left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// The incident, if the task had exactly one.
    pub(super) only: Option<IncidentId>,
    /// Incidents of the task that are not resolved.
    pub(super) open: usize,
}

impl Store {
    /// The incidents that fit, newest first, at most `limit`.
    ///
    /// # Errors
    /// If the database cannot be read or holds an incident that is not one.
    pub(crate) async fn incidents(
        &self,
        filter: &IncidentFilter,
        limit: u32,
    ) -> Result<Vec<IncidentRow>, StoreError> {
        let wanted = [
            ("incident.endpoint_id", filter.endpoint.map(|id| id.to_string())),
            ("incident.state", filter.state.map(|state| state.word().to_owned())),
        ];
        // Chosen first and counted afterwards, so that only what is shown is counted.
        let mut chosen = "SELECT incident.id FROM incident WHERE 1 = 1".to_owned();
        let mut values = Vec::new();
        for (column, value) in wanted {
            if let Some(value) = value {
                values.push(value);
                chosen.push_str(&format!(" AND {column} = ${}", values.len()));
            }
        }
        let first = if filter.open_first { OPEN_FIRST } else { "" };
        let order = format!("ORDER BY {first} incident.opened_ms DESC, incident.id DESC");
        let sql = format!(
            "SELECT incident.id, incident.endpoint_id, endpoint.host, incident.pattern, incident.rule,
                    incident.state, incident.detail, incident.path, incident.opened_ms, incident.changed_ms,
                    incident.task_id,
                    (SELECT COUNT(DISTINCT identity) FROM detection WHERE incident_id = incident.id),
                    (SELECT COUNT(DISTINCT identity) FROM detection
                     WHERE incident_id = incident.id AND settled_ms IS NULL)
             FROM incident JOIN endpoint ON endpoint.id = incident.endpoint_id
             WHERE incident.id IN ({chosen} {order} LIMIT {limit}) {order}"
        );
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for value in values {
            query = query.bind(value);
        }
        query
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("list the incidents"))?
            .iter()
            .map(incident)
            .collect()
    }
}

const OPEN_FIRST: &str =
    "CASE WHEN incident.state IN ('awaiting-cleanup', 'cleaning', 'unresolved') THEN 0 ELSE 1 END,";

fn incident(row: &AnyRow) -> Result<IncidentRow, StoreError> {
    let (id, endpoint, state): (String, String, String) = (row.get(0), row.get(1), row.get(5));
    Ok(IncidentRow {
        id: id.parse().map_err(|_| StoreError::content("incident id", id))?,
        endpoint: endpoint.parse().map_err(|_| StoreError::content("endpoint id", endpoint))?,
        host: row.get(2),
        pattern: row.get(3),
        rule: row.get(4),
        state: self::state(&state)?,
        detail: row.get(6),
        path: row.get(7),
        opened_ms: row.get(8),
        changed_ms: row.get(9),
        task: row.get(10),
        detections: u64::try_from(row.get::<i64, _>(11)).unwrap_or(0),
        open: u64::try_from(row.get::<i64, _>(12)).unwrap_or(0),
    })
}

fn state(word: &str) -> Result<IncidentState, StoreError> {
    IncidentState::from_word(word).ok_or_else(|| StoreError::content("incident state", word))
}

/// The open incident of `endpoint` for a rule of a pattern; opens one where there is none.
///
/// # Errors
/// If the database refuses.
pub(super) async fn join(
    tx: &mut Tx,
    endpoint: EndpointId,
    pattern: Sha256,
    rule: &str,
    path: &[u8],
    now_ms: i64,
) -> Result<IncidentId, StoreError> {
    let name: Option<String> = sqlx::query("SELECT name FROM pattern WHERE sha256 = $1")
        .bind(pattern.to_string())
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("look a detection's pattern up"))?
        .map(|row| row.get(0));
    let name = name.unwrap_or_else(|| pattern.to_string());
    let rule = agent_text(rule, MAX_RULE);
    let open: Option<String> = sqlx::query(
        "SELECT id FROM incident WHERE endpoint_id = $1 AND pattern = $2 AND rule = $3
         AND state IN ('awaiting-cleanup', 'cleaning', 'unresolved')",
    )
    .bind(endpoint.to_string())
    .bind(name.clone())
    .bind(rule.clone())
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("look for an open incident"))?
    .map(|row| row.get(0));
    if let Some(id) = open {
        return id.parse().map_err(|_| StoreError::content("incident id", id));
    }
    let id = IncidentId::new(uuid::Uuid::now_v7());
    sqlx::query(
        "INSERT INTO incident (id, endpoint_id, pattern, rule, state, before, detail, path, opened_ms, changed_ms)
         VALUES ($1, $2, $3, $4, $5, $5, '', $6, $7, $7)",
    )
    .bind(id.to_string())
    .bind(endpoint.to_string())
    .bind(name)
    .bind(rule)
    .bind(IncidentState::AwaitingCleanup.word())
    .bind(path.to_vec())
    .bind(now_ms)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("open an incident"))?;
    Ok(id)
}

/// Links a task to the incidents that it is about.
///
/// # Errors
/// If the database refuses.
pub(super) async fn link(
    tx: &mut Tx,
    task: TaskId,
    incidents: impl IntoIterator<Item = IncidentId>,
) -> Result<(), StoreError> {
    for incident in incidents {
        sqlx::query("INSERT INTO task_incident (task_id, incident_id) VALUES ($1, $2)")
            .bind(task.to_string())
            .bind(incident.to_string())
            .execute(&mut **tx)
            .await
            .map_err(StoreError::query("link a task to its incident"))?;
    }
    Ok(())
}

/// Moves the incidents that a new cleanup, no dry run, is linked to.
///
/// # Errors
/// If the database refuses.
pub(super) async fn cleanup_ordered(tx: &mut Tx, task: TaskId, now_ms: i64) -> Result<(), StoreError> {
    for (id, now) in linked(tx, task).await? {
        sqlx::query("UPDATE incident SET task_id = $2 WHERE id = $1")
            .bind(id.to_string())
            .bind(task.to_string())
            .execute(&mut **tx)
            .await
            .map_err(StoreError::query("note an incident's task"))?;
        let Some(next) = step(now, Happened::Ordered) else { continue };
        if !now.is_open() && another_open(tx, id).await?.is_some() {
            // Its detections belong to the newer one as well, which is the one that moves.
            continue;
        }
        sqlx::query("UPDATE incident SET state = $2, before = $3, changed_ms = $4 WHERE id = $1")
            .bind(id.to_string())
            .bind(next.word())
            .bind(now.word())
            .bind(now_ms)
            .execute(&mut **tx)
            .await
            .map_err(StoreError::query("move an incident on"))?;
    }
    Ok(())
}

/// Moves the incidents of a cleanup that has ended, unless another one still works on them.
///
/// # Errors
/// If the database refuses.
pub(super) async fn cleanup_ended(tx: &mut Tx, task: TaskId, now_ms: i64) -> Result<Left, StoreError> {
    let linked = linked(tx, task).await?;
    let mut left = Left { only: only(&linked), open: 0 };
    for (id, now) in linked {
        let next = if now == IncidentState::Cleaning && is_worked_on(tx, id, task).await? {
            None
        } else {
            let (happened, detail) = ended(tx, id).await?;
            let mut next = step(now, happened);
            if !now.is_open()
                && next.is_some_and(IncidentState::is_open)
                && let Some(newer) = another_open(tx, id).await?
            {
                give_open(tx, id, newer).await?;
                next = None;
            }
            if let Some(next) = next {
                change(tx, id, next, if next == IncidentState::Unresolved { &detail } else { "" }, now_ms)
                    .await?;
            }
            next
        };
        left.open += usize::from(next.unwrap_or(now).is_open());
    }
    Ok(left)
}

/// Moves the incidents of a restore that has ended, by what came of its items.
///
/// # Errors
/// If the database refuses.
pub(super) async fn restore_ended(
    tx: &mut Tx,
    task: TaskId,
    now_ms: i64,
) -> Result<Option<IncidentId>, StoreError> {
    let linked = linked(tx, task).await?;
    let only = only(&linked);
    let rows = sqlx::query(
        "SELECT DISTINCT detection.incident_id, task_item.verdict FROM task_item
         JOIN detection ON detection.vault_id = task_item.vault_id
         WHERE task_item.task_id = $1 AND task_item.verdict IN ('restored', 'refused', 'failed')",
    )
    .bind(task.to_string())
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("read what came of a restore"))?;
    let mut came: BTreeMap<String, bool> = BTreeMap::new();
    for row in rows {
        let Some(id) = row.get::<Option<String>, _>(0) else { continue };
        *came.entry(id).or_insert(true) &= row.get::<String, _>(1) == "restored";
    }
    for (id, now) in linked {
        let happened = match came.get(&id.to_string()) {
            Some(true) => Happened::Restored,
            Some(false) => Happened::NotRestored,
            None => continue,
        };
        // What is back in its place is a threat again.
        sqlx::query(
            "UPDATE detection SET settled_ms = NULL WHERE incident_id = $1 AND vault_id IN
                (SELECT vault_id FROM task_item WHERE task_id = $2 AND verdict = 'restored')",
        )
        .bind(id.to_string())
        .bind(task.to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("reopen what was put back"))?;
        if let Some(next) = step(now, happened) {
            change(tx, id, next, "", now_ms).await?;
        }
    }
    Ok(only)
}

fn only(linked: &[(IncidentId, IncidentState)]) -> Option<IncidentId> {
    match linked {
        [(id, _)] => Some(*id),
        _ => None,
    }
}

async fn linked(tx: &mut Tx, task: TaskId) -> Result<Vec<(IncidentId, IncidentState)>, StoreError> {
    sqlx::query(
        "SELECT incident.id, incident.state FROM task_incident
         JOIN incident ON incident.id = task_incident.incident_id
         WHERE task_incident.task_id = $1 ORDER BY incident.id",
    )
    .bind(task.to_string())
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("find a task's incidents"))?
    .iter()
    .map(|row| {
        let id: String = row.get(0);
        let state = state(&row.get::<String, _>(1))?;
        Ok((id.parse().map_err(|_| StoreError::content("incident id", id))?, state))
    })
    .collect()
}

/// The open incident for the same rule on the same endpoint, where that is another one.
async fn another_open(tx: &mut Tx, id: IncidentId) -> Result<Option<String>, StoreError> {
    let found = sqlx::query(
        "SELECT other.id FROM incident mine JOIN incident other ON other.endpoint_id = mine.endpoint_id
            AND other.pattern = mine.pattern AND other.rule = mine.rule AND other.id <> mine.id
         WHERE mine.id = $1 AND other.state IN ('awaiting-cleanup', 'cleaning', 'unresolved')",
    )
    .bind(id.to_string())
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("look for an open incident"))?;
    Ok(found.map(|row| row.get(0)))
}

/// Gives what is not settled of a closed incident to the open one.
async fn give_open(tx: &mut Tx, from: IncidentId, to: String) -> Result<(), StoreError> {
    sqlx::query("UPDATE detection SET incident_id = $2 WHERE incident_id = $1 AND settled_ms IS NULL")
        .bind(from.to_string())
        .bind(to)
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("give detections to another incident"))?;
    Ok(())
}

/// Whether a cleanup other than `but` works or will work on an incident.
async fn is_worked_on(tx: &mut Tx, id: IncidentId, but: TaskId) -> Result<bool, StoreError> {
    let found = sqlx::query(
        "SELECT 1 FROM task_incident JOIN task ON task.id = task_incident.task_id
         WHERE task_incident.incident_id = $1 AND task.id <> $2 AND task.kind = 'cleanup' AND task.dry_run = 0
           AND task.state IN ('queued', 'delivered', 'running')",
    )
    .bind(id.to_string())
    .bind(but.to_string())
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("look for an incident's other tasks"))?;
    Ok(found.is_some())
}

async fn ended(tx: &mut Tx, id: IncidentId) -> Result<(Happened, String), StoreError> {
    let row = sqlx::query(
        "SELECT COUNT(DISTINCT detection.identity),
                COUNT(DISTINCT CASE WHEN detection.refusal IS NOT NULL THEN detection.identity END),
                MIN(detection.refusal),
                (SELECT before FROM incident WHERE id = $1)
         FROM detection WHERE detection.incident_id = $1 AND detection.settled_ms IS NULL",
    )
    .bind(id.to_string())
    .fetch_one(&mut **tx)
    .await
    .map_err(StoreError::query("count what is left of an incident"))?;
    let count = |column| u64::try_from(row.get::<i64, _>(column)).unwrap_or(0);
    let happened =
        Happened::Ended { open: count(0), stubborn: count(1), before: state(&row.get::<String, _>(3))? };
    Ok((happened, row.get::<Option<String>, _>(2).unwrap_or_default()))
}

/// Changes an incident's state. One that goes back to being unresolved untried keeps its reason.
async fn change(
    tx: &mut Tx,
    id: IncidentId,
    next: IncidentState,
    detail: &str,
    now_ms: i64,
) -> Result<(), StoreError> {
    let keeps = next == IncidentState::Unresolved && detail.is_empty();
    sqlx::query(
        "UPDATE incident SET state = $2, detail = COALESCE($3, detail), changed_ms = $4 WHERE id = $1",
    )
    .bind(id.to_string())
    .bind(next.word())
    .bind((!keeps).then(|| detail.to_owned()))
    .bind(now_ms)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("move an incident on"))?;
    Ok(())
}
