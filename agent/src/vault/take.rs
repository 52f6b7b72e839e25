//! Taking a file away from under its name, though somebody may exchange names at full speed.
//!
//! The name is moved into a private folder beside it, where nobody else can reach it; there it is looked at,
//! and removed if it is the file, or moved back if it is not. Looking first and removing by name after would
//! remove whatever stands there by then.
//!
//! **Invariant:** nothing is removed but the file with this inode and this content.
//! **Invariant:** what was moved and is not the file goes back to its name, or, if that was taken meanwhile,
//! to `<name>.tm-kept-<id>`; where neither is possible it stays in the private folder for `recover`.

use std::{
    ffi::{CStr, CString},
    fs::File,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::{fs::AtFlags, io::Errno};
use tm_protocol::{
    ids::{Sha256, VaultId},
    report::PathBytes,
};

use super::{error::VaultError, is_same_inode, private_name, put::digest};
use crate::platform::{
    attributes::{Attributes, attributes},
    create::{INSIDE, find_private, is_only_roots, move_new, private_folder, remove_private, sync_names},
    fs::{Facts, Kind, Object, OpenError, facts_at, open_regular_at},
};

/// The longest name of a file.
const NAME_MAX: usize = 255;

/// A file to take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) id: VaultId,
    pub(super) path: &'a PathBytes,
    /// The folder it is in, held.
    pub(super) parent: BorrowedFd<'a>,
    /// Its name there.
    pub(super) name: &'a CStr,
    pub(super) object: Object,
    pub(super) sha256: Sha256,
    /// What was seen of it when its content was read, if that was in this process just now.
    pub(super) seen: Option<&'a Attributes>,
}

/// Why a file was not taken, or not for sure.
#[derive(Debug)]
pub(super) enum Untaken {
    /// What stood under the name stands there again, or beside it, or is gone by somebody else's doing.
    Intact(VaultError),
    /// It is in between, or it is not sure to stay removed. [`super::Vault::recover`] settles it.
    Unclear(VaultError),
}

/// Removes the file from its place, durably.
///
/// # Errors
/// If it is not the file, or a step does not succeed.
pub(super) fn take(target: Target<'_>) -> Result<(), Untaken> {
    let private = private_name(target.id);
    let folder = match private_folder(target.parent, &private) {
        Ok(folder) => folder,
        Err(Errno::AGAIN) => {
            return Err(Untaken::Intact(changed(
                target,
                "cannot be taken: somebody interferes in its folder",
            )));
        }
        Err(errno) => {
            // It may have been made, and then could not be opened.
            remove_private(target.parent, &private)
                .map_err(|errno| Untaken::Unclear(io(target, "remove the private folder beside")(errno)))?;
            return match errno {
                // A full disk must not keep a file in its place where there is a safe way without the folder.
                Errno::NOSPC | Errno::DQUOT | Errno::MLINK => take_directly(target, errno),
                errno => Err(Untaken::Intact(io(target, "make a private folder beside")(errno))),
            };
        }
    };
    if let Err(errno) = move_new(target.parent, target.name, &folder, INSIDE) {
        if errno == Errno::EXIST {
            // Something from an earlier time is in it.
            return Err(Untaken::Unclear(VaultError::Unsettled(target.id)));
        }
        remove_private(target.parent, &private)
            .map_err(|errno| Untaken::Unclear(io(target, "remove the private folder beside")(errno)))?;
        return Err(Untaken::Intact(match errno {
            Errno::NOENT => VaultError::Gone(target.path.clone()),
            errno => io(target, "move")(errno),
        }));
    }
    settle(target, folder.as_fd())
}

/// Goes on with what an interrupted [`take`] left in the private folder; false if it left none.
///
/// # Errors
/// As for [`take`].
pub(super) fn go_on(target: Target<'_>) -> Result<bool, Untaken> {
    let private = private_name(target.id);
    let folder = match find_private(target.parent, &private) {
        Ok(Some(folder)) => folder,
        // A stranger's thing of that name is none of ours.
        Ok(None) | Err(Errno::AGAIN) => return Ok(false),
        Err(errno) => return Err(Untaken::Unclear(io(target, "look beside")(errno))),
    };
    match facts_at(&folder, INSIDE) {
        Ok(_) => settle(target, folder.as_fd()).map(|()| true),
        Err(Errno::NOENT) => {
            remove_private(target.parent, &private)
                .map_err(|errno| Untaken::Unclear(io(target, "remove the private folder beside")(errno)))?;
            Ok(false)
        }
        Err(errno) => Err(Untaken::Unclear(io(target, "look beside")(errno))),
    }
}

/// Moves what an interrupted [`take`] left in the private folder back to its place.
///
/// # Errors
/// If it cannot be moved.
pub(super) fn give_back(target: Target<'_>) -> Result<(), VaultError> {
    let private = private_name(target.id);
    match find_private(target.parent, &private) {
        Ok(Some(folder)) => {
            match facts_at(&folder, INSIDE) {
                Ok(_) => put_back(target, folder.as_fd()).map(drop)?,
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(io(target, "look beside")(errno)),
            }
            remove_private(target.parent, &private)
                .map_err(io(target, "remove the private folder beside"))?;
            sync_names(target.parent).map_err(io(target, "sync the folder of"))
        }
        Ok(None) | Err(Errno::AGAIN) => Ok(()),
        Err(errno) => Err(io(target, "look beside")(errno)),
    }
}

