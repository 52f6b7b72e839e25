//! The place where the running agent can be spoken to: made, kept from others, and removed.
//!
//! It is bound under a name of its own, opened to all users and moved into its place when it works, so that nobody
//! ever meets a half-made one.
//!
//! **Invariant:** only a socket of this user that nobody answers on is ever replaced, and only the socket that was
//! made here is removed.
//! **Invariant:** it lies in a folder that nobody but this user (or root) can change, so that nobody can put another in its
//! place.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with},
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// How often a place is tried for that others try for, too.
const TRIES: usize = 3;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    /// The folder is not fit for it.
    #[error("`{0}` can be changed by other users")]
    Open(String),
    /// Something that is not to be touched is there.
    #[error("`{0}` exists and is not a socket of this user")]
    NotOurs(String),
    /// Somebody answers there.
    #[error("another agent listens at `{0}`")]
    Taken(String),
    /// The system refused.
    #[error("cannot listen at `{path}`")]
    Io {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// A socket that listens. Dropped, it is gone from its place.
#[derive(Debug)]
pub(super) struct Listening {
    /// The socket.
    pub(super) socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of what was made.
    object: (u64, u64),
}

impl Listening {
    /// Listens at `path`, open to every user who can reach it. Its folder is made if there is none.
    ///
    /// # Errors
    /// If the place is not safe, not free, or cannot be used.
    pub(super) fn open(path: &Path) -> Result<Self, ListenError> {
        let io = |source| ListenError::Io { path: path.display().to_string(), source };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        prepare(folder).map_err(io)?;
        check(folder)?;
        let beside = path.with_extension(format!("new-{}", std::process::id()));
        let _ = fs::remove_file(&beside);
        let socket = bound(&beside).map_err(io)?;
        let placed = Self::place(socket, &beside, path);
        if placed.is_err() {
            let _ = fs::remove_file(&beside);
        }
        placed
    }

    fn place(socket: OwnedFd, beside: &Path, path: &Path) -> Result<Self, ListenError> {
        let io = |source| ListenError::Io { path: path.display().to_string(), source };
        let made = fs::symlink_metadata(beside).map_err(io)?;
        fs::set_permissions(beside, Permissions::from_mode(0o666)).map_err(io)?;
        for _ in 0..TRIES {
            match renameat_with(CWD, beside, CWD, path, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    let object = (made.dev(), made.ino());
                    return Ok(Self { socket, path: path.to_owned(), object });
                }
                Err(Errno::EXIST) => clear(path)?,
                Err(error) => return Err(io(error.into())),
            }
        }
        Err(ListenError::Taken(path.display().to_string()))
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let is_ours =
            fs::symlink_metadata(&self.path).is_ok_and(|there| (there.dev(), there.ino()) == self.object);
        if is_ours {
            // What stays is taken for what it is at the next start: a socket that nobody answers on.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Connects to the agent that listens at `path`.
pub(super) fn reach(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn prepare(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(folder) {
        // Whatever the mask was.
        Ok(()) => fs::set_permissions(folder, Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether nobody else can change what lies in the folder.
fn check(folder: &Path) -> Result<(), ListenError> {
    let name = || folder.display().to_string();
    let there = fs::metadata(folder).map_err(|source| ListenError::Io { path: name(), source })?;
    let own = rustix::process::geteuid().as_raw();
    let is_safe = there.is_dir() && [0, own].contains(&there.uid()) && there.mode() & 0o022 == 0;
    if is_safe { Ok(()) } else { Err(ListenError::Open(name())) }
}

fn bound(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Makes room where an agent that has died left its socket.
fn clear(path: &Path) -> Result<(), ListenError> {
    let name = || path.display().to_string();
    let io = |source| ListenError::Io { path: name(), source };
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
    };
    if !there.file_type().is_socket() || there.uid() != rustix::process::geteuid().as_raw() {
        return Err(ListenError::NotOurs(name()));
    }
    match reach(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(io),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // A socket of another kind answers nobody here, and is not ours either.
        Err(error) if error.raw_os_error() == Some(Errno::PROTOTYPE.raw_os_error()) => {
            Err(ListenError::NotOurs(name()))
        }
        Ok(_) | Err(_) => Err(ListenError::Taken(name())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
        folder
    }

    #[test]
    fn a_dead_agents_socket_is_replaced_and_a_living_ones_is_not() {
        let folder = folder();
        let path = folder.path().join("made/scan.sock");
        let first = Listening::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o755);
        assert!(reach(&path).is_ok(), "the control: it answers");
        assert!(matches!(Listening::open(&path), Err(ListenError::Taken(_))));
        assert!(reach(&path).is_ok(), "the first is still there");

        // One that dies leaves its socket behind.
        let left = fs::symlink_metadata(&path).unwrap().ino();
        let Listening { socket, .. } = &first;
        rustix::net::shutdown(socket, rustix::net::Shutdown::Both).unwrap();
        let second = Listening::open(&path).unwrap();
        assert!(reach(&path).is_ok());
        assert_ne!(fs::symlink_metadata(&path).unwrap().ino(), left);
        drop(first);
        assert!(reach(&path).is_ok(), "only one's own socket is removed");
        drop(second);
        assert!(!path.exists());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0, "nothing is left beside it");
    }

    #[test]
    fn what_is_not_ours_stays() {
        let folder = folder();
        let path = folder.path().join("scan.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listening::open(&path), Err(ListenError::NotOurs(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();

        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        assert!(matches!(Listening::open(&path), Err(ListenError::NotOurs(_))));
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("/etc/passwd"));
        fs::remove_file(&path).unwrap();

        let _other = UnixListener::bind(&path).unwrap();
        assert!(matches!(Listening::open(&path), Err(ListenError::NotOurs(_))));
        fs::remove_file(&path).unwrap();

        if rustix::process::geteuid().is_root() {
            drop(bound(&path).unwrap());
            std::os::unix::fs::lchown(&path, Some(65534), None).unwrap();
            assert!(matches!(Listening::open(&path), Err(ListenError::NotOurs(_))));
            fs::remove_file(&path).unwrap();
        }
        assert!(Listening::open(&path).is_ok(), "the control: the place is fit");
    }

    #[test]
    fn a_folder_that_others_can_change_is_not_used() {
        let folder = folder();
        for (mode, is_fit) in [(0o777, false), (0o1777, false), (0o775, false), (0o755, true), (0o700, true)]
        {
            fs::set_permissions(folder.path(), Permissions::from_mode(mode)).unwrap();
            let opened = Listening::open(&folder.path().join("scan.sock"));
            assert_eq!(opened.is_ok(), is_fit, "{mode:o}");
        }
        assert!(matches!(Listening::open(&folder.path().join("a/b/scan.sock")), Err(ListenError::Io { .. })));
        let long = folder.path().join("l".repeat(200));
        assert!(matches!(Listening::open(&long), Err(ListenError::Io { .. })));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
