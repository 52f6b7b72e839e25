//! Holds a scan to its share of one core and makes room when others wait.
//!
//! Between two files the walk waits. In the middle of a file its worker is stopped and goes on again, so that one
//! long file keeps to the share as well. The worker cannot do that for itself: one that a file has taken over would
//! not. Under pressure the share is halved, up to twice between files and once within one.
//!
//! The time that one file may take is wall time, in the worker as in the pool that watches it. It is stretched by as
//! much as the file can be held, so that a held scan skips nothing that another one would look at.
//!
//! **Invariant:** a worker is stopped only while a file is in hand: the first one loads its patterns, and the last one
//! ends, unheld.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{crews::Crews, pace::Pace, pressure::Ease, rein::Rein, thread_cpu};
use crate::platform::pressure::Gauges;

/// How soon the next file follows one that is looked at alone, at least.
const PAUSE: Duration = Duration::from_micros(200);
/// How soon it is looked again whether the worker may go on in the middle of a file.
const LOOK: Duration = Duration::from_millis(20);
/// The same between two files, at most: a look is paid for from the share, too.
const REST: Duration = Duration::from_millis(200);
/// How often the share is halved at most in the middle of a file.
const HALVINGS_WITHIN: u32 = 1;

/// What holds one scan.
#[derive(Debug)]
pub(super) struct Hold {
    percent: u8,
    started: Instant,
    gauges: Gauges,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pace: Pace,
    ease: Ease,
    rein: Rein,
    /// CPU time of the thread that walks, as it last said.
    walk: Duration,
}

impl Hold {
    /// To `percent` of one core, 1 to 100; the workers bear `mark`.
    pub(super) fn new(percent: u8, mark: &str) -> Self {
        let state = State {
            pace: Pace::new(percent),
            ease: Ease::default(),
            rein: Rein::new(mark),
            walk: Duration::ZERO,
        };
        let (started, gauges) = (Instant::now(), Gauges::find());
        Self { percent: percent.clamp(1, 100), started, gauges, state: Mutex::new(state) }
    }

    /// Whether this machine tells who waits.
    pub(super) fn knows_pressure(&self) -> bool {
        self.gauges.read().is_some()
    }

    /// The time limit of one file, in milliseconds, for one that is held as much as it may be.
    pub(super) fn stretched(&self, file_ms: u64) -> u64 {
        file_ms.saturating_mul(100 << HALVINGS_WITHIN) / u64::from(self.percent)
    }

    /// Waits, in the thread that walks, until nothing is in hand and the share allows to go on, or `stopped`.
    pub(super) fn wait(&self, crews: &Crews<'_>, is_busy: impl Fn() -> bool, stopped: impl Fn() -> bool) {
        let mut pause = PAUSE;
        while !stopped() {
            let wait = if is_busy() {
                // A file that takes long is not asked for all the time.
                pause = (pause + pause / 2).min(LOOK);
                pause
            } else {
                let mut state = self.lock();
                state.walk = thread_cpu();
                self.due(&mut state, crews, u32::MAX).min(REST)
            };
            if wait.is_zero() {
                return;
            }
            std::thread::sleep(wait);
        }
    }

    /// Stops the worker that has used up its share in the middle of a file, or lets it go on. Returns how soon to do
    /// so again.
    pub(super) fn turn(&self, crews: &Crews<'_>, is_busy: impl Fn() -> bool) -> Duration {
        let mut state = self.lock();
        if is_busy() && !self.due(&mut state, crews, HALVINGS_WITHIN).is_zero() {
            state.rein.stop();
        } else {
            state.rein.go();
        }
        // The file may have ended meanwhile; what is not busy must be able to end.
        if !is_busy() {
            state.rein.go();
        }
        LOOK
    }

    /// A worker was started and has loaded its patterns.
    pub(super) fn take_up(&self) {
        self.lock().rein.take_up();
    }

    /// Lets the worker go on for good.
    pub(super) fn let_go(&self) {
        self.lock().rein.go();
    }

    /// How long the scan has to wait until its share is not used up any more.
    fn due(&self, state: &mut State, crews: &Crews<'_>, most_halvings: u32) -> Duration {
        let elapsed = self.started.elapsed();
        let halvings = state.ease.halvings(elapsed, || self.gauges.read()).min(most_halvings);
        // What the pool has seen comes late; what the rein sees lacks workers that were never stopped.
        let workers = state.rein.cpu().max(Duration::from_millis(crews.cpu_ms()));
        state.pace.wait(elapsed, workers.saturating_add(state.walk), halvings)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_limit_grows_by_as_much_as_a_file_is_held() {
        for (percent, expected) in [(100, 2000), (50, 4000), (10, 20_000), (1, 200_000)] {
            assert_eq!(Hold::new(percent, "").stretched(1000), expected);
        }
        assert!(Hold::new(1, "").stretched(u64::MAX) > 1 << 56, "an endless limit stays one");
    }
}
