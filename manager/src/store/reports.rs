//! What agents report, written down once.
//!
//! **Invariant:** a report's effects and its number are committed together, so that a report that comes
//! again changes nothing.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use sqlx::Row as _;
use tm_protocol::{
    ids::{EndpointId, TaskId},
    message::{Outcome, Report, ReportBody},
    report::{Coverage, Detection, Failure, PathBytes},
    task::TaskState,
};

use super::{StoreError, Tx};

#[derive(Debug, Serialize)]
struct ScanResultRow<'a> {
    verdict: tm_protocol::report::Verdict,
    files: u64,
    bytes: u64,
    detections: u64,
    skipped: BTreeMap<&'static str, u64>,
    samples: Vec<SampleRow<'a>>,
    elapsed_ms: u64,
    cpu_ms: u64,
}

#[derive(Debug, Serialize)]
struct SampleRow<'a> {
    path_b64: String,
    member_b64: Vec<String>,
    reason: &'a str,
}

/// Applies one report, which has been counted in the same transaction.
pub(super) async fn apply(
    tx: &mut Tx,
    endpoint: EndpointId,
    report: &Report,
    now_ms: i64,
) -> Result<(), StoreError> {
    match &report.body {
        ReportBody::Accepted { task } => {
            move_to(tx, endpoint, *task, TaskState::Delivered, None, None, now_ms).await
        }
        ReportBody::Started { task } => {
            move_to(tx, endpoint, *task, TaskState::Running, None, None, now_ms).await
        }
        ReportBody::Refused { task, failure } => {
            move_to(tx, endpoint, *task, TaskState::Refused, Some(failure), None, now_ms).await
        }
        ReportBody::Detections { task, detections } => {
            detect(tx, endpoint, *task, detections, report.at_ms).await
        }
        ReportBody::Items { .. } | ReportBody::Vault { .. } | ReportBody::Lost { .. } => Ok(()),
        ReportBody::Finished { task, outcome } => {
            let (state, failure, coverage) = match outcome {
                Outcome::Scanned(coverage) => (TaskState::Done, None, Some(coverage)),
                Outcome::Treated(_) => (TaskState::Done, None, None),
                Outcome::TreatedUntilCancelled(_) => (TaskState::Cancelled, None, None),
                Outcome::TreatedUntilDeadline(_) => (
                    TaskState::Failed,
                    Some(Failure::new("deadline", "the task took longer than its order allows")),
                    None,
                ),
                Outcome::Failed(failure) => (TaskState::Failed, Some(failure.clone()), None),
                Outcome::Cancelled(coverage) => (TaskState::Cancelled, None, coverage.as_ref()),
                Outcome::Expired => (
                    TaskState::Expired,
                    Some(Failure::new("expired", "the task was not begun in time")),
                    None,
                ),
            };
            let result = coverage.map(result_json).transpose()?;
            move_to(tx, endpoint, *task, state, failure.as_ref(), result, now_ms).await
        }
    }
}

/// Moves a task on, if it is this endpoint's and its state allows it; a stranger's task is left alone.
async fn move_to(
    tx: &mut Tx,
    endpoint: EndpointId,
    task: TaskId,
    next: TaskState,
    failure: Option<&Failure>,
    result: Option<String>,
    now_ms: i64,
) -> Result<(), StoreError> {
    let from: Vec<&str> =
        TaskState::ALL.into_iter().filter(|s| s.may_become(next)).map(TaskState::word).collect();
    let row = sqlx::query("SELECT state FROM task WHERE id = $1 AND endpoint_id = $2")
        .bind(task.to_string())
        .bind(endpoint.to_string())
        .fetch_optional(&mut **tx)
        .await
        .map_err(StoreError::query("look a task up"))?;
    let state: Option<String> = row.map(|row| row.get(0));
    if !state.as_deref().is_some_and(|state| from.contains(&state)) {
        tracing::debug!(%endpoint, %task, next = next.word(), "A report changes nothing.");
        return Ok(());
    }
    let started = (next == TaskState::Running).then_some(now_ms);
    let finished = next.is_final().then_some(now_ms);
    sqlx::query(
        "UPDATE task SET state = $2, code = $3, message = $4, result = $5, started_ms = COALESCE($6, started_ms),
         finished_ms = COALESCE($7, finished_ms) WHERE id = $1",
    )
    .bind(task.to_string())
    .bind(next.word())
    .bind(failure.map(|f| f.code.clone()))
    .bind(failure.map(|f| f.message.clone()))
    .bind(result)
    .bind(started)
    .bind(finished)
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("move a task on"))?;
    Ok(())
}

