//! Looks at files: walks the paths of an order, hands what it finds to a scan worker, keeps the receipt.
//!
//! [`run`] serves a task; [`standalone`] is the same for a person at the endpoint, without a manager.
//!
//! **Invariant:** every file that a walk finds ends in the receipt, as looked at or as skipped with a reason.
//! **Invariant:** this process opens files and never reads their content; the worker does.

mod batch;
pub(crate) mod standalone;
mod walk;

use std::{
    collections::HashMap,
    num::NonZeroUsize,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tm_patterns::{Pattern, Problem};
use tm_protocol::{
    report::{Coverage, Detection, Failure, PathBytes, SkipReason, Skipped},
    task::ScanLimits,
};
use tm_scanner::{
    item::{Findings, Item, ItemResult},
    pool::{PoolOptions, ScanPool, StartError, WorkerProgram},
};

use crate::{
    platform::fs::Object,
    scan::{batch::Batch, walk::Found},
};

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long a cancel may go unnoticed while no result comes.
const CANCEL_EVERY: Duration = Duration::from_millis(100);

/// Where to look, with what, and how.
#[derive(Debug)]
pub(crate) struct Order {
    /// Files and folders.
    pub(crate) paths: Vec<PathBytes>,
    /// What to look for.
    pub(crate) patterns: Vec<Pattern>,
    /// How far to go with one file.
    pub(crate) limits: ScanLimits,
    /// Scanning threads in the worker, at least 1.
    pub(crate) threads: usize,
    /// Niceness of the worker, 0 to 19.
    pub(crate) nice: i32,
}

impl Order {
    /// A scan on all cores that yields to whatever else the endpoint does.
    pub(crate) fn new(paths: Vec<PathBytes>, patterns: Vec<Pattern>, limits: ScanLimits) -> Self {
        Self { paths, patterns, limits, threads: all_cores(), nice: 10 }
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
    order.paths.iter().try_for_each(walk::check)?;
    let started = Instant::now();
    let options = PoolOptions { threads: order.threads.max(1), limits: order.limits, nice: order.nice };
    let (pool, results) = ScanPool::start(&WorkerProgram::this(), &order.patterns, options)?;
    let _guard = CancelOnPanic(&pool);

    let ledger = Ledger::new(order.limits, observe);
    let given_up = AtomicBool::new(false);
    let walked = AtomicBool::new(false);
    let own_cpu = thread_cpu();
    let walk_cpu = std::thread::scope(|scope| {
        let walker = scope.spawn(|| {
            let _finish = FinishOnDrop(&pool);
            let stopped = || cancel.load(Ordering::Relaxed) || given_up.load(Ordering::Relaxed);
            for path in &order.paths {
                walk::walk(path, &stopped, &mut |found| match found {
                    Found::File { path, file, object } => {
                        let id = ledger.lock().hand_over(path, object);
                        pool.submit(Item { id, file });
                    }
                    Found::Skipped(skipped) => ledger.lock().skip(skipped),
                });
            }
            walked.store(true, Ordering::Release);
            thread_cpu()
        });

        let mut cancelled = false;
        let mut ticked = started;
        loop {
            match results.recv_timeout(CANCEL_EVERY) {
                Ok(ItemResult { id, findings }) => ledger.lock().take(id, findings),
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

/// What is in the worker's hands and what came of the rest. Walk and results share it.
struct Ledger<'a>(Mutex<Books<'a>>);

struct Books<'a> {
    limits: ScanLimits,
    observe: Observer<'a>,
    coverage: Coverage,
    next_id: u64,
    /// The files that the worker has. As many as its queue holds.
    in_hand: HashMap<u64, (PathBytes, Object)>,
}

impl<'a> Ledger<'a> {
    fn new(limits: ScanLimits, observe: Observer<'a>) -> Self {
        let coverage = Coverage::default();
        Self(Mutex::new(Books { limits, observe, coverage, next_id: 0, in_hand: HashMap::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, Books<'a>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The receipt. A file without an answer was not looked at; after a cancel it counts as not reached.
    fn close(self, is_cancelled: bool) -> Coverage {
        let mut books = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        if !is_cancelled {
            for (path, _) in std::mem::take(&mut books.in_hand).into_values() {
                books.skip(Skipped { path, member: vec![], reason: SkipReason::WorkerDied });
            }
        }
        books.coverage
    }
}

impl Books<'_> {
    /// Notes a file that goes to the worker and gives it a number.
    fn hand_over(&mut self, path: PathBytes, object: Object) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.in_hand.insert(id, (path, object));
        id
    }

    /// Enters what the worker says of a file. An answer to no question is dropped: a worker that has been
    /// taken over by a file must not be able to invent results for others.
    fn take(&mut self, id: u64, findings: Findings) {
        let Some((path, object)) = self.in_hand.remove(&id) else { return };
        if was_read(&findings, &self.limits) {
            self.coverage.files += 1;
            self.coverage.bytes = self.coverage.bytes.saturating_add(findings.size);
        }
        for skip in findings.skips {
            self.skip(Skipped { path: path.clone(), member: skip.member, reason: skip.reason });
        }
        if findings.matches.is_empty() {
            return;
        }
        // A match without a digest is an answer that no sound worker gives.
        let Some(sha256) = findings.sha256 else {
            return self.skip(Skipped { path, member: vec![], reason: SkipReason::WorkerDied });
        };
        for found in findings.matches {
            self.coverage.detections += 1;
            let detection = Detection {
                path: path.clone(),
                member: found.member,
                pattern: found.pattern,
                rule: found.rule,
                sha256,
                size: findings.size,
            };
            (self.observe)(Event::Detection(&detection, object));
        }
    }

    fn skip(&mut self, skipped: Skipped) {
        (self.observe)(Event::Skipped(&skipped));
        self.coverage.skip(skipped);
    }

    fn tick(&mut self) {
        (self.observe)(Event::Tick(&self.coverage));
    }
}

/// Whether the file on disk itself was looked at, whatever became of its members.
fn was_read(findings: &Findings, limits: &ScanLimits) -> bool {
    let lost = findings.skips.iter().any(|skip| {
        skip.member.is_empty() && matches!(skip.reason, SkipReason::Unreadable | SkipReason::WorkerDied)
    });
    !lost && findings.size <= limits.file_bytes
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
    use tm_protocol::ids::Sha256;
    use tm_scanner::item::{Match, Skip};

    use super::*;

    fn skip(member: &[&str], reason: SkipReason) -> Skip {
        Skip { member: member.iter().map(|name| PathBytes::from(name.as_bytes())).collect(), reason }
    }

    fn matched(member: &[&str]) -> Match {
        let member = member.iter().map(|name| PathBytes::from(name.as_bytes())).collect();
        Match { member, pattern: Sha256::of(b"p"), rule: "r".to_owned() }
    }

    #[test]
    fn every_answer_ends_in_the_receipt() {
        let limits = ScanLimits { file_bytes: 100, ..ScanLimits::default() };
        let sha256 = Some(Sha256::of(b"x"));
        for (findings, files, bytes, detections, skipped) in [
            (Findings { size: 7, ..Findings::default() }, 1, 7, 0, vec![]),
            (
                Findings { size: 7, matches: vec![matched(&[]), matched(&["m"])], sha256, skips: vec![] },
                1,
                7,
                2,
                vec![],
            ),
            (
                Findings { size: 7, matches: vec![matched(&[])], ..Findings::default() },
                1,
                7,
                0,
                vec![SkipReason::WorkerDied],
            ),
            (
                Findings {
                    size: 7,
                    skips: vec![skip(&["m"], SkipReason::Unreadable)],
                    ..Findings::default()
                },
                1,
                7,
                0,
                vec![SkipReason::Unreadable],
            ),
            (
                Findings { size: 7, skips: vec![skip(&[], SkipReason::Unreadable)], ..Findings::default() },
                0,
                0,
                0,
                vec![SkipReason::Unreadable],
            ),
            (
                Findings { size: 7, skips: vec![skip(&[], SkipReason::Limit)], ..Findings::default() },
                1,
                7,
                0,
                vec![SkipReason::Limit],
            ),
            (
                Findings { size: 101, skips: vec![skip(&[], SkipReason::Limit)], ..Findings::default() },
                0,
                0,
                0,
                vec![SkipReason::Limit],
            ),
        ] {
            let mut seen = 0;
            let mut observe = |event: Event<'_>| match event {
                Event::Detection(..) => seen += 1,
                Event::Skipped(_) | Event::Tick(_) => {}
            };
            let ledger = Ledger::new(limits, &mut observe);
            let id = ledger.lock().hand_over(PathBytes::from(&b"/f"[..]), Object { device: 1, inode: 2 });
            ledger.lock().take(id, findings.clone());
            ledger.lock().take(id, findings.clone());
            ledger.lock().take(99, findings.clone());
            let coverage = ledger.close(false);
            assert_eq!(
                (coverage.files, coverage.bytes, coverage.detections),
                (files, bytes, detections),
                "{findings:?}"
            );
            assert_eq!(coverage.skipped.into_keys().collect::<Vec<_>>(), skipped, "{findings:?}");
            assert_eq!(seen, detections);
        }
    }

    #[test]
    fn a_file_without_an_answer_is_a_gap_unless_the_scan_was_called_off() {
        for (is_cancelled, expected) in [(false, 1), (true, 0)] {
            let mut observe = |_: Event<'_>| {};
            let ledger = Ledger::new(ScanLimits::default(), &mut observe);
            ledger.lock().hand_over(PathBytes::from(&b"/f"[..]), Object { device: 1, inode: 2 });
            let coverage = ledger.close(is_cancelled);
            assert_eq!(coverage.skipped.get(&SkipReason::WorkerDied).copied().unwrap_or(0), expected);
        }
    }

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
