//! What agents report, written down once. What a task's end means is `outcomes`, finds are `detections`, items
//! `items`.
//!
//! **Invariant:** a report's effects are in the transaction that counts it (`streams`), so that a report that
//! comes again changes nothing.

use std::collections::{BTreeSet, HashMap};

use tm_api::event::{EventKind, EventStatus};
use tm_protocol::{
    ids::{EndpointId, TaskId},
    message::{Report, ReportBody},
    task::{TaskKind, TaskState},
};

use super::{
    StoreError, Tx, agent_failure, brake, detections, ends,
    events::{self, NewEvent},
    items,
    outcomes::{self, End, Head},
    streams::{HandedIn, Parcel},
    vault,
};

/// The task that reports were last about. What they say of its state is written once, before anything else of it is
/// read or written: an agent that accepts, starts and ends a task in one go costs one change of its row.
#[derive(Debug, Default)]
pub(super) struct Last {
    head: Option<Head>,
    /// Tasks that were looked up together; each is as it was then until it is taken from here.
    read: HashMap<TaskId, Head>,
}

impl Last {
    /// Looks up at once what `parcels` say how far tasks are. Whoever calls holds the endpoints' rows, so that what is
    /// read stays true. Of a parcel that says more, tasks are looked up one by one, because it may change them.
    ///
    /// # Errors
    /// If the database refuses or holds a task that is not one.
    pub(super) async fn read<'p>(
        tx: &mut Tx,
        parcels: impl Iterator<Item = &'p Parcel>,
    ) -> Result<Self, StoreError> {
        let mut tasks = BTreeSet::new();
        for parcel in parcels {
            let named: Option<Vec<TaskId>> = parcel.items.iter().map(progress_of).collect();
            tasks.extend(named.unwrap_or_default());
        }
        let tasks: Vec<TaskId> = tasks.into_iter().collect();
        let heads = outcomes::heads(tx, &tasks).await?;
        Ok(Self { head: None, read: heads.into_iter().map(|head| (head.id, head)).collect() })
    }

    /// Writes down what is not written yet.
    ///
    /// # Errors
    /// If the database refuses.
    pub(super) async fn settle(&mut self, tx: &mut Tx) -> Result<(), StoreError> {
        match self.head.take() {
            Some(mut head) => outcomes::settle(tx, &mut head).await,
            None => Ok(()),
        }
    }

    /// The task, if it is `endpoint`'s.
    async fn of(
        &mut self,
        tx: &mut Tx,
        endpoint: EndpointId,
        task: TaskId,
    ) -> Result<Option<&mut Head>, StoreError> {
        if self.head.as_ref().is_none_or(|head| head.id != task || head.endpoint != endpoint) {
            self.settle(tx).await?;
            self.head = match self.read.remove(&task) {
                Some(head) => Some(head).filter(|head| head.endpoint == endpoint),
                None => outcomes::head(tx, endpoint, task).await?,
            };
        }
        Ok(self.head.as_mut())
    }

    /// Moves a task on to a state that is not its last, if it is this endpoint's and its state allows it; a
    /// stranger's task is left alone.
    async fn move_to(
        &mut self,
        tx: &mut Tx,
        endpoint: EndpointId,
        task: TaskId,
        next: TaskState,
        now_ms: i64,
    ) -> Result<(), StoreError> {
        if !self.of(tx, endpoint, task).await?.is_some_and(|head| head.move_to(next, now_ms)) {
            tracing::debug!(%endpoint, %task, next = next.word(), "A report changes nothing.");
        }
        Ok(())
    }
}

/// The task of which an item says how far it is, and nothing else.
fn progress_of(item: &HandedIn) -> Option<TaskId> {
    let HandedIn::Report(report) = item else { return None };
    match &report.body {
        ReportBody::Accepted { task } | ReportBody::Started { task } | ReportBody::Finished { task, .. } => {
            Some(*task)
        }
        ReportBody::Refused { .. }
        | ReportBody::Detections { .. }
        | ReportBody::Items { .. }
        | ReportBody::Vault { .. }
        | ReportBody::Lost { .. }
        | ReportBody::Owned { .. } => None,
    }
}

