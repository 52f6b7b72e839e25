//! Finds the files under a path, by folder descriptors.
//!
//! `state` decides each step, `job` does it, `crew` leaves a step behind that does not return, `level` is a
//! folder on the way.
//!
//! **Invariant:** everything met is either handed over as an open file or named with the reason why not; only
//! what vanished in between is left out.
//! **Invariant:** no call blocks the caller: a path on which the system does not answer is named as `timeout`.

mod crew;
mod job;
mod level;
mod state;

use std::{
    os::fd::OwnedFd,
    sync::mpsc::{RecvTimeoutError, sync_channel},
    time::{Duration, Instant},
};

use tm_protocol::report::{PathBytes, SkipReason, Skipped};

use self::{
    crew::{Crew, Exhausted, Living},
    state::State,
};
use crate::platform::fs::Facts;

/// How often the walk is asked for what it found, and a cancel is noticed.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long paths are checked for before the walk; what takes longer is left to it.
const CHECK_TIME: Duration = Duration::from_secs(2);

/// What a walk comes upon.
#[derive(Debug)]
pub(crate) enum Found {
    /// A regular file, open.
    File {
        /// Where it lies.
        path: PathBytes,
        /// Opened for reading.
        file: OwnedFd,
        /// What was opened, as it was just before.
        facts: Facts,
    },
    /// Something that is not looked at.
    Skipped(Skipped),
}

/// Why a path cannot be scanned at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PathError {
    /// Nothing is there.
    #[error("`{0}` does not exist")]
    Missing(PathBytes),
    /// It is a link, or lies behind one.
    #[error("`{0}` is a symbolic link or lies behind one; name the real path")]
    Link(PathBytes),
}

/// How to walk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Go on into other file systems of this machine.
    pub(crate) all_local: bool,
    /// How long one call may take before it is left behind.
    pub(crate) patience: Duration,
}

