//! Takes detected files away: looks at each again, decides, has the vault take it, and looks once more.
//!
//! Whoever calls has looked the detections up among those that this agent itself noted; an order names them by
//! key and cannot name a path.
//!
//! **Invariant:** every detection of an order ends in exactly one item, or counts as left.
//! **Invariant:** an item is `vaulted` only after its path was seen to hold no file; if it holds one again, the
//! caller scans that first ([`Again`]).
//! **Invariant:** the file that is judged here is named to the vault as object, digest and size; the vault
//! checks all three on what it takes.

mod decide;
pub(crate) mod keep;
mod look;
mod target;

use std::{collections::HashSet, path::Path};

use tm_protocol::{
    ids::{Sha256, TaskId},
    report::{Detection, Failure, ItemReport, ItemVerdict, PathBytes, Tally, VaultEntry},
};

pub(crate) use self::look::stands_again;
use crate::{
    cleanup::{
        decide::{Decision, Owned, Seen},
        keep::{Judged, Keep, NotKept},
        look::Stopped,
        target::Target,
    },
    platform::{
        critical::Critical,
        fs::Object,
        packages::{self, Owners, Packages},
    },
};

/// A detection as the agent noted it.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// [`Detection::key`].
    pub(crate) key: Sha256,
    /// What was found where.
    pub(crate) detection: Detection,
    /// The object on disk it was found in; `None` if that is not known, or means nothing since the machine was
    /// started again (device numbers may differ).
    pub(crate) object: Option<Object>,
}

/// What to take away.
#[derive(Debug)]
pub(crate) struct Order {
    /// The task; what it took already is not taken again.
    pub(crate) task: TaskId,
    /// Detections of this agent, oldest first.
    pub(crate) found: Vec<Found>,
    /// Keys that stand in the order and were never noted here.
    pub(crate) unknown: Vec<Sha256>,
    /// Say what would be done and change nothing.
    pub(crate) dry_run: bool,
}

/// What has to be known of the endpoint. Made anew for each cleanup, as programs come and go.
#[derive(Debug)]
pub(crate) struct Host {
    critical: Critical,
    packages: Packages,
}

impl Host {
    /// This machine, with our data in `state`. Blocks for some milliseconds.
    pub(crate) fn survey(state: &Path) -> Self {
        Self { critical: Critical::survey(state), packages: Packages::of_this_system() }
    }
}

/// How far it came.
#[derive(Debug)]
pub(crate) struct Done {
    /// The items told so far, and what is left. Those of `again` are in neither.
    pub(crate) tally: Tally,
    /// Items that are not told yet: a file stands at their path again. To be scanned, settled with
    /// [`Again::settle`], counted and told.
    pub(crate) again: Vec<Again>,
}

/// An item whose file was taken, and at whose path a file stands again.
#[derive(Debug)]
pub(crate) struct Again {
    /// What to scan.
    pub(crate) path: PathBytes,
    items: Vec<ItemReport>,
}

/// What a scan of that file came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SecondLook {
    /// Nothing is there any more.
    Gone,
    /// It was looked at whole, and nothing matched.
    Clean,
    /// Something matched.
    Matched,
    /// It was not looked at whole.
    Unknown,
}

impl Again {
    /// The items to tell. They are one file's, so only the first of them is to be counted.
    pub(crate) fn settle(self, look: SecondLook) -> Vec<ItemReport> {
        let failure = match look {
            SecondLook::Gone | SecondLook::Clean => return self.items,
            SecondLook::Matched => Failure::new(
                "came-back",
                "the file was taken, and one in which the same is detected stands there again: something puts \
                 it back",
            ),
            SecondLook::Unknown => Failure::new(
                "not-verified",
                "the file was taken; another stands there now, and it could not be looked at whole",
            ),
        };
        let settle = |mut item: ItemReport| {
            item.verdict = ItemVerdict::Failed;
            item.failure = Some(failure.clone());
            item
        };
        self.items.into_iter().map(settle).collect()
    }
}

