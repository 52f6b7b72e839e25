//! How far each exporter is with the Threat Event Log, and which manager exports.
//!
//! An exporter is held by one manager: by one that is up, until it lets go or is given up (see `managers`).
//!
//! **Invariant:** only the holder moves the mark, and only from where it was when it read on from there: a manager
//! that was given up and wakes moves nothing.
//! **Invariant:** the mark is moved after the receiver has the events, so that each event is sent at least once.

use sqlx::Row as _;
use tm_protocol::ids::ManagerId;

use super::{Store, StoreError, agent_text};

/// Longest error that is kept, in bytes.
const MAX_ERROR: usize = 512;

/// An exporter, as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExporterRow {
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) receiver: String,
    /// Number of the last event that the receiver has, or that is not for it.
    pub(crate) done: i64,
    /// Number of the last event that the receiver has.
    pub(crate) sent_event: Option<i64>,
    pub(crate) sent_ms: Option<i64>,
    pub(crate) error: Option<String>,
    pub(crate) failing_ms: Option<i64>,
    pub(crate) holder: Option<String>,
    /// Events after the mark, whether they are for this exporter or not (numbers have no gaps).
    pub(crate) lag_events: i64,
    /// When the first of them was written, in milliseconds since 1970.
    pub(crate) waiting_since_ms: Option<i64>,
}

