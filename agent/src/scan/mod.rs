//! Looks at files: walks the paths of an order, hands what it finds to a scan worker, keeps the receipt.
//!
//! [`run`] serves a task; [`standalone`] is the same for a person at the endpoint, without a manager.
//!
//! **Invariant:** every file that a walk finds ends in the receipt, as looked at or as skipped with a reason.
//! **Invariant:** this process opens files and never reads their content; the worker does.

mod batch;
mod ledger;
mod links;
mod pace;
pub(crate) mod standalone;
mod walk;

use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use tm_patterns::{Pattern, Problem};
use tm_protocol::{
    report::{Coverage, Detection, Failure, PathBytes, Skipped},
    task::{ScanLimits, ScanOptions},
};
use tm_scanner::{
    item::{Item, ItemResult},
    pool::{PoolOptions, ScanPool, StartError, WorkerProgram},
};

use crate::{
    platform::fs::Object,
    scan::{batch::Batch, ledger::Ledger, pace::Pace, walk::Found},
};

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long one call to a file system may take, unless one file may take less.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a cancel may go unnoticed while no result comes.
const CANCEL_EVERY: Duration = Duration::from_millis(100);
/// How soon the next file follows one that is looked at alone.
const PAUSE: Duration = Duration::from_micros(200);
/// How soon a scan that is held to a share of a core looks whether it may go on.
const HELD: Duration = Duration::from_millis(20);

/// Where to look, with what, and how.
#[derive(Debug)]
pub(crate) struct Order {
    /// Files and folders.
    pub(crate) paths: Vec<PathBytes>,
    /// What to look for.
    pub(crate) patterns: Vec<Pattern>,
    /// How far to go with one file.
    pub(crate) limits: ScanLimits,
    /// How to go about it. A share of a core means one file at a time, whatever `threads` says.
    pub(crate) options: ScanOptions,
    /// Scanning threads in the worker, at least 1.
    pub(crate) threads: usize,
    /// Niceness of the worker, 0 to 19.
    pub(crate) nice: i32,
}

impl Order {
    /// A scan on all cores that yields to whatever else the endpoint does and stays on the paths' file systems.
    pub(crate) fn new(paths: Vec<PathBytes>, patterns: Vec<Pattern>, limits: ScanLimits) -> Self {
        let options = ScanOptions::default();
        Self { paths, patterns, limits, options, threads: all_cores(), nice: 10 }
    }
}

/// As many scanning threads as there are cores to run them.
pub(crate) fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

/// What a scan tells on its way.
#[derive(Debug)]
pub(crate) enum Update {
    /// Something matched, in these objects on disk: at most 64 detections and about 128 KiB at a time.
    Detections(Vec<(Detection, Object)>),
    /// How far it has come; at most once a second.
    Progress {
        /// Files looked at.
        files: u64,
        /// Bytes of those files on disk.
        bytes: u64,
        /// Detections so far.
        detections: u64,
        /// Things skipped so far.
        skipped: u64,
    },
}

/// Carries out `order` and tells `sink` on the way; the receipt comes last. A sink that blocks holds the scan
/// up. Once `cancel` is set the scan ends soon, and the receipt says what was looked at until then.
///
/// # Errors
/// `path-refused` if a path is missing or leads through a link, `pattern-refused` if rules do not compile,
/// `worker-failed` if there is no worker to look at files.
pub(crate) fn run(
    order: Order,
    mut sink: impl FnMut(Update) + Send,
    cancel: &AtomicBool,
) -> Result<Coverage, Failure> {
    let mut batch = Batch::default();
    let coverage = run_with(
        order,
        &mut |event| match event {
            Event::Detection(detection, object) => {
                if let Some(full) = batch.push(detection.clone(), object) {
                    sink(Update::Detections(full));
                }
            }
            Event::Skipped(_) => {}
            Event::Tick(coverage) => {
                if let Some(waiting) = batch.take() {
                    sink(Update::Detections(waiting));
                }
                sink(Update::Progress {
                    files: coverage.files,
                    bytes: coverage.bytes,
                    detections: coverage.detections,
                    skipped: coverage.skipped.values().sum(),
                });
            }
        },
        cancel,
    )
    .map_err(Error::into_failure)?;
    if let Some(rest) = batch.take() {
        sink(Update::Detections(rest));
    }
    Ok(coverage)
}

