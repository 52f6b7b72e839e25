//! `tm-agent scan` without `--standalone`: the user's side.
//!
//! **Invariant:** files are handed to an agent of root or of the same user, and to nobody else.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    process::ExitCode,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::net::{
    SendFlags, Shutdown, shutdown,
    sockopt::{Timeout, set_socket_timeout, socket_peercred},
};
use tm_patterns::Pattern;
use tm_protocol::{
    ids::Sha256,
    report::{Failure, PathBytes, Verdict},
    task::ScanLimits,
};
use tm_scanner::{
    item::{Item, ItemResult},
    pool::{PoolOptions, StartError, WorkerProgram},
    sandbox::PartState,
};

use super::{
    socket::reach,
    wire::{self, Answer, Ask, BATCH, Begin, FORM, Parts, ReceiveError, Received},
};
use crate::scan::{
    hire::{Hire, Workers},
    standalone::{self, Args, EXIT_INCOMPLETE, complain, complain_as},
};

/// Files that wait to be handed over.
const QUEUE: usize = 64;
/// Results that wait to be taken.
const RESULTS: usize = 256;
/// How long it is tried to be let in: an earlier scan of this user may be coming to its end.
const BUSY: Duration = Duration::from_secs(3);
/// How soon it is tried again.
const AGAIN: Duration = Duration::from_millis(100);
/// How often the agent is told that this side lives, while there is nothing else to say.
const ALIVE: Duration = Duration::from_secs(10);
/// How long the agent may take to get ready: it may have many patterns to load, and some that do not.
const READY: Duration = Duration::from_secs(600);

/// Why the agent does not scan.
#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("no agent answers at `{0}`; start it (`tm-agent run`), or scan with --standalone --pattern FILE")]
    NoAgent(PathBytes),
    #[error("`{0}` may not be used by this user")]
    Denied(PathBytes),
    #[error("who listens at `{0}` is neither root nor this user (but user {1}), and is not given any files")]
    Stranger(PathBytes, u32),
    #[error("{}; to scan without the agent: --standalone --pattern FILE", .0.message)]
    Refused(Failure),
    #[error("the agent does not answer")]
    Silent,
    #[error("the agent says something that has no meaning")]
    Meaning,
    #[error("the connection to the agent failed")]
    Io(#[source] io::Error),
}

/// Scans through the running agent, prints, and says the verdict by the exit code.
pub(crate) fn scan(args: &Args) -> ExitCode {
    if let Err(why) = args.fit_for_agent() {
        complain(why);
        return ExitCode::from(standalone::EXIT_USAGE);
    }
    let agent = match Agent::connect(&args.socket, args.limits(), args.threads()) {
        Ok(agent) => Arc::new(agent),
        Err(error) => {
            complain(&crate::scan::chain(&error));
            return ExitCode::from(EXIT_INCOMPLETE);
        }
    };
    match agent.left_out {
        0 => {}
        1 => complain_as(
            "warning",
            "a pattern that the agent holds is left out: it does not load, or they are too many",
        ),
        count => complain_as(
            "warning",
            &format!(
                "{count} patterns that the agent holds are left out: they do not load, or they are too many"
            ),
        ),
    }
    let hire: Arc<dyn Hire> = Arc::<Agent>::clone(&agent);
    let done = standalone::scan_with(args, Vec::new(), agent.names.clone(), hire);
    let done = match (done, agent.talk.trouble.get()) {
        // What the agent says of the end tells more than that there was one.
        (Err(_), Some(trouble)) => Err(vec![trouble.clone()]),
        (Ok(verdict), Some(trouble)) => {
            complain(trouble);
            Ok(verdict.map(|verdict| if verdict == Verdict::Clean { Verdict::Incomplete } else { verdict }))
        }
        (done, None) => done,
    };
    standalone::exit_code(done)
}

/// The running agent, ready for one scan.
#[derive(Debug)]
struct Agent {
    talk: Arc<Talk>,
    /// What the patterns are called.
    names: BTreeMap<Sha256, String>,
    left_out: u32,
    is_hired: AtomicBool,
}

