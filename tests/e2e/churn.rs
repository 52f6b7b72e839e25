//! A tree that never holds still while it is scanned again and again.
//!
//! The control of every round: a file that nobody touches is found in it. A folder outside holds another one, and
//! links to it come and go: nothing beyond a link is ever reported.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::{ffi::OsStrExt as _, fs::symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use tm_tests::{Lab, is_long, samples};

use crate::path_and_member;

const FOLDERS: usize = 8;
/// Above what a worker reads: these are mapped, and cut meanwhile.
const LARGE: usize = 3 << 20;
const SMALL: usize = 6 << 10;

/// Numbers that differ from turn to turn.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// Does `deed` until told to end; how often it did.
fn keep_on(stop: &AtomicBool, seed: u64, mut deed: impl FnMut(&mut Dice)) -> u64 {
    let mut dice = Dice(seed);
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        deed(&mut dice);
        count += 1;
        thread::yield_now();
    }
    count
}

fn folder(root: &Path, dice: &mut Dice) -> PathBuf {
    root.join(format!("d{}", dice.below(FOLDERS)))
}

fn file(root: &Path, dice: &mut Dice) -> PathBuf {
    folder(root, dice).join(format!("f{}", dice.below(24)))
}

/// Cuts files that may be mapped at the moment, and fills them again.
fn cut(root: &Path, dice: &mut Dice) {
    let path = folder(root, dice).join(format!("large{}", dice.below(2)));
    let Ok(file) = OpenOptions::new().write(true).open(path) else { return };
    let _ = file.set_len(u64::try_from(dice.below(LARGE)).expect("small"));
    let _ = file.set_len(0);
    let _ = file.set_len(LARGE as u64);
}

/// Makes, removes and renames small files. What was removed by somebody else meanwhile is nobody's fault.
fn shuffle(root: &Path, dice: &mut Dice) {
    let path = file(root, dice);
    let _ = match dice.below(4) {
        0 | 1 => fs::write(path, vec![b'c'; dice.below(SMALL)]),
        2 => fs::remove_file(path),
        _ => fs::rename(path, file(root, dice)),
    };
}

/// Puts a link to a folder outside in the place of a folder, and takes it away again.
fn swap(root: &Path, outside: &Path, dice: &mut Dice) {
    let path = folder(root, dice);
    let aside = root.with_extension("aside");
    if fs::rename(&path, &aside).is_err() {
        return;
    }
    symlink(outside, &path).expect("the place is free");
    thread::yield_now();
    fs::remove_file(&path).expect("the link is there");
    fs::rename(&aside, &path).expect("the place is free again");
}

/// Writes at the end of a file without a pause: whoever reads it sees it change.
fn grow(file: &mut File) {
    let chunk = [b'g'; 4096];
    if file.metadata().is_ok_and(|metadata| metadata.len() > 2 * LARGE as u64) {
        let _ = file.set_len(LARGE as u64);
    }
    let _ = file.write_all(&chunk);
}

#[test]
fn churn_costs_no_verdict_and_no_daemon() {
    let lab = Lab::start();
    let mut agent = lab.agent();
    lab.import("eicar.yar", samples::EICAR_RULE).expect(0);
    let (root, outside) = (lab.folder("churn"), lab.folder("outside"));
    fs::write(outside.join("beyond.com"), samples::eicar()).unwrap();
    fs::create_dir(root.join("untouched")).unwrap();
    let marker = root.join("untouched/a.com");
    fs::write(&marker, samples::eicar()).unwrap();
    for n in 0..FOLDERS {
        let folder = root.join(format!("d{n}"));
        fs::create_dir(&folder).unwrap();
        for m in 0..2 {
            fs::write(folder.join(format!("large{m}")), vec![b'l'; LARGE]).unwrap();
        }
    }
    let growing = root.join("growing");
    fs::write(&growing, vec![b'g'; LARGE]).unwrap();
    let daemon = agent.pid();
    let duration = Duration::from_secs(if is_long() { 60 } else { 8 });
    let (stop, deeds) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut skipped: BTreeMap<String, u64> = BTreeMap::new();
    let mut rounds = 0;
    thread::scope(|scope| {
        let (root, outside, stop, deeds) = (&root, &outside, &stop, &deeds);
        let count = |n: u64| deeds.fetch_add(n, Ordering::Relaxed);
        scope.spawn(move || count(keep_on(stop, 1, |dice| cut(root, dice))));
        scope.spawn(move || count(keep_on(stop, 2, |dice| shuffle(root, dice))));
        scope.spawn(move || count(keep_on(stop, 3, |dice| swap(root, outside, dice))));
        let mut file = OpenOptions::new().append(true).open(&growing).unwrap();
        scope.spawn(move || count(keep_on(stop, 4, |_| grow(&mut file))));
        // A failure must not leave the others busy for ever.
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let started = Instant::now();
            while started.elapsed() < duration || rounds < 3 {
                lab.scan(&agent, root).expect(10);
                let task = lab.newest_task(&agent).unwrap();
                assert_eq!(task["state"], "done", "{task}");
                let result = &task["result"];
                for (reason, count) in result["skipped"].as_object().into_iter().flatten() {
                    *skipped.entry(reason.clone()).or_default() += count.as_u64().unwrap_or(0);
                }
                let found: Vec<Vec<u8>> =
                    lab.detections(&agent).iter().map(|d| path_and_member(d).0).collect();
                assert_eq!(found, [marker.as_os_str().as_bytes()], "round {rounds}: {result}");
                assert_eq!(agent.pid(), daemon);
                assert!(agent.is_running() && lab.is_connected(&agent), "round {rounds}");
                rounds += 1;
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
    });
    eprintln!("{rounds} scans, {} deeds, skipped {skipped:?}", deeds.load(Ordering::Relaxed));
    assert!(deeds.load(Ordering::Relaxed) > 100, "the control: something happened meanwhile");
    assert!(skipped.get("changed").is_some_and(|count| *count > 0), "what changed is counted: {skipped:?}");
    // When it is quiet, the same tree is looked at whole.
    lab.scan(&agent, &root).expect(10);
    let result = lab.newest_task(&agent).unwrap()["result"].clone();
    assert_eq!(result["skipped"].as_object().map_or(0, serde_json::Map::len), 0, "{result}");
    assert_eq!(agent.pid(), daemon);
}
