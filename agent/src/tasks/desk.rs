//! Does what the core decides, in order: first to disk, then to the link and the executors.
//!
//! While the disk takes nothing, nothing is sent and no order is taken, and what was decided waits; the link
//! and its heartbeat go on. Once there is room the desk goes on where it stopped, and asks for a new session
//! if it had to turn orders away, because the manager then sends them again.
//!
//! **Invariant:** what leaves the desk is on disk.

use std::{collections::VecDeque, io, path::Path};

use bytes::BytesMut;
use rand::random;
use tm_protocol::{
    ids::{EndpointId, Sha256, StreamId, TaskId},
    message::{Notices, Report, ReportBody, ToManager},
    task::TaskSpec,
};
use uuid::Uuid;

use super::{
    Effect, Event, Now, Tasks,
    journal::{
        Held, Journal, encode_report,
        record::{Boot, Found, Key, Record},
    },
};

/// The core, its journal, and what is still to be done.
#[derive(Debug)]
pub(crate) struct Desk {
    tasks: Tasks,
    journal: Journal,
    /// Decided, and not yet done.
    pending: VecDeque<Effect>,
    /// Why the disk takes nothing.
    trouble: Option<String>,
    missed_orders: bool,
    tidied_ms: u64,
}

/// What the agent has to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Act {
    /// Put this on the link, if there is one.
    Send(Vec<u8>),
    /// Begin a task, or go on with it.
    Start { task: TaskId, spec: TaskSpec, resumed: bool },
    /// Tell a running task to end.
    Stop(TaskId),
    /// End the session and begin another.
    Reconnect,
}

/// How often what no longer counts is let go of, in milliseconds.
const TIDY_MS: u64 = 30_000;

impl Desk {
    /// Opens the journal in `folder` and takes up what it holds.
    ///
    /// # Errors
    /// If the journal cannot be opened; damage in it is no error.
    pub(crate) fn open(
        folder: &Path,
        endpoint: EndpointId,
        boot: Boot,
        now: Now,
    ) -> io::Result<(Self, Vec<Act>)> {
        Self::open_with(Journal::open(folder)?, endpoint, boot, now)
    }

    pub(super) fn open_with(
        (mut journal, mut held): (Journal, Held),
        endpoint: EndpointId,
        boot: Boot,
        now: Now,
    ) -> io::Result<(Self, Vec<Act>)> {
        // A new journal, or one in which damage took the name of its stream.
        let stream = match held.outbox.stream {
            Some(stream) => stream,
            None => {
                let stream = fresh_stream();
                held.outbox = journal.restream(stream)?;
                stream
            }
        };
        let (tasks, effects) = Tasks::load(endpoint, boot, stream, journal.epoch(), held, now);
        let mut desk = Self {
            tasks,
            journal,
            pending: effects.into(),
            trouble: None,
            missed_orders: false,
            tidied_ms: now.elapsed_ms,
        };
        let acts = desk.handle(Event::Tick, now);
        Ok((desk, acts))
    }

    /// Decides what is to be done about an event, writes it down, and says what to do.
    pub(crate) fn handle(&mut self, event: Event, now: Now) -> Vec<Act> {
        if self.trouble.is_some() && matches!(event, Event::Assigned(_)) {
            self.missed_orders = true;
            return Vec::new();
        }
        let effects = self.tasks.handle(event, now);
        let mut acts = Vec::new();
        for effect in effects {
            match effect {
                // Needs no promise on disk, and must not wait for one.
                Effect::Stop(task) => acts.push(Act::Stop(task)),
                Effect::Persist(_)
                | Effect::SendReport(_)
                | Effect::SendLost { .. }
                | Effect::SendNotices { .. }
                | Effect::Start { .. }
                | Effect::Restream
                | Effect::Forget(_) => self.pending.push_back(effect),
            }
        }
        self.settle(now, &mut acts);
        let (reports, notices) = self.tasks.stored();
        self.journal.stored(reports, notices);
        if self.trouble.is_none() && now.elapsed_ms >= self.tidied_ms.saturating_add(TIDY_MS) {
            self.tidied_ms = now.elapsed_ms;
            self.journal.tidy();
        }
        acts
    }

    /// Whether who produces reports should wait.
    pub(crate) fn is_held_up(&self) -> bool {
        self.trouble.is_some() || self.tasks.is_full()
    }

