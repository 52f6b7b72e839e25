//! The managers of this database: who of them lives, and whose are the sessions.
//!
//! A manager that lives counts its beat up; one whose beat another sees stand still for long is given up by that
//! other, which takes nothing of it but the claim that endpoints are connected there. Nothing else belongs to a
//! manager: orders, reports and their numbers are the endpoints'.
//!
//! **Invariant:** an endpoint is connected where its row says, in the session that its row counts: what a manager
//! that was given up wrongly still holds, it holds only if no newer session has begun elsewhere.

use sqlx::{Row as _, any::AnyRow};
use tm_protocol::{
    address::Address,
    ids::{EndpointId, FleetId, ManagerId},
};

use super::{Store, StoreError, Tx, schema::is_no_table, tasks::json};

/// A manager as the others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ManagerRow {
    pub(crate) id: ManagerId,
    pub(crate) addresses: Vec<Address>,
    pub(crate) beat: i64,
    pub(crate) is_up: bool,
    /// Its last beat by its own clock, in milliseconds since 1970.
    pub(crate) seen_ms: i64,
}

impl Store {
    /// Says that this database is `fleet`'s, if nobody has said anything yet; whether it is.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn claim_fleet(&self, fleet: FleetId) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("INSERT INTO meta (key, value) VALUES ('fleet', $1) ON CONFLICT (key) DO NOTHING")
            .bind(fleet.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("note the fleet"))?;
        Self::commit(tx).await?;
        Ok(self.fleet().await?.as_deref() == Some(fleet.to_string().as_str()))
    }

    /// Whose this database is; `None` as long as no manager has served from it.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn fleet(&self) -> Result<Option<String>, StoreError> {
        let row = sqlx::query("SELECT value FROM meta WHERE key = 'fleet'")
            .fetch_optional(self.reader())
            .await
            .map_err(StoreError::query("ask whose the database is"))?;
        Ok(row.map(|row| row.get(0)))
    }

    /// A manager begins: it is up, and nobody is connected to it.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn enter_manager(
        &self,
        manager: ManagerId,
        addresses: &[Address],
        now_ms: i64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        up(&mut tx, manager, addresses, now_ms).await?;
        disconnect(&mut tx, manager).await?;
        Self::commit(tx).await
    }

    /// Counts a manager's beat; `false` if it is not up: the others have given it up.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn beat(&self, manager: ManagerId, now_ms: i64) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let counted =
            sqlx::query("UPDATE manager SET beat = beat + 1, seen_ms = $2 WHERE id = $1 AND is_up = 1")
                .bind(manager.to_string())
                .bind(now_ms)
                .execute(&mut *tx)
                .await
                .map_err(StoreError::query("say that this manager lives"))?;
        Self::commit(tx).await?;
        Ok(counted.rows_affected() > 0)
    }

    /// A manager that was given up and lives is up again, and so are those of its sessions that are still the newest
    /// of their endpoints; the endpoints of the others, which it has to end.
    ///
    /// # Errors
    /// If the database refuses; nothing is then changed.
    pub(crate) async fn reenter_manager(
        &self,
        manager: ManagerId,
        addresses: &[Address],
        sessions: &[(EndpointId, i64)],
        now_ms: i64,
    ) -> Result<Vec<EndpointId>, StoreError> {
        let mut sessions = sessions.to_vec();
        sessions.sort_unstable();
        let mut tx = self.begin().await?;
        up(&mut tx, manager, addresses, now_ms).await?;
        let mut lost = Vec::new();
        for (endpoint, epoch) in sessions {
            let kept =
                sqlx::query("UPDATE endpoint SET manager_id = $3 WHERE id = $1 AND session_epoch = $2")
                    .bind(endpoint.to_string())
                    .bind(epoch)
                    .bind(manager.to_string())
                    .execute(&mut *tx)
                    .await
                    .map_err(StoreError::query("take a session up again"))?;
            if kept.rows_affected() == 0 {
                lost.push(endpoint);
            }
        }
        Self::commit(tx).await?;
        Ok(lost)
    }

    /// Every manager that has ever served from this database.
    ///
    /// # Errors
    /// If the database cannot be read or holds a manager that is not one.
    pub(crate) async fn managers(&self) -> Result<Vec<ManagerRow>, StoreError> {
        let rows = self.manager_rows().await.map_err(StoreError::query("list the managers"))?;
        rows.iter()
            .map(|row| {
                let id: String = row.get(0);
                Ok(ManagerRow {
                    id: id.parse().map_err(|_| StoreError::content("manager id", id))?,
                    addresses: json("addresses", &row.get::<String, _>(1))?,
                    beat: row.get(2),
                    is_up: row.get::<i64, _>(3) != 0,
                    seen_ms: row.get(4),
                })
            })
            .collect()
    }

    /// The same, where the database's schema may be one in which managers did not know of each other.
    ///
    /// # Errors
    /// As [`Store::managers`].
    pub(crate) async fn managers_of_any_schema(&self) -> Result<Vec<ManagerRow>, StoreError> {
        match self.manager_rows().await {
            Err(error) if is_no_table(&error) => Ok(Vec::new()),
            Err(error) => Err(StoreError::query("list the managers")(error)),
            Ok(_) => self.managers().await,
        }
    }

    async fn manager_rows(&self) -> Result<Vec<AnyRow>, sqlx::Error> {
        sqlx::query("SELECT id, addresses, beat, is_up, seen_ms FROM manager ORDER BY id")
            .fetch_all(self.reader())
            .await
    }

    /// Gives a manager up whose beat has stood at `beat`: nobody is connected to it. `false`, and nothing done, if it
    /// lives after all or another was quicker.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn give_manager_up(&self, manager: ManagerId, beat: i64) -> Result<bool, StoreError> {
        let mut tx = self.begin().await?;
        let given_up = sqlx::query("UPDATE manager SET is_up = 0 WHERE id = $1 AND beat = $2 AND is_up = 1")
            .bind(manager.to_string())
            .bind(beat)
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("give a manager up"))?;
        if given_up.rows_affected() == 0 {
            return Ok(false);
        }
        disconnect(&mut tx, manager).await?;
        Self::commit(tx).await?;
        Ok(true)
    }

    /// A manager ends in order.
    ///
    /// # Errors
    /// If the database refuses; the others then give it up by themselves.
    pub(crate) async fn leave_manager(&self, manager: ManagerId) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("UPDATE manager SET is_up = 0 WHERE id = $1")
            .bind(manager.to_string())
            .execute(&mut *tx)
            .await
            .map_err(StoreError::query("say that this manager ends"))?;
        disconnect(&mut tx, manager).await?;
        Self::commit(tx).await
    }

    /// The other manager that holds an endpoint's session and is up, if one does.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn held_elsewhere(
        &self,
        endpoint: EndpointId,
        here: ManagerId,
    ) -> Result<bool, StoreError> {
        let row = sqlx::query(
            "SELECT 1 FROM endpoint JOIN manager ON manager.id = endpoint.manager_id
             WHERE endpoint.id = $1 AND manager.id <> $2 AND manager.is_up = 1",
        )
        .bind(endpoint.to_string())
        .bind(here.to_string())
        .fetch_optional(self.reader())
        .await
        .map_err(StoreError::query("look where an endpoint is connected"))?;
        Ok(row.is_some())
    }
}

