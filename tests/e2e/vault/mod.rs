//! `tm-agent vault …`: what is removed can be brought back, whatever happens on the way.

mod damage;
mod full;
mod race;
mod roundtrip;
mod sweep;

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::Path,
};

use rustix::fs::{IFlags, Mode, OFlags, XattrFlags};

/// Everything of a file that is to survive the vault.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Whole {
    content: Vec<u8>,
    mode: u32,
    owner: (u32, u32),
    times: [(i64, i64); 2],
    xattrs: Vec<(String, Vec<u8>)>,
    flags: u32,
}

impl Whole {
    /// Reads it; `None` if nothing stands there.
    fn of(path: &Path) -> Option<Self> {
        let stat = fs::symlink_metadata(path).ok()?;
        assert!(stat.is_file(), "{} is no file", path.display());
        // To look must not change what is looked at.
        let flags = OFlags::RDONLY | OFlags::NOATIME | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).expect("root reads everything"));
        let flags = rustix::fs::ioctl_getflags(&file).map_or(0, |flags| (flags & marks()).bits());
        let mut content = vec![0; usize::try_from(stat.len()).expect("small")];
        file.read_exact_at(&mut content, 0).expect("readable");
        Some(Self {
            content,
            mode: stat.mode() & 0o7777,
            owner: (stat.uid(), stat.gid()),
            times: [(stat.atime(), stat.atime_nsec()), (stat.mtime(), stat.mtime_nsec())],
            xattrs: xattrs(&file),
            flags,
        })
    }
}

fn marks() -> IFlags {
    IFlags::IMMUTABLE | IFlags::APPEND | IFlags::NODUMP | IFlags::NOATIME
}

fn xattrs(file: &File) -> Vec<(String, Vec<u8>)> {
    let mut list = vec![0; 64 << 10];
    let len = rustix::fs::flistxattr(file, &mut list[..]).unwrap_or(0);
    let names = list[..len].split(|b| *b == 0).filter(|name| !name.is_empty());
    let mut found: Vec<_> = names
        .map(|name| {
            let mut value = vec![0; 64 << 10];
            let len = rustix::fs::fgetxattr(file, name, &mut value[..]).expect("listed");
            value.truncate(len);
            (String::from_utf8_lossy(name).into_owned(), value)
        })
        .collect();
    found.sort();
    found
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// Sets or takes a mark (`chattr`); false where the file system has none.
fn mark(path: &Path, flag: IFlags, on: bool) -> bool {
    let file = File::open(path).expect("it is there");
    let Ok(flags) = rustix::fs::ioctl_getflags(&file) else { return false };
    let wanted = if on { flags | flag } else { flags - flag };
    rustix::fs::ioctl_setflags(&file, wanted).is_ok()
}

/// `user::rw-,user:1234:r--,group::r--,mask::r--,other::---` as the kernel keeps it (acl(5),
/// linux/posix_acl_xattr.h): the version, then tag, rights and id of each entry.
fn acl() -> Vec<u8> {
    let mut acl = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in
        [(1_u16, 6_u16, u32::MAX), (2, 4, 1234), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)]
    {
        acl.extend(tag.to_le_bytes());
        acl.extend(rights.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    acl
}

/// `cap_net_bind_service=ep` as the kernel keeps it (linux/capability.h, version 2).
fn capability() -> Vec<u8> {
    [0x0200_0001_u32, 1 << 10, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect()
}
