//! A user without rights who owns the folder exchanges names at full speed, while root works there.
//!
//! Two threads with the rights of `nobody` swap the folder for a link to a protected one, and the file for
//! links and for a file of their own; they also move away whatever the vault puts beside it. Delays are
//! injected into the vault's calls, to hold open every window that there is. The strangers never remove and
//! never replace anything, so that whatever is missing afterwards was lost by the vault.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    process::{Gid, Uid},
};
use tm_protocol::ids::Sha256;
use tm_tests::{Output, is_long, vault::Vault};

const NOBODY: u32 = 65534;

/// Where everything lies. Only `home` belongs to the strangers.
struct Ground {
    _folder: tempfile::TempDir,
    home: PathBuf,
    protected: PathBuf,
    vault: Vault,
}

impl Ground {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary folders work");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("root writes here");
        let protected = folder.path().join("protected");
        fs::create_dir(&protected).expect("root writes here");
        for name in ["f", "g"] {
            fs::write(protected.join(name), format!("protected {name}")).expect("root writes here");
        }
        let vault = Vault::new(&folder.path().join("state"));
        Self { home: folder.path().join("home"), protected, vault, _folder: folder }
    }

    /// `home/d` with the file `f` and a file `mine`.
    fn lay_out(&self, round: usize) -> [String; 2] {
        if self.home.exists() {
            fs::remove_dir_all(&self.home).expect("root writes here");
        }
        let d = self.home.join("d");
        fs::create_dir_all(&d).expect("root writes here");
        let texts = [format!("malware of round {round}"), format!("innocent of round {round}")];
        for (name, text) in ["f", "mine"].into_iter().zip(&texts) {
            fs::write(d.join(name), text).expect("root writes here");
            chown(d.join(name), Some(NOBODY), Some(NOBODY)).expect("root may give files away");
        }
        for folder in [&d, &self.home] {
            chown(folder, Some(NOBODY), Some(NOBODY)).expect("root may give files away");
        }
        texts
    }

    /// What must not change: every name, object, content and time in the protected folder, and its own times.
    fn protected_state(&self) -> Vec<(String, u64, u64, i64, i64, Vec<u8>)> {
        let mut state: Vec<_> = fs::read_dir(&self.protected)
            .expect("root reads here")
            .map(|entry| {
                let path = entry.expect("root reads here").path();
                let facts = fs::symlink_metadata(&path).expect("root reads here");
                let content =
                    if facts.is_file() { fs::read(&path).expect("root reads here") } else { vec![] };
                let name = path.display().to_string();
                (name, facts.ino(), facts.nlink(), facts.mtime_nsec(), facts.ctime_nsec(), content)
            })
            .collect();
        let own = fs::metadata(&self.protected).expect("root reads here");
        state.push((".".into(), own.ino(), 0, own.mtime_nsec(), own.ctime_nsec(), vec![]));
        state.sort();
        state
    }

    /// The contents of all files below `home`, however they are called by now.
    fn contents(&self) -> Vec<String> {
        let mut found = vec![];
        let mut open = vec![self.home.clone()];
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).expect("root reads here") {
                let path = entry.expect("root reads here").path();
                let facts = fs::symlink_metadata(&path).expect("root reads here");
                if facts.is_dir() {
                    open.push(path);
                } else if facts.is_file() {
                    found.push(fs::read_to_string(path).expect("root reads here"));
                }
            }
        }
        found
    }

    fn digests(&self) -> BTreeSet<String> {
        self.vault.items().into_iter().map(|item| item.sha256).collect()
    }
}

/// Tells the strangers when to work.
#[derive(Default)]
struct Whistle {
    work: AtomicBool,
    end: AtomicBool,
    resting: AtomicUsize,
    tricks: AtomicU64,
    /// How long at most everything stays as it is between two steps of a trick, in microseconds.
    calm: AtomicU64,
}

impl Whistle {
    fn work(&self) {
        // Without any calm, few runs of the vault come far enough to be tricked late.
        const CALM: [u64; 5] = [0, 100, 1000, 4000, 12_000];
        self.calm.store(CALM[usize::try_from(random() % 5).expect("it is small")], Ordering::SeqCst);
        self.work.store(true, Ordering::SeqCst);
    }

