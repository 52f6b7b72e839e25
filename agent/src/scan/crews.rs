//! The scan workers of one scan: one for all patterns, one for those that most known files have yet to meet, each
//! started when the first file needs it.
//!
//! **Invariant:** a worker's results are taken for as long as it gives any, whoever waits for what.

use std::{
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{Scope, ScopedJoinHandle},
    time::Duration,
};

use tm_patterns::Pattern;
use tm_scanner::{
    item::{Item, ItemResult},
    pool::{PoolOptions, StartError, WorkerProgram},
    sandbox::PartState,
};

use super::{
    hire::{Hire, Workers},
    thread_cpu,
};

/// Which patterns a file is to be looked at with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum With {
    /// All of them.
    All,
    /// The rest.
    Rest,
}

/// The workers of one scan.
#[derive(Debug)]
pub(super) struct Crews<'a> {
    all: &'a [Pattern],
    rest: Vec<Pattern>,
    program: WorkerProgram,
    options: PoolOptions,
    hire: &'a dyn Hire,
    pools: [OnceLock<Box<dyn Workers>>; 2],
    /// What went wrong, first.
    failure: Mutex<Option<Option<StartError>>>,
    ending: AtomicBool,
}

/// Takes the results of a worker; its CPU time comes at the end.
pub(super) type Taker<'scope> = ScopedJoinHandle<'scope, Duration>;

impl<'a> Crews<'a> {
    /// None started; `program` is what to start, where workers of our own are hired.
    pub(super) fn new(
        all: &'a [Pattern],
        rest: Vec<Pattern>,
        program: WorkerProgram,
        options: PoolOptions,
        hire: &'a dyn Hire,
    ) -> Self {
        let (pools, failure) = ([OnceLock::new(), OnceLock::new()], Mutex::new(None));
        Self { all, rest, program, options, hire, pools, failure, ending: AtomicBool::new(false) }
    }

    /// Whether there are patterns that most known files have yet to meet.
    pub(super) fn has_rest(&self) -> bool {
        !self.rest.is_empty()
    }

    /// Whether the worker for `with` has been started.
    pub(super) fn runs(&self, with: With) -> bool {
        self.of(with).0.get().is_some()
    }

    /// Starts the worker for `with` unless it runs, and has its results taken by `take` in a thread of its own.
    /// To be called from one thread only.
    ///
    /// # Errors
    /// If no worker starts or the patterns do not load.
    pub(super) fn start<'scope, 'env>(
        &'env self,
        with: With,
        scope: &'scope Scope<'scope, 'env>,
        take: impl Fn(ItemResult) + Send + 'scope,
    ) -> Result<Option<Taker<'scope>>, StartError> {
        let (pool, patterns) = self.of(with);
        if pool.get().is_some() {
            return Ok(None);
        }
        let (started, results) = self.hire.hire(&self.program, patterns, &self.options)?;
        if pool.set(started).is_err() {
            return Ok(None);
        }
        Ok(Some(scope.spawn(move || {
            let _guard = GiveUpOnPanic(self);
            results.iter().for_each(take);
            if !self.ending.load(Ordering::Acquire) {
                // It ended before it was told to: nothing takes what the walk still finds.
                self.give_up(None);
            }
            thread_cpu()
        })))
    }

    /// Hands a file over; the worker must have been started.
    pub(super) fn submit(&self, with: With, item: Item) {
        if let Some(pool) = self.of(with).0.get() {
            pool.submit(item);
        }
    }

    /// No more files will come.
    pub(super) fn finish(&self) {
        self.ending.store(true, Ordering::Release);
        self.running().for_each(Workers::finish);
    }

    /// Ends the workers now.
    pub(super) fn cancel(&self) {
        self.ending.store(true, Ordering::Release);
        self.running().for_each(Workers::cancel);
    }

    /// Ends the workers, because one could not be started or has failed.
    pub(super) fn give_up(&self, error: Option<StartError>) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.cancel();
    }

    /// Whether it was given up.
    pub(super) fn is_given_up(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// What could not be started, if it was given up; `None` inside: a worker failed on its way.
    pub(super) fn failure(&self) -> Option<Option<StartError>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What is in force of the workers' sandbox; they all have the same.
    pub(super) fn sandbox(&self) -> &[PartState] {
        self.running().next().map(Workers::sandbox).unwrap_or_default()
    }

    /// The name of a pattern that ended worker after worker.
    pub(super) fn lethal_pattern(&self) -> Option<String> {
        self.running().find_map(Workers::lethal_pattern).map(str::to_owned)
    }

    /// CPU time of the workers so far, in milliseconds.
    pub(super) fn cpu_ms(&self) -> u64 {
        self.running().map(Workers::cpu_ms).sum()
    }

    fn running(&self) -> impl Iterator<Item = &dyn Workers> {
        self.pools.iter().filter_map(|pool| Some(&**pool.get()?))
    }

    fn of(&self, with: With) -> (&OnceLock<Box<dyn Workers>>, &[Pattern]) {
        let [all, rest] = &self.pools;
        match with {
            With::All => (all, self.all),
            With::Rest => (rest, &self.rest),
        }
    }
}

/// Ends the workers' input however the walk ends, so that the results end too.
#[derive(Debug)]
pub(super) struct FinishOnDrop<'a, 'p>(pub(super) &'a Crews<'p>);

impl Drop for FinishOnDrop<'_, '_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

/// Frees a walk that waits for a worker if the thread that takes the results panics.
struct GiveUpOnPanic<'a, 'p>(&'a Crews<'p>);

impl Drop for GiveUpOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.give_up(None);
        }
    }
}
