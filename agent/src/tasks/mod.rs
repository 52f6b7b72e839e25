//! What becomes of orders: pure, so that every sequence of events can be tried.
//!
//! Reports are numbered from 1 without a gap in a stream that begins with the process, and are kept until
//! the manager has stored them. Until the agent has a journal on disk both live in memory: a restarted agent
//! begins a new stream, and its manager hands unfinished tasks out again.
//!
//! **Invariant:** a task is begun once and ends in exactly one final report.
//! **Invariant:** at most [`MAX_UNSTORED`] reports wait; beyond that no further task is begun, and the one
//! that runs is held up by its own blocked findings.

pub(crate) mod execute;

use std::collections::{HashSet, VecDeque};

use tm_protocol::{
    ids::{EndpointId, TaskId},
    message::{Assign, Cancel, Outcome, Report, ReportBody, ToManager},
    report::{Detection, Failure},
    task::{ScanSpec, TaskSpec},
};

/// Reports that may wait for the manager.
pub(crate) const MAX_UNSTORED: usize = 10_000;
/// Orders that may wait behind the one that runs; more are refused.
const MAX_WAITING: usize = 1000;

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Event {
    Assigned(Assign),
    Cancelled(Cancel),
    /// The running task found something.
    Detections(TaskId, Vec<Detection>),
    /// The running task has ended.
    Finished(TaskId, Outcome),
    /// A session stands; the manager holds reports up to here.
    Connected {
        stored_through: u64,
    },
    Stored {
        through: u64,
    },
    /// Time has passed.
    Tick,
}

/// What is to be done about it, in this order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Send(ToManager),
    Start(TaskId, TaskSpec),
    /// The running task must end soon.
    Stop(TaskId),
}

/// Every order this agent knows of, and what it still owes the manager.
#[derive(Debug)]
pub(crate) struct Tasks {
    endpoint: EndpointId,
    known: HashSet<TaskId>,
    waiting: VecDeque<Waiting>,
    running: Option<Running>,
    next: u64,
    unstored: VecDeque<Report>,
}

#[derive(Debug)]
struct Waiting {
    task: TaskId,
    spec: TaskSpec,
    expires_ms: u64,
    deadline_ms: u64,
}

#[derive(Debug)]
struct Running {
    task: TaskId,
    ends_ms: u64,
    stopping: Option<Stopping>,
}

/// Why a running task was told to stop.
#[derive(Debug, Clone, Copy)]
enum Stopping {
    Cancelled,
    Deadline,
}

/// The clocks at the moment of an event.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    /// Milliseconds of a clock that never jumps.
    pub(crate) elapsed_ms: u64,
    /// Milliseconds since 1970, for the record.
    pub(crate) unix_ms: i64,
}

impl Tasks {
    pub(crate) fn new(endpoint: EndpointId) -> Self {
        Self {
            endpoint,
            known: HashSet::new(),
            waiting: VecDeque::new(),
            running: None,
            next: 1,
            unstored: VecDeque::new(),
        }
    }

    /// The task that runs.
    pub(crate) fn running(&self) -> Option<TaskId> {
        self.running.as_ref().map(|running| running.task)
    }

    /// Whether the manager is far behind: who produces reports should wait.
    pub(crate) fn is_full(&self) -> bool {
        self.unstored.len() >= MAX_UNSTORED
    }

