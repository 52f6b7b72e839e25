//! Folders and files by descriptor: what stands under a name, and how it is opened without following a link.
//!
//! **Invariant:** no symbolic link is followed, at the last name or on the way to it; what is opened is what
//! was looked at (same device, same inode), or it is reported as changed.
//! **Invariant:** only regular files and folders are ever opened for reading, so that a device, a socket or
//! a fifo is never touched.

use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags},
    io::Errno,
};

/// What kind of thing a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A file with content.
    Regular,
    /// A folder.
    Folder,
    /// A symbolic link.
    Symlink,
    /// A device, socket or fifo.
    Special,
}

/// What is known of a thing without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Its kind.
    pub(crate) kind: Kind,
    device: u64,
    inode: u64,
    /// How many names it has.
    pub(crate) links: u64,
    /// When it was last changed, and how large it was.
    pub(crate) stamp: Stamp,
    /// The kernel's number of the mount it lies on, where the kernel tells (Linux 5.8).
    pub(crate) mount: Option<u64>,
}

/// Differs if content or attributes of a thing were changed between two looks, as far as the file system's
/// clock can tell them apart. Times in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Stamp {
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

/// Which object on disk a name stood for. Device numbers may change with a boot, inode numbers do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Object {
    /// The file system's device number.
    pub(crate) device: u64,
    /// The inode's number on it.
    pub(crate) inode: u64,
}

impl Facts {
    /// The object on disk.
    pub(crate) fn object(&self) -> Object {
        Object { device: self.device, inode: self.inode }
    }

    /// Whether both are the same object on disk.
    pub(crate) fn is_same_object(&self, other: &Self) -> bool {
        self.kind == other.kind && self.device == other.device && self.inode == other.inode
    }

    /// Whether a mount lies between a folder and an entry of it, as far as the kernel tells; a subvolume is
    /// taken for one where it does not tell mounts.
    pub(crate) fn is_mounted_in(&self, folder: &Self) -> bool {
        match (self.mount, folder.mount) {
            (Some(mine), Some(theirs)) => mine != theirs,
            (None, _) | (_, None) => self.device != folder.device,
        }
    }

    /// Whether `other` lies on another file system. Both the device and the mount must differ: an overlay
    /// shows several devices within one mount, and so does a file system with subvolumes; a bind mount of
    /// the same file system shows one device.
    pub(crate) fn is_on_other_filesystem_than(&self, other: &Self) -> bool {
        let other_mount = match (self.mount, other.mount) {
            (Some(mine), Some(theirs)) => mine != theirs,
            (None, _) | (_, None) => true,
        };
        other_mount && self.device != other.device
    }
}

/// What kind of file system something lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Residence {
    /// One that stores files on this machine.
    Local,
    /// One that the kernel makes up.
    Pseudo,
    /// One whose content comes from elsewhere or from a program.
    Remote,
}

/// Why something was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OpenError {
    /// It no longer exists.
    #[error("it no longer exists")]
    Gone,
    /// Something else has taken its name since it was looked at.
    #[error("it changed while it was opened")]
    Changed,
    /// The system refused.
    #[error("the system refused")]
    Refused(#[source] Errno),
}

/// Where a path leads: its parent folder and the name in it. No name if the path itself names a folder by
/// `/`, `.` or `..`.
#[derive(Debug)]
pub(crate) struct Place {
    folder: OwnedFd,
    name: Option<CString>,
}

impl Place {
    /// Goes to the folder that holds `path`, refusing every symbolic link on the way (`ELOOP`).
    ///
    /// # Errors
    /// If a folder on the way is missing, is a link, or may not be entered.
    pub(crate) fn find(path: &[u8]) -> Result<Self, Errno> {
        if path.is_empty() {
            return Err(Errno::NOENT);
        }
        let (parent, name) = split(path);
        let name = name.map(|name| CString::new(name).map_err(|_| Errno::INVAL)).transpose()?;
        Ok(Self { folder: enter(parent)?, name })
    }

