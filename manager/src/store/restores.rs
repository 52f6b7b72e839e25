//! Orders to put vaulted files back.
//!
//! **Invariant:** which endpoint holds an item is what the store knows, never what the order says.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::Row as _;
use tm_api::event::{EventKind, EventStatus};
use tm_protocol::{
    ids::{EndpointId, IncidentId, TaskId, VaultId},
    report::PathBytes,
    task::{RestoreSpec, TaskKind, TaskSpec, TaskState},
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

/// What is wished.
#[derive(Debug, Clone)]
pub(crate) struct RestoreWish<'a> {
    /// Each once, 1 or more.
    pub(crate) items: &'a [VaultId],
    /// Another place, for the one item.
    pub(crate) to: Option<&'a PathBytes>,
    pub(crate) set_id: bool,
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
pub(crate) enum RestoreRefusal {
    /// No vault is known to hold this item.
    Unknown(VaultId),
    /// A restore of this item is under way.
    UnderWay { item: VaultId, task: TaskId },
    /// These are not connected.
    Away(Vec<EndpointRow>),
}

impl Store {
    /// Orders a restore: one task for each endpoint that holds some of the items, and for each
    /// [`RestoreSpec::MAX_ITEMS`] of them.
    ///
    /// # Errors
    /// If the database refuses; nothing is then ordered.
    pub(crate) async fn order_restore(
        &self,
        wish: &RestoreWish<'_>,
        now_ms: i64,
    ) -> Result<Result<Vec<TaskRow>, RestoreRefusal>, StoreError> {
        let mut holders: BTreeMap<EndpointId, Vec<VaultId>> = BTreeMap::new();
        let mut tx = self.begin_audited().await?;
        for item in wish.items {
            match holder(&mut tx, *item).await? {
                Some(endpoint) => holders.entry(endpoint).or_default().push(*item),
                None => return Ok(Err(RestoreRefusal::Unknown(*item))),
            }
        }
        let mut rows = Vec::new();
        let mut away = Vec::new();
        for (endpoint, items) in holders {
            lock(&mut tx, endpoint).await?;
            let busy = busy(&mut tx, endpoint).await?;
            if !wish.dry_run
                && let Some((item, task)) = items.iter().find_map(|item| busy.get_key_value(item))
            {
                return Ok(Err(RestoreRefusal::UnderWay { item: *item, task: *task }));
            }
            let Some(endpoint) = self.endpoint(endpoint).await? else { continue };
            if !endpoint.connected && !wish.when_connected {
                away.push(endpoint);
                continue;
            }
            for part in items.chunks(RestoreSpec::MAX_ITEMS) {
                rows.push(order(&mut tx, wish, &endpoint, part, now_ms).await?);
            }
        }
        if !away.is_empty() {
            return Ok(Err(RestoreRefusal::Away(away)));
        }
        Self::commit(tx).await?;
        Ok(Ok(rows))
    }
}

async fn holder(tx: &mut Tx, item: VaultId) -> Result<Option<EndpointId>, StoreError> {
    let row = sqlx::query("SELECT endpoint_id FROM vault_item WHERE id = $1")
        .bind(item.to_string())
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("look for a vault's item"))?;
    row.map(|row| {
        let id: String = row.get(0);
        id.parse().map_err(|_| StoreError::content("endpoint id", id))
    })
    .transpose()
}

/// What a restore is under way for, by the task.
async fn busy(tx: &mut Tx, endpoint: EndpointId) -> Result<BTreeMap<VaultId, TaskId>, StoreError> {
    let mut busy = BTreeMap::new();
    for (id, spec) in specs::under_way(tx, endpoint, TaskKind::Restore).await? {
        if let TaskSpec::Restore(restore) = spec {
            busy.extend(restore.items.into_iter().map(|item| (item, id)));
        }
    }
    Ok(busy)
}

async fn order(
    tx: &mut Tx,
    wish: &RestoreWish<'_>,
    endpoint: &EndpointRow,
    items: &[VaultId],
    now_ms: i64,
) -> Result<TaskRow, StoreError> {
    let spec = TaskSpec::Restore(RestoreSpec {
        items: items.to_vec(),
        to: wish.to.cloned(),
        set_id: wish.set_id,
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
        is_unsupported: !endpoint.knows(TaskKind::Restore),
    };
    let row = insert(tx, &order, &specs::to_json(&spec), recipient, now_ms).await?;
    // What goes to another place stays removed from its own.
    let incidents =
        if wish.to.is_none() { incidents_of(tx, endpoint.id, items).await? } else { BTreeSet::new() };
    incidents::link(tx, row.id, incidents.iter().copied()).await?;
    if wish.dry_run || row.state != TaskState::Queued {
        return Ok(row);
    }
    let files = things(u64::try_from(items.len()).unwrap_or(u64::MAX), "file");
    let message = match wish.to {
        None => format!("{files} to be put back"),
        Some(to) => format!("{files} to be copied out of the vault to {to}"),
    };
    let event = NewEvent {
        endpoint: endpoint.id,
        kind: EventKind::Restore,
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

async fn incidents_of(
    tx: &mut Tx,
    endpoint: EndpointId,
    items: &[VaultId],
) -> Result<BTreeSet<IncidentId>, StoreError> {
    let mut incidents = BTreeSet::new();
    for item in items {
        let rows = sqlx::query(
            "SELECT DISTINCT incident_id FROM detection
             WHERE vault_id = $1 AND endpoint_id = $2 AND incident_id IS NOT NULL",
        )
        .bind(item.to_string())
        .bind(endpoint.to_string())
        .fetch_all(&mut **tx)
        .await
        .map_err(StoreError::query("find a vaulted file's incident"))?;
        for row in rows {
            let id: String = row.get(0);
            incidents.insert(id.parse().map_err(|_| StoreError::content("incident id", id))?);
        }
    }
    Ok(incidents)
}