    /// Decides. Nothing is done here.
    pub(crate) fn handle(&mut self, event: Event, now: Now) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Assigned(assign) => self.assigned(assign, now, &mut effects),
            Event::Cancelled(cancel) => self.cancelled(cancel.task, now, &mut effects),
            Event::Detections(task, detections) => {
                if self.running() == Some(task) {
                    self.report(ReportBody::Detections { task, detections }, now, &mut effects);
                }
            }
            Event::Finished(task, outcome) => self.finished(task, outcome, now, &mut effects),
            Event::Connected { stored_through } => {
                self.stored(stored_through);
                effects.extend(self.unstored.iter().cloned().map(|report| Effect::Send(report.into())));
            }
            Event::Stored { through } => self.stored(through),
            Event::Tick => {}
        }
        self.keep_time(now, &mut effects);
        self.begin(now, &mut effects);
        effects
    }

    fn assigned(&mut self, assign: Assign, now: Now, effects: &mut Vec<Effect>) {
        if !self.known.insert(assign.task) {
            return;
        }
        let refusal = if assign.endpoint != self.endpoint {
            Some(Failure::new("wrong-endpoint", "the task is for another endpoint"))
        } else if self.waiting.len() >= MAX_WAITING {
            Some(Failure::new("too-many", format!("{MAX_WAITING} tasks wait already")))
        } else {
            invalid(&assign.spec)
        };
        let task = assign.task;
        if let Some(failure) = refusal {
            return self.report(ReportBody::Refused { task, failure }, now, effects);
        }
        self.report(ReportBody::Accepted { task }, now, effects);
        self.waiting.push_back(Waiting {
            task,
            spec: assign.spec,
            expires_ms: now.elapsed_ms.saturating_add(assign.expires_in_ms),
            deadline_ms: assign.deadline_ms,
        });
    }

    fn cancelled(&mut self, task: TaskId, now: Now, effects: &mut Vec<Effect>) {
        if let Some(at) = self.waiting.iter().position(|waiting| waiting.task == task) {
            self.waiting.remove(at);
            return self.report(
                ReportBody::Finished { task, outcome: Outcome::Cancelled(None) },
                now,
                effects,
            );
        }
        if let Some(running) =
            self.running.as_mut().filter(|running| running.task == task && running.stopping.is_none())
        {
            running.stopping = Some(Stopping::Cancelled);
            effects.push(Effect::Stop(task));
        }
    }

    fn finished(&mut self, task: TaskId, outcome: Outcome, now: Now, effects: &mut Vec<Effect>) {
        let Some(running) = self.running.take_if(|running| running.task == task) else { return };
        let outcome = match (running.stopping, outcome) {
            (Some(Stopping::Cancelled), Outcome::Scanned(coverage)) => Outcome::Cancelled(Some(coverage)),
            (Some(Stopping::Cancelled), _) => Outcome::Cancelled(None),
            (Some(Stopping::Deadline), _) => {
                Outcome::Failed(Failure::new("deadline", "the task took longer than its order allows"))
            }
            (None, outcome) => outcome,
        };
        self.report(ReportBody::Finished { task, outcome }, now, effects);
    }

    fn keep_time(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let (late, waiting) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition::<VecDeque<_>, _>(|w| w.expires_ms <= now.elapsed_ms);
        self.waiting = waiting;
        for Waiting { task, .. } in late {
            self.report(ReportBody::Finished { task, outcome: Outcome::Expired }, now, effects);
        }
        if let Some(running) =
            self.running.as_mut().filter(|r| r.ends_ms <= now.elapsed_ms && r.stopping.is_none())
        {
            running.stopping = Some(Stopping::Deadline);
            effects.push(Effect::Stop(running.task));
        }
    }

    fn begin(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if self.running.is_some() || self.is_full() {
            return;
        }
        let Some(Waiting { task, spec, deadline_ms, .. }) = self.waiting.pop_front() else { return };
        self.running =
            Some(Running { task, ends_ms: now.elapsed_ms.saturating_add(deadline_ms), stopping: None });
        self.report(ReportBody::Started { task }, now, effects);
        effects.push(Effect::Start(task, spec));
    }

    fn report(&mut self, body: ReportBody, now: Now, effects: &mut Vec<Effect>) {
        let report = Report { sequence: self.next, at_ms: now.unix_ms, body };
        self.next += 1;
        self.unstored.push_back(report.clone());
        effects.push(Effect::Send(report.into()));
    }

    fn stored(&mut self, through: u64) {
        while self.unstored.front().is_some_and(|report| report.sequence <= through) {
            self.unstored.pop_front();
        }
    }
}

