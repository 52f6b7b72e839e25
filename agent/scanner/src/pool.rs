//! Keeps a worker process busy and outlives whatever happens to it.
//!
//! One supervisor thread owns the worker. When an item takes too long the worker is killed and that item,
//! which its slot names, is reported as `timeout`. When a worker dies by itself, the items that its threads
//! had in hand are suspects: each is tried once more, alone, and the one that ends a second worker is
//! reported as `worker-died`. Everything else is given to a new worker. When several items were set aside
//! in this way it is found out whether one pattern is at fault; if so, the pool names it and ends.
//!
//! **Invariant:** every submitted item gets exactly one result, unless the pool is cancelled.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use crossbeam_channel::{
    Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded, never, select_biased,
};
use tm_patterns::{Pattern, Problem};
use tm_protocol::{report::SkipReason, task::ScanLimits, text::escape_for_display};

use crate::{
    blame,
    check::COMPILE_TIME,
    item::{Findings, Item, ItemResult, Skip},
    process::Worker,
    sandbox::PartState,
    wire::{self, Answer, BATCH, Order, Setup},
};

/// Items that wait for the supervisor; who submits more waits.
const QUEUE: usize = 256;
/// How often the worker's slots are looked at.
const WATCH_MS: u64 = 100;
const WATCH: Duration = Duration::from_millis(WATCH_MS);
/// How much longer than its own limit an item may take before its worker is killed (the engine looks at
/// its clock only now and then).
const GRACE_MS: u64 = 1000;
/// Workers that may die one after the other without a single item done before the rest is given up.
const FRUITLESS: u32 = 3;

/// Items that are set aside before a pattern is looked for that is at fault; twice as many each further time.
const SET_ASIDE: u32 = 3;

/// Workers that may wait for ever for file systems that do not answer, before the rest is given up.
const UNENDING: u32 = 8;

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
#[derive(Debug)]
pub struct ScanPool {
    items: Mutex<Option<Sender<Item>>>,
    shared: Arc<Shared>,
    sandbox: Vec<PartState>,
}

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    /// CPU time of workers that have ended.
    past_cpu_ms: AtomicU64,
    /// CPU time of the worker at work, as last seen.
    cpu_ms: AtomicU64,
    /// The name of the pattern that ended worker after worker.
    lethal: OnceLock<String>,
}

impl ScanPool {
    /// Starts a worker with `patterns` compiled in it. Results come out of the receiver, one for every item
    /// submitted, in any order; it ends after [`ScanPool::finish`] or [`ScanPool::cancel`].
    ///
    /// # Errors
    /// If no worker starts or the patterns do not load.
    pub fn start(
        program: &WorkerProgram,
        patterns: &[Pattern],
        options: PoolOptions,
    ) -> Result<(Self, Receiver<ItemResult>), StartError> {
        let shared = Arc::new(Shared::default());
        let (items, queue) = bounded(QUEUE);
        let (results, receiver) = bounded(QUEUE);
        let (started, first) = bounded(1);
        let setup = Setup {
            patterns: patterns.to_vec(),
            limits: options.limits,
            threads: options.threads.max(1),
            nice: options.nice,
        };
        let names: Vec<String> = patterns.iter().map(|p| p.name().to_owned()).collect();
        let (program, seen) = (program.clone(), Arc::clone(&shared));
        // The worker asks the kernel to die with the thread that started it, so that thread stays.
        let supervisor = move || match load_first(&program, &setup, &names) {
            Ok((worker, sandbox)) => {
                let _ = started.send(Ok(sandbox));
                Supervisor::new(program, setup, names, queue, results, seen).run(worker);
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        };
        thread::Builder::new().name("scan-pool".to_owned()).spawn(supervisor).map_err(StartError::Start)?;
        let sandbox = first.recv().unwrap_or(Err(StartError::Load("could not be watched")))?;
        Ok((Self { items: Mutex::new(Some(items)), shared, sandbox }, receiver))
    }

    /// Hands over one item; blocks while 256 wait. The caller must be draining results meanwhile. After
    /// [`ScanPool::cancel`] or [`ScanPool::finish`] items are dropped.
    pub fn submit(&self, item: Item) {
        let sender = self.items.lock().ok().and_then(|items| items.clone());
        if let Some(sender) = sender {
            // It fails only when the pool was cancelled: nobody waits for a result then.
            let _ = sender.send(item);
        }
    }

    /// No more items will come; results keep coming until all are in.
    pub fn finish(&self) {
        if let Ok(mut items) = self.items.lock() {
            *items = None;
        }
    }

    /// Kills the worker; the receiver ends soon. May be called from any thread.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
        self.finish();
    }

    /// What is in force around the first worker, and what is missing.
    pub fn sandbox(&self) -> &[PartState] {
        &self.sandbox
    }

