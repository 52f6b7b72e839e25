//! Certificates after enrollment: renewed, replaced, revoked; and endpoints forgotten.
//!
//! **Invariant:** once a revocation has been committed, no certificate of that endpoint is good again, and none is
//! issued to it.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;
use sqlx::Row as _;
use tm_protocol::ids::{EndpointId, ManagerId, Sha256};

use super::{
    Store, StoreError, Tx,
    audit::{Entry, append},
    endpoints::EndpointRow,
};

/// A certificate that is to be entered.
#[derive(Debug)]
pub(crate) struct NewCertificate<'a> {
    /// Lower-case hex.
    pub(crate) serial: &'a str,
    pub(crate) not_after_ms: i64,
    /// Whose it is.
    pub(crate) authority: Sha256,
    /// SubjectPublicKeyInfo (DER).
    pub(crate) public_key: &'a [u8],
}

/// Enters a certificate of an endpoint.
///
/// # Errors
/// If the database refuses.
pub(super) async fn enter(
    tx: &mut Tx,
    endpoint: EndpointId,
    new: &NewCertificate<'_>,
    now_ms: i64,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO certificate (serial, endpoint_id, issued_ms, not_after_ms, public_key, authority)
         VALUES ($1, $2, $3, $4, $5, $6)",
    )
    .bind(new.serial.to_owned())
    .bind(endpoint.to_string())
    .bind(now_ms)
    .bind(new.not_after_ms)
    .bind(STANDARD.encode(new.public_key))
    .bind(new.authority.to_string())
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("enter a certificate"))?;
    Ok(())
}

/// What came of a wish to forget an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forgotten {
    /// It is gone, with its tasks, detections and incidents. Its events and audit records stay.
    Done,
    /// It has an agent that may connect: that one has to be revoked first.
    NotRevoked,
}

