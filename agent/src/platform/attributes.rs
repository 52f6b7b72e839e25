//! What belongs to an open file beside its content: owner, mode, times, extended attributes, inode flags.
//!
//! **Invariant:** everything here works on an open descriptor, never on a name.

use std::{ffi::CString, os::fd::AsFd};

use rustix::{
    fs::{FileType, IFlags, Mode, StatVfsMountFlags, Timespec, Timestamps, XattrFlags},
    io::Errno,
    process::{Gid, Uid},
};

use super::fs::Object;

/// Most bytes of extended attributes that are read of one file.
const MOST_XATTRS: usize = 1 << 20;
/// Longest list of names and longest value that Linux has.
const XATTR_MAX: usize = 64 << 10;

/// A time of a file: seconds since 1970, and nanoseconds.
pub(crate) type Time = (i64, u32);

/// What `stat` says of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// The object on disk.
    pub(crate) object: Object,
    /// Whether it is a file with content.
    pub(crate) is_regular: bool,
    /// Permission, set-id and sticky bits.
    pub(crate) mode: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// In bytes.
    pub(crate) size: u64,
    /// How many names it has.
    pub(crate) links: u64,
    /// When it was last read.
    pub(crate) accessed: Time,
    /// When its content was last changed.
    pub(crate) modified: Time,
    /// When it was last changed at all.
    pub(crate) changed: Time,
}

/// Asks `stat`.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn attributes(fd: impl AsFd) -> Result<Attributes, Errno> {
    let stat = rustix::fs::fstat(fd)?;
    // The fields differ in width between architectures.
    let time = |s: i64, ns: i128| (s, u32::try_from(ns).unwrap_or(0));
    Ok(Attributes {
        object: Object { device: stat.st_dev, inode: stat.st_ino },
        is_regular: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        links: wide(stat.st_nlink),
        accessed: time(stat.st_atime, stat.st_atime_nsec.into()),
        modified: time(stat.st_mtime, stat.st_mtime_nsec.into()),
        changed: time(stat.st_ctime, stat.st_ctime_nsec.into()),
    })
}

/// The field has 32 bits on some architectures.
fn wide(n: impl Into<u64>) -> u64 {
    n.into()
}

/// The extended attributes of a file: POSIX ACLs, capabilities and labels among them.
#[derive(Debug, Default)]
pub(crate) struct Xattrs {
    /// Names and values.
    pub(crate) all: Vec<(Vec<u8>, Vec<u8>)>,
    /// How many were too large to keep or could not be read.
    pub(crate) left_out: u32,
}

/// Reads the extended attributes, at most a mebibyte of them; none where the file system has none.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn xattrs(fd: impl AsFd) -> Result<Xattrs, Errno> {
    let mut names = vec![0; XATTR_MAX];
    let len = match rustix::fs::flistxattr(&fd, &mut names[..]) {
        Err(Errno::NOTSUP | Errno::NOSYS) => return Ok(Xattrs::default()),
        other => other?,
    };
    let mut found = Xattrs::default();
    let mut total = 0;
    let mut value = vec![0; XATTR_MAX];
    for name in names.get(..len).unwrap_or_default().split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let len = match rustix::fs::fgetxattr(&fd, name, &mut value[..]) {
            Ok(len) => len,
            // Removed since it was listed.
            Err(Errno::NODATA) => continue,
            Err(Errno::NOTSUP | Errno::PERM | Errno::ACCESS | Errno::RANGE | Errno::TOOBIG) => {
                found.left_out += 1;
                continue;
            }
            Err(errno) => return Err(errno),
        };
        total += name.len() + len;
        if total > MOST_XATTRS {
            found.left_out += 1;
        } else {
            found.all.push((name.to_vec(), value.get(..len).unwrap_or_default().to_vec()));
        }
    }
    // The order in which a file system lists them means nothing.
    found.all.sort_unstable();
    Ok(found)
}

/// Sets one extended attribute.
///
/// # Errors
/// Whatever the file system says; `INVAL` also for a name with a zero byte.
pub(crate) fn set_xattr(fd: impl AsFd, name: &[u8], value: &[u8]) -> Result<(), Errno> {
    let name = CString::new(name).map_err(|_| Errno::INVAL)?;
    rustix::fs::fsetxattr(fd, name.as_c_str(), value, XattrFlags::empty())
}

/// Sets owner and group. The kernel takes set-id bits and capabilities away with it.
///
/// # Errors
/// Whatever the file system says; `INVAL` for the number that stands for "no change".
pub(crate) fn set_owner(fd: impl AsFd, uid: u32, gid: u32) -> Result<(), Errno> {
    if uid == u32::MAX || gid == u32::MAX {
        return Err(Errno::INVAL);
    }
    rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
}

