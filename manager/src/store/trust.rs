//! The fleet's signed metadata, and which patterns they list.
//!
//! **Invariant:** metadata and what is said of patterns change in one transaction, or not at all.
//! **Invariant:** a change that was made from an older generation changes nothing.

use serde_json::{Value, json};
use sqlx::Row as _;
use tm_protocol::ids::Sha256;

use super::{
    Store, StoreError,
    audit::{self, Entry},
};

/// The metadata that are in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TrustRow {
    /// Counts from 1.
    pub(crate) generation: i64,
    /// The text of a `tm_patterns::trust::Bundle`.
    pub(crate) bundle: String,
}

/// Metadata that take the place of others.
#[derive(Debug)]
pub(crate) struct NewTrust<'a> {
    /// What they were made from; `None` if there were none.
    pub(crate) from: Option<i64>,
    pub(crate) bundle: &'a str,
    /// Every pattern that a role lists; `None` leaves what is listed as it is.
    pub(crate) listed: Option<&'a [Sha256]>,
    /// What the audit log says.
    pub(crate) detail: Value,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Published {
    Done,
    /// Others were quicker.
    Overtaken,
    /// A pattern is listed whose bytes are not here.
    Missing(Sha256),
}

impl Store {
    /// The metadata in force, if the fleet has any.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn trust(&self) -> Result<Option<TrustRow>, StoreError> {
        sqlx::query("SELECT generation, bundle FROM trust WHERE id = 1")
            .fetch_optional(self.reader())
            .await
            .map(|row| row.map(|row| TrustRow { generation: row.get(0), bundle: row.get(1) }))
            .map_err(StoreError::query("read the signed metadata"))
    }

    /// Puts metadata in the place of those that they were made from, publishes what they list and withdraws what
    /// they no longer list.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn publish_trust(
        &self,
        new: NewTrust<'_>,
        actor: &str,
        now_ms: i64,
    ) -> Result<Published, StoreError> {
        let mut tx = self.begin_audited().await?;
        let query = match new.from {
            None => sqlx::query(
                "INSERT INTO trust (id, generation, bundle) VALUES (1, 1, $1) ON CONFLICT (id) DO NOTHING",
            )
            .bind(new.bundle.to_owned()),
            Some(from) => sqlx::query(
                "UPDATE trust SET generation = generation + 1, bundle = $1 WHERE id = 1 AND generation = $2",
            )
            .bind(new.bundle.to_owned())
            .bind(from),
        };
        let changed =
            query.execute(&mut *tx).await.map_err(StoreError::query("change the signed metadata"))?;
        if changed.rows_affected() != 1 {
            return Ok(Published::Overtaken);
        }
        let Some(listed) = new.listed else {
            Self::commit(tx).await?;
            return Ok(Published::Done);
        };
        let before: Vec<String> =
            sqlx::query("SELECT sha256 FROM pattern WHERE published_ms IS NOT NULL ORDER BY import_number")
                .fetch_all(&mut *tx)
                .await
                .map_err(StoreError::query("read the patterns"))?
                .iter()
                .map(|row| row.get(0))
                .collect();
        let listed: Vec<(Sha256, String)> =
            listed.iter().map(|sha256| (*sha256, sha256.to_string())).collect();
        let entry = |action, subject, detail| Entry { actor, action, subject, detail, at_ms: now_ms };
        audit::append(&mut tx, entry("trust.publish", "trust", new.detail)).await?;
        for withdrawn in before.iter().filter(|old| !listed.iter().any(|(_, new)| new == *old)) {
            sqlx::query("UPDATE pattern SET published_ms = NULL WHERE sha256 = $1")
                .bind(withdrawn.clone())
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("withdraw a pattern"))?;
            audit::append(&mut tx, entry("pattern.withdraw", withdrawn, json!({}))).await?;
        }
        for (sha256, text) in listed.iter().filter(|(_, new)| !before.contains(new)) {
            let done = sqlx::query(
                "UPDATE pattern SET published_ms = $1,
                    import_number = 1 + (SELECT MAX(other.import_number) FROM pattern other)
                 WHERE sha256 = $2",
            )
            .bind(now_ms)
            .bind(text.clone())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("publish a pattern"))?;
            if done.rows_affected() != 1 {
                return Ok(Published::Missing(*sha256));
            }
            audit::append(&mut tx, entry("pattern.publish", text, json!({}))).await?;
        }
        Self::commit(tx).await?;
        Ok(Published::Done)
    }
}

#[cfg(test)]
mod tests {
    use tm_patterns::digests::Counts;
    use tm_protocol::task::PatternRef;

    use super::*;
    use crate::store::{patterns::NewPattern, tests::scratch};

    async fn draft(store: &Store, name: &str, text: &str) -> Sha256 {
        let sha256 = Sha256::of(text.as_bytes());
        let reference = PatternRef { sha256, size: 1, name: name.to_owned() };
        let digests = Counts::default();
        let new = NewPattern { reference, rules: 1, digests, warnings: Vec::new(), forced: false };
        store.import_pattern(&new, "root", 1).await.unwrap();
        sha256
    }

    fn new(from: Option<i64>, listed: Option<&[Sha256]>) -> NewTrust<'_> {
        NewTrust { from, bundle: "b", listed, detail: json!({}) }
    }

    #[tokio::test]
    async fn who_is_overtaken_changes_nothing_and_lists_are_whole() {
        let (store, _folder) = scratch().await;
        assert_eq!(store.trust().await.unwrap(), None);
        let (a, b) = (draft(&store, "x", "a").await, draft(&store, "y", "b").await);
        let names = async || {
            let rows = store.newest_patterns().await.unwrap();
            rows.into_iter().map(|row| row.reference.name).collect::<Vec<_>>()
        };
        assert!(names().await.is_empty(), "drafts are not scanned with");
        assert_eq!(store.publish_trust(new(None, Some(&[a])), "r", 2).await.unwrap(), Published::Done);
        assert_eq!(store.publish_trust(new(None, Some(&[b])), "r", 2).await.unwrap(), Published::Overtaken);
        assert_eq!(
            store.publish_trust(new(Some(2), Some(&[b])), "r", 2).await.unwrap(),
            Published::Overtaken
        );
        assert_eq!(names().await, ["x"]);

        let unknown = Sha256::of(b"unknown");
        let missing = store.publish_trust(new(Some(1), Some(&[b, unknown])), "r", 2).await.unwrap();
        assert_eq!(missing, Published::Missing(unknown));
        assert_eq!(names().await, ["x"], "nothing is half published");
        assert_eq!(store.trust().await.unwrap().unwrap().generation, 1);

        assert_eq!(store.publish_trust(new(Some(1), Some(&[a, b])), "r", 3).await.unwrap(), Published::Done);
        assert_eq!(names().await, ["x", "y"]);
        assert_eq!(store.publish_trust(new(Some(2), None), "r", 4).await.unwrap(), Published::Done);
        assert_eq!(store.publish_trust(new(Some(3), Some(&[b])), "r", 5).await.unwrap(), Published::Done);
        assert_eq!(names().await, ["y"], "what is no longer listed is withdrawn");
        let actions: Vec<_> =
            store.audit_after(0, 99).await.unwrap().into_iter().skip(2).map(|record| record.action).collect();
        let expected = ["trust.publish", "pattern.publish", "trust.publish", "pattern.publish"];
        assert_eq!(actions[..4], expected);
        assert_eq!(actions[4..], ["trust.publish", "pattern.withdraw"]);
    }
}