    /// The same, name by name. `may_enter` is asked before a mount is entered, with the mount's number, and is
    /// not asked where the kernel tells no numbers; `None` if it says no. Nothing of that mount was touched.
    ///
    /// # Errors
    /// As [`Place::find`].
    pub(crate) fn find_by_names(
        path: &[u8],
        may_enter: &mut dyn FnMut(u64) -> bool,
    ) -> Result<Option<Self>, Errno> {
        if path.is_empty() {
            return Err(Errno::NOENT);
        }
        let (parent, name) = split(path);
        let name = name.map(|name| CString::new(name).map_err(|_| Errno::INVAL)).transpose()?;
        Ok(enter_by_names(parent, may_enter)?.map(|folder| Self { folder, name }))
    }

    /// The folder, as a place to start from.
    pub(crate) fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// The name in it.
    pub(crate) fn name(&self) -> Option<&CStr> {
        self.name.as_deref()
    }

    /// What stands there.
    ///
    /// # Errors
    /// If nothing does, or it may not be asked.
    pub(crate) fn facts(&self) -> Result<Facts, Errno> {
        match &self.name {
            Some(name) => facts_at(&self.folder, name),
            None => facts_of(&self.folder),
        }
    }

    /// What kind of file system the thing lies on. Nothing that has content is opened for it.
    ///
    /// # Errors
    /// If it is gone or the file system does not say.
    pub(crate) fn residence(&self) -> Result<Residence, Errno> {
        match &self.name {
            Some(name) => residence_at(&self.folder, name),
            None => residence_of(&self.folder),
        }
    }

    /// Opens the folder that stands there, to list it.
    ///
    /// # Errors
    /// If it is not the folder of `facts`, or the system refuses.
    pub(crate) fn open_folder(&self, facts: &Facts) -> Result<OwnedFd, OpenError> {
        open_folder_at(&self.folder, self.name.as_deref().unwrap_or(c"."), facts)
    }

    /// Opens the regular file that stands there.
    ///
    /// # Errors
    /// If it is not the file of `facts`, or the system refuses.
    pub(crate) fn open_regular(&self, facts: &Facts) -> Result<OwnedFd, OpenError> {
        // A path without a name is a folder, which then differs from any facts of a file.
        open_regular_at(&self.folder, self.name.as_deref().unwrap_or(c"."), facts)
    }
}

/// What stands in `folder` under `name`; a symbolic link is itself.
///
/// # Errors
/// If nothing does, or it may not be asked.
pub(crate) fn facts_at(folder: impl AsFd, name: &CStr) -> Result<Facts, Errno> {
    // DONT_SYNC: what the kernel knows is enough, so a file server that does not answer is not waited for.
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    match rustix::fs::statx(&folder, name, flags, wanted) {
        Ok(stat) => Ok(facts_with_mount(&stat)),
        // Kernels before 4.11, and sandboxes that do not know the call.
        Err(Errno::NOSYS | Errno::PERM) => {
            let stat = rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)?;
            Ok(facts_without_mount(&stat))
        }
        Err(errno) => Err(errno),
    }
}

/// On which mount `name` in `folder` lies, where the kernel tells. This is known even where the file system
/// itself says nothing (somebody's FUSE mount shows its content to its owner only).
pub(crate) fn mount_at(folder: impl AsFd, name: &CStr) -> Option<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    // Asked for nothing else, such a file system does not refuse; the kernel tells the mount unasked.
    let stat = rustix::fs::statx(folder, name, flags, StatxFlags::empty()).ok()?;
    mount_of(&stat)
}

/// Facts of something open.
///
/// # Errors
/// If the system refuses.
pub(crate) fn facts_of(fd: impl AsFd) -> Result<Facts, Errno> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    match rustix::fs::statx(&fd, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, wanted) {
        Ok(stat) => Ok(facts_with_mount(&stat)),
        Err(Errno::NOSYS | Errno::PERM) => Ok(facts_without_mount(&rustix::fs::fstat(&fd)?)),
        Err(errno) => Err(errno),
    }
}