/// Finds out whether all of `paths` can be walked: they exist, and no link is on the way. What may not be read,
/// or does not answer, is left to the walk, which names it.
///
/// # Errors
/// [`PathError`] of the first that cannot.
pub(crate) fn check(paths: &[PathBytes], cancelled: &dyn Fn() -> bool) -> Result<(), PathError> {
    let Some(living) = Living::new() else { return Ok(()) };
    let (sender, answer) = sync_channel(1);
    let paths = paths.to_vec();
    let checking = job::thread(move || {
        let checked = paths.iter().try_for_each(|path| job::check(&path.0));
        drop(living);
        // It fails only when nobody waits any more.
        let _ = sender.send(checked);
    });
    if checking.is_err() {
        return Ok(());
    }
    let started = Instant::now();
    while started.elapsed() < CHECK_TIME && !cancelled() {
        match answer.recv_timeout(LOOK_EVERY) {
            Ok(checked) => return checked,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(())
}

/// Walks `path` and hands everything to `visit`, until all is seen or `cancelled` says so. Returns the CPU time
/// that it took in threads of its own.
pub(crate) fn walk(
    path: &PathBytes,
    options: Options,
    cancelled: &dyn Fn() -> bool,
    visit: &mut dyn FnMut(Found),
) -> Duration {
    let (crew, started) = Crew::new(State::new(path.0.clone(), options.all_local));
    if let Err(Exhausted) = started {
        crew.give_up(SkipReason::Timeout);
    }
    let mut late = None;
    loop {
        let taken = crew.take(LOOK_EVERY);
        for found in taken.found {
            if cancelled() {
                return crew.cpu();
            }
            visit(found);
        }
        if taken.ended || cancelled() {
            return crew.cpu();
        }
        // A step is late when it was so at two looks: this process itself may have been stopped between.
        let step = taken.step.filter(|(_, age)| *age > options.patience).map(|(step, _)| step);
        if let Some(step) = step.filter(|step| late == Some(*step))
            && let Err(Exhausted) = crew.pass_over(step)
        {
            crew.give_up(SkipReason::Timeout);
        }
        late = step;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        fs::Permissions,
        os::unix::{
            ffi::OsStrExt,
            fs::{PermissionsExt, symlink},
            net::UnixListener,
        },
        path::Path,
    };

    use rustix::fs::{CWD, Mode, OFlags};

    use super::*;

    const OPTIONS: Options = Options { all_local: false, patience: Duration::from_secs(60) };

    fn bytes(path: &Path) -> PathBytes {
        PathBytes(path.as_os_str().as_bytes().to_vec())
    }

    /// Everything found under `path`: its name below it, and the reason if it was skipped. Sorted.
    fn seen(path: &Path) -> Vec<(Vec<u8>, Option<SkipReason>)> {
        let root = bytes(path);
        let mut seen = Vec::new();
        walk(&root, OPTIONS, &|| false, &mut |found| {
            let (path, reason) = match found {
                Found::File { path, .. } => (path, None),
                Found::Skipped(skipped) => (skipped.path, Some(skipped.reason)),
            };
            let below = path.0.strip_prefix(&root.0[..]).expect("below the root").to_vec();
            seen.push((below.strip_prefix(b"/").map_or(below.clone(), <[u8]>::to_vec), reason));
        });
        seen.sort();
        seen
    }

    #[test]
    fn all_kinds_of_things_are_handed_over_or_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir(root.join("sub")).unwrap();
        std::fs::write(root.join("sub/file"), b"x").unwrap();
        std::fs::write(root.join("empty"), b"").unwrap();
        rustix::fs::mkfifoat(CWD, root.join("fifo"), Mode::RUSR).unwrap();
        let _listener = UnixListener::bind(root.join("socket")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        symlink(".", root.join("loop")).unwrap();
        symlink("/etc", root.join("away")).unwrap();
        let odd: [&[u8]; 3] = [b"new\nline", b"esc\x1b[2J", b"not-utf8-\xff\xfe"];
        for name in odd {
            std::fs::write(root.join(OsStr::from_bytes(name)), b"x").unwrap();
        }

        let mut expected = vec![
            (b"sub/file".to_vec(), None),
            (b"empty".to_vec(), None),
            (b"fifo".to_vec(), Some(SkipReason::Special)),
            (b"socket".to_vec(), Some(SkipReason::Special)),
            (b"dangling".to_vec(), Some(SkipReason::Symlink)),
            (b"loop".to_vec(), Some(SkipReason::Symlink)),
            (b"away".to_vec(), Some(SkipReason::Symlink)),
        ];
        expected.extend(odd.map(|name| (name.to_vec(), None)));
        expected.sort();
        assert_eq!(seen(root), expected);
    }

    #[test]
    fn a_path_may_be_a_file_a_pseudo_file_system_or_a_device() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, b"x").unwrap();
        assert_eq!(seen(&file), [(vec![], None)]);
        assert_eq!(seen(Path::new("/proc")), [(vec![], Some(SkipReason::Pseudo))]);
        assert_eq!(seen(Path::new("/dev/null")), [(vec![], Some(SkipReason::Special))]);
    }

    #[test]
    fn paths_that_cannot_be_scanned_are_refused_before() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("real")).unwrap();
        std::fs::write(folder.path().join("real/file"), b"x").unwrap();
        symlink("real", folder.path().join("link")).unwrap();
        let path = |name: &str| bytes(&folder.path().join(name));
        for (name, expected) in [
            ("real", None),
            ("real/", None),
            ("real/..", None),
            ("real/file", None),
            ("none", Some(PathError::Missing(path("none")))),
            ("real/file/x", Some(PathError::Missing(path("real/file/x")))),
            ("link", Some(PathError::Link(path("link")))),
            ("link/file", Some(PathError::Link(path("link/file")))),
        ] {
            assert_eq!(check(&[path(name)], &|| false).err(), expected, "{name}");
        }
        assert_eq!(check(&[path("real"), path("none")], &|| false), Err(PathError::Missing(path("none"))));
        assert_eq!(check(&[PathBytes(vec![])], &|| false), Err(PathError::Missing(PathBytes(vec![]))));
    }

    /// Makes folders within folders, all called `name`, with a file in each that `with_file` names.
    fn nest(root: &Path, name: &str, depth: usize, with_file: impl Fn(usize) -> bool) {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let mut fd = rustix::fs::open(root, flags, Mode::empty()).unwrap();
        for depth in 1..=depth {
            rustix::fs::mkdirat(&fd, name, Mode::RWXU).unwrap();
            fd = rustix::fs::openat(&fd, name, flags, Mode::empty()).unwrap();
            if with_file(depth) {
                let flags = OFlags::CREATE | OFlags::WRONLY;
                rustix::fs::openat(&fd, "file", flags, Mode::RUSR).unwrap();
            }
        }
    }

    #[test]
    fn folders_are_followed_beyond_the_longest_path_with_few_descriptors() {
        let folder = tempfile::tempdir().unwrap();
        let name = "n".repeat(200);
        nest(folder.path(), &name, 1000, |_| true);
        let at = |depth: usize| format!("{}file", format!("{name}/").repeat(depth)).into_bytes();
        let mut expected: Vec<_> = (1..=1000).map(at).collect();
        expected.sort();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let (before, mut most) = (open(), 0);
        let mut found = Vec::new();
        let root = bytes(folder.path());
        walk(&root, OPTIONS, &|| false, &mut |item| match item {
            Found::File { path, .. } => {
                most = most.max(open());
                found.push(path.0[root.0.len() + 1..].to_vec());
            }
            Found::Skipped(skipped) => panic!("{skipped:?}"),
        });
        found.sort();
        assert!(found == expected, "{} of {} files", found.len(), expected.len());
        // Other tests of this program may have descriptors open meanwhile.
        assert!(most < before + 300, "{most} descriptors, {before} before");
    }

    #[test]
    fn a_path_beyond_all_measure_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let name = "n".repeat(255);
        let depth = state::LONGEST / 256 + 10;
        nest(folder.path(), &name, depth, |at| at == depth || at == 3);
        let found = seen(folder.path());
        assert_eq!(found.len(), 2);
        assert!(found.iter().any(|(path, reason)| path.ends_with(b"/file") && reason.is_none()));
        assert!(found.iter().any(|(path, reason)| path.len() > state::LONGEST - 600
            && *reason == Some(SkipReason::Limit)));
    }

    #[test]
    fn a_folder_of_many_entries_is_walked_whole() {
        let folder = tempfile::tempdir().unwrap();
        for n in 0..20_000 {
            std::fs::write(folder.path().join(format!("{n:05}")), b"").unwrap();
        }
        let expected: Vec<_> = (0..20_000).map(|n| (format!("{n:05}").into_bytes(), None)).collect();
        assert!(seen(folder.path()) == expected);
    }

    #[test]
    fn what_is_renamed_under_the_walk_is_seen_and_nothing_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: String| folder.path().join(name);
        for n in 0..2_000 {
            std::fs::write(at(format!("{n:05}")), b"").unwrap();
        }
        let inodes = || -> std::collections::BTreeSet<u64> {
            use std::os::unix::fs::DirEntryExt as _;
            std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().ino()).collect()
        };
        let (expected, mut met, mut times) = (inodes(), std::collections::BTreeSet::new(), 0);
        walk(&bytes(folder.path()), OPTIONS, &|| false, &mut |found| match found {
            Found::File { facts, .. } => {
                // Everything that is found gets one renamed that is not, and a new name is made.
                met.insert(facts.object().inode);
                let n = times % 2_000;
                times += 1;
                let _ = std::fs::rename(at(format!("{:05}", 1_999 - n)), at(format!("renamed-{times}")));
            }
            Found::Skipped(skipped) => assert_eq!(skipped.reason, SkipReason::Changed, "{skipped:?}"),
        });
        assert_eq!(inodes(), expected, "nothing was added or removed");
        assert_eq!(met, expected, "each was met");
        assert!(times <= 8_000, "{times} files were handed over");
    }

    #[test]
    fn a_folder_that_is_moved_under_the_walk_costs_nothing_around_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        // Deeper than folders are kept open, so that the way back leads through names that have changed.
        nest(&root, "d", 100, |_| true);
        for n in 0..50 {
            std::fs::write(root.join(format!("d/d/beside-{n}")), b"").unwrap();
        }
        let (mut files, mut changed, mut moved) = (0, 0, false);
        walk(&bytes(&root), OPTIONS, &|| false, &mut |found| match found {
            Found::File { path, .. } => {
                files += 1;
                if path.0.len() > root.as_os_str().len() + 150 && !moved {
                    moved = true;
                    let outer = root.join("d/".repeat(10));
                    std::fs::rename(outer, folder.path().join("elsewhere")).unwrap();
                }
            }
            Found::Skipped(skipped) => {
                assert_eq!(skipped.reason, SkipReason::Changed, "{skipped:?}");
                changed += 1;
            }
        });
        assert!(moved, "the walk came as deep as that");
        assert!(changed > 0, "it is named");
        // The folders above the one that was moved lose nothing.
        assert!(files >= 50 + 9 + 50, "{files}");
    }

    #[test]
    fn what_may_not_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::set_permissions(root, Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir(root.join("closed")).unwrap();
        std::fs::write(root.join("closed/inner"), b"x").unwrap();
        for name in ["open", "secret"] {
            std::fs::write(root.join(name), b"x").unwrap();
        }
        std::fs::set_permissions(root.join("open"), Permissions::from_mode(0o644)).unwrap();
        for name in ["secret", "closed"] {
            std::fs::set_permissions(root.join(name), Permissions::from_mode(0o000)).unwrap();
        }

        // Root reads everything, so the walk is done by a thread that is not root.
        let found = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    if rustix::process::geteuid().is_root() {
                        let nobody = rustix::thread::Uid::from_raw(65534);
                        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                    }
                    seen(root)
                })
                .join()
                .unwrap()
        });
        std::fs::set_permissions(root.join("closed"), Permissions::from_mode(0o700)).unwrap();
        assert_eq!(
            found,
            [
                (b"closed".to_vec(), Some(SkipReason::Unreadable)),
                (b"open".to_vec(), None),
                (b"secret".to_vec(), Some(SkipReason::Unreadable)),
            ]
        );
    }

    #[test]
    fn a_file_that_vanishes_is_left_out_and_one_that_is_swapped_is_named() {
        for (swap, expected) in [(false, vec![]), (true, vec![SkipReason::Symlink])] {
            let folder = tempfile::tempdir().unwrap();
            let at = |n: u32| folder.path().join(n.to_string());
            let files = 300;
            (0..files).for_each(|n| std::fs::write(at(n), b"x").unwrap());
            let mut reasons = std::collections::BTreeSet::new();
            let mut met = 0;
            walk(&bytes(folder.path()), OPTIONS, &|| false, &mut |found| match found {
                Found::File { .. } => {
                    met += 1;
                    // Long before the walk has come to the end of what it has listed.
                    for n in 0..files {
                        let _ = std::fs::remove_file(at(n));
                        if swap {
                            symlink("/etc/passwd", at(n)).unwrap();
                        }
                    }
                }
                Found::Skipped(skipped) => drop(reasons.insert(skipped.reason)),
            });
            assert!(met < files, "{met}");
            assert_eq!(reasons.into_iter().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn a_cancelled_walk_ends() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), b"x").unwrap();
        walk(&bytes(folder.path()), OPTIONS, &|| true, &mut |found| panic!("found {found:?}"));
    }
}
