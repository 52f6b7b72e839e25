//! Every call that changes files, failed or cut off, one after the other: nothing is lost, nothing is double,
//! and what was interrupted is settled.
//!
//! A run of each operation is traced once. Then it is run anew for each of its calls (the first, the second,
//! … the last of each name) and each fault: the process is killed there, or the call returns ENOSPC, EIO or
//! EDQUOT. An ordinary test run takes every few pairs, beginning elsewhere each time; `--long` takes all.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::fs::IFlags;
use tm_tests::{
    Output, is_long,
    strace::{Call, Fault, Line},
    vault::{Vault, names},
};

use super::{Whole, acl, mark, set_xattr};

const FAULTS: [Fault; 4] = [Fault::Kill, Fault::Error("ENOSPC"), Fault::Error("EIO"), Fault::Error("EDQUOT")];
/// Pairs of an operation in an ordinary run.
const ORDINARY: usize = 30;
const NOTHING_TO_DO: &str = "finished 0, undone 0, damaged 0";

/// What an operation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Aim {
    /// The file in the vault.
    Vaulted,
    /// The file in its place.
    Restored,
    /// A copy beside, and the item still there.
    Copied,
    /// Neither.
    Purged,
    /// Either, but not both.
    Settled,
    /// The same; until it is settled, the index does not know of the item.
    Found,
}

/// A place to work in, made anew for each pair.
struct Stage {
    _folder: tempfile::TempDir,
    vault: Vault,
    files: PathBuf,
    file: PathBuf,
    copy: PathBuf,
    /// What the file was.
    was: Whole,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary folders work");
        let vault = Vault::new(&folder.path().join("state"));
        let files = folder.path().join("files");
        fs::create_dir(&files).expect("root writes here");
        let (file, copy) = (files.join("file"), files.join("copy"));
        // More than one chunk, and something of everything.
        fs::write(&file, (0..40_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>())
            .expect("root writes here");
        std::os::unix::fs::chown(&file, Some(4321), Some(1234)).expect("root may give files away");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o750)).expect("root writes here");
        set_xattr(&file, "user.x", b"y");
        set_xattr(&file, "system.posix_acl_access", &acl());
        assert!(mark(&file, IFlags::IMMUTABLE, true), "control: the file system has marks");
        let was = Whole::of(&file).expect("it is there");
        Self { _folder: folder, vault, files, file, copy, was }
    }

    fn put(&self) -> Line {
        self.vault.line(&["put".as_ref(), self.file.as_os_str()])
    }

    fn restore(&self) -> Line {
        self.vault.line(&["restore", &self.the_item()])
    }

    fn restore_copy(&self) -> Line {
        let id = self.the_item();
        self.vault.line(&["restore".as_ref(), id.as_ref(), "--to".as_ref(), self.copy.as_os_str()])
    }

    fn purge(&self) -> Line {
        self.vault.line(&["purge", &self.the_item()])
    }

    fn recover(&self) -> Line {
        self.vault.line(&["recover"])
    }

    #[track_caller]
    fn the_item(&self) -> String {
        let items = self.vault.items();
        assert_eq!(items.len(), 1, "{items:?}");
        items[0].id.clone()
    }

    /// Runs `line` and has it killed at the `nth` call of that name.
    fn cut(&self, line: &Line, name: &str, nth: u32) {
        let call = Call { name: name.to_owned(), nth, line: String::new() };
        let output = line.run_with(&call, Fault::Kill);
        assert_eq!(output.code(), -1, "control: it was killed at {name} {nth}\n{}", output.both());
    }

    /// The file itself, whatever its marks: they come and go with the vault's work.
    fn is_in_place(&self) -> bool {
        Whole::of(&self.file).is_some_and(|now| {
            assert!(now.content == self.was.content, "what stands in its place is whole");
            true
        })
    }

    fn is_listed(&self) -> bool {
        let items = self.vault.items();
        assert!(items.len() <= 1, "{items:?}");
        !items.is_empty()
    }

    /// Nothing is lost, before anything is settled.
    #[track_caller]
    fn check_nothing_is_lost(&self, aim: Aim, output: &Output, fault: Fault, call: &Call) {
        let (in_place, listed) = (self.is_in_place(), self.is_listed());
        if aim != Aim::Purged {
            let kept = listed || (aim == Aim::Found && self.vault.files().len() == 1);
            assert!(in_place || kept, "the file is lost\n{}", output.both());
        }
        match fault {
            Fault::Kill => assert_eq!(output.code(), -1, "control: it was killed\n{}", output.both()),
            Fault::Error(_) if output.code() == 0 => {
                let reached = match aim {
                    Aim::Vaulted => !in_place && listed,
                    Aim::Restored => in_place,
                    Aim::Copied => self.copy.exists() && listed,
                    Aim::Purged => !listed,
                    Aim::Settled | Aim::Found => in_place != listed,
                };
                assert!(reached, "it says that it is done\n{}", output.both());
            }
            Fault::Error(_) if call.name == "write" => {}
            Fault::Error(_) => {
                let said = output.err().contains("error: ") || output.err().contains("note: ");
                assert!(said && output.code() == 1, "it says what is wrong\n{}", output.both());
            }
        }
    }

    /// After `recover`: exactly one of file and item, and nothing besides.
    #[track_caller]
    fn check_settled(&self, aim: Aim) {
        let settled = self.vault.recover();
        assert_eq!(self.vault.recover(), NOTHING_TO_DO, "after {settled}");
        let (in_place, listed) = (self.is_in_place(), self.is_listed());
        match aim {
            Aim::Purged => assert!(!in_place),
            Aim::Vaulted | Aim::Restored | Aim::Copied | Aim::Settled | Aim::Found => {
                assert!(in_place != listed, "{settled}: in place {in_place}, in the vault {listed}");
            }
        }
        for path in [&self.file, &self.copy] {
            if let Some(now) = Whole::of(path) {
                assert!(now == self.was, "{settled}: {} is not what it was", path.display());
            }
        }
        let expected: Vec<&str> =
            ["copy", "file"].into_iter().filter(|n| self.files.join(n).exists()).collect();
        assert_eq!(names(&self.files), expected, "nothing is left beside the file");
        let ids: Vec<String> = self.vault.items().into_iter().map(|item| item.id).collect();
        assert_eq!(self.vault.files(), ids, "nothing is left in the vault");
        let left: Vec<String> = names(&self.vault.state.join("vault"));
        assert!(left.iter().all(|name| ["index", "items", "key", "lock"].contains(&&**name)), "{left:?}");
    }

    /// What was asked for succeeds now, and the file comes back whole.
    #[track_caller]
    fn check_goes_on(&self, aim: Aim) {
        match aim {
            Aim::Vaulted if self.is_in_place() => drop(self.put().run().expect(0)),
            Aim::Purged if self.is_listed() => drop(self.purge().run().expect(0)),
            Aim::Copied => {
                self.remove(&self.copy);
                self.restore_copy().run().expect(0);
                assert!(Whole::of(&self.copy).expect("it is there") == self.was, "the copy is whole");
            }
            Aim::Vaulted | Aim::Purged | Aim::Restored | Aim::Settled | Aim::Found => {}
        }
        if aim == Aim::Purged {
            assert!(!self.is_listed() && self.vault.files().is_empty());
            return;
        }
        if self.is_listed() {
            self.restore().run().expect(0);
        }
        assert!(Whole::of(&self.file).expect("it is there") == self.was, "the file is what it was");
        assert!(!self.is_listed() && self.vault.files().is_empty());
    }

    fn remove(&self, path: &PathBuf) {
        if path.exists() {
            mark(path, IFlags::IMMUTABLE, false);
            fs::remove_file(path).expect("root writes here");
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.remove(&self.file);
        self.remove(&self.copy);
        // Also what a failing test left in between.
        for name in fs::read_dir(&self.files).into_iter().flatten().flatten() {
            let inside = name.path().join("item");
            if inside.exists() {
                self.remove(&inside);
            }
        }
    }
}

