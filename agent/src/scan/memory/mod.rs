//! Reads the memory of processes and hands it over in pieces, as files in memory.
//!
//! Processes whose program is gone from disk, or never was there, come first. A piece holds at most [`PIECE`]
//! bytes: stretches of pages one after the other, with a page of zeros between them, as there is at least one
//! between them in the process too; neighbours share [`OVERLAP`] bytes, so that what lies across the cut is
//! found. Rules that ask for an offset or a file's size mean the piece.
//!
//! **Invariant:** the process is not stopped, and no page is read that would make it grow.
//! **Invariant:** at most [`AT_ONCE`] pieces exist at a time.

mod maps;

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStrExt as _, fs::FileExt as _},
    },
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

use rustix::fs::{MemfdFlags, memfd_create};
use tm_protocol::report::{PathBytes, SkipReason, Skipped};

/// Largest piece, in bytes; a multiple of any page size.
const PIECE: u64 = 16 << 20;
/// What neighbouring pieces of a stretch share, in bytes; a multiple of any page size.
const OVERLAP: u64 = 64 << 10;
/// Most bytes of one process that are read, unless told otherwise.
pub(super) const MOST_BYTES: u64 = 4 << 30;
/// Pieces that may wait or be looked at.
const AT_ONCE: usize = 4;
/// How often a wait notices that the scan is called off.
const NOTICE: Duration = Duration::from_millis(50);

/// What the walk over processes comes upon.
#[derive(Debug)]
pub(super) enum Met {
    /// A piece of a process's memory.
    Piece {
        /// `/proc/PID/mem`.
        path: PathBytes,
        /// The program, and the addresses.
        member: Vec<PathBytes>,
        /// The content.
        file: OwnedFd,
    },
    /// A process was read to its end, so many bytes of it.
    Process(u64),
    /// Something that was not looked at.
    Skipped(Skipped),
}

/// How many pieces exist.
#[derive(Debug, Default)]
pub(super) struct Room {
    taken: Mutex<usize>,
    given: Condvar,
}

impl Room {
    /// Waits until there is room for one more. `false` if `stopped` meanwhile.
    fn take(&self, stopped: &dyn Fn() -> bool) -> bool {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken >= AT_ONCE {
            if stopped() {
                return false;
            }
            taken = self.given.wait_timeout(taken, NOTICE).unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken += 1;
        true
    }

    /// A piece was looked at.
    pub(super) fn give(&self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken = taken.saturating_sub(1);
        self.given.notify_one();
    }
}

/// A process that is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    pid: u32,
    program: PathBytes,
}

/// Visits every process but this one and its own, at most `most` bytes of each, in pieces of at most `piece` bytes.
pub(super) fn walk(
    (most, piece): (u64, u64),
    room: &Room,
    stopped: &dyn Fn() -> bool,
    visit: &mut dyn FnMut(Met),
) {
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
    let piece = (piece.min(PIECE) / page * page).max(OVERLAP * 2);
    for process in processes() {
        if stopped() {
            return;
        }
        let mut reader = Reader { process: &process, most, piece, page, read: 0, room, stopped, visit };
        match reader.run() {
            Ok(()) => {
                let read = reader.read;
                visit(Met::Process(read));
            }
            Err(error) => {
                // One that has ended meanwhile has no memory left to look at.
                let is_gone = !fs::exists(format!("/proc/{}/maps", process.pid)).unwrap_or(false)
                    || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error());
                if !is_gone {
                    skip(&process, vec![], SkipReason::Unreadable, visit);
                }
            }
        }
    }
}

/// Visits the same processes, says about how much would be read of each, and reads nothing.
pub(super) fn would_read(most: u64, visit: &mut dyn FnMut(Met)) {
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
    for process in processes() {
        // Resident and, among these, shared with a file (proc(5)), in pages; the rest is its own.
        let sizes = fs::read_to_string(format!("/proc/{}/statm", process.pid)).unwrap_or_default();
        let mut sizes = sizes.split(' ').skip(1).filter_map(|size| size.parse::<u64>().ok());
        let (Some(resident), Some(shared)) = (sizes.next(), sizes.next()) else { continue };
        visit(Met::Process(resident.saturating_sub(shared).saturating_mul(page).min(most)));
    }
}

