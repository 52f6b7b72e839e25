//! Finds the files under a path, by folder descriptors.
//!
//! **Invariant:** everything met is either handed over as an open file or named with the reason why not;
//! only what vanished in between is left out.
//! **Invariant:** at most [`MAX_DEPTH`] folders are open at a time, and no full path is ever given to the
//! system, so its length does not matter.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{Dir, FileType},
    io::Errno,
};
use tm_protocol::report::{PathBytes, SkipReason, Skipped};

use crate::platform::fs::{self, Facts, Kind, Object, OpenError, Place, Residence};

/// How many folders deep a walk goes below a path; what lies deeper is named as `limit`. Together with the
/// files in the pool's hands this stays below the 1024 descriptors that a process has by default.
pub(crate) const MAX_DEPTH: usize = 256;

/// What a walk comes upon.
#[derive(Debug)]
pub(crate) enum Found {
    /// A regular file, open.
    File {
        /// Where it lies.
        path: PathBytes,
        /// Opened for reading.
        file: OwnedFd,
        /// What was opened.
        object: Object,
    },
    /// Something that is not looked at.
    Skipped(Skipped),
}

/// Why a path cannot be scanned at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PathError {
    /// Nothing is there.
    #[error("`{0}` does not exist")]
    Missing(PathBytes),
    /// It is a link, or lies behind one.
    #[error("`{0}` is a symbolic link or lies behind one; name the real path")]
    Link(PathBytes),
}

/// Finds out whether `path` can be walked: it exists, and no link is on the way. A path that may not be
/// read is left to the walk, which names it.
///
/// # Errors
/// [`PathError`], with the path in it.
pub(crate) fn check(path: &PathBytes) -> Result<(), PathError> {
    match Place::find(&path.0).and_then(|place| place.facts()) {
        Ok(Facts { kind: Kind::Symlink, .. }) | Err(Errno::LOOP) => Err(PathError::Link(path.clone())),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::INVAL) => Err(PathError::Missing(path.clone())),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Walks `path` and hands everything to `visit`, until all is seen or `cancelled` says so.
pub(crate) fn walk(path: &PathBytes, cancelled: &dyn Fn() -> bool, visit: &mut dyn FnMut(Found)) {
    let mut walk = Walk { path: path.0.clone(), folders: Vec::new(), visit };
    let Some(root) = walk.start() else { return };
    while let Some(folder) = walk.folders.last_mut() {
        if cancelled() {
            return;
        }
        walk.path.truncate(folder.path_length);
        match folder.dir.read() {
            Some(Ok(entry)) => match entry.file_name().to_bytes() {
                b"." | b".." => {}
                name => {
                    if !walk.path.ends_with(b"/") {
                        walk.path.push(b'/');
                    }
                    walk.path.extend_from_slice(name);
                    walk.entry(&root, &entry);
                }
            },
            // The rest of this folder cannot be listed; after an error the listing ends.
            Some(Err(_)) => walk.skip(SkipReason::Unreadable),
            None => {
                walk.folders.pop();
            }
        }
    }
}

struct Folder {
    dir: Dir,
    path_length: usize,
}

struct Walk<'a> {
    path: Vec<u8>,
    folders: Vec<Folder>,
    visit: &'a mut dyn FnMut(Found),
}