/// Opens the folder `name` in `folder`, to list it.
///
/// # Errors
/// If it is not the folder of `facts`, or the system refuses.
pub(crate) fn open_folder_at(folder: impl AsFd, name: &CStr, facts: &Facts) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = open_quietly(folder, name, flags)?;
    confirm(fd, facts)
}

/// Opens the regular file `name` in `folder`, without waiting for anything and, where the system allows it,
/// without leaving a trace in its access time.
///
/// # Errors
/// If it is not the file of `facts`, or the system refuses.
pub(crate) fn open_regular_at(folder: impl AsFd, name: &CStr, facts: &Facts) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = open_quietly(folder, name, flags)?;
    let fd = confirm(fd, facts)?;
    if facts.kind == Kind::Regular { Ok(fd) } else { Err(OpenError::Changed) }
}

/// What kind of file system `name` in `folder` lies on; it is not opened for reading.
///
/// # Errors
/// If it is gone or the file system does not say.
pub(crate) fn residence_at(folder: impl AsFd, name: &CStr) -> Result<Residence, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    residence_of(rustix::fs::openat(folder, name, flags, Mode::empty())?)
}

/// What kind of file system something open lies on.
///
/// # Errors
/// If the file system does not say.
pub(crate) fn residence_of(fd: impl AsFd) -> Result<Residence, Errno> {
    let magic = rustix::fs::fstatfs(fd)?.f_type;
    // The number has 32 bits; the field is wider, and signed, on some machines.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "only 32 bits carry meaning")]
    let magic = magic as u32;
    Ok(residence(magic))
}

/// `statfs(2)` and `include/uapi/linux/magic.h`; file systems of other makers use numbers of their own.
const fn residence(magic: u32) -> Residence {
    match magic {
        0x0000_9fa0 // proc
        | 0x6265_6572 // sysfs
        | 0x0027_e0eb // cgroup
        | 0x6367_7270 // cgroup2
        | 0x0000_1cd1 // devpts
        | 0x6462_6720 // debugfs
        | 0x7472_6163 // tracefs
        | 0x7363_6673 // securityfs
        | 0x6165_676c // pstore
        | 0xcafe_4a11 // bpf
        | 0x1980_0202 // mqueue
        | 0x6265_6570 // configfs
        | 0x6573_5543 // fusectl
        | 0x4249_4e4d // binfmt_misc
        | 0x0000_0187 // autofs: a place where nothing is mounted yet
        | 0xde5e_81e4 // efivarfs
        | 0xf97c_ff8c // selinuxfs
        | 0x4341_5d53 // smackfs
        | 0x6e73_6673 // nsfs
        | 0x6759_6969 // rpc_pipefs
        | 0x6e66_7364 // nfsd
        | 0x0765_5821 // resctrl
        => Residence::Pseudo,
        0x0000_6969 // nfs
        | 0xff53_4d42 // cifs
        | 0xfe53_4d42 // smb2
        | 0x0000_517b // smb
        | 0x6573_5546 // fuse, virtiofs
        | 0x0102_1997 // 9p
        | 0x00c3_6400 // ceph
        | 0x5346_414f // afs
        | 0x6b41_4653 // afs (the kernel's own)
        | 0x7375_7245 // coda
        | 0x0000_564c // ncp
        | 0x0bd0_0bd0 // lustre
        | 0x1983_0326 // beegfs
        | 0x4750_4653 // gpfs
        | 0xaad7_aaea // panfs
        | 0x2003_0528 // orangefs
        | 0x786f_4256 // vboxsf
        | 0xbacb_acbc // vmhgfs
        => Residence::Remote,
        _ => Residence::Local,
    }
}