async fn up(tx: &mut Tx, manager: ManagerId, addresses: &[Address], now_ms: i64) -> Result<(), StoreError> {
    let addresses = serde_json::to_string(addresses).expect("addresses are plain data");
    sqlx::query(
        "INSERT INTO manager (id, addresses, beat, is_up, seen_ms) VALUES ($1, $2, 1, 1, $3)
         ON CONFLICT (id) DO UPDATE SET addresses = excluded.addresses, beat = manager.beat + 1, is_up = 1,
            seen_ms = excluded.seen_ms",
    )
    .bind(manager.to_string())
    .bind(addresses)
    .bind(now_ms)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("note that a manager is up"))?;
    Ok(())
}

async fn disconnect(tx: &mut Tx, manager: ManagerId) -> Result<(), StoreError> {
    sqlx::query("UPDATE endpoint SET manager_id = NULL WHERE manager_id = $1")
        .bind(manager.to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("note that nobody is connected to a manager"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        streams::tests::{endpoint, hello},
        tests::scratch,
    };

    fn id(n: u128) -> ManagerId {
        ManagerId::new(Uuid::from_u128(n))
    }

    async fn connected(store: &Store, endpoint: EndpointId) -> bool {
        store.endpoint(endpoint).await.unwrap().unwrap().connected
    }

    #[tokio::test]
    async fn a_manager_that_is_given_up_loses_its_sessions_and_gets_back_those_that_are_still_its_own() {
        let (store, _folder) = scratch().await;
        let at: Address = "a.example:1".parse().unwrap();
        for n in [1, 2] {
            store.enter_manager(id(n), std::slice::from_ref(&at), 5).await.unwrap();
        }
        let (one, two) = (endpoint(&store, 1).await, endpoint(&store, 2).await);
        let first = store.open_session(one, id(1), &hello(1), 1).await.unwrap();
        let second = store.open_session(two, id(1), &hello(1), 1).await.unwrap();
        assert!(store.held_elsewhere(one, id(2)).await.unwrap());
        assert!(!store.held_elsewhere(one, id(1)).await.unwrap());

        let rows = store.managers().await.unwrap();
        assert_eq!((rows.len(), rows[0].is_up, rows[0].addresses.clone()), (2, true, vec![at.clone()]));
        assert!(store.beat(id(1), 6).await.unwrap());
        assert!(!store.give_manager_up(id(1), rows[0].beat).await.unwrap(), "it has beaten since");
        assert!(connected(&store, one).await);
        let beat = store.managers().await.unwrap()[0].beat;
        assert!(store.give_manager_up(id(1), beat).await.unwrap());
        assert!(!store.give_manager_up(id(1), beat).await.unwrap(), "once");
        assert!(!connected(&store, one).await && !store.held_elsewhere(one, id(2)).await.unwrap());

        // One agent goes elsewhere; then the first manager wakes up.
        store.open_session(two, id(2), &hello(1), 7).await.unwrap();
        assert!(!store.beat(id(1), 8).await.unwrap(), "it is told");
        let sessions = [(two, second.epoch), (one, first.epoch)];
        let lost = store.reenter_manager(id(1), &[at], &sessions, 9).await.unwrap();
        assert_eq!(lost, [two]);
        assert!(connected(&store, one).await && store.beat(id(1), 10).await.unwrap());
        assert!(store.held_elsewhere(two, id(1)).await.unwrap());

        store.leave_manager(id(1)).await.unwrap();
        assert!(!connected(&store, one).await && connected(&store, two).await);
    }

    #[tokio::test]
    async fn a_database_belongs_to_the_fleet_that_came_first() {
        let (store, _folder) = scratch().await;
        let fleet = |n| FleetId::new(Uuid::from_u128(n));
        assert_eq!(store.fleet().await.unwrap(), None);
        assert!(store.claim_fleet(fleet(1)).await.unwrap());
        assert!(!store.claim_fleet(fleet(2)).await.unwrap());
        assert!(store.claim_fleet(fleet(1)).await.unwrap());
    }
}
