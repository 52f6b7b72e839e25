//! How tasks end: the one way in which a task gets its final state, its incidents move and its event is written.
//!
//! **Invariant:** a task ends once; whoever comes second changes nothing.
//! **Invariant:** callers hold the endpoint's row ([`lock`]), so that a report, a cancel and an expiry of one
//! endpoint follow each other.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use sqlx::Row as _;
use tm_api::event::{EventKind, EventStatus};
use tm_protocol::{
    ids::{EndpointId, IncidentId, TaskId},
    message::Outcome,
    quote::Quote,
    report::{Coverage, Failure, Tally, Verdict},
    task::{TaskKind, TaskSpec, TaskState},
};

use super::{
    Engine, PARTS, StoreError, Tx, agent_failure, brake, coverage,
    detections::names,
    ends::{self, Ended},
    events::{self, NewEvent},
    incidents, parts, places,
    receipts::{self, ReceiptRow},
    specs,
    tasks::json,
};

/// What has to be known of a task to move it.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) id: TaskId,
    pub(crate) endpoint: EndpointId,
    pub(crate) kind: TaskKind,
    pub(crate) dry_run: bool,
    pub(crate) state: TaskState,
    /// The state that its row has: an earlier one where what an agent said together is written together.
    pub(crate) stored: TaskState,
    /// What else its row says, where that has been read.
    pub(crate) order: Option<Ordered>,
}

/// What a task's row says of its order.
#[derive(Debug, Clone)]
pub(crate) struct Ordered {
    /// As [`specs::to_json`] writes it.
    pub(crate) spec: String,
    pub(crate) started_ms: Option<i64>,
}

impl Head {
    /// Moves it on, if its state allows that; written by [`settle`] or with its end.
    pub(super) fn move_to(&mut self, next: TaskState, now_ms: i64) -> bool {
        if !self.state.may_become(next) {
            return false;
        }
        self.state = next;
        if let Some(order) = self.order.as_mut().filter(|_| next == TaskState::Running) {
            order.started_ms = Some(now_ms);
        }
        true
    }

    /// When it began, as far as it is known here.
    fn started_ms(&self) -> Option<i64> {
        self.order.as_ref().and_then(|order| order.started_ms)
    }
}

/// Writes down how far a task has been moved.
///
/// # Errors
/// If the database refuses.
pub(super) async fn settle(tx: &mut Tx, head: &mut Head) -> Result<(), StoreError> {
    if head.state == head.stored {
        return Ok(());
    }
    sqlx::query(
        "UPDATE task SET state = $2, started_ms = COALESCE($3, started_ms) WHERE id = $1 AND state = $4",
    )
    .bind(head.id.to_string())
    .bind(head.state.word())
    .bind(head.started_ms())
    .bind(head.stored.word())
    .execute(&mut **tx)
    .await
    .map_err(StoreError::query("move a task on"))?;
    head.stored = head.state;
    Ok(())
}

