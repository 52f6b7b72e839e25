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
            sha256: entry.as_ref().map(|entry| entry.sha256),
            size: entry.as_ref().map_or(0, |entry| entry.size),
            verdict: ItemVerdict::Restored,
            failure: None,
            notes: vec![],
        };
        // A task that goes on after a crash has done this one before.
        let is_done = resumed && spec.to.is_none() && before.is_some();
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