/// Sweeps one operation. `prepare` brings a stage to where it begins and says the command.
fn sweep(name: &str, aim: Aim, nameless: bool, prepare: fn(&Stage) -> Line) {
    let stage = Stage::new();
    let mut rules = vec![];
    let mut line = prepare(&stage);
    let trace = |stage: &Stage, line: &Line| {
        line.trace(stage.vault.state.to_str().expect("temporary folders have plain names"))
    };
    let (mut calls, output) = trace(&stage, &line);
    output.expect(0);
    if !nameless {
        // A file system without nameless files, made of one that has them.
        let call = calls.iter().find(|call| call.line.contains("O_TMPFILE")).expect("control: it uses one");
        rules = vec![format!("{}:error=EOPNOTSUPP:when={}", call.name, call.nth)];
        let stage = Stage::new();
        line = prepare(&stage);
        line.rules.clone_from(&rules);
        let (other, output) = trace(&stage, &line);
        output.expect(0);
        assert!(other.iter().any(|call| call.line.contains("O_EXCL")), "control: it takes the other way");
        calls = other;
        calls.retain(|call| !rules[0].starts_with(&call.name));
    }
    drop(stage);
    let pairs: Vec<(&Call, Fault)> =
        calls.iter().flat_map(|call| FAULTS.map(|fault| (call, fault))).collect();
    let (step, first) = if is_long() {
        (1, 0)
    } else {
        let step = pairs.len().div_ceil(ORDINARY);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        (step, usize::try_from(now).expect("64 bits") % step)
    };
    let chosen: Vec<&(&Call, Fault)> = pairs.iter().skip(first).step_by(step).collect();
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(vec![]);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((call, fault)) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let tried =
                        catch_unwind(AssertUnwindSafe(|| try_pair(aim, &rules, prepare, call, *fault)));
                    if let Err(panic) = tried {
                        let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                        failed
                            .lock()
                            .expect("nobody panics with it")
                            .push(format!("{fault:?} at {} {}: {text}", call.nth, call.line));
                    }
                }
            });
        }
    });
    let mut kinds = BTreeMap::new();
    calls.iter().for_each(|call| *kinds.entry(&call.name).or_insert(0) += 1);
    let failed = failed.into_inner().expect("nobody panics with it");
    eprintln!(
        "sweep {name}: {} calls {kinds:?}, {} of {} pairs tried (from {first}, every {step}), {} failures",
        calls.len(),
        chosen.len(),
        pairs.len(),
        failed.len()
    );
    assert!(failed.is_empty(), "{name}: {} failures\n{}", failed.len(), failed.join("\n\n"));
}