    /// The name of a pattern that ended worker after worker on different items. Once there is one, no worker is
    /// started any more, and what was not looked at until then is reported as `worker-died`.
    pub fn lethal_pattern(&self) -> Option<&str> {
        self.shared.lethal.get().map(String::as_str)
    }

    /// CPU time of all workers of this pool so far, user and system, in milliseconds.
    pub fn cpu_ms(&self) -> u64 {
        self.shared.past_cpu_ms.load(Ordering::Acquire) + self.shared.cpu_ms.load(Ordering::Acquire)
    }
}

impl Drop for ScanPool {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// How a worker dies before it has said anything.
const DIED: &str = "died";

/// The first worker of a pool. One that dies is replaced once: it may have been killed by chance. If the second one
/// dies of one pattern, that pattern is refused by its name.
fn load_first(
    program: &WorkerProgram,
    setup: &Setup,
    names: &[String],
) -> Result<(Worker, Vec<PartState>), StartError> {
    let error = match load(program, setup, names) {
        Err(StartError::Load(DIED)) => match load(program, setup, names) {
            Err(error @ StartError::Load(DIED)) => error,
            loaded => return loaded,
        },
        loaded => return loaded,
    };
    let name = blame::culprit(program, setup, None, &|| false).and_then(|index| names.get(index));
    Err(name.map_or(error, |name| {
        let message = "it ends the scan worker that loads it".to_owned();
        StartError::Refused { name: name.clone(), problems: vec![Problem { line: 0, column: 0, message }] }
    }))
}

/// Starts a worker and waits until it has compiled its patterns.
fn load(
    program: &WorkerProgram,
    setup: &Setup,
    names: &[String],
) -> Result<(Worker, Vec<PartState>), StartError> {
    let worker = Worker::start(program, setup).map_err(|error| {
        // It had died before it was told what to do.
        let is_dead = matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset);
        if is_dead { StartError::Load(DIED) } else { StartError::Start(error) }
    })?;
    let error = match worker.answers.recv_timeout(COMPILE_TIME) {
        Ok(Answer::Ready { sandbox, .. }) => return Ok((worker, sandbox)),
        Ok(Answer::Refused { pattern, problems }) => StartError::Refused {
            name: names.get(pattern).cloned().unwrap_or_default(),
            problems: problems.into_iter().map(Into::into).collect(),
        },
        Ok(Answer::Done { .. } | Answer::Measured { .. }) => StartError::Load("misbehaved"),
        Err(RecvTimeoutError::Timeout) => StartError::Load("took too long"),
        Err(RecvTimeoutError::Disconnected) => StartError::Load(DIED),
    };
    worker.kill();
    Err(error)
}

struct Supervisor {
    program: WorkerProgram,
    setup: Setup,
    names: Vec<String>,
    queue: Receiver<Item>,
    results: Sender<ItemResult>,
    shared: Arc<Shared>,
    /// Taken from the queue (or from a dead worker), not yet sent.
    waiting: VecDeque<Item>,
    /// Sent and not answered.
    out: HashMap<u64, OwnedFd>,
    /// Had in hand by a worker that died; each is tried once more, alone.
    suspects: VecDeque<Item>,
    /// The suspect that is being tried.
    solo: Option<u64>,
    /// When the slots were last looked at, in milliseconds of the monotonic clock.
    watched_ms: u64,
    /// Workers that were started since the last item was done.
    fruitless: u32,
    /// Workers that could not be ended.
    unending: u32,
    /// Items that ended two workers each.
    set_aside: u32,
    /// How many of them it takes to look for a pattern that is at fault.
    blame_at: u32,
}

/// What to do with the worker after a turn.
enum Turn {
    GoOn,
    /// It has died or must: these items have had their last chance, with this reason.
    Replace(Vec<u64>, SkipReason),
    End,
}

impl Supervisor {
    fn new(
        program: WorkerProgram,
        setup: Setup,
        names: Vec<String>,
        queue: Receiver<Item>,
        results: Sender<ItemResult>,
        shared: Arc<Shared>,
    ) -> Self {
        let (waiting, suspects, out) = (VecDeque::new(), VecDeque::new(), HashMap::new());
        Self {
            program,
            setup,
            names,
            queue,
            results,
            shared,
            waiting,
            out,
            suspects,
            solo: None,
            watched_ms: 0,
            fruitless: 0,
            unending: 0,
            set_aside: 0,
            blame_at: SET_ASIDE,
        }
    }