/// Carries out `order`: each item is told to `tell` as soon as it is settled. Once `stop` says so no further
/// file is begun. Blocks; the longest part is the reading of files.
pub(crate) fn run(
    order: Order,
    vault: &mut dyn Keep,
    host: &Host,
    tell: &mut dyn FnMut(ItemReport),
    stop: &dyn Fn() -> bool,
) -> Done {
    let mut done = Done { tally: Tally { dry_run: order.dry_run, ..Tally::default() }, again: Vec::new() };
    for key in order.unknown {
        let item = never_detected(key);
        done.tally.count(&item);
        tell(item);
    }
    let targets = target::group(order.found);
    let paths: Vec<PathBytes> = targets.iter().map(|target| target.path.clone()).collect();
    let owners = host.packages.look_up(&paths).map_err(|error| chain(&error));
    let mut cleanup =
        Cleanup { task: order.task, dry_run: order.dry_run, vault, host, owners, would_go: HashSet::new() };
    let count = targets.len();
    for (at, target) in targets.into_iter().enumerate() {
        let treated = if stop() { Err(Stopped) } else { cleanup.treat(&target, stop) };
        let Ok(treated) = treated else {
            done.tally.left = u32::try_from(count - at).unwrap_or(u32::MAX);
            break;
        };
        let taken = treated.verdict == ItemVerdict::Vaulted;
        let items = reports(&target, treated);
        if taken && stands_again(&target.path) {
            done.again.push(Again { path: target.path, items });
            continue;
        }
        if let Some(first) = items.first() {
            done.tally.count(first);
        }
        items.into_iter().for_each(&mut *tell);
    }
    done
}

fn never_detected(key: Sha256) -> ItemReport {
    ItemReport {
        detections: vec![key],
        vault: None,
        path: PathBytes(vec![]),
        sha256: None,
        size: 0,
        verdict: ItemVerdict::Refused,
        failure: Some(Failure::new("not-detected-here", "this agent has not noted such a detection")),
        notes: vec![],
    }
}

/// What came of a target.
struct Treated {
    verdict: ItemVerdict,
    vault: Option<VaultEntry>,
    failure: Option<Failure>,
    notes: Vec<Failure>,
}

impl Treated {
    fn new(verdict: ItemVerdict) -> Self {
        Self { verdict, vault: None, failure: None, notes: vec![] }
    }

    fn refused(failure: Failure, notes: Vec<Failure>) -> Self {
        Self { failure: Some(failure), notes, ..Self::new(ItemVerdict::Refused) }
    }

    fn failed(failure: Failure) -> Self {
        Self { failure: Some(failure), ..Self::new(ItemVerdict::Failed) }
    }

    fn not_kept(NotKept { failure, is_refusal }: NotKept) -> Self {
        match failure.code.as_str() {
            "gone" => Self::new(ItemVerdict::Gone),
            _ if is_refusal => Self::refused(failure, vec![]),
            _ => Self::failed(failure),
        }
    }
}

/// An item, in as many reports as its detections need.
fn reports(target: &Target, treated: Treated) -> Vec<ItemReport> {
    let report = |keys: &[Sha256]| ItemReport {
        detections: keys.to_vec(),
        vault: treated.vault.as_ref().map(|entry| entry.id),
        path: target.path.clone(),
        sha256: Some(target.sha256),
        size: target.size,
        verdict: treated.verdict,
        failure: treated.failure.clone(),
        notes: treated.notes.clone(),
    };
    target.keys.chunks(ItemReport::MAX_DETECTIONS).map(report).collect()
}

struct Cleanup<'a> {
    task: TaskId,
    dry_run: bool,
    vault: &'a mut dyn Keep,
    host: &'a Host,
    owners: Result<Owners, String>,
    /// What a dry run would have taken so far.
    would_go: HashSet<PathBytes>,
}

