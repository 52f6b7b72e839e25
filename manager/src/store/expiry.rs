//! When certificates end, whose they are, and who was warned of it.
//!
//! **Invariant:** of an endpoint's certificates the one counts that its agent has used; one that was issued and not used
//! yet counts only where there is no such one.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::{Row as _, any::AnyRow};
use tm_api::{
    certificate::CertificateState,
    event::{EventKind, EventStatus},
};
use tm_protocol::ids::{EndpointId, ManagerId, Sha256};

use super::{
    Store, StoreError,
    audit::{Entry, append},
    events::{self, NewEvent},
};

const DAY_MS: i64 = 86_400_000;
/// How long after its end a certificate may still be renewed.
pub(crate) const LATE_MS: i64 = 30 * DAY_MS;

/// An endpoint's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExpiryRow {
    pub(crate) endpoint: EndpointId,
    pub(crate) host: String,
    pub(crate) group: String,
    pub(crate) connected: bool,
    /// Whether a newer one was issued that its agent has not used yet.
    renewing: bool,
    pub(crate) last_seen_ms: Option<i64>,
    /// Lower-case hex.
    pub(crate) serial: String,
    /// SHA-256 of the authority's certificate.
    pub(crate) authority: String,
    pub(crate) issued_ms: i64,
    pub(crate) not_after_ms: i64,
    /// At how many days before its end that was last warned of.
    warned_days: Option<i64>,
}

/// A certificate of the manager's own: an authority's, or the one that it shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Own {
    /// `authority` or `manager`.
    pub(crate) what: String,
    /// The digest of an authority; the id of a manager.
    pub(crate) name: String,
    /// Whether it issues.
    pub(crate) issuing: bool,
    pub(crate) begin_ms: i64,
    pub(crate) end_ms: i64,
}

/// Which warning of an end at `end` is due at `now` (milliseconds since 1970): the one at 30 days or the one at 7.
/// Certificates of short life are warned of later, in proportion. What `renews` by itself does so before a quarter of
/// its life is left.
fn warning_due(begin: i64, end: i64, renews: bool, now: i64) -> Option<i64> {
    let (life, left) = (end.saturating_sub(begin), end.saturating_sub(now));
    if left <= (7 * DAY_MS).min(life / 12) {
        Some(7)
    } else if left <= (30 * DAY_MS).min(if renews { life / 4 } else { life / 3 }) {
        Some(30)
    } else {
        None
    }
}

impl ExpiryRow {
    /// What is to be thought of it at `now`.
    pub(crate) fn state(&self, now: i64) -> CertificateState {
        let left = self.not_after_ms.saturating_sub(now);
        let is_due = self.warning(now).is_some();
        match (left, is_due, self.connected) {
            (left, ..) if left < -LATE_MS => CertificateState::NeedsEnrollment,
            (..0, ..) => CertificateState::Ended,
            (_, true, true) => CertificateState::Late,
            (_, true, false) => CertificateState::Away,
            (_, false, _) => CertificateState::Good,
        }
    }

    /// Which warning is due: 30 days or 7. An agent that was there lately is taken for one that renews.
    pub(crate) fn warning(&self, now: i64) -> Option<i64> {
        let lately = self.not_after_ms.saturating_sub(self.issued_ms) / 60;
        let was_there = self.last_seen_ms.is_some_and(|seen| now.saturating_sub(seen) < lately);
        let renews = self.connected || self.renewing || was_there;
        warning_due(self.issued_ms, self.not_after_ms, renews, now)
    }

    fn of(row: &AnyRow) -> Result<Self, StoreError> {
        let id: String = row.get(0);
        Ok(Self {
            endpoint: id.parse().map_err(|_| StoreError::content("endpoint id", id))?,
            host: row.get(1),
            group: row.get(2),
            connected: row.get::<Option<String>, _>(3).is_some(),
            renewing: row.get::<i64, _>(10) != 0,
            last_seen_ms: row.get(4),
            serial: row.get(5),
            authority: row.get::<Option<String>, _>(6).unwrap_or_default(),
            issued_ms: row.get(7),
            not_after_ms: row.get(8),
            warned_days: row.get(9),
        })
    }
}

