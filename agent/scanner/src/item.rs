//! What goes to a worker and what comes back.

use std::os::fd::OwnedFd;

use bincode::{Decode, Encode};
use tm_protocol::{
    ids::Sha256,
    report::{PathBytes, SkipReason},
};

/// An open regular file to look at. Paths stay with the caller: a worker has no use for them.
#[derive(Debug)]
pub struct Item {
    /// The caller's number for it; comes back with the result.
    pub id: u64,
    /// Opened for reading, positioned anywhere.
    pub file: OwnedFd,
}

/// What became of an item. Every submitted item gets exactly one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ItemResult {
    /// From [`Item`].
    pub id: u64,
    /// What was found in it and what was not looked at.
    pub findings: Findings,
}

/// What was found in a file and what was not looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Findings {
    /// Rules that matched, on the file itself or on members.
    pub matches: Vec<Match>,
    /// Parts that were not looked at; an empty `member` means the file itself.
    pub skips: Vec<Skip>,
    /// Digest of the file on disk; present if anything matched.
    pub sha256: Option<Sha256>,
    /// Size of the file on disk when it was opened by the worker, in bytes.
    pub size: u64,
}

/// A rule matched.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Match {
    /// Names from the outermost container inward; empty for the file itself.
    pub member: Vec<PathBytes>,
    /// The pattern that holds the rule.
    pub pattern: Sha256,
    /// The rule.
    pub rule: String,
}

/// Something was not looked at.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Skip {
    /// Names from the outermost container inward; empty for the file itself.
    pub member: Vec<PathBytes>,
    /// Why.
    pub reason: SkipReason,
}
