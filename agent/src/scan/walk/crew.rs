//! The thread that does the steps of a walk, and how it is left behind when one of them does not return.
//!
//! **Invariant:** whoever asks for what was found waits no longer than asked, whatever the file system does.
//! **Invariant:** at most [`MOST`] walking threads live in this process, those that hang included.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Found,
    job::{Hands, thread},
    state::State,
};

/// Most threads in this process that may be in a step.
const MOST: usize = 16;
/// Finds that wait to be taken; the walk waits while there are more. A listing may add some hundred names that
/// need no step.
const FULL: usize = 64;
/// Finds that are worth waking somebody for.
const WORTH: usize = 16;

/// A walk and who works on it.
#[derive(Debug)]
pub(super) struct Crew {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    walk: Mutex<Walk>,
    ready: Condvar,
    room: Condvar,
}

#[derive(Debug)]
struct Walk {
    state: State,
    /// Which thread may go on; one with another number is no longer wanted.
    turn: u64,
    /// Number of the step at hand, and since when it is done.
    step: u64,
    since: Option<Instant>,
    ended: bool,
    cpu: Duration,
}

/// What was found since the last time.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) found: Vec<Found>,
    /// There will be no more.
    pub(super) ended: bool,
    /// The step at hand and how long it has been done.
    pub(super) step: Option<(u64, Duration)>,
}

/// There are no more threads to be had.
#[derive(Debug)]
pub(super) struct Exhausted;

impl From<io::Error> for Exhausted {
    fn from(_: io::Error) -> Self {
        Self
    }
}

impl Crew {
    /// Begins a walk.
    ///
    /// # Errors
    /// If there is no thread for it; [`Crew::give_up`] then says so of the walk.
    pub(super) fn new(state: State) -> (Self, Result<(), Exhausted>) {
        let walk = Walk { state, turn: 0, step: 0, since: None, ended: false, cpu: Duration::ZERO };
        let shared = Shared { walk: Mutex::new(walk), ready: Condvar::new(), room: Condvar::new() };
        let crew = Self { shared: Arc::new(shared) };
        let started = crew.start(0);
        (crew, started)
    }

    /// Takes what was found, after at most `wait`.
    pub(super) fn take(&self, wait: Duration) -> Taken {
        let mut walk = self.shared.lock();
        if walk.state.found.is_empty() && !walk.ended {
            walk = self.shared.ready.wait_timeout(walk, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        let found = std::mem::take(&mut walk.state.found);
        if found.len() >= FULL {
            self.shared.room.notify_one();
        }
        let step = walk.since.map(|since| (walk.step, since.elapsed()));
        Taken { found, ended: walk.ended, step }
    }

    /// Leaves `step` behind with its thread, if it is still being done, and goes on with another thread.
    ///
    /// # Errors
    /// If there is none; the walk then waits for nobody.
    pub(super) fn pass_over(&self, step: u64) -> Result<(), Exhausted> {
        let turn = {
            let mut walk = self.shared.lock();
            if walk.step != step || walk.since.is_none() {
                return Ok(());
            }
            walk.turn += 1;
            walk.since = None;
            walk.state.pass_over();
            walk.turn
        };
        self.start(turn)
    }

    /// Ends the walk; what it did not come to is named with `reason`.
    pub(super) fn give_up(&self, reason: tm_protocol::report::SkipReason) {
        let mut walk = self.shared.lock();
        walk.turn += 1;
        walk.since = None;
        walk.state.give_up(reason);
        walk.ended = true;
    }

    /// CPU time of the threads so far; what a thread that hangs took since its last listing is not in it.
    pub(super) fn cpu(&self) -> Duration {
        self.shared.lock().cpu
    }

    fn start(&self, turn: u64) -> Result<(), Exhausted> {
        let living = Living::new().ok_or(Exhausted)?;
        let shared = Arc::clone(&self.shared);
        thread(move || {
            shared.work(turn);
            drop(living);
        })?;
        Ok(())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        // A thread that is between two steps ends now, one that hangs when it comes back.
        self.shared.lock().turn += 1;
        self.shared.room.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Walk> {
        self.walk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, turn: u64) {
        let mut hands = Hands::new();
        let mut done = None;
        let mut counted = thread_cpu();
        loop {
            let (job, closing) = {
                let mut walk = self.lock();
                if walk.turn != turn {
                    return;
                }
                walk.since = None;
                if let Some(outcome) = done.take() {
                    walk.state.apply(outcome);
                }
                if walk.state.found.len() >= WORTH {
                    self.ready.notify_one();
                }
                while walk.state.found.len() >= FULL {
                    walk = self.room.wait(walk).unwrap_or_else(PoisonError::into_inner);
                    if walk.turn != turn {
                        return;
                    }
                }
                let job = walk.state.next();
                if job.as_ref().is_none_or(|job| job.is_long()) {
                    let now = thread_cpu();
                    walk.cpu += now.saturating_sub(counted);
                    counted = now;
                }
                if job.is_none() {
                    walk.ended = true;
                    self.ready.notify_one();
                } else {
                    walk.step += 1;
                    walk.since = Some(Instant::now());
                }
                (job, std::mem::take(&mut walk.state.closing))
            };
            // Closing may block as well, and is part of the step.
            drop(closing);
            match job {
                Some(job) => done = Some(job.perform(&mut hands)),
                None => return,
            }
        }
    }
}

/// One of the threads that may live.
#[derive(Debug)]
pub(super) struct Living(());

static LIVING: AtomicUsize = AtomicUsize::new(0);

impl Living {
    /// `None` if there are too many.
    pub(super) fn new() -> Option<Self> {
        let more = |living: usize| (living < MOST).then_some(living + 1);
        LIVING.try_update(Ordering::AcqRel, Ordering::Acquire, more).ok().map(|_| Self(()))
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        LIVING.fetch_sub(1, Ordering::AcqRel);
    }
}

/// CPU time of the calling thread so far.
fn thread_cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}
