//! Disks without room: a clear error, the file as it was, and success as soon as there is room.

use std::{
    fs::{self, File},
    os::unix::fs::chown,
    path::{Path, PathBuf},
};

use tm_tests::{
    Output,
    tmpfs::Tmpfs,
    vault::{Vault, names},
};

use super::Whole;

/// A small file system, on a folder that goes with it.
struct Disk {
    tmpfs: Tmpfs,
    _folder: tempfile::TempDir,
}

impl Disk {
    fn new(mib: u64, inodes: u64) -> Self {
        let folder = tempfile::tempdir().expect("temporary folders work");
        Self { tmpfs: Tmpfs::mount(folder.path(), mib * 1024, inodes), _folder: folder }
    }

    fn path(&self) -> &Path {
        self.tmpfs.path()
    }

    /// Leaves so much room.
    fn leave(&self, kib: u64) -> PathBuf {
        let filler = self.tmpfs.fill(kib);
        assert_eq!(self.tmpfs.free_kib(), kib, "control: it is as full as it should be");
        filler
    }

    /// Leaves no file to be made.
    fn exhaust_files(&self) -> PathBuf {
        let path = self.path().join("many");
        fs::create_dir(&path).expect("an inode is left");
        (0..).find(|n| File::create(path.join(n.to_string())).is_err());
        path
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
            let disk = Disk::new(8, 1000);
            let vault = Vault::new(&disk.path().join("state"));
            if !first_use {
                let id = vault.put(&path);
                vault.run(&["restore", &id]).expect(0);
            }
            let filler = disk.leave(kib);
            let case = format!("{kib} KiB free, first use: {first_use}");
            no_room(&put(&vault, &path));
            assert!(Whole::of(&path).unwrap() == was, "{case}");
            assert_eq!(names(here.path()), ["file"], "{case}");
            assert_eq!((vault.items(), vault.files()), (vec![], vec![]), "{case}");
            fs::remove_file(filler).unwrap();
            // No more than room is needed to go on.
            let id = vault.put(&path);
            let filler = disk.leave(kib);
            vault.run(&["restore", &id]).expect(0);
            assert!(Whole::of(&path).unwrap() == was, "{case}: restore needs no room in the vault");
            fs::remove_file(filler).unwrap();
            let id = vault.put(&path);
            disk.leave(kib);
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
    let disk = Disk::new(8, 64);
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
    let disk = Disk::new(4, 64);
    let state = tempfile::tempdir().unwrap();
    let vault = Vault::new(state.path());
    let files = disk.path().join("files");
    fs::create_dir(&files).unwrap();
    let path = files.join("file");
    fs::write(&path, vec![7; 1_000_000]).unwrap();
    let was = Whole::of(&path).unwrap();
    let id = vault.put(&path);
    for kib in [0, 4, 64, 512] {
        let filler = disk.leave(kib);
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
    let disk = Disk::new(4, 64);
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
    let disk = Disk::new(4, 1000);
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