/// The certificate that counts, of every endpoint that was not revoked.
const COUNTING: &str = "SELECT e.id, e.host, e.group_name, e.manager_id, e.last_seen_ms,
           c.serial, c.authority, c.issued_ms, c.not_after_ms, c.warned_days,
           CAST(CASE WHEN EXISTS (
             SELECT 1 FROM certificate n
             WHERE n.endpoint_id = c.endpoint_id AND n.revoked_ms IS NULL AND n.used_ms IS NULL
               AND n.issued_ms > c.issued_ms) THEN 1 ELSE 0 END AS BIGINT)
    FROM certificate c JOIN endpoint e ON e.id = c.endpoint_id
    WHERE c.revoked_ms IS NULL AND e.revoked_ms IS NULL
      AND NOT EXISTS (
        SELECT 1 FROM certificate o
        WHERE o.endpoint_id = c.endpoint_id AND o.revoked_ms IS NULL AND o.serial <> c.serial
          AND ((o.used_ms IS NOT NULL AND c.used_ms IS NULL)
            OR (o.used_ms IS NOT NULL AND c.used_ms IS NOT NULL AND o.used_ms > c.used_ms)
            OR (o.used_ms IS NULL AND c.used_ms IS NULL AND o.issued_ms > c.issued_ms)))";

