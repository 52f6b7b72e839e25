//! What a cleanup needs of the vault.

use tm_protocol::{
    ids::{Sha256, TaskId},
    report::{Failure, PathBytes, VaultEntry},
};

use crate::{platform::fs::Object, vault};

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
    /// What the vault has to say besides.
    pub(crate) notes: Vec<Failure>,
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

impl Judged {
    fn for_vault(&self) -> vault::Judged {
        vault::Judged { object: Some(self.object), sha256: self.sha256, size: self.size }
    }
}

impl From<vault::VaultError> for NotKept {
    fn from(error: vault::VaultError) -> Self {
        Self { failure: error.failure(), is_refusal: error.is_refusal() }
    }
}

impl Keep for vault::Vault {
    fn put(&mut self, path: &PathBytes, judged: &Judged, task: TaskId) -> Result<Kept, NotKept> {
        let held = Self::put(self, path, Some(&judged.for_vault()), Some(task))?;
        Ok(Kept { entry: held.entry, other_links: held.other_links, notes: held.notes })
    }

    fn check(&self, path: &PathBytes, judged: &Judged) -> Result<(), NotKept> {
        Self::check(self, path, Some(&judged.for_vault()))?;
        Ok(())
    }

    fn find(&self, task: TaskId, path: &PathBytes) -> Option<VaultEntry> {
        Self::find(self, task, path)
    }
}
