//! Tasks: one order for one endpoint, and the five words for how far it has come.

use std::fmt;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::{
    ids::{Sha256, VaultId},
    report::PathBytes,
};

/// What an endpoint is ordered to do. Variants are only ever added at the end.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum TaskSpec {
    /// Look at files with patterns.
    Scan(ScanSpec),
    /// Remove what was detected.
    Cleanup(CleanupSpec),
    /// Put vaulted files back.
    Restore(RestoreSpec),
}

impl TaskSpec {
    /// The kind's word, in every output and in the store.
    pub fn kind(&self) -> TaskKind {
        match self {
            Self::Scan(_) => TaskKind::Scan,
            Self::Cleanup(_) => TaskKind::Cleanup,
            Self::Restore(_) => TaskKind::Restore,
        }
    }
}

/// The kinds of task that this build knows. An agent lists its own in `Hello`; it is sent no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskKind {
    /// Look at files with patterns.
    Scan,
    /// Remove what was detected.
    Cleanup,
    /// Put vaulted files back.
    Restore,
}

impl TaskKind {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::Scan, Self::Cleanup, Self::Restore];

    /// The number that stands for it in `Hello`.
    pub const fn number(self) -> u16 {
        match self {
            Self::Scan => 1,
            Self::Cleanup => 2,
            Self::Restore => 3,
        }
    }

    /// The word for it in every output and in the store.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Scan => "scan",
            Self::Cleanup => "cleanup",
            Self::Restore => "restore",
        }
    }

    /// Whether it changes the endpoint. At most one such task is carried out at a time.
    pub const fn changes_host(self) -> bool {
        match self {
            Self::Scan => false,
            Self::Cleanup | Self::Restore => true,
        }
    }
}

impl fmt::Display for TaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A scan: where, with what, and how far.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ScanSpec {
    /// Absolute paths of files and folders, at most [`ScanSpec::MAX_PATHS`]. None are needed where the options say
    /// what to look at ([`ScanOptions::contradiction`]).
    pub paths: Vec<PathBytes>,
    /// The patterns to look with, by digest; the agent fetches those it does not hold.
    pub patterns: Vec<PatternRef>,
    /// How far to go with one file.
    pub limits: ScanLimits,
    /// How to go about it.
    pub options: ScanOptions,
}

/// How a scan goes about its work. Orders are stored by these names; what an older one lacks is not set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScanOptions {
    /// Go on into other file systems of the same machine; without it they are skipped (`other-filesystem`).
    pub all_local: bool,
    /// Most CPU time in percent of one core, on average, 1 to 100; `None` is no limit. A scan that is held so also
    /// reads only what nobody else wants to read, and takes less while others wait.
    pub cpu_percent: Option<u8>,
    /// Look at what runs, what starts by itself, and where things are dropped; paths are looked at besides.
    pub quick: bool,
    /// Look at every local file system; no path stands beside it.
    pub full: bool,
    /// Look at the memory of running processes, too.
    pub processes: bool,
    /// Read everything again, also what is known clean.
    pub fresh: bool,
    /// Read nothing, and say what the scan would look at and what that is likely to cost.
    pub dry_run: bool,
}

impl ScanOptions {
    /// The share of one core that a scan in the background gets, in percent.
    pub const BACKGROUND_PERCENT: u8 = 10;

    /// Why nothing can be meant by this beside so many paths, as a sentence without its full stop.
    pub fn contradiction(&self, paths: usize) -> Option<&'static str> {
        if self.cpu_percent.is_some_and(|percent| !(1..=100).contains(&percent)) {
            Some("the share of a core is from 1 to 100 percent")
        } else if self.quick && self.full {
            Some("a scan is quick or full, not both")
        } else if self.full && paths > 0 {
            Some("a full scan looks at every local file system; name no path beside it")
        } else if paths == 0 && !self.quick && !self.full && !self.processes {
            Some("there is nothing to look at: name a path, or ask for a quick or full scan or for processes")
        } else {
            None
        }
    }
}

impl ScanSpec {
    /// Most paths in one order.
    pub const MAX_PATHS: usize = 256;
    /// Longest path in an order, in bytes.
    pub const MAX_PATH: usize = 4096;
    /// Most patterns in one order.
    pub const MAX_PATTERNS: usize = 256;
}

/// A cleanup: which detections to remove. Only what this agent itself detected and noted can be named; a path
/// cannot.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct CleanupSpec {
    /// [`crate::report::Detection::key`] of each, 1 to [`CleanupSpec::MAX_DETECTIONS`].
    pub detections: Vec<Sha256>,
    /// Say what would be done and change nothing.
    pub dry_run: bool,
}

impl CleanupSpec {
    /// Most detections in one order.
    pub const MAX_DETECTIONS: usize = 1000;
}

/// A restore: which vaulted files to put back.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RestoreSpec {
    /// Their ids, 1 to [`RestoreSpec::MAX_ITEMS`].
    pub items: Vec<VaultId>,
    /// An absolute path to put the one item at instead; only with one item.
    pub to: Option<PathBytes>,
    /// Restore set-user-id and set-group-id bits and file capabilities too.
    pub set_id: bool,
    /// Say what would be done and change nothing.
    pub dry_run: bool,
}

