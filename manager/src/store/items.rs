//! What cleanups and restores did, item by item, and what follows for detections and vaults.
//!
//! **Invariant:** an item that is told again (a task went on after a crash) takes the place of what was told
//! before; both are one row.
//! **Invariant:** a dry run settles nothing.

use sqlx::{Row as _, any::AnyRow};
use tm_protocol::{
    ids::{EndpointId, Sha256, TaskId},
    report::{Failure, ItemReport, ItemVerdict, VaultEntry},
    task::{TaskKind, TaskSpec},
};

use super::{
    Store, StoreError, Tx, agent_failure, incidents,
    outcomes::{self, Head},
    specs,
    tasks::json,
    vault,
};

/// Most items of one task: no order names more things.
const MAX_ITEMS: i64 = 1000;

/// One item of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ItemRow {
    pub(crate) ordinal: i64,
    pub(crate) endpoint: String,
    pub(crate) path: Vec<u8>,
    pub(crate) vault: Option<String>,
    pub(crate) sha256: Option<String>,
    pub(crate) size: u64,
    pub(crate) verdict: ItemVerdict,
    pub(crate) failure: Option<Failure>,
    pub(crate) notes: Vec<Failure>,
    pub(crate) detections: Vec<String>,
}

impl Store {
    /// Items of a task after the `after`th, by number, at most `limit`.
    ///
    /// # Errors
    /// If the database cannot be read or holds an item that is not one.
    pub(crate) async fn items(
        &self,
        task: TaskId,
        after: i64,
        limit: u32,
    ) -> Result<Vec<ItemRow>, StoreError> {
        sqlx::query(
            "SELECT task_item.ordinal, task.endpoint_id, task_item.path, task_item.vault_id, task_item.sha256,
                    task_item.size, task_item.verdict, task_item.failure, task_item.notes, task_item.detections
             FROM task_item JOIN task ON task.id = task_item.task_id
             WHERE task_item.task_id = $1 AND task_item.ordinal > $2 ORDER BY task_item.ordinal LIMIT $3",
        )
        .bind(task.to_string())
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::query("list a task's items"))?
        .iter()
        .map(item)
        .collect()
    }
}

fn item(row: &AnyRow) -> Result<ItemRow, StoreError> {
    let verdict: String = row.get(6);
    let failure: Option<String> = row.get(7);
    Ok(ItemRow {
        ordinal: row.get(0),
        endpoint: row.get(1),
        path: row.get(2),
        vault: row.get(3),
        sha256: row.get(4),
        size: u64::try_from(row.get::<i64, _>(5)).unwrap_or(0),
        verdict: ItemVerdict::from_word(&verdict)
            .ok_or_else(|| StoreError::content("item's verdict", verdict))?,
        failure: failure.map(|text| json("failure", &text)).transpose()?,
        notes: json("notes", &row.get::<String, _>(8))?,
        detections: json("keys", &row.get::<String, _>(9))?,
    })
}

/// Takes in a part of what a cleanup or a restore did, if the task is this endpoint's.
///
/// # Errors
/// If the database refuses.
pub(super) async fn record(
    tx: &mut Tx,
    endpoint: EndpointId,
    task: TaskId,
    items: &[ItemReport],
    at_ms: i64,
    now_ms: i64,
) -> Result<(), StoreError> {
    let Some(head) = outcomes::head(tx, endpoint, task).await? else { return Ok(()) };
    let stays = match head.kind {
        TaskKind::Scan => return Ok(()),
        TaskKind::Cleanup => true,
        TaskKind::Restore => stays_in_the_vault(tx, task).await?,
    };
    for item in items {
        let Some(before) = put(tx, task, item).await? else {
            tracing::warn!(%endpoint, %task, most = MAX_ITEMS, "A task has more items than any order names.");
            break;
        };
        if head.dry_run {
            continue;
        }
        settle(tx, &head, item, before, now_ms).await?;
        match (item.verdict, item.vault, item.sha256) {
            // A cleanup can fail although the file was taken: when another stands in its place.
            (ItemVerdict::Vaulted | ItemVerdict::Failed, Some(id), Some(sha256))
                if head.kind == TaskKind::Cleanup =>
            {
                let entry =
                    VaultEntry { id, path: item.path.clone(), sha256, size: item.size, vaulted_ms: at_ms };
                vault::put(tx, endpoint, &entry).await?;
            }
            (ItemVerdict::Restored, Some(id), _) if !stays => {
                vault::remove(tx, endpoint, id).await?;
            }
            (
                ItemVerdict::Vaulted
                | ItemVerdict::Restored
                | ItemVerdict::WouldVault
                | ItemVerdict::WouldRestore
                | ItemVerdict::Gone
                | ItemVerdict::Refused
                | ItemVerdict::Failed,
                _,
                _,
            ) => {}
        }
    }
    // A task that was given up goes on telling what it did.
    if head.state.is_final() && !head.dry_run {
        match head.kind {
            TaskKind::Scan => {}
            TaskKind::Cleanup => {
                incidents::cleanup_ended(tx, task, now_ms).await?;
            }
            TaskKind::Restore => {
                incidents::restore_ended(tx, task, now_ms).await?;
            }
        }
    }
    Ok(())
}

/// Whether a restore leaves its item where it is, because the file goes to another place.
async fn stays_in_the_vault(tx: &mut Tx, task: TaskId) -> Result<bool, StoreError> {
    let row = sqlx::query("SELECT spec FROM task WHERE id = $1")
        .bind(task.to_string())
        .fetch_one(&mut **tx)
        .await
        .map_err(StoreError::query("read a task's order"))?;
    Ok(match specs::from_json(&row.get::<String, _>(0))? {
        TaskSpec::Restore(restore) => restore.to.is_some(),
        TaskSpec::Scan(_) | TaskSpec::Cleanup(_) => true,
    })
}