impl Store {
    /// Shuts the agent of an endpoint out for ever. `false` if that was done before.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn revoke(
        &self,
        endpoint: &EndpointRow,
        actor: &str,
        reason: &str,
        now_ms: i64,
    ) -> Result<bool, StoreError> {
        let id = endpoint.id.to_string();
        let mut tx = self.begin().await?;
        let done = sqlx::query("UPDATE endpoint SET revoked_ms = $2 WHERE id = $1 AND revoked_ms IS NULL")
            .bind(id.as_str())
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("revoke an endpoint"))?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query("UPDATE certificate SET revoked_ms = $2 WHERE endpoint_id = $1 AND revoked_ms IS NULL")
            .bind(id.as_str())
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("revoke an endpoint's certificates"))?;
        let entry = Entry {
            actor,
            action: "endpoint.revoke",
            subject: id.as_str(),
            detail: json!({ "host": endpoint.host, "reason": reason }),
            at_ms: now_ms,
        };
        append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(true)
    }

    /// Enters a further certificate of an endpoint, for a new key. `false` if the endpoint was revoked.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn renew(
        &self,
        endpoint: EndpointId,
        new: &NewCertificate<'_>,
        now_ms: i64,
    ) -> Result<bool, StoreError> {
        let id = endpoint.to_string();
        let mut tx = self.begin().await?;
        // Changes nothing, and holds the row: a revocation comes before this or after it.
        let held = sqlx::query("UPDATE endpoint SET host = host WHERE id = $1 AND revoked_ms IS NULL")
            .bind(id.as_str())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("hold an endpoint for its renewal"))?;
        if held.rows_affected() == 0 {
            return Ok(false);
        }
        enter(&mut tx, endpoint, new, now_ms).await?;
        let entry = Entry {
            actor: "agent",
            action: "endpoint.renew",
            subject: id.as_str(),
            detail: json!({ "serial": new.serial }),
            at_ms: now_ms,
        };
        append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(true)
    }

    /// Notes the first use of a certificate. Those of the same endpoint that were issued before it are revoked.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn certificate_used(
        &self,
        endpoint: EndpointId,
        serial: &str,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        self.certificates_used(&[(endpoint, serial.to_owned())], now_ms).await
    }

    /// The same for many, in one transaction.
    ///
    /// # Errors
    /// If the database refuses; then none is noted.
    pub(crate) async fn certificates_used(
        &self,
        used: &[(EndpointId, String)],
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        for (endpoint, serial) in used {
            sqlx::query("UPDATE certificate SET used_ms = $2 WHERE serial = $1 AND used_ms IS NULL")
                .bind(serial.as_str())
                .bind(now_ms)
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("note that a certificate is used"))?;
            sqlx::query(
                "UPDATE certificate SET revoked_ms = $3
                 WHERE endpoint_id = $1 AND serial <> $2 AND revoked_ms IS NULL
                   AND issued_ms <= (SELECT used.issued_ms FROM certificate used WHERE used.serial = $2)",
            )
            .bind(endpoint.to_string())
            .bind(serial.as_str())
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("revoke replaced certificates"))?;
        }
        Self::commit(tx).await
    }

    /// Revoked endpoints that still have a session at `manager`.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn revoked_sessions(&self, manager: ManagerId) -> Result<Vec<EndpointId>, StoreError> {
        let rows = sqlx::query("SELECT id FROM endpoint WHERE revoked_ms IS NOT NULL AND manager_id = $1")
            .bind(manager.to_string())
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("look for sessions of revoked endpoints"))?;
        rows.iter()
            .map(|row| {
                let id: String = row.get(0);
                id.parse().map_err(|_| StoreError::content("endpoint id", id))
            })
            .collect()
    }

    /// Endpoints that were revoked at or after `since_ms`.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn revoked_since(&self, since_ms: i64) -> Result<Vec<EndpointId>, StoreError> {
        let rows = sqlx::query("SELECT id FROM endpoint WHERE revoked_ms >= $1")
            .bind(since_ms)
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("look for revoked endpoints"))?;
        rows.iter()
            .map(|row| {
                let id: String = row.get(0);
                id.parse().map_err(|_| StoreError::content("endpoint id", id))
            })
            .collect()
    }

    /// Removes a revoked endpoint and what is known about it.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn forget(
        &self,
        endpoint: &EndpointRow,
        actor: &str,
        now_ms: i64,
    ) -> Result<Forgotten, StoreError> {
        let id = endpoint.id.to_string();
        let mut tx = self.begin().await?;
        // What names it goes with it by foreign keys; only events do not.
        let done = sqlx::query("DELETE FROM endpoint WHERE id = $1 AND revoked_ms IS NOT NULL")
            .bind(id.as_str())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("forget an endpoint"))?;
        if done.rows_affected() == 0 {
            return Ok(Forgotten::NotRevoked);
        }
        let detail = json!({ "host": endpoint.host });
        let entry = Entry { actor, action: "endpoint.forget", subject: id.as_str(), detail, at_ms: now_ms };
        append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(Forgotten::Done)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        endpoints::{Filter, tests::put},
        enrollments::CertificateStatus,
        tests::scratch,
    };

    async fn certify(store: &Store, endpoint: EndpointId, serial: &str) {
        let mut tx = store.begin().await.unwrap();
        sqlx::query(
            "INSERT INTO certificate (serial, endpoint_id, issued_ms, not_after_ms) VALUES ($1, $2, 1, 99)",
        )
        .bind(serial.to_owned())
        .bind(endpoint.to_string())
        .execute(&mut *tx)
        .await
        .unwrap();
        Store::commit(tx).await.unwrap();
    }

    #[tokio::test]
    async fn who_is_revoked_is_out_for_ever_and_can_then_be_forgotten() {
        let (store, _folder) = scratch().await;
        let out = put(&store, 1, "stolen", &["192.0.2.1"], true).await;
        let stays = put(&store, 2, "stays", &[], true).await;
        certify(&store, out, "aa").await;
        certify(&store, out, "ab").await;
        certify(&store, stays, "bb").await;
        let row = store.endpoint(out).await.unwrap().unwrap();
        assert_eq!(store.forget(&row, "root", 4).await.unwrap(), Forgotten::NotRevoked);
        assert!(store.revoke(&row, "root", "laptop stolen", 5).await.unwrap());
        assert!(!store.revoke(&row, "root", "again", 6).await.unwrap(), "once");
        for serial in ["aa", "ab"] {
            assert_eq!(store.certificate_status(out, serial).await.unwrap(), CertificateStatus::Revoked);
        }
        assert_eq!(store.certificate_status(stays, "bb").await.unwrap(), CertificateStatus::Fresh);
        // `put` gives sessions to a manager that is none: the text `m`.
        assert_eq!(store.revoked_since(5).await.unwrap(), [out]);
        assert_eq!(store.revoked_since(6).await.unwrap(), []);
        let nobody = ManagerId::new(Uuid::from_u128(7));
        assert_eq!(store.revoked_sessions(nobody).await.unwrap(), []);
        let mut tx = store.begin().await.unwrap();
        sqlx::query("UPDATE endpoint SET manager_id = $1")
            .bind(nobody.to_string())
            .execute(&mut *tx)
            .await
            .unwrap();
        Store::commit(tx).await.unwrap();
        assert_eq!(store.revoked_sessions(nobody).await.unwrap(), [out]);
        let row = store.endpoint(out).await.unwrap().unwrap();
        assert_eq!(row.revoked_ms, Some(5));
        assert_eq!(store.forget(&row, "root", 7).await.unwrap(), Forgotten::Done);
        let left = store.endpoints(&Filter::default()).await.unwrap();
        assert_eq!(left.iter().map(|row| row.id).collect::<Vec<_>>(), [stays]);
        assert_eq!(store.certificate_status(out, "aa").await.unwrap(), CertificateStatus::Unknown);
        let log = store.audit_after(0, 9).await.unwrap();
        let actions: Vec<&str> = log.iter().map(|entry| entry.action.as_str()).collect();
        assert_eq!(actions, ["endpoint.revoke", "endpoint.forget"]);
    }
}
