//! Enrollment and certificates.

use std::collections::HashMap;

use serde_json::json;
use sqlx::Row as _;
use tm_protocol::ids::{EndpointId, Sha256};

use super::{
    PARTS, Store, StoreError,
    audit::{Entry, append},
    certificates::{NewCertificate, enter},
    parts, places,
};

/// An endpoint that asks to be let in.
#[derive(Debug)]
pub(crate) struct NewEndpoint<'a> {
    pub(crate) id: EndpointId,
    pub(crate) host: &'a str,
    pub(crate) agent_version: &'a str,
    pub(crate) certificate: NewCertificate<'a>,
}

/// Why a token lets nobody in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenRefusal {
    Unknown,
    Revoked,
    Expired,
    UsedUp,
}

/// How a certificate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CertificateStatus {
    Enrolled,
    /// Enrolled, and not used before.
    Fresh,
    Revoked,
    Unknown,
}

impl Store {
    /// Whether a token lets nobody in, as far as a look shows that holds up nobody who writes.
    pub(crate) async fn token_refusal(
        &self,
        secret_digest: Sha256,
        now_ms: i64,
    ) -> Result<Option<TokenRefusal>, StoreError> {
        let row = sqlx::query(
            "SELECT uses, used, expires_ms, revoked_ms FROM enrollment_token WHERE secret_digest = $1",
        )
        .bind(secret_digest.to_string())
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::query("look a token up"))?;
        let Some(row) = row else { return Ok(Some(TokenRefusal::Unknown)) };
        Ok(if row.get::<Option<i64>, _>(3).is_some() {
            Some(TokenRefusal::Revoked)
        } else if row.get::<i64, _>(2) <= now_ms {
            Some(TokenRefusal::Expired)
        } else if row.get::<i64, _>(1) >= row.get::<i64, _>(0) {
            Some(TokenRefusal::UsedUp)
        } else {
            None
        })
    }

    /// Counts one use of the token and enters the endpoint, with its certificate and audit record, in one
    /// transaction.
    pub(crate) async fn use_token(
        &self,
        secret_digest: Sha256,
        new: NewEndpoint<'_>,
        now_ms: i64,
    ) -> Result<Result<(), TokenRefusal>, StoreError> {
        let mut tx = self.begin_audited().await?;
        let row = sqlx::query(
            "SELECT id, group_name, uses, used, expires_ms, revoked_ms FROM enrollment_token WHERE secret_digest = $1",
        )
        .bind(secret_digest.to_string())
        .fetch_optional(&mut *tx)
        .await
        .map_err(StoreError::query("look a token up"))?;
        let Some(row) = row else { return Ok(Err(TokenRefusal::Unknown)) };
        let (id, group): (String, String) = (row.get(0), row.get(1));
        if row.get::<Option<i64>, _>(5).is_some() {
            return Ok(Err(TokenRefusal::Revoked));
        }
        if row.get::<i64, _>(4) <= now_ms {
            return Ok(Err(TokenRefusal::Expired));
        }
        // The condition stands in the statement too: two managers may count at once.
        let counted =
            sqlx::query("UPDATE enrollment_token SET used = used + 1 WHERE id = $1 AND used < uses")
                .bind(id.as_str())
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("count a token's use"))?;
        if counted.rows_affected() == 0 {
            return Ok(Err(TokenRefusal::UsedUp));
        }
        let endpoint = new.id.to_string();
        sqlx::query(
            "INSERT INTO endpoint (id, host, host_key, group_name, agent_version, enrolled_ms, token_id, session_epoch,
             task_kinds, stored_through) VALUES ($1, $2, $3, $4, $5, $6, $7, 0, '[]', 0)",
        )
        .bind(endpoint.as_str())
        .bind(new.host)
        .bind(new.host.to_lowercase())
        .bind(group)
        .bind(new.agent_version)
        .bind(now_ms)
        .bind(id.as_str())
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("enter an endpoint"))?;
        enter(&mut tx, new.id, &new.certificate, now_ms).await?;
        let actor = format!("token {id}");
        let detail = json!({ "host": new.host, "serial": new.certificate.serial });
        let entry = Entry {
            actor: &actor,
            action: "endpoint.enroll",
            subject: endpoint.as_str(),
            detail,
            at_ms: now_ms,
        };
        append(&mut tx, entry).await?;
        Self::commit(tx).await?;
        Ok(Ok(()))
    }

    /// How the certificate with this serial stands, if it is this endpoint's.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn certificate_status(
        &self,
        endpoint: EndpointId,
        serial: &str,
    ) -> Result<CertificateStatus, StoreError> {
        let one = [(endpoint, serial.to_owned())];
        Ok(self.certificate_statuses(&one).await?.pop().unwrap_or(CertificateStatus::Unknown))
    }

    /// How certificates with these serials stand, in their order, as far as they are those endpoints'.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn certificate_statuses(
        &self,
        wanted: &[(EndpointId, String)],
    ) -> Result<Vec<CertificateStatus>, StoreError> {
        let mut found = HashMap::with_capacity(wanted.len());
        for part in parts(wanted, PARTS[0]) {
            let sql = format!(
                "SELECT endpoint_id, serial, revoked_ms, used_ms FROM certificate WHERE serial IN {}",
                places(1, part.len())
            );
            let mut query = sqlx::query(self.engine.listed(sql));
            for (_, serial) in part {
                query = query.bind(serial.as_str());
            }
            let rows = query.fetch_all(self.reader()).await;
            for row in rows.map_err(StoreError::query("look certificates up"))? {
                let status = match (row.get::<Option<i64>, _>(2), row.get::<Option<i64>, _>(3)) {
                    (Some(_), _) => CertificateStatus::Revoked,
                    (None, Some(_)) => CertificateStatus::Enrolled,
                    (None, None) => CertificateStatus::Fresh,
                };
                found.insert((row.get::<String, _>(0), row.get::<String, _>(1)), status);
            }
        }
        let status = |(endpoint, serial): &(EndpointId, String)| {
            found.get(&(endpoint.to_string(), serial.clone())).copied()
        };
        Ok(wanted.iter().map(|one| status(one).unwrap_or(CertificateStatus::Unknown)).collect())
    }
}