/// What can stand in the way of a scan.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// A path cannot be walked.
    #[error(transparent)]
    Path(#[from] walk::PathError),
    /// No worker holds the patterns.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The results ended before the files did.
    #[error("the scan workers keep failing")]
    Pool,
}

impl Error {
    fn into_failure(self) -> Failure {
        let code = match &self {
            Self::Path(_) => "path-refused",
            Self::Start(StartError::Refused { .. }) => "pattern-refused",
            Self::Start(StartError::Load(_) | StartError::Start(_)) | Self::Pool => "worker-failed",
        };
        let message = match &self {
            Self::Start(StartError::Refused { problems, .. }) => match problems.first() {
                Some(first) => format!("{self}: {}", problem_line(first)),
                None => chain(&self),
            },
            Self::Path(_) | Self::Start(StartError::Load(_) | StartError::Start(_)) | Self::Pool => {
                chain(&self)
            }
        };
        Failure::new(code, message)
    }
}

/// `line:column: message`, with the parts that are known.
fn problem_line(problem: &Problem) -> String {
    match (problem.line, problem.column) {
        (0, _) => problem.message.clone(),
        (line, 0) => format!("{line}: {}", problem.message),
        (line, column) => format!("{line}:{column}: {}", problem.message),
    }
}

/// The error and its causes, joined by colons.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What happens during a scan.
enum Event<'a> {
    /// Something matched, in this object on disk.
    Detection(&'a Detection, Object),
    /// Something was not looked at.
    Skipped(&'a Skipped),
    /// A second has passed.
    Tick(&'a Coverage),
}

type Observer<'a> = &'a mut (dyn FnMut(Event<'_>) + Send);

/// The scan itself: one thread walks, this one takes the results. The worker's queue is bounded; while it is
/// full, the walk waits.
fn run_with(order: Order, observe: Observer<'_>, cancel: &AtomicBool) -> Result<Coverage, Error> {
    let started = Instant::now();
    walk::check(&order.paths, &|| cancel.load(Ordering::Relaxed))?;
    let options = PoolOptions {
        threads: if order.options.cpu_percent.is_some() { 1 } else { order.threads.max(1) },
        limits: order.limits,
        nice: order.nice,
    };
    let (pool, results) = ScanPool::start(&WorkerProgram::this(), &order.patterns, options)?;
    let _guard = CancelOnPanic(&pool);

    let ledger = Ledger::new(order.limits, observe);
    let given_up = AtomicBool::new(false);
    let walked = AtomicBool::new(false);
    let own_cpu = thread_cpu();
    // Handed to the pool and not come back.
    let out = AtomicUsize::new(0);
    let walk_cpu = std::thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let _finish = FinishOnDrop(&pool);
            let stopped = || cancel.load(Ordering::Relaxed) || given_up.load(Ordering::Relaxed);
            let patience = PATIENCE.min(Duration::from_millis(order.limits.file_ms));
            let options = walk::Options { all_local: order.options.all_local, patience };
            let mut pace = order.options.cpu_percent.map(Pace::new);
            let mut cpu = Duration::ZERO;
            for path in &order.paths {
                cpu += walk::walk(path, options, &stopped, &mut |found| match found {
                    Found::File { path, file, facts } => {
                        let id = ledger.lock().hand_over(path, &facts);
                        if let Some(id) = id {
                            if let Some(pace) = &mut pace {
                                let cpu =
                                    || Duration::from_millis(pool.cpu_ms()).saturating_add(thread_cpu());
                                hold(pace, &started, cpu, &|| out.load(Ordering::Acquire) > 0, &stopped);
                            }
                            out.fetch_add(1, Ordering::AcqRel);
                            pool.submit(Item { id, file });
                        }
                    }
                    Found::Skipped(skipped) => ledger.lock().skip(skipped),
                });
            }
            walked.store(true, Ordering::Release);
            cpu + thread_cpu()
        });

        let mut cancelled = false;
        let mut ticked = started;
        loop {
            match results.recv_timeout(CANCEL_EVERY) {
                Ok(ItemResult { id, findings }) => {
                    ledger.lock().take(id, &findings);
                    out.fetch_sub(1, Ordering::AcqRel);
                }
                Err(error) if error.is_timeout() => {}
                Err(_) => break,
            }
            if !cancelled && cancel.load(Ordering::Relaxed) {
                cancelled = true;
                pool.cancel();
            }
            if ticked.elapsed() >= PROGRESS_EVERY {
                ticked = Instant::now();
                ledger.lock().tick();
            }
        }
        if !walked.load(Ordering::Acquire) {
            // Nothing takes what the walk still finds; a full queue must not hold it.
            given_up.store(true, Ordering::Relaxed);
            pool.cancel();
        }
        walker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });

    let is_cancelled = cancel.load(Ordering::Relaxed);
    if given_up.load(Ordering::Relaxed) && !is_cancelled {
        return Err(Error::Pool);
    }
    let own_cpu = thread_cpu().saturating_sub(own_cpu).saturating_add(walk_cpu);
    let mut coverage = ledger.close(is_cancelled);
    coverage.elapsed_ms = millis(started.elapsed());
    coverage.cpu_ms = millis(own_cpu).saturating_add(pool.cpu_ms());
    Ok(coverage)
}