/// How a task ends.
#[derive(Debug, Clone)]
pub(super) struct End<'a> {
    state: TaskState,
    failure: Option<Failure>,
    what: What<'a>,
    /// What its event says more of, where that is not the failure's code.
    detail: Option<&'static str>,
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
enum What<'a> {
    Nothing,
    Scan(&'a Coverage),
    /// Of a scan that was asked what it would cost: it has looked at nothing.
    Quote(&'a Quote),
    Treatment(Tally),
}

impl<'a> End<'a> {
    /// The end that an agent's outcome is for a task of `kind`.
    pub(super) fn of(outcome: &'a Outcome, head: &Head) -> Self {
        let is_scan = match head.kind {
            TaskKind::Scan => true,
            TaskKind::Cleanup | TaskKind::Restore => false,
        };
        match outcome {
            Outcome::Scanned(coverage) if is_scan && !head.dry_run => {
                Self::new(TaskState::Done, None, What::Scan(coverage))
            }
            Outcome::Quoted(quote) if is_scan && head.dry_run => {
                Self::new(TaskState::Done, None, What::Quote(quote))
            }
            Outcome::Treated(tally) if fits(tally, head) => {
                if tally.is_whole() || tally.dry_run {
                    Self::new(TaskState::Done, None, What::Treatment(*tally))
                } else {
                    Self::new(TaskState::Failed, Some(incomplete(tally)), What::Treatment(*tally))
                }
            }
            Outcome::TreatedUntilCancelled(tally) if fits(tally, head) => {
                Self::new(TaskState::Cancelled, None, What::Treatment(*tally))
            }
            Outcome::TreatedUntilDeadline(tally) if fits(tally, head) => {
                Self::new(TaskState::Failed, Some(too_late()), What::Treatment(*tally))
            }
            Outcome::ScannedUntilDeadline(coverage) if is_scan && !head.dry_run => {
                Self::new(TaskState::Failed, Some(too_late()), What::Scan(coverage))
            }
            Outcome::Scanned(_)
            | Outcome::Quoted(_)
            | Outcome::ScannedUntilDeadline(_)
            | Outcome::Treated(_)
            | Outcome::TreatedUntilCancelled(_)
            | Outcome::TreatedUntilDeadline(_) => {
                let failure =
                    Failure::new("wrong-outcome", "the agent reported the outcome of another order");
                Self::new(TaskState::Failed, Some(failure), What::Nothing)
            }
            Outcome::Failed(failure) => {
                Self::new(TaskState::Failed, Some(agent_failure(failure)), What::Nothing)
            }
            Outcome::Cancelled(coverage) => {
                let what =
                    coverage.as_ref().filter(|_| is_scan && !head.dry_run).map_or(What::Nothing, What::Scan);
                Self::new(TaskState::Cancelled, None, what)
            }
            Outcome::Expired => Self::new(
                TaskState::Expired,
                Some(Failure::new("expired", "the task was not begun in time")),
                What::Nothing,
            ),
        }
    }

    /// Somebody would not do it.
    pub(super) fn refused(failure: Failure) -> Self {
        Self::new(TaskState::Refused, Some(failure), What::Nothing)
    }

    /// Called off before its agent had it.
    pub(super) fn cancelled() -> Self {
        let failure = Failure::new("cancelled", "called off before its agent had it");
        Self::new(TaskState::Cancelled, Some(failure), What::Nothing)
    }

    /// Called off before its agent had it, for this reason.
    pub(super) fn held_back(failure: Failure) -> Self {
        Self::new(TaskState::Cancelled, Some(failure), What::Nothing)
    }

    /// Its agent never had it in time.
    pub(super) fn expired() -> Self {
        let failure = Failure::new("expired", "the endpoint did not take the task in time");
        Self { detail: Some("cannot-connect"), ..Self::new(TaskState::Expired, Some(failure), What::Nothing) }
    }

    /// Its agent has it and did not say what came of it within every limit.
    pub(super) fn given_up() -> Self {
        let failure = Failure::new("timeout", "the endpoint did not say how the task ended");
        Self::new(TaskState::Failed, Some(failure), What::Nothing)
    }

    const fn new(state: TaskState, failure: Option<Failure>, what: What<'a>) -> Self {
        Self { state, failure, what, detail: None }
    }
}

fn too_late() -> Failure {
    Failure::new("deadline", "the task took longer than its order allows")
}

/// Whether a sum answers the order: a real one to a real order of a kind that has sums.
const fn fits(tally: &Tally, head: &Head) -> bool {
    match head.kind {
        TaskKind::Scan => false,
        TaskKind::Cleanup | TaskKind::Restore => tally.dry_run == head.dry_run,
    }
}

/// Why an agent is not sent a task of a kind that it did not name.
pub(super) fn unsupported(kind: TaskKind) -> Failure {
    Failure::new("unsupported", format!("the endpoint's agent does not know tasks of the kind `{kind}`"))
}

/// Makes everything else that would change this endpoint's tasks and incidents wait for this transaction. On SQLite it
/// does already.
///
/// # Errors
/// If the database refuses.
pub(super) async fn lock(tx: &mut Tx, endpoint: EndpointId) -> Result<(), StoreError> {
    if tx.engine == Engine::Sqlite {
        return Ok(());
    }
    sqlx::query("UPDATE endpoint SET session_epoch = session_epoch WHERE id = $1")
        .bind(endpoint.to_string())
        .execute(&mut **tx)
        .await
        .map_err(StoreError::query("hold an endpoint"))?;
    Ok(())
}

/// A task, if it is `endpoint`'s.
///
/// # Errors
/// If the database refuses or holds a task that is not one.
pub(super) async fn head(
    tx: &mut Tx,
    endpoint: EndpointId,
    task: TaskId,
) -> Result<Option<Head>, StoreError> {
    let found = heads(tx, &[task]).await?.pop();
    Ok(found.filter(|head| head.endpoint == endpoint))
}

/// Those of `tasks` that there are.
///
/// # Errors
/// As [`head`].
pub(super) async fn heads(tx: &mut Tx, tasks: &[TaskId]) -> Result<Vec<Head>, StoreError> {
    ends::write(tx).await?;
    let mut heads = Vec::with_capacity(tasks.len());
    for part in parts(tasks, PARTS[0]) {
        let sql = format!(
            "SELECT kind, dry_run, state, spec, started_ms, id, endpoint_id FROM task WHERE id IN {}",
            places(1, part.len())
        );
        let mut query = sqlx::query(tx.engine.listed(sql));
        for task in part {
            query = query.bind(task.to_string());
        }
        for row in query.fetch_all(&mut **tx).await.map_err(StoreError::query("look tasks up"))? {
            let (kind, state, id): (String, String, String) = (row.get(0), row.get(2), row.get(5));
            let endpoint: String = row.get(6);
            let state =
                TaskState::from_word(&state).ok_or_else(|| StoreError::content("task state", state))?;
            heads.push(Head {
                id: id.parse().map_err(|_| StoreError::content("task id", id))?,
                endpoint: endpoint.parse().map_err(|_| StoreError::content("endpoint id", endpoint))?,
                kind: self::kind(&kind)?,
                dry_run: row.get::<i64, _>(1) != 0,
                state,
                stored: state,
                order: Some(Ordered { spec: row.get(3), started_ms: row.get(4) }),
            });
        }
    }
    Ok(heads)
}

/// Reads the `kind` column.
///
/// # Errors
/// If it holds no kind of task.
pub(super) fn kind(word: &str) -> Result<TaskKind, StoreError> {
    TaskKind::ALL
        .into_iter()
        .find(|kind| kind.word() == word)
        .ok_or_else(|| StoreError::content("kind of task", word))
}

/// Ends a task, with all that follows. `false` if it had ended before or cannot end so.
///
/// # Errors
/// If the database refuses; the whole transaction is then void.
pub(super) async fn conclude(
    tx: &mut Tx,
    head: &Head,
    end: End<'_>,
    now_ms: i64,
) -> Result<bool, StoreError> {
    if !head.state.may_become(end.state) || !end.state.is_final() {
        return Ok(false);
    }
    let mut refused = false;
    let result = match end.what {
        What::Nothing => {
            if head.kind == TaskKind::Scan && end.state == TaskState::Failed && !head.dry_run {
                let (spec, began) = receipts::order(tx, head).await?;
                coverage::record(tx, head, end.state, &spec, began, None, now_ms);
            }
            None
        }
        What::Scan(coverage) => {
            let (spec, began, receipt) = receipts::look_at(tx, head, end.state, coverage).await?;
            let seen = Some((coverage, &receipt));
            coverage::record(tx, head, end.state, &spec, began, seen, now_ms);
            if end.state == TaskState::Done {
                brake::looked(tx, head.endpoint, &spec.patterns).await?;
            }
            let result = scan_json(coverage, &receipt)?;
            refused = receipt.is_refused();
            Some(result)
        }
        What::Quote(quote) => Some(serde_json::json!(quote).to_string()),
        What::Treatment(tally) => Some(serde_json::json!(tally).to_string()),
    };
    let ended = Ended {
        task: head.id,
        stored: head.stored,
        state: end.state,
        failure: end.failure.clone(),
        result,
        started_ms: head.started_ms(),
        finished_ms: now_ms,
    };
    match (tx.engine, head.kind) {
        // Nobody else can have moved it, and nothing that follows here looks at its row.
        (Engine::Sqlite, TaskKind::Scan) => tx.ended.push(ended),
        (Engine::Sqlite, TaskKind::Cleanup | TaskKind::Restore) | (Engine::Postgres, _) => {
            ends::write(tx).await?;
            if ended.write(tx).await? == 0 {
                return Ok(false);
            }
        }
    }
    if refused {
        let message =
            "the receipt of a scan is not signed by the endpoint's key; what it says is kept, marked so";
        let event = NewEvent {
            endpoint: head.endpoint,
            kind: EventKind::Agent,
            status: EventStatus::Unsuccessful,
            detail: "receipt-refused",
            message,
            task: Some(head.id),
            incident: None,
            at_ms: now_ms,
        };
        events::append(tx, event).await?;
    }
    // What changes nothing on an endpoint is no event of its threats; the audit log has the order.
    if !head.dry_run {
        match head.kind {
            TaskKind::Scan => tell(tx, head, scan(&end), None, now_ms).await?,
            TaskKind::Cleanup => {
                let left = incidents::cleanup_ended(tx, head.id, now_ms).await?;
                let said = cleanup(tx, head, &end, left.open).await?;
                tell(tx, head, said, left.only, now_ms).await?;
            }
            TaskKind::Restore => {
                let incident = incidents::restore_ended(tx, head.id, now_ms).await?;
                let said = restore(tx, head, &end).await?;
                tell(tx, head, said, incident, now_ms).await?;
            }
        }
    }
    Ok(true)
}

/// What an event says.
struct Said {
    status: EventStatus,
    detail: String,
    message: String,
}

impl Said {
    fn new(status: EventStatus, detail: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), message: message.into() }
    }

    /// For an end that is no success.
    fn failed(status: EventStatus, what: &str, end: &End<'_>) -> Self {
        let cancelled = Failure::new("cancelled", "called off");
        let failure = end.failure.as_ref().unwrap_or(&cancelled);
        let sum = match end.what {
            What::Nothing | What::Quote(_) => String::new(),
            What::Scan(coverage) => format!(": {} looked at by then", things(coverage.files, "file")),
            What::Treatment(tally) => format!(": {}", sum(&tally)),
        };
        let detail = end.detail.unwrap_or(failure.code.as_str());
        Self::new(status, detail, format!("the {what} did not succeed ({}){sum}", failure.message))
    }
}

