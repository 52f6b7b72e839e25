//! What becomes of orders: pure, so that every sequence of events and every crash can be tried.
//!
//! Reports are numbered from 1 without a gap in a stream, and are kept in the [`journal`] until the manager
//! has stored them; notices are numbered in a lane of their own, and are dropped, and counted, where there
//! is no room for them. Times are those of a clock that counts suspend and never jumps.
//!
//! **Invariant:** a task that was accepted ends in exactly one final report, whatever happens between.
//! **Invariant:** at most one task that changes the endpoint is carried out at a time, and at most
//! [`MAX_READING`] that only read.
//! **Invariant:** what is to be sent is to be persisted first: effects are performed in order.

pub(crate) mod care;
pub(crate) mod desk;
pub(crate) mod execute;
pub(crate) mod journal;
pub(crate) mod lane;
#[cfg(test)]
mod model;
mod order;
mod outcomes;
mod owned;
pub(crate) mod sign;
mod treat;
#[cfg(test)]
mod trials;

use std::collections::{BTreeMap, HashMap, VecDeque};

use tm_protocol::{
    ids::{EndpointId, StreamId, TaskId},
    message::{Assign, Cancel, Notices, Outcome, Report, ReportBody},
    report::{Failure, ItemReport, Notice, OwnedFile, VaultEntry},
    task::TaskSpec,
};

use self::{
    journal::{
        Held, Outbox, encode_report,
        record::{Boot, Due, Found, Record},
    },
    lane::{GoneBack, Lane, Next},
    order::{decode_order, encode_order, invalid},
    outcomes::{Outcomes, REMEMBER_MS, remember_ms},
};

/// Bytes of reports that may wait for the manager; beyond it no task is begun, and who finds more waits.
pub(crate) const MAX_REPORTS: u64 = 64 << 20;
/// Bytes of notices that may wait for the manager; beyond it they are dropped and counted.
const MAX_NOTICES: u64 = 1 << 20;
/// Orders that may wait; more are refused.
const MAX_WAITING: usize = 1000;
/// The same in bytes of orders.
const MAX_WAITING_BYTES: usize = 16 << 20;
/// Tasks that only read and are carried out at the same time.
const MAX_READING: usize = 2;
/// Tasks that were told to stop and have not, and for which no other waits any more.
const MAX_ABANDONED: usize = 8;
/// How often a task is begun that never comes to an end before the agent does.
const MAX_ATTEMPTS: u32 = 25;
/// Ended tasks that are remembered.
const MAX_ENDED: usize = 20_000;
/// How long a task that is called off may take to say what it has done, in milliseconds.
const CANCEL_MS: u64 = 1_500;
/// The same at its deadline.
const DEADLINE_MS: u64 = 10_000;

/// Something that happened.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Assigned(Assign),
    Cancelled(Cancel),
    /// A running task found something; some of it is in files of packages.
    Detected(TaskId, Vec<Found>, Vec<OwnedFile>),
    /// A running task has done, or not done, something.
    Treated(TaskId, Vec<ItemReport>),
    /// A running task has ended.
    Finished(TaskId, Outcome),
    /// What the vault holds has changed outside of a task.
    Vault {
        first: bool,
        items: Vec<VaultEntry>,
    },
    /// Something that the manager should know.
    Notice {
        code: &'static str,
        message: String,
        count: u64,
    },
    /// A session stands; the manager holds reports and notices up to here.
    Connected {
        reports: u64,
        notices: u64,
    },
    /// The session is over.
    Disconnected,
    ReportsStored {
        through: u64,
    },
    NoticesStored {
        through: u64,
    },
    /// The content of a report turned out to be unreadable.
    Unreadable {
        sequence: u64,
    },
    /// Time has passed.
    Tick,
}