/// Judges what was moved into the private folder, and removes it or moves it back.
fn settle(target: Target<'_>, folder: BorrowedFd<'_>) -> Result<(), Untaken> {
    let removed = match is_ours(target, folder) {
        Ok(true) => rustix::fs::unlinkat(folder, INSIDE, AtFlags::empty()).map_err(io(target, "remove")),
        Ok(false) => Err(changed(target, "is no longer the file that was judged")),
        Err(error) => Err(error),
    };
    let tidy = || {
        remove_private(target.parent, &private_name(target.id))
            .map_err(io(target, "remove the private folder beside"))?;
        sync_names(target.parent).map_err(io(target, "sync the folder of"))
    };
    let error = match removed {
        Ok(()) => return tidy().map_err(Untaken::Unclear),
        Err(error) => error,
    };
    match put_back(target, folder) {
        Ok(None) => {
            // The file is safe; what is left undone here is an empty folder, which `recover` knows.
            tidy().map_err(Untaken::Unclear)?;
            Err(Untaken::Intact(error))
        }
        Ok(Some(other)) => {
            tidy().map_err(Untaken::Unclear)?;
            let text = format!("was exchanged while it was taken; what stood there is now `{other}`");
            Err(Untaken::Intact(VaultError::Changed(target.path.clone(), text)))
        }
        Err(error) => Err(Untaken::Unclear(error)),
    }
}

/// Whether what lies in the private folder is the file.
fn is_ours(target: Target<'_>, folder: BorrowedFd<'_>) -> Result<bool, VaultError> {
    let facts: Facts = facts_at(folder, INSIDE).map_err(io(target, "look at"))?;
    if facts.kind != Kind::Regular || !is_same_inode(facts.object(), target.object) {
        return Ok(false);
    }
    let file: File = match open_regular_at(folder, INSIDE, &facts) {
        Ok(fd) => fd.into(),
        Err(OpenError::Gone | OpenError::Changed) => return Ok(false),
        Err(OpenError::Refused(errno)) => return Err(io(target, "open")(errno)),
    };
    if let Some(seen) = target.seen {
        if facts.object() != target.object {
            return Ok(false);
        }
        let now = attributes(&file).map_err(io(target, "look at"))?;
        if (now.size, now.modified) == (seen.size, seen.modified) {
            return Ok(true);
        }
    }
    Ok(digest(&file, target.path)?.0 == target.sha256)
}

/// Moves what lies in the private folder back; to another name, which is told, if the old one is taken.
fn put_back(target: Target<'_>, folder: BorrowedFd<'_>) -> Result<Option<PathBytes>, VaultError> {
    match move_new(folder, INSIDE, target.parent, target.name) {
        Ok(()) => return Ok(None),
        Err(Errno::EXIST) => {}
        Err(errno) => return Err(io(target, "move back")(errno)),
    }
    let name = kept_name(target.name, target.id);
    move_new(folder, INSIDE, target.parent, &name).map_err(io(target, "move back"))?;
    let mut path = target.path.0.clone();
    path.truncate(path.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1));
    path.extend_from_slice(name.as_bytes());
    Ok(Some(PathBytes(path)))
}

fn kept_name(name: &CStr, id: VaultId) -> CString {
    let end = format!(".tm-kept-{id}");
    let mut new = name.to_bytes().to_vec();
    new.truncate(NAME_MAX.saturating_sub(end.len()));
    new.extend_from_slice(end.as_bytes());
    CString::new(new).expect("neither part has a zero byte")
}

/// Without a private folder: safe where nobody but root can exchange names.
fn take_directly(target: Target<'_>, why: Errno) -> Result<(), Untaken> {
    let intact = |doing, errno| Untaken::Intact(io(target, doing)(errno));
    if !is_only_roots(target.parent).map_err(|errno| intact("look at the folder of", errno))? {
        return Err(intact("make a private folder beside", why));
    }
    let facts = match facts_at(target.parent, target.name) {
        Err(Errno::NOENT) => return Err(Untaken::Intact(VaultError::Gone(target.path.clone()))),
        other => other.map_err(|errno| intact("look at", errno))?,
    };
    let file = match open_regular_at(target.parent, target.name, &facts) {
        Ok(fd) => File::from(fd),
        Err(OpenError::Refused(errno)) => return Err(intact("open", errno)),
        Err(OpenError::Gone | OpenError::Changed) => {
            return Err(Untaken::Intact(changed(target, "is no longer the file that was judged")));
        }
    };
    let (sha256, _) = digest(&file, target.path).map_err(Untaken::Intact)?;
    if !is_same_inode(facts.object(), target.object) || sha256 != target.sha256 {
        return Err(Untaken::Intact(changed(target, "is no longer the file that was judged")));
    }
    rustix::fs::unlinkat(target.parent, target.name, AtFlags::empty())
        .map_err(|errno| intact("remove", errno))?;
    sync_names(target.parent).map_err(|errno| Untaken::Unclear(io(target, "sync the folder of")(errno)))
}

fn changed(target: Target<'_>, how: &str) -> VaultError {
    VaultError::Changed(target.path.clone(), how.to_owned())
}

fn io(target: Target<'_>, doing: &'static str) -> impl FnOnce(Errno) -> VaultError {
    VaultError::io(doing, target.path)
}
