//! What an agent says about what it found and did.

use std::{collections::BTreeMap, fmt};

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::{
    ids::{Sha256, VaultId},
    receipt::Receipt,
};

/// A path's exact bytes. Most are UTF-8; none has to be. [`crate::text::escape`] shows them to people.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct PathBytes(pub Vec<u8>);

impl fmt::Display for PathBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::text::escape(&self.0))
    }
}

impl fmt::Debug for PathBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl From<&[u8]> for PathBytes {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

/// A pattern matched a subject.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Detection {
    /// The file on disk.
    pub path: PathBytes,
    /// Names from the outermost container to the member that matched; empty if the file itself did.
    pub member: Vec<PathBytes>,
    /// The pattern (its content's digest) that holds the rule.
    pub pattern: Sha256,
    /// The rule within the pattern.
    pub rule: String,
    /// Digest of the file on disk (not of the member), as it was read.
    pub sha256: Sha256,
    /// Size of the file on disk, in bytes.
    pub size: u64,
}

impl Detection {
    /// Names what was found where: the same find of the same pattern, in whichever scan, has the same key. A
    /// cleanup names detections by it. It is SHA-256 over the path and the member's names, each after its
    /// length as eight bytes, big-endian; then eight bytes of ones, the pattern's digest, the file's digest
    /// and the rule.
    pub fn key(&self) -> Sha256 {
        let mut text = Vec::new();
        for part in [&self.path].into_iter().chain(&self.member) {
            text.extend_from_slice(&u64::try_from(part.0.len()).unwrap_or(u64::MAX).to_be_bytes());
            text.extend_from_slice(&part.0);
        }
        // No length above looks like this, so that a member is never taken for what follows.
        text.extend_from_slice(&u64::MAX.to_be_bytes());
        text.extend_from_slice(self.pattern.as_bytes());
        text.extend_from_slice(self.sha256.as_bytes());
        text.extend_from_slice(self.rule.as_bytes());
        Sha256::of(&text)
    }
}

/// A file in which something was found, and which a package lists as its own.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct OwnedFile {
    /// The pattern (its content's digest) that holds the rule.
    pub pattern: Sha256,
    /// The file on disk.
    pub path: PathBytes,
    /// The package, as its database names it.
    pub package: String,
}

/// What came of one item of a cleanup or a restore.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum ItemVerdict {
    /// The file is gone from its place, checked, and whole in the vault.
    Vaulted,
    /// The file is back in its place, content and metadata checked.
    Restored,
    /// A dry run: it would be vaulted.
    WouldVault,
    /// A dry run: it would be restored.
    WouldRestore,
    /// There was nothing to do: the file is no longer there.
    Gone,
    /// The agent will not touch it; the failure says why.
    Refused,
    /// It was tried and did not succeed; the failure says why, and nothing was lost.
    Failed,
}

impl ItemVerdict {
    /// Every verdict.
    pub const ALL: [Self; 7] = [
        Self::Vaulted,
        Self::Restored,
        Self::WouldVault,
        Self::WouldRestore,
        Self::Gone,
        Self::Refused,
        Self::Failed,
    ];

    /// The word for it in every output and in the store.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Vaulted => "vaulted",
            Self::Restored => "restored",
            Self::WouldVault => "would-vault",
            Self::WouldRestore => "would-restore",
            Self::Gone => "gone",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }

    /// Reads [`ItemVerdict::word`] back.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|verdict| verdict.word() == word)
    }
}

impl fmt::Display for ItemVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// One item of a cleanup or a restore, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ItemReport {
    /// The detections ([`Detection::key`]) it settles; a file with several matches is one item. At most
    /// [`ItemReport::MAX_DETECTIONS`]. Empty for a restore.
    pub detections: Vec<Sha256>,
    /// Its item in the vault, where there is one.
    pub vault: Option<VaultId>,
    /// The file on disk: where it was, or where it is put.
    pub path: PathBytes,
    /// Digest of its content, where known.
    pub sha256: Option<Sha256>,
    /// Its size, in bytes.
    pub size: u64,
    /// What came of it.
    pub verdict: ItemVerdict,
    /// Why, where it was refused or failed.
    pub failure: Option<Failure>,
    /// What an administrator should know besides, at most [`ItemReport::MAX_NOTES`]. Codes: `container` (a
    /// member matched, the whole container was taken), `other-links` (other names of the same file remain),
    /// `reinstall` (the package to reinstall), `package` (the package it belongs to, which tells no checksum),
    /// `set-id-withheld` (set-user-id was not restored), `metadata` (a part of the metadata could not be
    /// restored), `likely-false-positive`.
    pub notes: Vec<Failure>,
}