/// What was known of an item before.
enum Before {
    Nothing,
    Was(ItemVerdict),
}

/// Stores an item; `None` if the task has too many.
async fn put(tx: &mut Tx, task: TaskId, item: &ItemReport) -> Result<Option<Before>, StoreError> {
    let identity = identity(item).to_string();
    let known = sqlx::query("SELECT ordinal, verdict FROM task_item WHERE task_id = $1 AND identity = $2")
        .bind(task.to_string())
        .bind(identity.clone())
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("look an item up"))?;
    let (ordinal, before) = match known {
        Some(row) => {
            let verdict: String = row.get(1);
            let verdict = ItemVerdict::from_word(&verdict)
                .ok_or_else(|| StoreError::content("item's verdict", verdict))?;
            (row.get::<i64, _>(0), Before::Was(verdict))
        }
        None => {
            let row = sqlx::query("SELECT COALESCE(MAX(ordinal), 0) FROM task_item WHERE task_id = $1")
                .bind(task.to_string())
                .fetch_one(&mut **tx)
                .await
                .map_err(StoreError::query("count a task's items"))?;
            (row.get::<i64, _>(0) + 1, Before::Nothing)
        }
    };
    if ordinal > MAX_ITEMS {
        return Ok(None);
    }
    let notes: Vec<Failure> = item.notes.iter().take(ItemReport::MAX_NOTES).map(agent_failure).collect();
    let keys: Vec<String> = keys(item).map(Sha256::to_string).collect();
    sqlx::query(
        "INSERT INTO task_item (task_id, ordinal, identity, path, vault_id, sha256, size, verdict, failure, notes,
            detections)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
         ON CONFLICT (task_id, identity) DO UPDATE SET vault_id = excluded.vault_id, sha256 = excluded.sha256,
            size = excluded.size, verdict = excluded.verdict, failure = excluded.failure, notes = excluded.notes,
            detections = excluded.detections",
    )
    .bind(task.to_string())
    .bind(ordinal)
    .bind(identity)
    .bind(item.path.0.clone())
    .bind(item.vault.map(|id| id.to_string()))
    .bind(item.sha256.map(|digest| digest.to_string()))
    .bind(i64::try_from(item.size).unwrap_or(i64::MAX))
    .bind(item.verdict.word())
    .bind(item.failure.as_ref().map(|failure| serde_json::json!(agent_failure(failure)).to_string()))
    .bind(serde_json::json!(notes).to_string())
    .bind(serde_json::json!(keys).to_string())
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("store an item"))?;
    Ok(Some(before))
}

/// Names an item within its task: the file and what was found in it, or what the vault calls it.
fn identity(item: &ItemReport) -> Sha256 {
    let mut text = item.path.0.clone();
    text.push(0);
    match (keys(item).min(), item.vault) {
        (Some(key), _) => text.extend_from_slice(key.as_bytes()),
        (None, Some(id)) => text.extend_from_slice(id.uuid().as_bytes()),
        (None, None) => {}
    }
    Sha256::of(&text)
}

fn keys(item: &ItemReport) -> impl Iterator<Item = &Sha256> {
    item.detections.iter().take(ItemReport::MAX_DETECTIONS)
}

/// Settles the detections of an item, or notes why they are not.
async fn settle(
    tx: &mut Tx,
    head: &Head,
    item: &ItemReport,
    before: Before,
    now_ms: i64,
) -> Result<(), StoreError> {
    match item.verdict {
        ItemVerdict::Vaulted | ItemVerdict::Gone => {
            for key in keys(item) {
                sqlx::query(
                    "UPDATE detection SET settled_ms = $3, refusal = NULL, vault_id = COALESCE($4, vault_id)
                     WHERE endpoint_id = $1 AND identity = $2 AND settled_ms IS NULL",
                )
                .bind(head.endpoint.to_string())
                .bind(key.to_string())
                .bind(now_ms)
                .bind(item.vault.map(|id| id.to_string()))
                .execute(&mut **tx)
                .await
                .map_err(StoreError::query("settle a detection"))?;
            }
            Ok(())
        }
        ItemVerdict::Refused | ItemVerdict::Failed => {
            if matches!(before, Before::Was(ItemVerdict::Vaulted | ItemVerdict::Gone)) {
                reopen(tx, head, item).await?;
            }
            let code = item.failure.as_ref().map(|failure| agent_failure(failure).code);
            let code = code.unwrap_or_else(|| item.verdict.word().to_owned());
            for key in keys(item) {
                sqlx::query(
                    "UPDATE detection SET refusal = $3
                     WHERE endpoint_id = $1 AND identity = $2 AND settled_ms IS NULL",
                )
                .bind(head.endpoint.to_string())
                .bind(key.to_string())
                .bind(code.clone())
                .execute(&mut **tx)
                .await
                .map_err(StoreError::query("note why a detection is not settled"))?;
            }
            Ok(())
        }
        ItemVerdict::Restored | ItemVerdict::WouldVault | ItemVerdict::WouldRestore => Ok(()),
    }
}

/// Takes back what this task had settled: the file was away for a moment and is there again.
async fn reopen(tx: &mut Tx, head: &Head, item: &ItemReport) -> Result<(), StoreError> {
    for key in keys(item) {
        sqlx::query(
            "UPDATE detection SET settled_ms = NULL WHERE endpoint_id = $1 AND identity = $2
             AND incident_id IN (SELECT incident_id FROM task_incident WHERE task_id = $3)",
        )
        .bind(head.endpoint.to_string())
        .bind(key.to_string())
        .bind(head.id.to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("reopen a detection"))?;
    }
    Ok(())
}