impl RestoreSpec {
    /// Most items in one order.
    pub const MAX_ITEMS: usize = 1000;
}

/// Names a pattern by its content.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
pub struct PatternRef {
    /// SHA-256 of the pattern's bytes.
    pub sha256: Sha256,
    /// Its length, in bytes.
    pub size: u64,
    /// What people call it.
    pub name: String,
}

/// Limits for one file and the tree of containers in it. A limit that is reached is a skip with the reason
/// `limit` (or `timeout`), never silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScanLimits {
    /// Largest file that rules are run on, in bytes.
    pub file_bytes: u64,
    /// How many containers deep to look; 0 reads containers raw only.
    pub depth: u32,
    /// Most members in the whole tree of one file.
    pub members: u32,
    /// Largest member, unpacked, in bytes.
    pub member_bytes: u64,
    /// Most unpacked bytes in the whole tree of one file.
    pub total_bytes: u64,
    /// Largest unpacked : packed ratio of one member.
    pub ratio: u32,
    /// Longest time for one file, in milliseconds.
    pub file_ms: u64,
}

impl Default for ScanLimits {
    fn default() -> Self {
        Self {
            file_bytes: 1 << 30,
            depth: 8,
            members: 10_000,
            member_bytes: 256 << 20,
            total_bytes: 1 << 30,
            ratio: 1000,
            file_ms: 120_000,
        }
    }
}

/// How far a task has come. `Done` is said only when the effect was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TaskState {
    /// Stored on the manager.
    Queued,
    /// Accepted by the agent.
    Delivered,
    /// Being carried out.
    Running,
    /// Carried out and checked.
    Done,
    /// Not carried out, or not known to be; a code says why.
    Failed,
    /// Called off by a person.
    Cancelled,
    /// Not begun in time.
    Expired,
    /// The agent or the manager would not do it; a code says why.
    Refused,
}

impl TaskState {
    /// Every state.
    pub const ALL: [Self; 8] = [
        Self::Queued,
        Self::Delivered,
        Self::Running,
        Self::Done,
        Self::Failed,
        Self::Cancelled,
        Self::Expired,
        Self::Refused,
    ];

    /// The word for it in every output and in the store.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Delivered => "delivered",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Refused => "refused",
        }
    }

    /// Reads [`TaskState::word`] back.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.word() == word)
    }

    /// Whether nothing can follow.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled | Self::Expired | Self::Refused)
    }

    /// Whether a task may go from `self` to `next`. A final state is never left, and none is re-entered.
    pub const fn may_become(self, next: Self) -> bool {
        match self {
            Self::Queued => !matches!(next, Self::Queued),
            Self::Delivered => !matches!(next, Self::Queued | Self::Delivered),
            Self::Running => matches!(next, Self::Done | Self::Failed | Self::Cancelled),
            Self::Done | Self::Failed | Self::Cancelled | Self::Expired | Self::Refused => false,
        }
    }
}

impl fmt::Display for TaskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_contradicts_itself_is_told() {
        let set = |change: fn(&mut ScanOptions)| {
            let mut options = ScanOptions::default();
            change(&mut options);
            options
        };
        for (options, paths, word) in [
            (set(|_| {}), 0, "nothing to look at"),
            (set(|o| o.fresh = true), 0, "nothing to look at"),
            (set(|o| o.cpu_percent = Some(0)), 1, "1 to 100"),
            (set(|o| o.cpu_percent = Some(101)), 1, "1 to 100"),
            (set(|o| (o.quick, o.full) = (true, true)), 0, "quick or full"),
            (set(|o| o.full = true), 1, "no path"),
        ] {
            let said = options.contradiction(paths).expect("it is refused");
            assert!(said.contains(word), "{options:?}: {said}");
        }
        for (options, paths) in [
            (set(|_| {}), 1),
            (set(|o| o.cpu_percent = Some(100)), 1),
            (set(|o| o.quick = true), 0),
            (set(|o| o.quick = true), 2),
            (set(|o| o.full = true), 0),
            (set(|o| (o.processes, o.dry_run) = (true, true)), 0),
        ] {
            assert_eq!(options.contradiction(paths), None, "{options:?}");
        }
    }

    #[test]
    fn options_of_an_older_order_are_read() {
        let old: ScanOptions = serde_json::from_str(r#"{"all_local":true,"cpu_percent":5}"#).unwrap();
        assert_eq!(old, ScanOptions { all_local: true, cpu_percent: Some(5), ..ScanOptions::default() });
        assert!(serde_json::from_str::<ScanOptions>(r#"{"slowly":true}"#).is_err());
    }

    #[test]
    fn states_only_move_forward_and_final_ones_stay() {
        for from in TaskState::ALL {
            assert_eq!(TaskState::from_word(from.word()), Some(from));
            assert!(!from.may_become(from), "{from}");
            assert!(!from.may_become(TaskState::Queued), "{from}");
            assert_eq!(from.is_final(), TaskState::ALL.iter().all(|to| !from.may_become(*to)), "{from}");
        }
    }
}