fn facts_with_mount(stat: &Statx) -> Facts {
    Facts {
        kind: kind(FileType::from_raw_mode(stat.stx_mode.into())),
        device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
        links: stat.stx_nlink.into(),
        stamp: Stamp {
            size: stat.stx_size,
            modified: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            changed: (stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
        },
        mount: mount_of(stat),
    }
}

fn mount_of(stat: &Statx) -> Option<u64> {
    (stat.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(stat.stx_mnt_id)
}

fn facts_without_mount(stat: &rustix::fs::Stat) -> Facts {
    Facts {
        kind: kind(FileType::from_raw_mode(stat.st_mode)),
        device: stat.st_dev,
        inode: stat.st_ino,
        #[expect(clippy::useless_conversion, reason = "narrower on some machines")]
        links: stat.st_nlink.into(),
        stamp: Stamp {
            size: stat.st_size.try_into().unwrap_or(0),
            modified: (stat.st_mtime, stat.st_mtime_nsec.try_into().unwrap_or(0)),
            changed: (stat.st_ctime, stat.st_ctime_nsec.try_into().unwrap_or(0)),
        },
        mount: None,
    }
}

fn kind(file_type: FileType) -> Kind {
    match file_type {
        FileType::RegularFile => Kind::Regular,
        FileType::Directory => Kind::Folder,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => Kind::Special,
    }
}

fn open_quietly(folder: impl AsFd, name: &CStr, flags: OFlags) -> Result<OwnedFd, OpenError> {
    // Only an owner may leave the access time alone; for others the plain call is the right one.
    let opened = match rustix::fs::openat(&folder, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => rustix::fs::openat(&folder, name, flags, Mode::empty()),
        other => other,
    };
    opened.map_err(|errno| match errno {
        Errno::NOENT => OpenError::Gone,
        // A link, a socket or something that is no folder stands there now.
        Errno::LOOP | Errno::NXIO | Errno::NOTDIR => OpenError::Changed,
        errno => OpenError::Refused(errno),
    })
}

fn confirm(fd: OwnedFd, facts: &Facts) -> Result<OwnedFd, OpenError> {
    let found = facts_of(&fd).map_err(OpenError::Refused)?;
    if found.is_same_object(facts) { Ok(fd) } else { Err(OpenError::Changed) }
}

/// Opens the folder at `path` as a place to start from, not to list. The kernel refuses links where it can;
/// elsewhere, and for paths too long for one call, each name is entered by itself.
fn enter(path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve) {
        Err(Errno::NOSYS | Errno::PERM | Errno::NAMETOOLONG) => {
            enter_by_names(path, &mut |_| true)?.ok_or(Errno::ACCESS)
        }
        other => other,
    }
}

fn enter_by_names(path: &[u8], may_enter: &mut dyn FnMut(u64) -> bool) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let start: &CStr = if path.starts_with(b"/") { c"/" } else { c"." };
    let mut folder = rustix::fs::openat(CWD, start, flags, Mode::empty())?;
    let mut mount = None;
    let mut may_go_on = |folder: &OwnedFd| {
        let now = mount_at_fd(folder);
        let is_new = now != mount;
        mount = now;
        !is_new || now.is_none_or(&mut *may_enter)
    };
    if !may_go_on(&folder) {
        return Ok(None);
    }
    for name in path.split(|b| *b == b'/').filter(|name| !name.is_empty()) {
        folder = rustix::fs::openat(&folder, name, flags, Mode::empty()).map_err(|errno| {
            // The kernel says "no folder" of a link here; say which of the two it is.
            let is_link = errno == Errno::NOTDIR
                && CString::new(name)
                    .is_ok_and(|name| facts_at(&folder, &name).is_ok_and(|f| f.kind == Kind::Symlink));
            if is_link { Errno::LOOP } else { errno }
        })?;
        if !may_go_on(&folder) {
            return Ok(None);
        }
    }
    Ok(Some(folder))
}

/// On which mount something open lies, where the kernel tells.
fn mount_at_fd(fd: impl AsFd) -> Option<u64> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    mount_of(&rustix::fs::statx(fd, c"", flags, StatxFlags::empty()).ok()?)
}

