//! What an agent says about what it found and did.

use std::{collections::BTreeMap, fmt};

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::ids::Sha256;

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
