//! Keeps a worker process busy and outlives whatever happens to it.

use std::path::PathBuf;

use tm_patterns::{Pattern, Problem};
use tm_protocol::task::ScanLimits;

use crate::item::{Item, ItemResult};

/// The program to start as a worker: normally this very executable with its hidden `scan-worker` verb.
#[derive(Debug, Clone)]
pub struct WorkerProgram {
    /// What to execute.
    pub path: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
}

impl WorkerProgram {
    /// This very program: `/proc/self/exe scan-worker` (works while the file on disk is being replaced).
    pub fn this() -> Self {
        Self { path: PathBuf::from("/proc/self/exe"), args: vec!["scan-worker".to_owned()] }
    }
}

/// How a pool works.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Scanning threads in the worker, at least 1.
    pub threads: usize,
    /// How far to go with one file.
    pub limits: ScanLimits,
    /// Niceness of the worker, 0 to 19.
    pub nice: i32,
}

/// Why there is no pool.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The rules are wrong.
    #[error("pattern `{name}` does not compile")]
    Refused {
        /// Which pattern.
        name: String,
        /// Where and why.
        problems: Vec<Problem>,
    },
    /// The worker died or hung while it loaded the patterns.
    #[error("the scan worker {0} while it loaded the patterns")]
    Load(&'static str),
    /// No worker could be started.
    #[error("cannot start a scan worker")]
    Start(#[source] std::io::Error),
}

/// A worker process and what it has in hand.
pub struct ScanPool {}

impl ScanPool {
    /// Starts a worker with `patterns` compiled in it. Results come out of the receiver, one for every item
    /// submitted, in any order; it ends after [`ScanPool::finish`] or [`ScanPool::cancel`].
    ///
    /// # Errors
    /// If no worker starts or the patterns do not load.
    pub fn start(
        _program: &WorkerProgram,
        _patterns: &[Pattern],
        _options: PoolOptions,
    ) -> Result<(Self, crossbeam_channel::Receiver<ItemResult>), StartError> {
        unimplemented!("written by the scanner room")
    }

    /// Hands over one item; blocks while 256 wait. The caller must be draining results meanwhile. After
    /// [`ScanPool::cancel`] items are dropped.
    pub fn submit(&self, _item: Item) {
        unimplemented!("written by the scanner room")
    }

    /// No more items will come; results keep coming until all are in.
    pub fn finish(&self) {
        unimplemented!("written by the scanner room")
    }

    /// Kills the worker; the receiver ends soon. May be called from any thread.
    pub fn cancel(&self) {
        unimplemented!("written by the scanner room")
    }

    /// CPU time of all workers of this pool so far, user and system, in milliseconds.
    pub fn cpu_ms(&self) -> u64 {
        unimplemented!("written by the scanner room")
    }
}
