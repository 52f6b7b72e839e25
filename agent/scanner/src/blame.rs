//! Which pattern is it that ends workers?
//!
//! A worker judges all patterns at once, so its death names an item and not a rule. This tries halves of the
//! set in workers of their own, on the item that was set aside last, until one pattern is left.
//!
//! **Invariant:** a pattern is named only if a worker that had no other one died of it, and one that had none at
//! all did not; and never for a file that becomes shorter while it is looked at.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use crossbeam_channel::RecvTimeoutError;

use crate::{
    check::COMPILE_TIME,
    pool::WorkerProgram,
    process::Worker,
    wire::{Answer, Order, Setup},
};

/// How much longer than its own limit the item may take.
const GRACE: Duration = Duration::from_secs(1);

/// The index of a pattern that ends a worker all by itself, on `item`, or on loading if there is none. Nothing
/// if a worker dies without any pattern, if it takes several patterns together, or once `stopped` says so.
/// Takes two workers for each halving of the set at most.
pub(crate) fn culprit(
    program: &WorkerProgram,
    setup: &Setup,
    item: Option<&OwnedFd>,
    stopped: &dyn Fn() -> bool,
) -> Option<usize> {
    if setup.patterns.is_empty() || ends_worker(program, setup, 0..0, item) {
        return None;
    }
    let mut suspects = 0..setup.patterns.len();
    if suspects.len() == 1 {
        return (!stopped() && ends_worker(program, setup, suspects, item)).then_some(0);
    }
    while suspects.len() > 1 {
        let middle = suspects.start + suspects.len() / 2;
        let halves = [suspects.start..middle, middle..suspects.end];
        suspects =
            halves.into_iter().find(|half| !stopped() && ends_worker(program, setup, half.clone(), item))?;
    }
    Some(suspects.start)
}

fn ends_worker(
    program: &WorkerProgram,
    setup: &Setup,
    patterns: std::ops::Range<usize>,
    item: Option<&OwnedFd>,
) -> bool {
    let mut setup = setup.clone();
    setup.patterns = setup.patterns.drain(patterns).collect();
    setup.threads = 1;
    let Ok(worker) = Worker::start(program, &setup) else { return false };
    let is_dead = match worker.answers.recv_timeout(COMPILE_TIME) {
        Ok(Answer::Ready { .. }) => item.is_some_and(|item| {
            let limit = Duration::from_millis(setup.limits.file_ms).saturating_add(GRACE);
            worker.send(&Order::Items(vec![0]), &[item.as_fd()]).is_err()
                || matches!(worker.answers.recv_timeout(limit), Err(RecvTimeoutError::Disconnected))
        }),
        Err(RecvTimeoutError::Disconnected) => true,
        Ok(Answer::Refused { .. } | Answer::Done { .. } | Answer::Measured { .. })
        | Err(RecvTimeoutError::Timeout) => false,
    };
    let ended = worker.kill();
    is_dead && !ended.has_lost_a_file
}
