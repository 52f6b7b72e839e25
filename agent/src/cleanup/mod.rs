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
mod look;
mod target;

use std::{collections::HashSet, path::Path};

use tm_protocol::{
    ids::{Sha256, TaskId},
    report::{Detection, Failure, ItemReport, ItemVerdict, PathBytes, Tally, VaultEntry},
};

use crate::{
    cleanup::{
        decide::{Decision, Owned, Seen},
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

/// The file that was judged: only it may be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Judged {
    /// The object on disk.
    pub(crate) object: Object,
    /// Digest of its content.
    pub(crate) sha256: Sha256,
    /// Its size, in bytes.
    pub(crate) size: u64,
}

/// What the vault took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    /// The item.
    pub(crate) entry: VaultEntry,
    /// How many other names the file has.
    pub(crate) other_links: u64,
}

/// Why the vault did not take something. The code `gone` means that there was nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NotKept {
    /// Why.
    pub(crate) failure: Failure,
    /// It will not, however often it is asked.
    pub(crate) is_refusal: bool,
}

/// The vault, as a cleanup needs it.
pub(crate) trait Keep {
    /// Takes the file at `path`, if it is the judged one: afterwards it is whole in the vault and gone from its
    /// place.
    ///
    /// # Errors
    /// If it was not taken; then it is where it was.
    fn put(&mut self, path: &PathBytes, judged: &Judged, task: TaskId) -> Result<Kept, NotKept>;

    /// Whether [`Keep::put`] would take it, as far as can be told. Changes nothing.
    ///
    /// # Errors
    /// Why it would not.
    fn check(&self, path: &PathBytes, judged: &Judged) -> Result<(), NotKept>;

    /// What `task` took from `path` earlier.
    fn find(&self, task: TaskId, path: &PathBytes) -> Option<VaultEntry>;
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
    /// What to scan.
    pub(crate) fn path(&self) -> Option<&PathBytes> {
        self.items.first().map(|item| &item.path)
    }

    /// The items to tell; the first of them is to be counted.
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
        if taken && look::stands_again(&target.path) {
            done.again.push(Again { items });
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
            Decision::Take(notes) => match seen {
                Seen::File(file) => self.take(target, file.object, notes),
                Seen::Gone | Seen::Other(_) | Seen::Closed(_) => Treated::new(ItemVerdict::Gone),
            },
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