impl ItemReport {
    /// Most detections that one item settles.
    pub const MAX_DETECTIONS: usize = 256;
    /// Most notes.
    pub const MAX_NOTES: usize = 16;
}

/// The sum of a cleanup or a restore; the items were reported before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Tally {
    /// Nothing was changed: it was asked what would be done.
    pub dry_run: bool,
    /// Items vaulted or restored (in a dry run: that would be).
    pub done: u32,
    /// Items with nothing to do.
    pub gone: u32,
    /// Items the agent would not touch.
    pub refused: u32,
    /// Items that did not succeed.
    pub failed: u32,
    /// Items not reached, because the task was called off or ran out of time.
    pub left: u32,
    /// Bytes vaulted or restored.
    pub bytes: u64,
}

impl Tally {
    /// Counts one item.
    pub fn count(&mut self, item: &ItemReport) {
        let field = match item.verdict {
            ItemVerdict::Vaulted
            | ItemVerdict::Restored
            | ItemVerdict::WouldVault
            | ItemVerdict::WouldRestore => {
                self.bytes = self.bytes.saturating_add(item.size);
                &mut self.done
            }
            ItemVerdict::Gone => &mut self.gone,
            ItemVerdict::Refused => &mut self.refused,
            ItemVerdict::Failed => &mut self.failed,
        };
        *field = field.saturating_add(1);
    }

    /// Whether everything asked for was done or needed no doing.
    pub const fn is_whole(&self) -> bool {
        self.refused == 0 && self.failed == 0 && self.left == 0
    }
}

/// One item of an endpoint's vault.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VaultEntry {
    /// Its id.
    pub id: VaultId,
    /// Where the file was.
    pub path: PathBytes,
    /// Digest of its content.
    pub sha256: Sha256,
    /// Its size, in bytes.
    pub size: u64,
    /// When it was vaulted, in milliseconds since 1970.
    pub vaulted_ms: i64,
}

/// What an agent tells unasked. Numbered in a lane of its own, and dropped (and counted) before a detection
/// or an outcome is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Notice {
    /// When it was made, in milliseconds since 1970 by the agent's clock.
    pub at_ms: i64,
    /// Stable word: `agent-started`, `notices-lost`, `journal-damaged`, `vault-recovered`, `vault-damaged`,
    /// `clock-jumped`, ...
    pub code: String,
    /// What happened, for the operator.
    pub message: String,
    /// How many, where the code counts something; else 0.
    pub count: u64,
}

/// Why something was not looked at. The last three are counted and leave a verdict `clean`; any other
/// makes it `incomplete` (product words, section 7).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum SkipReason {
    /// It cannot be read without a password.
    Encrypted,
    /// A limit of the scan (size, depth, members, ratio, bytes) was reached.
    Limit,
    /// A container contradicts itself or breaks off.
    Malformed,
    /// A container of a kind that has no reader here.
    Unsupported,
    /// The system refused to open or read it.
    Unreadable,
    /// It changed while it was read.
    Changed,
    /// It took longer than allowed.
    Timeout,
    /// It lies on a network file system.
    Remote,
    /// It lies on another file system than the one asked for.
    OtherFilesystem,
    /// It ended two scan workers.
    WorkerDied,
    /// Only the manager could have told, and it was out of reach.
    Undetermined,
    /// A device, socket or fifo: it has no content to look at.
    Special,
    /// A symbolic link: what it points to is looked at where it lies.
    Symlink,
    /// A file system that the kernel makes up (`/proc`, `/sys`, …).
    Pseudo,
}

impl SkipReason {
    /// The word for it in every output.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Encrypted => "encrypted",
            Self::Limit => "limit",
            Self::Malformed => "malformed",
            Self::Unsupported => "unsupported",
            Self::Unreadable => "unreadable",
            Self::Changed => "changed",
            Self::Timeout => "timeout",
            Self::Remote => "remote",
            Self::OtherFilesystem => "other-filesystem",
            Self::WorkerDied => "worker-died",
            Self::Undetermined => "undetermined",
            Self::Special => "special",
            Self::Symlink => "symlink",
            Self::Pseudo => "pseudo",
        }
    }

    /// Whether content that could have held a threat went unseen.
    pub const fn leaves_a_gap(self) -> bool {
        !matches!(self, Self::Special | Self::Symlink | Self::Pseudo)
    }
}

impl fmt::Display for SkipReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// One thing that was not looked at.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Skipped {
    /// The file or folder on disk.
    pub path: PathBytes,
    /// The member within it, outermost first; empty for the file itself.
    pub member: Vec<PathBytes>,
    /// Why.
    pub reason: SkipReason,
}

