//! Stops and goes on with the workers of one scan, while they are in the middle of a file.
//!
//! The pool starts workers, and others after them when they die, and tells nobody which they are. So a scan starts
//! them with a mark of its own in their arguments, and looks for it among the children of this process. A signal
//! goes through a descriptor of the process that was seen to bear the mark, never to a number that may have become
//! another process's.
//!
//! A worker that takes the place of one that died has yet to load its patterns, for which it has a time of its own;
//! it is left alone for [`LOADING`] first.
//!
//! **Invariant:** no worker stays stopped when the rein is dropped. One whose agent is killed ends with it: the
//! kernel kills it, stopped or not.

use std::{
    fs,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tm_scanner::pool::WorkerProgram;

/// How soon after a search it is searched again while no worker is known that lives.
const SEARCH_EVERY: Duration = Duration::from_millis(50);
/// How soon otherwise: one of two may have been replaced.
const SEARCH_ANYHOW: Duration = Duration::from_secs(5);
/// How long a worker that took another's place is not stopped.
const LOADING: Duration = Duration::from_secs(10);

/// The workers of one scan, by their mark.
#[derive(Debug)]
pub(super) struct Rein {
    mark: String,
    workers: Vec<Held>,
    searched: Option<Instant>,
    /// How long one that took another's place is left alone.
    loading: Duration,
}

/// A mark that nobody else has.
pub(super) fn mark() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// What to start as a worker that bears it.
pub(super) fn program(mark: &str) -> WorkerProgram {
    let mut program = WorkerProgram::this();
    program.args.extend(["--mark".to_owned(), mark.to_owned()]);
    program
}

/// CPU time so far of the workers that bear it and live.
pub(super) fn cpu_of(mark: &str) -> Duration {
    let mut rein = Rein::new(mark);
    rein.take_up();
    rein.cpu()
}

/// A worker.
#[derive(Debug)]
struct Held {
    pid: u32,
    handle: OwnedFd,
    is_stopped: bool,
    /// Not to be stopped before.
    free_until: Instant,
    /// Its CPU time as last seen.
    cpu: Duration,
}

impl Rein {
    /// The rein of workers that bear this mark, or will.
    pub(super) fn new(mark: &str) -> Self {
        Self { mark: mark.to_owned(), workers: Vec::new(), searched: None, loading: LOADING }
    }

    /// Takes up the workers that there are; they have loaded their patterns.
    pub(super) fn take_up(&mut self) {
        self.search(Duration::ZERO);
    }

    /// CPU time of the workers that were ever stopped, as far as it was seen.
    pub(super) fn cpu(&mut self) -> Duration {
        for worker in &mut self.workers {
            worker.cpu = stat(worker.pid).map_or(worker.cpu, |stat| worker.cpu.max(stat.cpu));
        }
        self.workers.iter().map(|worker| worker.cpu).sum()
    }

    /// Stops every worker.
    pub(super) fn stop(&mut self) {
        self.find();
        let now = Instant::now();
        let may_be = |worker: &&mut Held| !worker.is_stopped && worker.free_until <= now;
        for worker in self.workers.iter_mut().filter(may_be) {
            worker.is_stopped = pidfd_send_signal(&worker.handle, Signal::STOP).is_ok();
        }
    }

    /// Lets every worker go on.
    pub(super) fn go(&mut self) {
        for worker in self.workers.iter_mut().filter(|worker| worker.is_stopped) {
            // It fails only for one that has ended.
            let _ = pidfd_send_signal(&worker.handle, Signal::CONT);
            worker.is_stopped = false;
        }
    }

    /// Looks for workers that took others' places.
    fn find(&mut self) {
        let own = std::process::id();
        let lives =
            |worker: &Held| stat(worker.pid).is_some_and(|stat| stat.parent == own && !stat.has_ended);
        let every = if self.workers.iter().any(lives) { SEARCH_ANYHOW } else { SEARCH_EVERY };
        if self.searched.is_none_or(|searched| searched.elapsed() >= every) {
            self.search(self.loading);
        }
    }

    /// Looks for workers, and leaves those that it finds alone for so long.
    fn search(&mut self, alone: Duration) {
        let (own, now) = (std::process::id(), Instant::now());
        self.searched = Some(now);
        let names = fs::read_dir("/proc").into_iter().flatten();
        for pid in names.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok()) {
            let is_known = self.workers.iter().any(|worker| worker.pid == pid);
            if !is_known && let Some(handle) = self.open(pid, own) {
                let free_until = now + alone;
                self.workers.push(Held { pid, handle, is_stopped: false, free_until, cpu: Duration::ZERO });
            }
        }
    }

    /// A handle of the process if it is one of the workers.
    fn open(&self, pid: u32, own: u32) -> Option<OwnedFd> {
        if stat(pid)?.parent != own {
            return None;
        }
        let number = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let handle = pidfd_open(number, PidfdFlags::empty()).ok()?;
        // What is read now is of the process that the handle means, or that one has ended and gets no signal.
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let is_marked = arguments.split(|byte| *byte == 0).any(|word| word == self.mark.as_bytes());
        (is_marked && stat(pid)?.parent == own).then_some(handle)
    }
}

