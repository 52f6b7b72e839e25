//! Where things lie in the agent's state folder, and how files there are replaced.
//!
//! **Invariant:** a file is replaced whole or not at all; nothing below the folder is readable for others.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// The agent's state folder.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    root: PathBuf,
}

impl Paths {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The folder itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Held by the running agent.
    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Key, certificates and addresses, once enrolled.
    pub(crate) fn identity(&self) -> PathBuf {
        self.root.join("identity")
    }

    /// An identity that is being made; left over only by a crash.
    pub(crate) fn new_identity(&self) -> PathBuf {
        self.root.join("identity.new")
    }

    /// The identity that a renewed one has replaced, until a manager has welcomed the new.
    pub(crate) fn old_identity(&self) -> PathBuf {
        self.root.join("identity.old")
    }

    /// What a manager last said that the time is.
    pub(crate) fn clock(&self) -> PathBuf {
        self.root.join("clock.json")
    }

    /// Settings, if there are any.
    pub(crate) fn config(&self) -> PathBuf {
        self.root.join("agent.toml")
    }

    /// What the agent must not forget: tasks, reports, detections.
    pub(crate) fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    /// Patterns by digest.
    pub(crate) fn patterns(&self) -> PathBuf {
        self.root.join("patterns")
    }

    /// Whose patterns are used: `anchor` (the root's digest in hex, from the enrollment token) and `set.json`
    /// (the signed metadata in force).
    pub(crate) fn trust(&self) -> PathBuf {
        self.root.join("trust")
    }

    /// Which files are known clean.
    pub(crate) fn seen(&self) -> PathBuf {
        self.root.join("seen")
    }

    /// What past scans have cost.
    pub(crate) fn costs(&self) -> PathBuf {
        self.root.join("costs")
    }

    /// Removed files, encrypted.
    pub(crate) fn vault(&self) -> PathBuf {
        self.root.join("vault")
    }

    /// What the running agent tells about itself.
    pub(crate) fn status(&self) -> PathBuf {
        self.root.join("status.json")
    }
}

/// Makes a folder for the owner alone, if it is not there.
pub(crate) fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file whole: beside its place, to disk, then into its place. On a full disk nothing is left of it.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let replaced = write_and_move(&beside, path, content);
    if replaced.is_err() {
        let _ = fs::remove_file(&beside);
    }
    replaced
}

fn write_and_move(beside: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc_nofollow())
        .open(beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(beside, path)?;
    sync_folder(path.parent().unwrap_or(path))
}

/// Makes renames in a folder last.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn libc_nofollow() -> i32 {
    i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0)
}
