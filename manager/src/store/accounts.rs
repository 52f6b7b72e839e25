//! Administrators' accounts. A bearer token is known here only by its digest.

use serde_json::json;
use sqlx::{Row as _, any::AnyRow};
use tm_api::account::Role;
use tm_protocol::ids::Sha256;

use super::{
    Store, StoreError,
    audit::{self, Entry},
};

/// How exactly it is noted when a token was last used: a write for each request would cost more than it tells.
const LAST_USED_GRAIN_MS: i64 = 60_000;

/// An account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AccountRow {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) created_ms: i64,
    pub(crate) last_used_ms: Option<i64>,
}

/// What came of deleting an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Deletion {
    Deleted,
    Unknown,
    /// Nobody could administer the manager any more; nothing was changed.
    LastAdministrator,
}

impl Store {
    /// Makes the first account of a new manager; `false`, and nothing done, if there are accounts already.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn create_first_account(
        &self,
        name: &str,
        role: Role,
        token_digest: Sha256,
        now_ms: i64,
    ) -> Result<bool, StoreError> {
        let accounts: i64 = sqlx::query("SELECT COUNT(*) FROM account")
            .fetch_one(self.reader())
            .await
            .map_err(StoreError::query("count the accounts"))?
            .get(0);
        if accounts > 0 {
            return Ok(false);
        }
        Ok(self.create_account(name, role, token_digest, "system", now_ms).await?.is_some())
    }

    /// Makes an account; `None` if the name is taken.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn create_account(
        &self,
        name: &str,
        role: Role,
        token_digest: Sha256,
        actor: &str,
        now_ms: i64,
    ) -> Result<Option<AccountRow>, StoreError> {
        let mut tx = self.begin_audited().await?;
        let made = sqlx::query(
            "INSERT INTO account (name, role, token_digest, created_ms) VALUES ($1, $2, $3, $4)
             ON CONFLICT (name) DO NOTHING",
        )
        .bind(name.to_owned())
        .bind(role.word())
        .bind(token_digest.to_string())
        .bind(now_ms)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("create an account"))?;
        if made.rows_affected() == 0 {
            return Ok(None);
        }
        let detail = json!({ "role": role.word() });
        let entry = Entry { actor, action: "account.create", subject: name, detail, at_ms: now_ms };
        audit::append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(Some(AccountRow { name: name.to_owned(), role, created_ms: now_ms, last_used_ms: None }))
    }

    /// The account that a bearer token belongs to: one look-up by an indexed digest.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn account_by_token(&self, digest: Sha256) -> Result<Option<AccountRow>, StoreError> {
        sqlx::query("SELECT name, role, created_ms, last_used_ms FROM account WHERE token_digest = $1")
            .bind(digest.to_string())
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::query("look up a token"))?
            .map(|row| account(&row))
            .transpose()
    }

    /// Notes that an account was used, unless that was noted less than a minute ago.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn account_used(&self, account: &AccountRow, now_ms: i64) -> Result<(), StoreError> {
        let recent = account.last_used_ms.is_some_and(|at| now_ms.saturating_sub(at) < LAST_USED_GRAIN_MS);
        if recent {
            return Ok(());
        }
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE account SET last_used_ms = $1 WHERE name = $2")
            .bind(now_ms)
            .bind(account.name.clone())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("note an account's use"))?;
        Self::commit(tx).await
    }

    /// Every account, by name.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn accounts(&self) -> Result<Vec<AccountRow>, StoreError> {
        sqlx::query("SELECT name, role, created_ms, last_used_ms FROM account ORDER BY name")
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("list the accounts"))?
            .iter()
            .map(account)
            .collect()
    }

    /// Gives an account a new token, which ends the old one; `None` if there is no such account.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn renew_account_token(
        &self,
        name: &str,
        token_digest: Sha256,
        actor: &str,
        now_ms: i64,
    ) -> Result<Option<AccountRow>, StoreError> {
        let mut tx = self.begin_audited().await?;
        sqlx::query("UPDATE account SET token_digest = $1 WHERE name = $2")
            .bind(token_digest.to_string())
            .bind(name.to_owned())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("renew an account's token"))?;
        let row = sqlx::query("SELECT name, role, created_ms, last_used_ms FROM account WHERE name = $1")
            .bind(name.to_owned())
            .fetch_optional(&mut *tx)
            .await
            .map_err(StoreError::query("read an account"))?;
        let Some(row) = row else { return Ok(None) };
        let entry = Entry { actor, action: "account.token", subject: name, detail: json!({}), at_ms: now_ms };
        audit::append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        account(&row).map(Some)
    }

    /// Deletes an account and so ends its token.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn delete_account(
        &self,
        name: &str,
        actor: &str,
        now_ms: i64,
    ) -> Result<Deletion, StoreError> {
        let mut tx = self.begin_audited().await?;
        // First, because it makes concurrent changes queue up: two administrators who delete each other at
        // once must not both pass the check below.
        let entry =
            Entry { actor, action: "account.delete", subject: name, detail: json!({}), at_ms: now_ms };
        audit::append(&mut tx, entry).await?;
        let deleted = sqlx::query("DELETE FROM account WHERE name = $1")
            .bind(name.to_owned())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("delete an account"))?;
        if deleted.rows_affected() == 0 {
            return Ok(Deletion::Unknown);
        }
        let administrators: i64 = sqlx::query("SELECT COUNT(*) FROM account WHERE role = $1")
            .bind(Role::Administrator.word())
            .fetch_one(&mut *tx)
            .await
            .map_err(StoreError::query("count the administrators"))?
            .get(0);
        if administrators == 0 {
            return Ok(Deletion::LastAdministrator);
        }
        Self::commit(tx).await?;
        Ok(Deletion::Deleted)
    }
}

