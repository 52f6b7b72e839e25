//! One worker process, seen from its parent: started, spoken to, ended.

use std::{
    fs::File,
    io::{self, BufReader, IoSlice, Write as _},
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt as _,
    },
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, bounded};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
        sendmsg, socketpair,
    },
    process::{WaitId, WaitIdOptions},
};

use crate::{
    pool::WorkerProgram,
    sandbox::Frame,
    wire::{self, Answer, BATCH, Order, Setup, Slots},
};

/// Answers that wait for the parent; a worker that is further ahead waits in its pipe.
const ANSWERS: usize = 1024;

/// How long a worker that has nothing to do any more, or was killed, may take to end.
const LAST_CALL: Duration = Duration::from_secs(1);

/// A running worker.
pub(crate) struct Worker {
    child: Child,
    socket: Option<OwnedFd>,
    /// Its answers; ends when it has died or closed its pipe.
    pub(crate) answers: Receiver<Answer>,
    /// What its threads have in hand.
    pub(crate) slots: Slots,
    threads: usize,
}

impl Worker {
    /// Starts a worker and gives it its patterns; its first answer tells what it makes of them.
    pub(crate) fn start(program: &WorkerProgram, setup: &Setup) -> io::Result<Self> {
        Self::start_within(program, setup, Frame::new(setup.threads, setup.nice, &setup.limits))
    }

    /// The same within other ceilings.
    pub(crate) fn start_within(program: &WorkerProgram, setup: &Setup, mut frame: Frame) -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut setup_file = File::from(memfd_create("tm-scan-setup", MemfdFlags::CLOEXEC)?);
        setup_file.write_all(&wire::encode(&setup.told())?)?;
        let slots = File::from(memfd_create("tm-scan-slots", MemfdFlags::CLOEXEC)?);
        slots.set_len(u64::try_from(setup.threads).map_err(io::Error::other)?.saturating_mul(16))?;

        let mut child = Command::new(&program.path)
            .args(&program.args)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let stdout = child.stdout.take().expect("the worker's standard output is a pipe");
        let (sender, answers) = bounded(ANSWERS);
        thread::Builder::new().name("scan-answers".to_owned()).spawn(move || {
            let mut stdout = BufReader::new(stdout);
            while let Ok(answer) = wire::read_answer(&mut stdout) {
                if sender.send(answer).is_err() {
                    break;
                }
            }
        })?;
        let worker = Self { child, socket: Some(ours), answers, slots: Slots(slots), threads: setup.threads };
        let lists = setup.lists();
        let list_bytes: usize = lists.iter().map(|list| list.size()).sum();
        frame.address_bytes =
            frame.address_bytes.saturating_add(u64::try_from(list_bytes).unwrap_or(u64::MAX));
        let order = Order::Setup(frame, lists.len());
        let sent = worker.send(&order, &[setup_file.as_fd(), worker.slots.0.as_fd()]).and_then(|()| {
            let sends = |some: &[&tm_patterns::digests::Image]| {
                worker.send(&Order::Lists, &some.iter().map(|list| list.as_fd()).collect::<Vec<_>>())
            };
            lists.chunks(BATCH).try_for_each(sends)
        });
        match sent {
            Ok(()) => Ok(worker),
            Err(error) => {
                // Not left behind as a zombie.
                worker.kill();
                Err(error)
            }
        }
    }

    /// Sends one order with the files beside it (at most [`BATCH`]).
    pub(crate) fn send(&self, order: &Order, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let body = wire::encode(order)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        loop {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(files)) {
                return Err(io::Error::other("too many files in one message"));
            }
            match sendmsg(socket, &[IoSlice::new(&body)], &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Item and start (milliseconds of the monotonic clock) of every busy thread.
    pub(crate) fn busy(&self) -> Vec<(u64, u64)> {
        self.slots.busy(self.threads)
    }

    /// CPU time so far, user and system, in milliseconds.
    pub(crate) fn cpu_ms(&self) -> u64 {
        process_cpu_ms(self.child.id()).unwrap_or(0)
    }

    /// Lets it end by itself, as it does when nothing more can come; one that does not is killed. It has answered
    /// everything, so nothing but its own CPU time waits for it.
    pub(crate) fn end(mut self) -> Ended {
        self.socket = None;
        if self.ends_within(LAST_CALL) {
            return self.reap();
        }
        self.kill()
    }

    /// Ends it now. One that waits for a file system that does not answer cannot be ended; it is left to a thread
    /// that waits for it as long as that takes.
    pub(crate) fn kill(mut self) -> Ended {
        // The process is a child that has not been waited for: the number cannot belong to another one.
        let _ = self.child.kill();
        self.socket = None;
        if self.ends_within(LAST_CALL) {
            return self.reap();
        }
        let cpu_ms = self.cpu_ms();
        // Without a thread it stays a zombie until this process ends.
        let _ = thread::Builder::new().name("scan-reaper".to_owned()).spawn(move || self.child.wait());
        Ended { cpu_ms, is_gone: false, has_lost_a_file: false }
    }

    fn ends_within(&self, patience: Duration) -> bool {
        let begun = Instant::now();
        while !self.has_ended() {
            if begun.elapsed() >= patience {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// One that has ended: a zombie still shows its CPU time, until it is waited for.
    fn reap(&mut self) -> Ended {
        let cpu_ms = self.cpu_ms();
        let signal = self.child.wait().ok().and_then(|status| status.signal());
        let has_lost_a_file = signal == Some(rustix::process::Signal::BUS.as_raw());
        Ended { cpu_ms, is_gone: true, has_lost_a_file }
    }

    fn has_ended(&self) -> bool {
        let id = rustix::process::Pid::from_child(&self.child);
        let options = WaitIdOptions::NOHANG | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        matches!(rustix::process::waitid(WaitId::Pid(id), options), Ok(Some(_)))
    }
}

/// What became of a worker that was killed.
pub(crate) struct Ended {
    /// The CPU time it took, in milliseconds.
    pub(crate) cpu_ms: u64,
    /// It has ended; if not, its pipe may never end either.
    pub(crate) is_gone: bool,
    /// It died because a file became shorter, or could not be read, while it was mapped (SIGBUS): that is the file's
    /// doing and nobody else's.
    pub(crate) has_lost_a_file: bool,
}

/// Fields 14 and 15 of `/proc/PID/stat` (proc(5)): user and system time in clock ticks.
fn process_cpu_ms(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, a name in parentheses, may hold blanks and parentheses itself.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(ticks * 1000 / rustix::param::clock_ticks_per_second().max(1))
}
