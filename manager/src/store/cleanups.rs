//! Orders to clean: which detections of which endpoints, in which tasks.
//!
//! **Invariant:** what is chosen, ordered and moved is one transaction: an order rests on what it saw, and two
//! orders at once do not clean the same thing twice.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::{Row as _, any::AnyRow};
use tm_api::event::{EventKind, EventStatus, IncidentState};
use tm_protocol::{
    ids::{EndpointId, IncidentId, Sha256, TaskId},
    task::{CleanupSpec, TaskKind, TaskSpec, TaskState},
};
use uuid::Uuid;

use super::{
    Store, StoreError, Tx,
    endpoints::EndpointRow,
    events::{self, NewEvent},
    incidents,
    outcomes::{lock, things},
    specs,
    tasks::{Order, Recipient, TaskRow, insert},
};

/// Most detections that one order takes of one endpoint.
const MAX_DETECTIONS: usize = 50_000;
/// Detections that one start of a key may mean before they are no longer listed.
const MAX_MEANT: i64 = 11;

/// What is wished.
#[derive(Debug, Clone)]
pub(crate) struct CleanupWish<'a> {
    /// For whom, and whether the endpoint was named itself (and not found by a search).
    pub(crate) endpoints: &'a [(EndpointRow, bool)],
    /// Keys or starts of keys, in lower-case hex; empty means all that awaits cleanup and was not found by a version
    /// of a pattern whose rollout was stopped.
    pub(crate) keys: &'a [String],
    pub(crate) dry_run: bool,
    /// Also for endpoints that are not connected.
    pub(crate) when_connected: bool,
    pub(crate) issuer: &'a str,
    pub(crate) reason: &'a str,
    pub(crate) expires_in_ms: i64,
    pub(crate) deadline_ms: i64,
}

/// Why nothing was ordered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CleanupRefusal {
    /// No detection on these endpoints has a key that begins so.
    Unknown(String),
    /// Several have; these are some of them.
    Ambiguous(String, Vec<String>),
    /// A cleanup of the same is under way on that host.
    UnderWay { task: TaskId, host: String },
    /// Nothing awaits cleanup on an endpoint that was named; `None`: on any.
    Nothing(Option<String>),
    /// More than one order takes, on that host.
    TooMany(String),
    /// These are not connected.
    Away(Vec<EndpointRow>),
}

/// A thing to clean.
#[derive(Debug)]
struct Found {
    path: Vec<u8>,
    key: Sha256,
    incidents: BTreeSet<IncidentId>,
}

/// What is chosen of one endpoint.
struct Chosen<'a> {
    endpoint: &'a EndpointRow,
    found: Vec<Found>,
}

impl Store {
    /// Orders a cleanup: one task for each endpoint and each [`CleanupSpec::MAX_DETECTIONS`] detections. What was
    /// found in one file stays in one task.
    ///
    /// # Errors
    /// If the database refuses; nothing is then ordered.
    pub(crate) async fn order_cleanup(
        &self,
        wish: &CleanupWish<'_>,
        now_ms: i64,
    ) -> Result<Result<Vec<TaskRow>, CleanupRefusal>, StoreError> {
        let mut tx = self.begin_audited().await?;
        let chosen = match choose(&mut tx, wish).await? {
            Ok(chosen) => chosen,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let away: Vec<EndpointRow> =
            chosen.iter().map(|c| c.endpoint).filter(|row| !row.connected).cloned().collect();
        if !wish.when_connected && !away.is_empty() {
            return Ok(Err(CleanupRefusal::Away(away)));
        }
        let mut rows = Vec::new();
        for Chosen { endpoint, found } in chosen {
            for part in parts(found) {
                rows.push(order(&mut tx, wish, endpoint, part, now_ms).await?);
            }
        }
        Self::commit(tx).await?;
        Ok(Ok(rows))
    }
}

async fn choose<'a>(
    tx: &mut Tx,
    wish: &CleanupWish<'a>,
) -> Result<Result<Vec<Chosen<'a>>, CleanupRefusal>, StoreError> {
    let mut all = Vec::new();
    let mut known: BTreeSet<&str> = BTreeSet::new();
    let mut under_way = None;
    let waiting = if wish.keys.is_empty() { Some(waiting(tx).await?) } else { None };
    for (endpoint, is_named) in wish.endpoints {
        let is_waiting = waiting.as_ref().is_none_or(|waiting| waiting.contains(&endpoint.id.to_string()));
        if !is_waiting && !is_named {
            continue;
        }
        lock(tx, endpoint.id).await?;
        let busy = busy(tx, endpoint.id).await?;
        let found = if wish.keys.is_empty() {
            all_waiting(tx, endpoint.id).await?
        } else {
            let mut found = BTreeMap::new();
            for key in wish.keys {
                match meant(tx, endpoint.id, key).await? {
                    Meant::Nothing => {}
                    Meant::One(one) => {
                        known.insert(key);
                        if let Some(task) = busy.get(&one.key)
                            && !wish.dry_run
                        {
                            let host = endpoint.host.clone();
                            return Ok(Err(CleanupRefusal::UnderWay { task: *task, host }));
                        }
                        found.insert(one.key, one);
                    }
                    Meant::Several(keys) => {
                        return Ok(Err(CleanupRefusal::Ambiguous(key.clone(), keys)));
                    }
                }
            }
            let mut found: Vec<Found> = found.into_values().collect();
            found.sort_by(|a, b| (&a.path, a.key).cmp(&(&b.path, b.key)));
            found
        };
        if found.len() > MAX_DETECTIONS {
            return Ok(Err(CleanupRefusal::TooMany(endpoint.host.clone())));
        }
        if let Some(task) = busy.into_values().next() {
            under_way.get_or_insert((task, endpoint.host.clone()));
            if found.is_empty() && *is_named {
                return Ok(Err(CleanupRefusal::UnderWay { task, host: endpoint.host.clone() }));
            }
        }
        if !found.is_empty() {
            all.push(Chosen { endpoint, found });
        } else if *is_named && wish.keys.is_empty() {
            return Ok(Err(CleanupRefusal::Nothing(Some(endpoint.host.clone()))));
        }
    }
    if let Some(key) = wish.keys.iter().find(|key| !known.contains(key.as_str())) {
        return Ok(Err(CleanupRefusal::Unknown(key.clone())));
    }
    Ok(match (all.is_empty(), under_way) {
        (false, _) => Ok(all),
        (true, Some((task, host))) => Err(CleanupRefusal::UnderWay { task, host }),
        (true, None) => Err(CleanupRefusal::Nothing(None)),
    })
}