impl Drop for Rein {
    fn drop(&mut self) {
        self.go();
    }
}

/// What `/proc/PID/stat` says.
#[derive(Debug)]
struct Stat {
    parent: u32,
    has_ended: bool,
    /// User and system time.
    cpu: Duration,
}

/// Fields 3, 4, 14 and 15 (proc(5)).
fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, a name in parentheses, may hold blanks and parentheses itself.
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let has_ended = matches!(fields.next()?, "Z" | "X");
    let parent = fields.next()?.parse().ok()?;
    let mut times = fields.skip(9);
    let ticks = times.next()?.parse::<u64>().ok()?.saturating_add(times.next()?.parse::<u64>().ok()?);
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Stat { parent, has_ended, cpu: Duration::from_millis(ticks.saturating_mul(1000) / per_second) })
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::CommandExt as _,
        process::{Child, Command},
    };

    use super::*;

    /// A process that burns CPU and bears a mark.
    struct Burner(Child);

    impl Burner {
        fn start(mark: &str) -> Self {
            let mut command = Command::new("sh");
            // Its own group, so that a stop is nobody's job control.
            command.args(["-c", "while :; do :; done", "--mark", mark]).process_group(0);
            Self(command.spawn().unwrap())
        }

        fn cpu(&self) -> Duration {
            stat(self.0.id()).unwrap().cpu
        }

        fn is_stopped(&self) -> bool {
            let text = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
            text.rsplit_once(") ").unwrap().1.starts_with('T')
        }

        fn wait(&self, what: &str, fact: impl Fn(&Self) -> bool) {
            let end = Instant::now() + Duration::from_secs(60);
            while !fact(self) {
                assert!(Instant::now() < end, "waited in vain for {what}");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    impl Drop for Burner {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_marked_child_is_stopped_and_goes_on_and_no_other_is() {
        let mut rein = Rein::new(&mark());
        let (marked, other) = (Burner::start(&rein.mark), Burner::start("other"));
        let stopped_cpu = {
            rein.take_up();
            rein.stop();
            marked.wait("the stop", Burner::is_stopped);
            marked.cpu()
        };
        let others_cpu = other.cpu();
        other.wait("the other to go on", |other| other.cpu() > others_cpu + Duration::from_millis(50));
        assert!(!other.is_stopped());
        assert_eq!(marked.cpu(), stopped_cpu, "it stands still");
        rein.go();
        marked.wait("it to go on", |marked| marked.cpu() > stopped_cpu + Duration::from_millis(50));
        assert!(rein.cpu() > stopped_cpu && cpu_of(&rein.mark) > stopped_cpu);
        rein.stop();
        marked.wait("the stop", Burner::is_stopped);
        drop(rein);
        marked.wait("it to go on", |marked| !marked.is_stopped());
    }

    #[test]
    fn one_that_follows_another_is_found_and_may_load_first() {
        let mut rein = Rein::new(&mark());
        let first = Burner::start(&rein.mark);
        rein.take_up();
        rein.stop();
        first.wait("the stop", Burner::is_stopped);
        drop(first);
        let second = Burner::start(&rein.mark);
        std::thread::sleep(SEARCH_EVERY);
        rein.stop();
        assert_eq!(rein.workers.len(), 2, "it is known");
        assert!(!rein.workers.iter().any(|worker| worker.pid == second.0.id() && worker.is_stopped));
        drop(second);
        rein.loading = Duration::ZERO;
        let third = Burner::start(&rein.mark);
        std::thread::sleep(SEARCH_EVERY);
        rein.stop();
        third.wait("the stop", Burner::is_stopped);
    }
}
