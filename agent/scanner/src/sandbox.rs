//! What a worker gives up before it reads anything that was not made by its parent.
//!
//! Three steps, in this order, each once: [`Sandbox::begin`] while there is one thread (identity,
//! capabilities, the parent's death), [`Sandbox::confine`] still with one thread (ceilings, Landlock), and
//! [`Sandbox::seal`] when all threads exist (system calls). What this machine does not offer is written down
//! as missing, with the reason, and the rest is done all the same; the parent hears of it with the worker's
//! first answer.
//!
//! **Invariant:** after the last step the process can use the descriptors it holds or is handed and its own
//! memory, and nothing else: no path, no socket, no program, no new thread, no executable page, no other
//! process.

use std::{fs, io, mem::size_of};

use bincode::{Decode, Encode};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr as _, RulesetStatus, Scope,
};
use rustix::{
    process::{
        DumpableBehavior, Gid, Resource, Rlimit, Signal, Uid, getppid, getrlimit, getuid,
        set_dumpable_behavior, set_parent_process_death_signal, setrlimit,
    },
    thread::{
        CapabilitySet, CapabilitySets, capability_is_in_bounding_set, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};
use tm_protocol::task::ScanLimits;

use crate::{
    calls,
    wire::{self, BATCH},
};

/// The account that a worker of root becomes, if this machine has it.
const ACCOUNT: &str = "tm-scan";
/// What it becomes otherwise: the kernel's overflow user, which every system keeps free of rights.
const NOBODY: u32 = 65534;
/// How willingly the kernel ends a worker when the machine runs out of memory (-1000 to 1000).
const OOM_SCORE: i32 = 900;

/// Memory for the rules and the program, in bytes.
const BASE_MEMORY: u64 = 1 << 30;
/// Memory of a thread beside the members it unpacks, in bytes.
const THREAD_MEMORY: u64 = 64 << 20;
/// A worker may always have this much, in bytes, however small the machine.
const LEAST_MEMORY: u64 = 512 << 20;
/// Address space of a thread that is only set aside (the allocator's arenas, its stack), in bytes.
const THREAD_SPACE: u64 = 192 << 20;
/// Descriptors beside the items: the worker's own and scratch of archive readers.
const OWN_FILES: u64 = 256;

/// One part of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Part {
    /// The worker of root is not root.
    Identity,
    /// No capability, and none to be had.
    Capabilities,
    /// No new rights by executing, no core dump, no debugger; it ends with its parent.
    Process,
    /// Ceilings of memory, descriptors, written bytes and processes.
    Ceilings,
    /// First to go when the machine has no memory left.
    MemoryPressure,
    /// No file by any path (Landlock).
    Files,
    /// No TCP, no abstract socket, no signal to others (Landlock).
    Network,
    /// Only the system calls that scanning needs (seccomp).
    Calls,
}

impl Part {
    /// One or two words for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "user",
            Self::Capabilities => "capabilities",
            Self::Process => "process",
            Self::Ceilings => "ceilings",
            Self::MemoryPressure => "memory-pressure",
            Self::Files => "landlock-files",
            Self::Network => "landlock-network",
            Self::Calls => "seccomp",
        }
    }
}

/// How a part stands.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum State {
    /// In force; in which way.
    InForce(String),
    /// There is nothing to give up; why.
    NotNeeded(String),
    /// Not in force; why.
    Missing(String),
}

/// A part and how it stands.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct PartState {
    /// Which part.
    pub part: Part,
    /// How it stands.
    pub state: State,
}

impl PartState {
    /// Why it is not in force, if it should be.
    pub fn missing(&self) -> Option<&str> {
        match &self.state {
            State::Missing(why) => Some(why),
            State::InForce(_) | State::NotNeeded(_) => None,
        }
    }
}

/// What the parent decides about the process, before the worker reads its set-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Frame {
    /// Scanning threads, at least 1.
    pub threads: usize,
    /// Niceness, 0 to 19.
    pub nice: i32,
    /// Ceiling of memory that can be written to, in bytes.
    pub data_bytes: u64,
    /// Ceiling of address space, in bytes: mapped files are in it, and what is only set aside.
    pub address_bytes: u64,
    /// Ceiling of any one file it writes (scratch in memory), in bytes.
    pub written_bytes: u64,
}

impl Frame {
    /// Ceilings that let `threads` look at files within `limits` at the same time: two of the largest members
    /// each (a container and what is taken out of it), but at most half of this machine's memory.
    pub fn new(threads: usize, nice: i32, limits: &ScanLimits) -> Self {
        let machine = rustix::system::sysinfo();
        let memory = machine.totalram.saturating_mul(machine.mem_unit.into());
        Self::within(threads, nice, limits, memory)
    }