impl Walk<'_> {
    /// Looks at the path itself. The answer says what file system the walk stays on; `None` if there is
    /// nothing to walk.
    fn start(&mut self) -> Option<Facts> {
        let found = Place::find(&self.path).and_then(|place| {
            let facts = place.facts()?;
            let residence = place.residence()?;
            Ok((place, facts, residence))
        });
        let (place, facts, residence) = match found {
            Ok(found) => found,
            // It existed when the order was checked.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                self.skip(SkipReason::Changed);
                return None;
            }
            Err(_) => {
                self.skip(SkipReason::Unreadable);
                return None;
            }
        };
        match residence {
            Residence::Local => {}
            Residence::Pseudo => {
                self.skip(SkipReason::Pseudo);
                return None;
            }
            Residence::Remote => {
                self.skip(SkipReason::Remote);
                return None;
            }
        }
        match facts.kind {
            Kind::Folder => self.enter(place.open_folder(&facts)),
            Kind::Regular => self.file(place.open_regular(&facts), facts.object()),
            Kind::Symlink => self.skip(SkipReason::Symlink),
            Kind::Special => self.skip(SkipReason::Special),
        }
        Some(facts)
    }

    /// Looks at one entry of the innermost folder; `self.path` is already the entry's.
    fn entry(&mut self, root: &Facts, entry: &rustix::fs::DirEntry) {
        // A link cannot be mounted over, so the listing's word for it is enough. Any other kind may hide
        // under a mount.
        if entry.file_type() == FileType::Symlink {
            return self.skip(SkipReason::Symlink);
        }
        let name = entry.file_name();
        let folder = self.folders.last().expect("an entry is of an open folder");
        let Ok(folder_fd) = folder.dir.fd() else { return self.skip(SkipReason::Unreadable) };
        let facts = match fs::facts_at(folder_fd, name) {
            Ok(facts) => facts,
            Err(Errno::NOENT) => return,
            Err(_) => return self.skip(SkipReason::Unreadable),
        };
        match facts.kind {
            Kind::Symlink => self.skip(SkipReason::Symlink),
            Kind::Special => self.skip(SkipReason::Special),
            Kind::Regular | Kind::Folder if facts.is_on_other_filesystem_than(root) => {
                let reason = match fs::residence_at(folder_fd, name) {
                    Ok(Residence::Pseudo) => SkipReason::Pseudo,
                    Ok(Residence::Remote) => SkipReason::Remote,
                    Ok(Residence::Local) | Err(_) => SkipReason::OtherFilesystem,
                };
                self.skip(reason);
            }
            Kind::Folder if self.folders.len() >= MAX_DEPTH => self.skip(SkipReason::Limit),
            Kind::Folder => {
                let opened = fs::open_folder_at(folder_fd, name, &facts);
                self.enter(opened);
            }
            Kind::Regular => {
                let opened = fs::open_regular_at(folder_fd, name, &facts);
                self.file(opened, facts.object());
            }
        }
    }

    fn enter(&mut self, opened: Result<OwnedFd, OpenError>) {
        match opened.and_then(|fd| Dir::new(fd).map_err(OpenError::Refused)) {
            Ok(dir) => self.folders.push(Folder { dir, path_length: self.path.len() }),
            Err(error) => self.not_opened(error),
        }
    }

    fn file(&mut self, opened: Result<OwnedFd, OpenError>, object: Object) {
        match opened {
            Ok(file) => (self.visit)(Found::File { path: PathBytes(self.path.clone()), file, object }),
            Err(error) => self.not_opened(error),
        }
    }

    fn not_opened(&mut self, error: OpenError) {
        match error {
            OpenError::Gone => {}
            OpenError::Changed => self.skip(SkipReason::Changed),
            OpenError::Refused(_) => self.skip(SkipReason::Unreadable),
        }
    }

    fn skip(&mut self, reason: SkipReason) {
        let path = PathBytes(self.path.clone());
        (self.visit)(Found::Skipped(Skipped { path, member: vec![], reason }));
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        fs::Permissions,
        os::unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
        path::Path,
    };

    use rustix::fs::{AtFlags, CWD, Mode, OFlags};

    use super::*;

    fn bytes(path: &Path) -> PathBytes {
        PathBytes(path.as_os_str().as_bytes().to_vec())
    }

    /// Everything found under `path`: its name below it, and the reason if it was skipped. Sorted.
    fn seen(path: &Path) -> Vec<(Vec<u8>, Option<SkipReason>)> {
        let root = bytes(path);
        let mut seen = Vec::new();
        walk(&root, &|| false, &mut |found| {
            let (path, reason) = match found {
                Found::File { path, .. } => (path, None),
                Found::Skipped(skipped) => (skipped.path, Some(skipped.reason)),
            };
            let below = path.0.strip_prefix(&root.0[..]).expect("below the root").to_vec();
            seen.push((below.strip_prefix(b"/").map_or(below.clone(), <[u8]>::to_vec), reason));
        });
        seen.sort();
        seen
    }

    #[test]
    fn all_kinds_of_things_are_handed_over_or_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir(root.join("sub")).unwrap();
        std::fs::write(root.join("sub/file"), b"x").unwrap();
        std::fs::write(root.join("empty"), b"").unwrap();
        rustix::fs::mkfifoat(CWD, root.join("fifo"), Mode::RUSR).unwrap();
        let _listener = UnixListener::bind(root.join("socket")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        symlink(".", root.join("loop")).unwrap();
        symlink("/etc", root.join("away")).unwrap();
        let odd: [&[u8]; 3] = [b"new\nline", b"esc\x1b[2J", b"not-utf8-\xff\xfe"];
        for name in odd {
            std::fs::write(root.join(OsStr::from_bytes(name)), b"x").unwrap();
        }

        let mut expected = vec![
            (b"sub/file".to_vec(), None),
            (b"empty".to_vec(), None),
            (b"fifo".to_vec(), Some(SkipReason::Special)),
            (b"socket".to_vec(), Some(SkipReason::Special)),
            (b"dangling".to_vec(), Some(SkipReason::Symlink)),
            (b"loop".to_vec(), Some(SkipReason::Symlink)),
            (b"away".to_vec(), Some(SkipReason::Symlink)),
        ];
        expected.extend(odd.map(|name| (name.to_vec(), None)));
        expected.sort();
        assert_eq!(seen(root), expected);
    }

    #[test]
    fn a_path_may_be_a_file_a_pseudo_file_system_or_a_device() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        assert_eq!(seen(&file), [(vec![], None)]);
        assert_eq!(seen(Path::new("/proc")), [(vec![], Some(SkipReason::Pseudo))]);
        assert_eq!(seen(Path::new("/dev/null")), [(vec![], Some(SkipReason::Special))]);
    }

    #[test]
    fn paths_that_cannot_be_scanned_are_refused_before() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("real")).unwrap();
        std::fs::write(folder.path().join("real/file"), b"x").unwrap();
        symlink("real", folder.path().join("link")).unwrap();
        let path = |name: &str| bytes(&folder.path().join(name));
        for (name, expected) in [
            ("real", None),
            ("real/", None),
            ("real/..", None),
            ("real/file", None),
            ("none", Some(PathError::Missing(path("none")))),
            ("real/file/x", Some(PathError::Missing(path("real/file/x")))),
            ("link", Some(PathError::Link(path("link")))),
            ("link/file", Some(PathError::Link(path("link/file")))),
        ] {
            assert_eq!(check(&path(name)).err(), expected, "{name}");
        }
        assert_eq!(check(&PathBytes(vec![])), Err(PathError::Missing(PathBytes(vec![]))));
    }

    #[test]
    fn folders_are_followed_beyond_the_longest_path_and_named_beyond_the_depth() {
        let folder = tempfile::tempdir().unwrap();
        let name = "n".repeat(200);
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let mut fd = rustix::fs::open(folder.path(), flags, Mode::empty()).unwrap();
        for depth in 1..=300 {
            rustix::fs::mkdirat(&fd, &name, Mode::RWXU).unwrap();
            fd = rustix::fs::openat(&fd, &name, flags, Mode::empty()).unwrap();
            if [10, 255, 256].contains(&depth) {
                let flags = OFlags::CREATE | OFlags::WRONLY;
                rustix::fs::openat(&fd, "file", flags, Mode::RUSR).unwrap();
            }
        }
        // The root itself is the first open folder, so 255 levels below it are entered.
        let at =
            |depth: usize, last: &str| format!("{}{last}", format!("{name}/").repeat(depth)).into_bytes();
        let mut expected =
            vec![(at(10, "file"), None), (at(255, "file"), None), (at(255, &name), Some(SkipReason::Limit))];
        expected.sort();
        assert_eq!(seen(folder.path()), expected);
    }

    #[test]
    fn what_may_not_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::set_permissions(root, Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir(root.join("closed")).unwrap();
        std::fs::write(root.join("closed/inner"), b"x").unwrap();
        for name in ["open", "secret"] {
            std::fs::write(root.join(name), b"x").unwrap();
        }
        std::fs::set_permissions(root.join("open"), Permissions::from_mode(0o644)).unwrap();
        for name in ["secret", "closed"] {
            std::fs::set_permissions(root.join(name), Permissions::from_mode(0o000)).unwrap();
        }

        // Root reads everything, so the walk is done by a thread that is not root.
        let found = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    if rustix::process::geteuid().is_root() {
                        let nobody = rustix::thread::Uid::from_raw(65534);
                        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                    }
                    seen(root)
                })
                .join()
                .unwrap()
        });
        std::fs::set_permissions(root.join("closed"), Permissions::from_mode(0o700)).unwrap();
        assert_eq!(
            found,
            [
                (b"closed".to_vec(), Some(SkipReason::Unreadable)),
                (b"open".to_vec(), None),
                (b"secret".to_vec(), Some(SkipReason::Unreadable)),
            ]
        );
    }

    #[test]
    fn a_file_that_vanishes_is_left_out_and_one_that_is_swapped_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = rustix::fs::open(folder.path(), OFlags::PATH, Mode::empty()).unwrap();
        std::fs::write(folder.path().join("file"), b"x").unwrap();
        let facts = fs::facts_at(&root, c"file").unwrap();
        rustix::fs::unlinkat(&root, "file", AtFlags::empty()).unwrap();
        for (swap, expected) in [(false, vec![]), (true, vec![SkipReason::Changed])] {
            if swap {
                symlink("/etc/passwd", folder.path().join("file")).unwrap();
            }
            let mut reasons = Vec::new();
            let mut visit = |found: Found| match found {
                Found::File { path, .. } => panic!("opened {path}"),
                Found::Skipped(skipped) => reasons.push(skipped.reason),
            };
            let mut walk = Walk { path: b"file".to_vec(), folders: vec![], visit: &mut visit };
            walk.file(fs::open_regular_at(&root, c"file", &facts), facts.object());
            assert_eq!(reasons, expected);
        }
    }

    #[test]
    fn a_cancelled_walk_ends() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), b"x").unwrap();
        walk(&bytes(folder.path()), &|| true, &mut |found| panic!("found {found:?}"));
    }
}
