//! Whether the database answers, and what is counted in it for whoever watches the fleet.

use sqlx::Row as _;
use tm_protocol::task::TaskState;

use super::{Store, StoreError, schema::Version};

/// Counts at one moment, of the whole fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Figures {
    /// Every state once.
    pub(crate) tasks: Vec<(TaskState, i64)>,
    pub(crate) endpoints: i64,
    pub(crate) incidents_open: i64,
}

impl Store {
    /// Whether the database has this program's schema.
    ///
    /// # Errors
    /// If it does not answer.
    pub(crate) async fn is_current(&self) -> Result<bool, StoreError> {
        let row = sqlx::query("SELECT MAX(version) FROM _sqlx_migrations WHERE success")
            .fetch_one(self.reader())
            .await
            .map_err(StoreError::query("ask whether the database answers"))?;
        Ok(row.get::<Option<i64>, _>(0) == Some(Version::of_this_program().number))
    }

    /// Counts. Every part has an index that it is counted by.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn figures(&self) -> Result<Figures, StoreError> {
        let failed = || StoreError::query("count what the metrics show");
        let rows = sqlx::query("SELECT state, COUNT(*) FROM task GROUP BY state")
            .fetch_all(self.reader())
            .await
            .map_err(failed())?;
        let mut tasks: Vec<(TaskState, i64)> = TaskState::ALL.map(|state| (state, 0)).into();
        for row in rows {
            let word: String = row.get(0);
            let state = TaskState::from_word(&word).ok_or_else(|| StoreError::content("task state", word))?;
            if let Some(entry) = tasks.iter_mut().find(|(known, _)| *known == state) {
                entry.1 = row.get(1);
            }
        }
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM endpoint),
                (SELECT COUNT(*) FROM incident WHERE state IN ('awaiting-cleanup', 'cleaning', 'unresolved'))",
        )
        .fetch_one(self.reader())
        .await
        .map_err(failed())?;
        Ok(Figures { tasks, endpoints: row.get(0), incidents_open: row.get(1) })
    }

    /// Connections in use and idle ones.
    pub(crate) fn connections(&self) -> (usize, usize) {
        let count = |pool: &sqlx::AnyPool| (usize::try_from(pool.size()).unwrap_or(0), pool.num_idle());
        let (mut size, mut idle) = count(&self.write);
        if self.engine == super::Engine::Sqlite {
            let (more, more_idle) = count(&self.read);
            (size, idle) = (size + more, idle + more_idle);
        }
        (size.saturating_sub(idle), idle)
    }
}

#[cfg(test)]
mod tests {
    use crate::store::{endpoints::tests::put, streams::tests::run, tests::scratch};

    #[tokio::test]
    async fn what_is_there_is_counted_and_an_older_schema_is_seen() {
        let (store, _folder) = scratch().await;
        assert!(store.is_current().await.unwrap());
        let figures = store.figures().await.unwrap();
        assert_eq!((figures.endpoints, figures.incidents_open, figures.tasks.len()), (0, 0, 8));
        put(&store, 1, "web-07", &[], true).await;
        assert_eq!(store.figures().await.unwrap().endpoints, 1);
        let (used, idle) = store.connections();
        assert!(used + idle > 0);
        run(&store, "UPDATE _sqlx_migrations SET success = FALSE WHERE version > 1").await;
        assert!(!store.is_current().await.unwrap());
        run(&store, "DROP TABLE _sqlx_migrations").await;
        assert!(store.is_current().await.is_err());
    }
}