fn try_pair(aim: Aim, rules: &[String], prepare: fn(&Stage) -> Line, call: &Call, fault: Fault) {
    let stage = Stage::new();
    let mut line = prepare(&stage);
    line.rules = rules.to_vec();
    let output = line.run_with(call, fault);
    stage.check_nothing_is_lost(aim, &output, fault, call);
    stage.check_settled(aim);
    stage.check_goes_on(aim);
}

fn vaulted(stage: &Stage) {
    stage.put().run().expect(0);
}

#[test]
fn put() {
    sweep("put", Aim::Vaulted, true, Stage::put);
}

#[test]
fn put_where_files_have_names() {
    sweep("put, no nameless files", Aim::Vaulted, false, Stage::put);
}

#[test]
fn restore() {
    sweep("restore", Aim::Restored, true, |stage| {
        vaulted(stage);
        stage.restore()
    });
}

#[test]
fn restore_where_files_have_names() {
    sweep("restore, no nameless files", Aim::Restored, false, |stage| {
        vaulted(stage);
        stage.restore()
    });
}

#[test]
fn restore_elsewhere() {
    sweep("restore --to", Aim::Copied, true, |stage| {
        vaulted(stage);
        stage.restore_copy()
    });
}

#[test]
fn restore_elsewhere_where_files_have_names() {
    sweep("restore --to, no nameless files", Aim::Copied, false, |stage| {
        vaulted(stage);
        stage.restore_copy()
    });
}

#[test]
fn recover_a_put_that_was_cut_before_the_file_was_moved() {
    sweep("recover (put cut before the move)", Aim::Settled, true, |stage| {
        stage.cut(&stage.put(), "renameat2", 1);
        assert!(stage.is_in_place() && names(&stage.files).len() == 2, "control");
        stage.recover()
    });
}

#[test]
fn recover_a_put_that_was_cut_while_the_file_was_in_between() {
    sweep("recover (put cut in between)", Aim::Settled, true, |stage| {
        stage.cut(&stage.put(), "unlinkat", 1);
        assert!(!stage.is_in_place() && names(&stage.files).len() == 1, "control");
        stage.recover()
    });
}

#[test]
fn recover_a_put_that_was_never_noted() {
    sweep("recover (put cut before its record)", Aim::Settled, true, |stage| {
        stage.cut(&stage.put(), "pwrite64", 1);
        assert!(stage.is_in_place() && !stage.is_listed() && stage.vault.files().len() == 1, "control");
        stage.recover()
    });
}

#[test]
fn recover_a_restore_that_was_cut_after_the_file_appeared() {
    sweep("recover (restore cut after the link)", Aim::Settled, true, |stage| {
        vaulted(stage);
        stage.cut(&stage.restore(), "pwrite64", 2);
        assert!(stage.is_in_place() && stage.is_listed(), "control");
        stage.recover()
    });
}

#[test]
fn recover_a_damaged_index() {
    sweep("recover (damaged index)", Aim::Found, true, |stage| {
        vaulted(stage);
        let index = stage.vault.state.join("vault/index");
        let mut bytes = fs::read(&index).unwrap();
        bytes[20] ^= 1;
        fs::write(&index, bytes).unwrap();
        assert!(!stage.is_listed(), "control: its record is gone");
        stage.recover()
    });
}

#[test]
fn purge() {
    sweep("purge", Aim::Purged, true, |stage| {
        vaulted(stage);
        stage.purge()
    });
}
