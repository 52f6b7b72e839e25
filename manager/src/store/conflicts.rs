//! Agents that are held because another one with their identity answered: who they are, and what became of them.
//!
//! **Invariant:** an approval makes one new endpoint, whoever asks for it and however often.
//! **Invariant:** of one identity at most [`MOST`] conflicts that nobody has approved are kept, the newest: who holds a
//! copied key cannot fill the table.

use serde_json::json;
use sqlx::{Row as _, any::AnyRow};
use tm_protocol::{
    ids::{EndpointId, Sha256},
    message::Inventory,
};
use uuid::Uuid;

use super::{
    Store, StoreError, Tx,
    audit::{Entry, append},
    endpoints::EndpointRow,
    outcomes::lock,
};

/// Conflicts of one identity that are kept while nobody approves them.
const MOST: i64 = 8;
/// How long after its last word one counts as held, in milliseconds: several of the manager's looks.
pub(crate) const PRESENT_MS: i64 = 30_000;
/// How long one that is away and not approved is kept, in milliseconds.
const KEPT_MS: i64 = 7 * 86_400_000;
/// How long the first agent waits with its new key for the approved one to take its own identity, in milliseconds: until
/// then the copied key is the only one that the approved one has.
const COLLECTING_MS: i64 = 600_000;
/// Longest text that is kept of what a held agent says, in characters, and most addresses.
const MOST_TEXT: usize = 256;
const MOST_ADDRESSES: usize = 16;

/// An agent that is or was held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ConflictRow {
    pub(crate) id: Uuid,
    /// Whose identity it came with.
    pub(crate) endpoint: EndpointId,
    /// The host name of that endpoint.
    pub(crate) of_host: String,
    /// What the held one says of itself.
    pub(crate) host: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) boot_id: String,
    pub(crate) agent_version: String,
    pub(crate) first_ms: i64,
    pub(crate) seen_ms: i64,
    pub(crate) approved_ms: Option<i64>,
    pub(crate) approved_as: Option<EndpointId>,
    pub(crate) renewed_ms: Option<i64>,
}

/// How a held agent stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Nobody has decided.
    Held,
    /// It is another endpoint from now on.
    Approved(EndpointId),
    /// The identity that it came with was shut out for ever, or is gone.
    ShutOut,
}

/// What came of an approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Approval {
    /// It is this endpoint; `false` if that was decided before.
    Approved(EndpointId, bool),
    /// No agent with this identity is held now, or not the one that was named.
    Nobody,
    /// Several are held, and none was named.
    Several(Vec<ConflictRow>),
}

const COLUMNS: &str =
    "SELECT c.id, c.endpoint_id, e.host, c.host, c.addresses, c.boot_id, c.agent_version, c.first_ms,
    c.seen_ms, c.approved_ms, c.approved_as, c.renewed_ms
    FROM conflict c JOIN endpoint e ON e.id = c.endpoint_id";

