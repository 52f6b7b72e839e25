//! New files that nobody can see before they are whole, and moving things without hitting anything else.
//!
//! **Invariant:** nothing here replaces what stands under a name.
//! **Invariant:** a private folder belongs to this process's user alone, and is used by descriptor only.

use std::{
    ffi::{CStr, CString},
    fs::File,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, RenameFlags},
    io::Errno,
};

use super::{
    attributes,
    fs::{Kind, Object, facts_at},
};

/// What a file is called in a private folder.
pub(crate) const INSIDE: &CStr = c"item";

/// A file that has no name where others look.
#[derive(Debug)]
pub(crate) struct Unseen {
    file: File,
    /// Where it is kept until then, on file systems that have no files without a name.
    home: Option<(OwnedFd, CString)>,
}

impl Unseen {
    /// A new file without any name.
    ///
    /// # Errors
    /// `None` inside if the file system has no such thing, and [`Unseen::named`] is the way; else whatever
    /// the system says.
    pub(crate) fn nameless(folder: impl AsFd) -> Result<Option<Self>, Errno> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::openat(folder, c".", flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => Ok(Some(Self { file: fd.into(), home: None })),
            // Old kernels take the flag for "open this folder for writing".
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOSYS | Errno::INVAL) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// A new file under a name in a folder where nobody looks.
    ///
    /// # Errors
    /// Whatever the system says; `EXIST` if the name is taken.
    pub(crate) fn named(home: OwnedFd, name: &CStr) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&home, name, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(Self { file: fd.into(), home: Some((home, name.to_owned())) })
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Whether it lies in a folder under a name of its own until it is published.
    pub(crate) fn has_home(&self) -> bool {
        self.home.is_some()
    }

    /// Gives it its name. What stands under that name is never replaced.
    ///
    /// # Errors
    /// Whatever the system says; `EXIST` if the name is taken.
    pub(crate) fn publish(&self, folder: impl AsFd, name: &CStr) -> Result<(), Errno> {
        if let Some((home, home_name)) = &self.home {
            return move_new(home, home_name, folder, name);
        }
        match rustix::fs::linkat(&self.file, c"", &folder, name, AtFlags::EMPTY_PATH) {
            // Needs CAP_DAC_READ_SEARCH before Linux 6.10; the way through /proc does not (open(2)).
            Err(Errno::NOENT | Errno::PERM | Errno::INVAL) => {
                let link = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, link.as_str(), folder, name, AtFlags::SYMLINK_FOLLOW)
            }
            other => other,
        }
    }

    /// Throws it away. A nameless file goes by itself.
    pub(crate) fn discard(self) {
        if let Some((home, name)) = &self.home {
            // What cannot be removed now is found by name later.
            let _ = rustix::fs::unlinkat(home, name, AtFlags::empty());
        }
    }
}

/// Moves a thing to a name that must be free.
///
/// # Errors
/// Whatever the system says; `EXIST` if the name is taken.
pub(crate) fn move_new(
    from: impl AsFd,
    from_name: &CStr,
    to: impl AsFd,
    to_name: &CStr,
) -> Result<(), Errno> {
    match rustix::fs::renameat_with(&from, from_name, &to, to_name, RenameFlags::NOREPLACE) {
        // The file system does not know the flag: two names for a moment, and the old one goes.
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(&from, from_name, &to, to_name, AtFlags::empty())?;
            rustix::fs::unlinkat(&from, from_name, AtFlags::empty())
        }
        other => other,
    }
}

/// Makes, or finds again, a folder of our own in `parent`, which may belong to anybody.
///
/// # Errors
/// `AGAIN` if something that is not ours stands there; else whatever the system says.
pub(crate) fn private_folder(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    // It may have been exchanged since; whatever it is now, it must be ours alone.
    find_private(&parent, name)?.ok_or(Errno::AGAIN)
}

/// The private folder of that name; `None` if there is none.
///
/// # Errors
/// `AGAIN` if something that is not ours stands there; else whatever the system says.
pub(crate) fn find_private(parent: impl AsFd, name: &CStr) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let folder = match rustix::fs::openat(&parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP | Errno::NOTDIR) => return Err(Errno::AGAIN),
        other => other?,
    };
    let found = attributes::attributes(&folder)?;
    let around = attributes::attributes(&parent)?;
    // A set-group-id bit is inherited from the parent and means nothing here.
    let ours = found.uid == rustix::process::geteuid().as_raw()
        && found.mode & 0o777 == 0o700
        && found.object.device == around.object.device;
    if ours { Ok(Some(folder)) } else { Err(Errno::AGAIN) }
}

