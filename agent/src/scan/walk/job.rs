//! One step of a walk: the system calls that may block, on descriptors of its own.
//!
//! **Invariant:** a step touches nothing of the walk's state, so that a step that never returns can be left
//! behind with its thread.
//! **Invariant:** no full path below the start is given to the system, so its length does not matter.

use std::{
    ffi::{CStr, CString},
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::Arc,
};

use rustix::{
    fs::{FileType, RawDir, SeekFrom},
    io::Errno,
};
use tm_protocol::report::SkipReason;

use super::PathError;
use crate::platform::{
    fs::{self, Facts, Kind, OpenError, Place, Residence},
    mounts::Mounts,
};

/// Bytes of a folder's listing that are read at a time; some hundred names.
const LISTING: usize = 32 << 10;

/// What a walking thread keeps between its steps.
pub(super) struct Hands {
    mounts: Mounts,
    buffer: Vec<MaybeUninit<u8>>,
}

impl Hands {
    pub(super) fn new() -> Self {
        Self { mounts: Mounts::new(), buffer: vec![MaybeUninit::uninit(); LISTING] }
    }
}

/// A name in a folder.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: CString,
    pub(super) kind: FileType,
    pub(super) inode: u64,
    /// Where the listing goes on after it.
    pub(super) next: u64,
}

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Job {
    /// Look at the path that the walk was asked for.
    Start { path: Vec<u8> },
    /// Read on in a folder's listing, from `seek` where the descriptor does not stand there.
    List { folder: Arc<OwnedFd>, seek: Option<u64> },
    /// Look at an entry and open it.
    Look { folder: Arc<OwnedFd>, inside: Facts, name: CString, border: Border },
    /// Go back from a finished folder to the one that holds it; `parent` is `None` where that was closed.
    Leave { child: Arc<OwnedFd>, was: Facts, name: CString, parent: Option<Arc<OwnedFd>>, parent_was: Facts },
    /// Go down again from `top`.
    Descend { top: Arc<OwnedFd>, steps: Vec<(CString, Facts)> },
}

/// Where a walk ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum Border {
    /// At the file system of this thing.
    Of(Facts),
    /// Where nothing is on this machine.
    Local,
}

/// What came of a job.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Of `Start` and `Look`.
    Seen(Seen),
    /// Some of the listing. `end` once there is no more: what the folder then was, or why it cannot be told.
    Listed { entries: Vec<Entry>, end: Option<Result<Facts, Errno>> },
    /// Of `Leave`: whether the folder stood where it was entered, and the one that holds it unless it is lost.
    Left { moved: bool, parent: Option<Arc<OwnedFd>> },
    /// Of `Descend`: how many steps were possible, and where the last one led.
    Descended { steps: usize, folder: Option<Arc<OwnedFd>> },
}

/// What stands under a name.
#[derive(Debug)]
pub(super) enum Seen {
    /// Nothing any more.
    Gone,
    /// Something that is not looked at.
    Skip(SkipReason),
    /// A regular file, open.
    File(OwnedFd, Facts),
    /// A folder, open for listing.
    Folder(OwnedFd, Facts),
}

impl Job {
    /// Whether it is worth looking at a clock for.
    pub(super) fn is_long(&self) -> bool {
        match self {
            Self::List { .. } | Self::Descend { .. } => true,
            Self::Start { .. } | Self::Look { .. } | Self::Leave { .. } => false,
        }
    }

