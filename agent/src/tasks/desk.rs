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
    message::{Notices, Outcome, Report, ReportBody, ToManager},
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
        Ok(Self::open_with(Journal::open(folder)?, endpoint, boot, now))
    }

    pub(super) fn open_with(
        (mut journal, mut held): (Journal, Held),
        endpoint: EndpointId,
        boot: Boot,
        now: Now,
    ) -> (Self, Vec<Act>) {
        let mut pending = VecDeque::new();
        // A new journal, or one in which damage took the name of its stream.
        let stream = held.outbox.stream.unwrap_or_else(fresh_stream);
        if held.outbox.stream.is_none() {
            match journal.restream(stream) {
                Ok(outbox) => held.outbox = outbox,
                // There is no room for it now. The link and its heartbeat stand all the same.
                Err(_) => pending.push_back(Effect::Restream),
            }
        }
        let (tasks, effects) = Tasks::load(endpoint, boot, stream, journal.epoch(), held, now);
        pending.extend(effects);
        let mut desk =
            Self { tasks, journal, pending, trouble: None, missed_orders: false, tidied_ms: now.elapsed_ms };
        let acts = desk.handle(Event::Tick, now);
        (desk, acts)
    }

    /// Has the disk take nothing, or take everything again.
    #[cfg(test)]
    pub(super) fn refuse(&mut self, is_refusing: bool) {
        self.journal.writes_left = if is_refusing { 0 } else { u32::MAX };
    }

    /// Whether the task is known.
    #[cfg(test)]
    pub(super) fn is_remembered(&self, task: TaskId) -> bool {
        self.tasks.knows(task)
    }

    /// How much is decided and not done.
    #[cfg(test)]
    pub(super) fn undone(&self) -> usize {
        self.pending.len()
    }

    /// Decides what is to be done about an event, writes it down, and says what to do.
    pub(crate) fn handle(&mut self, event: Event, now: Now) -> Vec<Act> {
        if self.turns_away(&event) {
            self.missed_orders = true;
            return Vec::new();
        }
        if matches!(event, Event::Disconnected) {
            // The next session sends it again, from what its manager has stored on.
            self.pending.retain(|effect| !is_send(effect));
        }
        let mut effects: VecDeque<Effect> = self.tasks.handle(event, now).into();
        let mut acts = Vec::new();
        while let Some(effect) = effects.pop_front() {
            match effect {
                // It waits for the disk to be begun: it has ended without that.
                Effect::Stop(task) if self.has_yet_to_begin(task) => {
                    self.pending
                        .retain(|effect| !matches!(effect, Effect::Start { task: of, .. } if *of == task));
                    let ended = Event::Finished(task, Outcome::Cancelled(None));
                    effects.extend(self.tasks.handle(ended, now));
                }
                // Needs no promise on disk, and must not wait for one.
                Effect::Stop(task) => acts.push(Act::Stop(task)),
                Effect::Restream if self.pending.contains(&Effect::Restream) => {}
                Effect::Persist(_)
                | Effect::SendReport(_)
                | Effect::SendLost { .. }
                | Effect::SendNotices { .. }
                | Effect::Start { .. }
                | Effect::Restream
                | Effect::Forget(_)
                | Effect::ForgetOutcome(_) => self.pending.push_back(effect),
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

    /// Whether who produces reports should wait. While a task that was told to stop has its say, nobody has to:
    /// it would be held up behind the others.
    pub(crate) fn is_held_up(&self) -> bool {
        self.trouble.is_some() || (self.tasks.is_full() && !self.tasks.is_stopping())
    }

    /// Whether it is an order of which nothing is known here, and there is no room to note it. Whatever a manager
    /// sends, what waits on disk and in memory stays bounded by that.
    fn turns_away(&self, event: &Event) -> bool {
        let task = match event {
            Event::Assigned(assign) => assign.task,
            Event::Cancelled(cancel) => cancel.task,
            Event::Detected(..)
            | Event::Treated(..)
            | Event::Finished(..)
            | Event::Vault { .. }
            | Event::Notice { .. }
            | Event::Connected { .. }
            | Event::Disconnected
            | Event::ReportsStored { .. }
            | Event::NoticesStored { .. }
            | Event::Unreadable { .. }
            | Event::Tick => return false,
        };
        (self.trouble.is_some() || self.tasks.is_full()) && !self.tasks.knows(task)
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

    fn has_yet_to_begin(&self, task: TaskId) -> bool {
        self.pending.iter().any(|effect| matches!(effect, Effect::Start { task: of, .. } if *of == task))
    }

    fn settle(&mut self, now: Now, acts: &mut Vec<Act>) {
        if let Err(error) = self.persist() {
            if self.trouble.is_none() {
                tracing::error!(%error, "Cannot write the journal; no task is taken until it can be written.");
            }
            self.trouble = Some(error.to_string());
            return;
        }
        while let Some(effect) = self.pending.pop_front() {
            match effect {
                Effect::Persist(_) => {}
                Effect::Stop(task) => acts.push(Act::Stop(task)),
                Effect::Start { task, spec, resumed } => acts.push(Act::Start { task, spec, resumed }),
                Effect::Forget(task) => {
                    self.journal.forget(Key::Ended(task));
                    self.journal.forget(Key::Outcome(task));
                }
                Effect::ForgetOutcome(task) => self.journal.forget(Key::Outcome(task)),
                Effect::SendReport(sequence) => match self.journal.report(sequence) {
                    Ok(frame) => acts.push(Act::Send(frame)),
                    Err(error) => {
                        tracing::error!(%error, sequence, "A report cannot be read again.");
                        // What comes after it must not go before the word that it is lost: it is sent again.
                        self.pending.retain(|effect| {
                            !matches!(effect, Effect::SendReport(_) | Effect::SendLost { .. })
                        });
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
                    // One that cannot be read again is left out; the others keep their numbers.
                    let mut numbers = first..first.saturating_add(u64::try_from(count).unwrap_or(0));
                    while let Some(first) = numbers.next() {
                        let Ok(notice) = self.journal.notice(first) else { continue };
                        let more = numbers.by_ref().map_while(|number| self.journal.notice(number).ok());
                        let notices = std::iter::once(notice).chain(more).collect();
                        let mut bytes = BytesMut::new();
                        if ToManager::from(Notices { first, notices }).encode(&mut bytes).is_ok() {
                            acts.push(Act::Send(bytes.to_vec()));
                        }
                    }
                }
                Effect::Restream => {
                    if let Err(error) = self.restream(now) {
                        if self.trouble.is_none() {
                            tracing::error!(%error, "Cannot begin another stream of reports.");
                        }
                        self.trouble = Some(error.to_string());
                        self.pending.push_front(Effect::Restream);
                        return;
                    }
                    tracing::warn!(
                        "The manager knows more of this agent's reports than the agent: they are numbered anew."
                    );
                    acts.push(Act::Reconnect);
                    return self.settle(now, acts);
                }
            }
        }
        if self.trouble.take().is_some() {
            tracing::info!("The journal can be written again.");
        }
        if self.missed_orders && self.tasks.has_room() {
            self.missed_orders = false;
            acts.push(Act::Reconnect);
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
    fn restream(&mut self, now: Now) -> io::Result<()> {
        let stream = fresh_stream();
        let outbox = self.journal.restream(stream)?;
        self.pending.retain(|effect| !is_send(effect));
        let effects = self.tasks.restreamed(stream, self.journal.epoch(), &outbox, now);
        self.pending.extend(effects);
        Ok(())
    }
}

fn is_send(effect: &Effect) -> bool {
    matches!(effect, Effect::SendReport(_) | Effect::SendLost { .. } | Effect::SendNotices { .. })
}

fn fresh_stream() -> StreamId {
    StreamId::new(Uuid::from_u128(random::<u128>()))
}
