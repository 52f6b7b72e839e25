//! One client's scan, as the agent does it, in a process of its own (`tm-agent scan-session`): a thread takes the
//! client's files, another tells what came of them.
//!
//! **Invariant:** a descriptor that came is closed when its file was looked at, or the session ends.
//! **Invariant:** the session ends when the client is gone, whatever is being looked at.

use std::{
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crossbeam_channel::Receiver;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        SendFlags, Shutdown, shutdown,
        sockopt::{Timeout, set_socket_timeout},
    },
    process::{Signal, set_parent_process_death_signal},
};
use tm_patterns::Pattern;
use tm_protocol::{
    ids::Sha256,
    report::{Failure, SkipReason},
    task::ScanLimits,
};
use tm_scanner::{
    item::{Findings, Item, ItemResult, Skip},
    pool::{PoolOptions, ScanPool, StartError, WorkerProgram},
};

use super::{
    admit::Admit,
    serve::Limits,
    wire::{self, Answer, Ask, Begin, FORM, ReceiveError, Received},
};

/// The worker yields to whatever else the endpoint does.
const NICE: i32 = 10;
/// Answers for files in one message.
const ANSWERS: usize = 64;
/// Patterns named in one message.
const NAMES: usize = 256;
/// Patterns that do not load before the rest is not tried either.
const MOST_UNUSABLE: usize = 8;
/// How soon it is noticed that a client is gone, while its files are looked at.
const NOTICE: Duration = Duration::from_millis(200);
/// The part of a pattern's digest that names it to people.
const SHORT: usize = 12;

/// What files are looked at with.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// The patterns.
    pub(crate) patterns: Vec<Pattern>,
    /// How many there are besides, which are not used.
    pub(crate) left_out: u32,
}

/// Carries out the session of the client on standard input, and ends with the agent that started it. `held` reads
/// the patterns that the agent holds.
pub(crate) fn serve(held: impl FnOnce() -> Held) {
    // Its own thread of the agent waits for it, so this comes when the agent ends, and not before.
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else { return };
    Session::new(&socket, Limits::default()).run(held);
}

/// A session.
struct Session<'a> {
    socket: &'a OwnedFd,
    limits: Limits,
    /// Held while one answer is sent, so that parts of two are not mixed.
    telling: Mutex<()>,
    /// It ends before its scan does: what the worker says no longer counts.
    is_cut: AtomicBool,
    /// Files that the worker has.
    in_hand: Mutex<usize>,
    fewer: Condvar,
}

/// Why a session ends before its scan does.
#[derive(Debug)]
enum Cut {
    /// The client is told.
    Refused(Failure),
    /// The client is gone.
    Gone,
}

impl Cut {
    fn refused(code: &str, message: impl Into<String>) -> Self {
        Self::Refused(Failure::new(code, message))
    }
}

impl<'a> Session<'a> {
    fn new(socket: &'a OwnedFd, limits: Limits) -> Self {
        let (telling, in_hand, fewer) = (Mutex::new(()), Mutex::new(0), Condvar::new());
        Self { socket, limits, telling, is_cut: AtomicBool::new(false), in_hand, fewer }
    }

    /// To its end.
    fn run(&self, held: impl FnOnce() -> Held) {
        if let Err(Cut::Refused(failure)) = self.scan(held) {
            // One that does not take it is not waited for.
            let _telling = self.telling.lock();
            let _ = wire::answer(self.socket, &Answer::Refused(failure), SendFlags::DONTWAIT);
        }
        let _ = shutdown(self.socket, Shutdown::Both);
    }