    /// Does it. May block as long as a file system likes.
    pub(super) fn perform(self, hands: &mut Hands) -> Outcome {
        match self {
            Self::Start { path } => Outcome::Seen(start(&path, &mut hands.mounts)),
            Self::List { folder, seek } => list(&folder, seek, &mut hands.buffer),
            Self::Look { folder, inside, name, border } => {
                Outcome::Seen(look(&folder, &inside, &name, &border, &mut hands.mounts))
            }
            Self::Leave { child, was, name, parent, parent_was } => {
                let parent = parent.or_else(|| up(&child, &parent_was));
                let moved = parent.as_ref().is_some_and(|parent| has_moved(parent, &name, &child, &was));
                Outcome::Left { moved, parent }
            }
            Self::Descend { top, steps } => {
                let (mut reached, mut folder) = (0, None);
                for (name, was) in steps {
                    match fs::open_folder_at(folder.as_ref().unwrap_or(&top), &name, &was) {
                        Ok(fd) => folder = Some(Arc::new(fd)),
                        Err(_) => break,
                    }
                    reached += 1;
                }
                Outcome::Descended { steps: reached, folder }
            }
        }
    }
}

/// Finds out whether a path can be walked: it exists, and no link is on the way. A path that may not be read,
/// or lies out of reach of this machine, is left to the walk, which names it.
///
/// # Errors
/// [`PathError`], with the path in it.
pub(super) fn check(path: &[u8]) -> Result<(), PathError> {
    let mut mounts = Mounts::new();
    let found = Place::find_by_names(path, &mut |mount| !mounts.is_remote_throughout(mount));
    match found.and_then(|place| place.map(|place| place.facts()).transpose()) {
        Ok(Some(Facts { kind: Kind::Symlink, .. })) | Err(Errno::LOOP) => Err(PathError::Link(path.into())),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::INVAL) => Err(PathError::Missing(path.into())),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn start(path: &[u8], mounts: &mut Mounts) -> Seen {
    let found = Place::find_by_names(path, &mut |mount| !mounts.is_remote_throughout(mount));
    let place = match found {
        Ok(Some(place)) => place,
        Ok(None) => return Seen::Skip(SkipReason::Remote),
        Err(errno) => return not_found(errno),
    };
    let (folder, name) = (place.folder(), place.name().unwrap_or(c"."));
    // The mount is known without asking what lies on it.
    if let Some(reason) =
        fs::mount_at(folder, name).and_then(|mount| mounts.residence(mount)).and_then(elsewhere)
    {
        return Seen::Skip(reason);
    }
    let facts = match place.facts() {
        Ok(facts) => facts,
        Err(errno) => return not_found(errno),
    };
    if facts.mount.and_then(|mount| mounts.residence(mount)).is_none() {
        match place.residence().map(elsewhere) {
            Ok(None) => {}
            Ok(Some(reason)) => return Seen::Skip(reason),
            Err(errno) => return not_found(errno),
        }
    }
    match facts.kind {
        Kind::Symlink => Seen::Skip(SkipReason::Symlink),
        Kind::Special => Seen::Skip(SkipReason::Special),
        Kind::Folder => opened(place.open_folder(&facts), |fd| Seen::Folder(fd, facts)),
        Kind::Regular => opened(place.open_regular(&facts), |fd| Seen::File(fd, facts)),
    }
}

/// It existed when the order was checked.
fn not_found(errno: Errno) -> Seen {
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP => Seen::Skip(SkipReason::Changed),
        _ => Seen::Skip(SkipReason::Unreadable),
    }
}

/// Why a file system of this kind is not walked, if it is not.
fn elsewhere(residence: Residence) -> Option<SkipReason> {
    match residence {
        Residence::Local => None,
        Residence::Pseudo => Some(SkipReason::Pseudo),
        Residence::Remote => Some(SkipReason::Remote),
    }
}

fn opened(result: Result<OwnedFd, OpenError>, seen: impl FnOnce(OwnedFd) -> Seen) -> Seen {
    match result {
        Ok(fd) => seen(fd),
        Err(OpenError::Gone) => Seen::Gone,
        Err(OpenError::Changed) => Seen::Skip(SkipReason::Changed),
        Err(OpenError::Refused(_)) => Seen::Skip(SkipReason::Unreadable),
    }
}

