//! Removing items for good.
//!
//! **Invariant:** what is not settled is not purged.

use std::time::Duration;

use tm_protocol::{ids::VaultId, report::VaultEntry};

use super::{
    Vault, VaultError,
    index::{Record, State, Why},
};

/// Which items to remove.
#[derive(Debug, Clone)]
pub(crate) enum Purge {
    /// Those vaulted at least this long ago.
    OlderThan(Duration),
    /// These.
    Items(Vec<VaultId>),
}

/// What was removed.
#[derive(Debug, Default)]
pub(crate) struct Purged {
    /// The items.
    pub(crate) removed: Vec<VaultEntry>,
    /// Bytes that they took.
    pub(crate) bytes: u64,
}

impl Vault {
    /// Removes items. `now_ms` is the time to reckon ages from, in milliseconds since 1970.
    ///
    /// # Errors
    /// `unknown-item` or `unsettled` before anything is removed, or whatever the system says.
    pub(crate) fn purge(&mut self, what: &Purge, now_ms: i64) -> Result<Purged, VaultError> {
        let Purged { removed, bytes } = self.would_purge(what, now_ms)?;
        for entry in &removed {
            // Noted first: an item without its file would look like a loss.
            self.note(Record::Dropped { id: entry.id, why: Why::Purged })?;
            self.remove_item(entry.id)?;
        }
        Ok(Purged { removed, bytes })
    }

    /// What [`Vault::purge`] would remove.
    ///
    /// # Errors
    /// `unknown-item` or `unsettled`.
    pub(crate) fn would_purge(&self, what: &Purge, now_ms: i64) -> Result<Purged, VaultError> {
        let ids: Vec<VaultId> = match what {
            Purge::OlderThan(age) => {
                let age = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
                let items = self.index.content.items.values();
                items
                    .filter(|(kept, state)| {
                        *state == State::Kept && now_ms.saturating_sub(kept.vaulted_ms) >= age
                    })
                    .map(|(kept, _)| kept.id)
                    .collect()
            }
            Purge::Items(ids) => {
                let mut ids = ids.clone();
                ids.sort_unstable();
                ids.dedup();
                ids
            }
        };
        let mut purged = Purged::default();
        for id in ids {
            let (kept, state) = self.index.content.items.get(&id).ok_or(VaultError::UnknownItem(id))?;
            match state {
                State::Kept => {}
                State::Taking | State::Restoring(_) => return Err(VaultError::Unsettled(id)),
            }
            purged.bytes = purged.bytes.saturating_add(kept.stored);
            purged.removed.push(kept.entry());
        }
        Ok(purged)
    }
}