async fn detect(
    tx: &mut Tx,
    endpoint: EndpointId,
    task: TaskId,
    detections: &[Detection],
    at_ms: i64,
) -> Result<(), StoreError> {
    let row = sqlx::query(
        "SELECT COALESCE(MAX(d.ordinal), 0) FROM task t LEFT JOIN detection d ON d.task_id = t.id
         WHERE t.id = $1 AND t.endpoint_id = $2 GROUP BY t.id",
    )
    .bind(task.to_string())
    .bind(endpoint.to_string())
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("count detections"))?;
    let Some(row) = row else { return Ok(()) };
    let mut ordinal: i64 = row.get(0);
    for detection in detections {
        let stored = sqlx::query(
            "INSERT INTO detection (task_id, ordinal, endpoint_id, path, member, pattern_sha256, rule, sha256, size,
             found_ms, identity) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
             ON CONFLICT (task_id, identity) DO NOTHING",
        )
        .bind(task.to_string())
        .bind(ordinal + 1)
        .bind(endpoint.to_string())
        .bind(detection.path.0.clone())
        .bind(serde_json::json!(names(&detection.member)).to_string())
        .bind(detection.pattern.to_string())
        .bind(detection.rule.as_str())
        .bind(detection.sha256.to_string())
        .bind(i64::try_from(detection.size).unwrap_or(i64::MAX))
        .bind(at_ms)
        .bind(detection.key().to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("store a detection"))?;
        ordinal += i64::try_from(stored.rows_affected()).unwrap_or(0);
    }
    Ok(())
}

fn names(member: &[PathBytes]) -> Vec<String> {
    member.iter().map(|name| STANDARD.encode(&name.0)).collect()
}

fn result_json(coverage: &Coverage) -> Result<String, StoreError> {
    let row = ScanResultRow {
        verdict: coverage.verdict(),
        files: coverage.files,
        bytes: coverage.bytes,
        detections: coverage.detections,
        skipped: coverage.skipped.iter().map(|(reason, count)| (reason.word(), *count)).collect(),
        samples: coverage
            .samples
            .iter()
            .take(Coverage::MAX_SAMPLES)
            .map(|s| SampleRow {
                path_b64: STANDARD.encode(&s.path.0),
                member_b64: names(&s.member),
                reason: s.reason.word(),
            })
            .collect(),
        elapsed_ms: coverage.elapsed_ms,
        cpu_ms: coverage.cpu_ms,
    };
    serde_json::to_string(&row).map_err(|_| StoreError::content("coverage", "unwritable"))
}

#[cfg(test)]
mod tests {
    use tm_protocol::ids::Sha256;

    use super::*;
    use crate::store::{Store, tests::scratch};

    async fn text(store: &Store, sql: &'static str) -> String {
        sqlx::query(sql).fetch_one(store.reader()).await.unwrap().get(0)
    }

    fn reports(task: TaskId, sequences: &[u64]) -> Vec<Report> {
        let found = |path: &[u8]| Detection {
            path: path.into(),
            member: vec![PathBytes(b"m".to_vec())],
            pattern: Sha256::of(b"p"),
            rule: "r".into(),
            sha256: Sha256::of(b"f"),
            size: 1,
        };
        let bodies = [
            ReportBody::Accepted { task },
            ReportBody::Started { task },
            ReportBody::Detections { task, detections: vec![found(b"/a"), found(b"/b")] },
            ReportBody::Detections { task, detections: vec![found(b"/b"), found(b"/c")] },
            ReportBody::Finished {
                task,
                outcome: Outcome::Scanned(Coverage { detections: 3, ..Coverage::default() }),
            },
        ];
        sequences
            .iter()
            .zip(bodies)
            .map(|(sequence, body)| Report { sequence: *sequence, at_ms: 5, body })
            .collect()
    }

    #[tokio::test]
    async fn reports_take_effect_once_and_only_on_the_endpoints_own_tasks() {
        let (store, _folder) = scratch().await;
        let (own, other) =
            (EndpointId::new(uuid::Uuid::from_u128(1)), EndpointId::new(uuid::Uuid::from_u128(2)));
        let task = TaskId::new(uuid::Uuid::from_u128(3));
        let mut tx = store.begin().await.unwrap();
        for endpoint in [own, other] {
            sqlx::query(
                "INSERT INTO endpoint (id, host, host_key, group_name, agent_version, enrolled_ms, token_id,
                 session_epoch, task_kinds, stored_through) VALUES ($1, 'h', 'h', 'g', 'v', 0, 't', 0, '[]', 0)",
            )
            .bind(endpoint.to_string())
            .execute(&mut *tx)
            .await
            .unwrap();
        }
        sqlx::query(
            "INSERT INTO task (id, endpoint_id, kind, spec, state, issuer, reason, created_ms, expires_ms, deadline_ms)
             VALUES ($1, $2, 'scan', '{}', 'queued', 'a', '', 0, 1, 1)",
        )
        .bind(task.to_string())
        .bind(own.to_string())
        .execute(&mut *tx)
        .await
        .unwrap();
        Store::commit(tx).await.unwrap();

        let all =
            |endpoint| reports(task, &[1, 2, 3, 4, 5]).into_iter().map(|r| (endpoint, r)).collect::<Vec<_>>();
        store.record_reports(&all(other), 9).await.unwrap();
        assert_eq!(text(&store, "SELECT state FROM task").await, "queued", "a stranger moves nothing");
        for _ in 0..2 {
            store.record_reports(&all(own), 9).await.unwrap();
        }
        assert_eq!(text(&store, "SELECT state FROM task").await, "done");
        assert_eq!(
            text(&store, "SELECT CAST(COUNT(*) AS TEXT) FROM detection").await,
            "3",
            "each found thing once"
        );
        assert_eq!(text(&store, "SELECT CAST(MAX(ordinal) AS TEXT) FROM detection").await, "3");
    }
}