/// What an agent will not do, whoever orders it.
fn invalid(spec: &TaskSpec) -> Option<Failure> {
    match spec {
        TaskSpec::Scan(scan) => {
            let paths = !scan.paths.is_empty()
                && scan.paths.len() <= ScanSpec::MAX_PATHS
                && scan.paths.iter().all(|path| {
                    path.0.starts_with(b"/") && path.0.len() <= ScanSpec::MAX_PATH && !path.0.contains(&0)
                });
            let patterns = !scan.patterns.is_empty() && scan.patterns.len() <= ScanSpec::MAX_PATTERNS;
            let sound = paths && patterns;
            (!sound).then(|| {
                Failure::new("invalid", "a scan needs absolute paths and patterns, within their limits")
            })
        }
        TaskSpec::Cleanup(_) | TaskSpec::Restore(_) => {
            Some(Failure::new("unsupported", "this agent cannot do that"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use tm_protocol::{
        ids::Sha256,
        report::{Coverage, PathBytes},
        task::{PatternRef, ScanLimits},
    };
    use uuid::Uuid;

    use super::*;

    fn endpoint() -> EndpointId {
        EndpointId::new(Uuid::from_u128(1))
    }

    fn assign(n: u128, path: &[u8], whom: EndpointId) -> Assign {
        let pattern = PatternRef { sha256: Sha256::of(b"p"), size: 1, name: "p".into() };
        Assign {
            task: TaskId::new(Uuid::from_u128(n)),
            endpoint: whom,
            spec: TaskSpec::Scan(ScanSpec {
                paths: vec![PathBytes(path.to_vec())],
                patterns: vec![pattern],
                limits: ScanLimits::default(),
            }),
            expires_in_ms: 50,
            deadline_ms: 50,
            issuer: "a".into(),
            reason: String::new(),
        }
    }

    #[test]
    fn orders_for_others_and_relative_paths_are_refused() {
        let other = EndpointId::new(Uuid::from_u128(9));
        for (order, code) in
            [(assign(1, b"/x", other), "wrong-endpoint"), (assign(2, b"x", endpoint()), "invalid")]
        {
            let effects =
                Tasks::new(endpoint()).handle(Event::Assigned(order), Now { elapsed_ms: 0, unix_ms: 0 });
            let [Effect::Send(ToManager::Report(report))] = &effects[..] else { panic!("{effects:?}") };
            assert!(
                matches!(&report.body, ReportBody::Refused { failure, .. } if failure.code == code),
                "{report:?}"
            );
        }
    }

    proptest! {
        /// Whatever happens in whatever order: one beginning at most, one end exactly, numbers without a gap.
        #[test]
        fn every_task_ends_once(steps in prop::collection::vec((0u8..6, 1u128..8, 0u64..40), 1..80)) {
            let mut tasks = Tasks::new(endpoint());
            let (mut elapsed, mut sent, mut starts) = (0, Vec::<Report>::new(), HashMap::<TaskId, u32>::new());
            let mut ordered = HashSet::new();
            let mut step = |tasks: &mut Tasks, event: Event, elapsed: u64| {
                for effect in tasks.handle(event, Now { elapsed_ms: elapsed, unix_ms: 0 }) {
                    match effect {
                        Effect::Send(ToManager::Report(r)) => {
                            if sent.iter().all(|s| s.sequence != r.sequence) { sent.push(r); }
                        }
                        Effect::Send(_) | Effect::Stop(_) => {}
                        Effect::Start(task, _) => *starts.entry(task).or_default() += 1,
                    }
                }
            };
            for (kind, n, ms) in steps {
                elapsed += ms;
                let task = TaskId::new(Uuid::from_u128(n));
                let event = match kind {
                    0 | 1 => { ordered.insert(task); Event::Assigned(assign(n, b"/x", endpoint())) }
                    2 => Event::Cancelled(Cancel { task }),
                    3 => Event::Finished(task, Outcome::Scanned(Coverage::default())),
                    4 => Event::Connected { stored_through: 0 },
                    _ => Event::Tick,
                };
                step(&mut tasks, event, elapsed);
            }
            while let Some(task) = tasks.running() {
                elapsed += 100;
                step(&mut tasks, Event::Finished(task, Outcome::Scanned(Coverage::default())), elapsed);
            }
            let sequences: Vec<u64> = sent.iter().map(|r| r.sequence).collect();
            prop_assert_eq!(sequences, (1..=sent.len() as u64).collect::<Vec<_>>());
            prop_assert!(starts.values().all(|count| *count == 1));
            for task in ordered {
                let ends = sent.iter().filter(|r| matches!(&r.body,
                    ReportBody::Finished { task: t, .. } | ReportBody::Refused { task: t, .. } if *t == task)).count();
                prop_assert_eq!(ends, 1);
            }
        }
    }
}