    fn within(threads: usize, nice: i32, limits: &ScanLimits, machine_bytes: u64) -> Self {
        let count = u64::try_from(threads.max(1)).unwrap_or(u64::MAX);
        let each = limits.member_bytes.saturating_mul(2).saturating_add(THREAD_MEMORY);
        let data = BASE_MEMORY.saturating_add(count.saturating_mul(each));
        let data = data.min((machine_bytes / 2).max(LEAST_MEMORY));
        let mapped = count.saturating_mul(limits.file_bytes.saturating_add(THREAD_SPACE));
        Self {
            threads: threads.max(1),
            nice,
            data_bytes: data,
            address_bytes: data.saturating_add(mapped).saturating_add(BASE_MEMORY),
            written_bytes: limits.total_bytes.max(BASE_MEMORY),
        }
    }

    /// Descriptors that can be open at once: a batch in every thread's hand, one more on its way.
    fn files(&self) -> u64 {
        let batches = u64::try_from(self.threads).unwrap_or(u64::MAX).saturating_add(1);
        batches.saturating_mul(u64::try_from(BATCH).unwrap_or(u64::MAX)).saturating_add(OWN_FILES)
    }
}

/// The steps taken so far.
#[derive(Debug, Default)]
pub struct Sandbox {
    parts: Vec<PartState>,
}

impl Sandbox {
    /// Gives up identity and capabilities, and ties this process to its parent. To be called while there is
    /// one thread: on Linux each thread has an identity of its own.
    ///
    /// # Errors
    /// If the parent is gone already, or this process cannot be tied to it or kept from new privileges.
    pub fn begin() -> io::Result<Self> {
        let parent = getppid();
        let mut sandbox = Self::default();
        // `/proc/self` belongs to root once the identity has changed.
        let oom = fs::write("/proc/self/oom_score_adj", OOM_SCORE.to_string());
        sandbox.tell(Part::MemoryPressure, oom.map(|()| format!("oom_score_adj {OOM_SCORE}")));
        let is_root = getuid().is_root() || rustix::process::geteuid().is_root();
        let bounding = empty_bounding_set();
        if is_root {
            sandbox.tell(Part::Identity, drop_identity());
        } else {
            let why = format!("not root: runs as user {}", getuid().as_raw());
            sandbox.parts.push(PartState { part: Part::Identity, state: State::NotNeeded(why) });
        }
        sandbox.tell(Part::Capabilities, drop_capabilities(bounding));
        // A change of identity takes the death signal back, so it is asked for only now; a parent that died
        // meanwhile would never be noticed.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() != parent {
            return Err(io::Error::other("the process that started the scan worker is gone"));
        }
        set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
        rustix::thread::set_no_new_privs(true)?;
        lower(Resource::Core, 0)?;
        let process = State::InForce("no new privileges, no core, no debugger".to_owned());
        sandbox.parts.push(PartState { part: Part::Process, state: process });
        Ok(sandbox)
    }

    /// Sets the ceilings and closes the file system and the network. To be called while there is one thread.
    pub fn confine(&mut self, frame: &Frame) {
        let ceilings = || {
            let data = lower(Resource::Data, frame.data_bytes)?;
            lower(Resource::As, frame.address_bytes)?;
            lower(Resource::Fsize, frame.written_bytes)?;
            lower(Resource::Nofile, frame.files())?;
            Ok(format!("{} MiB of memory", data >> 20))
        };
        let ceilings: io::Result<String> = ceilings();
        self.tell(Part::Ceilings, ceilings);
        let (files, network) = landlock();
        self.parts.push(PartState { part: Part::Files, state: files });
        self.parts.push(PartState { part: Part::Network, state: network });
    }

    /// Closes the system calls for all threads, which exist and have begun, and returns how every part stands.
    pub fn seal(mut self) -> Vec<PartState> {
        // What looks up the kernel's own page once (by `prctl`, or by a file) does so while it may.
        let _ = wire::monotonic_ms();
        // Where the system calls cannot be filtered this keeps new processes away all the same.
        let _ = lower(Resource::Nproc, 0);
        self.tell(Part::Calls, calls::restrict());
        self.parts
    }

    fn tell<E: std::fmt::Display>(&mut self, part: Part, done: Result<String, E>) {
        let state = match done {
            Ok(how) => State::InForce(how),
            Err(error) => State::Missing(error.to_string()),
        };
        self.parts.push(PartState { part, state });
    }
}

/// Lowers both bounds of a resource to `ceiling`, or leaves them where they are lower; returns what holds.
fn lower(resource: Resource, ceiling: u64) -> io::Result<u64> {
    let ceiling = getrlimit(resource).maximum.map_or(ceiling, |maximum| maximum.min(ceiling));
    setrlimit(resource, Rlimit { current: Some(ceiling), maximum: Some(ceiling) })?;
    Ok(ceiling)
}