/// One buffer of the listing.
fn list(folder: &OwnedFd, seek: Option<u64>, buffer: &mut [MaybeUninit<u8>]) -> Outcome {
    let mut entries = Vec::new();
    let failed = |errno| Outcome::Listed { entries: vec![], end: Some(Err(errno)) };
    if let Some(position) = seek
        && let Err(errno) = rustix::fs::seek(folder, SeekFrom::Start(position))
    {
        return failed(errno);
    }
    let mut listing = RawDir::new(folder, buffer);
    while entries.is_empty() || !listing.is_buffer_empty() {
        match listing.next() {
            Some(Ok(entry)) => {
                let name = entry.file_name();
                if name != c"." && name != c".." {
                    entries.push(Entry {
                        name: name.to_owned(),
                        kind: entry.file_type(),
                        inode: entry.ino(),
                        next: entry.next_entry_cookie(),
                    });
                }
            }
            // A folder that was removed has no more entries.
            None | Some(Err(Errno::NOENT)) => {
                return Outcome::Listed { entries, end: Some(fs::facts_of(folder)) };
            }
            Some(Err(errno)) => return failed(errno),
        }
    }
    Outcome::Listed { entries, end: None }
}

fn look(folder: &OwnedFd, inside: &Facts, name: &CStr, border: &Border, mounts: &mut Mounts) -> Seen {
    let facts = match fs::facts_at(folder, name) {
        Ok(facts) => facts,
        Err(Errno::NOENT) => return Seen::Gone,
        Err(_) => {
            // Somebody's own mount says nothing to others, not even to root; the mount table does.
            let mount = fs::mount_at(folder, name).filter(|mount| inside.mount.is_some_and(|m| m != *mount));
            let reason = mount.and_then(|mount| mounts.residence(mount)).and_then(elsewhere);
            return Seen::Skip(reason.unwrap_or(SkipReason::Unreadable));
        }
    };
    match facts.kind {
        Kind::Symlink => return Seen::Skip(SkipReason::Symlink),
        Kind::Special => return Seen::Skip(SkipReason::Special),
        Kind::Regular | Kind::Folder => {}
    }
    let crosses = match border {
        Border::Of(root) => facts.is_on_other_filesystem_than(root),
        Border::Local => facts.is_mounted_in(inside),
    };
    if crosses {
        let residence = facts.mount.and_then(|mount| mounts.residence(mount));
        let residence = residence.map_or_else(|| fs::residence_at(folder, name), Ok);
        let reason = match (residence, border) {
            (Ok(Residence::Local), Border::Local) => None,
            (Ok(Residence::Local) | Err(_), Border::Of(_)) => Some(SkipReason::OtherFilesystem),
            (Err(_), Border::Local) => Some(SkipReason::Unreadable),
            (Ok(other), _) => elsewhere(other),
        };
        if let Some(reason) = reason {
            return Seen::Skip(reason);
        }
    }
    if facts.kind == Kind::Folder {
        opened(fs::open_folder_at(folder, name, &facts), |fd| Seen::Folder(fd, facts))
    } else {
        opened(fs::open_regular_at(folder, name, &facts), |fd| Seen::File(fd, facts))
    }
}

/// The folder that holds `child`, if it is the one that was.
fn up(child: &OwnedFd, was: &Facts) -> Option<Arc<OwnedFd>> {
    fs::open_folder_at(child, c"..", was).ok().map(Arc::new)
}

/// Whether a finished folder, which is still there, does not stand any more where it was entered.
fn has_moved(parent: &OwnedFd, name: &CStr, child: &OwnedFd, was: &Facts) -> bool {
    let is_there = fs::facts_at(parent, name).is_ok_and(|now| now.is_same_object(was));
    !is_there && fs::facts_of(child).is_ok_and(|now| now.links > 0)
}

/// A thread for steps that may block.
///
/// # Errors
/// If the system has none to give.
pub(super) fn thread(work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("scan-walk".to_owned()).spawn(work).map(drop)
}