/// What is to be done about it, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Write this down, durably.
    Persist(Record),
    /// Send the report of this number.
    SendReport(u64),
    /// Say that `count` reports up to `through` are lost.
    SendLost { through: u64, count: u64 },
    /// Send `count` notices from `first` on.
    SendNotices { first: u64, count: usize },
    /// Carry a task out; `resumed` if it was begun before.
    Start { task: TaskId, spec: TaskSpec, resumed: bool },
    /// The running task must end soon.
    Stop(TaskId),
    /// The manager knows more of the stream than this agent, or less than it once did: begin another.
    Restream,
    /// Nothing has to be remembered of this task any more.
    Forget(TaskId),
    /// The same of how it ended only.
    ForgetOutcome(TaskId),
}

/// Every order this agent knows of, and what it still owes the manager.
#[derive(Debug)]
pub(crate) struct Tasks {
    endpoint: EndpointId,
    boot: Boot,
    stream: StreamId,
    epoch: u32,
    waiting: VecDeque<Waiting>,
    running: BTreeMap<TaskId, Running>,
    /// Told to stop, reported as ended, and still at it. The flag: it changes the endpoint.
    abandoned: BTreeMap<TaskId, bool>,
    ended: HashMap<TaskId, Ended>,
    ended_order: VecDeque<TaskId>,
    outcomes: Outcomes,
    reports: Lane,
    notices: Lane,
    /// Notices that found no room.
    dropped: u64,
    connected: bool,
}

#[derive(Debug)]
struct Waiting {
    task: TaskId,
    spec: TaskSpec,
    /// Length of its order.
    bytes: usize,
    /// When it expires, or, once it was begun, when it must end.
    until_ms: u64,
    deadline_ms: u64,
    forget_ms: u64,
    attempt: u32,
}

/// A task that has ended.
#[derive(Debug, Clone, Copy)]
struct Ended {
    /// Until when it is remembered.
    until_ms: u64,
    /// The report that tells it; 0 if that belongs to an earlier stream.
    sequence: u64,
}

#[derive(Debug)]
struct Running {
    changes_host: bool,
    ends_ms: u64,
    forget_ms: u64,
    stopping: Option<(Stopping, u64)>,
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
    /// Milliseconds since the machine was booted, suspend included; never jumps.
    pub(crate) elapsed_ms: u64,
    /// Milliseconds since 1970, for the record.
    pub(crate) unix_ms: i64,
}

impl Tasks {
    /// The state that a journal tells of, and what has to be done about it.
    pub(crate) fn load(
        endpoint: EndpointId,
        boot: Boot,
        stream: StreamId,
        epoch: u32,
        held: Held,
        now: Now,
    ) -> (Self, Vec<Effect>) {
        let mut tasks = Self {
            endpoint,
            boot,
            stream,
            epoch,
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            abandoned: BTreeMap::new(),
            ended: HashMap::new(),
            ended_order: VecDeque::new(),
            outcomes: Outcomes::default(),
            reports: Lane::default(),
            notices: Lane::default(),
            dropped: 0,
            connected: false,
        };
        let mut effects = Vec::new();
        tasks.take_outbox(&held.outbox);
        let (reports, notices) = held.outbox.opened.unwrap_or((u64::MAX, u64::MAX));
        tasks.reports.expect_at_most(reports);
        tasks.notices.expect_at_most(notices);
        let (reports, notices) = (tasks.reports.last().min(reports), tasks.notices.last().min(notices));
        effects.push(Effect::Persist(Record::Opened { epoch, reports, notices }));
        tasks.remember(held.tasks, &held.outbox, now, &mut effects);
        if held.damaged > 0 {
            let message = format!("{} records of the journal were damaged and are lost", held.damaged);
            tasks.note("journal-damaged", message, held.damaged, now, &mut effects);
        }
        (tasks, effects)
    }