/// Removes the empty private folder of that name. It is as good if it is gone, or if whoever owns the parent
/// moved it away and put something else there, which is none of ours.
///
/// # Errors
/// Whatever the system says.
pub(crate) fn remove_private(parent: impl AsFd, name: &CStr) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// Opens a folder that is held as a place (`O_PATH`) for listing and syncing.
///
/// # Errors
/// Whatever the system says.
pub(crate) fn readable(folder: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(folder, c".", flags, Mode::empty())
}

/// Makes changes of names in a folder last.
///
/// # Errors
/// Whatever the disk says.
pub(crate) fn sync_names(folder: impl AsFd) -> Result<(), Errno> {
    rustix::fs::fsync(readable(folder)?)
}

/// Whether only root can change names in a folder.
///
/// # Errors
/// Whatever the system says.
pub(crate) fn is_only_roots(folder: impl AsFd) -> Result<bool, Errno> {
    let attributes = attributes::attributes(folder)?;
    // With an ACL, the group bits are the most that any of its entries gives.
    Ok(attributes.uid == 0 && attributes.mode & 0o022 == 0)
}

/// Whether `folder`, or a folder above it, is one of `objects`.
///
/// # Errors
/// Whatever the system says; `LOOP` if there is no end to it.
pub(crate) fn is_within(folder: BorrowedFd<'_>, objects: &[Object]) -> Result<bool, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut here = rustix::fs::openat(folder, c".", flags, Mode::empty())?;
    let mut object = attributes::attributes(&here)?.object;
    for _ in 0..4096 {
        if objects.contains(&object) {
            return Ok(true);
        }
        here = rustix::fs::openat(&here, c"..", flags, Mode::empty())?;
        let above = attributes::attributes(&here)?.object;
        if above == object {
            return Ok(false);
        }
        object = above;
    }
    Err(Errno::LOOP)
}

/// Whether the regular file of that name is this object.
///
/// # Errors
/// Whatever the system says; a name that is gone is no error, and false.
pub(crate) fn is_object_at(folder: impl AsFd, name: &CStr, object: Object) -> Result<bool, Errno> {
    match facts_at(folder, name) {
        Ok(facts) => Ok(facts.kind == Kind::Regular && facts.object() == object),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    #[test]
    fn a_file_appears_under_a_free_name_only() {
        let folder = tempfile::tempdir().unwrap();
        let fd = File::open(folder.path()).unwrap();
        fs::create_dir(folder.path().join("home")).unwrap();
        let home = || OwnedFd::from(File::open(folder.path().join("home")).unwrap());
        fs::write(folder.path().join("taken"), b"old").unwrap();
        symlink("nowhere", folder.path().join("link")).unwrap();
        for (case, file) in [
            Unseen::nameless(&fd).unwrap().expect("file systems of test machines have it"),
            Unseen::named(home(), c"a").unwrap(),
        ]
        .into_iter()
        .enumerate()
        {
            for name in [c"taken", c"link"] {
                assert_eq!(file.publish(&fd, name), Err(Errno::EXIST), "{case} {name:?}");
            }
            let name = CString::new(format!("new{case}")).unwrap();
            assert_eq!(file.publish(&fd, &name), Ok(()));
            assert!(folder.path().join(name.to_str().unwrap()).is_file());
        }
        assert_eq!(fs::read(folder.path().join("taken")).unwrap(), b"old");
        Unseen::named(home(), c"b").unwrap().discard();
        assert_eq!(fs::read_dir(folder.path().join("home")).unwrap().count(), 0);
    }

    #[test]
    fn only_a_folder_of_our_own_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let fd = File::open(folder.path()).unwrap();
        assert!(find_private(&fd, c"p").unwrap().is_none());
        private_folder(&fd, c"p").unwrap();
        assert!(find_private(&fd, c"p").unwrap().is_some());
        fs::set_permissions(folder.path().join("p"), fs::Permissions::from_mode(0o750)).unwrap();
        assert_eq!(private_folder(&fd, c"p").unwrap_err(), Errno::AGAIN);
        remove_private(&fd, c"p").unwrap();
        remove_private(&fd, c"p").unwrap();
        symlink("/", folder.path().join("p")).unwrap();
        assert_eq!(private_folder(&fd, c"p").unwrap_err(), Errno::AGAIN);
    }

    #[test]
    fn a_folder_is_found_within_another() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        fs::create_dir_all(&deep).unwrap();
        let object =
            |path: &std::path::Path| attributes::attributes(File::open(path).unwrap()).unwrap().object;
        let file = File::open(&deep).unwrap();
        for (path, within) in
            [(folder.path().join("a"), true), (deep.clone(), true), (deep.join("../../../.."), true)]
        {
            assert_eq!(is_within(file.as_fd(), &[object(&path)]), Ok(within), "{}", path.display());
        }
        fs::create_dir(folder.path().join("x")).unwrap();
        assert_eq!(is_within(file.as_fd(), &[object(&folder.path().join("x"))]), Ok(false));
    }
}