    fn run(mut self, mut worker: Worker) {
        loop {
            match self.turn(&worker) {
                Turn::GoOn => {}
                Turn::End => {
                    let idle = self.out.is_empty() && !self.shared.cancelled.load(Ordering::Acquire);
                    let ended = if idle { worker.end() } else { worker.kill() };
                    return self.past(ended.cpu_ms);
                }
                Turn::Replace(lost, reason) => {
                    let in_hand: Vec<u64> = worker.busy().into_iter().map(|(id, _)| id).collect();
                    // Answers that were on their way count: only what has none is tried again.
                    let answers = worker.answers.clone();
                    let ended = worker.kill();
                    if ended.is_gone {
                        answers.iter().for_each(|answer| self.take(answer));
                    } else {
                        answers.try_iter().for_each(|answer| self.take(answer));
                        self.unending += 1;
                    }
                    self.past(ended.cpu_ms);
                    let has_changed = reason == SkipReason::WorkerDied && ended.has_lost_a_file;
                    let reason = if has_changed { SkipReason::Changed } else { reason };
                    self.sort_out(&lost, reason, &in_hand);
                    if reason == SkipReason::Timeout {
                        self.fruitless = 0;
                    }
                    match self.replacement() {
                        Some(new) => worker = new,
                        None => return self.give_up(),
                    }
                }
            }
        }
    }

    fn turn(&mut self, worker: &Worker) -> Turn {
        if self.shared.cancelled.load(Ordering::Acquire) {
            return Turn::End;
        }
        self.fill(worker);
        let alone = !self.suspects.is_empty() || self.trying_alone();
        let room = !alone && self.waiting.len() < BATCH;
        let closed = never();
        let queue = if room { &self.queue } else { &closed };
        select_biased! {
            recv(worker.answers) -> answer => match answer {
                Ok(answer) => self.take(answer),
                Err(_) => return Turn::Replace(self.solo_suspect(), SkipReason::WorkerDied),
            },
            recv(queue) -> item => match item {
                Ok(item) => {
                    self.waiting.push_back(item);
                    // What else is there goes along in the same message.
                    while self.waiting.len() < BATCH && let Ok(item) = self.queue.try_recv() {
                        self.waiting.push_back(item);
                    }
                }
                // The queue has ended: all that is left is in hand.
                Err(_) if self.out.is_empty() && self.waiting.is_empty() && self.suspects.is_empty() => return Turn::End,
                Err(_) => return self.watch(worker, Some(worker.answers.recv_timeout(WATCH))),
            },
            default(WATCH) => {}
        }
        self.watch(worker, None)
    }

    /// Looks for items that have taken too long.
    fn watch(&mut self, worker: &Worker, answer: Option<Result<Answer, RecvTimeoutError>>) -> Turn {
        match answer {
            Some(Ok(answer)) => self.take(answer),
            Some(Err(RecvTimeoutError::Disconnected)) => {
                return Turn::Replace(self.solo_suspect(), SkipReason::WorkerDied);
            }
            Some(Err(RecvTimeoutError::Timeout)) | None => {}
        }
        let now = wire::monotonic_ms();
        if now.saturating_sub(self.watched_ms) < WATCH_MS {
            return Turn::GoOn;
        }
        self.watched_ms = now;
        self.shared.cpu_ms.store(worker.cpu_ms(), Ordering::Release);
        let limit = self.setup.limits.file_ms.saturating_add(GRACE_MS);
        let late: Vec<u64> = worker
            .busy()
            .into_iter()
            .filter(|(id, started)| self.out.contains_key(id) && now.saturating_sub(*started) > limit)
            .map(|(id, _)| id)
            .collect();
        if late.is_empty() { Turn::GoOn } else { Turn::Replace(late, SkipReason::Timeout) }
    }

    /// Sends what may be sent: suspects one at a time, others in batches that keep every thread busy.
    fn fill(&mut self, worker: &Worker) {
        if self.trying_alone() {
            return;
        }
        if !self.suspects.is_empty() {
            if self.out.is_empty()
                && let Some(item) = self.suspects.front()
            {
                let sent = worker.send(&Order::Items(vec![item.id]), &[item.file.as_fd()]);
                // A send fails when the worker is gone; its closed pipe says so in the next turn.
                if sent.is_ok()
                    && let Some(item) = self.suspects.pop_front()
                {
                    self.alone(item);
                }
            }
            return;
        }
        let most = (self.setup.threads + 1) * BATCH / 2;
        while !self.waiting.is_empty() && self.out.len() < most {
            // Small rounds while few items wait, so that no thread idles beside a full batch of another.
            let share = (self.waiting.len() / self.setup.threads).clamp(1, BATCH);
            let batch: Vec<Item> = self.waiting.drain(..share).collect();
            let ids = batch.iter().map(|item| item.id).collect();
            let files: Vec<_> = batch.iter().map(|item| item.file.as_fd()).collect();
            let sent = worker.send(&Order::Items(ids), &files);
            drop(files);
            self.out.extend(batch.into_iter().map(|item| (item.id, item.file)));
            if sent.is_err() {
                return;
            }
        }
    }

