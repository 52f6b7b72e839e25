//! A small file system of its own, to be filled up.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

/// A mounted tmpfs; unmounted when dropped.
#[derive(Debug)]
pub struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    /// Mounts one of `kib` KiB and `inodes` inodes on a folder, which is made if it is missing.
    ///
    /// # Panics
    /// If it cannot be mounted (that needs root).
    pub fn mount(path: &Path, kib: u64, inodes: u64) -> Self {
        fs::create_dir_all(path).expect("a mount point can be made");
        let options = format!("size={kib}k,nr_inodes={inodes},mode=0700");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).status();
        assert!(
            done.expect("mount can be run").success(),
            "a tmpfs cannot be mounted; these tests need root"
        );
        Self { path: path.to_path_buf() }
    }

    /// The same over a folder that has content, which the new file system then holds.
    ///
    /// # Panics
    /// As [`Tmpfs::mount`].
    pub fn over(path: &Path, kib: u64, inodes: u64) -> Self {
        let beside = path.with_extension("moved");
        fs::rename(path, &beside).expect("a folder can be moved");
        let mounted = Self::mount(path, kib, inodes);
        let from = format!("{}/.", beside.display());
        let copied = Command::new("cp").args(["-a", &from]).arg(path).status();
        assert!(copied.expect("cp can be run").success(), "the folder's content does not fit");
        fs::remove_dir_all(beside).expect("a copied folder can be removed");
        mounted
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Free space, in KiB.
    ///
    /// # Panics
    /// If it is not mounted any more.
    pub fn free_kib(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.path).expect("it is mounted");
        stat.f_bavail * stat.f_frsize / 1024
    }

    /// Fills it with one file until `kib` KiB are free; the file.
    ///
    /// # Panics
    /// If that cannot be reached.
    pub fn fill(&self, kib: u64) -> PathBuf {
        let path = self.path.join("ballast");
        let mut file = File::create(&path).expect("an inode is left");
        while self.free_kib() > kib {
            let some = usize::try_from((self.free_kib() - kib).min(64)).unwrap_or(1) * 1024;
            if file.write_all(&vec![1; some]).is_err() {
                break;
            }
        }
        assert!(self.free_kib() <= kib, "{} KiB are free", self.free_kib());
        path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a program that a failing test leaves behind must not keep it.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}