/// The conversation.
#[derive(Debug)]
struct Talk {
    socket: OwnedFd,
    sandbox: Vec<PartState>,
    cpu_ms: AtomicU64,
    lethal: OnceLock<String>,
    /// Why it ended before it was over.
    trouble: OnceLock<String>,
    cancelled: AtomicBool,
}

impl Agent {
    /// Connects, and waits a while where the agent is busy.
    fn connect(path: &Path, limits: ScanLimits, threads: usize) -> Result<Self, ConnectError> {
        let started = Instant::now();
        loop {
            match Self::try_connect(path, limits, threads) {
                Err(ConnectError::Refused(why)) if why.code == "busy" && started.elapsed() < BUSY => {
                    thread::sleep(AGAIN);
                }
                done => return done,
            }
        }
    }

    fn try_connect(path: &Path, limits: ScanLimits, threads: usize) -> Result<Self, ConnectError> {
        let shown = || standalone::bytes(path);
        let socket = reach(path).map_err(|error| {
            let is = |kinds: &[io::ErrorKind]| kinds.contains(&error.kind());
            if is(&[io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused]) {
                ConnectError::NoAgent(shown())
            } else if is(&[io::ErrorKind::PermissionDenied]) {
                ConnectError::Denied(shown())
            } else {
                ConnectError::Io(error)
            }
        })?;
        let by = socket_peercred(&socket).map_err(|error| ConnectError::Io(error.into()))?.uid;
        if !by.is_root() && by != rustix::process::geteuid() {
            return Err(ConnectError::Stranger(shown(), by.as_raw()));
        }
        let wait = Some(ALIVE);
        set_socket_timeout(&socket, Timeout::Recv, wait).map_err(|error| ConnectError::Io(error.into()))?;
        let threads = u16::try_from(threads).unwrap_or(u16::MAX);
        // An agent that is busy says so and closes, perhaps before it has heard anything.
        let _ =
            wire::ask(&socket, &Ask::Begin(Begin { form: FORM, limits, threads }), &[], SendFlags::empty());
        let (mut names, mut parts, started) = (BTreeMap::new(), Parts::default(), Instant::now());
        loop {
            match parts.receive(&socket) {
                Ok(Received::Message(Answer::Patterns(some))) => names.extend(some),
                Ok(Received::Message(Answer::Ready { left_out, sandbox })) => {
                    let talk = Talk {
                        socket,
                        sandbox,
                        cpu_ms: AtomicU64::new(0),
                        lethal: OnceLock::new(),
                        trouble: OnceLock::new(),
                        cancelled: AtomicBool::new(false),
                    };
                    let talk = Arc::new(talk);
                    return Ok(Self { talk, names, left_out, is_hired: AtomicBool::new(false) });
                }
                Ok(Received::Message(Answer::Refused(failure))) => {
                    return Err(ConnectError::Refused(failure));
                }
                Ok(Received::Message(Answer::Done { .. } | Answer::End { .. }))
                | Err(ReceiveError::Violation(_)) => return Err(ConnectError::Meaning),
                Ok(Received::Silence) if started.elapsed() < READY => {}
                Ok(Received::Silence | Received::Closed) => return Err(ConnectError::Silent),
                Err(ReceiveError::Io(error)) => return Err(ConnectError::Io(error)),
            }
        }
    }
}

impl Hire for Agent {
    fn hire(
        &self,
        _: &WorkerProgram,
        _: &[Pattern],
        _: &PoolOptions,
    ) -> Result<(Box<dyn Workers>, Receiver<ItemResult>), StartError> {
        if self.is_hired.swap(true, Ordering::AcqRel) {
            return Err(StartError::Start(io::Error::other("the agent does one scan a session")));
        }
        let (items, queue) = bounded(QUEUE);
        let (results, receiver) = bounded(RESULTS);
        let talk = Arc::clone(&self.talk);
        let hand = thread::Builder::new().name("agent-files".to_owned());
        hand.spawn(move || talk.hand_over(&queue)).map_err(StartError::Start)?;
        let talk = Arc::clone(&self.talk);
        let hear = thread::Builder::new().name("agent-answers".to_owned());
        hear.spawn(move || talk.hear(&results)).map_err(StartError::Start)?;
        let workers = AgentWorkers { talk: Arc::clone(&self.talk), items: Mutex::new(Some(items)) };
        Ok((Box::new(workers), receiver))
    }
}

