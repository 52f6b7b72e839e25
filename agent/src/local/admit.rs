//! Which descriptors of a stranger are looked at.
//!
//! **Invariant:** what is handed to a scan worker is a regular file on a file system of this machine, open for reading
//! and nothing else.

use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, OFlags, fcntl_getfl, memfd_create};
use tm_protocol::report::SkipReason;

use crate::platform::{
    fs::{Kind, Residence, facts_of, residence_of},
    mounts::Mounts,
};

/// Judges descriptors. Asking a file system that does not answer may block, so each client has one of its own.
#[derive(Debug)]
pub(super) struct Admit {
    mounts: Mounts,
    /// The device that files in memory, without a name anywhere, lie on.
    memory: Option<u64>,
}

impl Admit {
    /// Reads what is mounted.
    pub(super) fn new() -> Self {
        let memory = memfd_create("tm-none", MemfdFlags::CLOEXEC)
            .and_then(facts_of)
            .map(|facts| facts.object().device);
        Self { mounts: Mounts::new(), memory: memory.ok() }
    }

    /// Whether the file is looked at.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn judge(&mut self, file: impl AsFd) -> Result<(), SkipReason> {
        let flags = fcntl_getfl(&file).map_err(|_| SkipReason::Unreadable)?;
        // One that may be written to would be a way for a worker that was taken over to change it.
        if flags.contains(OFlags::PATH) || flags & OFlags::RWMODE != OFlags::RDONLY {
            return Err(SkipReason::Unreadable);
        }
        let facts = facts_of(&file).map_err(|_| SkipReason::Unreadable)?;
        if facts.kind != Kind::Regular || self.memory == Some(facts.object().device) {
            return Err(SkipReason::Special);
        }
        let by_mount = facts.mount.and_then(|mount| self.mounts.residence(mount));
        // A mount that this process does not see may be that of a container.
        let residence = match by_mount {
            Some(residence) => residence,
            None => residence_of(&file).map_err(|_| SkipReason::Unreadable)?,
        };
        match residence {
            Residence::Local => Ok(()),
            Residence::Pseudo => Err(SkipReason::Pseudo),
            Residence::Remote => Err(SkipReason::Remote),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File, OpenOptions},
        net::TcpListener,
        os::{
            fd::{AsRawFd as _, OwnedFd},
            unix::fs::OpenOptionsExt as _,
        },
    };

    use super::*;

    #[test]
    fn only_regular_files_that_are_open_for_reading_alone_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, b"x").unwrap();
        let open_path = || {
            let flags = i32::try_from(OFlags::PATH.bits()).unwrap();
            OpenOptions::new().read(true).custom_flags(flags).open(&path).unwrap().into()
        };
        let (pipe, _write) = std::io::pipe().unwrap();
        let memory = memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        let read_only = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let cases: Vec<(&str, OwnedFd, Result<(), SkipReason>)> = vec![
            ("a file", File::open(&path).unwrap().into(), Ok(())),
            (
                "write only",
                File::options().write(true).open(&path).unwrap().into(),
                Err(SkipReason::Unreadable),
            ),
            (
                "both",
                File::options().read(true).write(true).open(&path).unwrap().into(),
                Err(SkipReason::Unreadable),
            ),
            ("a path", open_path(), Err(SkipReason::Unreadable)),
            ("a folder", File::open(folder.path()).unwrap().into(), Err(SkipReason::Special)),
            ("a pipe", pipe.into(), Err(SkipReason::Special)),
            ("a socket", TcpListener::bind("127.0.0.1:0").unwrap().into(), Err(SkipReason::Unreadable)),
            ("a device", File::open("/dev/zero").unwrap().into(), Err(SkipReason::Special)),
            ("made up by the kernel", File::open("/proc/self/maps").unwrap().into(), Err(SkipReason::Pseudo)),
            ("a process", File::open("/proc/self/mem").unwrap().into(), Err(SkipReason::Pseudo)),
            ("memory", File::open(read_only).unwrap().into(), Err(SkipReason::Special)),
        ];
        let mut admit = Admit::new();
        for (what, file, expected) in cases {
            assert_eq!(admit.judge(&file), expected, "{what}");
        }
    }
}
