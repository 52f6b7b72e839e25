//! Sessions: who is connected where, what agents say of themselves, when they were last heard of.

use std::net::IpAddr;

use serde::Serialize;
use sqlx::Row as _;
use std::collections::{HashMap, HashSet};
use tm_protocol::{
    ids::{EndpointId, ManagerId},
    message::{Disk, Hello, Inventory, Progress},
    search::address_key,
};

use super::{
    Engine, PARTS, Store, StoreError, Tx, outcomes, parts, places, rows,
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

/// Somebody comes or goes.
#[derive(Debug)]
pub(crate) enum Passage {
    Open { endpoint: EndpointId, manager: ManagerId, hello: Box<Hello> },
    Close { endpoint: EndpointId, epoch: i64 },
}

impl Passage {
    pub(crate) const fn endpoint(&self) -> EndpointId {
        match self {
            Self::Open { endpoint, .. } | Self::Close { endpoint, .. } => *endpoint,
        }
    }
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
    /// As they stand in `endpoint_address`: facts that are the same text are the same facts.
    addresses: Vec<String>,
}

impl Store {
    /// Notes a new session.
    ///
    /// # Errors
    /// If the database refuses, or does not hold the endpoint.
    pub(crate) async fn open_session(
        &self,
        endpoint: EndpointId,
        manager: ManagerId,
        hello: &Hello,
        now_ms: i64,
    ) -> Result<Opened, StoreError> {
        let mut tx = self.begin().await?;
        let opened = open(&mut tx, endpoint, manager, hello, now_ms).await?;
        Self::commit(tx).await?;
        opened.ok_or_else(unknown)
    }

    /// Notes a session's end, unless a newer one has begun.
    pub(crate) async fn close_session(
        &self,
        endpoint: EndpointId,
        epoch: i64,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        close(&mut tx, endpoint, epoch, now_ms).await?;
        Self::commit(tx).await
    }

    /// Notes comings and goings together, in one transaction; for each of them, in order, what a session begins
    /// with.
    ///
    /// # Errors
    /// If the database refuses one of them; then none is noted.
    pub(crate) async fn pass(&self, passages: &[Passage], now_ms: i64) -> Result<Vec<Passed>, StoreError> {
        let mut tx = self.begin().await?;
        let passed = match self.engine {
            Engine::Sqlite => pass_many(&mut tx, passages, now_ms).await?,
            // Each has a statement of its own: `Engine::rows_at_a_time` says why.
            Engine::Postgres => {
                let mut passed = Vec::with_capacity(passages.len());
                for passage in passages {
                    passed.push(match passage {
                        Passage::Open { endpoint, manager, hello } => {
                            let opened = open(&mut tx, *endpoint, *manager, hello, now_ms).await?;
                            opened.ok_or_else(unknown).map(Some)
                        }
                        Passage::Close { endpoint, epoch } => {
                            close(&mut tx, *endpoint, *epoch, now_ms).await?;
                            Ok(None)
                        }
                    });
                }
                passed
            }
        };
        Self::commit(tx).await?;
        Ok(passed)
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
        for part in parts(&seen, self.engine.rows_at_a_time()) {
            let sql = format!("UPDATE endpoint SET last_seen_ms = $1 WHERE id IN {}", places(2, part.len()));
            let mut query = sqlx::query(self.engine.listed(sql)).bind(now_ms);
            for endpoint in part {
                query = query.bind(endpoint.to_string());
            }
            query.execute(&mut *tx).await.map_err(StoreError::query("note who was seen"))?;
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

type Passed = Result<Option<Opened>, StoreError>;

/// [`open`] and [`close`] of many, with few statements. One endpoint's come in their order: the first of each, then
/// the second of those that have one, and so on.
async fn pass_many(tx: &mut Tx, passages: &[Passage], now_ms: i64) -> Result<Vec<Passed>, StoreError> {
    let mut passed: Vec<Passed> = passages.iter().map(|_| Ok(None)).collect();
    let mut left: Vec<usize> = (0..passages.len()).collect();
    while !left.is_empty() {
        let mut now = HashSet::new();
        let (turn, later): (Vec<usize>, Vec<usize>) =
            left.into_iter().partition(|at| passages.get(*at).is_some_and(|p| now.insert(p.endpoint())));
        left = later;
        let (mut opens, mut closes) = (Vec::new(), Vec::new());
        for at in turn {
            match passages.get(at) {
                Some(Passage::Open { endpoint, manager, hello }) => {
                    opens.push(Coming { at, endpoint: *endpoint, manager: *manager, hello });
                }
                Some(Passage::Close { endpoint, epoch }) => closes.push((*endpoint, *epoch)),
                None => {}
            }
        }
        for part in parts(&opens, PARTS[0]) {
            let mut opened = open_many(tx, part, now_ms).await?;
            for coming in part {
                if let Some(slot) = passed.get_mut(coming.at) {
                    *slot = opened.remove(&coming.endpoint).ok_or_else(unknown).map(Some);
                }
            }
        }
        for part in parts(&closes, PARTS[0]) {
            close_many(tx, part, now_ms).await?;
        }
    }
    Ok(passed)
}

/// One of many who come.
struct Coming<'p> {
    /// Its place among all passages.
    at: usize,
    endpoint: EndpointId,
    manager: ManagerId,
    hello: &'p Hello,
}

/// [`open`] of different endpoints; those that are not known are left out.
async fn open_many(
    tx: &mut Tx,
    coming: &[Coming<'_>],
    now_ms: i64,
) -> Result<HashMap<EndpointId, Opened>, StoreError> {
    let sql = format!(
        "SELECT id, manager_id FROM endpoint WHERE manager_id IS NOT NULL AND id IN {}",
        places(1, coming.len())
    );
    let mut query = sqlx::query(tx.engine.listed(sql));
    for one in coming {
        query = query.bind(one.endpoint.to_string());
    }
    let held = query.fetch_all(&mut **tx).await;
    let held = held.map_err(StoreError::query("look where endpoints are connected"))?;
    let mut held: HashMap<String, String> = held.iter().map(|row| (row.get(0), row.get(1))).collect();
    let sql = format!(
        "WITH come (whose, manager, version, boot, kinds, code, message, failed_ms, numbers) AS (VALUES {})
         UPDATE endpoint SET manager_id = come.manager, session_epoch = session_epoch + 1,
            agent_version = come.version, boot_id = come.boot, task_kinds = come.kinds, last_seen_ms = ${},
            failure_code = COALESCE(come.code, failure_code),
            failure_message = COALESCE(come.message, failure_message),
            failure_ms = COALESCE(come.failed_ms, failure_ms),
            stored_through = CASE WHEN stream = come.numbers THEN stored_through ELSE 0 END,
            notices_through = CASE WHEN stream = come.numbers THEN notices_through ELSE 0 END,
            stream = come.numbers
         FROM come WHERE endpoint.id = come.whose RETURNING session_epoch, stored_through, notices_through, id",
        rows(coming.len(), 9),
        1 + 9 * coming.len()
    );
    let mut query = sqlx::query(tx.engine.listed(sql));
    for one in coming {
        let failure = one.hello.last_failure.as_ref();
        query = query
            .bind(one.endpoint.to_string())
            .bind(one.manager.to_string())
            .bind(one.hello.agent_version.as_str())
            .bind(one.hello.boot_id.as_str())
            .bind(kinds(one.hello))
            .bind(failure.map(|f| f.code.clone()))
            .bind(failure.map(|f| f.message.clone()))
            .bind(failure.map(|_| now_ms))
            .bind(one.hello.stream.to_string());
    }
    let opened = query.bind(now_ms).fetch_all(&mut **tx).await.map_err(StoreError::query("open sessions"))?;
    let by_id: HashMap<String, &Coming<'_>> =
        coming.iter().map(|one| (one.endpoint.to_string(), one)).collect();
    Ok(opened
        .iter()
        .filter_map(|row| {
            let one = by_id.get(&row.get::<String, _>(3))?;
            let manager = one.manager.to_string();
            let was_elsewhere = held.remove(&row.get::<String, _>(3)).filter(|at| *at != manager);
            let stored = Counts { reports: unsigned(row.get(1)), notices: unsigned(row.get(2)) };
            Some((one.endpoint, Opened { epoch: row.get(0), was_elsewhere, stored }))
        })
        .collect())
}

/// [`close`] of different endpoints.
async fn close_many(tx: &mut Tx, going: &[(EndpointId, i64)], now_ms: i64) -> Result<(), StoreError> {
    let sql = format!(
        "WITH go (whose, epoch) AS (VALUES {})
         UPDATE endpoint SET manager_id = NULL, last_seen_ms = ${}
         FROM go WHERE endpoint.id = go.whose AND endpoint.session_epoch = go.epoch",
        rows(going.len(), 2),
        1 + 2 * going.len()
    );
    let mut query = sqlx::query(tx.engine.listed(sql));
    for (endpoint, epoch) in going {
        query = query.bind(endpoint.to_string()).bind(*epoch);
    }
    query.bind(now_ms).execute(&mut **tx).await.map_err(StoreError::query("close sessions"))?;
    Ok(())
}

fn kinds(hello: &Hello) -> String {
    serde_json::to_string(&hello.task_kinds).unwrap_or_else(|_| "[]".to_owned())
}

/// Notes a new session; `None` if the endpoint is not known.
async fn open(
    tx: &mut Tx,
    endpoint: EndpointId,
    manager: ManagerId,
    hello: &Hello,
    now_ms: i64,
) -> Result<Option<Opened>, StoreError> {
    outcomes::lock(tx, endpoint).await?;
    let was_elsewhere = sqlx::query("SELECT manager_id FROM endpoint WHERE id = $1 AND manager_id <> $2")
        .bind(endpoint.to_string())
        .bind(manager.to_string())
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("look where an endpoint is connected"))?
        .map(|row| row.get(0));
    let failure = hello.last_failure.as_ref();
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
    .bind(kinds(hello))
    .bind(now_ms)
    .bind(failure.map(|f| f.code.clone()))
    .bind(failure.map(|f| f.message.clone()))
    .bind(failure.map(|_| now_ms))
    .bind(stream)
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("open a session"))?;
    Ok(row.map(|row| {
        let stored = Counts { reports: unsigned(row.get(1)), notices: unsigned(row.get(2)) };
        Opened { epoch: row.get(0), was_elsewhere, stored }
    }))
}

/// Notes a session's end, unless a newer one has begun.
async fn close(tx: &mut Tx, endpoint: EndpointId, epoch: i64, now_ms: i64) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE endpoint SET manager_id = NULL, last_seen_ms = $3 WHERE id = $1 AND session_epoch = $2",
    )
    .bind(endpoint.to_string())
    .bind(epoch)
    .bind(now_ms)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("close a session"))?;
    Ok(())
}

