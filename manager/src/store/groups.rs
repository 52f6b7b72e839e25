//! Groups of endpoints by name. An endpoint is in exactly one.
//!
//! **Invariant:** `default` is always there, and so is every group that an endpoint or an enrollment token is in.

use std::collections::BTreeMap;

use serde_json::json;
use sqlx::Row as _;

use super::{
    Store, StoreError,
    audit::{self, Entry},
};

/// The group that there always is.
pub(crate) const DEFAULT: &str = "default";

/// A group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct GroupRow {
    pub(crate) name: String,
    pub(crate) endpoints: u64,
    /// Who made it and when; `None` if nobody had to.
    pub(crate) created: Option<(String, i64)>,
}

impl Store {
    /// Makes a group; `None` if it is there already.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn create_group(
        &self,
        name: &str,
        actor: &str,
        now_ms: i64,
    ) -> Result<Option<GroupRow>, StoreError> {
        let mut tx = self.begin_audited().await?;
        if self.has_group(name).await? {
            return Ok(None);
        }
        sqlx::query("INSERT INTO endpoint_group (name, created_by, created_ms) VALUES ($1, $2, $3)")
            .bind(name.to_owned())
            .bind(actor.to_owned())
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("make a group"))?;
        let entry = Entry { actor, action: "group.create", subject: name, detail: json!({}), at_ms: now_ms };
        audit::append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(Some(GroupRow { name: name.to_owned(), endpoints: 0, created: Some((actor.to_owned(), now_ms)) }))
    }

    /// Every group, by name.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn groups(&self) -> Result<Vec<GroupRow>, StoreError> {
        let mut groups: BTreeMap<String, GroupRow> = BTreeMap::new();
        groups.insert(DEFAULT.to_owned(), GroupRow::default());
        let read = || StoreError::query("list the groups");
        for row in sqlx::query("SELECT name, created_by, created_ms FROM endpoint_group")
            .fetch_all(self.reader())
            .await
            .map_err(read())?
        {
            groups.entry(row.get(0)).or_default().created = Some((row.get(1), row.get(2)));
        }
        for row in sqlx::query("SELECT DISTINCT group_name FROM enrollment_token")
            .fetch_all(self.reader())
            .await
            .map_err(read())?
        {
            groups.entry(row.get(0)).or_default();
        }
        for row in sqlx::query("SELECT group_name, COUNT(*) FROM endpoint GROUP BY group_name")
            .fetch_all(self.reader())
            .await
            .map_err(read())?
        {
            groups.entry(row.get(0)).or_default().endpoints =
                u64::try_from(row.get::<i64, _>(1)).unwrap_or(0);
        }
        Ok(groups.into_iter().map(|(name, row)| GroupRow { name, ..row }).collect())
    }

    /// Whether there is a group of this name.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn has_group(&self, name: &str) -> Result<bool, StoreError> {
        if name == DEFAULT {
            return Ok(true);
        }
        let found = sqlx::query(
            "SELECT name FROM endpoint_group WHERE name = $1
             UNION ALL SELECT group_name FROM endpoint WHERE group_name = $1
             UNION ALL SELECT group_name FROM enrollment_token WHERE group_name = $1 LIMIT 1",
        )
        .bind(name.to_owned())
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::query("look for a group"))?;
        Ok(found.is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{endpoints::tests::put, tests::scratch};

    #[tokio::test]
    async fn a_group_is_made_once_and_one_that_is_in_use_is_there() {
        let (store, _folder) = scratch().await;
        let row = |name: &str, endpoints, created: Option<(&str, i64)>| GroupRow {
            name: name.to_owned(),
            endpoints,
            created: created.map(|(who, at)| (who.to_owned(), at)),
        };
        assert_eq!(store.groups().await.unwrap(), [row("default", 0, None)]);
        assert!(!store.has_group("servers").await.unwrap());
        let made = store.create_group("servers", "ann", 5).await.unwrap();
        assert_eq!(made, Some(row("servers", 0, Some(("ann", 5)))));
        for known in ["servers", "default"] {
            assert_eq!(store.create_group(known, "bob", 6).await.unwrap(), None, "{known}");
        }
        let endpoint = put(&store, 1, "web-07", &[], true).await;
        let endpoint = store.endpoint(endpoint).await.unwrap().unwrap();
        store.set_group(&endpoint, "old", "ann", 7).await.unwrap();
        assert!(store.has_group("old").await.unwrap());
        assert!(!store.has_group("%").await.unwrap());
        let expected = [row("default", 0, None), row("old", 1, None), row("servers", 0, Some(("ann", 5)))];
        assert_eq!(store.groups().await.unwrap(), expected);
        let log = store.audit_after(0, 9).await.unwrap();
        assert_eq!((log[0].action.as_str(), log[0].subject.as_str()), ("group.create", "servers"));
        assert_eq!(log.len(), 2, "what changed nothing is not recorded");
    }
}