fn account(row: &AnyRow) -> Result<AccountRow, StoreError> {
    let role: String = row.get(1);
    Ok(AccountRow {
        name: row.get(0),
        role: Role::from_word(&role).ok_or_else(|| StoreError::content("role", role))?,
        created_ms: row.get(2),
        last_used_ms: row.get(3),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::scratch;

    #[tokio::test]
    async fn an_account_lives_by_its_token() {
        let (store, _folder) = scratch().await;
        let [first, second, third] = [[1; 32], [2; 32], [3; 32]].map(Sha256::new);
        assert!(store.create_first_account("root", Role::Administrator, first, 5).await.unwrap());
        assert!(!store.create_first_account("other", Role::Administrator, second, 5).await.unwrap());
        assert!(store.create_account("root", Role::Viewer, second, "root", 6).await.unwrap().is_none());

        let root = store.account_by_token(first).await.unwrap().unwrap();
        assert_eq!((root.name.as_str(), root.role, root.last_used_ms), ("root", Role::Administrator, None));
        for (now, noted) in [(100, 100), (60_099, 100), (60_100, 60_100)] {
            let before = store.account_by_token(first).await.unwrap().unwrap();
            store.account_used(&before, now).await.unwrap();
            assert_eq!(store.account_by_token(first).await.unwrap().unwrap().last_used_ms, Some(noted));
        }

        assert!(store.renew_account_token("root", third, "root", 7).await.unwrap().is_some());
        assert_eq!(store.account_by_token(first).await.unwrap(), None);
        assert!(store.account_by_token(third).await.unwrap().is_some());
        assert!(store.renew_account_token("nobody", second, "root", 7).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn the_last_administrator_stays_and_what_did_not_happen_is_not_in_the_log() {
        let (store, _folder) = scratch().await;
        let digest = |n| Sha256::new([n; 32]);
        store.create_first_account("a", Role::Administrator, digest(1), 1).await.unwrap();
        store.create_account("v", Role::Viewer, digest(2), "a", 2).await.unwrap();
        assert_eq!(store.delete_account("a", "a", 3).await.unwrap(), Deletion::LastAdministrator);
        assert_eq!(store.delete_account("nobody", "a", 3).await.unwrap(), Deletion::Unknown);
        store.create_account("b", Role::Administrator, digest(3), "a", 4).await.unwrap();
        assert_eq!(store.delete_account("a", "b", 5).await.unwrap(), Deletion::Deleted);
        assert_eq!(store.delete_account("v", "b", 6).await.unwrap(), Deletion::Deleted);
        let names: Vec<_> = store.accounts().await.unwrap().into_iter().map(|a| a.name).collect();
        assert_eq!(names, ["b"]);
        let log: Vec<_> =
            store.audit_after(0, 100).await.unwrap().into_iter().map(|r| (r.action, r.subject)).collect();
        let expected = [("create", "a"), ("create", "v"), ("create", "b"), ("delete", "a"), ("delete", "v")];
        assert_eq!(log, expected.map(|(verb, who)| (format!("account.{verb}"), who.to_owned())));
    }
}