    /// Returns when all of them rest.
    fn rest(&self) {
        self.work.store(false, Ordering::SeqCst);
        while self.resting.load(Ordering::SeqCst) != 2 {
            thread::yield_now();
        }
    }

    /// For a while everything stays as it is: as it should be, or in the middle of a trick.
    fn wait(&self) {
        match self.calm.load(Ordering::SeqCst) {
            0 => thread::yield_now(),
            calm => thread::sleep(Duration::from_micros(random() % calm)),
        }
    }

    /// Runs tricks as `nobody` until the end.
    fn follow(&self, mut trick: impl FnMut(u64)) {
        become_nobody();
        let mut n = 0;
        self.resting.fetch_add(1, Ordering::SeqCst);
        while !self.end.load(Ordering::SeqCst) {
            if !self.work.load(Ordering::SeqCst) {
                thread::yield_now();
                continue;
            }
            self.resting.fetch_sub(1, Ordering::SeqCst);
            // Seen again, in case the whistle went in between.
            while self.work.load(Ordering::SeqCst) {
                trick(n);
                n += 1;
                self.wait();
                self.tricks.fetch_add(1, Ordering::Relaxed);
            }
            self.resting.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Credentials belong to a thread, as far as the kernel goes.
fn become_nobody() {
    rustix::thread::set_thread_groups(&[]).expect("root may become anybody");
    let (gid, uid) = (Gid::from_raw(NOBODY), Uid::from_raw(NOBODY));
    rustix::thread::set_thread_res_gid(gid, gid, gid).expect("root may become anybody");
    rustix::thread::set_thread_res_uid(uid, uid, uid).expect("root may become anybody");
    assert!(fs::write("/etc/nobody-was-here", b"").is_err(), "control: it has no rights");
}

/// Gives a new name, never over an existing one.
fn rename(from: &Path, to: &Path) {
    let _ = renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE);
}

/// Swaps the folder for a link.
fn swap_folder(home: &Path, protected: &Path, whistle: &Whistle) {
    let (d, away) = (home.join("d"), home.join("away"));
    rename(&d, &away);
    let _ = symlink(protected, &d);
    whistle.wait();
    // Only this thread ever makes a link of that name.
    if d.is_symlink() {
        let _ = fs::remove_file(&d);
    }
    rename(&away, &d);
}

/// Swaps the file for a link, a hard link and another file; and what the vault makes, for a link.
fn swap_names(home: &Path, protected: &Path, n: u64, whistle: &Whistle) {
    let d = home.join("d");
    let (f, mine, away) = (d.join("f"), d.join("mine"), d.join("f.away"));
    let trash = || d.join(format!("trash{n}-{}", random()));
    rename(&f, &away);
    match n % 4 {
        0 => drop(symlink(protected.join("f"), &f)),
        1 => drop(fs::hard_link(protected.join("f"), &f)),
        2 => rename(&mine, &f),
        _ => drop(symlink(protected.join("new"), &f)),
    }
    whistle.wait();
    if n % 4 == 2 {
        rename(&f, &mine);
    }
    if f.is_symlink() {
        rename(&f, &trash());
    }
    rename(&away, &f);
    for entry in fs::read_dir(&d).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if n % 8 == 5 && name.to_string_lossy().starts_with(".tm-") {
            rename(&entry.path(), &trash());
            let _ = symlink(protected, entry.path());
        }
    }
}

/// A number that is rarely the same twice.
fn random() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(88_172_645_463_325_252);
    let mut x = LAST.load(Ordering::Relaxed);
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    LAST.store(x, Ordering::Relaxed);
    x
}

