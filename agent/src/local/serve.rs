//! The agent's side of the socket: who is let in.
//!
//! **Invariant:** the thread that accepts never waits for a client.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{SendFlags, Shutdown, SocketFlags, accept_with, shutdown, sockopt::socket_peercred},
};
use tm_patterns::Pattern;
use tm_protocol::{ids::Sha256, report::Failure};

use super::{
    session::Session,
    socket::{ListenError, Listening},
    wire::{self, Answer},
};

/// How soon it is tried again to accept when the system has no means.
const RETRY: Duration = Duration::from_millis(100);

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
    /// At worst some 700 descriptors in all.
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

/// What files are looked at with.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// The patterns.
    pub(crate) patterns: Vec<Pattern>,
    /// How many there are besides, which are not used.
    pub(crate) left_out: u32,
}

/// Reads the patterns that the agent holds; may block.
pub(crate) type Source = Box<dyn Fn() -> Held + Send + Sync>;

/// Serves users until it is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    shared: Arc<Shared>,
    listening: Arc<Listening>,
    accepting: Option<JoinHandle<()>>,
}

/// What sessions share.
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) source: Source,
    /// Patterns that do not load: they are left out without a try.
    pub(super) unusable: Mutex<BTreeSet<Sha256>>,
    seats: Mutex<Seats>,
    ending: AtomicBool,
}

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    /// By number: whose it is, and the way to end it.
    taken: BTreeMap<u64, (u32, Arc<OwnedFd>)>,
}

/// The right to one session.
pub(super) struct Seat {
    shared: Arc<Shared>,
    number: u64,
}

impl Server {
    /// Listens at `path` and serves whoever comes, in threads of its own.
    ///
    /// # Errors
    /// If the place is not safe, not free, or cannot be used.
    pub(crate) fn start(path: &Path, limits: Limits, source: Source) -> Result<Self, ListenError> {
        let listening = Arc::new(Listening::open(path)?);
        let (seats, unusable) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { limits, source, unusable, seats, ending: AtomicBool::new(false) });
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
        for (_, socket) in self.shared.seats().taken.values() {
            let _ = shutdown(socket, Shutdown::Both);
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
        let socket = Arc::new(socket);
        let seat = match self.seat(peer.uid.as_raw(), &socket) {
            Ok(seat) => seat,
            Err(why) => {
                // Who does not hear it sees the end.
                let _ = wire::answer(&socket, &Answer::Refused(why), SendFlags::DONTWAIT);
                return;
            }
        };
        let shared = Arc::clone(self);
        let session = move || {
            let seat = seat;
            Session::new(&socket, &shared).run();
            drop(socket);
            drop(seat);
        };
        if let Err(error) = thread::Builder::new().name("local-scan".to_owned()).spawn(session) {
            tracing::debug!(%error, "No thread for a user's scan.");
        }
    }

    fn seat(self: &Arc<Self>, uid: u32, socket: &Arc<OwnedFd>) -> Result<Seat, Failure> {
        let mut seats = self.seats();
        let busy = |message: String| Err(Failure::new("busy", message));
        let own = seats.taken.values().filter(|(by, _)| *by == uid).count();
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
        seats.taken.insert(number, (uid, Arc::clone(socket)));
        drop(seats);
        Ok(Seat { shared: Arc::clone(self), number })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.seats().taken.remove(&self.number);
    }
}
