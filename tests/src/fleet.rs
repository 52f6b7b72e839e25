//! What simulated agents have in common: how they are counted, when they come back, and that all are cut at once.
//!
//! **Invariant:** sums are kept as things happen, so that looking at them costs the same for ten thousand agents as
//! for one.

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};
use tm_protocol::ids::EndpointId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Agents that belong together.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// What they have come to.
    pub totals: Arc<Totals>,
    /// When they come back.
    pub pace: Pace,
    cut: Arc<watch::Sender<u64>>,
    doors: Arc<Semaphore>,
}

/// How soon an agent tries again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Within a quarter of a second, for tests.
    Quick,
    /// As the real agent: after one to two seconds, then ever later with full jitter, up to five minutes.
    Agent,
}

impl Pace {
    /// How long `endpoint` waits before its next attempt, after `failures` in a row that came to nothing. Spread by
    /// who it is, so that a thousand of them do not come back in step.
    #[must_use]
    pub fn wait(self, endpoint: EndpointId, attempt: u64, failures: u32) -> Duration {
        let mixed = (endpoint.uuid().as_u128() ^ u128::from(attempt))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        let chance = f64::from(u32::try_from(mixed >> 96).unwrap_or(0)) / f64::from(u32::MAX);
        match self {
            Self::Quick => Duration::from_millis(50) + Duration::from_millis(200).mul_f64(chance),
            Self::Agent => {
                let first = Duration::from_secs(1);
                let ceiling = first.saturating_mul(2_u32.saturating_pow(failures.saturating_add(1)));
                first.max(ceiling.min(Duration::from_secs(300)).mul_f64(chance))
            }
        }
    }
}

impl Fleet {
    /// A fleet of nobody yet.
    #[must_use]
    pub fn new(pace: Pace) -> Self {
        Self {
            totals: Arc::default(),
            pace,
            cut: Arc::new(watch::Sender::new(0)),
            doors: Arc::new(Semaphore::new(Semaphore::MAX_PERMITS / 2)),
        }
    }

    /// The same, of which so many at a time open a session; the others wait for their turn.
    #[must_use]
    pub fn opening(self, at_a_time: usize) -> Self {
        Self { doors: Arc::new(Semaphore::new(at_a_time)), ..self }
    }

    /// Lets any number open a session at a time from here on.
    pub fn open_all(&self) {
        self.doors.add_permits(Semaphore::MAX_PERMITS / 2 - self.doors.available_permits());
    }

    /// Ends every session at once, without a word.
    pub fn cut(&self) {
        self.cut.send_modify(|count| *count += 1);
    }

    pub(crate) fn cuts(&self) -> watch::Receiver<u64> {
        self.cut.subscribe()
    }

    pub(crate) async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.doors).acquire_owned().await.ok()
    }
}

/// Sums over a fleet.
#[derive(Default)]
pub struct Totals {
    connected: AtomicU64,
    sessions: AtomicU64,
    broken: AtomicU64,
    refused: AtomicU64,
    tasks: AtomicU64,
    repeated: AtomicU64,
    done: AtomicU64,
    last_connected_ms: AtomicU64,
    last_task_ms: AtomicU64,
    last_done_ms: AtomicU64,
    last_end: Mutex<String>,
}

/// The sums at a moment. Times are in milliseconds since 1970, 0 if there was none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums {
    /// Agents that have a session.
    pub connected: u64,
    /// Sessions there have been.
    pub sessions: u64,
    /// Sessions that ended and were not cut on purpose.
    pub broken: u64,
    /// Attempts that came to no session.
    pub refused: u64,
    /// Tasks that came, each counted once.
    pub tasks: u64,
    /// How often a task came again.
    pub repeated: u64,
    /// Tasks whose end the manager has acknowledged.
    pub done: u64,
    /// When the last session was opened.
    pub last_connected_ms: u64,
    /// When the last task came.
    pub last_task_ms: u64,
    /// When the last end was acknowledged.
    pub last_done_ms: u64,
    /// Why a session ended last, or did not begin.
    pub last_end: String,
}

impl Totals {
    /// The sums now.
    #[must_use]
    pub fn sums(&self) -> Sums {
        let of = |count: &AtomicU64| count.load(Ordering::Acquire);
        Sums {
            connected: of(&self.connected),
            sessions: of(&self.sessions),
            broken: of(&self.broken),
            refused: of(&self.refused),
            tasks: of(&self.tasks),
            repeated: of(&self.repeated),
            done: of(&self.done),
            last_connected_ms: of(&self.last_connected_ms),
            last_task_ms: of(&self.last_task_ms),
            last_done_ms: of(&self.last_done_ms),
            last_end: self.last_end.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    pub(crate) fn connected(&self) {
        // The time first, here and below: whoever sees the count sees the time of it.
        self.last_connected_ms.fetch_max(now_ms(), Ordering::Release);
        self.sessions.fetch_add(1, Ordering::Release);
        self.connected.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn away(&self) {
        self.connected.fetch_sub(1, Ordering::Release);
    }

    pub(crate) fn ended(&self, was_open: bool, why: &io::Error) {
        let count = if was_open { &self.broken } else { &self.refused };
        count.fetch_add(1, Ordering::Release);
        *self.last_end.lock().unwrap_or_else(PoisonError::into_inner) = why.to_string();
    }

    pub(crate) fn assigned(&self, is_first: bool) {
        self.last_task_ms.fetch_max(now_ms(), Ordering::Release);
        let count = if is_first { &self.tasks } else { &self.repeated };
        count.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn done(&self) {
        self.last_done_ms.fetch_max(now_ms(), Ordering::Release);
        self.done.fetch_add(1, Ordering::Release);
    }
}

impl fmt::Debug for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.sums().fmt(f)
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