/// Sets permission, set-id and sticky bits.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn set_mode(fd: impl AsFd, mode: u32) -> Result<(), Errno> {
    rustix::fs::fchmod(fd, Mode::from_raw_mode(mode & 0o7777))
}

/// Sets when it was last read and changed.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn set_times(fd: impl AsFd, accessed: Time, modified: Time) -> Result<(), Errno> {
    let spec = |(tv_sec, ns): Time| Timespec { tv_sec, tv_nsec: ns.into() };
    let times = Timestamps { last_access: spec(accessed), last_modification: spec(modified) };
    rustix::fs::futimens(fd, &times)
}

/// Inode flags that stand in the way of changing or removing a file.
const FIRM: IFlags = IFlags::IMMUTABLE.union(IFlags::APPEND);
/// Inode flags that are a person's wish about a file, not the file system's own business.
const WISHES: IFlags = FIRM.union(IFlags::NODUMP).union(IFlags::NOATIME).union(IFlags::SYNC);

/// The inode flags that a person may have set (`chattr`), as the kernel's bits; 0 where there are none.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn flags(fd: impl AsFd) -> Result<u32, Errno> {
    match rustix::fs::ioctl_getflags(fd) {
        Ok(flags) => Ok((flags & WISHES).bits()),
        Err(Errno::NOTTY | Errno::NOTSUP | Errno::INVAL | Errno::NOSYS) => Ok(0),
        Err(errno) => Err(errno),
    }
}

/// Whether these flags keep a file from being changed or removed.
pub(crate) fn is_firm(flags: u32) -> bool {
    IFlags::from_bits_retain(flags).intersects(FIRM)
}

/// Takes away the flags that stand in the way. Does nothing where there are none.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn loosen(fd: impl AsFd) -> Result<(), Errno> {
    if !is_firm(flags(&fd)?) {
        return Ok(());
    }
    let now = rustix::fs::ioctl_getflags(&fd)?;
    rustix::fs::ioctl_setflags(&fd, now.difference(FIRM))
}

/// Sets flags that [`flags`] told, beside those that are set.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn set_flags(fd: impl AsFd, flags: u32) -> Result<(), Errno> {
    let wanted = IFlags::from_bits_retain(flags) & WISHES;
    if wanted.is_empty() {
        return Ok(());
    }
    let now = rustix::fs::ioctl_getflags(&fd)?;
    if now.contains(wanted) { Ok(()) } else { rustix::fs::ioctl_setflags(&fd, now | wanted) }
}

/// Room on a file system.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// Bytes that anybody may still write.
    pub(crate) bytes: u64,
    /// Files that may still be made; `None` where that is not limited.
    pub(crate) files: Option<u64>,
    /// Nothing can be written at all.
    pub(crate) read_only: bool,
}

/// How much room there is on the file system of `fd`.
///
/// # Errors
/// Whatever the file system says.
pub(crate) fn room(fd: impl AsFd) -> Result<Room, Errno> {
    let stat = rustix::fs::fstatvfs(fd)?;
    Ok(Room {
        bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        files: (stat.f_files > 0).then_some(stat.f_favail),
        read_only: stat.f_flag.contains(StatVfsMountFlags::RDONLY),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_read_back() {
        let file = tempfile::tempfile().unwrap();
        set_mode(&file, 0o640).unwrap();
        set_times(&file, (1, 2), (-3, 999_999_999)).unwrap();
        let read = attributes(&file).unwrap();
        assert_eq!((read.mode, read.accessed, read.modified), (0o640, (1, 2), (-3, 999_999_999)));
        assert!(read.is_regular);
        assert_eq!(read.links, 0);
        if set_xattr(&file, b"user.b", b"\0\xff").is_ok() {
            set_xattr(&file, b"user.a", b"").unwrap();
            let read = xattrs(&file).unwrap();
            let user: Vec<_> = read.all.iter().filter(|(name, _)| name.starts_with(b"user.")).collect();
            assert_eq!(user, [&(b"user.a".to_vec(), vec![]), &(b"user.b".to_vec(), b"\0\xff".to_vec())]);
        }
        assert!(set_xattr(&file, b"user.\0", b"").is_err());
        assert_eq!(set_owner(&file, u32::MAX, 0), Err(Errno::INVAL));
        assert!(room(&file).unwrap().bytes > 0, "control");
    }
}