    fn scan(&self, held: impl FnOnce() -> Held) -> Result<(), Cut> {
        self.wait_at_most(self.limits.hello)?;
        let begin = match self.receive()? {
            Received::Message((Ask::Begin(begin), files)) if files.is_empty() => begin,
            Received::Message(_) => return Err(Cut::refused("protocol", "the first message is another one")),
            Received::Silence => return Err(Cut::refused("idle", "nothing was asked for")),
            Received::Closed => return Err(Cut::Gone),
        };
        check(&begin)?;
        self.wait_at_most(self.limits.idle)?;
        let (pool, results, patterns, left_out) = self.start(&begin, held())?;
        for some in patterns.chunks(NAMES) {
            self.tell(&Answer::Patterns(some.iter().map(|p| (p.sha256(), short(p.sha256()))).collect()))?;
        }
        self.tell(&Answer::Ready { left_out, sandbox: pool.sandbox().to_vec() })?;
        drop(patterns);
        std::thread::scope(|scope| {
            scope.spawn(|| self.answer(&pool, &results));
            let taken = self.take(&pool);
            if taken.is_err() {
                // The results end, and with them the other thread.
                self.is_cut.store(true, Ordering::Release);
                pool.cancel();
            }
            taken
        })
    }

    /// A worker with all patterns that load.
    fn start(
        &self,
        begin: &Begin,
        held: Held,
    ) -> Result<(ScanPool, Receiver<ItemResult>, Vec<Pattern>, u32), Cut> {
        let Held { mut patterns, mut left_out } = held;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let most = usize::from(self.limits.threads).min(cores);
        let threads = usize::from(begin.threads).clamp(1, most);
        for _ in 0..=MOST_UNUSABLE {
            if patterns.is_empty() {
                let why = if left_out == 0 {
                    "the agent holds no patterns; it gets them with the first scan that a manager orders"
                } else {
                    "none of the patterns that the agent holds can be used"
                };
                return Err(Cut::refused("no-patterns", why));
            }
            let options = PoolOptions { threads, limits: begin.limits, nice: NICE };
            match ScanPool::start(&WorkerProgram::this(), &patterns, options) {
                Ok((pool, results)) => return Ok((pool, results, patterns, left_out)),
                Err(StartError::Refused { name, .. }) => {
                    let Some(at) = patterns.iter().position(|pattern| pattern.name() == name) else { break };
                    let pattern = patterns.swap_remove(at);
                    tracing::debug!(sha256 = %pattern.sha256(), "A pattern that is held does not load; users' scans go without it.");
                    left_out += 1;
                }
                Err(error @ (StartError::Load(_) | StartError::Start(_))) => {
                    return Err(Cut::refused("worker-failed", error.to_string()));
                }
            }
        }
        Err(Cut::refused("worker-failed", "too many of the patterns that the agent holds do not load"))
    }

    /// Takes the client's files until it is gone or all is told.
    fn take(&self, pool: &ScanPool) -> Result<(), Cut> {
        let mut admit = Admit::new();
        let (mut last, mut finished) = (None, false);
        loop {
            self.wait_for_room()?;
            let (ask, files) = match self.receive()? {
                Received::Message(message) => message,
                Received::Silence if finished || *self.lock() > 0 => continue,
                Received::Silence => return Err(Cut::refused("idle", "nothing came for too long")),
                // This side closes it when all is told.
                Received::Closed if finished => return Ok(()),
                Received::Closed => return Err(Cut::Gone),
            };
            let ids = match ask {
                Ask::Files(ids) if !finished => ids,
                Ask::Alive if files.is_empty() => continue,
                Ask::Finish if files.is_empty() && !finished => {
                    finished = true;
                    pool.finish();
                    continue;
                }
                Ask::Files(_) | Ask::Alive | Ask::Finish | Ask::Begin(_) => {
                    return Err(Cut::refused("protocol", "a message is out of place"));
                }
            };
            if ids.len() != files.len() {
                return Err(Cut::refused("protocol", "numbers and files differ"));
            }
            let mut refused = Vec::new();
            for (id, file) in ids.into_iter().zip(files) {
                if last.is_some_and(|last| id <= last) {
                    return Err(Cut::refused("protocol", "a number comes twice"));
                }
                last = Some(id);
                match admit.judge(&file) {
                    Ok(()) => {
                        *self.lock() += 1;
                        pool.submit(Item { id, file });
                    }
                    Err(reason) => refused.push((id, not_looked_at(reason))),
                }
            }
            if !refused.is_empty() {
                self.tell(&Answer::Done { files: refused, cpu_ms: pool.cpu_ms() })?;
            }
        }
    }