    /// Why nothing is written down, if nothing is.
    pub(crate) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// The highest report and the highest notice that the manager has stored.
    pub(crate) fn stored(&self) -> (u64, u64) {
        self.tasks.stored()
    }

    /// The stream that reports are numbered in.
    pub(crate) fn stream(&self) -> StreamId {
        self.tasks.stream()
    }

    /// Which boot this is.
    pub(crate) fn boot(&self) -> Boot {
        self.tasks.boot()
    }

    /// The tasks that run.
    pub(crate) fn running(&self) -> Vec<TaskId> {
        self.tasks.running().collect()
    }

    /// What this agent detected itself, by key; `None` for what it did not.
    ///
    /// # Errors
    /// If the journal cannot be read.
    pub(crate) fn found(&self, key: Sha256) -> io::Result<Option<Found>> {
        self.journal.found(key)
    }

    fn settle(&mut self, now: Now, acts: &mut Vec<Act>) {
        if let Err(error) = self.persist() {
            if self.trouble.is_none() {
                tracing::error!(%error, "Cannot write the journal; no task is taken until it can be written.");
            }
            self.trouble = Some(error.to_string());
            return;
        }
        if self.trouble.take().is_some() {
            tracing::info!("The journal can be written again.");
            if std::mem::take(&mut self.missed_orders) {
                acts.push(Act::Reconnect);
            }
        }
        while let Some(effect) = self.pending.pop_front() {
            match effect {
                Effect::Persist(_) => {}
                Effect::Stop(task) => acts.push(Act::Stop(task)),
                Effect::Start { task, spec, resumed } => acts.push(Act::Start { task, spec, resumed }),
                Effect::Forget(task) => self.journal.forget(Key::Ended(task)),
                Effect::SendReport(sequence) => match self.journal.report(sequence) {
                    Ok(frame) => acts.push(Act::Send(frame)),
                    Err(error) => {
                        tracing::error!(%error, sequence, "A report cannot be read again.");
                        let effects = self.tasks.handle(Event::Unreadable { sequence }, now);
                        self.pending.extend(effects);
                        return self.settle(now, acts);
                    }
                },
                Effect::SendLost { through, count } => {
                    let body = ReportBody::Lost { count: count.saturating_sub(1) };
                    let report = Report { sequence: through, at_ms: now.unix_ms, body };
                    acts.extend(encode_report(&report).map(Act::Send));
                }
                Effect::SendNotices { first, count } => {
                    let numbers = (first..).take(count);
                    let notices = numbers.filter_map(|number| self.journal.notice(number).ok()).collect();
                    let mut bytes = BytesMut::new();
                    if ToManager::from(Notices { first, notices }).encode(&mut bytes).is_ok() {
                        acts.push(Act::Send(bytes.to_vec()));
                    }
                }
                Effect::Restream => {
                    if let Err(error) = self.restream() {
                        tracing::error!(%error, "Cannot begin another stream of reports.");
                        self.trouble = Some(error.to_string());
                        self.pending.push_front(Effect::Restream);
                        return;
                    }
                    tracing::warn!(
                        "The manager knows more of this agent's reports than the agent: they are numbered anew."
                    );
                    acts.push(Act::Reconnect);
                }
            }
        }
    }

    /// Writes down everything that is pending, with one flush.
    fn persist(&mut self) -> io::Result<()> {
        let records: Vec<Record> = self
            .pending
            .iter()
            .filter_map(
                |effect| if let Effect::Persist(record) = effect { Some(record.clone()) } else { None },
            )
            .collect();
        self.journal.write(&records)?;
        self.pending.retain(|effect| !matches!(effect, Effect::Persist(_)));
        Ok(())
    }

    /// Numbers everything that waits anew, in a stream of its own. What was to be sent is sent in the next
    /// session, under its new number.
    fn restream(&mut self) -> io::Result<()> {
        let stream = fresh_stream();
        let outbox = self.journal.restream(stream)?;
        self.tasks.restreamed(stream, self.journal.epoch(), &outbox);
        self.pending.retain(|effect| {
            !matches!(effect, Effect::SendReport(_) | Effect::SendLost { .. } | Effect::SendNotices { .. })
        });
        Ok(())
    }
}

fn fresh_stream() -> StreamId {
    StreamId::new(Uuid::from_u128(random::<u128>()))
}