/// Waits until nothing is in hand and the share of a core allows for one more file, or the scan is to stop.
fn hold(
    pace: &mut Pace,
    started: &Instant,
    cpu: impl Fn() -> Duration,
    is_busy: &dyn Fn() -> bool,
    stopped: &dyn Fn() -> bool,
) {
    while !stopped() {
        let wait = if is_busy() { PAUSE } else { pace.wait(started.elapsed(), cpu()).min(HELD) };
        if wait.is_zero() {
            return;
        }
        std::thread::sleep(wait);
    }
}

/// Ends the pool's input however the walk ends, so that the results end too.
struct FinishOnDrop<'a>(&'a ScanPool);

impl Drop for FinishOnDrop<'_> {
    fn drop(&mut self) {
        self.0.finish();
    }
}

/// Frees a walk that waits for the pool if the thread that takes the results panics.
struct CancelOnPanic<'a>(&'a ScanPool);

impl Drop for CancelOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.cancel();
        }
    }
}

/// CPU time of the calling thread so far.
fn thread_cpu() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_has_a_code_and_the_first_place() {
        let problem = |line, column| Problem { line, column, message: "bad".to_owned() };
        let refused = |problems| Error::Start(StartError::Refused { name: "p".to_owned(), problems });
        for (error, code, message) in [
            (refused(vec![problem(3, 4)]), "pattern-refused", "pattern `p` does not compile: 3:4: bad"),
            (refused(vec![problem(3, 0)]), "pattern-refused", "pattern `p` does not compile: 3: bad"),
            (refused(vec![]), "pattern-refused", "pattern `p` does not compile"),
            (Error::Pool, "worker-failed", "the scan workers keep failing"),
            (
                Error::Start(StartError::Start(std::io::ErrorKind::NotFound.into())),
                "worker-failed",
                "cannot start a scan worker: entity not found",
            ),
            (
                Error::Path(walk::PathError::Missing(PathBytes::from(&b"/a\nb"[..]))),
                "path-refused",
                "`/a\\nb` does not exist",
            ),
        ] {
            assert_eq!(error.into_failure(), Failure::new(code, message));
        }
    }
}