    /// Tells results as they come, and the end.
    fn answer(&self, pool: &ScanPool, results: &Receiver<ItemResult>) {
        while let Ok(first) = results.recv() {
            let mut files = vec![(first.id, first.findings)];
            while files.len() < ANSWERS
                && let Ok(next) = results.try_recv()
            {
                files.push((next.id, next.findings));
            }
            // More than a client takes in one answer goes in several.
            let count = files.len();
            let told = pieces(files)
                .into_iter()
                .try_for_each(|files| self.tell(&Answer::Done { files, cpu_ms: pool.cpu_ms() }));
            *self.lock() -= count;
            self.fewer.notify_all();
            if told.is_err() {
                // It is gone, or takes nothing: it is not waited for once more.
                pool.cancel();
                let _ = shutdown(self.socket, Shutdown::Both);
                return;
            }
        }
        if self.is_cut.load(Ordering::Acquire) {
            return;
        }
        let lethal = pool.lethal_pattern().map(|name| name.get(..SHORT).unwrap_or(name).to_owned());
        let _ = self.tell(&Answer::End { cpu_ms: pool.cpu_ms(), lethal });
        // It wakes the thread that takes files.
        let _ = shutdown(self.socket, Shutdown::Both);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, usize> {
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until more files may come.
    fn wait_for_room(&self) -> Result<(), Cut> {
        let mut in_hand = self.lock();
        while *in_hand >= self.limits.in_hand {
            let waited = self.fewer.wait_timeout(in_hand, NOTICE);
            (in_hand, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if *in_hand >= self.limits.in_hand && is_hung_up(self.socket) {
                return Err(Cut::Gone);
            }
        }
        Ok(())
    }

    fn receive(&self) -> Result<Received<(Ask, Vec<OwnedFd>)>, Cut> {
        wire::receive_ask(self.socket).map_err(|error| match error {
            ReceiveError::Violation(violation) => Cut::refused("protocol", violation.to_string()),
            ReceiveError::Io(_) => Cut::Gone,
        })
    }

    fn tell(&self, answer: &Answer) -> Result<(), Cut> {
        let _telling = self.telling.lock();
        wire::answer(self.socket, answer, SendFlags::empty()).map_err(|_| Cut::Gone)
    }

    fn wait_at_most(&self, wait: Duration) -> Result<(), Cut> {
        let set = |direction| set_socket_timeout(self.socket, direction, Some(wait));
        set(Timeout::Recv).and_then(|()| set(Timeout::Send)).map_err(|_| Cut::Gone)
    }
}

/// Whether the agent does such scans.
fn check(begin: &Begin) -> Result<(), Cut> {
    if begin.form != FORM {
        return Err(Cut::refused("version", "the running agent is of another version than this program"));
    }
    let (asked, most) = (begin.limits, ScanLimits::default());
    let is_within = asked.file_bytes <= most.file_bytes
        && asked.depth <= most.depth
        && asked.members <= most.members
        && asked.member_bytes <= most.member_bytes
        && asked.total_bytes <= most.total_bytes
        && asked.ratio <= most.ratio
        && (1..=most.file_ms).contains(&asked.file_ms);
    if is_within {
        Ok(())
    } else {
        Err(Cut::refused("limits", "the agent goes no further than its usual limits"))
    }
}

/// Findings that are told at once: as many as are small, or one that may be large.
fn pieces(files: Vec<(u64, Findings)>) -> Vec<Vec<(u64, Findings)>> {
    let is_small = |findings: &Findings| findings.matches.is_empty() && findings.skips.len() <= 1;
    let (small, large): (Vec<_>, Vec<_>) = files.into_iter().partition(|(_, findings)| is_small(findings));
    let large = large.into_iter().map(|one| vec![one]);
    std::iter::once(small).filter(|small| !small.is_empty()).chain(large).collect()
}

fn not_looked_at(reason: SkipReason) -> Findings {
    Findings { skips: vec![Skip { member: vec![], reason }], ..Findings::default() }
}

fn is_hung_up(socket: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&at_once)).is_ok() && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

fn short(sha256: Sha256) -> String {
    let name = sha256.to_string();
    name.get(..SHORT).unwrap_or(&name).to_owned()
}