/// One of the calls that change names is held up for long enough for a trick, and any other for a moment.
fn delays() -> Vec<String> {
    const LATE: [&str; 3] = ["unlinkat", "renameat2", "linkat"];
    const OTHER: [&str; 4] = ["openat2", "mkdirat", "openat", "fsync"];
    let pick = |calls: &[&'static str]| calls[usize::try_from(random()).unwrap_or(0) % calls.len()];
    let (late, other) = (pick(&LATE), pick(&OTHER));
    vec![
        format!("{late}:delay_enter={}", 1000 + random() % 6000),
        format!("{other}:delay_enter={}", random() % 1000),
    ]
}

/// What came of it, in few words.
fn came_of(output: &Output) -> &'static str {
    const SAID: [&str; 13] = [
        "was exchanged while it was opened",
        "was exchanged while it was taken",
        "is no longer the file",
        "somebody interferes in its folder",
        "changed while it was read",
        "as soon as it was put back",
        "already",
        "symbolic link",
        "no longer there",
        "is a folder",
        "another user",
        "the folder of",
        "cannot",
    ];
    if output.code() == 0 {
        return "done";
    }
    let err = output.err();
    let first = err.lines().find(|line| line.starts_with("error: ")).unwrap_or_default();
    SAID.into_iter().find(|said| first.contains(said)).unwrap_or("else")
}

#[test]
fn a_stranger_who_swaps_names_makes_root_touch_nothing_else() {
    let rounds = if is_long() { 500 } else { 60 };
    let ground = Ground::new();
    let before = ground.protected_state();
    ground.lay_out(0);
    let whistle = Whistle::default();
    let mut count = BTreeMap::new();
    thread::scope(|scope| {
        scope.spawn(|| whistle.follow(|_| swap_folder(&ground.home, &ground.protected, &whistle)));
        scope.spawn(|| whistle.follow(|n| swap_names(&ground.home, &ground.protected, n, &whistle)));
        whistle.rest();
        // Whatever goes wrong below, the strangers must come to an end.
        let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..rounds {
                one_round(&ground, &whistle, round, &mut count);
                assert_eq!(ground.protected_state(), before, "round {round}: what is protected was touched");
            }
        }));
        whistle.end.store(true, Ordering::SeqCst);
        if let Err(panic) = tried {
            std::panic::resume_unwind(panic);
        }
    });
    let tricks = whistle.tricks.load(Ordering::Relaxed);
    eprintln!("race: {rounds} rounds, {tricks} tricks, {count:?}, 0 hits");
    assert!(tricks > u64::try_from(rounds).unwrap() * 10, "control: the strangers were at work");
    for what in ["put: done", "restore: done"] {
        assert!(count.contains_key(what), "control: {what} happened: {count:?}");
    }
    let late = ["put: is no longer the file", "put: was exchanged while it was taken"];
    assert!(
        !is_long() || late.iter().any(|what| count.contains_key(*what)),
        "control: late tricks: {count:?}"
    );
}

fn one_round(ground: &Ground, whistle: &Whistle, round: usize, count: &mut BTreeMap<String, usize>) {
    let vault = &ground.vault;
    let texts = ground.lay_out(round);
    let of = |text: &String| Sha256::of(text.as_bytes()).to_string();
    let file = ground.home.join("d/f");
    let all_there = |when: &str, said: &str| {
        let (here, held) = (ground.contents(), ground.digests());
        for text in &texts {
            let copies =
                here.iter().filter(|found| *found == text).count() + usize::from(held.contains(&of(text)));
            // Where the file was exchanged at once the item stays, so that nothing hangs on whose it is now.
            let twice = said.contains("as soon as it was put back") && copies == 2;
            assert!(copies == 1 || twice, "round {round}, {when}: `{text}` is there {copies} times\n{said}");
        }
        let known: Vec<String> = texts.iter().map(of).collect();
        assert!(held.iter().all(|digest| known.contains(digest)), "round {round}: something else was taken");
    };

    whistle.work();
    let put = vault.line(&["put".as_ref(), file.as_os_str()]).inject(&delays());
    whistle.rest();
    let settled = vault.recover();
    all_there("after put", &format!("{}\n{settled}", put.both()));
    *count.entry(format!("put: {}", came_of(&put))).or_default() += 1;

    // In an ordinary place: what is restored must have been taken.
    if vault.items().is_empty() {
        ground.lay_out(round);
        vault.put(&file);
    }
    let id = vault.items()[0].id.clone();
    whistle.work();
    let restore = vault.line(&["restore", &id]).inject(&delays());
    whistle.rest();
    let settled = vault.recover();
    all_there("after restore", &format!("{}\n{settled}", restore.both()));
    *count.entry(format!("restore: {}", came_of(&restore))).or_default() += 1;
    for item in vault.items() {
        vault.run(&["purge", &item.id]).expect(0);
    }
}