fn unknown() -> StoreError {
    StoreError::query("open a session")(sqlx::Error::RowNotFound)
}

/// Nobody opens and closes sessions any more: the manager ends.
pub(crate) fn writer_ended() -> StoreError {
    StoreError::query("reach the writer of sessions")(sqlx::Error::PoolClosed)
}

/// What an agent says of its endpoint, as it is stored.
struct Facts<'a> {
    id: String,
    host: &'a str,
    version: &'a str,
    /// An [`InventoryRow`].
    json: String,
    addresses: Vec<IpAddr>,
}

impl<'a> Facts<'a> {
    /// Addresses that are none are left out.
    fn new(endpoint: EndpointId, facts: &'a Inventory) -> Result<Self, StoreError> {
        let addresses: Vec<IpAddr> =
            facts.addresses.iter().filter_map(|a| a.parse().ok()).take(MOST_ADDRESSES).collect();
        let row = InventoryRow {
            os: short(&facts.os),
            kernel: short(&facts.kernel),
            arch: short(&facts.arch),
            cpu: short(&facts.cpu),
            cpus: facts.cpus,
            memory: facts.memory,
            disks: facts.disks.get(..MOST_DISKS).unwrap_or(&facts.disks),
            boot_id: short(&facts.boot_id),
            addresses: addresses.iter().map(ToString::to_string).collect(),
        };
        let json = serde_json::to_string(&row).map_err(|_| StoreError::content("inventory", "unwritable"))?;
        let (host, version) = (short(&facts.host), short(&facts.agent_version));
        Ok(Self { id: endpoint.to_string(), host, version, json, addresses })
    }
}

