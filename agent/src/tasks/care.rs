//! Looks after the vault while no task uses it: settles what a crash left, lets go of what is too old, and
//! keeps the manager's list of it right also after somebody used it by hand.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
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

/// The vault as the manager was last told of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown(Arc<Mutex<Option<Generation>>>);

impl Shown {
    /// What the manager knows is now what the vault holds.
    pub(crate) fn is_up_to_date(&self, paths: &Paths) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = vault::generation(paths);
    }

    fn differs(&self, paths: &Paths) -> bool {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) != vault::generation(paths)
    }
}

/// Settles, purges and tells, if anything changed since the manager was last told. Blocks. Nothing is purged
/// unless the clock `is_trusted`: one that is a year ahead would make everything look old.
pub(crate) fn look_after(
    paths: &Paths,
    limits: Limits,
    is_trusted: bool,
    shown: &Shown,
    tell: &Sender<Told>,
) {
    if vault::generation(paths).is_none() {
        return;
    }
    match tend(paths, limits, is_trusted, shown, tell) {
        // Whoever uses it leaves it in order; the next round is soon.
        Ok(()) | Err(VaultError::InUse { .. }) => {}
        Err(error) => {
            let failure = error.failure();
            tracing::warn!(code = failure.code, "Cannot look after the vault: {}.", failure.message);
        }
    }
}

fn tend(
    paths: &Paths,
    limits: Limits,
    is_trusted: bool,
    shown: &Shown,
    tell: &Sender<Told>,
) -> Result<(), VaultError> {
    let mut vault = Vault::open(paths, limits)?;
    notice_recovery(&vault.recover()?, tell);
    if is_trusted {
        purge(&mut vault, limits, tell)?;
    }
    if shown.differs(paths) {
        for (at, items) in parts(vault.list()).into_iter().enumerate() {
            let _ = tell.blocking_send(Told::Vault { first: at == 0, items });
        }
        shown.is_up_to_date(paths);
    }
    Ok(())
}

fn purge(vault: &mut Vault, limits: Limits, tell: &Sender<Told>) -> Result<(), VaultError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now_ms = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
    let purged = vault.purge(&Purge::OlderThan(limits.retention), now_ms)?;
    if !purged.removed.is_empty() {
        let count = u64::try_from(purged.removed.len()).unwrap_or(u64::MAX);
        let message = format!("{count} vaulted files were removed for good after their retention");
        let _ = tell.blocking_send(Told::Notice { code: "vault-purged", message, count });
    }
    Ok(())
}

/// Tells what was settled, if anything was.
pub(crate) fn notice_recovery(recovered: &Recovered, tell: &Sender<Told>) {
    if recovered.is_empty() {
        return;
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
    let _ = tell.blocking_send(Told::Notice { code, message, count });
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
