//! Who is connected here: memory only, never a second truth.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tm_protocol::{
    ids::{EndpointId, TaskId},
    message::{Progress, ToAgent},
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::metrics::METRICS;

/// Messages that wait for one agent. Beyond it the dispatcher tries again later.
const OUTBOX: usize = 64;

/// Tasks of one agent whose progress waits for the flush; an agent carries out fewer at a time.
const TASKS: usize = 16;

/// How long a conflict about one identity is not reported again.
const CONFLICT: Duration = Duration::from_secs(3600);

/// Every session of this manager.
#[derive(Debug, Clone, Default)]
pub(crate) struct Registry {
    inner: Arc<Mutex<Inner>>,
    /// Wakes the dispatcher.
    pub(crate) nudge: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Inner {
    sessions: HashMap<EndpointId, Handle>,
    seen: HashSet<EndpointId>,
    /// Bulk links, by endpoint: a number and what ends each.
    bulk: HashMap<EndpointId, Vec<(u64, CancellationToken)>>,
    next_bulk: u64,
    /// When a conflict about an identity was last reported. Only enrolled ones get here.
    conflicts: HashMap<EndpointId, Instant>,
    /// The newest of each task, by endpoint: what one says of another's task stays its own.
    progress: HashMap<EndpointId, Vec<Progress>>,
}

impl Inner {
    /// Shows how many are connected.
    fn count(&self) {
        METRICS.agents_connected.set(i64::try_from(self.sessions.len()).unwrap_or(i64::MAX));
    }
}

#[derive(Debug)]
struct Handle {
    epoch: i64,
    process_nonce: u64,
    outbox: mpsc::Sender<Command>,
    sent: HashSet<TaskId>,
}

/// What the manager's other rooms ask of a session.
#[derive(Debug)]
pub(crate) enum Command {
    /// Boxed: each session has room for many commands, and most sessions have none.
    Send(Box<ToAgent>),
    /// Answers if its agent does, within the time it takes to ask.
    AreYouThere(oneshot::Sender<()>),
    /// A newer session has taken its place.
    GiveWay,
    /// Its agent was shut out for ever.
    ShutOut,
}

/// A bulk link's place.
#[derive(Debug)]
pub(crate) struct BulkPlace {
    registry: Registry,
    endpoint: EndpointId,
    number: u64,
    cut: CancellationToken,
}

impl BulkPlace {
    /// Returns when the link is to end.
    pub(crate) async fn cut(&self) {
        self.cut.cancelled().await;
    }
}

impl Drop for BulkPlace {
    fn drop(&mut self) {
        let mut inner = self.registry.lock();
        if let Some(links) = inner.bulk.get_mut(&self.endpoint) {
            links.retain(|(number, _)| *number != self.number);
            if links.is_empty() {
                inner.bulk.remove(&self.endpoint);
            }
        }
    }
}

impl Registry {
    pub(crate) fn new(nudge: Arc<Notify>) -> Self {
        Self { inner: Arc::default(), nudge }
    }

    /// The commands of the session that stands for `endpoint` now, and the nonce of its agent's process.
    pub(crate) fn standing(&self, endpoint: EndpointId) -> Option<(mpsc::Sender<Command>, u64)> {
        self.lock().sessions.get(&endpoint).map(|handle| (handle.outbox.clone(), handle.process_nonce))
    }

    /// Enters a session in place of any other.
    pub(crate) fn enter(
        &self,
        endpoint: EndpointId,
        epoch: i64,
        process_nonce: u64,
    ) -> mpsc::Receiver<Command> {
        let (outbox, commands) = mpsc::channel(OUTBOX);
        let handle = Handle { epoch, process_nonce, outbox, sent: HashSet::new() };
        let mut inner = self.lock();
        if let Some(older) = inner.sessions.insert(endpoint, handle) {
            // A full outbox belongs to a session that is stuck; its own time-out ends it.
            let _ = older.outbox.try_send(Command::GiveWay);
        }
        METRICS.sessions.inc();
        inner.count();
        drop(inner);
        self.nudge.notify_one();
        commands
    }

    /// Takes a session out, unless a newer one has its place.
    pub(crate) fn leave(&self, endpoint: EndpointId, epoch: i64) {
        let mut inner = self.lock();
        if inner.sessions.get(&endpoint).is_some_and(|handle| handle.epoch == epoch) {
            inner.sessions.remove(&endpoint);
            inner.count();
        }
    }

    /// Ends the session of an agent that was shut out. `false` if it must be tried again.
    pub(crate) fn shut_out(&self, endpoint: EndpointId) -> bool {
        let inner = self.lock();
        inner.sessions.get(&endpoint).is_none_or(|handle| handle.outbox.try_send(Command::ShutOut).is_ok())
    }

    /// Ends a session that is older than the `epoch`th of its endpoint: that one stands elsewhere.
    pub(crate) fn give_way(&self, endpoint: EndpointId, epoch: i64) {
        let inner = self.lock();
        if let Some(older) = inner.sessions.get(&endpoint).filter(|handle| handle.epoch < epoch) {
            // A full outbox belongs to a session that is stuck; its own time-out ends it.
            let _ = older.outbox.try_send(Command::GiveWay);
        }
    }