impl Cleanup<'_> {
    fn treat(&mut self, target: &Target, stop: &dyn Fn() -> bool) -> Result<Treated, Stopped> {
        let owners = self.owners.as_ref().map(|owners| owners.get(&target.path));
        let owned = match &owners {
            Ok(owners) => Owned::By(owners.map(Vec::as_slice).unwrap_or_default()),
            Err(why) => Owned::Unknown(why),
        };
        if self.would_go.contains(&target.path) {
            return Ok(Treated::new(ItemVerdict::Gone));
        }
        let taken = self.vault.find(self.task, &target.path).filter(|entry| entry.sha256 == target.sha256);
        if let Some(entry) = taken {
            let notes = decide::notes_on_taken(target, owned);
            return Ok(Treated { vault: Some(entry), notes, ..Treated::new(ItemVerdict::Vaulted) });
        }
        let seen = look::look(target, owned, stop)?;
        let role = match &seen {
            Seen::File(file) => {
                let path = packages::normal(&target.path.0);
                self.host.critical.role(path.as_ref().unwrap_or(&target.path.0), file.object)
            }
            Seen::Gone | Seen::Other(_) | Seen::Closed(_) => None,
        };
        Ok(match decide::decide(target, &seen, role, owned) {
            Decision::Gone => Treated::new(ItemVerdict::Gone),
            Decision::Refuse(failure, notes) => Treated::refused(failure, notes),
            Decision::Fail(failure) => Treated::failed(failure),
            Decision::Take(object, notes) => self.take(target, object, notes),
        })
    }

    fn take(&mut self, target: &Target, object: Object, mut notes: Vec<Failure>) -> Treated {
        let judged = Judged { object, sha256: target.sha256, size: target.size };
        if self.dry_run {
            return match self.vault.check(&target.path, &judged) {
                Ok(()) => {
                    self.would_go.insert(target.path.clone());
                    Treated { notes, ..Treated::new(ItemVerdict::WouldVault) }
                }
                Err(error) => Treated::not_kept(error),
            };
        }
        match self.vault.put(&target.path, &judged, self.task) {
            Ok(kept) => {
                // The vault has counted later than we.
                notes.retain(|note| note.code != "other-links");
                if kept.other_links > 0 {
                    notes.push(decide::other_links_note(kept.other_links));
                }
                notes.extend(kept.notes.into_iter().filter(|note| note.code != "other-links"));
                notes.truncate(ItemReport::MAX_NOTES);
                Treated { vault: Some(kept.entry), notes, ..Treated::new(ItemVerdict::Vaulted) }
            }
            Err(error) => Treated::not_kept(error),
        }
    }
}