/// What a scan may say in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything asked for was looked at and nothing matched.
    Clean,
    /// Something matched (skips may have happened as well; they are counted).
    Detected,
    /// Nothing matched, and not everything was looked at.
    Incomplete,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Clean => "clean",
            Self::Detected => "detected",
            Self::Incomplete => "incomplete",
        })
    }
}

/// The coverage receipt: what a scan looked at and what it did not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Coverage {
    /// Files read to their end (or as far as the skips say).
    pub files: u64,
    /// Bytes of those files on disk.
    pub bytes: u64,
    /// How many of those files were not read now, because the same patterns had found them clean and the file
    /// system says that they have not changed since.
    pub known: u64,
    /// Detections reported.
    pub detections: u64,
    /// How many things were skipped, by reason.
    pub skipped: BTreeMap<SkipReason, u64>,
    /// The first skips that leave a gap, at most [`Coverage::MAX_SAMPLES`].
    pub samples: Vec<Skipped>,
    /// Wall time, in milliseconds.
    pub elapsed_ms: u64,
    /// CPU time of the scan (agent and workers, user and system), in milliseconds.
    pub cpu_ms: u64,
    /// The endpoint's signature over all of the above and the order; `None` where it could not sign.
    pub receipt: Option<Receipt>,
}

impl Coverage {
    /// How many skipped paths a receipt names.
    pub const MAX_SAMPLES: usize = 20;

    /// Counts one skip and keeps it as a sample while there is room.
    pub fn skip(&mut self, skipped: Skipped) {
        let count = self.skipped.entry(skipped.reason).or_default();
        *count = count.saturating_add(1);
        if skipped.reason.leaves_a_gap() && self.samples.len() < Self::MAX_SAMPLES {
            self.samples.push(skipped);
        }
    }

    /// The verdict that follows from the counts.
    pub fn verdict(&self) -> Verdict {
        if self.detections > 0 {
            Verdict::Detected
        } else if self.skipped.iter().any(|(reason, count)| reason.leaves_a_gap() && *count > 0) {
            Verdict::Incomplete
        } else {
            Verdict::Clean
        }
    }
}

/// Why something did not work: a code that programs compare and a sentence for the operator.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Failure {
    /// Stable, lower case, words joined by `-` (for example `pattern-fetch-failed`).
    pub code: String,
    /// What was tried and what came of it; no full stop.
    pub message: String,
}

impl Failure {
    /// Longest code and message accepted from a peer, in bytes.
    pub const MAX_TEXT: usize = 2048;

    /// Joins the two, shortening a message that would not fit a frame.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > Self::MAX_TEXT {
            let cut = (0..=Self::MAX_TEXT).rev().find(|i| message.is_char_boundary(*i)).unwrap_or(0);
            message.truncate(cut);
        }
        Self { code: code.to_owned(), message }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skip(reason: SkipReason) -> Skipped {
        Skipped { path: PathBytes(b"/x".to_vec()), member: vec![], reason }
    }

    #[test]
    fn clean_is_said_only_when_nothing_was_left_out() {
        let mut coverage = Coverage::default();
        assert_eq!(coverage.verdict(), Verdict::Clean);
        for reason in [SkipReason::Special, SkipReason::Symlink, SkipReason::Pseudo] {
            coverage.skip(skip(reason));
            assert_eq!(coverage.verdict(), Verdict::Clean, "{reason}");
        }
        coverage.skip(skip(SkipReason::Encrypted));
        assert_eq!(coverage.verdict(), Verdict::Incomplete);
        coverage.detections = 1;
        assert_eq!(coverage.verdict(), Verdict::Detected);
    }

    #[test]
    fn a_receipt_names_the_first_gaps_and_counts_them_all() {
        let mut coverage = Coverage::default();
        for _ in 0..100 {
            coverage.skip(skip(SkipReason::Limit));
            coverage.skip(skip(SkipReason::Symlink));
        }
        assert_eq!(coverage.samples.len(), Coverage::MAX_SAMPLES);
        assert_eq!(coverage.skipped[&SkipReason::Limit], 100);
        assert_eq!(coverage.skipped[&SkipReason::Symlink], 100);
    }

    #[test]
    fn long_failure_messages_are_cut_between_characters() {
        let failure = Failure::new("x", "ä".repeat(Failure::MAX_TEXT));
        assert_eq!(failure.message.len(), Failure::MAX_TEXT);
        let failure = Failure::new("x", format!("a{}", "ä".repeat(Failure::MAX_TEXT)));
        assert_eq!(failure.message.len(), Failure::MAX_TEXT - 1);
    }
}
