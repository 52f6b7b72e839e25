//! What a scan is likely to cost, said before it.

use std::collections::BTreeMap;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::report::SkipReason;

/// What a scan would look at now, and what that is likely to cost. Nothing was read for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Quote {
    /// Files that the scan would look at, those that are known clean among them.
    pub files: u64,
    /// Bytes of those files on disk.
    pub bytes: u64,
    /// How many of them are known clean and would not be read.
    pub known: u64,
    /// Bytes of those.
    pub known_bytes: u64,
    /// What would be skipped, by reason, as far as it shows without reading.
    pub skipped: BTreeMap<SkipReason, u64>,
    /// What it is likely to cost; `None` where there is no past scan to estimate from.
    pub estimate: Option<Estimate>,
    /// Wall time that it took to find out, in milliseconds.
    pub elapsed_ms: u64,
    /// CPU time that it took to find out, in milliseconds.
    pub cpu_ms: u64,
}

/// What a scan is likely to cost, as past scans of the same endpoint went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct Estimate {
    /// CPU time, in milliseconds.
    pub cpu_ms: u64,
    /// Wall time, in milliseconds.
    pub elapsed_ms: u64,
    /// From how many past scans.
    pub runs: u32,
    /// Whether they were with the same patterns. Others tell less.
    pub same_patterns: bool,
}