/// The error and its causes, joined by colons.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        fs,
        os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _, fs::symlink},
        path::PathBuf,
    };

    use tm_protocol::ids::VaultId;
    use uuid::Uuid;

    use super::*;
    use crate::cleanup::keep::Kept;

    const TASK: TaskId = TaskId::new(Uuid::from_u128(7));

    /// A vault that moves files into a folder. It checks what it is told to take, as the real one does.
    struct Shelf {
        folder: PathBuf,
        held: Vec<(TaskId, VaultEntry)>,
        /// What happens right after a file was taken.
        then: Box<dyn Fn(&Path)>,
        refuses: Option<NotKept>,
    }

    impl Keep for Shelf {
        fn put(&mut self, path: &PathBytes, judged: &Judged, task: TaskId) -> Result<Kept, NotKept> {
            self.check(path, judged)?;
            let id = VaultId::new(Uuid::from_u128(self.held.len() as u128));
            let other_links = fs::symlink_metadata(on_disk(path)).unwrap().nlink() - 1;
            fs::rename(on_disk(path), self.folder.join(id.to_string())).unwrap();
            let Judged { sha256, size, .. } = *judged;
            let entry = VaultEntry { id, path: path.clone(), sha256, size, vaulted_ms: 0 };
            self.held.push((task, entry.clone()));
            (self.then)(&on_disk(path));
            Ok(Kept { entry, other_links, notes: vec![] })
        }

        fn check(&self, path: &PathBytes, judged: &Judged) -> Result<(), NotKept> {
            let facts = fs::symlink_metadata(on_disk(path)).unwrap();
            assert_eq!(judged.object, Object { device: facts.dev(), inode: facts.ino() });
            assert_eq!(judged.sha256, Sha256::of(&fs::read(on_disk(path)).unwrap()));
            assert_eq!(judged.size, facts.len());
            self.refuses.clone().map_or(Ok(()), Err)
        }

        fn find(&self, task: TaskId, path: &PathBytes) -> Option<VaultEntry> {
            let held = self.held.iter().find(|(by, entry)| *by == task && entry.path == *path);
            held.map(|(_, entry)| entry.clone())
        }
    }

    fn on_disk(path: &PathBytes) -> PathBuf {
        PathBuf::from(std::ffi::OsStr::from_bytes(&path.0))
    }

    /// A system with a shell, one package and a vault.
    struct Lab {
        _folder: tempfile::TempDir,
        root: PathBuf,
        host: Host,
        vault: Shelf,
        told: Vec<ItemReport>,
    }

    impl Lab {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let root = fs::canonicalize(folder.path()).unwrap();
            for name in ["usr/bin", "dpkg/info", "shelf", "state", "home"] {
                fs::create_dir_all(root.join(name)).unwrap();
            }
            fs::write(root.join("usr/bin/sh"), "shell").unwrap();
            fs::write(root.join("dpkg/info/tools.list"), "/usr/bin/tool\n/usr/bin/sh\n").unwrap();
            // MD5 of "tool".
            let sums = "39ab32c5aeb56c9f5ae17f073ce31023  usr/bin/tool\n";
            fs::write(root.join("dpkg/info/tools.md5sums"), sums).unwrap();
            let host = Host {
                critical: Critical::survey_at(&root, &root.join("state")),
                packages: Packages::of_dpkg(&root, &root.join("dpkg")),
            };
            let (held, shelf) = (vec![], root.join("shelf"));
            let vault = Shelf { folder: shelf, held, then: Box::new(|_| {}), refuses: None };
            Self { _folder: folder, root, host, vault, told: vec![] }
        }

        /// Writes a file and detects it.
        fn detect(&self, name: &str, content: &str) -> Found {
            let path = self.root.join(name);
            fs::write(&path, content).unwrap();
            self.detect_as(name, content, "rule")
        }

        /// Detects a file that is there.
        fn detect_as(&self, name: &str, content: &str, rule: &str) -> Found {
            let path = self.root.join(name);
            let facts = fs::symlink_metadata(&path).unwrap();
            let detection = Detection {
                path: PathBytes(path.as_os_str().as_bytes().to_vec()),
                member: vec![],
                pattern: Sha256::of(b"pattern"),
                rule: rule.to_owned(),
                sha256: Sha256::of(content.as_bytes()),
                size: content.len() as u64,
            };
            let object = Some(Object { device: facts.dev(), inode: facts.ino() });
            Found { key: detection.key(), detection, object }
        }

        fn run(&mut self, found: Vec<Found>) -> Done {
            self.order(Order { task: TASK, found, unknown: vec![], dry_run: false }, &|| false)
        }

        fn dry_run(&mut self, found: Vec<Found>) -> Done {
            self.order(Order { task: TASK, found, unknown: vec![], dry_run: true }, &|| false)
        }

        fn order(&mut self, order: Order, stop: &dyn Fn() -> bool) -> Done {
            self.told.clear();
            run(order, &mut self.vault, &self.host, &mut |item| self.told.push(item), stop)
        }

        /// The items told, as `name verdict code note…`.
        fn told(&self) -> Vec<String> {
            self.told.iter().map(|item| line(&self.root, item)).collect()
        }

        fn is_there(&self, name: &str) -> bool {
            self.root.join(name).symlink_metadata().is_ok()
        }
    }

    /// A file's name, what happens to it, and what a cleanup then says of it.
    type Tampering<'a> = (&'a str, &'a dyn Fn(&Path), &'a str);

    fn line(root: &Path, item: &ItemReport) -> String {
        let path = on_disk(&item.path);
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        let codes = item.failure.iter().chain(&item.notes).map(|failure| failure.code.clone());
        let words = [name, item.verdict.to_string()].into_iter().chain(codes);
        words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_detected_file_is_vaulted_and_every_detection_of_it_settled_once() {
        let mut lab = Lab::new();
        let a = lab.detect("home/a", "bad");
        let again = lab.detect_as("home/a", "bad", "other rule");
        let mut inside = lab.detect_as("home/a", "bad", "third");
        inside.detection.member = vec![PathBytes(b"inner".to_vec())];
        inside.key = inside.detection.key();
        let keys = [inside.key, again.key, a.key];
        let done = lab.run(vec![a.clone(), again, inside, a]);
        assert_eq!(lab.told(), ["home/a vaulted container"]);
        assert_eq!(done.tally, Tally { done: 1, bytes: 3, ..Tally::default() });
        assert!(done.again.is_empty() && !lab.is_there("home/a"));
        let mut settled = lab.told[0].detections.clone();
        settled.sort();
        let mut expected = keys.to_vec();
        expected.sort();
        assert_eq!(settled, expected);
        assert_eq!(lab.told[0].vault, Some(lab.vault.held[0].1.id));
        assert_eq!(
            fs::read(lab.root.join("shelf").join(lab.vault.held[0].1.id.to_string())).unwrap(),
            b"bad"
        );
    }

    #[test]
    fn what_must_stay_stays() {
        let mut lab = Lab::new();
        let shell = lab.detect("usr/bin/sh", "shell");
        let tool = lab.detect("usr/bin/tool", "tool");
        fs::hard_link(lab.root.join("usr/bin/sh"), lab.root.join("home/sh")).unwrap();
        let link = lab.detect_as("home/sh", "shell", "rule");
        let state = lab.detect("state/lock", "x");
        let done = lab.run(vec![state, link, tool, shell]);
        assert_eq!(
            lab.told(),
            [
                "usr/bin/sh refused critical-file package",
                "usr/bin/tool refused likely-false-positive",
                "home/sh refused critical-file",
                "state/lock refused critical-file",
            ]
        );
        assert_eq!(done.tally, Tally { refused: 4, ..Tally::default() });
        for name in ["usr/bin/sh", "usr/bin/tool", "home/sh", "state/lock"] {
            assert!(lab.is_there(name), "{name}");
        }
        // The control: the same tool with another content is taken, and its package is named.
        let tool = lab.detect("usr/bin/tool", "evil");
        lab.run(vec![tool]);
        assert_eq!(lab.told(), ["usr/bin/tool vaulted reinstall"]);
        assert!(lab.told[0].notes[0].message.ends_with("apt-get install --reinstall tools"));
    }

    #[test]
    fn a_file_that_is_not_the_detected_one_is_left_alone() {
        let mut lab = Lab::new();
        let tamper: [Tampering; 8] = [
            ("gone", &|path| fs::remove_file(path).unwrap(), "gone"),
            ("longer", &|path| fs::write(path, "bad and more").unwrap(), "refused changed"),
            ("shorter", &|path| fs::write(path, "").unwrap(), "refused changed"),
            ("other", &|path| fs::write(path, "BAD").unwrap(), "refused changed"),
            (
                "copy",
                &|path| {
                    fs::write(path.with_extension("new"), "bad").unwrap();
                    fs::rename(path.with_extension("new"), path).unwrap();
                },
                "refused changed",
            ),
            (
                "link",
                &|path| {
                    fs::rename(path, path.with_extension("kept")).unwrap();
                    symlink(path.with_extension("kept"), path).unwrap();
                },
                "refused changed",
            ),
            (
                "folder",
                &|path| {
                    fs::remove_file(path).unwrap();
                    fs::create_dir(path).unwrap();
                },
                "refused changed",
            ),
            (
                "fifo",
                &|path| {
                    fs::remove_file(path).unwrap();
                    let kind = rustix::fs::FileType::Fifo;
                    rustix::fs::mknodat(rustix::fs::CWD, path, kind, 0o600.into(), 0).unwrap();
                },
                "refused changed",
            ),
        ];
        let found = tamper.iter().map(|(name, ..)| lab.detect(&format!("home/{name}"), "bad")).collect();
        tamper.iter().for_each(|(name, change, _)| change(&lab.root.join("home").join(name)));
        let done = lab.run(found);
        let expected: Vec<String> =
            tamper.iter().rev().map(|(name, _, end)| format!("home/{name} {end}")).collect();
        assert_eq!(lab.told(), expected);
        assert_eq!(done.tally, Tally { gone: 1, refused: 7, ..Tally::default() });
        assert!(lab.vault.held.is_empty());
    }

    #[test]
    fn a_folder_that_became_a_link_leads_nowhere() {
        let mut lab = Lab::new();
        fs::create_dir(lab.root.join("home/sub")).unwrap();
        let found = lab.detect("home/sub/tool", "bad");
        fs::rename(lab.root.join("home/sub"), lab.root.join("home/moved")).unwrap();
        symlink(lab.root.join("home/moved"), lab.root.join("home/sub")).unwrap();
        lab.run(vec![found]);
        assert_eq!(lab.told(), ["home/sub/tool refused changed"]);
        assert!(lab.is_there("home/moved/tool"));
    }

    #[test]
    fn after_a_reboot_the_digest_alone_tells() {
        let mut lab = Lab::new();
        let mut same = lab.detect("home/same", "bad");
        same.object = None;
        let mut other = lab.detect("home/other", "bad");
        other.object = None;
        fs::write(lab.root.join("home/other"), "BAD").unwrap();
        let mut moved = lab.detect("home/moved", "bad");
        moved.object = Some(Object { device: 0, inode: 0 });
        lab.run(vec![moved, other, same]);
        assert_eq!(
            lab.told(),
            ["home/same vaulted", "home/other refused changed", "home/moved refused changed"]
        );
    }

    #[test]
    fn of_several_contents_the_newest_is_taken_and_the_others_are_gone() {
        for dry_run in [true, false] {
            let mut lab = Lab::new();
            let old = lab.detect("home/a", "old");
            let new = lab.detect("home/a", "newer");
            let found = vec![old, new];
            let done = lab.order(Order { task: TASK, found, unknown: vec![], dry_run }, &|| false);
            let word = if dry_run { "would-vault" } else { "vaulted" };
            assert_eq!(lab.told(), [&format!("home/a {word}"), "home/a gone"]);
            assert_eq!(done.tally, Tally { dry_run, done: 1, gone: 1, bytes: 5, ..Tally::default() });
            assert_eq!(lab.is_there("home/a"), dry_run);
        }
    }

    #[test]
    fn a_dry_run_changes_nothing_and_says_what_would_be_done() {
        let mut lab = Lab::new();
        let found = vec![
            lab.detect("home/a", "bad"),
            lab.detect("usr/bin/tool", "evil"),
            lab.detect("usr/bin/sh", "shell"),
        ];
        let done = lab.dry_run(found.clone());
        assert_eq!(
            lab.told(),
            [
                "usr/bin/sh refused critical-file package",
                "usr/bin/tool would-vault reinstall",
                "home/a would-vault"
            ]
        );
        assert_eq!(done.tally, Tally { dry_run: true, done: 2, refused: 1, bytes: 7, ..Tally::default() });
        assert!(lab.is_there("home/a") && lab.is_there("usr/bin/tool") && lab.vault.held.is_empty());
        lab.run(found);
        assert_eq!(lab.vault.held.len(), 2, "the control: without it they are taken");
    }

    #[test]
    fn what_the_task_took_before_a_crash_is_not_taken_again() {
        let mut lab = Lab::new();
        let found = vec![lab.detect("usr/bin/tool", "evil"), lab.detect("home/a", "bad")];
        lab.run(vec![found[0].clone()]);
        let id = lab.told[0].vault;
        let done = lab.run(found.clone());
        assert_eq!(lab.told(), ["home/a vaulted", "usr/bin/tool vaulted reinstall"]);
        assert_eq!(lab.told[1].vault, id);
        assert_eq!(done.tally.done, 2);
        assert_eq!(lab.vault.held.len(), 2);
        let other = Order { task: TaskId::new(Uuid::nil()), found, unknown: vec![], dry_run: false };
        lab.order(other, &|| false);
        assert_eq!(lab.told(), ["home/a gone", "usr/bin/tool gone"], "another task did not take it");
    }

    #[test]
    fn a_file_that_comes_back_is_not_claimed() {
        for (look, expected) in [
            (SecondLook::Matched, "home/a failed came-back"),
            (SecondLook::Unknown, "home/a failed not-verified"),
            (SecondLook::Clean, "home/a vaulted"),
            (SecondLook::Gone, "home/a vaulted"),
        ] {
            let mut lab = Lab::new();
            lab.vault.then = Box::new(|path| {
                if path.ends_with("a") {
                    fs::write(path, "bad").unwrap();
                }
            });
            let found = vec![lab.detect("home/a", "bad"), lab.detect("home/b", "bad")];
            let done = lab.run(found.clone());
            assert_eq!(lab.told(), ["home/b vaulted"]);
            assert_eq!(done.tally.done, 1);
            // A crash before it was settled changes nothing.
            let mut done = lab.run(found);
            assert_eq!((lab.told.len(), done.again.len()), (1, 1));
            let again = done.again.remove(0);
            assert_eq!(on_disk(&again.path), lab.root.join("home/a"));
            let items = again.settle(look);
            assert_eq!(items.iter().map(|item| line(&lab.root, item)).collect::<Vec<_>>(), [expected]);
            assert!(items[0].vault.is_some());
        }
        let mut lab = Lab::new();
        lab.vault.then = Box::new(|path| symlink("/etc/passwd", path).unwrap());
        let found = vec![lab.detect("home/a", "bad")];
        assert!(lab.run(found).again.is_empty(), "nothing can be detected in a link");
        assert_eq!(lab.told(), ["home/a vaulted"]);
    }

    #[test]
    fn what_the_vault_says_is_told() {
        let refusal = |code: &str, is_refusal| NotKept { failure: Failure::new(code, "x"), is_refusal };
        for (error, expected) in [
            (refusal("changed", true), "home/a refused changed"),
            (refusal("vault-full", false), "home/a failed vault-full"),
            (refusal("gone", true), "home/a gone"),
        ] {
            for dry_run in [true, false] {
                let mut lab = Lab::new();
                lab.vault.refuses = Some(error.clone());
                let found = vec![lab.detect("home/a", "bad")];
                lab.order(Order { task: TASK, found, unknown: vec![], dry_run }, &|| false);
                assert_eq!(lab.told(), [expected]);
                assert!(lab.is_there("home/a"));
            }
        }
        let mut lab = Lab::new();
        let found = lab.detect("home/a", "bad");
        fs::hard_link(lab.root.join("home/a"), lab.root.join("home/b")).unwrap();
        lab.run(vec![found]);
        assert_eq!(lab.told(), ["home/a vaulted other-links"]);
    }

    #[test]
    fn a_stop_leaves_the_rest_uncounted_and_untouched() {
        let mut lab = Lab::new();
        let big = "x".repeat(3 << 20);
        let found: Vec<Found> = ["a", "b", "c"].map(|name| lab.detect(&format!("home/{name}"), &big)).into();
        let order =
            |found: &Vec<Found>| Order { task: TASK, found: found.clone(), unknown: vec![], dry_run: false };
        let done = lab.order(order(&found), &|| true);
        assert_eq!(done.tally, Tally { left: 3, ..Tally::default() });
        // Called off in the middle of reading the second file.
        let asked = Cell::new(0);
        let done = lab.order(order(&found), &|| {
            asked.set(asked.get() + 1);
            asked.get() > 20
        });
        assert_eq!(lab.told(), ["home/c vaulted"]);
        assert_eq!(done.tally, Tally { done: 1, left: 2, bytes: 3 << 20, ..Tally::default() });
        assert!(lab.is_there("home/a") && lab.is_there("home/b"));
        let done = lab.order(order(&found), &|| false);
        assert_eq!(done.tally.done, 3, "the rest, and what was done before");
    }

    #[test]
    fn a_detection_that_never_was_is_refused_without_a_path() {
        let mut lab = Lab::new();
        let unknown = vec![Sha256::of(b"1"), Sha256::of(b"2")];
        let order = Order { task: TASK, found: vec![], unknown: unknown.clone(), dry_run: false };
        let done = lab.order(order, &|| false);
        assert_eq!(lab.told(), ["refused not-detected-here"; 2]);
        assert_eq!(lab.told.iter().map(|item| item.detections[0]).collect::<Vec<_>>(), unknown);
        assert_eq!(done.tally, Tally { refused: 2, ..Tally::default() });
    }

    #[test]
    fn a_file_with_very_many_detections_is_counted_once() {
        let mut lab = Lab::new();
        lab.detect("home/a", "bad");
        let found: Vec<Found> =
            (0..600).map(|n| lab.detect_as("home/a", "bad", &format!("rule{n}"))).collect();
        let done = lab.run(found);
        assert_eq!(lab.told(), ["home/a vaulted"; 3]);
        assert_eq!(lab.told.iter().map(|item| item.detections.len()).sum::<usize>(), 600);
        assert!(lab.told.iter().all(|item| item.detections.len() <= ItemReport::MAX_DETECTIONS));
        assert_eq!(done.tally, Tally { done: 1, bytes: 3, ..Tally::default() });
    }

    /// Files of the system are left alone then; `decide` is tested for that.
    #[test]
    fn without_the_package_database_a_user_s_file_is_still_taken() {
        let mut lab = Lab::new();
        fs::create_dir(lab.root.join("dpkg/info/bad.list")).unwrap();
        assert!(lab.host.packages.look_up(&[PathBytes(b"/x".to_vec())]).is_err(), "the control");
        let found = lab.detect("home/a", "bad");
        lab.run(vec![found]);
        assert_eq!(lab.told(), ["home/a vaulted"]);
    }
}