/// The agent's workers, as the scan sees them.
#[derive(Debug)]
struct AgentWorkers {
    talk: Arc<Talk>,
    items: Mutex<Option<Sender<Item>>>,
}

impl Workers for AgentWorkers {
    fn submit(&self, item: Item) {
        let sender = self.items.lock().ok().and_then(|items| items.clone());
        if let Some(sender) = sender {
            // It fails only when the conversation is over: nobody waits for a result then.
            let _ = sender.send(item);
        }
    }

    fn finish(&self) {
        if let Ok(mut items) = self.items.lock() {
            *items = None;
        }
    }

    fn cancel(&self) {
        self.talk.cancelled.store(true, Ordering::Release);
        let _ = shutdown(&self.talk.socket, Shutdown::Both);
        self.finish();
    }

    fn sandbox(&self) -> &[PartState] {
        &self.talk.sandbox
    }

    fn lethal_pattern(&self) -> Option<&str> {
        self.talk.lethal.get().map(String::as_str)
    }

    fn cpu_ms(&self) -> u64 {
        self.talk.cpu_ms.load(Ordering::Acquire)
    }
}

impl Drop for AgentWorkers {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl Talk {
    /// Hands files over as they come, several at a time where several wait.
    fn hand_over(&self, queue: &Receiver<Item>) {
        while let Ok(first) = queue.recv() {
            let mut items = vec![first];
            while items.len() < BATCH
                && let Ok(next) = queue.try_recv()
            {
                items.push(next);
            }
            let ids = items.iter().map(|item| item.id).collect();
            let files: Vec<_> = items.iter().map(|item| item.file.as_fd()).collect();
            if wire::ask(&self.socket, &Ask::Files(ids), &files, SendFlags::empty()).is_err() {
                // The other thread hears why. What still comes is dropped with the queue.
                return;
            }
        }
        let _ = wire::ask(&self.socket, &Ask::Finish, &[], SendFlags::empty());
    }

    /// Takes answers until all is told or the agent is gone.
    fn hear(&self, results: &Sender<ItemResult>) {
        let mut parts = Parts::default();
        let trouble = loop {
            match parts.receive(&self.socket) {
                Ok(Received::Message(Answer::Done { files, cpu_ms })) => {
                    self.cpu_ms.store(cpu_ms, Ordering::Release);
                    for (id, findings) in files {
                        if results.send(ItemResult { id, findings }).is_err() {
                            return;
                        }
                    }
                }
                Ok(Received::Message(Answer::End { cpu_ms, lethal })) => {
                    self.cpu_ms.store(cpu_ms, Ordering::Release);
                    if let Some(name) = lethal {
                        let _ = self.lethal.set(name);
                    }
                    return;
                }
                Ok(Received::Message(Answer::Refused(failure))) => {
                    break format!("the agent ended the scan: {}", failure.message);
                }
                Ok(Received::Message(Answer::Patterns(_) | Answer::Ready { .. }))
                | Err(ReceiveError::Violation(_)) => break ConnectError::Meaning.to_string(),
                // It may be that there is nothing to hand over for a while.
                Ok(Received::Silence) => {
                    let _ = wire::ask(&self.socket, &Ask::Alive, &[], SendFlags::DONTWAIT);
                }
                Ok(Received::Closed) => break "the agent ended before the scan did".to_owned(),
                Err(ReceiveError::Io(error)) => break format!("the connection to the agent failed: {error}"),
            }
        };
        if !self.cancelled.load(Ordering::Acquire) {
            let _ = self.trouble.set(trouble);
        }
        // Who is handing files over waits for nobody any more.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}