    fn alone(&mut self, item: Item) {
        self.solo = Some(item.id);
        self.out.insert(item.id, item.file);
    }

    fn trying_alone(&self) -> bool {
        self.solo.is_some()
    }

    /// The item that the worker had all to itself, if there was one.
    fn solo_suspect(&self) -> Vec<u64> {
        self.solo.into_iter().collect()
    }

    fn take(&mut self, answer: Answer) {
        match answer {
            Answer::Done { id, findings } => self.done(id, findings),
            // A worker that says this again has lost its mind; what it owes is missed by the watch.
            Answer::Ready { .. } | Answer::Refused { .. } | Answer::Measured { .. } => {}
        }
    }

    fn done(&mut self, id: u64, findings: Findings) {
        // Only what was asked is believed, and only once.
        if self.out.remove(&id).is_some() {
            self.fruitless = 0;
            self.tell(id, findings);
        }
    }

    fn tell(&mut self, id: u64, findings: Findings) {
        if self.solo == Some(id) {
            self.solo = None;
        }
        let mut result = ItemResult { id, findings };
        // A caller that does not take results can still cancel; one that has dropped the receiver wants none.
        while !self.shared.cancelled.load(Ordering::Acquire) {
            match self.results.send_timeout(result, WATCH) {
                Ok(()) | Err(SendTimeoutError::Disconnected(_)) => return,
                Err(SendTimeoutError::Timeout(back)) => result = back,
            }
        }
    }

    fn lose(&mut self, id: u64, reason: SkipReason) {
        self.tell(id, Findings { skips: vec![Skip { member: Vec::new(), reason }], ..Findings::default() });
    }

    /// After a worker's end: reports what had its last chance, and queues the rest again.
    fn sort_out(&mut self, lost: &[u64], reason: SkipReason, in_hand: &[u64]) {
        let timed_out = reason == SkipReason::Timeout;
        let has_ended_workers = reason == SkipReason::WorkerDied;
        for id in lost {
            if let Some(file) = self.out.remove(id) {
                if timed_out {
                    // A file system that does not answer may make even closing wait.
                    let _ = thread::Builder::new().name("scan-close".to_owned()).spawn(move || drop(file));
                } else if has_ended_workers {
                    self.set_aside(&file);
                } else {
                    self.fruitless = 0;
                }
                self.lose(*id, reason);
            }
        }
        for (id, file) in std::mem::take(&mut self.out) {
            // A worker that was killed for one late item says nothing against its other threads' items.
            if in_hand.contains(&id) && !timed_out {
                self.suspects.push_back(Item { id, file });
            } else {
                self.waiting.push_back(Item { id, file });
            }
        }
        self.solo = None;
    }

    /// An item has ended its second worker. That is an end of its own: however many such items there are, the
    /// others are still looked at, unless it is a pattern that makes them so.
    fn set_aside(&mut self, file: &OwnedFd) {
        self.fruitless = 0;
        self.set_aside += 1;
        if self.set_aside < self.blame_at {
            return;
        }
        self.blame_at = self.blame_at.saturating_mul(2);
        let cancelled = || self.shared.cancelled.load(Ordering::Acquire);
        let index = blame::culprit(&self.program, &self.setup, Some(file), &cancelled);
        if let Some(name) = index.and_then(|index| self.names.get(index)) {
            tracing::error!(pattern = %escape_for_display(name), "A pattern ends one scan worker after the other.");
            let _ = self.shared.lethal.set(name.clone());
        }
    }

    fn replacement(&mut self) -> Option<Worker> {
        let is_bounded = self.unending < UNENDING && self.shared.lethal.get().is_none();
        while is_bounded && self.fruitless < FRUITLESS && !self.shared.cancelled.load(Ordering::Acquire) {
            self.fruitless += 1;
            match load(&self.program, &self.setup, &self.names) {
                Ok((worker, _)) => return Some(worker),
                Err(error) => tracing::warn!(error = %error, "Cannot replace a scan worker."),
            }
        }
        None
    }

    /// No worker lives long enough: whatever is left or still comes is reported, so that nobody waits for ever.
    fn give_up(&mut self) {
        let left = self.waiting.drain(..).chain(self.suspects.drain(..)).collect::<Vec<_>>();
        for item in left {
            self.lose(item.id, SkipReason::WorkerDied);
        }
        while !self.shared.cancelled.load(Ordering::Acquire) {
            match self.queue.recv_timeout(WATCH) {
                Ok(item) => self.lose(item.id, SkipReason::WorkerDied),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn past(&self, cpu_ms: u64) {
        self.shared.cpu_ms.store(0, Ordering::Release);
        self.shared.past_cpu_ms.fetch_add(cpu_ms, Ordering::AcqRel);
    }
}