impl Store {
    /// Enters an exporter that a configuration names. A new one begins with the next event; one that is known goes on.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn enter_exporter(
        &self,
        name: &str,
        kind: &str,
        receiver: &str,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query(
            "INSERT INTO exporter (name, kind, receiver, done)
             SELECT $1, $2, $3, value FROM counter WHERE name = 'event'
             ON CONFLICT (name) DO UPDATE SET kind = excluded.kind, receiver = excluded.receiver",
        )
        .bind(name.to_owned())
        .bind(kind.to_owned())
        .bind(receiver.to_owned())
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("enter an exporter"))?;
        Self::commit(tx).await
    }

    /// A manager holds no exporter any more.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn release_exporters(&self, manager: ManagerId) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE exporter SET holder = NULL WHERE holder = $1")
            .bind(manager.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("release exporters"))?;
        Self::commit(tx).await
    }

    /// Takes an exporter, if no other manager that is up holds it; the number of the last event that is done.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn hold_exporter(
        &self,
        name: &str,
        manager: ManagerId,
    ) -> Result<Option<i64>, StoreError> {
        let failed = || StoreError::query("hold an exporter");
        // Most often it is held already: nothing is written then.
        let row = sqlx::query(
            "SELECT done, holder, (SELECT is_up FROM manager WHERE manager.id = exporter.holder)
             FROM exporter WHERE name = $1",
        )
        .bind(name.to_owned())
        .fetch_optional(self.reader())
        .await
        .map_err(failed())?;
        let Some(row) = row else { return Ok(None) };
        let (done, holder): (i64, Option<String>) = (row.get(0), row.get(1));
        match holder {
            Some(holder) if holder == manager.to_string() => return Ok(Some(done)),
            Some(_) if row.get::<Option<i64>, _>(2) == Some(1) => return Ok(None),
            Some(_) | None => {}
        }
        let mut tx = self.begin().await?;
        let taken = sqlx::query(
            "UPDATE exporter SET holder = $2 WHERE name = $1 AND NOT EXISTS
                (SELECT 1 FROM manager WHERE manager.id = exporter.holder AND manager.is_up = 1 AND manager.id <> $3)
             RETURNING done",
        )
        .bind(name.to_owned())
        .bind(manager.to_string())
        .bind(manager.to_string())
        .fetch_optional(&mut *tx)
        .await
        .map_err(failed())?;
        Self::commit(tx).await?;
        Ok(taken.map(|row| row.get(0)))
    }

    /// Moves an exporter's mark from `from` to `to`; with `sent`, the last event that its receiver took just now.
    /// `false`, and nothing done, if this manager does not hold it there.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn advance_exporter(
        &self,
        name: &str,
        manager: ManagerId,
        (from, to): (i64, i64),
        sent: Option<i64>,
        now_ms: i64,
    ) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let moved = sqlx::query(
            "UPDATE exporter SET done = $1, sent_event = COALESCE($2, sent_event),
                sent_ms = CASE WHEN $3 = 1 THEN $4 ELSE sent_ms END, error = NULL, failing_ms = NULL
             WHERE name = $5 AND holder = $6 AND done = $7",
        )
        .bind(to)
        .bind(sent)
        .bind(i64::from(sent.is_some()))
        .bind(now_ms)
        .bind(name.to_owned())
        .bind(manager.to_string())
        .bind(from)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("move an exporter's mark"))?;
        Self::commit(tx).await?;
        Ok(moved.rows_affected() > 0)
    }

    /// Notes why an exporter does not go on, and lets go of it: another manager may have more luck.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn exporter_failed(
        &self,
        name: &str,
        manager: ManagerId,
        error: &str,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query(
            "UPDATE exporter SET error = $1, failing_ms = COALESCE(failing_ms, $2), holder = NULL
             WHERE name = $3 AND holder = $4",
        )
        .bind(agent_text(error, MAX_ERROR))
        .bind(now_ms)
        .bind(name.to_owned())
        .bind(manager.to_string())
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("note that an exporter fails"))?;
        Self::commit(tx).await
    }

    /// Every exporter that was ever configured, by name.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn exporters(&self) -> Result<Vec<ExporterRow>, StoreError> {
        let rows = sqlx::query(
            "SELECT name, kind, receiver, done, sent_event, sent_ms, error, failing_ms, holder,
                (SELECT value FROM counter WHERE counter.name = 'event') - done,
                (SELECT at_ms FROM event WHERE event.id > exporter.done ORDER BY event.id LIMIT 1)
             FROM exporter ORDER BY name",
        )
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::query("list the exporters"))?;
        Ok(rows
            .iter()
            .map(|row| ExporterRow {
                name: row.get(0),
                kind: row.get(1),
                receiver: row.get(2),
                done: row.get(3),
                sent_event: row.get(4),
                sent_ms: row.get(5),
                error: row.get(6),
                failing_ms: row.get(7),
                holder: row.get(8),
                lag_events: row.get(9),
                waiting_since_ms: row.get(10),
            })
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use tm_api::event::{EventKind, EventStatus};
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        endpoints::tests::put,
        events::{self, NewEvent},
        tests::scratch,
    };

    fn id(n: u128) -> ManagerId {
        ManagerId::new(Uuid::from_u128(n))
    }

    async fn happen(store: &Store, endpoint: tm_protocol::ids::EndpointId, at_ms: i64) {
        let mut tx = store.begin().await.unwrap();
        let event = NewEvent {
            endpoint,
            kind: EventKind::Agent,
            status: EventStatus::Noted,
            detail: "",
            message: "it happened",
            task: None,
            incident: None,
            at_ms,
        };
        events::append(&mut tx, event).await.unwrap();
        Store::commit(tx).await.unwrap();
    }

    #[tokio::test]
    async fn one_manager_exports_and_another_goes_on_when_it_is_gone() {
        let (store, _folder) = scratch().await;
        let endpoint = put(&store, 1, "web-07", &[], true).await;
        for n in [1, 2] {
            store.enter_manager(id(n), &[], 1).await.unwrap();
        }
        happen(&store, endpoint, 10).await;
        assert_eq!(store.hold_exporter("siem", id(1)).await.unwrap(), None, "there is none");
        store.enter_exporter("siem", "syslog", "a:1").await.unwrap();
        let begin = store.hold_exporter("siem", id(1)).await.unwrap().expect("it is free");
        assert_eq!(store.exporters().await.unwrap()[0].lag_events, 0, "it begins with the next event");
        happen(&store, endpoint, 20).await;
        happen(&store, endpoint, 30).await;
        let row = store.exporters().await.unwrap().remove(0);
        assert_eq!((row.lag_events, row.waiting_since_ms, row.sent_event), (2, Some(20), None));

        assert_eq!(store.hold_exporter("siem", id(2)).await.unwrap(), None, "it is the other's");
        assert_eq!(store.hold_exporter("siem", id(1)).await.unwrap(), Some(begin), "it stays its own");
        assert!(
            !store.advance_exporter("siem", id(2), (begin, begin + 1), Some(begin + 1), 5).await.unwrap()
        );
        assert!(store.advance_exporter("siem", id(1), (begin, begin + 1), Some(begin + 1), 5).await.unwrap());
        assert!(
            !store.advance_exporter("siem", id(1), (begin, begin + 2), None, 6).await.unwrap(),
            "from there"
        );

        // The first is given up, the second goes on, the first wakes.
        store.leave_manager(id(1)).await.unwrap();
        assert_eq!(store.hold_exporter("siem", id(2)).await.unwrap(), Some(begin + 1));
        assert!(!store.advance_exporter("siem", id(1), (begin + 1, begin + 2), None, 7).await.unwrap());
        store.exporter_failed("siem", id(1), "not its business", 8).await.unwrap();
        assert!(store.advance_exporter("siem", id(2), (begin + 1, begin + 2), None, 9).await.unwrap());
        let row = store.exporters().await.unwrap().remove(0);
        let holder = Some(id(2).to_string());
        assert_eq!(
            (row.done, row.sent_event, row.sent_ms, row.holder),
            (begin + 2, Some(begin + 1), Some(5), holder)
        );
        assert_eq!((row.error, row.lag_events, row.waiting_since_ms), (None, 0, None));

        // One that fails lets go; a new configuration of the same name goes on where the old one was.
        store.exporter_failed("siem", id(2), &"é\0".repeat(600), 10).await.unwrap();
        store.enter_exporter("siem", "webhook", "b:2").await.unwrap();
        store.enter_manager(id(1), &[], 11).await.unwrap();
        assert_eq!(store.hold_exporter("siem", id(1)).await.unwrap(), Some(begin + 2));
        store.exporter_failed("siem", id(1), "again", 12).await.unwrap();
        let row = store.exporters().await.unwrap().remove(0);
        assert_eq!((row.kind.as_str(), row.receiver.as_str(), row.failing_ms), ("webhook", "b:2", Some(10)));
        assert_eq!((row.error.as_deref(), row.holder), (Some("again"), None));
        store.hold_exporter("siem", id(1)).await.unwrap().expect("it is free");
        store.release_exporters(id(1)).await.unwrap();
        assert!(store.hold_exporter("siem", id(2)).await.unwrap().is_some());
    }
}
