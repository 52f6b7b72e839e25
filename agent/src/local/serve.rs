//! The agent's side of the socket: who is let in.
//!
//! Each session is a process of its own. A descriptor may lie on a file system that a user has made and that never
//! answers; whoever holds it may then hang where nothing can end it, even while it closes it.
//!
//! **Invariant:** the agent itself never holds a user's descriptor.
//! **Invariant:** the thread that accepts never waits for a client.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{SendFlags, Shutdown, SocketFlags, accept_with, shutdown, sockopt::socket_peercred},
};
use tm_protocol::report::Failure;

use super::{
    socket::{ListenError, Listening},
    wire::{self, Answer},
};

/// How soon it is tried again to accept when the system has no means.
const RETRY: Duration = Duration::from_millis(100);

/// How long a session counts at least: to start a process for each costs the agent more than it costs a client to ask.
const LEAST: Duration = Duration::from_millis(250);

/// How much clients may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Sessions of one user at a time.
    pub(super) per_user: usize,
    /// Sessions at a time.
    pub(super) in_all: usize,
    /// How long a client may take to say what it wants.
    pub(super) hello: Duration,
    /// How long a client may do nothing: say nothing while nothing is looked at, or take no answer.
    pub(super) idle: Duration,
    /// Files of one session in the agent's hands before it takes more; at most [`wire::BATCH`] are on top.
    pub(super) in_hand: usize,
    /// Scanning threads of one session.
    pub(super) threads: u16,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            per_user: 2,
            in_all: 8,
            hello: Duration::from_secs(5),
            idle: Duration::from_secs(120),
            in_hand: 64,
            threads: 4,
        }
    }
}

/// How the process of one session is started: with the client's socket as its standard input.
pub(crate) type Start = Box<dyn Fn() -> Command + Send + Sync>;

/// Serves users until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    shared: Arc<Shared>,
    listening: Arc<Listening>,
    accepting: Option<JoinHandle<()>>,
}

/// What sessions share.
struct Shared {
    limits: Limits,
    start: Start,
    seats: Mutex<Seats>,
    ending: AtomicBool,
}

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    /// By number: whose it is.
    taken: BTreeMap<u64, u32>,
}

/// The right to one session.
struct Seat {
    shared: Arc<Shared>,
    number: u64,
}

impl Server {
    /// Listens at `path` and serves whoever comes, in threads of its own.
    ///
    /// # Errors
    /// If the place is not safe, not free, or cannot be used.
    pub(crate) fn start(path: &Path, limits: Limits, start: Start) -> Result<Self, ListenError> {
        let listening = Arc::new(Listening::open(path)?);
        let shared =
            Arc::new(Shared { limits, start, seats: Mutex::default(), ending: AtomicBool::new(false) });
        let (by, at) = (Arc::clone(&shared), Arc::clone(&listening));
        let accepting = thread::Builder::new()
            .name("local-accept".to_owned())
            .spawn(move || by.accept(&at.socket))
            .map_err(|source| ListenError::Io { path: path.display().to_string(), source })?;
        Ok(Self { shared, listening, accepting: Some(accepting) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        // It wakes who accepts.
        let _ = shutdown(&self.listening.socket, Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Shared {
    fn seats(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: &Arc<Self>, listener: &OwnedFd) {
        while !self.ending.load(Ordering::Acquire) {
            match accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => self.meet(socket),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                // Out of descriptors or memory: it passes, or the agent ends.
                Err(_) => thread::sleep(RETRY),
            }
        }
    }

    fn meet(self: &Arc<Self>, socket: OwnedFd) {
        let Ok(peer) = socket_peercred(&socket) else { return };
        let seat = match self.seat(peer.uid.as_raw()) {
            Ok(seat) => seat,
            Err(why) => {
                // Who does not hear it sees the end.
                let _ = wire::answer(&socket, &Answer::Refused(why), SendFlags::DONTWAIT);
                return;
            }
        };
        // The process ends with the thread that started it, so that thread waits for it.
        let session = move || {
            let came = Instant::now();
            let started = (seat.shared.start)().stdin(socket).spawn();
            let ended = started.and_then(|mut child| child.wait());
            if let Err(error) = ended {
                tracing::debug!(%error, "No process for a user's scan.");
            }
            thread::sleep(LEAST.saturating_sub(came.elapsed()));
            drop(seat);
        };
        if let Err(error) = thread::Builder::new().name("local-scan".to_owned()).spawn(session) {
            tracing::debug!(%error, "No thread for a user's scan.");
        }
    }

    fn seat(self: &Arc<Self>, uid: u32) -> Result<Seat, Failure> {
        let mut seats = self.seats();
        let busy = |message: String| Err(Failure::new("busy", message));
        let own = seats.taken.values().filter(|by| **by == uid).count();
        if own >= self.limits.per_user {
            return busy(format!(
                "{own} scans of yours are running, which is the most that the agent does at a time"
            ));
        }
        if seats.taken.len() >= self.limits.in_all {
            return busy("the agent has as many users' scans to do as it takes at a time".to_owned());
        }
        let number = seats.next;
        seats.next += 1;
        seats.taken.insert(number, uid);
        drop(seats);
        Ok(Seat { shared: Arc::clone(self), number })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.seats().taken.remove(&self.number);
    }
}
