//! Calling tasks off.
//!
//! **Invariant:** a task that was never marked as sent ends at once; of any other its agent has the last word.

use serde_json::json;
use sqlx::Row as _;
use tm_protocol::{ids::TaskId, task::TaskState};

use super::{
    Store, StoreError,
    audit::{self, Entry},
    outcomes::{self, End},
    tasks::TaskRow,
};

/// What calling a task off came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cancelled {
    /// It is called off, now or before: it has ended so, or its agent is being told.
    Yes(Box<TaskRow>),
    /// It had ended otherwise.
    Ended(Box<TaskRow>),
    /// There is no such task.
    Unknown,
}

impl Store {
    /// Calls a task off. A task that is called off already stays so, and nothing is recorded again.
    ///
    /// # Errors
    /// If the database refuses; nothing is then called off.
    pub(crate) async fn cancel_task(
        &self,
        id: TaskId,
        actor: &str,
        now_ms: i64,
    ) -> Result<Cancelled, StoreError> {
        let Some(known) = self.task(id).await? else { return Ok(Cancelled::Unknown) };
        let mut tx = self.begin_audited().await?;
        outcomes::lock(&mut tx, known.endpoint).await?;
        let marked = sqlx::query(
            "UPDATE task SET cancel_ms = $2
             WHERE id = $1 AND cancel_ms IS NULL AND state IN ('queued', 'delivered', 'running')",
        )
        .bind(id.to_string())
        .bind(now_ms)
        .execute(&mut *tx)
        .await
        .map_err(StoreError::query("call a task off"))?;
        if marked.rows_affected() > 0 {
            let sent: Option<i64> = sqlx::query("SELECT sent_ms FROM task WHERE id = $1")
                .bind(id.to_string())
                .fetch_one(&mut *tx)
                .await
                .map_err(StoreError::query("look whether a task was sent"))?
                .get(0);
            let head = outcomes::head(&mut tx, known.endpoint, id).await?;
            if let Some(head) = head
                && head.state == TaskState::Queued
                && sent.is_none()
            {
                outcomes::conclude(&mut tx, &head, End::cancelled(), now_ms).await?;
            }
            let entry = Entry {
                actor,
                action: "task.cancel",
                subject: &id.to_string(),
                detail: json!({
                    "endpoint": known.endpoint.to_string(),
                    "host": known.host,
                    "kind": known.kind,
                    "sent": sent.is_some(),
                }),
                at_ms: now_ms,
            };
            audit::append(&mut tx, entry).await?;
        }
        Self::commit(tx).await?;
        let Some(row) = self.task(id).await? else { return Ok(Cancelled::Unknown) };
        let row = Box::new(row);
        Ok(if row.state.is_final() && row.state != TaskState::Cancelled && marked.rows_affected() == 0 {
            Cancelled::Ended(row)
        } else {
            Cancelled::Yes(row)
        })
    }
}
