//! Looks at files: walks the paths of an order, hands what it finds to a scan worker, keeps the receipt.
//!
//! [`run`] serves a task; [`standalone`] is the same for a person at the endpoint, without a manager.
//!
//! **Invariant:** every file that a walk finds ends in the receipt, as looked at or as skipped with a reason.
//! **Invariant:** this process opens files and never reads their content; the worker does.

mod batch;
mod crews;
pub(crate) mod hire;
mod hold;
mod ledger;
mod links;
mod memory;
mod pace;
mod past;
mod pressure;
mod quick;
mod quote;
mod rein;
mod seen;
pub(crate) mod standalone;
mod walk;

use std::{
    cell::Cell,
    collections::BTreeSet,
    num::NonZeroUsize,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::Scope,
    time::{Duration, Instant},
};

use crossbeam_channel::bounded;
use tm_patterns::{Pattern, Problem};
use tm_protocol::{
    ids::Sha256,
    quote::Quote,
    report::{Coverage, Detection, Failure, PathBytes, SkipReason, Skipped},
    task::{ScanLimits, ScanOptions},
    text::escape_for_display,
};
use tm_scanner::{
    item::{Item, ItemResult},
    pool::{PoolOptions, StartError},
    sandbox::PartState,
};

use crate::{
    platform::{
        self,
        fs::{Object, facts_of},
    },
    scan::{
        batch::Batch,
        crews::{Crews, FinishOnDrop, With},
        hire::{Hire, OwnWorker},
        hold::Hold,
        ledger::Ledger,
        memory::{Met, Room},
        past::Past,
        quick::{Quick, is_of_interest},
        seen::{Known, Seen},
        walk::Found,
    },
};

/// How often progress is told, unless asked otherwise.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long one call to a file system may take, unless one file may take less.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a cancel may go unnoticed while no result comes.
const CANCEL_EVERY: Duration = Duration::from_millis(100);

/// Where to look, with what, and how.
#[derive(Debug)]
pub(crate) struct Order {
    /// Files and folders. A full scan has none and looks at the root.
    pub(crate) paths: Vec<PathBytes>,
    /// What to look for.
    pub(crate) patterns: Vec<Pattern>,
    /// How far to go with one file.
    pub(crate) limits: ScanLimits,
    /// What else to look at and how to go about it. A share of a core means one file at a time, whatever `threads`
    /// says.
    pub(crate) options: ScanOptions,
    /// Where it is kept which files are known clean; nothing is remembered without.
    pub(crate) seen: Option<PathBuf>,
    /// Where it is kept what past scans have cost; nothing is remembered without.
    pub(crate) past: Option<PathBuf>,
    /// Scanning threads in the worker, at least 1.
    pub(crate) threads: usize,
    /// Niceness of the worker, 0 to 19.
    pub(crate) nice: i32,
    /// Told once what is in force around the worker.
    pub(crate) sandboxed: fn(&[PartState]),
    /// How often it is told how far the scan is; in steps of 100 ms.
    pub(crate) tick: Duration,
    /// Who looks at the files.
    pub(crate) hire: Arc<dyn Hire>,
    /// Told what a person who waits for the scan should know of how it is held.
    pub(crate) remark: fn(&str),
}

impl Order {
    /// A scan on all cores that yields to whatever else the endpoint does and stays on the paths' file systems.
    pub(crate) fn new(paths: Vec<PathBytes>, patterns: Vec<Pattern>, limits: ScanLimits) -> Self {
        Self {
            paths,
            patterns,
            limits,
            options: ScanOptions::default(),
            seen: None,
            past: None,
            threads: all_cores(),
            nice: 10,
            sandboxed: warn_once,
            tick: PROGRESS_EVERY,
            hire: Arc::new(OwnWorker),
            remark: remark_once,
        }
    }

    /// How its paths are walked.
    fn walk(&self) -> walk::Options {
        let patience = PATIENCE.min(Duration::from_millis(self.limits.file_ms));
        walk::Options { all_local: self.options.all_local || self.options.full, patience }
    }