/// Splits a path that is not empty into its folder and the last name, if it has one.
fn split(path: &[u8]) -> (&[u8], Option<&[u8]>) {
    let end = path.iter().rposition(|b| *b != b'/').map_or(0, |i| i + 1);
    let trimmed = path.get(..end).unwrap_or_default();
    let start = trimmed.iter().rposition(|b| *b == b'/').map_or(0, |i| i + 1);
    match (trimmed.get(..start).unwrap_or_default(), trimmed.get(start..).unwrap_or_default()) {
        (_, b"" | b"." | b"..") => (path, None),
        (b"", name) => (b".", Some(name)),
        (folder, name) => (folder, Some(name)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{ffi::OsStrExt, fs::symlink};

    use super::*;

    #[test]
    fn a_path_is_split_before_its_last_name() {
        for (path, folder, name) in [
            (&b"/a/b"[..], &b"/a/"[..], Some(&b"b"[..])),
            (b"a", b".", Some(b"a")),
            (b"/a", b"/", Some(b"a")),
            (b"a//b//", b"a//", Some(b"b")),
            (b"/", b"/", None),
            (b"//", b"//", None),
            (b".", b".", None),
            (b"a/..", b"a/..", None),
            (b"a/./", b"a/./", None),
        ] {
            assert_eq!(split(path), (folder, name), "{}", path.escape_ascii());
        }
    }

    #[test]
    fn file_systems_are_told_apart_by_number() {
        for (magic, expected) in [
            (0xef53, Residence::Local),
            (0x0102_1994, Residence::Local),
            (0x9fa0, Residence::Pseudo),
            (0x6969, Residence::Remote),
            (0xff53_4d42, Residence::Remote),
        ] {
            assert_eq!(residence(magic), expected, "{magic:#x}");
        }
        assert_eq!(Place::find(b"/proc/self/status").unwrap_err(), Errno::LOOP, "/proc/self is a link");
        assert_eq!(Place::find(b"/proc/1/status").unwrap().residence(), Ok(Residence::Pseudo));
    }

    #[test]
    fn no_link_is_followed_on_the_way_or_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).as_os_str().as_bytes().to_vec();
        std::fs::create_dir(folder.path().join("real")).unwrap();
        std::fs::write(folder.path().join("real/file"), b"x").unwrap();
        symlink("real", folder.path().join("link")).unwrap();

        assert_eq!(Place::find(&at("real/file")).unwrap().facts().unwrap().kind, Kind::Regular);
        assert_eq!(Place::find(&at("link")).unwrap().facts().unwrap().kind, Kind::Symlink);
        let by_names = |path: &[u8]| enter_by_names(path, &mut |_| true).map(Option::unwrap);
        for enter in [&enter as &dyn Fn(&[u8]) -> Result<OwnedFd, Errno>, &by_names] {
            assert!(enter(&at("real")).is_ok());
            assert_eq!(enter(&at("link")).unwrap_err(), Errno::LOOP);
            assert_eq!(enter(&at("link/")).unwrap_err(), Errno::LOOP);
            assert_eq!(enter(&at("real/file")).unwrap_err(), Errno::NOTDIR);
            assert_eq!(enter(&at("none")).unwrap_err(), Errno::NOENT);
        }
    }

    #[test]
    fn what_took_the_place_of_a_file_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let place = Place::find(path.as_os_str().as_bytes()).unwrap();
        std::fs::write(&path, b"x").unwrap();
        let facts = place.facts().unwrap();
        assert!(place.open_regular(&facts).is_ok(), "control");

        std::fs::rename(&path, folder.path().join("kept")).unwrap();
        assert_eq!(place.open_regular(&facts).unwrap_err(), OpenError::Gone);
        std::fs::write(&path, b"x").unwrap();
        assert_eq!(place.open_regular(&facts).unwrap_err(), OpenError::Changed);
        std::fs::remove_file(&path).unwrap();
        symlink("kept", &path).unwrap();
        assert_eq!(place.open_regular(&facts).unwrap_err(), OpenError::Changed);
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert_eq!(place.open_regular(&facts).unwrap_err(), OpenError::Changed);
        assert!(place.open_folder(&place.facts().unwrap()).is_ok());
    }
}