/// Applies one report, which has been counted in the same transaction. Of one scan, `most_detections` are stored.
/// Whoever calls has `last` settled before the transaction ends.
pub(super) async fn apply(
    tx: &mut Tx,
    last: &mut Last,
    endpoint: EndpointId,
    report: &Report,
    most_detections: i64,
    now_ms: i64,
) -> Result<(), StoreError> {
    match &report.body {
        ReportBody::Accepted { task } => {
            last.move_to(tx, endpoint, *task, TaskState::Delivered, now_ms).await
        }
        ReportBody::Started { task } => last.move_to(tx, endpoint, *task, TaskState::Running, now_ms).await,
        ReportBody::Finished { task, outcome } => {
            let Some(head) = last.of(tx, endpoint, *task).await? else { return Ok(()) };
            match head.kind {
                TaskKind::Scan => {}
                // Their incidents are moved with them, which look at the row.
                TaskKind::Cleanup | TaskKind::Restore => outcomes::settle(tx, head).await?,
            }
            if outcomes::conclude(tx, head, End::of(outcome, head), now_ms).await? {
                // Its row says more than is known of it here.
                last.head = None;
            }
            Ok(())
        }
        ReportBody::Refused { .. }
        | ReportBody::Detections { .. }
        | ReportBody::Items { .. }
        | ReportBody::Vault { .. }
        | ReportBody::Lost { .. }
        | ReportBody::Owned { .. } => {
            last.settle(tx).await?;
            apply_alone(tx, endpoint, report, most_detections, now_ms).await
        }
    }
}

/// Applies a report that says more than how far a task is.
async fn apply_alone(
    tx: &mut Tx,
    endpoint: EndpointId,
    report: &Report,
    most_detections: i64,
    now_ms: i64,
) -> Result<(), StoreError> {
    ends::write(tx).await?;
    match &report.body {
        // How far a task is: applied by the caller.
        ReportBody::Accepted { .. } | ReportBody::Started { .. } | ReportBody::Finished { .. } => Ok(()),
        ReportBody::Refused { task, failure } => {
            let Some(head) = outcomes::head(tx, endpoint, *task).await? else { return Ok(()) };
            outcomes::conclude(tx, &head, End::refused(agent_failure(failure)), now_ms).await?;
            Ok(())
        }
        ReportBody::Detections { task, detections } => {
            let found = detections::Found { detections, at_ms: report.at_ms, most: most_detections };
            detections::record(tx, endpoint, *task, found, now_ms).await
        }
        ReportBody::Items { task, items } => {
            items::record(tx, endpoint, *task, items, report.at_ms, now_ms).await
        }
        ReportBody::Vault { first, items } => vault::record(tx, endpoint, *first, items).await,
        ReportBody::Owned { task, files } => brake::owned(tx, endpoint, *task, files, now_ms).await,
        ReportBody::Lost { count } => {
            let message = format!(
                "{} lost on the endpoint, because its journal was damaged",
                match count.saturating_add(1) {
                    1 => "1 report was".to_owned(),
                    lost => format!("{lost} reports were"),
                }
            );
            let event = NewEvent {
                endpoint,
                kind: EventKind::Agent,
                status: EventStatus::Unsuccessful,
                detail: "reports-lost",
                message: &message,
                task: None,
                incident: None,
                at_ms: now_ms,
            };
            events::append(tx, event).await
        }
    }
}

#[cfg(test)]
mod tests {
    use sqlx::Row as _;
    use tm_protocol::{
        ids::Sha256,
        message::Outcome,
        report::{Coverage, Detection, PathBytes},
    };

    use super::*;
    use crate::store::{Store, specs, tests::scratch};

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
             VALUES ($1, $2, 'scan', $3, 'queued', 'a', '', 0, 1, 1)",
        )
        .bind(task.to_string())
        .bind(own.to_string())
        .bind(specs::to_json(&specs::tests::scan()))
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
