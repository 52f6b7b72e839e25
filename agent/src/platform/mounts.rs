//! What is mounted, by the kernel's own table: what kind of file system lies behind a mount's number. Nothing
//! on the mount is asked for it, so one that never answers holds nobody up.
//!
//! **Invariant:** an answer is never older than the last change of the table.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Seek as _},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::platform::fs::Residence;

/// Longest table that is read, in bytes; what does not fit is unknown.
const LONGEST: u64 = 64 << 20;

/// The mounts that this process sees.
#[derive(Debug)]
pub(crate) struct Mounts {
    /// `None` without `/proc`.
    file: Option<File>,
    known: HashMap<u64, Mount>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mount {
    residence: Residence,
    /// Whether anything is mounted on a folder of it.
    is_mounted_on: bool,
}

impl Mounts {
    /// Reads the table.
    pub(crate) fn new() -> Self {
        let mut mounts = Self { file: File::open("/proc/self/mountinfo").ok(), known: HashMap::new() };
        mounts.read();
        mounts
    }

    /// What kind of file system the mount has; `None` if there is no such mount here.
    pub(crate) fn residence(&mut self, mount: u64) -> Option<Residence> {
        self.refresh();
        self.known.get(&mount).map(|mount| mount.residence)
    }

    /// Whether all below the mount's top is out of reach of this machine: a server holds it, and nothing local
    /// is mounted on it.
    pub(crate) fn is_remote_throughout(&mut self, mount: u64) -> bool {
        self.refresh();
        self.known
            .get(&mount)
            .is_some_and(|mount| mount.residence == Residence::Remote && !mount.is_mounted_on)
    }

    fn refresh(&mut self) {
        let Some(file) = &self.file else { return };
        // The kernel marks the file when the table has changed since it was last asked.
        let mut fds = [PollFd::new(file, PollFlags::PRI)];
        let is_same = matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0));
        if !is_same {
            self.read();
        }
    }

    fn read(&mut self) {
        let read = |file: &mut File| -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            file.rewind()?;
            file.take(LONGEST).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        self.known = match self.file.as_mut().map(read) {
            Some(Ok(bytes)) => parse(&bytes),
            // What is not known is asked of the file system itself.
            Some(Err(_)) | None => HashMap::new(),
        };
    }
}

/// `/proc/PID/mountinfo` (proc(5)): number, parent, device, root, mount point, options, optional fields up to
/// a dash, type, source, options. Blanks within a field are escaped.
fn parse(table: &[u8]) -> HashMap<u64, Mount> {
    let mut known = HashMap::new();
    let mut parents = Vec::new();
    for line in table.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        let (Some(id), Some(parent)) = (fields.next().and_then(number), fields.next().and_then(number))
        else {
            continue;
        };
        if !fields.by_ref().skip(4).any(|field| field == b"-") {
            continue;
        }
        let Some(kind) = fields.next() else { continue };
        known.insert(id, Mount { residence: residence(kind), is_mounted_on: false });
        parents.push((id, parent));
    }
    for (id, parent) in parents {
        if id != parent
            && let Some(mount) = known.get_mut(&parent)
        {
            mount.is_mounted_on = true;
        }
    }
    known
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// What the kernel calls them; everything else is local.
fn residence(kind: &[u8]) -> Residence {
    match kind {
        b"proc" | b"sysfs" | b"cgroup" | b"cgroup2" | b"cpuset" | b"devpts" | b"debugfs" | b"tracefs"
        | b"securityfs" | b"pstore" | b"bpf" | b"mqueue" | b"configfs" | b"fusectl" | b"binfmt_misc"
        | b"autofs" | b"efivarfs" | b"selinuxfs" | b"smackfs" | b"nsfs" | b"rpc_pipefs" | b"nfsd"
        | b"resctrl" => Residence::Pseudo,
        b"nfs" | b"nfs4" | b"cifs" | b"smb3" | b"smbfs" | b"fuse" | b"fuseblk" | b"virtiofs" | b"9p"
        | b"ceph" | b"afs" | b"coda" | b"ncpfs" | b"lustre" | b"beegfs" | b"gpfs" | b"panfs" | b"pvfs2"
        | b"vboxsf" | b"vmhgfs" => Residence::Remote,
        kind if kind.starts_with(b"fuse.") || kind.starts_with(b"fuseblk.") => Residence::Remote,
        _ => Residence::Local,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::fs::Place;

    #[test]
    fn the_table_is_read_and_nonsense_in_it_is_passed_over() {
        let table = b"21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
            22 21 0:5 / /proc rw - proc proc rw\n\
            30 21 0:44 / /mnt/a\\040-\\040b rw shared:7 master:2 - fuse.sshfs user@host:/ rw\n\
            31 30 0:45 / /mnt/a\\040-\\040b/c rw - tmpfs - rw\n\
            32 21 0:46 / /mnt/d rw - nfs4 host:/ rw\n\
            33 21 0:46 / /mnt/e rw - fuse - rw\n\
            no number at all\n40\n41 21\n42 21 0:1 / /x rw shared:1\n43 21 0:1 / /x rw -\n\xff\xfe 1 2 3\n";
        let known = parse(table);
        let mut found: Vec<_> = known.into_iter().map(|(id, m)| (id, m.residence, m.is_mounted_on)).collect();
        found.sort_by_key(|(id, ..)| *id);
        assert_eq!(
            found,
            [
                (21, Residence::Local, true),
                (22, Residence::Pseudo, false),
                (30, Residence::Remote, true),
                (31, Residence::Local, false),
                (32, Residence::Remote, false),
                (33, Residence::Remote, false),
            ]
        );
    }

    #[test]
    fn the_kernels_numbers_are_those_of_its_table() {
        let mut mounts = Mounts::new();
        let mut of = |path: &[u8]| {
            let mount = Place::find(path).unwrap().facts().unwrap().mount;
            mount.and_then(|mount| mounts.residence(mount))
        };
        assert_eq!(of(b"/proc"), Some(Residence::Pseudo));
        assert_eq!(of(b"/"), Some(Residence::Local));
    }
}
