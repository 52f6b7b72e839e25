//! Looks after the vault while no task uses it: settles what a crash left, lets go of what is too old, and
//! keeps the manager's list of it right also after somebody used it by hand.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use tm_protocol::report::{Failure, VaultEntry};
use tokio::sync::mpsc::Sender;

use super::execute::Told;
use crate::{
    paths::Paths,
    vault::{self, Generation, Limits, Purge, Recovered, Vault, VaultError},
};

/// Most entries in one message, and most bytes of their paths.
const PART: usize = 200;
const PART_BYTES: usize = 128 << 10;
/// How soon it is noticed that the vault is free, or that nobody waits for it any more.
const TURN: Duration = Duration::from_millis(20);

/// The vault as the manager was last told of it, and whose turn it is with the vault: within the agent one waits
/// for the other, however long it takes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown {
    generation: Arc<Mutex<Option<Generation>>>,
    turn: Arc<Mutex<()>>,
}

impl Shown {
    /// What the manager knows is now what the vault holds.
    pub(crate) fn is_up_to_date(&self, paths: &Paths) {
        self.is_at(vault::generation(paths));
    }

    fn is_at(&self, generation: Option<Generation>) {
        *self.generation.lock().unwrap_or_else(PoisonError::into_inner) = generation;
    }

    fn differs(&self, generation: Option<Generation>) -> bool {
        *self.generation.lock().unwrap_or_else(PoisonError::into_inner) != generation
    }

    /// Waits until nobody else in this process uses the vault; `None` if that is called off. Blocks.
    pub(crate) fn wait_for_turn(&self, cancel: &AtomicBool) -> Option<MutexGuard<'_, ()>> {
        while !cancel.load(Ordering::Acquire) {
            if let Some(turn) = self.turn() {
                return Some(turn);
            }
            thread::sleep(TURN);
        }
        None
    }

    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// Settles, purges and tells, if anything changed since the manager was last told. Ages are reckoned from
/// `now_ms` (since 1970); without a time that can be trusted nothing is purged. Blocks.
pub(crate) fn look_after(
    paths: &Paths,
    limits: Limits,
    now_ms: Option<i64>,
    shown: &Shown,
    tell: &Sender<Told>,
) {
    if vault::generation(paths).is_none() {
        return;
    }
    let tended = {
        // Whoever uses it leaves it in order; the next round is soon.
        let Some(_turn) = shown.turn() else { return };
        tend(paths, limits, now_ms, shown)
    };
    match tended {
        Ok(Tended { told, generation }) => {
            // Only now that the vault is free for others: nobody may hear this for long.
            for told in told {
                let _ = tell.blocking_send(told);
            }
            shown.is_at(generation);
        }
        Err(VaultError::InUse { .. }) => {}
        Err(error) => {
            let failure = error.failure();
            tracing::warn!(code = failure.code, "Cannot look after the vault: {}.", failure.message);
        }
    }
}

/// What there is to tell, and the vault of which it tells.
struct Tended {
    told: Vec<Told>,
    generation: Option<Generation>,
}

fn tend(paths: &Paths, limits: Limits, now_ms: Option<i64>, shown: &Shown) -> Result<Tended, VaultError> {
    let mut vault = Vault::open(paths, limits)?;
    let mut told: Vec<Told> = recovery_notice(&vault.recover()?).into_iter().collect();
    if let Some(now_ms) = now_ms {
        let purged = vault.purge(&Purge::OlderThan(limits.retention), now_ms)?;
        if !purged.removed.is_empty() {
            let count = u64::try_from(purged.removed.len()).unwrap_or(u64::MAX);
            let message = format!("{count} vaulted files were removed for good after their retention");
            told.push(Told::Notice { code: "vault-purged", message, count });
        }
    }
    let generation = vault::generation(paths);
    if shown.differs(generation) {
        let parts = parts(vault.list()).into_iter().enumerate();
        told.extend(parts.map(|(at, items)| Told::Vault { first: at == 0, items }));
    }
    Ok(Tended { told, generation })
}

/// Tells what was settled, if anything was.
pub(crate) fn notice_recovery(recovered: &Recovered, tell: &Sender<Told>) {
    if let Some(notice) = recovery_notice(recovered) {
        let _ = tell.blocking_send(notice);
    }
}