    /// Every session here: whose, and the number that its endpoint's row counted for it.
    pub(crate) fn sessions(&self) -> Vec<(EndpointId, i64)> {
        self.lock().sessions.iter().map(|(endpoint, handle)| (*endpoint, handle.epoch)).collect()
    }

    /// Whether no conflict about this identity was reported within the last hour; one is then taken for reported.
    pub(crate) fn is_new_conflict(&self, endpoint: EndpointId, now: Instant) -> bool {
        let mut inner = self.lock();
        inner.conflicts.retain(|_, at| now.duration_since(*at) < CONFLICT);
        match inner.conflicts.entry(endpoint) {
            Entry::Occupied(_) => false,
            Entry::Vacant(place) => {
                place.insert(now);
                true
            }
        }
    }

    /// Enters a bulk link. It is taken out when the place is dropped.
    pub(crate) fn enter_bulk(&self, endpoint: EndpointId) -> BulkPlace {
        let cut = CancellationToken::new();
        let mut inner = self.lock();
        let number = inner.next_bulk;
        inner.next_bulk = number.wrapping_add(1);
        inner.bulk.entry(endpoint).or_default().push((number, cut.clone()));
        drop(inner);
        BulkPlace { registry: self.clone(), endpoint, number, cut }
    }

    /// Ends the bulk links of an endpoint.
    pub(crate) fn cut_bulk(&self, endpoint: EndpointId) {
        for (_, cut) in self.lock().bulk.get(&endpoint).into_iter().flatten() {
            cut.cancel();
        }
    }

    /// How many are connected here.
    pub(crate) fn count(&self) -> usize {
        self.lock().sessions.len()
    }

    /// Tells every agent that is connected here. Whoever has no room for it is told in its next session.
    pub(crate) fn tell_all(&self, message: &ToAgent) {
        for handle in self.lock().sessions.values() {
            let _ = handle.outbox.try_send(Command::Send(Box::new(message.clone())));
        }
    }

    /// Tells an agent that is connected here. One that has no room for it, or is not here, is told when it is told again.
    pub(crate) fn tell(&self, endpoint: EndpointId, message: &ToAgent) {
        if let Some(handle) = self.lock().sessions.get(&endpoint) {
            let _ = handle.outbox.try_send(Command::Send(Box::new(message.clone())));
        }
    }

    /// Everyone who is connected here.
    pub(crate) fn connected(&self) -> Vec<EndpointId> {
        self.lock().sessions.keys().copied().collect()
    }

    /// Those of `endpoints` that are connected here.
    pub(crate) fn connected_among(
        &self,
        endpoints: impl IntoIterator<Item = EndpointId>,
    ) -> HashSet<EndpointId> {
        let inner = self.lock();
        endpoints.into_iter().filter(|endpoint| inner.sessions.contains_key(endpoint)).collect()
    }

    /// Sends an order, once a session. `false` if it must be tried again.
    pub(crate) fn assign(&self, endpoint: EndpointId, task: TaskId, message: ToAgent) -> bool {
        let mut inner = self.lock();
        let Some(handle) = inner.sessions.get_mut(&endpoint) else { return false };
        if handle.sent.contains(&task) {
            return true;
        }
        let sent = handle.outbox.try_send(Command::Send(Box::new(message))).is_ok();
        if sent {
            handle.sent.insert(task);
        }
        sent
    }

    /// Whether an order went out in the present session.
    pub(crate) fn was_sent(&self, endpoint: EndpointId, task: TaskId) -> bool {
        self.lock().sessions.get(&endpoint).is_some_and(|handle| handle.sent.contains(&task))
    }

    /// Notes that an agent was heard, for the next flush.
    pub(crate) fn saw(&self, endpoint: EndpointId) {
        self.lock().seen.insert(endpoint);
    }

    /// Notes progress, for the next flush. Only the newest of each task is kept, and of the newest tasks.
    pub(crate) fn progressed(&self, endpoint: EndpointId, progress: Progress) {
        let mut inner = self.lock();
        let known = inner.progress.entry(endpoint).or_default();
        known.retain(|older| older.task != progress.task);
        if known.len() >= TASKS {
            known.remove(0);
        }
        known.push(progress);
    }

    /// Takes what is to be flushed.
    pub(crate) fn take_progress(&self) -> Vec<(EndpointId, Progress)> {
        let taken = std::mem::take(&mut self.lock().progress);
        taken.into_iter().flat_map(|(endpoint, all)| all.into_iter().map(move |p| (endpoint, p))).collect()
    }

    /// Takes who was heard since the last time.
    pub(crate) fn take_seen(&self) -> Vec<EndpointId> {
        std::mem::take(&mut self.lock().seen).into_iter().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // No holder can leave it half-changed: every change is one insert or remove.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