/// Needs a capability itself, so it comes before the identity is dropped.
fn empty_bounding_set() -> io::Result<()> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match capability_is_in_bounding_set(capability) {
            Ok(true) => remove_capability_from_bounding_set(capability)?,
            Ok(false) => {}
            // The kernel knows no capability from here on.
            Err(_) => break,
        }
    }
    Ok(())
}

fn drop_identity() -> io::Result<String> {
    let accounts = fs::read("/etc/passwd").unwrap_or_default();
    let (user, group, name) = match account(&accounts) {
        Some((user, group)) => (user, group, ACCOUNT),
        None => (NOBODY, NOBODY, "nobody"),
    };
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(group));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(format!("{name} ({user}:{group})"))
}

/// User and group of [`ACCOUNT`] in the text of passwd(5); never root's.
fn account(passwd: &[u8]) -> Option<(u32, u32)> {
    let lines = passwd.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    let line = lines.map(|line| line.split(':').collect::<Vec<_>>()).find(|f| f.first() == Some(&ACCOUNT))?;
    let number = |at: usize| line.get(at)?.parse::<u32>().ok().filter(|id| *id != 0 && *id != u32::MAX);
    Some((number(2)?, number(3)?))
}

fn drop_capabilities(bounding: io::Result<()>) -> io::Result<String> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    clear_ambient_capability_set()?;
    Ok(match bounding {
        Ok(()) => "none, none to be had",
        // Without rights to begin with there is none to take it away; no-new-privileges makes it idle.
        Err(_) => "none",
    }
    .to_owned())
}

/// States of [`Part::Files`] and [`Part::Network`].
fn landlock() -> (State, State) {
    let abi = ABI::V6;
    let restricted = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(|rules| rules.scope(Scope::from_all(abi)))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self);
    let both = |why: &str| (State::Missing(why.to_owned()), State::Missing(why.to_owned()));
    let status = match restricted {
        Ok(status) => status,
        Err(error) => return both(&error.to_string()),
    };
    let version = match status.landlock {
        LandlockStatus::NotEnabled => return both("landlock is switched off in this kernel"),
        LandlockStatus::NotImplemented => return both("landlock is not in this kernel"),
        LandlockStatus::Available { effective_abi, .. } => effective_abi,
    };
    if status.ruleset == RulesetStatus::NotEnforced {
        return both("landlock is not enforced");
    }
    let files = State::InForce(format!("no path (version {})", version as i32));
    let network = if version >= ABI::V6 {
        State::InForce(format!("no TCP, no signal, no abstract socket (version {})", version as i32))
    } else if version >= ABI::V4 {
        State::InForce(format!("no TCP (version {})", version as i32))
    } else {
        State::Missing(format!("landlock of this kernel (version {}) knows no network", version as i32))
    };
    (files, network)
}

// The address space of a 32-bit processor is smaller than these ceilings.
const _: () = assert!(size_of::<usize>() == 8, "ceilings are those of a 64-bit processor");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_follow_the_limits_and_the_machine() {
        let limits = ScanLimits::default();
        let huge = u64::MAX;
        let two = Frame::within(2, 0, &limits, huge);
        assert_eq!(two.data_bytes, (1 << 30) + 2 * (576 << 20));
        assert!(two.address_bytes > two.data_bytes + 2 * limits.file_bytes);
        assert!(Frame::within(3, 0, &limits, huge).data_bytes > two.data_bytes);
        assert_eq!(Frame::within(64, 0, &limits, 4 << 30).data_bytes, 2 << 30, "half of the machine");
        assert_eq!(Frame::within(64, 0, &limits, 1 << 20).data_bytes, LEAST_MEMORY);
        let endless = ScanLimits { member_bytes: u64::MAX, file_bytes: u64::MAX, ..limits };
        assert_eq!(Frame::within(usize::MAX, 0, &endless, 8 << 30).data_bytes, 4 << 30);
        assert_eq!(Frame::within(0, 0, &limits, huge).threads, 1);
    }

    #[test]
    fn the_account_is_taken_from_passwd_and_is_never_root() {
        assert_eq!(account(b"root:x:0:0::/:/bin/sh\ntm-scan:x:990:991::/:/bin/false\n"), Some((990, 991)));
        for text in [
            &b"root:x:0:0::/:/bin/sh\n"[..],
            b"tm-scan:x:0:5::/:",
            b"tm-scan:x:5:0::/:",
            b"tm-scan:x:-1:5::/:",
            b"tm-scan:x:4294967295:5::/:",
            b"tm-scan:x",
            b"tm-scanner:x:5:5::/:",
            b"\xff\xfetm-scan:x:5:5::/:",
            b"",
        ] {
            assert_eq!(account(text), None, "{}", String::from_utf8_lossy(text));
        }
    }
}