impl Store {
    /// Notes that an agent with the identity of `endpoint` is held, which has made `key` for one of its own.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn hold(
        &self,
        endpoint: EndpointId,
        key: Sha256,
        facts: &Inventory,
        now_ms: i64,
    ) -> Result<Standing, StoreError> {
        let text = |text: &str| text.chars().take(MOST_TEXT).collect::<String>();
        let addresses: Vec<String> = facts.addresses.iter().take(MOST_ADDRESSES).map(|a| text(a)).collect();
        let mut tx = self.begin().await?;
        // Two managers that hold agents of one identity at once follow each other.
        lock(&mut tx, endpoint).await?;
        sqlx::query(
            "INSERT INTO conflict (id, endpoint_id, key_digest, host, addresses, boot_id, agent_version, first_ms,
             seen_ms) SELECT $1, id, $3, $4, $5, $6, $7, $8, $8 FROM endpoint WHERE id = $2
             ON CONFLICT (endpoint_id, key_digest) DO UPDATE SET host = $4, addresses = $5, seen_ms = $8",
        )
        .bind(Uuid::now_v7().to_string())
        .bind(endpoint.to_string())
        .bind(key.to_string())
        .bind(text(&facts.host))
        .bind(json!(addresses).to_string())
        .bind(text(&facts.boot_id))
        .bind(text(&facts.agent_version))
        .bind(now_ms)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("note a held agent"))?;
        sqlx::query(
            "DELETE FROM conflict WHERE endpoint_id = $1 AND approved_ms IS NULL AND (seen_ms < $2 OR id NOT IN (
                SELECT id FROM conflict WHERE endpoint_id = $1 AND approved_ms IS NULL
                ORDER BY seen_ms DESC, id DESC LIMIT $3))",
        )
        .bind(endpoint.to_string())
        .bind(now_ms.saturating_sub(KEPT_MS))
        .bind(MOST)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("let old conflicts go"))?;
        let standing = standing(&mut tx, endpoint, key).await?;
        Self::commit(tx).await?;
        Ok(standing)
    }

    /// Every agent that is held or was approved, the newest first, at most 1000.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn conflicts(&self) -> Result<Vec<ConflictRow>, StoreError> {
        let sql = format!("{COLUMNS} ORDER BY c.seen_ms DESC, c.id DESC LIMIT 1000");
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("list conflicts"))?;
        rows.iter().map(row).collect()
    }

    /// Makes the agent that is held with the identity of `endpoint` (the one of `conflict`, if several are) an endpoint
    /// of its own, in the same group.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn approve(
        &self,
        endpoint: &EndpointRow,
        conflict: Option<Uuid>,
        actor: &str,
        now_ms: i64,
    ) -> Result<Approval, StoreError> {
        let mut tx = self.begin_audited().await?;
        lock(&mut tx, endpoint.id).await?;
        let sql = format!("{COLUMNS} WHERE c.endpoint_id = $1 ORDER BY c.seen_ms DESC, c.id DESC");
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(endpoint.id.to_string())
            .fetch_all(&mut *tx)
            .await
            .map_err(StoreError::query("look for held agents"))?;
        let mut held = rows.iter().map(row).collect::<Result<Vec<_>, _>>()?;
        match conflict {
            Some(id) => held.retain(|row| row.id == id),
            None => {
                let since = now_ms.saturating_sub(PRESENT_MS);
                held.retain(|row| row.approved_ms.is_none() && row.seen_ms >= since);
            }
        }
        let chosen = match held.as_slice() {
            [] => return Ok(Approval::Nobody),
            [one] => one,
            [_, _, ..] => return Ok(Approval::Several(held)),
        };
        if let Some(already) = chosen.approved_as {
            return Ok(Approval::Approved(already, false));
        }
        let new = EndpointId::new(Uuid::now_v7());
        sqlx::query(
            "INSERT INTO endpoint (id, host, host_key, group_name, agent_version, enrolled_ms, token_id, session_epoch,
             task_kinds, stored_through)
             SELECT $1, $2, $3, group_name, $4, $5, token_id, 0, '[]', 0 FROM endpoint WHERE id = $6",
        )
        .bind(new.to_string())
        .bind(chosen.host.clone())
        .bind(chosen.host.to_lowercase())
        .bind(chosen.agent_version.clone())
        .bind(now_ms)
        .bind(endpoint.id.to_string())
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("enter an approved endpoint"))?;
        sqlx::query("UPDATE conflict SET approved_ms = $2, approved_as = $3 WHERE id = $1")
            .bind(chosen.id.to_string())
            .bind(now_ms)
            .bind(new.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("approve a held agent"))?;
        let subject = new.to_string();
        let entry = Entry {
            actor,
            action: "endpoint.approve",
            subject: &subject,
            detail: json!({ "host": chosen.host, "held_as": endpoint.id.to_string() }),
            at_ms: now_ms,
        };
        append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(Approval::Approved(new, true))
    }

    /// Whose key was copied, and is not yet replaced: endpoints whose agents should make a new one now. Those that have
    /// done so are noted.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn with_copied_key(&self, now_ms: i64) -> Result<Vec<EndpointId>, StoreError> {
        let open =
            "SELECT DISTINCT endpoint_id FROM conflict c WHERE approved_ms IS NOT NULL AND renewed_ms IS NULL
             AND (approved_ms < $1 OR EXISTS (
                SELECT 1 FROM certificate n WHERE n.endpoint_id = c.approved_as AND n.used_ms IS NOT NULL))";
        let collected = now_ms.saturating_sub(COLLECTING_MS);
        let rows = sqlx::query(open)
            .bind(collected)
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("look for copied keys"))?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let mut tx = self.begin().await?;
        sqlx::query(
            "UPDATE conflict SET renewed_ms = $1 WHERE approved_ms IS NOT NULL AND renewed_ms IS NULL AND EXISTS (
                SELECT 1 FROM certificate n WHERE n.endpoint_id = conflict.endpoint_id AND n.used_ms IS NOT NULL
                AND n.issued_ms > conflict.approved_ms)",
        )
        .bind(now_ms)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("note that copied keys are replaced"))?;
        let rows = sqlx::query(open)
            .bind(collected)
            .fetch_all(&mut *tx)
            .await
            .map_err(StoreError::query("look for copied keys"))?;
        Self::commit(tx).await?;
        rows.iter().map(|row| id(row.get(0))).collect()
    }
}