async fn tell(
    tx: &mut Tx,
    head: &Head,
    said: Said,
    incident: Option<IncidentId>,
    now_ms: i64,
) -> Result<(), StoreError> {
    let event = NewEvent {
        endpoint: head.endpoint,
        kind: event_kind(head.kind),
        status: said.status,
        detail: &said.detail,
        message: &said.message,
        task: Some(head.id),
        incident,
        at_ms: now_ms,
    };
    events::append(tx, event).await
}

/// The kind of a task's events.
pub(super) const fn event_kind(kind: TaskKind) -> EventKind {
    match kind {
        TaskKind::Scan => EventKind::ScanAdministrator,
        TaskKind::Cleanup => EventKind::Cleanup,
        TaskKind::Restore => EventKind::Restore,
    }
}

fn scan(end: &End<'_>) -> Said {
    let What::Scan(coverage) = end.what else {
        return Said::failed(EventStatus::Unsuccessful, "scan", end);
    };
    if end.state != TaskState::Done {
        let mut said = Said::failed(EventStatus::Unsuccessful, "scan", end);
        if coverage.detections > 0 {
            said.message.push_str(&format!(", {} there", things(coverage.detections, "detection")));
        }
        return said;
    }
    let looked = things(coverage.files, "file");
    let gaps = coverage
        .skipped
        .iter()
        .filter(|(reason, _)| reason.leaves_a_gap())
        .fold(0_u64, |sum, (_, count)| sum.saturating_add(*count));
    let skipped = if gaps == 0 { String::new() } else { format!("; {gaps} not looked at") };
    match coverage.verdict() {
        Verdict::Clean => {
            Said::new(EventStatus::Scanned, "no-threat-found", format!("no threat found in {looked}"))
        }
        Verdict::Incomplete => Said::new(
            EventStatus::Scanned,
            "incomplete",
            format!("no threat found in {looked}, but not everything was looked at{skipped}"),
        ),
        Verdict::Detected => Said::new(
            EventStatus::Assessed,
            "manual-cleanup-needed",
            format!("{} in {looked}{skipped}", things(coverage.detections, "detection")),
        ),
    }
}

