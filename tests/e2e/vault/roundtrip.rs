//! What goes in comes out, and what must not go in or out is refused.

use std::{
    ffi::OsStr,
    fs::{self, File, FileTimes},
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _, fs::symlink, net::UnixListener},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::fs::{CWD, FileType, IFlags, Mode};
use tm_tests::{
    Output,
    vault::{Vault, names},
};

use super::{Whole, acl, capability, mark, set_xattr};

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + i / 251) % 256).expect("it is small")).collect()
}

fn folder() -> (tempfile::TempDir, Vault, PathBuf) {
    let folder = tempfile::tempdir().expect("temporary folders work");
    let vault = Vault::new(&folder.path().join("state"));
    let files = folder.path().join("files");
    fs::create_dir(&files).expect("root writes here");
    (folder, vault, files)
}

/// Vaults the file, looks that it is gone, puts it back.
fn there_and_back(vault: &Vault, path: &Path) {
    let before = Whole::of(path).expect("control: it is there");
    let id = vault.put(path);
    assert!(path.symlink_metadata().is_err(), "it is gone");
    let items = vault.items();
    assert_eq!(items.len(), 1);
    assert_eq!((&*items[0].id, &*items[0].path), (&*id, path.as_os_str().as_bytes()));
    assert_eq!(items[0].size, u64::try_from(before.content.len()).expect("it is small"));
    let output = vault.run(&["restore", &id, "--set-id"]).expect(0);
    let printed = tm_protocol::text::unescape(output.out().trim_end());
    assert_eq!(printed.as_deref(), Some(path.as_os_str().as_bytes()));
    let after = Whole::of(path).expect("it is back");
    assert!(
        after == before,
        "{:?}\n{:?}",
        Whole { content: vec![], ..after },
        Whole { content: vec![], ..before }
    );
    assert_eq!((vault.items(), vault.files()), (vec![], vec![]), "the item went");
    assert_eq!(vault.recover(), "finished 0, undone 0, damaged 0");
}

#[test]
fn content_of_every_length_comes_back() {
    let (_folder, vault, files) = folder();
    for len in [0, 1, (64 << 10) - 1, 64 << 10, (64 << 10) + 1, 40_000_000] {
        let path = files.join("file");
        fs::write(&path, content(len)).unwrap();
        there_and_back(&vault, &path);
    }
    // No temporary name is left beside it.
    assert_eq!(names(&files), ["file"]);
}

#[test]
fn an_item_is_readable_by_nobody_and_shows_nothing() {
    let (_folder, vault, files) = folder();
    let path = files.join("file");
    let text = b"this text must not be found in the vault";
    fs::write(&path, text.repeat(1000)).unwrap();
    let control = |needle: &[u8], hay: &[u8]| hay.windows(needle.len()).any(|part| part == needle);
    assert!(control(text, &fs::read(&path).unwrap()), "control");
    let id = vault.put(&path);
    let item = vault.state.join("vault/items").join(id);
    let bytes = fs::read(&item).unwrap();
    assert!(!control(text, &bytes) && !control(b"file", &bytes));
    for path in
        [vault.state.join("vault"), vault.state.join("vault/items"), item, vault.state.join("vault/key")]
    {
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{} {mode:o}", path.display());
    }
}

#[test]
fn all_that_belongs_to_a_file_comes_back() {
    let (_folder, vault, files) = folder();
    let path = files.join(OsStr::from_bytes(b"line\nbreak \xff\xfe \\ \"quote\""));
    fs::write(&path, content(100_000)).unwrap();
    std::os::unix::fs::chown(&path, Some(4321), Some(1234)).unwrap();
    set_xattr(&path, "user.empty", b"");
    set_xattr(&path, "user.bytes", b"\0\xff\n");
    set_xattr(&path, "trusted.seen", b"yes");
    set_xattr(&path, "system.posix_acl_access", &acl());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6751)).unwrap();
    set_xattr(&path, "security.capability", &capability());
    let at = |s, ns| SystemTime::UNIX_EPOCH + Duration::new(s, ns);
    let times =
        FileTimes::new().set_accessed(at(1, 999_999_999)).set_modified(at(1_600_000_000, 123_456_789));
    File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
    assert!(mark(&path, IFlags::NODUMP, true), "control: the file system has marks");
    assert!(mark(&path, IFlags::IMMUTABLE, true));
    let before = Whole::of(&path).unwrap();
    let said: Vec<&str> = before.xattrs.iter().map(|(name, _)| &**name).collect();
    let expected =
        ["security.capability", "system.posix_acl_access", "trusted.seen", "user.bytes", "user.empty"];
    assert_eq!(said, expected, "control");
    assert_eq!(before.mode, 0o6751, "control");
    assert!(fs::remove_file(&path).is_err(), "control: it is immutable");
    there_and_back(&vault, &path);
    assert!(fs::remove_file(&path).is_err(), "it is immutable again");
    mark(&path, IFlags::IMMUTABLE, false);

    // Append-only is the other mark that stands in the way.
    mark(&path, IFlags::APPEND, true);
    there_and_back(&vault, &path);
    mark(&path, IFlags::APPEND, false);
}