impl Store {
    /// Certificates that end at or before `before_ms`, the first to end first.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn certificates_ending(&self, before_ms: i64) -> Result<Vec<ExpiryRow>, StoreError> {
        let sql = format!("{COUNTING} AND c.not_after_ms <= $1 ORDER BY c.not_after_ms, e.host_key, e.id");
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(before_ms)
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("list the certificates that end"))?;
        rows.iter().map(ExpiryRow::of).collect()
    }

    /// Endpoints whose agent may still come by a certificate of `authority` at `now_ms`, by host name.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn hanging_on(
        &self,
        authority: Sha256,
        now_ms: i64,
    ) -> Result<Vec<ExpiryRow>, StoreError> {
        let sql =
            format!("{COUNTING} AND c.authority = $1 AND c.not_after_ms >= $2 ORDER BY e.host_key, e.id");
        let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(authority.to_string())
            .bind(now_ms.saturating_sub(LATE_MS))
            .fetch_all(self.reader())
            .await
            .map_err(StoreError::query("list the certificates of an authority"))?;
        rows.iter().map(ExpiryRow::of).collect()
    }

    /// Says of certificates from before there could be several authorities that they are the oldest one's.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn attribute_certificates(&self, oldest: Sha256) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE certificate SET authority = $1 WHERE authority IS NULL")
            .bind(oldest.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("attribute certificates"))?;
        Self::commit(tx).await
    }

    /// Records a step of a rotation. What comes from an authority that is `retired` is good for nothing from then on.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn rotated(
        &self,
        action: &'static str,
        authority: Sha256,
        retired: bool,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        let mut cut_off = 0;
        if retired {
            cut_off = sqlx::query(
                "UPDATE certificate SET revoked_ms = $2 WHERE authority = $1 AND revoked_ms IS NULL",
            )
            .bind(authority.to_string())
            .bind(now_ms)
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("revoke an authority's certificates"))?
            .rows_affected();
        }
        let subject = authority.to_string();
        let detail = json!({ "certificates_revoked": cut_off });
        append(&mut tx, Entry { actor: "tm-manager", action, subject: &subject, detail, at_ms: now_ms })
            .await?;
        Self::commit(tx).await
    }

    /// Writes down that a second agent came with the identity of `endpoint` while the first one answered.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn report_conflict(
        &self,
        endpoint: EndpointId,
        boot_id: &str,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let message = format!(
            "a second agent uses the identity of this one, which is connected and answers; the second (boot id {}) is \
             held, and gets no order, until somebody decides about it",
            tm_protocol::text::escape_for_display(boot_id)
        );
        let event = NewEvent {
            endpoint,
            kind: EventKind::Agent,
            status: EventStatus::Unsuccessful,
            detail: "identity-conflict",
            message: &message,
            task: None,
            incident: None,
            at_ms: now_ms,
        };
        let mut tx = self.begin().await?;
        events::append(&mut tx, event).await?;
        Self::commit(tx).await
    }

    /// Endpoints that have a session at `manager` and no certificate that is still good: theirs went with its authority.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn sessions_without_certificate(
        &self,
        manager: ManagerId,
    ) -> Result<Vec<EndpointId>, StoreError> {
        let rows = sqlx::query(
            "SELECT id FROM endpoint WHERE manager_id = $1 AND NOT EXISTS (
                SELECT 1 FROM certificate WHERE endpoint_id = endpoint.id AND revoked_ms IS NULL)",
        )
        .bind(manager.to_string())
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::query("look for sessions without a certificate"))?;
        rows.iter()
            .map(|row| {
                let id: String = row.get(0);
                id.parse().map_err(|_| StoreError::content("endpoint id", id))
            })
            .collect()
    }

    /// Writes the warning of a certificate's end down that is due at `now_ms`, once. `true` if there was one.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn warn_of_end(&self, row: &ExpiryRow, now_ms: i64) -> Result<bool, StoreError> {
        let Some(days) =
            row.warning(now_ms).filter(|days| row.warned_days.is_none_or(|warned| warned > *days))
        else {
            return Ok(false);
        };
        let mut message = ending("its certificate", row.not_after_ms, now_ms);
        message.push_str(if row.connected {
            "; its agent is connected and has not renewed it"
        } else {
            "; its agent is away"
        });
        let mut tx = self.begin().await?;
        let marked = sqlx::query(
            "UPDATE certificate SET warned_days = $2
             WHERE serial = $1 AND (warned_days IS NULL OR warned_days > $2)",
        )
        .bind(row.serial.as_str())
        .bind(days)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("note a warning"))?;
        if marked.rows_affected() == 0 {
            return Ok(false);
        }
        let event = NewEvent {
            endpoint: row.endpoint,
            kind: EventKind::Certificate,
            status: EventStatus::Unsuccessful,
            detail: if days == 30 { "ends-in-30-days" } else { "ends-in-7-days" },
            message: &message,
            task: None,
            incident: None,
            at_ms: now_ms,
        };
        events::append(&mut tx, event).await?;
        Self::commit(tx).await?;
        Ok(true)
    }

    /// Writes the warning of the end of one of the manager's own certificates down that is due at `now_ms`, once.
    /// `true` if there was one.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn warn_of_own_end(&self, own: &Own, now_ms: i64) -> Result<bool, StoreError> {
        let Some(days) = own.warning(now_ms) else { return Ok(false) };
        let key = format!("warned:{}:{}:{}", own.what, own.name, own.end_ms);
        let mut tx = self.begin().await?;
        let warned = sqlx::query("SELECT value FROM meta WHERE key = $1")
            .bind(key.as_str())
            .fetch_optional(&mut *tx)
            .await
            .map_err(StoreError::query("look a warning up"))?
            .and_then(|row| row.get::<String, _>(0).parse::<i64>().ok());
        if warned.is_some_and(|warned| warned <= days) {
            return Ok(false);
        }
        put_meta(&mut tx, &key, &days.to_string()).await?;
        let detail = if days == 30 { "ends-in-30-days" } else { "ends-in-7-days" };
        let message = own.sentence(now_ms);
        events::append_own(&mut tx, EventStatus::Unsuccessful, detail, &message, now_ms).await?;
        Self::commit(tx).await?;
        Ok(true)
    }

    /// Keeps what the manager's own certificates are, for whoever asks.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn keep_own(&self, manager: ManagerId, own: &[Own]) -> Result<(), StoreError> {
        let value = serde_json::to_string(own).unwrap_or_default();
        let mut tx = self.begin().await?;
        put_meta(&mut tx, &format!("own-certificates:{manager}"), &value).await?;
        Self::commit(tx).await
    }

    /// What [`Store::keep_own`] kept.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn own(&self, manager: ManagerId) -> Result<Vec<Own>, StoreError> {
        let row = sqlx::query("SELECT value FROM meta WHERE key = $1")
            .bind(format!("own-certificates:{manager}"))
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::query("read the manager's own certificates"))?;
        let Some(value) = row.map(|row| row.get::<String, _>(0)) else { return Ok(Vec::new()) };
        serde_json::from_str(&value).map_err(|_| StoreError::content("list of certificates", value))
    }
}