fn skip(process: &Process, more: Vec<PathBytes>, reason: SkipReason, visit: &mut dyn FnMut(Met)) {
    let member = [process.program.clone()].into_iter().chain(more).collect();
    visit(Met::Skipped(Skipped { path: place(process.pid), member, reason }));
}

fn place(pid: u32) -> PathBytes {
    PathBytes(format!("/proc/{pid}/mem").into_bytes())
}

/// Every process that has a program; those whose program is not on disk first.
fn processes() -> Vec<Process> {
    let own = std::process::id();
    let mut processes: Vec<Process> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own && parent(*pid) != Some(own))
        .filter_map(|pid| {
            // Threads of the kernel have none.
            let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
            Some(Process { pid, program: PathBytes::from(program.as_os_str().as_bytes()) })
        })
        .collect();
    processes.sort_by_key(|process| (!maps::is_gone(&process.program.0), process.pid));
    processes
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, a name in parentheses, may hold blanks and parentheses itself.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

struct Reader<'a> {
    process: &'a Process,
    most: u64,
    piece: u64,
    page: u64,
    /// Bytes so far.
    read: u64,
    room: &'a Room,
    stopped: &'a dyn Fn() -> bool,
    visit: &'a mut dyn FnMut(Met),
}

/// A piece that is being filled.
struct Filling<'a> {
    /// `None` once it is handed over.
    file: Option<File>,
    len: u64,
    start: u64,
    end: u64,
    room: &'a Room,
}

impl Drop for Filling<'_> {
    fn drop(&mut self) {
        if self.file.is_some() {
            self.room.give();
        }
    }
}

impl<'a> Reader<'a> {
    fn run(&mut self) -> io::Result<()> {
        let pid = self.process.pid;
        let mappings = maps::read(pid)?;
        let mem = File::open(format!("/proc/{pid}/mem"))?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let (mut swapped, mut unread) = (0, false);
        for mapping in mappings {
            let content = maps::content(&pagemap, &mapping, self.page)?;
            swapped += content.swapped;
            let mut filling = None;
            for run in content.runs {
                let mut at = run.start;
                while at < run.end {
                    if self.read >= self.most || (self.stopped)() {
                        unread |= self.read >= self.most;
                        break;
                    }
                    at = self.fill(&mem, &mut filling, at..run.end)?;
                    if at < run.end {
                        self.hand_over(filling.take(), &mapping.name);
                        at = at.saturating_sub(OVERLAP).max(run.start);
                    }
                }
            }
            self.hand_over(filling, &mapping.name);
        }
        if unread || swapped > 0 {
            skip(self.process, vec![], SkipReason::Limit, self.visit);
        }
        Ok(())
    }