async fn cleanup(tx: &mut Tx, head: &Head, end: &End<'_>, open: usize) -> Result<Said, StoreError> {
    let (TaskState::Done, What::Treatment(tally)) = (end.state, end.what) else {
        let mut said = Said::failed(EventStatus::Unsuccessful, "cleanup", end);
        if said.detail == "incomplete"
            && let Some(why) = first_failure(tx, head.id).await?
        {
            said.message = format!("{}; {}", said.message, why.message);
            said.detail = why.code;
        }
        return Ok(said);
    };
    let sum = sum(&tally);
    Ok(if open > 0 {
        let message = format!("{sum}; other detections of the same kind remain");
        Said::new(EventStatus::Assessed, "manual-cleanup-needed", message)
    } else if tally.done == 0 {
        Said::new(EventStatus::Resolved, "no-longer-exists", sum)
    } else {
        Said::new(EventStatus::Resolved, "removed", sum)
    })
}

async fn restore(tx: &mut Tx, head: &Head, end: &End<'_>) -> Result<Said, StoreError> {
    let (TaskState::Done, What::Treatment(tally)) = (end.state, end.what) else {
        let mut said = Said::failed(EventStatus::RollbackFailed, "restore", end);
        if said.detail == "incomplete"
            && let Some(why) = first_failure(tx, head.id).await?
        {
            said.message = format!("{}; {}", said.message, why.message);
            said.detail = why.code;
        }
        return Ok(said);
    };
    let spec = sqlx::query("SELECT spec FROM task WHERE id = $1")
        .bind(head.id.to_string())
        .fetch_one(&mut **tx)
        .await
        .map_err(StoreError::query("read a task's order"))?;
    let elsewhere = match specs::from_json(&spec.get::<String, _>(0))? {
        TaskSpec::Restore(restore) => restore.to,
        TaskSpec::Scan(_) | TaskSpec::Cleanup(_) => None,
    };
    let files = things(u64::from(tally.done), "file");
    Ok(match elsewhere {
        None => Said::new(EventStatus::RolledBack, "restored", format!("{files} put back in place")),
        Some(to) => Said::new(
            EventStatus::Noted,
            "restored-elsewhere",
            format!("{files} copied out of the vault to {to}"),
        ),
    })
}