impl Own {
    /// Which warning is due: 30 days or 7.
    pub(crate) fn warning(&self, now_ms: i64) -> Option<i64> {
        // A manager renews the one that it shows after a third of its life.
        warning_due(self.begin_ms, self.end_ms, self.what == "manager", now_ms)
    }

    /// When it ends, in a sentence without a full stop.
    pub(crate) fn sentence(&self, now_ms: i64) -> String {
        if self.what == "authority" {
            let name = self.name.get(..12).unwrap_or(&self.name);
            let mut text = ending(&format!("the certificate authority {name}"), self.end_ms, now_ms);
            text.push_str("; rotate it with `tm-manager ca add`");
            text
        } else {
            ending("the manager's own certificate", self.end_ms, now_ms)
        }
    }
}

fn ending(what: &str, end_ms: i64, now_ms: i64) -> String {
    let at = jiff::Timestamp::from_millisecond(end_ms).map(|at| format!("{at:.0}")).unwrap_or_default();
    let mut text = what.to_owned();
    let left = end_ms.saturating_sub(now_ms);
    let _ = match left / DAY_MS {
        _ if left < 0 => write!(text, " has ended on {at}"),
        0 => write!(text, " ends on {at}, in less than a day"),
        days => write!(text, " ends on {at}, in {days} days"),
    };
    text
}

