//! What scans found, as agents report it.
//!
//! **Invariant:** a find that a scan repeats (because it was begun again) is stored once for that scan; the same
//! find of several scans is several rows with one key, and counts once in its incident.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use sqlx::Row as _;
use tm_api::event::{EventKind, EventStatus};
use tm_protocol::{
    ids::{EndpointId, TaskId},
    report::{Detection, PathBytes},
};

use super::{
    StoreError, Tx, agent_text, brake,
    events::{self, NewEvent},
    incidents,
};

/// Longest name of a rule that is kept, in bytes.
const MAX_RULE: usize = 4096;

/// A part of a scan's finds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found<'f> {
    pub(super) detections: &'f [Detection],
    /// When, by the agent's clock.
    pub(super) at_ms: i64,
    /// How many are stored of one scan.
    pub(super) most: i64,
}

/// Stores a part of a scan's finds, if the scan is this endpoint's and no dry run, and joins each to its incident. What goes
/// beyond the most that is stored of one scan is left out, and the log says so once; the scan's own result
/// counts it.
///
/// # Errors
/// If the database refuses.
pub(super) async fn record(
    tx: &mut Tx,
    endpoint: EndpointId,
    task: TaskId,
    found: Found<'_>,
    now_ms: i64,
) -> Result<(), StoreError> {
    let row = sqlx::query(
        // A sub-query of its own is one look at the index; a join would walk all that the scan has found.
        "SELECT (SELECT COALESCE(MAX(ordinal), 0) FROM detection WHERE task_id = $1)
         FROM task WHERE id = $1 AND endpoint_id = $2 AND kind = 'scan' AND dry_run = 0",
    )
    .bind(task.to_string())
    .bind(endpoint.to_string())
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("count detections"))?;
    let Some(row) = row else { return Ok(()) };
    let known: i64 = row.get(0);
    let mut ordinal = known;
    let mut fresh: BTreeMap<(_, String), &Detection> = BTreeMap::new();
    for detection in found.detections {
        if ordinal >= found.most {
            break;
        }
        let rule = agent_text(&detection.rule, MAX_RULE);
        let stored = sqlx::query(
            "INSERT INTO detection (task_id, ordinal, endpoint_id, path, member, pattern_sha256, rule, sha256, size,
             found_ms, identity) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
             ON CONFLICT (task_id, identity) DO NOTHING",
        )
        .bind(task.to_string())
        .bind(ordinal + 1)
        .bind(endpoint.to_string())
        .bind(detection.path.0.clone())
        .bind(serde_json::json!(names(&detection.member)).to_string())
        .bind(detection.pattern.to_string())
        .bind(rule.clone())
        .bind(detection.sha256.to_string())
        .bind(i64::try_from(detection.size).unwrap_or(i64::MAX))
        .bind(found.at_ms)
        .bind(detection.key().to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("store a detection"))?;
        if stored.rows_affected() > 0 {
            ordinal += 1;
            fresh.entry((detection.pattern, rule)).or_insert(detection);
        }
    }
    if known < found.most && ordinal >= found.most {
        let message = format!("the scan has more than {} detections; the others are not stored", found.most);
        let event = NewEvent {
            endpoint,
            kind: EventKind::ScanAdministrator,
            status: EventStatus::Unsuccessful,
            detail: "too-many-detections",
            message: &message,
            task: Some(task),
            incident: None,
            at_ms: now_ms,
        };
        events::append(tx, event).await?;
    }
    let patterns = fresh.keys().map(|(pattern, _)| *pattern).collect();
    // Only what is new opens an incident: a find that is told again may be settled by now.
    for ((pattern, rule), first) in fresh {
        let incident = incidents::join(tx, endpoint, pattern, &rule, &first.path.0, now_ms).await?;
        sqlx::query(
            "UPDATE detection SET incident_id = $3
             WHERE task_id = $1 AND ordinal > $2 AND pattern_sha256 = $4 AND rule = $5",
        )
        .bind(task.to_string())
        .bind(known)
        .bind(incident.to_string())
        .bind(pattern.to_string())
        .bind(rule)
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("join detections to their incident"))?;
    }
    brake::hit(tx, endpoint, &patterns, now_ms).await
}

/// A member's names as the `member` column holds them.
pub(super) fn names(member: &[PathBytes]) -> Vec<String> {
    member.iter().map(|name| STANDARD.encode(&name.0)).collect()
}
