//! Disks without room: a clear error, the file as it was, and success as soon as there is room.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::Command,
};

use tm_tests::{
    Output,
    vault::{Vault, names},
};

use super::Whole;

/// A small file system in memory.
struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    fn new(options: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(folder.path());
        assert!(mount.status().unwrap().success(), "control: root can mount");
        Self { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn free(&self) -> u64 {
        let room = rustix::fs::statvfs(self.path()).unwrap();
        room.f_bavail * room.f_frsize
    }

    /// Fills it so that so many bytes are left.
    fn leave(&self, left: u64) -> PathBuf {
        let path = self.path().join("filler");
        let mut file = File::create(&path).unwrap();
        while self.free() > left {
            let len = (self.free() - left).min(1 << 20).next_multiple_of(4096);
            if file.write_all(&vec![1; usize::try_from(len).unwrap()]).is_err() {
                break;
            }
        }
        assert_eq!(self.free(), left, "control: it is as full as it should be");
        path
    }

    /// Leaves no file to be made.
    fn exhaust_files(&self) -> PathBuf {
        let path = self.path().join("many");
        fs::create_dir(&path).unwrap();
        (0..).find(|n| File::create(path.join(n.to_string())).is_err());
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

fn put(vault: &Vault, path: &Path) -> Output {
    vault.run(&["put".as_ref(), path.as_os_str()])
}

#[track_caller]
fn no_room(output: &Output) {
    let output = output.clone().expect(1);
    let said = ["room", "space", "inodes"].iter().any(|word| output.err().contains(word));
    assert!(said && output.err().contains("hint: "), "{}", output.both());
}

#[test]
fn a_vault_without_room_refuses_before_it_touches_the_file() {
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("file");
    fs::write(&path, vec![7; 100_000]).unwrap();
    let was = Whole::of(&path).unwrap();
    for kib in [0, 4, 64, 512] {
        for first_use in [true, false] {
            let disk = Disk::new("size=8m");
            let vault = Vault::new(&disk.path().join("state"));
            if !first_use {
                let id = vault.put(&path);
                vault.run(&["restore", &id]).expect(0);
            }
            let filler = disk.leave(kib << 10);
            let case = format!("{kib} KiB free, first use: {first_use}");
            no_room(&put(&vault, &path));
            assert!(Whole::of(&path).unwrap() == was, "{case}");
            assert_eq!(names(here.path()), ["file"], "{case}");
            assert_eq!((vault.items(), vault.files()), (vec![], vec![]), "{case}");
            fs::remove_file(filler).unwrap();
            // No more than room is needed to go on.
            let id = vault.put(&path);
            let filler = disk.leave(kib << 10);
            vault.run(&["restore", &id]).expect(0);
            assert!(Whole::of(&path).unwrap() == was, "{case}: restore needs no room in the vault");
            fs::remove_file(filler).unwrap();
            let id = vault.put(&path);
            disk.leave(kib << 10);
            vault.run(&["purge", &id]).expect(0);
            assert!(vault.files().is_empty(), "{case}: nor does a purge");
            assert_eq!(vault.recover(), "finished 0, undone 0, damaged 0", "{case}");
            fs::write(&path, &was.content).unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            let time = |(s, ns): (i64, i64)| rustix::fs::Timespec { tv_sec: s, tv_nsec: ns };
            let times = rustix::fs::Timestamps {
                last_access: time(was.times[0]),
                last_modification: time(was.times[1]),
            };
            rustix::fs::futimens(&file, &times).unwrap();
        }
    }
}

#[test]
fn a_vault_without_inodes_refuses_too() {
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("file");
    fs::write(&path, b"x").unwrap();
    let disk = Disk::new("size=8m,nr_inodes=64");
    let vault = Vault::new(&disk.path().join("state"));
    let many = disk.exhaust_files();
    no_room(&put(&vault, &path));
    fs::remove_dir_all(&many).unwrap();
    let id = vault.put(&path);
    vault.run(&["restore", &id]).expect(0);
    disk.exhaust_files();
    no_room(&put(&vault, &path));
    assert_eq!(fs::read(&path).unwrap(), b"x");
    assert!(vault.items().is_empty());
    fs::remove_dir_all(&many).unwrap();
    vault.put(&path);
}

#[test]
fn a_restore_onto_a_full_disk_leaves_the_item_and_no_part() {
    let disk = Disk::new("size=4m,nr_inodes=64");
    let state = tempfile::tempdir().unwrap();
    let vault = Vault::new(state.path());
    let files = disk.path().join("files");
    fs::create_dir(&files).unwrap();
    let path = files.join("file");
    fs::write(&path, vec![7; 1_000_000]).unwrap();
    let was = Whole::of(&path).unwrap();
    let id = vault.put(&path);
    for kib in [0, 4, 64, 512] {
        let filler = disk.leave(kib << 10);
        no_room(&vault.run(&["restore", &id]));
        assert_eq!((names(&files), vault.items().len()), (vec![], 1), "{kib} KiB free");
        fs::remove_file(filler).unwrap();
    }
    let many = disk.exhaust_files();
    no_room(&vault.run(&["restore", &id]));
    assert_eq!((names(&files), vault.items().len()), (vec![], 1));
    fs::remove_dir_all(many).unwrap();
    vault.run(&["restore", &id]).expect(0);
    assert!(Whole::of(&path).unwrap() == was);
}

#[test]
fn a_file_on_a_full_disk_is_taken_where_that_is_safe() {
    let disk = Disk::new("size=4m,nr_inodes=64");
    let state = tempfile::tempdir().unwrap();
    let vault = Vault::new(state.path());
    let files = disk.path().join("files");
    fs::create_dir(&files).unwrap();
    let (path, other) = (files.join("file"), files.join("other"));
    fs::write(&path, b"x").unwrap();
    fs::write(&other, b"y").unwrap();
    disk.leave(0);
    disk.exhaust_files();
    assert!(fs::create_dir(files.join("z")).is_err(), "control: there is no room for a private folder");
    // Whoever owns the folder could exchange the file while it is taken.
    chown(&files, Some(65534), None).unwrap();
    no_room(&put(&vault, &path));
    assert_eq!(
        (names(&files), vault.items(), vault.files()),
        (vec!["file".into(), "other".into()], vec![], vec![])
    );
    chown(&files, Some(0), None).unwrap();
    vault.put(&path);
    assert_eq!(names(&files), ["other"]);
    assert_eq!(vault.recover(), "finished 0, undone 0, damaged 0");
}

#[test]
fn the_file_may_lie_on_another_file_system_than_the_vault() {
    let disk = Disk::new("size=4m");
    let state = tempfile::tempdir().unwrap();
    let vault = Vault::new(state.path());
    let path = disk.path().join("file");
    fs::write(&path, b"x").unwrap();
    let was = Whole::of(&path).unwrap();
    let id = vault.put(&path);
    assert_eq!(names(disk.path()), [] as [&str; 0]);
    vault.run(&["restore", &id]).expect(0);
    assert!(Whole::of(&path).unwrap() == was);
}