    /// Takes over what waits for the manager under another stream's numbers, and tells the ends that got none.
    pub(crate) fn restreamed(
        &mut self,
        stream: StreamId,
        epoch: u32,
        outbox: &Outbox,
        now: Now,
    ) -> Vec<Effect> {
        let stored = self.reports.stored();
        self.stream = stream;
        self.epoch = epoch;
        self.connected = false;
        self.take_outbox(outbox);
        let told: HashMap<TaskId, u64> =
            outbox.reports.iter().filter_map(|(n, _, ends)| Some(((*ends)?, *n))).collect();
        let mut lost = Vec::new();
        for (task, ended) in &mut self.ended {
            if ended.sequence > stored && !told.contains_key(task) {
                lost.push((*task, ended.until_ms));
            }
            ended.sequence = told.get(task).copied().unwrap_or(0);
        }
        lost.sort_unstable();
        let mut effects = Vec::new();
        for (task, until_ms) in lost {
            self.tell_lost_end(task, until_ms, now, &mut effects);
        }
        effects
    }

    fn take_outbox(&mut self, outbox: &Outbox) {
        self.reports = Lane::load(outbox.stored.0, outbox.reports.iter().map(|(n, bytes, _)| (*n, *bytes)));
        self.notices = Lane::load(outbox.stored.1, outbox.notices.iter().copied());
    }

    fn remember(&mut self, records: Vec<Record>, outbox: &Outbox, now: Now, effects: &mut Vec<Effect>) {
        let mut begun = HashMap::new();
        let mut orders = Vec::new();
        let mut outcomes = Vec::new();
        for record in records {
            match record {
                Record::Outcome { task, frame } => outcomes.push((task, frame)),
                Record::Started { task, ends, attempt } => {
                    begun.insert(task, (ends.at(now, self.boot), attempt));
                }
                Record::Accepted { task, order, expires } => orders.push((task, order, expires)),
                Record::Ended { task, stream, sequence, forget } => {
                    let sequence = if stream == self.stream { sequence } else { 0 };
                    let until_ms = forget.at(now, self.boot);
                    self.keep_ended(task, Ended { until_ms, sequence }, effects);
                }
                Record::Stream { .. }
                | Record::Report { .. }
                | Record::Stored { .. }
                | Record::Notice { .. }
                | Record::NoticesStored { .. }
                | Record::Found(_)
                | Record::Opened { .. } => {}
            }
        }
        // A write that broke off after the last report of a task and before the word that it was the last.
        for (sequence, _, ends) in &outbox.reports {
            let Some(task) = *ends else { continue };
            match self.ended.get_mut(&task) {
                Some(ended) => ended.sequence = *sequence,
                None => {
                    self.note_end(task, *sequence, now.elapsed_ms.saturating_add(REMEMBER_MS), now, effects)
                }
            }
        }
        // Ids are ordered by time.
        outcomes.sort_unstable_by_key(|(task, _)| *task);
        for (task, frame) in outcomes {
            if self.ended.contains_key(&task) {
                self.keep_outcome(task, frame, effects);
            } else {
                effects.push(Effect::ForgetOutcome(task));
            }
        }
        orders.retain(|(task, _, _)| !self.ended.contains_key(task));
        begun.retain(|task, _| !self.ended.contains_key(task));
        // Their ends were neither stored nor are they there to be sent: damage took them.
        let mut untold: Vec<(TaskId, u64)> = self
            .ended
            .iter()
            .filter(|(_, ended)| self.is_untold(ended))
            .map(|(task, ended)| (*task, ended.until_ms))
            .collect();
        // Ids are ordered by time, and so is the queue.
        orders.sort_unstable_by_key(|(task, _, _)| *task);
        for (task, order, expires) in orders {
            let left = expires.at(now, self.boot);
            let begun = begun.remove(&task);
            let Some(assign) = decode_order(&order) else {
                untold.push((task, left.saturating_add(REMEMBER_MS)));
                continue;
            };
            let waiting = Waiting {
                task,
                spec: assign.spec,
                bytes: order.len(),
                until_ms: begun.map_or(left, |(ends, _)| ends),
                deadline_ms: assign.deadline_ms,
                forget_ms: now.elapsed_ms.saturating_add(remember_ms(assign.expires_in_ms)),
                attempt: begun.map_or(0, |(_, attempt)| attempt),
            };
            // What was begun goes on before anything new is begun.
            if waiting.attempt > 0 {
                self.waiting.push_front(waiting);
            } else {
                self.waiting.push_back(waiting);
            }
        }
        // A beginning whose order was lost to damage: nobody can go on with it.
        untold.extend(begun.into_keys().map(|task| (task, now.elapsed_ms.saturating_add(REMEMBER_MS))));
        untold.sort_unstable();
        for (task, until_ms) in untold {
            self.tell_lost_end(task, until_ms, now, effects);
        }
    }