    /// Reads from the start of `run` into the piece until one of them ends; where it came to.
    fn fill(&mut self, mem: &File, filling: &mut Option<Filling<'a>>, run: Range<u64>) -> io::Result<u64> {
        if filling.as_ref().is_some_and(|filling| filling.len + self.page * 2 > self.piece) {
            return Ok(run.start);
        }
        let filling = match filling {
            Some(filling) => {
                filling.len += self.page;
                filling
            }
            None => {
                if !self.room.take(self.stopped) {
                    return Ok(run.end);
                }
                let file = match memfd_create("tm-scan-memory", MemfdFlags::CLOEXEC) {
                    Ok(file) => File::from(file),
                    Err(errno) => {
                        self.room.give();
                        return Err(errno.into());
                    }
                };
                let (start, room) = (run.start, self.room);
                filling.insert(Filling { file: Some(file), len: 0, start, end: start, room })
            }
        };
        let mut buffer = vec![0; 256 << 10];
        let mut at = run.start;
        while at < run.end && filling.len < self.piece {
            let wanted = (run.end - at).min(self.piece - filling.len).min(buffer.len() as u64);
            let wanted = usize::try_from(wanted).map_err(io::Error::other)?;
            let Some(part) = buffer.get_mut(..wanted) else { break };
            match mem.read_at(part, at) {
                // The page went away meanwhile: it reads as zeros, as it would in the process.
                Ok(0) => part.fill(0),
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                    part.fill(0)
                }
                Err(error) => return Err(error),
                Ok(_) => {}
            }
            if let Some(file) = &filling.file {
                file.write_all_at(part, filling.len)?;
            }
            let wanted = u64::try_from(wanted).map_err(io::Error::other)?;
            (filling.len, at) = (filling.len + wanted, at + wanted);
            self.read += wanted;
        }
        filling.end = at;
        Ok(at)
    }

    fn hand_over(&mut self, filling: Option<Filling<'_>>, name: &PathBytes) {
        let Some(mut filling) = filling else { return };
        let Some(file) = filling.file.take() else { return };
        let addresses = format!("{:x}-{:x}", filling.start, filling.end);
        let mut member = vec![self.process.program.clone(), PathBytes(addresses.into_bytes())];
        if !name.0.is_empty() && *name != self.process.program {
            member.push(name.clone());
        }
        (self.visit)(Met::Piece { path: place(self.process.pid), member, file: file.into() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces of this very process, each given back at once.
    fn own_pieces(most: u64) -> (Vec<Vec<u8>>, Vec<Skipped>, u64) {
        let process = Process { pid: std::process::id(), program: PathBytes::from(&b"/own"[..]) };
        let room = Room::default();
        let (mut pieces, mut skipped) = (Vec::new(), Vec::new());
        let visit = &mut |met: Met| match met {
            Met::Piece { file, .. } => {
                let file = File::from(file);
                let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
                file.read_exact_at(&mut bytes, 0).unwrap();
                pieces.push(bytes);
                room.give();
            }
            Met::Process(_) => {}
            Met::Skipped(one) => skipped.push(one),
        };
        let (piece, page) = (OVERLAP * 2, 4096);
        let mut reader =
            Reader { process: &process, most, piece, page, read: 0, room: &room, stopped: &|| false, visit };
        reader.run().unwrap();
        let read = reader.read;
        assert_eq!(*room.taken.lock().unwrap(), 0, "all room was given back");
        (pieces, skipped, read)
    }

    #[test]
    fn what_lies_across_a_cut_is_in_one_of_the_pieces() {
        // Text that this process holds nowhere else, at every kilobyte.
        let secret: Vec<u8> = (0..48u8).map(|n| n.wrapping_mul(37) ^ 0x5a).collect();
        let mut held = vec![1; 1 << 20];
        let places = held.len() / 1024;
        held.chunks_mut(1024).enumerate().for_each(|(at, chunk)| {
            chunk[..48].copy_from_slice(&secret);
            chunk[48..52].copy_from_slice(&u32::try_from(at).unwrap().to_be_bytes());
        });
        let (pieces, _, read) = own_pieces(1 << 40);
        assert!(pieces.iter().all(|piece| piece.len() as u64 <= OVERLAP * 2));
        assert!(read >= 1 << 20);
        let mut met = std::collections::BTreeSet::new();
        for piece in &pieces {
            for (at, window) in piece.windows(52).enumerate().filter(|(_, window)| window[..48] == secret) {
                assert!(at < piece.len());
                met.insert(u32::from_be_bytes(window[48..].try_into().unwrap()));
            }
        }
        assert!((0..places).all(|at| met.contains(&u32::try_from(at).unwrap())), "{} of {places}", met.len());
        assert_eq!(held.len(), 1 << 20);
    }

    #[test]
    fn more_than_allowed_is_named_and_not_read() {
        let (_, skipped, read) = own_pieces(100_000);
        assert!(read < 100_000 + OVERLAP * 2, "{read}");
        assert_eq!(skipped.iter().map(|skipped| skipped.reason).collect::<Vec<_>>(), [SkipReason::Limit]);
    }

    #[test]
    fn a_walk_that_is_called_off_waits_for_no_room() {
        let room = Room::default();
        assert!((0..AT_ONCE).all(|_| room.take(&|| false)));
        assert!(!room.take(&|| true));
        room.give();
        assert!(room.take(&|| false));
    }
}
