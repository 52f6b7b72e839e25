//! Walks through trees that are deep, change, hang or never end.

use std::{
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;
use tm_tests::{
    Lab, Output, PATIENCE,
    fuse::{Fuse, Silence},
    samples, standalone,
    tmpfs::Tmpfs,
    wait_for,
};

use crate::path_and_member;

/// `path` and `reason` of what was skipped, by the path below `root`, sorted.
fn skipped(output: &Output, root: &Path) -> Vec<(String, String)> {
    let root = format!("{}/", root.display());
    let below = |line: &Value| {
        let (path, _) = path_and_member(line);
        let path = String::from_utf8(path).expect("names in these tests are UTF-8");
        (path.strip_prefix(&root).unwrap_or(&path).to_owned(), line["reason"].as_str().unwrap().to_owned())
    };
    let mut all: Vec<_> = standalone::lines(output, "skipped").iter().map(below).collect();
    all.sort();
    all
}

fn detected(output: &Output) -> Vec<Vec<u8>> {
    let mut all: Vec<_> =
        standalone::lines(output, "detection").iter().map(|line| path_and_member(line).0).collect();
    all.sort();
    all
}

fn pair(path: &str, reason: &str) -> (String, String) {
    (path.to_owned(), reason.to_owned())
}

#[test]
fn a_mount_that_never_answers_is_named_and_not_even_asked() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::write(root.join("a.com"), samples::eicar()).unwrap();
    fs::write(root.join("z.com"), samples::eicar()).unwrap();
    let mounted = Fuse::mount(&root.join("hang"), &[("x.com", Some(&samples::eicar()))]);
    mounted.be_silent(Silence::All);
    for more in [&[][..], &["--all-local"]] {
        let output = standalone::scan(samples::EICAR_RULE, root, more).expect(1);
        assert_eq!(skipped(&output, root), [pair("hang", "remote")]);
        assert_eq!(detected(&output).len(), 2, "{}", output.both());
    }
    for below in ["hang", "hang/", "hang/x.com", "hang/a/b/c"] {
        let output = standalone::scan(samples::EICAR_RULE, &root.join(below), &[]).expect(2);
        assert_eq!(skipped(&output, root), [pair(below, "remote")], "{}", output.both());
    }
    assert_eq!(mounted.unanswered(), 0, "nobody asked it anything");
    let below = root.join("hang/none");
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| fs::metadata(&below).map(drop));
        wait_for("the control: a question is noticed", PATIENCE, || (mounted.unanswered() > 0).then_some(()));
        drop(mounted);
        assert!(asking.join().unwrap().is_err());
    });
}

/// A local file system whose content comes from one that can be silent.
struct Overlay {
    path: PathBuf,
    lower: Option<Fuse>,
}