    /// Whether the manager neither has the end of a task nor will get it.
    fn is_untold(&self, ended: &Ended) -> bool {
        ended.sequence > self.reports.stored() && !self.reports.holds(ended.sequence)
    }

    fn tell_lost_end(&mut self, task: TaskId, until_ms: u64, now: Now, effects: &mut Vec<Effect>) {
        let failure = Failure::new(
            "interrupted",
            "the agent's notes of this task are damaged: how it ended is not known",
        );
        self.end(task, Outcome::Failed(failure), until_ms, now, effects);
    }

    /// The end was told in an earlier stream and the manager does not have it: it was set back to an earlier state. It
    /// is told once more; the task is not done again.
    fn tell_again(&mut self, task: TaskId, until_ms: u64, now: Now, effects: &mut Vec<Effect>) {
        let body = self.outcomes.tell(task);
        let (sequence, _) = self.report(body, Some(task), now, effects);
        self.note_end(task, sequence, until_ms, now, effects);
    }

    /// The stream that reports are numbered in.
    pub(crate) fn stream(&self) -> StreamId {
        self.stream
    }

    /// Which boot this is.
    pub(crate) fn boot(&self) -> Boot {
        self.boot
    }

    /// The tasks that run.
    pub(crate) fn running(&self) -> impl Iterator<Item = TaskId> {
        self.running.keys().copied()
    }

    /// Whether the manager is far behind: who produces reports should wait.
    pub(crate) fn is_full(&self) -> bool {
        self.reports.bytes() >= MAX_REPORTS
    }

    /// Whether the manager has caught up so far that work can go on for a while.
    pub(crate) fn has_room(&self) -> bool {
        self.reports.bytes() < MAX_REPORTS / 2
    }

    /// Whether a task was told to stop and is still to say what it has done.
    pub(crate) fn is_stopping(&self) -> bool {
        self.running.values().any(|running| running.stopping.is_some())
    }

    /// Whether this task is known here, ended or not.
    pub(crate) fn knows(&self, task: TaskId) -> bool {
        self.is_open(task) || self.ended.contains_key(&task)
    }

    fn is_open(&self, task: TaskId) -> bool {
        self.running.contains_key(&task)
            || self.abandoned.contains_key(&task)
            || self.waiting.iter().any(|waiting| waiting.task == task)
    }

    /// The highest report and the highest notice that are stored.
    pub(crate) fn stored(&self) -> (u64, u64) {
        (self.reports.stored(), self.notices.stored())
    }

