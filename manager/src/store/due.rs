//! What is due for whom, and what is overdue.

use sqlx::Row as _;
use tm_protocol::{
    ids::{EndpointId, TaskId},
    task::TaskSpec,
};

use super::{Store, StoreError, tasks::spec_from_json};

/// A task that its endpoint has not ended.
#[derive(Debug)]
pub(crate) struct DueTask {
    pub(crate) task: TaskId,
    pub(crate) spec: TaskSpec,
    pub(crate) expires_ms: i64,
    pub(crate) deadline_ms: i64,
    pub(crate) issuer: String,
    pub(crate) reason: String,
}

/// Tasks handed to one endpoint in one pass.
const MOST: i64 = 100;
/// How long after every limit a task that nobody ended is given up.
const GRACE_MS: i64 = 600_000;

impl Store {
    /// Tasks of `endpoint` that are not ended, oldest first. One that waits and has expired is not among them.
    pub(crate) async fn due_tasks(
        &self,
        endpoint: EndpointId,
        now_ms: i64,
    ) -> Result<Vec<DueTask>, StoreError> {
        sqlx::query(
            "SELECT id, spec, expires_ms, deadline_ms, issuer, reason FROM task
             WHERE endpoint_id = $1 AND (state IN ('delivered', 'running') OR (state = 'queued' AND expires_ms > $2))
             ORDER BY created_ms, id LIMIT $3",
        )
        .bind(endpoint.to_string())
        .bind(now_ms)
        .bind(MOST)
        .fetch_all(self.reader())
        .await
        .map_err(StoreError::query("find due tasks"))?
        .iter()
        .map(|row| {
            let id: String = row.get(0);
            Ok(DueTask {
                task: id.parse().map_err(|_| StoreError::content("task id", id))?,
                spec: spec_from_json(row.get::<String, _>(1).as_str())?,
                expires_ms: row.get(2),
                deadline_ms: row.get(3),
                issuer: row.get(4),
                reason: row.get(5),
            })
        })
        .collect()
    }

    /// Ends what waited too long and what no agent ended. Returns how many.
    pub(crate) async fn expire_tasks(&self, now_ms: i64) -> Result<u64, StoreError> {
        let mut tx = self.begin().await?;
        let expired = sqlx::query(
            "UPDATE task SET state = 'expired', code = 'expired', finished_ms = $1,
             message = 'the endpoint did not take the task in time' WHERE state = 'queued' AND expires_ms <= $1",
        )
        .bind(now_ms)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("expire tasks"))?;
        let lost = sqlx::query(
            "UPDATE task SET state = 'failed', code = 'timeout', finished_ms = $1,
             message = 'the endpoint did not say how the task ended'
             WHERE state IN ('delivered', 'running') AND expires_ms + deadline_ms + $2 <= $1",
        )
        .bind(now_ms)
        .bind(GRACE_MS)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("give tasks up"))?;
        Self::commit(tx).await?;
        Ok(expired.rows_affected() + lost.rows_affected())
    }
}