/// Replaces what is known of endpoints by what their agents say.
///
/// # Errors
/// If the database refuses.
pub(super) async fn replace_inventories<'a>(
    tx: &mut Tx,
    said: impl Iterator<Item = (EndpointId, &'a Inventory)>,
) -> Result<(), StoreError> {
    let said: Vec<Facts<'_>> =
        said.map(|(endpoint, facts)| Facts::new(endpoint, facts)).collect::<Result<_, _>>()?;
    for part in parts(&said, PARTS[0]) {
        let same = same(tx, part).await?;
        for facts in part.iter().filter(|facts| !same.contains(&facts.id)) {
            replace_inventory(tx, facts).await?;
        }
    }
    Ok(())
}

/// Endpoints of which nothing new is said: nearly all, because agents tell their facts in every session.
async fn same(tx: &mut Tx, said: &[Facts<'_>]) -> Result<HashSet<String>, StoreError> {
    let sql = format!(
        "WITH said (whose, host, inventory, version) AS (VALUES {})
         SELECT endpoint.id FROM said JOIN endpoint ON endpoint.id = said.whose
         WHERE endpoint.host = said.host AND endpoint.inventory = said.inventory
           AND endpoint.agent_version = said.version",
        rows(said.len(), 4)
    );
    let mut query = sqlx::query(tx.engine.listed(sql));
    for facts in said {
        query = query.bind(facts.id.as_str()).bind(facts.host).bind(facts.json.as_str()).bind(facts.version);
    }
    let same = query.fetch_all(&mut **tx).await.map_err(StoreError::query("compare inventories"))?;
    Ok(same.iter().map(|row| row.get(0)).collect())
}

async fn replace_inventory(tx: &mut Tx, facts: &Facts<'_>) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE endpoint SET host = $2, host_key = $3, inventory = $4, agent_version = $5 WHERE id = $1",
    )
    .bind(facts.id.as_str())
    .bind(facts.host)
    .bind(facts.host.to_lowercase())
    .bind(facts.json.as_str())
    .bind(facts.version)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("record an inventory"))?;
    sqlx::query("DELETE FROM endpoint_address WHERE endpoint_id = $1")
        .bind(facts.id.as_str())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("replace addresses"))?;
    for address in &facts.addresses {
        sqlx::query(
            "INSERT INTO endpoint_address (endpoint_id, address_key, address) VALUES ($1, $2, $3)
             ON CONFLICT (endpoint_id, address_key) DO NOTHING",
        )
        .bind(facts.id.as_str())
        .bind(address_key(*address))
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

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        streams::tests::{endpoint, hello},
        tests::scratch,
    };

    #[tokio::test]
    async fn who_comes_and_goes_together_is_noted_in_order() {
        let (store, _folder) = scratch().await;
        let (a, b) = (endpoint(&store, 1).await, endpoint(&store, 2).await);
        let manager = ManagerId::new(Uuid::from_u128(7));
        let come = |endpoint| Passage::Open { endpoint, manager, hello: Box::new(hello(1)) };
        let go = |endpoint, epoch| Passage::Close { endpoint, epoch };
        let stranger = EndpointId::new(Uuid::from_u128(9));
        // The end of an older session comes late.
        let passages = [come(a), come(a), go(a, 1), come(stranger), come(b), go(b, 1), go(stranger, 1)];
        let passed = store.pass(&passages, 5).await.unwrap();
        let epochs: Vec<Option<i64>> = passed
            .iter()
            .map(|p| p.as_ref().ok().and_then(|opened| opened.as_ref().map(|o| o.epoch)))
            .collect();
        assert_eq!(epochs, [Some(1), Some(2), None, None, Some(1), None, None]);
        assert!(passed[3].is_err(), "nobody who is not known is let in");
        let held = sqlx::query("SELECT id FROM endpoint WHERE manager_id IS NOT NULL")
            .fetch_all(store.reader())
            .await
            .unwrap();
        assert_eq!(held.iter().map(|row| row.get::<String, _>(0)).collect::<Vec<_>>(), [a.to_string()]);
    }
}
