//! Carries out the tasks that change the endpoint: cleanup and restore. Blocks.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use tm_protocol::{
    ids::{Sha256, TaskId},
    message::{Outcome, Progress, Report},
    report::{Failure, ItemReport, ItemVerdict, PathBytes, Tally, Verdict},
    task::{RestoreSpec, ScanLimits},
};

use super::{
    care,
    execute::{Context, Told},
    journal::record::Found,
};
use crate::{
    cleanup::{self, Again, Host, SecondLook},
    connection::fetch,
    scan,
    vault::{Vault, VaultError},
};

/// Most items in one report, and most of their bytes (paths and notes, roughly).
const BATCH: usize = 32;
const BATCH_BYTES: usize = 96 << 10;
/// How long an item may wait to be told.
const BATCH_FOR: Duration = Duration::from_millis(500);

/// Takes away what was detected.
pub(crate) fn cleanup(
    task: TaskId,
    noted: Vec<(Sha256, Option<Found>)>,
    dry_run: bool,
    context: &Context,
    cancel: &AtomicBool,
) -> Outcome {
    let Some(turn) = context.shown.wait_for_turn(cancel) else { return Outcome::Cancelled(None) };
    let mut vault = match open(context) {
        Ok(vault) => vault,
        Err(failure) => return Outcome::Failed(failure),
    };
    let mut order = cleanup::Order { task, found: Vec::new(), unknown: Vec::new(), dry_run };
    let patterns: Vec<(PathBytes, Sha256)> = noted
        .iter()
        .filter_map(|(_, found)| found.as_ref())
        .map(|found| (found.detection.path.clone(), found.detection.pattern))
        .collect();
    for (key, found) in noted {
        match found {
            Some(found) => {
                let object = found.object(context.boot);
                order.found.push(cleanup::Found { key, detection: found.detection, object });
            }
            None => order.unknown.push(key),
        }
    }
    let host = Host::survey(context.paths.root());
    let mut items = Items::new(task, context);
    let stop = || cancel.load(Ordering::Acquire);
    let done = cleanup::run(order, &mut vault, &host, &mut |item| items.tell(item), &stop);
    let mut tally = done.tally;
    for again in done.again {
        let look = second_look(&again, &patterns, context, cancel);
        let settled = again.settle(look);
        if let Some(first) = settled.first() {
            tally.count(first);
        }
        settled.into_iter().for_each(|item| items.tell(item));
    }
    items.flush();
    drop(vault);
    context.shown.is_up_to_date(&context.paths);
    drop(turn);
    Outcome::Treated(tally)
}

/// Scans what stands at the path of a file that was taken, with the patterns that the file matched.
fn second_look(
    again: &Again,
    patterns: &[(PathBytes, Sha256)],
    context: &Context,
    cancel: &AtomicBool,
) -> SecondLook {
    let mut digests: Vec<Sha256> =
        patterns.iter().filter(|(path, _)| *path == again.path).map(|(_, pattern)| *pattern).collect();
    digests.sort_unstable();
    digests.dedup();
    let kept: Option<Vec<_>> = digests.iter().map(|digest| fetch::kept(&context.paths, *digest)).collect();
    let Some(kept) = kept.filter(|kept| !kept.is_empty()) else { return SecondLook::Unknown };
    let order = scan::Order::new(vec![again.path.clone()], kept, ScanLimits::default());
    match scan::run(order, |_| {}, cancel) {
        Ok(coverage) if cancel.load(Ordering::Acquire) && coverage.detections == 0 => SecondLook::Unknown,
        Ok(coverage) => match coverage.verdict() {
            Verdict::Detected => SecondLook::Matched,
            Verdict::Clean if coverage.files > 0 => SecondLook::Clean,
            Verdict::Clean => SecondLook::Gone,
            Verdict::Incomplete => SecondLook::Unknown,
        },
        // Also where its folder is a link by now: what is behind that is not looked at.
        Err(_) if !cleanup::stands_again(&again.path) => SecondLook::Gone,
        Err(_) => SecondLook::Unknown,
    }
}