async fn standing(tx: &mut Tx, endpoint: EndpointId, key: Sha256) -> Result<Standing, StoreError> {
    let found = sqlx::query(
        "SELECT e.revoked_ms, c.approved_as FROM conflict c JOIN endpoint e ON e.id = c.endpoint_id
         WHERE c.endpoint_id = $1 AND c.key_digest = $2",
    )
    .bind(endpoint.to_string())
    .bind(key.to_string())
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("look a held agent up"))?;
    let Some(found) = found else { return Ok(Standing::ShutOut) };
    Ok(match (found.get::<Option<i64>, _>(0), found.get::<Option<String>, _>(1)) {
        (Some(_), _) => Standing::ShutOut,
        (None, Some(new)) => Standing::Approved(id(new)?),
        (None, None) => Standing::Held,
    })
}

fn id(text: String) -> Result<EndpointId, StoreError> {
    text.parse().map_err(|_| StoreError::content("endpoint id", text))
}

fn row(row: &AnyRow) -> Result<ConflictRow, StoreError> {
    let (own, addresses): (String, String) = (row.get(0), row.get(4));
    Ok(ConflictRow {
        id: own.parse().map_err(|_| StoreError::content("conflict id", own))?,
        endpoint: id(row.get(1))?,
        of_host: row.get(2),
        host: row.get(3),
        addresses: serde_json::from_str(&addresses)
            .map_err(|_| StoreError::content("addresses of a held agent", addresses))?,
        boot_id: row.get(5),
        agent_version: row.get(6),
        first_ms: row.get(7),
        seen_ms: row.get(8),
        approved_ms: row.get(9),
        approved_as: row.get::<Option<String>, _>(10).map(id).transpose()?,
        renewed_ms: row.get(11),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{certificates::NewCertificate, endpoints::tests::put, tests::scratch};

    fn facts(host: &str) -> Inventory {
        Inventory {
            host: host.into(),
            os: String::new(),
            kernel: String::new(),
            arch: String::new(),
            cpu: String::new(),
            cpus: 1,
            memory: 1,
            disks: vec![],
            addresses: (0..99).map(|n| format!("192.0.2.{n}")).collect(),
            boot_id: "b".repeat(999),
            agent_version: "0.1.0".into(),
        }
    }

    fn key(n: u32) -> Sha256 {
        Sha256::of(&n.to_be_bytes())
    }

    async fn issue(store: &Store, endpoint: EndpointId, serial: &str, at_ms: i64) {
        let new = NewCertificate { serial, not_after_ms: 99_999, authority: key(0), public_key: b"k" };
        assert!(store.renew(endpoint, &new, at_ms).await.unwrap());
    }

    #[tokio::test]
    async fn a_held_agent_becomes_one_endpoint_and_the_first_gets_a_new_key() {
        let (store, _folder) = scratch().await;
        let first = put(&store, 1, "web", &[], true).await;
        issue(&store, first, "aa", 1).await;
        store.certificate_used(first, "aa", 1).await.unwrap();
        let row = store.endpoint(first).await.unwrap().unwrap();
        assert_eq!(store.approve(&row, None, "root", 5).await.unwrap(), Approval::Nobody);
        assert_eq!(store.hold(first, key(1), &facts("copy"), 10).await.unwrap(), Standing::Held);
        assert_eq!(store.hold(first, key(1), &facts("copy"), 20).await.unwrap(), Standing::Held);
        let listed = store.conflicts().await.unwrap();
        assert_eq!((listed.len(), listed[0].first_ms, listed[0].seen_ms), (1, 10, 20));
        assert_eq!((listed[0].of_host.as_str(), listed[0].host.as_str()), ("web", "copy"));
        assert_eq!((listed[0].addresses.len(), listed[0].boot_id.len()), (MOST_ADDRESSES, MOST_TEXT));
        // Nobody is there any more.
        let late = 20 + PRESENT_MS + 1;
        assert_eq!(store.approve(&row, None, "root", late).await.unwrap(), Approval::Nobody);
        assert_eq!(store.with_copied_key(30).await.unwrap(), []);

        let Approval::Approved(new, true) = store.approve(&row, None, "root", 30).await.unwrap() else {
            panic!()
        };
        assert_eq!(store.hold(first, key(1), &facts("copy"), 40).await.unwrap(), Standing::Approved(new));
        let named = store.approve(&row, Some(listed[0].id), "root", 40).await.unwrap();
        assert_eq!(named, Approval::Approved(new, false), "once");
        assert_eq!(store.endpoint(new).await.unwrap().unwrap().host, "copy");
        // The copied key is left to the copy until it has one of its own, or too long.
        assert_eq!(store.with_copied_key(50).await.unwrap(), []);
        assert_eq!(store.with_copied_key(31 + COLLECTING_MS).await.unwrap(), [first]);
        issue(&store, new, "bb", 50).await;
        assert_eq!(store.with_copied_key(50).await.unwrap(), []);
        store.certificate_used(new, "bb", 60).await.unwrap();
        assert_eq!(store.with_copied_key(60).await.unwrap(), [first]);
        issue(&store, first, "cc", 70).await;
        assert_eq!(store.with_copied_key(70).await.unwrap(), [first], "it is not used yet");
        store.certificate_used(first, "cc", 80).await.unwrap();
        assert_eq!(store.with_copied_key(80).await.unwrap(), []);
        assert_eq!(store.conflicts().await.unwrap()[0].renewed_ms, Some(80));
        let log = store.audit_after(0, 99).await.unwrap();
        assert_eq!(log.iter().filter(|entry| entry.action == "endpoint.approve").count(), 1);
    }

    #[tokio::test]
    async fn one_of_several_must_be_named_and_nobody_fills_the_table() {
        let (store, _folder) = scratch().await;
        let (first, other) = (put(&store, 1, "web", &[], true).await, put(&store, 2, "db", &[], true).await);
        for n in 0..20 {
            store.hold(first, key(n), &facts("copy"), 10 + i64::from(n)).await.unwrap();
        }
        store.hold(other, key(1), &facts("db-copy"), 10).await.unwrap();
        assert_eq!(store.conflicts().await.unwrap().len(), usize::try_from(MOST).unwrap() + 1);
        let row = store.endpoint(first).await.unwrap().unwrap();
        let Approval::Several(held) = store.approve(&row, None, "root", 30).await.unwrap() else { panic!() };
        assert_eq!(held.len(), usize::try_from(MOST).unwrap());
        assert_eq!(store.approve(&row, Some(Uuid::nil()), "root", 30).await.unwrap(), Approval::Nobody);
        let one = store.approve(&row, Some(held[3].id), "root", 30).await.unwrap();
        assert!(matches!(one, Approval::Approved(_, true)));
        // Another identity's conflict is none of this one's.
        let foreign = store.conflicts().await.unwrap().into_iter().find(|row| row.endpoint == other).unwrap();
        assert_eq!(store.approve(&row, Some(foreign.id), "root", 30).await.unwrap(), Approval::Nobody);
        // Shut out, both are; what stays away is let go.
        store.revoke(&row, "root", "", 40).await.unwrap();
        assert_eq!(store.hold(first, key(19), &facts("copy"), 50).await.unwrap(), Standing::ShutOut);
        store.hold(other, key(2), &facts("db-copy"), 11 + KEPT_MS).await.unwrap();
        let left = store.conflicts().await.unwrap().into_iter().filter(|row| row.endpoint == other).count();
        assert_eq!(left, 1);
        let nobody = EndpointId::new(Uuid::from_u128(99));
        assert_eq!(store.hold(nobody, key(1), &facts("x"), 50).await.unwrap(), Standing::ShutOut);
    }
}