fn recovery_notice(recovered: &Recovered) -> Option<Told> {
    if recovered.is_empty() {
        return None;
    }
    let Recovered { finished, undone, damaged, notes, .. } = recovered;
    let mut message = format!(
        "what was left unsettled in the vault: finished {finished}, undone {undone}, damaged {damaged}"
    );
    for Failure { code, message: text } in notes.iter().take(16) {
        message.push_str(&format!("; {code}: {text}"));
    }
    let code = if *damaged > 0 { "vault-damaged" } else { "vault-recovered" };
    tracing::warn!(code, "{message}");
    let count = if *damaged > 0 { *damaged } else { finished.saturating_add(*undone) };
    Some(Told::Notice { code, message, count })
}

/// The list in parts that fit a message; an empty vault is one empty part.
fn parts(entries: Vec<VaultEntry>) -> Vec<Vec<VaultEntry>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = 0;
    for entry in entries {
        bytes += entry.path.0.len();
        let is_full = parts.last().is_some_and(|part| part.len() >= PART) || bytes > PART_BYTES;
        if is_full {
            bytes = entry.path.0.len();
            parts.push(Vec::new());
        }
        if let Some(part) = parts.last_mut() {
            part.push(entry);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use tm_protocol::report::PathBytes;
    use tokio::sync::mpsc::{self, Receiver};

    use super::*;

    const RETENTION: Duration = Duration::from_secs(3600);

    fn limits() -> Limits {
        Limits { retention: RETENTION, ..Limits::default() }
    }

    /// A vault with one item; when that was vaulted.
    fn vault_in(folder: &Path) -> (Paths, i64) {
        let paths = Paths::new(folder.join("state"));
        fs::create_dir(folder.join("state")).unwrap();
        let file = folder.join("file");
        fs::write(&file, "bad").unwrap();
        let mut vault = Vault::open(&paths, limits()).unwrap();
        let path = PathBytes(file.to_str().unwrap().as_bytes().to_vec());
        let held = vault.put(&path, None, None).unwrap();
        (paths, held.entry.vaulted_ms)
    }

    fn codes(told: &mut Receiver<Told>) -> Vec<String> {
        std::iter::from_fn(|| told.try_recv().ok())
            .map(|told| match told {
                Told::Notice { code, .. } => code.to_owned(),
                Told::Vault { items, .. } => format!("{} items", items.len()),
                Told::Detected { .. } | Told::Treated(..) | Told::Progress(_) | Told::Finished(..) => {
                    panic!("nobody detects or treats here")
                }
            })
            .collect()
    }

    #[test]
    fn nothing_is_removed_for_good_without_a_time_to_trust() {
        let folder = tempfile::tempdir().unwrap();
        let (paths, vaulted) = vault_in(folder.path());
        let (tell, mut told) = mpsc::channel(8);
        let shown = Shown::default();
        let retention = i64::try_from(RETENTION.as_millis()).unwrap();
        for (now, expected) in [
            (None, vec!["1 items"]),
            (Some(vaulted + retention - 1), vec![]),
            (Some(vaulted - retention), vec![]),
            (Some(vaulted + retention), vec!["vault-purged", "0 items"]),
        ] {
            look_after(&paths, limits(), now, &shown, &tell);
            assert_eq!(codes(&mut told), expected, "{now:?}");
        }
    }

    #[test]
    fn tasks_and_care_wait_for_each_other_and_nobody_waits_in_the_vault_to_be_heard() {
        let folder = tempfile::tempdir().unwrap();
        let (paths, _) = vault_in(folder.path());
        let (tell, mut told) = mpsc::channel(1);
        let shown = Shown::default();
        let turn = shown.wait_for_turn(&AtomicBool::new(false)).unwrap();
        look_after(&paths, limits(), None, &shown, &tell);
        assert!(codes(&mut told).is_empty(), "a task has it");
        assert!(shown.wait_for_turn(&AtomicBool::new(true)).is_none(), "called off");
        drop(turn);
        tell.try_send(Told::Notice { code: "full", message: String::new(), count: 0 }).unwrap();
        thread::scope(|scope| {
            let care = scope.spawn(|| {
                // A round in which somebody else has the vault tells nothing.
                while shown.differs(vault::generation(&paths)) {
                    look_after(&paths, limits(), None, &shown, &tell);
                }
            });
            let turn = shown.wait_for_turn(&AtomicBool::new(false)).unwrap();
            Vault::open(&paths, limits()).unwrap();
            drop(turn);
            let mut heard = Vec::new();
            while heard.len() < 2 {
                heard.extend(codes(&mut told));
                thread::sleep(TURN);
            }
            assert_eq!(heard, ["full", "1 items"]);
            care.join().unwrap();
        });
        look_after(&paths, limits(), None, &shown, &tell);
        assert!(codes(&mut told).is_empty(), "it is known");
    }
}