    /// Where to walk, besides what a quick scan finds.
    fn paths(&self) -> Vec<PathBytes> {
        if self.options.full { vec![PathBytes::from(&b"/"[..])] } else { self.paths.clone() }
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
    sink: impl FnMut(Update) + Send,
    cancel: &AtomicBool,
) -> Result<Coverage, Failure> {
    tell(&order, sink, cancel).map(|done| done.coverage)
}

/// Says what `order` would look at and what that is likely to cost; it reads nothing. Otherwise as [`run`].
///
/// # Errors
/// `path-refused` if a path is missing or leads through a link.
pub(crate) fn quote(
    order: Order,
    sink: impl FnMut(Update) + Send,
    cancel: &AtomicBool,
) -> Result<Quote, Failure> {
    let done = tell(&order, sink, cancel)?;
    Ok(quote::of(&order, &done, &order.past.as_deref().map(Past::read).unwrap_or_default()))
}

fn tell(order: &Order, mut sink: impl FnMut(Update) + Send, cancel: &AtomicBool) -> Result<Done, Failure> {
    let mut batch = Batch::default();
    let done = run_with(
        order,
        &mut |event| match event {
            Event::Detection(detection, object) => {
                if let Some(full) = batch.push(detection.clone(), object) {
                    sink(Update::Detections(full));
                }
            }
            Event::Skipped(_) | Event::Now(_) => {}
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
    Ok(done)
}

/// What came of a scan.
#[derive(Debug)]
struct Done {
    coverage: Coverage,
    /// Bytes of the files that were known clean.
    known_bytes: u64,
    /// CPU time of the workers until their patterns were loaded.
    load: Duration,
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
    /// A pattern ended worker after worker.
    #[error("pattern `{0}` ends the scan worker on one file after another")]
    Lethal(String),
    /// The results ended before the files did.
    #[error("the scan workers keep failing")]
    Pool,
}

impl Error {
    fn into_failure(self) -> Failure {
        let code = match &self {
            Self::Path(_) => "path-refused",
            Self::Start(StartError::Refused { .. }) | Self::Lethal(_) => "pattern-refused",
            Self::Start(StartError::Load(_) | StartError::Start(_)) | Self::Pool => "worker-failed",
        };
        let message = match &self {
            Self::Start(StartError::Refused { problems, .. }) => match problems.first() {
                Some(first) => format!("{self}: {}", problem_line(first)),
                None => chain(&self),
            },
            Self::Path(_)
            | Self::Start(StartError::Load(_) | StartError::Start(_))
            | Self::Lethal(_)
            | Self::Pool => chain(&self),
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
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What happens during a scan.
enum Event<'a> {
    /// Something matched, in this object on disk.
    Detection(&'a Detection, Object),
    /// Something was not looked at.
    Skipped(&'a Skipped),
    /// This is looked at; before each tick, if there is anything.
    Now(&'a PathBytes),
    /// A while has passed ([`Order::tick`]).
    Tick(&'a Coverage),
}

type Observer<'a> = &'a mut (dyn FnMut(Event<'_>) + Send);

/// The scan itself: one thread walks, one takes the results of each worker, this one watches the time. A worker's
/// queue is bounded; while it is full, the walk waits.
fn run_with(order: &Order, observe: Observer<'_>, cancel: &AtomicBool) -> Result<Done, Error> {
    let started = Instant::now();
    let paths = order.paths();
    walk::check(&paths, &|| cancel.load(Ordering::Relaxed))?;
    let mut options = PoolOptions { threads: order.threads.max(1), limits: order.limits, nice: order.nice };
    let mark = rein::mark();
    let hold = order.options.cpu_percent.map(|percent| Hold::new(percent, &mark));
    if let Some(hold) = &hold {
        options.threads = 1;
        options.limits.file_ms = hold.stretched(order.limits.file_ms);
        if !hold.knows_pressure() {
            (order.remark)("this kernel tells no pressure; the scan keeps to its share whoever else waits");
        }
    }
    let seen = order.seen.as_deref().and_then(|path| Seen::open(path, &order.patterns, order.options.fresh));
    let rest = seen.as_ref().map(|seen| with_digests(&order.patterns, seen.rest())).unwrap_or_default();
    // Patterns that have found files clean are known to load; others are tried before anything else is done.
    let may_wait = seen.as_ref().is_some_and(Seen::may_know);
    let seen = seen.map(Mutex::new);
    let program = rein::program(&mark);
    let (crews, room) = (Crews::new(&order.patterns, rest, program, options, &*order.hire), Room::default());
    // Handed to a worker and not come back.
    let out = AtomicUsize::new(0);
    let ledger = Ledger::new(order.limits, observe);
    let own_cpu = thread_cpu();
    let (others_cpu, load) = std::thread::scope(|scope| {
        let (walked, walking) = bounded::<()>(1);
        let walker = scope.spawn(|| {
            // Dropped last, so that the watch goes on until all is done.
            let _walked = walked;
            if hold.is_some()
                && let Err(error) = platform::idle::wait_for_others()
            {
                (order.remark)(&format!("the scan does not wait for others' reads: {error}"));
            }
            let held = hold.as_ref();
            let seen = (seen.as_ref(), may_wait);
            walk_and_take(scope, (order, &mark), &crews, (&ledger, &room, &out), seen, held, cancel)
        });
        if let Some(hold) = &hold {
            let (walking, crews, out) = (walking.clone(), &crews, &out);
            scope.spawn(move || {
                let is_busy = || out.load(Ordering::Acquire) > 0;
                while walking.recv_timeout(hold.turn(crews, is_busy)).is_err_and(|error| error.is_timeout()) {
                }
                hold.let_go();
            });
        }
        let mut ticked = started;
        while walking.recv_timeout(CANCEL_EVERY).is_err_and(|error| error.is_timeout()) {
            if cancel.load(Ordering::Relaxed) {
                // Again each time: the walk may just be starting one.
                crews.cancel();
            }
            if ticked.elapsed() >= order.tick {
                ticked = Instant::now();
                ledger.lock().tick();
            }
        }
        walker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });

    let is_cancelled = cancel.load(Ordering::Relaxed);
    if let Some(name) = crews.lethal_pattern().filter(|_| !is_cancelled) {
        return Err(Error::Lethal(name));
    }
    match crews.failure() {
        Some(Some(error)) => return Err(Error::Start(error)),
        Some(None) if !is_cancelled => return Err(Error::Pool),
        Some(None) | None => {}
    }
    if let Some(seen) = seen.filter(|_| !order.options.dry_run) {
        let seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = seen.save() {
            // The next scan reads more than it must; this one has lost nothing.
            tracing::warn!(%error, "cannot remember which files are known clean");
        }
    }
    let own_cpu = thread_cpu().saturating_sub(own_cpu).saturating_add(others_cpu);
    let known_bytes = ledger.lock().known_bytes();
    let mut coverage = ledger.close(is_cancelled);
    coverage.elapsed_ms = millis(started.elapsed());
    coverage.cpu_ms = millis(own_cpu).saturating_add(crews.cpu_ms());
    let done = Done { coverage, known_bytes, load };
    if let Some(path) = order.past.as_deref().filter(|_| !is_cancelled && !order.options.dry_run)
        && let Err(error) = Past::add_run(path, quote::run_of(order, &done))
    {
        // The next quote is worse for it; this scan has lost nothing.
        tracing::warn!(%error, "cannot remember what a scan has cost");
    }
    Ok(done)
}

/// What is missing of the workers' sandbox, in one line; nothing if all is in force.
pub(crate) fn missing_line(parts: &[PartState]) -> Option<String> {
    let missing: Vec<_> = parts
        .iter()
        .filter_map(|state| Some(format!("{}: {}", state.part.name(), state.missing()?)))
        .collect();
    (!missing.is_empty()).then(|| missing.join("; "))
}

/// Says in the log what is missing, when it is another thing than the last time.
fn warn_once(parts: &[PartState]) {
    static SAID: Mutex<Option<String>> = Mutex::new(None);
    let missing = missing_line(parts);
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(line) = missing.as_ref().filter(|_| *said != missing) {
        tracing::warn!(missing = %escape_for_display(line), "The scan worker runs with a part of its sandbox only.");
    }
    *said = missing;
}

/// Says in the log, once for each, how a scan is held.
fn remark_once(remark: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(remark.to_owned()) {
        tracing::info!(remark, "A scan is held to its share.");
    }
}

/// Walks, hands over, and waits for the last result. Returns the CPU time of all that, and that of the workers until
/// their patterns were loaded.
fn walk_and_take<'scope, 'env, 'books>(
    scope: &'scope Scope<'scope, 'env>,
    (order, mark): (&'env Order, &'env str),
    crews: &'env Crews<'env>,
    (ledger, room, out): (&'env Ledger<'books>, &'env Room, &'env AtomicUsize),
    (seen, may_wait): (Option<&'env Mutex<Seen>>, bool),
    hold: Option<&'env Hold>,
    cancel: &AtomicBool,
) -> (Duration, Duration) {
    let dry_run = order.options.dry_run;
    let load = Cell::new(Duration::ZERO);
    let finish = FinishOnDrop(crews);
    let lock = |seen: &'env Mutex<Seen>| seen.lock().unwrap_or_else(PoisonError::into_inner);
    let mut takers = Vec::new();
    let mut start = |with| {
        // This is asked for every file, and what follows looks at every process.
        if crews.runs(with) {
            return;
        }
        let take = move |ItemResult { id, findings }: ItemResult| {
            if let Some(seen) = seen {
                lock(seen).answer(id, findings.matches.is_empty() && findings.skips.is_empty());
            }
            let was_memory = ledger.lock().take(id, &findings);
            if was_memory {
                room.give();
            }
            out.fetch_sub(1, Ordering::AcqRel);
        };
        let before = if takers.is_empty() { Duration::ZERO } else { rein::cpu_of(mark) };
        match crews.start(with, scope, take) {
            Ok(Some(taker)) => {
                if let Some(hold) = hold {
                    hold.take_up();
                }
                load.set(load.get() + rein::cpu_of(mark).saturating_sub(before));
                takers.push(taker);
                (order.sandboxed)(crews.sandbox());
            }
            Ok(None) => {}
            Err(error) => crews.give_up(Some(error)),
        }
    };
    if !may_wait && !dry_run {
        // The others have found files clean before; where those are still what they were, nothing else is needed.
        start(if crews.has_rest() { With::Rest } else { With::All });
    }
    let stopped = || cancel.load(Ordering::Relaxed) || crews.is_given_up();
    let options = order.walk();
    // Before anything that costs, so that also files that are known, and are many, keep to the share.
    let held = || {
        if let Some(hold) = hold {
            hold.wait(crews, || out.load(Ordering::Acquire) > 0, stopped);
        }
    };
    let submit = |with, item| {
        out.fetch_add(1, Ordering::AcqRel);
        crews.submit(with, item);
    };
    let mut cpu = Duration::ZERO;
    if order.options.processes && dry_run {
        memory::would_read(memory::MOST_BYTES, &mut |met| {
            if let Met::Process(bytes) = met {
                ledger.lock().process(bytes);
            }
        });
    } else if order.options.processes {
        start(With::All);
        memory::walk((memory::MOST_BYTES, order.limits.file_bytes), room, &stopped, &mut |met| match met {
            Met::Piece { path, member, file } => {
                held();
                let id = ledger.lock().hand_over_memory(path, member);
                submit(With::All, Item { id, file });
            }
            Met::Process(bytes) => ledger.lock().process(bytes),
            Met::Skipped(skipped) => ledger.lock().skip(skipped),
        });
    }
    let quick = order.options.quick.then(Quick::now);
    let mut hand_over = |found, is_home| match found {
        Found::File { facts, .. } if is_home && !is_of_interest(&facts) => {}
        Found::File { path, file, facts } => {
            held();
            let Some(id) = ledger.lock().hand_over(path, &facts) else { return };
            let with = match seen.map_or(Known::No, |seen| lock(seen).meet(&facts, id)) {
                Known::ByAll => return ledger.lock().known(id, facts.stamp.parts().0),
                Known::ButTheRest | Known::No if dry_run => {
                    return ledger.lock().would_read(id, facts.stamp.parts().0);
                }
                Known::ButTheRest => With::Rest,
                Known::No => With::All,
            };
            start(with);
            submit(with, Item { id, file });
        }
        Found::Skipped(skipped) => ledger.lock().skip(skipped),
    };
    let Quick { whole, homes, gone } = quick.unwrap_or_default();
    for (path, file) in gone {
        match facts_of(&file) {
            Ok(facts) => hand_over(Found::File { path, file, facts }, false),
            Err(_) => {
                let skipped = Skipped { path, member: vec![], reason: SkipReason::Unreadable };
                hand_over(Found::Skipped(skipped), false);
            }
        }
    }
    for path in order.paths().iter().chain(&whole) {
        cpu += walk::walk(path, options, &stopped, &mut |found| hand_over(found, false));
    }
    for path in &homes {
        cpu += walk::walk(path, options, &stopped, &mut |found| hand_over(found, true));
    }
    drop(finish);
    for taker in takers {
        cpu += taker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
    (cpu + thread_cpu(), load.get())
}

/// Those of `patterns` that are named.
fn with_digests(patterns: &[Pattern], names: &BTreeSet<Sha256>) -> Vec<Pattern> {
    patterns.iter().filter(|pattern| names.contains(&pattern.sha256())).cloned().collect()
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
                Error::Lethal("p".to_owned()),
                "pattern-refused",
                "pattern `p` ends the scan worker on one file after another",
            ),
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