/// Endpoints on which something waits.
async fn waiting(tx: &mut Tx) -> Result<BTreeSet<String>, StoreError> {
    let rows = sqlx::query(
        "SELECT DISTINCT endpoint_id FROM incident WHERE state IN ('awaiting-cleanup', 'cleaning', 'unresolved')",
    )
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("find what awaits cleanup"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// What a cleanup is under way for, by the task.
async fn busy(tx: &mut Tx, endpoint: EndpointId) -> Result<BTreeMap<Sha256, TaskId>, StoreError> {
    let mut busy = BTreeMap::new();
    for (id, spec) in specs::under_way(tx, endpoint, TaskKind::Cleanup).await? {
        if let TaskSpec::Cleanup(cleanup) = spec {
            busy.extend(cleanup.detections.into_iter().map(|key| (key, id)));
        }
    }
    Ok(busy)
}

async fn all_waiting(tx: &mut Tx, endpoint: EndpointId) -> Result<Vec<Found>, StoreError> {
    let rows = sqlx::query(
        "SELECT DISTINCT detection.identity, detection.path, detection.incident_id
         FROM incident JOIN detection ON detection.incident_id = incident.id
         WHERE incident.endpoint_id = $1 AND incident.state IN ('awaiting-cleanup', 'unresolved')
           AND detection.settled_ms IS NULL
           AND NOT EXISTS (SELECT 1 FROM rollout WHERE rollout.sha256 = detection.pattern_sha256
                           AND rollout.state = 'stopped')
         LIMIT $2",
    )
    .bind(endpoint.to_string())
    // An incident that a pattern's second name doubled may name a thing twice.
    .bind(i64::try_from(2 * MAX_DETECTIONS + 1).unwrap_or(i64::MAX))
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("find what awaits cleanup"))?;
    let mut found: BTreeMap<(Vec<u8>, Sha256), Found> = BTreeMap::new();
    for row in &rows {
        let one = self::found(row)?;
        found
            .entry((one.path.clone(), one.key))
            .and_modify(|known| known.incidents.extend(one.incidents.iter().copied()))
            .or_insert(one);
    }
    Ok(found.into_values().collect())
}

fn found(row: &AnyRow) -> Result<Found, StoreError> {
    let key: String = row.get(0);
    let incident: Option<String> = row.get(2);
    let incident = incident
        .map(|id| id.parse::<IncidentId>().map_err(|_| StoreError::content("incident id", id)))
        .transpose()?;
    Ok(Found {
        path: row.get(1),
        key: key.parse().map_err(|_| StoreError::content("detection's key", key))?,
        incidents: incident.into_iter().collect(),
    })
}

/// What the start of a key means on one endpoint.
enum Meant {
    Nothing,
    One(Found),
    Several(Vec<String>),
}

async fn meant(tx: &mut Tx, endpoint: EndpointId, start: &str) -> Result<Meant, StoreError> {
    let keys = sqlx::query(
        "SELECT DISTINCT identity FROM detection WHERE endpoint_id = $1 AND identity >= $2 AND identity < $3
         ORDER BY identity LIMIT $4",
    )
    .bind(endpoint.to_string())
    .bind(start.to_owned())
    // No hex digit comes after `f`.
    .bind(format!("{start}g"))
    .bind(MAX_MEANT)
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("look a detection up"))?;
    let keys: Vec<String> = keys.iter().map(|row| row.get(0)).collect();
    let key = match keys.as_slice() {
        [] => return Ok(Meant::Nothing),
        [key] => key.clone(),
        [_, ..] => return Ok(Meant::Several(keys)),
    };
    let rows = sqlx::query(
        "SELECT detection.identity, detection.path, detection.incident_id, incident.state
         FROM detection LEFT JOIN incident ON incident.id = detection.incident_id
         WHERE detection.endpoint_id = $1 AND detection.identity = $2
         ORDER BY incident.opened_ms, incident.id",
    )
    .bind(endpoint.to_string())
    .bind(key)
    .fetch_all(&mut **tx)
    .await
    .map_err(StoreError::query("look a detection up"))?;
    let mut one: Option<Found> = None;
    let mut has_open = false;
    for row in &rows {
        let next = found(row)?;
        let state: Option<String> = row.get(3);
        let is_open =
            state.and_then(|word| IncidentState::from_word(&word)).is_some_and(IncidentState::is_open);
        match &mut one {
            None => one = Some(next),
            // Its open incidents; where there is none, the newest.
            Some(known) if is_open == has_open && is_open => known.incidents.extend(next.incidents),
            Some(known) if is_open >= has_open => known.incidents = next.incidents,
            Some(_) => {}
        }
        has_open |= is_open;
    }
    Ok(one.map_or(Meant::Nothing, Meant::One))
}