/// Why the first item that did not succeed did not.
async fn first_failure(tx: &mut Tx, task: TaskId) -> Result<Option<Failure>, StoreError> {
    let row = sqlx::query(
        "SELECT failure FROM task_item WHERE task_id = $1 AND verdict IN ('refused', 'failed')
         AND failure IS NOT NULL ORDER BY ordinal LIMIT 1",
    )
    .bind(task.to_string())
    .fetch_optional(&mut **tx)
    .await
    .map_err(StoreError::query("look for an item that failed"))?;
    row.map(|row| json("failure", &row.get::<String, _>(0))).transpose()
}

fn incomplete(tally: &Tally) -> Failure {
    let stubborn = u64::from(tally.refused) + u64::from(tally.failed);
    let left = u64::from(tally.left);
    let all = stubborn + left + u64::from(tally.done) + u64::from(tally.gone);
    let message = match (stubborn, left) {
        (_, 0) => format!("{stubborn} of {all} items were refused or failed"),
        (0, _) => format!("{left} of {all} items were not reached"),
        (_, _) => format!("{stubborn} of {all} items were refused or failed, {left} were not reached"),
    };
    Failure::new("incomplete", message)
}

/// `3 items done, 1 gone already, …`; what there is none of is left out.
fn sum(tally: &Tally) -> String {
    let parts: Vec<String> = [
        (tally.done, "done"),
        (tally.gone, "gone already"),
        (tally.refused, "refused"),
        (tally.failed, "failed"),
        (tally.left, "not reached"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, word)| format!("{} {word}", things(u64::from(count), "item")))
    .collect();
    if parts.is_empty() { "nothing was there to be done".to_owned() } else { parts.join(", ") }
}

/// `1 file`, `2 files`.
pub(super) fn things(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

#[derive(Debug, Serialize)]
struct ScanResultRow<'a> {
    verdict: Verdict,
    files: u64,
    bytes: u64,
    known: u64,
    detections: u64,
    skipped: BTreeMap<&'static str, u64>,
    samples: Vec<SampleRow<'a>>,
    elapsed_ms: u64,
    cpu_ms: u64,
    receipt: &'a ReceiptRow,
}

#[derive(Debug, Serialize)]
struct SampleRow<'a> {
    path_b64: String,
    member_b64: Vec<String>,
    reason: &'a str,
}

fn scan_json(coverage: &Coverage, receipt: &ReceiptRow) -> Result<String, StoreError> {
    let row = ScanResultRow {
        verdict: coverage.verdict(),
        files: coverage.files,
        bytes: coverage.bytes,
        known: coverage.known,
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
        receipt,
    };
    serde_json::to_string(&row).map_err(|_| StoreError::content("coverage", "unwritable"))
}
