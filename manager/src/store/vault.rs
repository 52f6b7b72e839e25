//! What the endpoints' vaults hold, as their agents last said.
//!
//! **Invariant:** an id belongs to the endpoint that named it first; another endpoint that names it is not
//! believed.

use sqlx::{AssertSqlSafe, Row as _};
use tm_protocol::{
    ids::{EndpointId, VaultId},
    report::VaultEntry,
};

use super::{Store, StoreError, Tx};

/// Most items that are kept of one endpoint's vault.
const MAX_ITEMS: i64 = 100_000;

/// One vaulted file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VaultRow {
    pub(crate) id: String,
    pub(crate) endpoint: String,
    pub(crate) host: String,
    pub(crate) path: Vec<u8>,
    pub(crate) sha256: String,
    pub(crate) size: u64,
    pub(crate) vaulted_ms: i64,
}

/// Which items; all by default.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct VaultFilter {
    pub(crate) endpoint: Option<EndpointId>,
    /// Only items that were named before this one.
    pub(crate) before: Option<VaultId>,
}

impl Store {
    /// The items that fit, newest first (ids are time-ordered), at most `limit`.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn vault(&self, filter: VaultFilter, limit: u32) -> Result<Vec<VaultRow>, StoreError> {
        let wanted = [
            ("vault_item.endpoint_id =", filter.endpoint.map(|id| id.to_string())),
            ("vault_item.id <", filter.before.map(|id| id.to_string())),
        ];
        let mut sql = "SELECT vault_item.id, vault_item.endpoint_id, endpoint.host, vault_item.path,
                vault_item.sha256, vault_item.size, vault_item.vaulted_ms
            FROM vault_item JOIN endpoint ON endpoint.id = vault_item.endpoint_id WHERE 1 = 1"
            .to_owned();
        let mut values = Vec::new();
        for (condition, value) in wanted {
            if let Some(value) = value {
                values.push(value);
                sql.push_str(&format!(" AND {condition} ${}", values.len()));
            }
        }
        sql.push_str(&format!(" ORDER BY vault_item.id DESC LIMIT {limit}"));
        let mut query = sqlx::query(AssertSqlSafe(sql));
        for value in values {
            query = query.bind(value);
        }
        let rows = query.fetch_all(self.reader()).await.map_err(StoreError::query("list the vaults"))?;
        Ok(rows
            .iter()
            .map(|row| VaultRow {
                id: row.get(0),
                endpoint: row.get(1),
                host: row.get(2),
                path: row.get(3),
                sha256: row.get(4),
                size: u64::try_from(row.get::<i64, _>(5)).unwrap_or(0),
                vaulted_ms: row.get(6),
            })
            .collect())
    }
}

/// Takes in a part of a listing; the first replaces everything known before.
///
/// # Errors
/// If the database refuses.
pub(super) async fn record(
    tx: &mut Tx,
    endpoint: EndpointId,
    first: bool,
    items: &[VaultEntry],
) -> Result<(), StoreError> {
    if first {
        sqlx::query("DELETE FROM vault_item WHERE endpoint_id = $1")
            .bind(endpoint.to_string())
            .execute(&mut **tx)
            .await
            .map_err(StoreError::query("replace a vault's listing"))?;
    }
    let held: i64 = sqlx::query("SELECT COUNT(*) FROM vault_item WHERE endpoint_id = $1")
        .bind(endpoint.to_string())
        .fetch_one(&mut **tx)
        .await
        .map_err(StoreError::query("count a vault's items"))?
        .get(0);
    let room = usize::try_from(MAX_ITEMS - held).unwrap_or(0);
    if items.len() > room {
        tracing::warn!(%endpoint, most = MAX_ITEMS, "A vault's listing is longer than is kept.");
    }
    for item in items.iter().take(room) {
        put(tx, endpoint, item).await?;
    }
    Ok(())
}

/// Notes one item.
///
/// # Errors
/// If the database refuses.
pub(super) async fn put(tx: &mut Tx, endpoint: EndpointId, item: &VaultEntry) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO vault_item (id, endpoint_id, path, sha256, size, vaulted_ms) VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (id) DO UPDATE SET path = excluded.path, sha256 = excluded.sha256, size = excluded.size,
            vaulted_ms = excluded.vaulted_ms
         WHERE vault_item.endpoint_id = excluded.endpoint_id",
    )
    .bind(item.id.to_string())
    .bind(endpoint.to_string())
    .bind(item.path.0.clone())
    .bind(item.sha256.to_string())
    .bind(i64::try_from(item.size).unwrap_or(i64::MAX))
    .bind(item.vaulted_ms)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("note a vault's item"))?;
    Ok(())
}

/// Forgets one item.
///
/// # Errors
/// If the database refuses.
pub(super) async fn remove(tx: &mut Tx, endpoint: EndpointId, id: VaultId) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM vault_item WHERE id = $1 AND endpoint_id = $2")
        .bind(id.to_string())
        .bind(endpoint.to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("forget a vault's item"))?;
    Ok(())
}