async fn put_meta(tx: &mut super::Tx, key: &str, value: &str) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO meta (key, value) VALUES ($1, $2)
         ON CONFLICT (key) DO UPDATE SET value = excluded.value",
    )
    .bind(key.to_owned())
    .bind(value.to_owned())
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("keep a value"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        certificates::{NewCertificate, enter},
        endpoints::tests::put,
        events::EventFilter,
        tests::scratch,
    };

    #[test]
    fn a_warning_is_due_at_thirty_days_and_at_seven_and_not_for_what_renews_in_time() {
        for (life, left, renews, due) in [
            (90, 31, false, None),
            (90, 30, false, Some(30)),
            (90, 29, true, None),
            (90, 22, true, Some(30)),
            (90, 7, true, Some(7)),
            (90, -5, false, Some(7)),
            (3650, 31, false, None),
            (3650, 30, false, Some(30)),
            (3650, 7, false, Some(7)),
            // Short ones are not warned of all their life.
            (12, 5, false, None),
            (12, 4, false, Some(30)),
            (12, 1, false, Some(7)),
        ] {
            let (begin, end) = (1000 * DAY_MS, (1000 + life) * DAY_MS);
            assert_eq!(warning_due(begin, end, renews, end - left * DAY_MS), due, "{life} {left} {renews}");
        }
        assert_eq!(warning_due(i64::MAX, i64::MIN, true, 0), Some(7), "no panic");
    }

    async fn certify(store: &Store, endpoint: EndpointId, serial: &str, at: i64, end: i64, used: bool) {
        let mut tx = store.begin().await.unwrap();
        let new =
            NewCertificate { serial, not_after_ms: end, authority: Sha256::new([1; 32]), public_key: b"key" };
        enter(&mut tx, endpoint, &new, at).await.unwrap();
        Store::commit(tx).await.unwrap();
        if used {
            store.certificate_used(endpoint, serial, at).await.unwrap();
        }
    }

    #[tokio::test]
    async fn each_end_is_listed_once_and_warned_of_twice() {
        let (store, _folder) = scratch().await;
        let day = |day: i64| day * DAY_MS;
        let away = put(&store, 1, "away", &[], false).await;
        let fresh = put(&store, 2, "fresh", &[], true).await;
        certify(&store, away, "a1", day(0), day(90), true).await;
        certify(&store, fresh, "b1", day(0), day(90), true).await;
        certify(&store, fresh, "b2", day(60), day(150), true).await;
        let serials = async |before: i64| {
            let rows = store.certificates_ending(before).await.unwrap();
            rows.into_iter().map(|row| row.serial).collect::<Vec<_>>()
        };
        assert_eq!(serials(day(89)).await, [""; 0]);
        assert_eq!(serials(day(90)).await, ["a1"]);
        assert_eq!(serials(day(200)).await, ["a1", "b2"]);
        let old = Sha256::new([1; 32]);
        assert_eq!(store.hanging_on(old, day(91)).await.unwrap().len(), 2);
        assert_eq!(store.hanging_on(old, day(121)).await.unwrap().len(), 1, "it is too late for the other");
        assert_eq!(store.hanging_on(Sha256::new([2; 32]), day(91)).await.unwrap(), []);

        for (now, warned) in
            [(59, false), (60, true), (61, false), (82, false), (83, true), (84, false), (91, false)]
        {
            let row = store.certificates_ending(day(90)).await.unwrap().remove(0);
            assert_eq!(store.warn_of_end(&row, day(now)).await.unwrap(), warned, "{now}");
        }
        let events = store.events(&EventFilter::default(), false, 9).await.unwrap();
        let details: Vec<&str> = events.iter().map(|event| event.detail.as_str()).collect();
        assert_eq!(details, ["ends-in-30-days", "ends-in-7-days"]);
        assert!(events[0].message.contains("in 30 days; its agent is away"), "{}", events[0].message);
        let row = store.certificates_ending(day(90)).await.unwrap().remove(0);
        for (now, state) in [
            (59, CertificateState::Good),
            (60, CertificateState::Away),
            (91, CertificateState::Ended),
            (121, CertificateState::NeedsEnrollment),
        ] {
            assert_eq!(row.state(day(now)), state, "{now}");
        }

        // Issued, and its answer was lost: the one before counts.
        certify(&store, away, "a2", day(91), day(181), false).await;
        assert_eq!(serials(day(200)).await, ["a1", "b2"]);

        store.rotated("ca.retire", old, true, day(91)).await.unwrap();
        assert_eq!(serials(day(999)).await, [""; 0]);
        let manager = ManagerId::new(Uuid::from_u128(9));
        assert_eq!(store.sessions_without_certificate(manager).await.unwrap(), []);
    }

    #[tokio::test]
    async fn the_managers_own_certificates_are_warned_of_too() {
        let (store, _folder) = scratch().await;
        let manager = ManagerId::new(Uuid::from_u128(9));
        assert_eq!(store.own(manager).await.unwrap(), []);
        let own = Own {
            what: "authority".to_owned(),
            name: "ab".repeat(32),
            issuing: true,
            begin_ms: 0,
            end_ms: 3650 * DAY_MS,
        };
        for _ in 0..2 {
            store.keep_own(manager, std::slice::from_ref(&own)).await.unwrap();
            assert_eq!(store.own(manager).await.unwrap(), std::slice::from_ref(&own));
        }
        for (day, warned) in [(3619, false), (3620, true), (3621, false), (3643, true), (3644, false)] {
            assert_eq!(store.warn_of_own_end(&own, day * DAY_MS).await.unwrap(), warned, "{day}");
        }
        let events = store.events(&EventFilter::default(), false, 9).await.unwrap();
        assert_eq!(events.len(), 2);
        assert!(events[1].message.contains("authority abababababab ends on"), "{}", events[1].message);
        assert_eq!((events[1].host.as_str(), events[1].endpoint.as_str()), ("manager", ""));
    }
}
