//! The fleet's signed metadata, and which patterns they list.
//!
//! **Invariant:** metadata and what is said of patterns change in one transaction, or not at all.
//! **Invariant:** a change that was made from an older generation changes nothing.

use std::collections::HashMap;

use serde_json::{Value, json};
use sqlx::Row as _;
use tm_api::rollout::{RolloutState, Share, StartRollout};
use tm_protocol::ids::Sha256;

use super::{
    Store, StoreError, Tx,
    audit::{self, Entry},
    rollouts::{self, RolloutRow},
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
    /// How what is newly listed reaches the fleet; all of it at once if nothing is said.
    pub(crate) rollout: Option<&'a StartRollout>,
    /// What the audit log says.
    pub(crate) detail: Value,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Published {
    Done,
    /// Others were quicker.
    Overtaken,
    /// A pattern is listed whose bytes are not here.
    Missing(Sha256),
    /// A version of that name is still on its way through its waves.
    UnderWay(String),
    /// Endpoints that no remaining version of that name reaches would lose theirs.
    Stranded(String),
    /// It is said how what is new reaches the fleet, and nothing is new.
    NothingNew,
    /// There is no such group.
    NoGroup(String),
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
        rollouts::hold(&mut tx).await?;
        let plan = match self.plan(&mut tx, listed, new.rollout).await? {
            Ok(plan) => plan,
            Err(refusal) => return Ok(refusal),
        };
        let before = &plan.before;
        let listed: Vec<(Sha256, String)> =
            listed.iter().map(|sha256| (*sha256, sha256.to_string())).collect();
        let entry = |action, subject, detail| Entry { actor, action, subject, detail, at_ms: now_ms };
        audit::append(&mut tx, entry("trust.publish", "trust", new.detail)).await?;
        for (withdrawn, _) in before.iter().filter(|(old, _)| !listed.iter().any(|(_, new)| new == old)) {
            sqlx::query("UPDATE pattern SET published_ms = NULL WHERE sha256 = $1")
                .bind(withdrawn.clone())
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("withdraw a pattern"))?;
            rollouts::withdraw(&mut tx, withdrawn, now_ms).await?;
            audit::append(&mut tx, entry("pattern.withdraw", withdrawn, json!({}))).await?;
        }
        for (sha256, text) in listed.iter().filter(|(_, new)| !before.iter().any(|(old, _)| old == new)) {
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
            let Some((_, name)) = plan.fresh.iter().find(|(fresh, _)| fresh == sha256) else { continue };
            if let Some(terms) = new.rollout {
                let previous = plan.previous(name);
                rollouts::begin(&mut tx, (*sha256, name), terms, previous, actor, now_ms).await?;
            }
        }
        Self::commit(tx).await?;
        Ok(Published::Done)
    }

    /// What a publication changes, or why it is none.
    async fn plan(
        &self,
        tx: &mut Tx,
        listed: &[Sha256],
        terms: Option<&StartRollout>,
    ) -> Result<Result<Plan, Published>, StoreError> {
        let rows = sqlx::query("SELECT sha256, name, published_ms FROM pattern ORDER BY import_number")
            .fetch_all(&mut **tx)
            .await
            .map_err(StoreError::query("read the patterns"))?;
        let mut names: HashMap<String, String> = HashMap::with_capacity(rows.len());
        let mut before = Vec::new();
        for row in &rows {
            let (sha256, name): (String, String) = (row.get(0), row.get(1));
            if row.get::<Option<i64>, _>(2).is_some() {
                before.push((sha256.clone(), name.clone()));
            }
            names.insert(sha256, name);
        }
        let was_listed = |sha256: &Sha256| {
            let text = sha256.to_string();
            before.iter().any(|(old, _)| *old == text)
        };
        let mut fresh = Vec::new();
        for sha256 in listed.iter().filter(|sha256| !was_listed(sha256)) {
            let Some(name) = names.get(&sha256.to_string()) else {
                return Ok(Err(Published::Missing(*sha256)));
            };
            fresh.push((*sha256, name.clone()));
        }
        if let Some(terms) = terms {
            if fresh.is_empty() {
                return Ok(Err(Published::NothingNew));
            }
            if let Some(group) = &terms.group
                && !self.has_group(group).await?
            {
                return Ok(Err(Published::NoGroup(group.clone())));
            }
        }
        let standing = rollouts::standing(tx).await?;
        let on_its_way = |name: &str| {
            let mut of_name = standing.values().filter(|rollout| rollout.name == name);
            of_name.any(|rollout| rollout.state == RolloutState::Running && !rollout.is_last())
        };
        if let Some((_, name)) = fresh.iter().find(|(_, name)| on_its_way(name)) {
            return Ok(Err(Published::UnderWay(name.clone())));
        }
        let is_for_all = terms
            .is_none_or(|terms| terms.group.is_none() && terms.waves.shares().first() == Some(&Share::ALL));
        let reaches_all = |sha256: &Sha256| match standing.get(sha256) {
            _ if !was_listed(sha256) => is_for_all,
            Some(rollout) => rollout.reaches_all(),
            None => true,
        };
        for (_, name) in before.iter().filter(|(old, _)| !listed.iter().any(|new| new.to_string() == *old)) {
            let mut left = listed.iter().filter(|new| names.get(&new.to_string()) == Some(name)).peekable();
            if left.peek().is_some() && !left.any(&reaches_all) {
                return Ok(Err(Published::Stranded(name.clone())));
            }
        }
        Ok(Ok(Plan { before, fresh, standing }))
    }
}

/// What a publication changes.
struct Plan {
    /// What was listed, by digest and name, oldest first.
    before: Vec<(String, String)>,
    /// What was not.
    fresh: Vec<(Sha256, String)>,
    standing: HashMap<Sha256, RolloutRow>,
}

impl Plan {
    /// What a name meant, for those who got the newest.
    fn previous(&self, name: &str) -> Option<String> {
        let is_stopped = |sha256: &str| {
            let rollout = sha256.parse().ok().and_then(|sha256: Sha256| self.standing.get(&sha256));
            rollout.is_some_and(|rollout| rollout.state == RolloutState::Stopped)
        };
        let mut of_name = self.before.iter().rev().filter(|(_, known)| known == name);
        of_name.find(|(sha256, _)| !is_stopped(sha256)).map(|(sha256, _)| sha256.clone())
    }
}

#[cfg(test)]
mod tests {
    use tm_patterns::digests::Counts;
    use tm_protocol::{ids::EndpointId, task::PatternRef};

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
        NewTrust { from, bundle: "b", listed, rollout: None, detail: json!({}) }
    }

    #[tokio::test]
    async fn who_is_overtaken_changes_nothing_and_lists_are_whole() {
        let (store, _folder) = scratch().await;
        assert_eq!(store.trust().await.unwrap(), None);
        let (a, b) = (draft(&store, "x", "a").await, draft(&store, "y", "b").await);
        let names = async || {
            let versions = store.versions().await.unwrap();
            let rows = versions.of(EndpointId::new(uuid::Uuid::nil()), "default");
            rows.into_iter().map(|row| row.reference.name.clone()).collect::<Vec<_>>()
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