/// Puts vaulted files back.
pub(crate) fn restore(
    task: TaskId,
    spec: &RestoreSpec,
    resumed: bool,
    context: &Context,
    cancel: &AtomicBool,
) -> Outcome {
    let Some(turn) = context.shown.wait_for_turn(cancel) else { return Outcome::Cancelled(None) };
    let mut vault = match open(context) {
        Ok(vault) => vault,
        Err(failure) => return Outcome::Failed(failure),
    };
    let mut tally = Tally { dry_run: spec.dry_run, ..Tally::default() };
    let mut items = Items::new(task, context);
    for (at, id) in spec.items.iter().enumerate() {
        if cancel.load(Ordering::Acquire) {
            tally.left = u32::try_from(spec.items.len() - at).unwrap_or(u32::MAX);
            break;
        }
        let entry = vault.entry(*id);
        let before = vault.restored(*id);
        let place = spec
            .to
            .clone()
            .or_else(|| entry.as_ref().map(|entry| entry.path.clone()))
            .or_else(|| before.as_ref().map(|before| before.path.clone()));
        let mut item = ItemReport {
            detections: vec![],
            vault: Some(*id),
            path: place.unwrap_or_else(|| PathBytes(vec![])),
            sha256: entry.as_ref().map(|entry| entry.sha256).or(before.as_ref().map(|before| before.sha256)),
            size: entry
                .as_ref()
                .map(|entry| entry.size)
                .or(before.as_ref().map(|before| before.size))
                .unwrap_or(0),
            verdict: ItemVerdict::Restored,
            failure: None,
            notes: vec![],
        };
        // A task that goes on after a crash has done this one before.
        let is_done = resumed
            && !spec.dry_run
            && match &spec.to {
                None => before.is_some(),
                Some(to) => vault.has_copy_at(*id, to).unwrap_or(false),
            };
        if !is_done {
            match put_back(&mut vault, *id, spec) {
                Ok((path, notes)) => {
                    item.path = path;
                    item.notes = notes;
                    item.notes.truncate(ItemReport::MAX_NOTES);
                    if spec.dry_run {
                        item.verdict = ItemVerdict::WouldRestore;
                    }
                }
                Err(error) => {
                    item.verdict =
                        if error.is_refusal() { ItemVerdict::Refused } else { ItemVerdict::Failed };
                    item.failure = Some(error.failure());
                }
            }
        }
        tally.count(&item);
        items.tell(item);
    }
    items.flush();
    drop(vault);
    context.shown.is_up_to_date(&context.paths);
    drop(turn);
    Outcome::Treated(tally)
}

fn put_back(
    vault: &mut Vault,
    id: tm_protocol::ids::VaultId,
    spec: &RestoreSpec,
) -> Result<(PathBytes, Vec<Failure>), VaultError> {
    if spec.dry_run {
        let would = vault.check_restore(id, spec.to.as_ref(), spec.set_id)?;
        return Ok((would.path, would.notes));
    }
    let restored = vault.restore(id, spec.to.as_ref(), spec.set_id)?;
    Ok((restored.path, restored.notes))
}

/// The vault, with everything settled that was left.
fn open(context: &Context) -> Result<Vault, Failure> {
    let mut vault = Vault::open(&context.paths, context.vault).map_err(|error| error.failure())?;
    let recovered = vault.recover().map_err(|error| error.failure())?;
    care::notice_recovery(&recovered, &context.tell);
    Ok(vault)
}

/// Items on their way to the manager.
struct Items<'a> {
    task: TaskId,
    context: &'a Context,
    waiting: Vec<ItemReport>,
    bytes: usize,
    /// [`Report::weight`] of a report with what waits.
    weight: usize,
    since: Instant,
    progress: Progress,
}

impl<'a> Items<'a> {
    fn new(task: TaskId, context: &'a Context) -> Self {
        let progress = Progress { task, files: 0, bytes: 0, detections: 0, skipped: 0 };
        Self { task, context, waiting: Vec::new(), bytes: 0, weight: 1, since: Instant::now(), progress }
    }

    fn tell(&mut self, item: ItemReport) {
        let notes: usize =
            item.notes.iter().chain(&item.failure).map(|n| n.code.len() + n.message.len()).sum();
        let size = item.path.0.len() + item.detections.len() * 32 + notes;
        let weight = 1 + item.detections.len();
        if self.bytes + size > BATCH_BYTES || self.weight + weight > Report::MAX_WEIGHT {
            self.flush();
        }
        self.bytes += size;
        self.weight += weight;
        self.progress.files += 1;
        self.progress.bytes = self.progress.bytes.saturating_add(item.size);
        if matches!(item.verdict, ItemVerdict::Refused | ItemVerdict::Failed) {
            self.progress.skipped += 1;
        }
        self.waiting.push(item);
        if self.waiting.len() >= BATCH || self.since.elapsed() >= BATCH_FOR {
            self.flush();
            let _ = self.context.tell.blocking_send(Told::Progress(self.progress.clone()));
        }
    }