    /// Decides. Nothing is done here.
    pub(crate) fn handle(&mut self, event: Event, now: Now) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Assigned(assign) => self.assigned(assign, now, &mut effects),
            Event::Cancelled(cancel) => self.cancelled(cancel.task, now, &mut effects),
            Event::Detected(task, found, owned) => self.detected(task, (found, owned), now, &mut effects),
            Event::Treated(task, items) => {
                if self.running.contains_key(&task) || self.abandoned.contains_key(&task) {
                    self.report(ReportBody::Items { task, items }, None, now, &mut effects);
                }
            }
            Event::Finished(task, outcome) => self.finished(task, outcome, now, &mut effects),
            Event::Vault { first, items } => {
                self.report(ReportBody::Vault { first, items }, None, now, &mut effects);
            }
            Event::Notice { code, message, count } => self.note(code, message, count, now, &mut effects),
            Event::Connected { reports, notices } => self.connected(reports, notices, &mut effects),
            Event::Disconnected => self.connected = false,
            Event::ReportsStored { through } => self.reports.stored_through(through),
            Event::NoticesStored { through } => self.notices.stored_through(through),
            Event::Unreadable { sequence } => {
                self.reports.lose(sequence);
                self.note("journal-damaged", "a report became unreadable".to_owned(), 1, now, &mut effects);
                // If it told the end of a task, the manager still waits for one.
                let end = self.ended.iter().find(|(_, ended)| ended.sequence == sequence);
                if let Some((task, ended)) = end.map(|(task, ended)| (*task, *ended)) {
                    self.tell_lost_end(task, ended.until_ms, now, &mut effects);
                }
            }
            Event::Tick => {}
        }
        self.keep_time(now, &mut effects);
        self.begin(now, &mut effects);
        self.tell_dropped(now, &mut effects);
        self.pump(&mut effects);
        effects
    }

    fn assigned(&mut self, assign: Assign, now: Now, effects: &mut Vec<Effect>) {
        let task = assign.task;
        if let Some(ended) = self.ended.get(&task).copied() {
            if self.is_untold(&ended) {
                self.tell_lost_end(task, ended.until_ms, now, effects);
            } else if ended.sequence == 0 {
                self.tell_again(task, ended.until_ms, now, effects);
            }
            return;
        }
        if self.is_open(task) {
            return;
        }
        let order = encode_order(&assign);
        let bytes = order.as_ref().map_or(0, Vec::len);
        let waiting_bytes: usize = self.waiting.iter().map(|waiting| waiting.bytes).sum();
        let refusal = if assign.endpoint != self.endpoint {
            Some(Failure::new("wrong-endpoint", "the task is for another endpoint"))
        } else if self.waiting.len() >= MAX_WAITING || waiting_bytes + bytes > MAX_WAITING_BYTES {
            Some(Failure::new("too-many", format!("{} tasks wait already", self.waiting.len())))
        } else if order.is_none() {
            Some(Failure::new("invalid", "the order is too long"))
        } else {
            invalid(&assign.spec)
        };
        let forget_ms = now.elapsed_ms.saturating_add(remember_ms(assign.expires_in_ms));
        if let Some(failure) = refusal {
            return self.conclude(task, ReportBody::Refused { task, failure }, forget_ms, now, effects);
        }
        let expires = Due::new(assign.expires_in_ms, now, self.boot);
        effects.push(Effect::Persist(Record::Accepted { task, order: order.unwrap_or_default(), expires }));
        self.report(ReportBody::Accepted { task }, None, now, effects);
        self.waiting.push_back(Waiting {
            task,
            spec: assign.spec,
            bytes,
            until_ms: now.elapsed_ms.saturating_add(assign.expires_in_ms),
            deadline_ms: assign.deadline_ms,
            forget_ms,
            attempt: 0,
        });
    }

    fn cancelled(&mut self, task: TaskId, now: Now, effects: &mut Vec<Effect>) {
        if let Some(running) = self.running.get_mut(&task) {
            if running.stopping.is_none() {
                running.stopping = Some((Stopping::Cancelled, now.elapsed_ms.saturating_add(CANCEL_MS)));
                effects.push(Effect::Stop(task));
            }
            return;
        }
        if self.ended.contains_key(&task) {
            return;
        }
        // Also where the order is not known (any more): whoever called it off hears an end, and the order is
        // not carried out if it still comes.
        let at = self.waiting.iter().position(|waiting| waiting.task == task);
        let forget_ms = at
            .and_then(|at| self.waiting.remove(at))
            .map_or_else(|| now.elapsed_ms.saturating_add(REMEMBER_MS), |waiting| waiting.forget_ms);
        self.end(task, Outcome::Cancelled(None), forget_ms, now, effects);
    }

    fn detected(&mut self, task: TaskId, (found, owned): owned::Finds, now: Now, effects: &mut Vec<Effect>) {
        if !self.running.contains_key(&task) {
            return;
        }
        if !owned.is_empty() {
            self.report(ReportBody::Owned { task, files: owned }, None, now, effects);
        }
        let detections = found.iter().map(|found| found.detection.clone()).collect();
        effects.extend(found.into_iter().map(|found| Effect::Persist(Record::Found(Box::new(found)))));
        self.report(ReportBody::Detections { task, detections }, None, now, effects);
    }

    fn finished(&mut self, task: TaskId, outcome: Outcome, now: Now, effects: &mut Vec<Effect>) {
        self.abandoned.remove(&task);
        let Some(running) = self.running.remove(&task) else { return };
        let outcome = match (running.stopping, outcome) {
            // It was through before it heard.
            (_, Outcome::Treated(tally)) if tally.left == 0 => Outcome::Treated(tally),
            (Some((Stopping::Cancelled, _)), Outcome::Scanned(coverage)) => {
                Outcome::Cancelled(Some(coverage))
            }
            (Some((Stopping::Cancelled, _)), Outcome::Treated(tally)) => {
                Outcome::TreatedUntilCancelled(tally)
            }
            (Some((Stopping::Cancelled, _)), _) => Outcome::Cancelled(None),
            (Some((Stopping::Deadline, _)), Outcome::Treated(tally)) => Outcome::TreatedUntilDeadline(tally),
            (Some((Stopping::Deadline, _)), Outcome::Scanned(coverage)) => {
                Outcome::ScannedUntilDeadline(coverage)
            }
            (Some((Stopping::Deadline, _)), _) => Outcome::Failed(too_late()),
            (None, outcome) => outcome,
        };
        self.end(task, outcome, running.forget_ms, now, effects);
    }

    fn connected(&mut self, reports: u64, notices: u64, effects: &mut Vec<Effect>) {
        let both = self.reports.connected(reports).and_then(|()| self.notices.connected(notices));
        self.connected = both.is_ok();
        effects.push(match both {
            Ok(()) => {
                Effect::Persist(Record::Opened { epoch: self.epoch, reports: u64::MAX, notices: u64::MAX })
            }
            Err(GoneBack) => Effect::Restream,
        });
    }

    fn keep_time(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let is_late = |waiting: &Waiting| waiting.until_ms <= now.elapsed_ms;
        if self.waiting.iter().any(is_late) {
            let (late, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(is_late);
            self.waiting = waiting;
            let late: VecDeque<Waiting> = late;
            for Waiting { task, attempt, forget_ms, .. } in late {
                let outcome = if attempt == 0 { Outcome::Expired } else { Outcome::Failed(too_late()) };
                self.end(task, outcome, forget_ms, now, effects);
            }
        }
        let mut stuck = Vec::new();
        for (task, running) in &mut self.running {
            match running.stopping {
                None if running.ends_ms <= now.elapsed_ms => {
                    running.stopping = Some((Stopping::Deadline, now.elapsed_ms.saturating_add(DEADLINE_MS)));
                    effects.push(Effect::Stop(*task));
                }
                Some((why, until)) if until <= now.elapsed_ms => stuck.push((*task, why)),
                None | Some(_) => {}
            }
        }
        for (task, why) in stuck {
            let Some(running) = self.running.remove(&task) else { continue };
            self.abandoned.insert(task, running.changes_host);
            let held = if running.changes_host {
                "no other task that changes this endpoint"
            } else {
                "one task less"
            };
            let message =
                format!("task {task} was told to stop and does not: until it does, {held} is begun");
            self.note("task-stuck", message, wide(self.abandoned.len()), now, effects);
            let outcome = match why {
                Stopping::Cancelled => Outcome::Cancelled(None),
                Stopping::Deadline => Outcome::Failed(too_late()),
            };
            self.end(task, outcome, running.forget_ms, now, effects);
        }
        self.forget_ends(now, effects);
    }

    /// Forgets tasks that ended long ago, in the order of their ends.
    fn forget_ends(&mut self, now: Now, effects: &mut Vec<Effect>) {
        while let Some(oldest) = self.ended_order.front().copied() {
            if let Some(ended) = self.ended.get_mut(&oldest) {
                // The order may be on its way once more until the manager has stored the end, and some time after.
                if ended.sequence > self.reports.stored() {
                    ended.until_ms = ended.until_ms.max(now.elapsed_ms.saturating_add(REMEMBER_MS));
                }
                if ended.until_ms > now.elapsed_ms {
                    return;
                }
            }
            self.ended_order.pop_front();
            self.ended.remove(&oldest);
            self.outcomes.forget(oldest);
            effects.push(Effect::Forget(oldest));
        }
    }

    fn begin(&mut self, now: Now, effects: &mut Vec<Effect>) {
        while !self.is_full() && self.abandoned.len() < MAX_ABANDONED {
            let reading = self.running.values().filter(|running| !running.changes_host).count();
            let is_changing = self.running.values().any(|running| running.changes_host)
                || self.abandoned.values().any(|changes_host| *changes_host);
            let has_turn = |waiting: &Waiting| {
                let changes_host = waiting.spec.kind().changes_host();
                if changes_host { !is_changing } else { reading < MAX_READING }
            };
            let Some(at) = self.waiting.iter().position(has_turn) else { return };
            let Some(waiting) = self.waiting.remove(at) else { return };
            let Waiting { task, spec, bytes: _, until_ms, deadline_ms, forget_ms, attempt } = waiting;
            if attempt >= MAX_ATTEMPTS {
                let why = format!("the agent stopped {MAX_ATTEMPTS} times while the task ran");
                let failure = Failure::new("interrupted", why);
                self.end(task, Outcome::Failed(failure), forget_ms, now, effects);
                continue;
            }
            let ends_ms = if attempt == 0 { now.elapsed_ms.saturating_add(deadline_ms) } else { until_ms };
            let ends = Due::new(ends_ms.saturating_sub(now.elapsed_ms), now, self.boot);
            effects.push(Effect::Persist(Record::Started { task, ends, attempt: attempt + 1 }));
            if attempt == 0 {
                self.report(ReportBody::Started { task }, None, now, effects);
            }
            let changes_host = spec.kind().changes_host();
            self.running.insert(task, Running { changes_host, ends_ms, forget_ms, stopping: None });
            effects.push(Effect::Start { task, spec, resumed: attempt > 0 });
        }
    }

    fn end(&mut self, task: TaskId, outcome: Outcome, forget_ms: u64, now: Now, effects: &mut Vec<Effect>) {
        self.conclude(task, ReportBody::Finished { task, outcome }, forget_ms, now, effects);
    }

    /// The last report of a task, and that it was.
    fn conclude(
        &mut self,
        task: TaskId,
        body: ReportBody,
        forget_ms: u64,
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let (sequence, frame) = self.report(body, Some(task), now, effects);
        self.note_end(task, sequence, forget_ms, now, effects);
        effects.push(Effect::Persist(Record::Outcome { task, frame: frame.clone() }));
        self.keep_outcome(task, frame, effects);
    }

    fn keep_outcome(&mut self, task: TaskId, frame: Vec<u8>, effects: &mut Vec<Effect>) {
        effects.extend(self.outcomes.keep(task, frame).into_iter().map(Effect::ForgetOutcome));
    }

    fn note_end(&mut self, task: TaskId, sequence: u64, until_ms: u64, now: Now, effects: &mut Vec<Effect>) {
        let until_ms = until_ms.max(now.elapsed_ms.saturating_add(REMEMBER_MS));
        let forget = Due::new(until_ms.saturating_sub(now.elapsed_ms), now, self.boot);
        effects.push(Effect::Persist(Record::Ended { task, stream: self.stream, sequence, forget }));
        self.keep_ended(task, Ended { until_ms, sequence }, effects);
    }

    fn keep_ended(&mut self, task: TaskId, ended: Ended, effects: &mut Vec<Effect>) {
        if self.ended.insert(task, ended).is_none() {
            self.ended_order.push_back(task);
        }
        if self.ended_order.len() > MAX_ENDED
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
            self.outcomes.forget(oldest);
            effects.push(Effect::Forget(oldest));
        }
    }

    /// Reports; the report's number and its frame.
    fn report(
        &mut self,
        body: ReportBody,
        ends: Option<TaskId>,
        now: Now,
        effects: &mut Vec<Effect>,
    ) -> (u64, Vec<u8>) {
        let sequence = self.reports.last() + 1;
        let report = Report { sequence, at_ms: now.unix_ms, body };
        let frame = encode_report(&report).unwrap_or_else(|| {
            // Rooms keep to the limits; if one does not, the manager must still hear of the task's end.
            let failure = Failure::new("too-long", "a report of the agent did not fit a message");
            let body = match report.body {
                ReportBody::Finished { task, .. } | ReportBody::Refused { task, .. } => {
                    ReportBody::Finished { task, outcome: Outcome::Failed(failure) }
                }
                ReportBody::Accepted { .. }
                | ReportBody::Started { .. }
                | ReportBody::Detections { .. }
                | ReportBody::Items { .. }
                | ReportBody::Vault { .. }
                | ReportBody::Owned { .. }
                | ReportBody::Lost { .. } => ReportBody::Lost { count: 0 },
            };
            encode_report(&Report { sequence, at_ms: now.unix_ms, body }).unwrap_or_default()
        });
        self.reports.push(u64::try_from(frame.len()).unwrap_or(u64::MAX));
        let report = Record::Report { epoch: self.epoch, sequence, ends, frame: frame.clone() };
        effects.push(Effect::Persist(report));
        (sequence, frame)
    }

    fn note(&mut self, code: &str, message: String, count: u64, now: Now, effects: &mut Vec<Effect>) {
        if self.notices.bytes() >= MAX_NOTICES {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        let Failure { code, message } = Failure::new(code, message);
        let notice = Notice { at_ms: now.unix_ms, code, message, count };
        let bytes = notice.code.len() + notice.message.len() + 32;
        let number = self.notices.push(u64::try_from(bytes).unwrap_or(u64::MAX));
        effects.push(Effect::Persist(Record::Notice { epoch: self.epoch, number, notice }));
    }

    /// Once there is room again, how many notices found none.
    fn tell_dropped(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if self.dropped > 0 && self.notices.bytes() < MAX_NOTICES / 2 {
            let count = std::mem::take(&mut self.dropped);
            let message = format!("{count} notices were dropped while the manager was out of reach");
            self.note("notices-lost", message, count, now, effects);
        }
    }

    /// What there is room for: reports first.
    fn pump(&mut self, effects: &mut Vec<Effect>) {
        if !self.connected {
            return;
        }
        while let Some(next) = self.reports.next() {
            effects.push(match next {
                Next::Message(sequence) => Effect::SendReport(sequence),
                Next::Lost { through, count } => Effect::SendLost { through, count },
            });
        }
        let mut notices: Option<(u64, usize)> = None;
        while let Some(next) = self.notices.next() {
            // A notice that is lost is left out: numbers of notices may have gaps.
            let Next::Message(number) = next else { continue };
            notices = match notices {
                Some((first, count)) if first + wide(count) == number && count < Notices::MAX => {
                    Some((first, count + 1))
                }
                other => {
                    effects.extend(other.map(|(first, count)| Effect::SendNotices { first, count }));
                    Some((number, 1))
                }
            };
        }
        effects.extend(notices.map(|(first, count)| Effect::SendNotices { first, count }));
    }
}

fn too_late() -> Failure {
    Failure::new("deadline", "the task took longer than its order allows")
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
