//! Who looks at the files of a scan: a worker of this process, or somebody who has one.

use std::fmt::Debug;

use crossbeam_channel::Receiver;
use tm_patterns::Pattern;
use tm_scanner::{
    item::{Item, ItemResult},
    pool::{PoolOptions, ScanPool, StartError, WorkerProgram},
    sandbox::PartState,
};

/// Where workers come from.
pub(crate) trait Hire: Debug + Send + Sync {
    /// Workers that look for `patterns` (of ours, if they are ours, `program` is started), and their results: one for every file submitted, in any order.
    ///
    /// # Errors
    /// If there are none, or the patterns do not load.
    fn hire(
        &self,
        program: &WorkerProgram,
        patterns: &[Pattern],
        options: &PoolOptions,
    ) -> Result<(Box<dyn Workers>, Receiver<ItemResult>), StartError>;
}

/// Workers at work. Dropped, they end.
pub(crate) trait Workers: Debug + Send + Sync {
    /// Hands over one file; blocks while too many wait.
    fn submit(&self, item: Item);
    /// No more files will come.
    fn finish(&self);
    /// Ends them now.
    fn cancel(&self);
    /// What is in force of their sandbox.
    fn sandbox(&self) -> &[PartState];
    /// The name of a pattern that ended worker after worker.
    fn lethal_pattern(&self) -> Option<&str>;
    /// Their CPU time so far, in milliseconds.
    fn cpu_ms(&self) -> u64;
}

/// Starts a worker process for each scan.
#[derive(Debug)]
pub(crate) struct OwnWorker;

impl Hire for OwnWorker {
    fn hire(
        &self,
        program: &WorkerProgram,
        patterns: &[Pattern],
        options: &PoolOptions,
    ) -> Result<(Box<dyn Workers>, Receiver<ItemResult>), StartError> {
        let (pool, results) = ScanPool::start(program, patterns, options.clone())?;
        Ok((Box::new(pool), results))
    }
}

impl Workers for ScanPool {
    fn submit(&self, item: Item) {
        Self::submit(self, item);
    }

    fn finish(&self) {
        Self::finish(self);
    }

    fn cancel(&self) {
        Self::cancel(self);
    }

    fn sandbox(&self) -> &[PartState] {
        Self::sandbox(self)
    }

    fn lethal_pattern(&self) -> Option<&str> {
        Self::lethal_pattern(self)
    }

    fn cpu_ms(&self) -> u64 {
        Self::cpu_ms(self)
    }
}