#[test]
fn set_id_and_capabilities_come_back_only_when_asked_for() {
    let (_folder, vault, files) = folder();
    let path = files.join("file");
    fs::write(&path, b"x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    set_xattr(&path, "security.capability", &capability());
    let id = vault.put(&path);
    let would = vault.run(&["restore", &id, "--dry-run"]).expect(0);
    assert!(would.err().contains("set-id-withheld"), "{}", would.both());
    assert!(!path.exists(), "a dry run changes nothing");
    let output = vault.run(&["restore", &id]).expect(0);
    assert!(output.err().contains("set-id-withheld"), "{}", output.both());
    let after = Whole::of(&path).unwrap();
    assert_eq!((after.mode, after.xattrs), (0o755, vec![]));
}

#[test]
fn other_names_are_told_of() {
    let (_folder, vault, files) = folder();
    let (path, other) = (files.join("file"), files.join("other"));
    fs::write(&path, b"x").unwrap();
    fs::hard_link(&path, &other).unwrap();
    let output = vault.run(&[OsStr::new("put"), path.as_os_str()]).expect(0);
    assert!(output.err().contains("other-links"), "{}", output.both());
    assert!(!path.exists() && other.exists());
    vault.run(&["restore", output.out().trim()]).expect(0);
    assert_eq!(fs::read(&path).unwrap(), b"x");
}

#[test]
fn a_copy_elsewhere_leaves_the_item() {
    let (_folder, vault, files) = folder();
    let (path, copy) = (files.join("file"), files.join("copy"));
    fs::write(&path, b"content").unwrap();
    let before = Whole::of(&path).unwrap();
    let id = vault.put(&path);
    let to = |to: &Path| vault.run(&[OsStr::new("restore"), id.as_ref(), "--to".as_ref(), to.as_os_str()]);
    to(&copy).expect(0);
    assert_eq!(Whole::of(&copy).unwrap(), before);
    assert!(!path.exists());
    assert_eq!(vault.items().len(), 1);
    let again = to(&copy).expect(3);
    assert!(again.err().contains("already"), "{}", again.both());
    vault.run(&["restore", &id]).expect(0);
    let twice = vault.run(&["restore", &id]).expect(3);
    assert!(twice.err().contains("put back already"), "{}", twice.both());
    assert_eq!(vault.recover(), "finished 0, undone 0, damaged 0");
}

#[track_caller]
fn refused(output: Output, code: i32, word: &str) {
    let output = output.expect(code);
    assert!(output.err().contains(word) && output.stdout.is_empty(), "{word}: {}", output.both());
}

#[test]
fn only_regular_files_named_without_links_are_taken() {
    let (folder, vault, files) = folder();
    let put = |path: &Path| vault.run(&[OsStr::new("put"), path.as_os_str()]);
    let real = files.join("real");
    fs::write(&real, b"x").unwrap();
    symlink(&real, files.join("link")).unwrap();
    symlink(&files, folder.path().join("way")).unwrap();
    rustix::fs::mknodat(CWD, files.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _socket = UnixListener::bind(files.join("socket")).unwrap();
    refused(put(&files.join("link")), 3, "symbolic link");
    refused(put(&folder.path().join("way/real")), 3, "symbolic link");
    refused(put(&folder.path().join("way/../files/real")), 1, "reach");
    refused(put(&files.join("fifo")), 3, "device, socket or fifo");
    refused(put(&files.join("socket")), 3, "device, socket or fifo");
    refused(put(&files), 3, "a folder");
    refused(put(Path::new("/proc/1/status")), 3, "kernel makes up");
    refused(put(Path::new("/dev/null")), 3, "device, socket or fifo");
    refused(put(&files.join("none")), 1, "no longer there");
    refused(put(&files.join("real/none")), 1, "no longer there");
    // Its own files, by name and through another mount of the same folder.
    for own in ["vault/key", "vault/index", "vault/lock"] {
        refused(put(&vault.state.join(own)), 3, "belongs to tm-agent itself");
    }
    refused(put(&tm_tests::bin("tm-agent")), 3, "belongs to tm-agent itself");
    assert_eq!(vault.items(), []);
    assert_eq!(names(&files), ["fifo", "link", "real", "socket"]);
    // The control, by a roundabout name.
    vault.put(&files.join("../files/./real"));
    assert_eq!(vault.items()[0].path, real.as_os_str().as_bytes());
}

#[test]
fn a_dry_run_says_what_would_be_and_changes_nothing() {
    let (_folder, vault, files) = folder();
    let path = files.join("file");
    fs::write(&path, b"x").unwrap();
    let output = vault.run(&[OsStr::new("put"), path.as_os_str(), "--dry-run".as_ref()]).expect(0);
    assert!(output.out().starts_with("would vault"), "{}", output.both());
    assert!(path.exists() && vault.items().is_empty() && vault.files().is_empty());
    refused(vault.run(&[OsStr::new("put"), files.as_os_str(), "--dry-run".as_ref()]), 3, "a folder");
    let id = vault.put(&path);
    vault.run(&["purge", &id, "--dry-run"]).expect(0);
    assert_eq!(vault.files(), [&*id]);
    vault.run(&["purge", "--older-than", "1h"]).expect(0);
    assert_eq!(vault.files(), [&*id], "it is younger");
    vault.run(&["purge", &id]).expect(0);
    assert_eq!((vault.items(), vault.files()), (vec![], vec![]));
    refused(vault.run(&["purge", &id]), 1, "no item");
    refused(vault.run(&["restore", &id]), 1, "no item");
    vault.run(&["restore", "not-an-id"]).expect(2);
    vault.run(&["purge", "--older-than", "soon"]).expect(2);
}

#[test]
fn nothing_is_put_over_or_beside_what_stands_there() {
    let (folder, vault, files) = folder();
    let protected = folder.path().join("protected");
    fs::create_dir(&protected).unwrap();
    let path = files.join("file");
    fs::write(&path, b"vaulted").unwrap();
    let id = vault.put(&path);
    let restore = || vault.run(&["restore", &id]);

    let planted: [(&str, &dyn Fn()); 4] = [
        ("link", &|| symlink(protected.join("new"), &path).unwrap()),
        ("fifo", &|| rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap()),
        ("newer", &|| fs::write(&path, b"newer").unwrap()),
        ("hard link", &|| {
            fs::write(files.join("x"), b"newer").unwrap();
            fs::hard_link(files.join("x"), &path).unwrap();
        }),
    ];
    for (case, plant) in planted {
        plant();
        let before = fs::symlink_metadata(&path).unwrap();
        refused(restore(), 3, "already");
        let after = fs::symlink_metadata(&path).unwrap();
        assert_eq!(before.modified().unwrap(), after.modified().unwrap(), "{case}");
        assert_eq!(before.file_type(), after.file_type(), "{case}");
        fs::remove_file(&path).unwrap();
    }
    fs::create_dir(&path).unwrap();
    refused(restore(), 3, "already");
    fs::remove_dir(&path).unwrap();

    // The folder is gone, or is a link, or a file, or somebody else's now.
    let away = folder.path().join("away");
    fs::rename(&files, &away).unwrap();
    refused(restore(), 1, "folder");
    symlink(&protected, &files).unwrap();
    refused(restore(), 3, "symbolic link");
    fs::remove_file(&files).unwrap();
    fs::write(&files, b"").unwrap();
    refused(restore(), 1, "folder");
    fs::remove_file(&files).unwrap();
    fs::rename(&away, &files).unwrap();
    std::os::unix::fs::chown(&files, Some(4321), None).unwrap();
    refused(restore(), 3, "another user");
    std::os::unix::fs::chown(&files, Some(0), None).unwrap();
    refused(
        vault.run(&[OsStr::new("restore"), id.as_ref(), "--to".as_ref(), vault.state.join("x").as_os_str()]),
        3,
        "belongs to tm-agent itself",
    );
    assert_eq!(names(&protected), [] as [&str; 0]);
    restore().expect(0);
    assert_eq!(fs::read(&path).unwrap(), b"vaulted");
}

#[test]
fn an_immutable_folder_is_named_before_anything_is_done() {
    let (_folder, vault, files) = folder();
    let path = files.join("file");
    fs::write(&path, b"x").unwrap();
    assert!(mark(&files, IFlags::IMMUTABLE, true), "control");
    refused(vault.run(&[OsStr::new("put"), path.as_os_str()]), 1, "immutable");
    assert!(vault.items().is_empty() && vault.files().is_empty());
    mark(&files, IFlags::IMMUTABLE, false);
    let id = vault.put(&path);
    mark(&files, IFlags::IMMUTABLE, true);
    refused(vault.run(&["restore", &id]), 1, "immutable");
    mark(&files, IFlags::IMMUTABLE, false);
    vault.run(&["restore", &id]).expect(0);
}

#[test]
fn the_vault_serves_one_at_a_time_and_says_who_has_it() {
    let (_folder, vault, files) = folder();
    let path = files.join("file");
    fs::write(&path, b"x").unwrap();
    vault.put(&path);
    let lock = File::open(vault.state.join("vault/lock")).unwrap();
    lock.lock().unwrap();
    fs::write(vault.state.join("vault/lock"), b"4242\n").unwrap();
    refused(vault.run(&["recover"]), 1, "pid 4242");
    assert_eq!(vault.items().len(), 1, "a list does not wait");
    drop(lock);
    vault.recover();
}

#[test]
fn names_cannot_play_with_the_terminal() {
    let (_folder, vault, files) = folder();
    let path = files.join(OsStr::from_bytes(b"\x1b[2Jevil\nname"));
    fs::write(&path, b"x").unwrap();
    vault.put(&path);
    let list = vault.run(&["list"]).expect(0);
    assert_eq!(list.out().lines().count(), 2, "{}", list.both());
    assert!(!list.stdout.contains(&0x1b), "{}", list.both());
    let error = vault.run(&[OsStr::new("put"), path.as_os_str()]).expect(1);
    assert!(!error.stderr.contains(&0x1b), "{:?}", error.err());
}
