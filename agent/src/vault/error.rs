//! Why the vault did not do what was asked.

use std::io;

use rustix::io::Errno;
use tm_protocol::{
    ids::VaultId,
    report::{Failure, PathBytes},
};

/// Why the vault did not do what was asked. Where something was asked of a file, the file is what and where it
/// was, unless the message says otherwise.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VaultError {
    #[error("`{0}` is no longer there")]
    Gone(PathBytes),
    #[error("`{0}` {1}")]
    Changed(PathBytes, String),
    #[error("`{0}` is {1}; only regular files are vaulted")]
    NotRegular(PathBytes, &'static str),
    #[error("`{0}` is a symbolic link, or one stands on the way to it")]
    Symlink(PathBytes),
    #[error("`{0}` is not an absolute path without `.` and `..`")]
    BadPath(PathBytes),
    #[error("`{0}` lies on {1}")]
    Residence(PathBytes, &'static str),
    #[error("`{0}` belongs to tm-agent itself")]
    OwnFile(PathBytes),
    #[error("the vault is full: {used} of {quota} bytes are in use, and {needed} more are needed")]
    Full { used: u64, quota: u64, needed: u64 },
    #[error("not enough room {on}: {needed} bytes are needed, {free} are free")]
    NoRoom { on: &'static str, needed: u64, free: u64 },
    #[error("{0}: no file can be made, its file system has no more inodes or is read-only")]
    NoFiles(&'static str),
    #[error("`{0}` is marked immutable or append-only (see lsattr)")]
    Immutable(PathBytes),
    #[error("something stands under `{0}` already")]
    Exists(PathBytes),
    #[error("the folder of `{0}` is not there")]
    NoParent(PathBytes),
    #[error("the folder of `{0}` belongs to another user than when the file was vaulted")]
    ParentChanged(PathBytes),
    #[error("there is no item {0} in the vault")]
    UnknownItem(VaultId),
    #[error("item {0} was put back already, to `{1}`")]
    RestoredBefore(VaultId, PathBytes),
    #[error("item {0} is not settled after an interruption")]
    Unsettled(VaultId),
    #[error("item {0} is damaged: {1}")]
    Damaged(VaultId, &'static str),
    #[error("item {0} was not made by this vault")]
    Foreign(VaultId),
    #[error("the vault is in use by another tm-agent (pid {0})")]
    InUse(String),
    #[error("the vault has items but its key file is {0}")]
    Key(&'static str),
    #[error("cannot {doing} `{on}`")]
    Io { doing: &'static str, on: PathBytes, source: io::Error },
}

impl VaultError {
    /// The stable word for it.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Gone(_) => "gone",
            Self::Changed(..) => "changed",
            Self::NotRegular(..) => "not-regular",
            Self::Symlink(_) => "symlink",
            Self::BadPath(_) => "bad-path",
            Self::Residence(..) => "not-local",
            Self::OwnFile(_) => "own-file",
            Self::Full { .. } => "vault-full",
            Self::NoRoom { .. } | Self::NoFiles(_) => "no-space",
            Self::Immutable(_) => "immutable",
            Self::Exists(_) => "exists",
            Self::NoParent(_) => "no-parent",
            Self::ParentChanged(_) => "parent-changed",
            Self::UnknownItem(_) => "unknown-item",
            Self::RestoredBefore(..) => "restored-before",
            Self::Unsettled(_) => "unsettled",
            Self::Damaged(..) => "damaged-item",
            Self::Foreign(_) => "foreign-item",
            Self::InUse(_) => "in-use",
            Self::Key(_) => "no-key",
            Self::Io { source, .. } if is_no_room(source) => "no-space",
            Self::Io { .. } => "io",
        }
    }

    /// Whether the vault will not do it, as against could not.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Changed(..)
            | Self::NotRegular(..)
            | Self::Symlink(_)
            | Self::BadPath(_)
            | Self::Residence(..)
            | Self::OwnFile(_)
            | Self::Full { .. }
            | Self::Exists(_)
            | Self::ParentChanged(_)
            | Self::RestoredBefore(..)
            | Self::Damaged(..)
            | Self::Foreign(_) => true,
            Self::Gone(_)
            | Self::NoRoom { .. }
            | Self::NoFiles(_)
            | Self::Immutable(_)
            | Self::NoParent(_)
            | Self::UnknownItem(_)
            | Self::Unsettled(_)
            | Self::InUse(_)
            | Self::Key(_)
            | Self::Io { .. } => false,
        }
    }

    /// What the operator may do about it, where there is something to say.
    pub(crate) fn advice(&self) -> Option<&'static str> {
        Some(match self {
            Self::Symlink(_) => "name the real file: links are not followed (see realpath)",
            Self::BadPath(_) => "name the file by its full path",
            Self::Changed(..) => "scan it again, so that what stands there now is judged",
            Self::Full { .. } => "remove old items: tm-agent vault purge --older-than 30d",
            Self::NoRoom { .. } | Self::NoFiles(_) => "free some space and try again; nothing was changed",
            Self::Immutable(_) => "take the mark away (chattr -ia) and try again",
            Self::Exists(_) => "move that away, or choose another place with --to",
            Self::NoParent(_) => "make the folder, or choose another place with --to",
            Self::ParentChanged(_) => {
                "look at the folder; to put the file there all the same, name it with --to"
            }
            Self::UnknownItem(_) => "see what there is: tm-agent vault list",
            Self::Unsettled(_) => "settle what was interrupted: tm-agent vault recover",
            Self::Damaged(..) | Self::Foreign(_) => {
                "bring the item's file back from a backup of this endpoint"
            }
            Self::InUse(_) => "wait for its end and try again",
            Self::Key(_) => "bring the key back from a backup of this endpoint",
            Self::Io { source, .. } if is_no_room(source) => "free some space and try again",
            Self::Gone(_)
            | Self::NotRegular(..)
            | Self::Residence(..)
            | Self::OwnFile(_)
            | Self::RestoredBefore(..)
            | Self::Io { .. } => return None,
        })
    }

    /// The same for a report to the manager.
    pub(crate) fn failure(&self) -> Failure {
        Failure::new(self.code(), chain(self))
    }

    /// An error of the system while doing `doing` on `on`.
    pub(super) fn io(doing: &'static str, on: &PathBytes) -> impl FnOnce(Errno) -> Self {
        let on = on.clone();
        move |errno| Self::Io { doing, on, source: errno.into() }
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn is_no_room(error: &io::Error) -> bool {
    match Errno::from_io_error(error) {
        Some(errno) => matches!(errno, Errno::NOSPC | Errno::DQUOT),
        None => matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded),
    }
}