impl Overlay {
    fn mount(folder: &Path, entries: &[(&'static str, Option<&[u8]>)]) -> Self {
        let lower = Fuse::mount(&folder.join("lower"), entries);
        let path = folder.join("over");
        for name in ["over", "other"] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        let layers =
            format!("lowerdir={}:{}", folder.join("lower").display(), folder.join("other").display());
        let done =
            Command::new("mount").args(["-t", "overlay", "-o", &layers, "overlay"]).arg(&path).status();
        assert!(done.unwrap().success(), "an overlay cannot be mounted");
        Self { path, lower: Some(lower) }
    }

    fn lower(&self) -> &Fuse {
        self.lower.as_ref().expect("it is there until the end")
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        // First of all whoever waits is released.
        drop(self.lower.take());
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

#[test]
fn what_does_not_answer_in_a_local_file_system_is_named_and_the_rest_is_seen() {
    let eicar = samples::eicar();
    let entries: [(_, Option<&[u8]>); 6] = [
        ("a.com", Some(&eicar)),
        ("lookup", Some(b"x")),
        ("open", Some(b"x")),
        ("folder", None),
        ("read", Some(b"x")),
        ("z.com", Some(&eicar)),
    ];
    // Read by the server and never answered, whoever asks cannot be killed; unread, he can.
    for silence in
        [Silence::Lookup("lookup"), Silence::Open("open"), Silence::List("folder"), Silence::Read("read")]
    {
        let folder = tempfile::tempdir().unwrap();
        let over = Overlay::mount(folder.path(), &entries);
        let name = match silence {
            Silence::All => unreachable!(),
            Silence::Lookup(name) | Silence::List(name) | Silence::Open(name) | Silence::Read(name) => name,
        };
        over.lower().be_silent(silence.clone());
        let started = Instant::now();
        let output =
            standalone::scan_until_summary(samples::EICAR_RULE, &over.path, &["--file-timeout", "1s"]);
        let took = started.elapsed();
        // The kernel locks a folder while a name in it is looked up, so that its listing may not end either.
        let whole = pair(&over.path.display().to_string(), "timeout");
        let mut skipped = skipped(&output, &over.path);
        skipped.retain(|skipped| *skipped != whole);
        assert_eq!(skipped, [pair(name, "timeout")], "{silence:?}");
        assert_eq!(detected(&output).len(), 2, "{silence:?}: {}", output.both());
        assert_eq!(over.lower().unanswered(), 1, "{silence:?}: the control: it was asked");
        assert!(took < Duration::from_secs(20), "{silence:?}: {took:?}");
    }
}

#[test]
fn when_nothing_answers_any_more_the_scan_ends() {
    let folder = tempfile::tempdir().unwrap();
    let entries: Vec<_> = ["1", "2", "3", "4", "5", "6", "7", "8"].map(|name| (name, Some(&b"x"[..]))).into();
    let over = Overlay::mount(folder.path(), &entries);
    over.lower().stop_reading();
    let started = Instant::now();
    let output = standalone::scan(samples::EICAR_RULE, &over.path, &["--file-timeout", "500ms"]).expect(2);
    let took = started.elapsed();
    let skipped = skipped(&output, &over.path);
    assert!(!skipped.is_empty() && skipped.iter().all(|(_, reason)| reason == "timeout"), "{skipped:?}");
    let whole = over.path.display().to_string();
    assert!(skipped.iter().any(|(path, _)| *path == whole), "the folder is named as unfinished: {skipped:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[test]
fn a_scan_that_hangs_is_called_off_within_seconds_and_the_agent_goes_on() {
    let lab = Lab::start();
    let agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let dirty = lab.folder("dirty");
    fs::write(dirty.join("a.com"), samples::eicar()).unwrap();
    for silence in [Silence::Lookup("stuck"), Silence::Read("stuck")] {
        let folder = tempfile::tempdir().unwrap();
        let over = Overlay::mount(folder.path(), &[("stuck", Some(b"x"))]);
        over.lower().be_silent(silence.clone());
        let scan = lab.scan_in_background(&agent, &over.path);
        wait_for("the scan to hang", PATIENCE, || (over.lower().unanswered() > 0).then_some(()));
        let id = lab.newest_task(&agent).unwrap()["id"].as_str().unwrap().to_owned();
        let begun = Instant::now();
        lab.tmctl(["task", "cancel", &id, "--wait"]);
        let took = begun.elapsed();
        assert_eq!(lab.newest_task(&agent).unwrap()["state"], "cancelled", "{silence:?}");
        // Two seconds by promise; the rest is the machine that runs many tests at once.
        assert!(took < Duration::from_secs(5), "{silence:?}: {took:?}");
        assert_ne!(scan.join().unwrap().code(), 0);
        // While it still hangs.
        lab.scan(&agent, &dirty).expect(10);
        assert!(lab.is_connected(&agent));
    }
}

#[test]
fn other_file_systems_are_named_or_walked() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::write(root.join("a.com"), samples::eicar()).unwrap();
    let mounted = Tmpfs::mount(&root.join("sub/mounted"), 1024, 100);
    fs::write(mounted.path().join("b.com"), samples::eicar()).unwrap();
    let proc = root.join("proc");
    fs::create_dir(&proc).unwrap();
    assert!(Command::new("mount").args(["-t", "proc", "proc"]).arg(&proc).status().unwrap().success());
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let _unmount = Unmount(proc);

    let output = standalone::scan(samples::EICAR_RULE, root, &[]).expect(1);
    assert_eq!(skipped(&output, root), [pair("proc", "pseudo"), pair("sub/mounted", "other-filesystem")]);
    assert_eq!(detected(&output).len(), 1);
    let output = standalone::scan(samples::EICAR_RULE, root, &["--all-local"]).expect(1);
    assert_eq!(skipped(&output, root), [pair("proc", "pseudo")]);
    assert_eq!(detected(&output).len(), 2);
}

#[test]
fn a_deep_tree_is_seen_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let name = "n".repeat(250);
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
    let mut fd = rustix::fs::open(folder.path(), flags, rustix::fs::Mode::empty()).unwrap();
    let depth = 600;
    for _ in 0..depth {
        rustix::fs::mkdirat(&fd, &name, 0o755.into()).unwrap();
        fd = rustix::fs::openat(&fd, &name, flags, rustix::fs::Mode::empty()).unwrap();
    }
    let create = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
    let file = rustix::fs::openat(&fd, "deep.com", create, 0o644.into()).unwrap();
    std::io::Write::write_all(&mut fs::File::from(file), &samples::eicar()).unwrap();

    let output = standalone::scan(samples::EICAR_RULE, folder.path(), &[]).expect(1);
    let path = format!("{}{}/deep.com", folder.path().display(), format!("/{name}").repeat(depth));
    assert_eq!(detected(&output), [path.into_bytes()]);
    assert_eq!(skipped(&output, folder.path()), []);
}

#[test]
fn a_file_of_many_names_is_read_once_and_each_name_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::write(root.join("one.com"), samples::eicar()).unwrap();
    fs::write(root.join("locked.zip"), samples::encrypted_zip()).unwrap();
    let mut expected = vec![root.join("one.com").as_os_str().as_bytes().to_vec()];
    let mut gaps = vec!["locked.zip".to_owned()];
    for n in 0..50 {
        let sub = root.join(format!("sub{}", n % 7));
        fs::create_dir_all(&sub).unwrap();
        let path = sub.join(format!("{n}.com"));
        fs::hard_link(root.join("one.com"), &path).unwrap();
        expected.push(path.as_os_str().as_bytes().to_vec());
        fs::hard_link(root.join("locked.zip"), sub.join(format!("{n}.zip"))).unwrap();
        gaps.push(format!("sub{}/{n}.zip", n % 7));
    }
    expected.sort();
    gaps.sort();
    let output = standalone::scan(samples::EICAR_RULE, root, &[]).expect(1);
    assert_eq!(detected(&output), expected);
    let skipped: Vec<_> = skipped(&output, root).into_iter().map(|(path, _)| path).collect();
    assert_eq!(skipped, gaps);
    let summary = &standalone::lines(&output, "summary")[0];
    assert_eq!((&summary["files"], &summary["detections"]), (&2.into(), &51.into()), "{summary}");
}

#[test]
fn a_file_without_end_costs_no_time() {
    let folder = tempfile::tempdir().unwrap();
    let hole = fs::File::create(folder.path().join("hole")).unwrap();
    hole.set_len(1 << 40).unwrap();
    let started = Instant::now();
    let output = standalone::scan(samples::EICAR_RULE, folder.path(), &[]).expect(2);
    assert_eq!(skipped(&output, folder.path()), [pair("hole", "limit")]);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    let summary = &standalone::lines(&output, "summary")[0];
    assert_eq!((&summary["files"], &summary["bytes"]), (&0.into(), &0.into()), "{summary}");
}
