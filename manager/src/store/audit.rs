//! The audit log: append and read. The chain itself is `tm_protocol::audit`.

use sqlx::{Row as _, any::AnyRow};
use tm_protocol::{audit::AuditRecord, ids::Sha256};

use super::{PARTS, Store, StoreError, Tx, parts, rows};

/// What is about to be done, by whom.
#[derive(Debug, Clone)]
pub(crate) struct Entry<'a> {
    /// The account, or `system`.
    pub(crate) actor: &'a str,
    /// `noun.verb`.
    pub(crate) action: &'static str,
    /// An id or name.
    pub(crate) subject: &'a str,
    /// Parameters; never a secret.
    pub(crate) detail: serde_json::Value,
    /// Now, in milliseconds since 1970.
    pub(crate) at_ms: i64,
}

/// Makes every other transaction that appends wait for this one.
///
/// # Errors
/// If the database refuses.
pub(super) async fn hold(tx: &mut Tx) -> Result<(), StoreError> {
    sqlx::query("UPDATE counter SET value = value WHERE name = 'audit'")
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("hold the audit log"))?;
    Ok(())
}

/// Appends one record to the chain, inside the transaction of what it records.
///
/// # Errors
/// If the database refuses; the whole transaction is then void.
pub(crate) async fn append(tx: &mut Tx, entry: Entry<'_>) -> Result<(), StoreError> {
    append_all(tx, std::slice::from_ref(&entry)).await
}

/// Appends records to the chain, in order, inside the transaction of what they record.
///
/// # Errors
/// If the database refuses; the whole transaction is then void.
pub(crate) async fn append_all(tx: &mut Tx, entries: &[Entry<'_>]) -> Result<(), StoreError> {
    hold(tx).await?;
    let newest = sqlx::query("SELECT sequence, hash FROM audit ORDER BY sequence DESC LIMIT 1")
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("read the end of the audit log"))?;
    let (mut sequence, mut previous) = match newest {
        Some(row) => (row.get::<i64, _>(0), digest(&row, 1)?),
        None => (0, AuditRecord::GENESIS),
    };
    for part in parts(entries, PARTS[0]) {
        let sql = format!(
            "INSERT INTO audit (sequence, at_ms, actor, action, subject, detail, previous, hash) VALUES {}",
            rows(part.len(), 8)
        );
        let mut query = sqlx::query(tx.engine.listed(sql));
        for entry in part {
            let mut record = AuditRecord {
                sequence: sequence + 1,
                at_ms: entry.at_ms,
                actor: entry.actor.to_owned(),
                action: entry.action.to_owned(),
                subject: entry.subject.to_owned(),
                detail: entry.detail.to_string(),
                previous,
                hash: AuditRecord::GENESIS,
            };
            record.hash = record.expected_hash();
            (sequence, previous) = (record.sequence, record.hash);
            query = query
                .bind(record.sequence)
                .bind(record.at_ms)
                .bind(record.actor)
                .bind(record.action)
                .bind(record.subject)
                .bind(record.detail)
                .bind(record.previous.to_string())
                .bind(record.hash.to_string());
        }
        query.execute(&mut **tx).await.map_err(StoreError::query("append to the audit log"))?;
    }
    Ok(())
}

impl Store {
    /// Records after `after`, by sequence, at most `limit`.
    ///
    /// # Errors
    /// If the database cannot be read or holds a record that is not one.
    pub(crate) async fn audit_after(&self, after: i64, limit: u32) -> Result<Vec<AuditRecord>, StoreError> {
        sqlx::query(
            "SELECT sequence, at_ms, actor, action, subject, detail, previous, hash FROM audit
             WHERE sequence > $1 ORDER BY sequence LIMIT $2",
        )
        .bind(after)
        .bind(i64::from(limit))
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::query("read the audit log"))?
        .iter()
        .map(|row| {
            Ok(AuditRecord {
                sequence: row.get(0),
                at_ms: row.get(1),
                actor: row.get(2),
                action: row.get(3),
                subject: row.get(4),
                detail: row.get(5),
                previous: digest(row, 6)?,
                hash: digest(row, 7)?,
            })
        })
        .collect()
    }
}

fn digest(row: &AnyRow, column: usize) -> Result<Sha256, StoreError> {
    let text: String = row.get(column);
    text.parse().map_err(|_| StoreError::content("digest", text))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tm_protocol::audit::{BrokenChain, verify};

    use super::*;
    use crate::store::tests::scratch;

    #[tokio::test]
    async fn the_stored_chain_verifies_and_a_changed_row_is_found() {
        let (store, _folder) = scratch().await;
        let entry = |n: i64| Entry {
            actor: "a",
            action: "token.create",
            subject: "t",
            detail: json!({ "n": n }),
            at_ms: n,
        };
        for n in 0..3 {
            let mut tx = store.begin().await.unwrap();
            append(&mut tx, entry(n)).await.unwrap();
            Store::commit(tx).await.unwrap();
        }
        let start = (0, AuditRecord::GENESIS);
        assert_eq!(verify(start, &store.audit_after(0, 10).await.unwrap()).unwrap().0, 3);
        let many: Vec<Entry> = (3..703).map(entry).collect();
        let mut tx = store.begin().await.unwrap();
        append_all(&mut tx, &many).await.unwrap();
        Store::commit(tx).await.unwrap();
        let all = store.audit_after(0, 1000).await.unwrap();
        assert_eq!(verify(start, &all).unwrap().0, 703);
        assert!(all.iter().zip(0..).all(|(record, n)| record.at_ms == n));

        let mut tx = store.begin().await.unwrap();
        sqlx::query("UPDATE audit SET actor = 'b' WHERE sequence = 2").execute(&mut *tx).await.unwrap();
        Store::commit(tx).await.unwrap();
        assert_eq!(verify(start, &store.audit_after(0, 10).await.unwrap()), Err(BrokenChain::Content(2)));
    }
}
