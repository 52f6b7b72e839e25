//! Ends of tasks on their way into the table: on SQLite those of one transaction are written together, because a fleet
//! that was told to scan ends ten thousand of them within a second.
//!
//! **Invariant:** whoever reads tasks in a transaction has its ends written before ([`write`]).

use tm_protocol::{ids::TaskId, report::Failure, task::TaskState};

use super::{PARTS, StoreError, Tx, rows};

/// A task's end as its row will tell it.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) task: TaskId,
    /// Where its row says it is.
    pub(super) stored: TaskState,
    pub(super) state: TaskState,
    pub(super) failure: Option<Failure>,
    /// JSON of what came of it.
    pub(super) result: Option<String>,
    pub(super) started_ms: Option<i64>,
    pub(super) finished_ms: i64,
}

impl Ended {
    /// Writes it; how many rows were there to be changed.
    pub(super) async fn write(self, tx: &mut Tx) -> Result<u64, StoreError> {
        let (code, message) = self.failure.map(|failure| (failure.code, failure.message)).unzip();
        let changed = sqlx::query(
            "UPDATE task SET state = $2, code = $3, message = $4, result = $5, finished_ms = $6,
                started_ms = COALESCE($8, started_ms)
             WHERE id = $1 AND state = $7",
        )
        .bind(self.task.to_string())
        .bind(self.state.word())
        .bind(code)
        .bind(message)
        .bind(self.result)
        .bind(self.finished_ms)
        .bind(self.stored.word())
        .bind(self.started_ms)
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("end a task"))?;
        Ok(changed.rows_affected())
    }
}

/// Writes the ends that were gathered in a transaction, many with one statement.
///
/// # Errors
/// If the database refuses, or a task is not where it was; the whole transaction is then void.
pub(super) async fn write(tx: &mut Tx) -> Result<(), StoreError> {
    let mut ended = std::mem::take(&mut tx.ended);
    for size in PARTS {
        while ended.len() >= size {
            let part: Vec<Ended> = ended.drain(..size).collect();
            write_all(tx, part).await?;
        }
    }
    Ok(())
}

/// The statement for so many ends. Their rows are found by their ids: where the states were compared plainly, SQLite
/// would go through every task there is.
fn end_many(count: usize) -> String {
    format!(
        "WITH ended (task, state, code, message, result, finished_ms, stored, started_ms) AS (VALUES {})
         UPDATE task SET state = ended.state, code = ended.code, message = ended.message, result = ended.result,
            finished_ms = ended.finished_ms, started_ms = COALESCE(ended.started_ms, task.started_ms)
         FROM ended WHERE task.id = ended.task AND COALESCE(task.state, '') = +ended.stored",
        rows(count, 8)
    )
}

async fn write_all(tx: &mut Tx, ended: Vec<Ended>) -> Result<(), StoreError> {
    let count = ended.len();
    let mut query = sqlx::query(tx.engine.listed(end_many(count)));
    for one in ended {
        let (code, message) = one.failure.map(|failure| (failure.code, failure.message)).unzip();
        query = query
            .bind(one.task.to_string())
            .bind(one.state.word())
            .bind(code)
            .bind(message)
            .bind(one.result)
            .bind(one.finished_ms)
            .bind(one.stored.word())
            .bind(one.started_ms);
    }
    let changed = query.execute(&mut **tx).await.map_err(StoreError::query("end tasks"))?.rows_affected();
    if usize::try_from(changed) == Ok(count) {
        Ok(())
    } else {
        // Their rows were read in this transaction, and no other one is.
        Err(StoreError::content("state of tasks that end", format!("{changed} of {count} as they were read")))
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Row as _};

    use super::*;
    use crate::store::{
        Engine,
        tests::{is_sqlite, scratch},
    };

    #[tokio::test]
    async fn however_many_end_their_rows_are_found_by_their_ids() {
        let (store, _folder) = scratch().await;
        if !is_sqlite(&store) {
            return;
        }
        for count in PARTS {
            let sql = format!("EXPLAIN QUERY PLAN {}", Engine::Sqlite.listed(end_many(count)).0);
            let mut query = sqlx::query(AssertSqlSafe(sql));
            for _ in 0..count * 8 {
                query = query.bind("x");
            }
            let plan = query.fetch_all(store.reader()).await.unwrap();
            let steps: Vec<String> = plan.iter().map(|row| row.get(3)).collect();
            let searches =
                steps.iter().any(|step| step.starts_with("SEARCH task") && step.contains("(id=?)"));
            assert!(
                searches && !steps.iter().any(|step| step.starts_with("SCAN task")),
                "{count}: {steps:?}"
            );
        }
    }
}