/// Cuts what was found (in the order of paths) into tasks, between files wherever a file fits into one.
fn parts(found: Vec<Found>) -> Vec<Vec<Found>> {
    let mut files: Vec<Vec<Found>> = Vec::new();
    for one in found {
        match files.last_mut() {
            Some(file) if file.last().is_some_and(|last| last.path == one.path) => file.push(one),
            Some(_) | None => files.push(vec![one]),
        }
    }
    let mut parts: Vec<Vec<Found>> = Vec::new();
    for file in files {
        match parts.last_mut() {
            Some(part) if part.len() + file.len() <= CleanupSpec::MAX_DETECTIONS => part.extend(file),
            Some(_) | None => {
                let mut file = file;
                while file.len() > CleanupSpec::MAX_DETECTIONS {
                    let rest = file.split_off(CleanupSpec::MAX_DETECTIONS);
                    parts.push(std::mem::replace(&mut file, rest));
                }
                parts.push(file);
            }
        }
    }
    parts
}

async fn order(
    tx: &mut Tx,
    wish: &CleanupWish<'_>,
    endpoint: &EndpointRow,
    part: Vec<Found>,
    now_ms: i64,
) -> Result<TaskRow, StoreError> {
    let incidents: BTreeSet<IncidentId> = part.iter().flat_map(|one| one.incidents.iter().copied()).collect();
    let paths: BTreeSet<&[u8]> = part.iter().map(|one| one.path.as_slice()).collect();
    let (files, count) = (paths.len(), part.len());
    let spec = TaskSpec::Cleanup(CleanupSpec {
        detections: part.iter().map(|one| one.key).collect(),
        dry_run: wish.dry_run,
    });
    let order = Order {
        spec: &spec,
        issuer: wish.issuer,
        reason: wish.reason,
        expires_in_ms: wish.expires_in_ms,
        deadline_ms: wish.deadline_ms,
    };
    let recipient = Recipient {
        task: TaskId::new(Uuid::now_v7()),
        endpoint: endpoint.id,
        host: endpoint.host.clone(),
        is_unsupported: !endpoint.knows(TaskKind::Cleanup),
    };
    let row = insert(tx, &order, &specs::to_json(&spec), recipient, now_ms).await?;
    incidents::link(tx, row.id, incidents.iter().copied()).await?;
    if wish.dry_run || row.state != TaskState::Queued {
        return Ok(row);
    }
    for one in &part {
        // What an earlier cleanup would not do is about to be tried again.
        sqlx::query(
            "UPDATE detection SET refusal = NULL WHERE endpoint_id = $1 AND identity = $2 AND refusal IS NOT NULL",
        )
        .bind(endpoint.id.to_string())
        .bind(one.key.to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("forget an earlier refusal"))?;
    }
    incidents::cleanup_ordered(tx, row.id, now_ms).await?;
    let message = format!(
        "{} in {} to be removed",
        things(u64::try_from(count).unwrap_or(u64::MAX), "detection"),
        things(u64::try_from(files).unwrap_or(u64::MAX), "file")
    );
    let event = NewEvent {
        endpoint: endpoint.id,
        kind: EventKind::Cleanup,
        status: EventStatus::InProgress,
        detail: "ordered",
        message: &message,
        task: Some(row.id),
        incident: if incidents.len() == 1 { incidents.first().copied() } else { None },
        at_ms: now_ms,
    };
    events::append(tx, event).await?;
    Ok(row)
}
