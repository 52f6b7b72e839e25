//! Sessions: who is connected where, what agents say of themselves, when they were last heard of.

use std::net::IpAddr;

use serde::Serialize;
use sqlx::Row as _;
use tm_protocol::{
    ids::{EndpointId, ManagerId},
    message::{Disk, Hello, Inventory, Progress},
    search::address_key,
};

use super::{
    Store, StoreError, Tx, outcomes,
    streams::{Counts, unsigned},
};

/// Most addresses and file systems kept of one endpoint; the first of each.
pub(crate) const MOST_ADDRESSES: usize = 256;
const MOST_DISKS: usize = 256;
/// Longest of an endpoint's texts, in bytes: a host name stands in every event of it.
const MOST_TEXT: usize = 256;

/// What an opened session begins with.
#[derive(Debug, Clone)]
pub(crate) struct Opened {
    /// Counts this endpoint's sessions.
    pub(crate) epoch: i64,
    /// The other manager that held a session of this endpoint until now.
    pub(crate) was_elsewhere: Option<String>,
    /// What of the agent's streams is stored.
    pub(crate) stored: Counts,
}

#[derive(Debug, Serialize)]
struct InventoryRow<'a> {
    os: &'a str,
    kernel: &'a str,
    arch: &'a str,
    cpu: &'a str,
    cpus: u32,
    memory: u64,
    disks: &'a [Disk],
    boot_id: &'a str,
}

impl Store {
    /// Notes a new session.
    pub(crate) async fn open_session(
        &self,
        endpoint: EndpointId,
        manager: ManagerId,
        hello: &Hello,
        now_ms: i64,
    ) -> Result<Opened, StoreError> {
        let mut tx = self.begin().await?;
        let id = endpoint.to_string();
        outcomes::lock(&mut tx, endpoint).await?;
        let was_elsewhere = sqlx::query("SELECT manager_id FROM endpoint WHERE id = $1 AND manager_id <> $2")
            .bind(id.as_str())
            .bind(manager.to_string())
            .fetch_optional(&mut *tx)
            .await
            .map_err(StoreError::query("look where an endpoint is connected"))?
            .map(|row| row.get(0));
        let failure = hello.last_failure.as_ref();
        let kinds = serde_json::to_string(&hello.task_kinds).unwrap_or_else(|_| "[]".to_owned());
        let stream = hello.stream.to_string();
        let row = sqlx::query(
            "UPDATE endpoint SET manager_id = $2, session_epoch = session_epoch + 1, agent_version = $3, boot_id = $4,
             task_kinds = $5, last_seen_ms = $6, failure_code = COALESCE($7, failure_code),
             failure_message = COALESCE($8, failure_message), failure_ms = COALESCE($9, failure_ms),
             stored_through = CASE WHEN stream = $10 THEN stored_through ELSE 0 END,
             notices_through = CASE WHEN stream = $10 THEN notices_through ELSE 0 END, stream = $10
             WHERE id = $1 RETURNING session_epoch, stored_through, notices_through",
        )
        .bind(endpoint.to_string())
        .bind(manager.to_string())
        .bind(hello.agent_version.as_str())
        .bind(hello.boot_id.as_str())
        .bind(kinds)
        .bind(now_ms)
        .bind(failure.map(|f| f.code.clone()))
        .bind(failure.map(|f| f.message.clone()))
        .bind(failure.map(|_| now_ms))
        .bind(stream)
        .fetch_one(&mut *tx)
        .await
        .map_err(StoreError::query("open a session"))?;
        let stored = Counts { reports: unsigned(row.get(1)), notices: unsigned(row.get(2)) };
        let opened = Opened { epoch: row.get(0), was_elsewhere, stored };
        Self::commit(tx).await?;
        Ok(opened)
    }

    /// Notes a session's end, unless a newer one has begun.
    pub(crate) async fn close_session(
        &self,
        endpoint: EndpointId,
        epoch: i64,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query(
            "UPDATE endpoint SET manager_id = NULL, last_seen_ms = $3 WHERE id = $1 AND session_epoch = $2",
        )
        .bind(endpoint.to_string())
        .bind(epoch)
        .bind(now_ms)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("close a session"))?;
        Self::commit(tx).await
    }

    /// Writes down when endpoints were heard of and how far tasks are, all in one transaction.
    pub(crate) async fn flush_seen(
        &self,
        seen: &[EndpointId],
        progress: &[(EndpointId, Progress)],
        now_ms: i64,
    ) -> Result<(), StoreError> {
        if seen.is_empty() && progress.is_empty() {
            return Ok(());
        }
        // Rows are locked in one order everywhere.
        let mut seen = seen.to_vec();
        seen.sort_unstable();
        let mut tx = self.begin().await?;
        for endpoint in seen {
            sqlx::query("UPDATE endpoint SET last_seen_ms = $2 WHERE id = $1")
                .bind(endpoint.to_string())
                .bind(now_ms)
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("note who was seen"))?;
        }
        for (endpoint, p) in progress {
            let json = serde_json::json!({
                "files": p.files, "bytes": p.bytes, "detections": p.detections, "skipped": p.skipped,
            });
            sqlx::query(
                "UPDATE task SET progress = $3 WHERE id = $1 AND endpoint_id = $2 AND state = 'running'",
            )
            .bind(p.task.to_string())
            .bind(endpoint.to_string())
            .bind(json.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("note progress"))?;
        }
        Self::commit(tx).await
    }
}

/// Replaces what is known of an endpoint by what its agent says. Addresses that are none are left out.
pub(super) async fn replace_inventory(
    tx: &mut Tx,
    endpoint: EndpointId,
    facts: &Inventory,
) -> Result<(), StoreError> {
    let host = short(&facts.host);
    let row = InventoryRow {
        os: short(&facts.os),
        kernel: short(&facts.kernel),
        arch: short(&facts.arch),
        cpu: short(&facts.cpu),
        cpus: facts.cpus,
        memory: facts.memory,
        disks: facts.disks.get(..MOST_DISKS).unwrap_or(&facts.disks),
        boot_id: short(&facts.boot_id),
    };
    let json = serde_json::to_string(&row).map_err(|_| StoreError::content("inventory", "unwritable"))?;
    let id = endpoint.to_string();
    sqlx::query(
        "UPDATE endpoint SET host = $2, host_key = $3, inventory = $4, agent_version = $5 WHERE id = $1",
    )
    .bind(id.as_str())
    .bind(host)
    .bind(host.to_lowercase())
    .bind(json)
    .bind(short(&facts.agent_version))
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("record an inventory"))?;
    sqlx::query("DELETE FROM endpoint_address WHERE endpoint_id = $1")
        .bind(id.as_str())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("replace addresses"))?;
    let addresses = facts.addresses.iter().filter_map(|a| a.parse::<IpAddr>().ok());
    for address in addresses.take(MOST_ADDRESSES) {
        sqlx::query(
            "INSERT INTO endpoint_address (endpoint_id, address_key, address) VALUES ($1, $2, $3)
             ON CONFLICT (endpoint_id, address_key) DO NOTHING",
        )
        .bind(id.as_str())
        .bind(address_key(address))
        .bind(address.to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("record an address"))?;
    }
    Ok(())
}

/// The beginning of a text that no honest agent makes so long.
fn short(text: &str) -> &str {
    let end = (0..=MOST_TEXT.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    &text[..end]
}