    fn flush(&mut self) {
        self.bytes = 0;
        self.weight = 1;
        self.since = Instant::now();
        let items = std::mem::take(&mut self.waiting);
        if !items.is_empty() {
            // It fails only when the agent is ending; the task then goes on after the next start.
            let _ = self.context.tell.blocking_send(Told::Treated(self.task, items));
        }
    }
}

#[cfg(test)]
mod tests {
    use tm_protocol::message::ReportBody;
    use tokio::sync::mpsc;
    use uuid::Uuid;

    use super::*;
    use crate::{tasks::execute::tests::context, vault::Limits};

    /// The agent was killed after the copy stood in its place and before it said so.
    #[test]
    fn a_copy_that_was_put_before_a_crash_is_not_in_its_own_way() {
        let folder = tempfile::tempdir().unwrap();
        let name = |name: &str| PathBytes(folder.path().join(name).into_os_string().into_encoded_bytes());
        std::fs::create_dir(folder.path().join("state")).unwrap();
        std::fs::write(folder.path().join("file"), "bad").unwrap();
        let (tell, mut told) = mpsc::channel(100);
        let context = context(&folder.path().join("state"), tell);
        let mut vault = Vault::open(&context.paths, Limits::default()).unwrap();
        let id = vault.put(&name("file"), None, None).unwrap().entry.id;
        drop(vault);
        let mut run = |to: &str, resumed: bool| {
            let spec = RestoreSpec { items: vec![id], to: Some(name(to)), set_id: false, dry_run: false };
            let task = TaskId::new(Uuid::from_u128(1));
            restore(task, &spec, resumed, &context, &AtomicBool::new(false));
            let items = std::iter::from_fn(|| told.try_recv().ok())
                .find_map(|told| if let Told::Treated(_, items) = told { Some(items) } else { None });
            let item = items.unwrap().remove(0);
            (item.verdict, item.failure.map(|failure| failure.code))
        };
        let exists = || Some("exists".to_owned());
        assert_eq!(run("copy", false), (ItemVerdict::Restored, None));
        assert_eq!(run("copy", false), (ItemVerdict::Refused, exists()), "another order");
        assert_eq!(run("copy", true), (ItemVerdict::Restored, None), "the same, after a crash");
        std::fs::write(folder.path().join("other"), "bad").unwrap();
        assert_eq!(run("other", true), (ItemVerdict::Refused, exists()), "what somebody else put there");
        std::fs::write(folder.path().join("copy"), "other").unwrap();
        assert_eq!(run("copy", true), (ItemVerdict::Refused, exists()), "what was changed since");
    }

    /// A manager takes no heavier report, and would take nothing any more from an agent that has one to send.
    #[test]
    fn no_report_of_items_is_heavier_than_a_manager_takes() {
        let (tell, mut told) = mpsc::channel(1000);
        let folder = tempfile::tempdir().unwrap();
        let context = context(folder.path(), tell);
        let task = TaskId::new(Uuid::from_u128(1));
        let mut items = Items::new(task, &context);
        for n in 0..100 {
            items.tell(ItemReport {
                detections: vec![Sha256::of(b"d"); [1, 200, ItemReport::MAX_DETECTIONS][n % 3]],
                vault: None,
                path: PathBytes(b"/x".to_vec()),
                sha256: None,
                size: 1,
                verdict: ItemVerdict::Vaulted,
                failure: None,
                notes: vec![],
            });
        }
        items.flush();
        let mut count = 0;
        while let Ok(told) = told.try_recv() {
            if let Told::Treated(task, items) = told {
                count += items.len();
                let report = Report { sequence: 1, at_ms: 0, body: ReportBody::Items { task, items } };
                assert!(report.weight() <= Report::MAX_WEIGHT, "{}", report.weight());
            }
        }
        assert_eq!(count, 100);
    }
}
