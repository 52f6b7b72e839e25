//! Enrollment tokens as administrators see them: make, list, revoke. Using one up is `enrollments`.

use serde_json::json;
use sqlx::Row as _;
use tm_protocol::ids::{Sha256, TokenId};

use super::{
    Store, StoreError,
    audit::{self, Entry},
};

/// An enrollment token's record; its secret is not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenRow {
    pub(crate) id: TokenId,
    pub(crate) group: String,
    pub(crate) uses: i64,
    pub(crate) used: i64,
    pub(crate) created_by: String,
    pub(crate) created_ms: i64,
    pub(crate) expires_ms: i64,
    pub(crate) revoked_ms: Option<i64>,
}

impl TokenRow {
    /// The word for what it is good for now.
    pub(crate) fn state(&self, now_ms: i64) -> &'static str {
        if self.revoked_ms.is_some() {
            "revoked"
        } else if self.used >= self.uses {
            "used-up"
        } else if self.expires_ms <= now_ms {
            "expired"
        } else {
            "active"
        }
    }
}

impl Store {
    /// Stores a new enrollment token. Who made it and when is in `token`.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn create_token(
        &self,
        token: &TokenRow,
        secret_digest: Sha256,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin_audited().await?;
        sqlx::query(
            "INSERT INTO enrollment_token
                (id, secret_digest, group_name, uses, used, created_by, created_ms, expires_ms)
             VALUES ($1, $2, $3, $4, 0, $5, $6, $7)",
        )
        .bind(token.id.to_string())
        .bind(secret_digest.to_string())
        .bind(token.group.clone())
        .bind(token.uses)
        .bind(token.created_by.clone())
        .bind(token.created_ms)
        .bind(token.expires_ms)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("create an enrollment token"))?;
        let entry = Entry {
            actor: &token.created_by,
            action: "token.create",
            subject: &token.id.to_string(),
            detail: json!({ "group": token.group, "uses": token.uses, "expires_ms": token.expires_ms }),
            at_ms: token.created_ms,
        };
        audit::append(&mut tx, entry).await?;
        Self::commit(tx).await
    }

    /// Every enrollment token, oldest first.
    ///
    /// # Errors
    /// If the database cannot be read or holds a token that is not one.
    pub(crate) async fn tokens(&self) -> Result<Vec<TokenRow>, StoreError> {
        sqlx::query(
            "SELECT id, group_name, uses, used, created_by, created_ms, expires_ms, revoked_ms
             FROM enrollment_token ORDER BY created_ms, id",
        )
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::query("list the enrollment tokens"))?
        .iter()
        .map(|row| {
            let id: String = row.get(0);
            Ok(TokenRow {
                id: id.parse().map_err(|_| StoreError::content("token id", id))?,
                group: row.get(1),
                uses: row.get(2),
                used: row.get(3),
                created_by: row.get(4),
                created_ms: row.get(5),
                expires_ms: row.get(6),
                revoked_ms: row.get(7),
            })
        })
        .collect()
    }

    /// Revokes an enrollment token; `false` if there is none. Revoking it again changes nothing.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn revoke_token(
        &self,
        id: TokenId,
        actor: &str,
        now_ms: i64,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin_audited().await?;
        let revoked =
            sqlx::query("UPDATE enrollment_token SET revoked_ms = $1 WHERE id = $2 AND revoked_ms IS NULL")
                .bind(now_ms)
                .bind(id.to_string())
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("revoke an enrollment token"))?;
        if revoked.rows_affected() == 0 {
            let known = sqlx::query("SELECT id FROM enrollment_token WHERE id = $1")
                .bind(id.to_string())
                .fetch_optional(&mut *tx)
                .await
                .map_err(StoreError::query("read an enrollment token"))?;
            return Ok(known.is_some());
        }
        let subject = id.to_string();
        let entry =
            Entry { actor, action: "token.revoke", subject: &subject, detail: json!({}), at_ms: now_ms };
        audit::append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::tests::scratch;

    fn token(n: u128) -> TokenRow {
        TokenRow {
            id: TokenId::new(Uuid::from_u128(n)),
            group: "default".to_owned(),
            uses: 2,
            used: 0,
            created_by: "root".to_owned(),
            created_ms: 10,
            expires_ms: 1000,
            revoked_ms: None,
        }
    }

    #[test]
    fn a_token_has_one_state() {
        let fresh = token(1);
        let cases = [
            (fresh.clone(), 999, "active"),
            (fresh.clone(), 1000, "expired"),
            (TokenRow { used: 2, ..fresh.clone() }, 999, "used-up"),
            (TokenRow { revoked_ms: Some(5), used: 2, ..fresh }, 2000, "revoked"),
        ];
        for (row, now, state) in cases {
            assert_eq!(row.state(now), state);
        }
    }

    #[tokio::test]
    async fn a_token_is_made_listed_and_revoked_once() {
        let (store, _folder) = scratch().await;
        store.create_token(&token(1), Sha256::new([1; 32])).await.unwrap();
        store.create_token(&token(2), Sha256::new([2; 32])).await.unwrap();
        assert_eq!(store.tokens().await.unwrap(), [token(1), token(2)]);
        assert!(store.revoke_token(token(1).id, "root", 20).await.unwrap());
        assert!(store.revoke_token(token(1).id, "root", 30).await.unwrap());
        assert!(!store.revoke_token(token(3).id, "root", 30).await.unwrap());
        let listed = store.tokens().await.unwrap();
        assert_eq!(listed, [TokenRow { revoked_ms: Some(20), ..token(1) }, token(2)]);
        let actions: Vec<_> = store.audit_after(0, 9).await.unwrap().into_iter().map(|r| r.action).collect();
        assert_eq!(actions, ["token.create", "token.create", "token.revoke"]);
    }
}
