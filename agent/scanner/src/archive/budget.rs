//! What one file may cost: members, bytes, memory, time. Counted over its whole tree of containers.
//!
//! Members lie in this process's memory, whatever their size. An unnamed file in memory would be the same
//! pages, and a worker has no disk of its own; so the amount is what is limited.
//!
//! **Invariant:** no header's claim is allocated for. What is held is what has come out of a decoder, and a
//! decoder's own working memory is refused before the decoder is built.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tm_protocol::task::ScanLimits;

/// Output below this size is never judged by its ratio: short texts can be very compressible.
const RATIO_FREE: u64 = 1 << 20;
/// The same for everything that comes out of one file, layer upon layer.
const TREE_RATIO_FREE: u64 = 16 << 20;
/// Most memory that members and decoders of one file take at one time, in bytes.
const MEMORY: u64 = 384 << 20;
/// A thread that needs more than this has the rest of [`MEMORY`] for itself: others wait.
const LIGHT: u64 = 24 << 20;
/// Largest dictionary (window, model) of a decoder, in bytes.
const WORKSPACE: u64 = 256 << 20;

/// Held by the one thread of the worker that needs much memory.
static HEAVY: Mutex<()> = Mutex::new(());

/// What is left for one file.
pub(super) struct Budget<'a> {
    limits: &'a ScanLimits,
    deadline: Instant,
    members: u32,
    unpacked: u64,
    unpacked_limit: u64,
    viewed: u64,
    charged: u64,
    held: u64,
    heavy: Option<MutexGuard<'static, ()>>,
}

impl<'a> Budget<'a> {
    /// For a file of `file_bytes`, begun at `now`.
    pub(super) fn new(limits: &'a ScanLimits, file_bytes: u64, now: Instant) -> Self {
        let by_ratio = file_bytes.saturating_mul(u64::from(limits.ratio)).max(TREE_RATIO_FREE);
        Self {
            limits,
            deadline: now + Duration::from_millis(limits.file_ms),
            members: 0,
            unpacked: 0,
            unpacked_limit: limits.total_bytes.min(by_ratio),
            viewed: 0,
            charged: 0,
            held: 0,
            heavy: None,
        }
    }

    /// What is left of the file's time; `None` when it is up.
    pub(super) fn time_left(&self) -> Option<Duration> {
        self.deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Whether containers at this depth (0 = the file itself) may be looked into.
    pub(super) fn allows_depth(&self, depth: usize) -> bool {
        u32::try_from(depth).is_ok_and(|depth| depth < self.limits.depth)
    }

    /// Counts one member; `false` if it is one too many.
    pub(super) fn count_member(&mut self) -> bool {
        let room = self.members < self.limits.members;
        self.members += u32::from(room);
        room
    }

    /// Counts bytes that are judged where they lie, as a member's; `false` if they are too many. A container
    /// can name the same bytes again and again.
    pub(super) fn view(&mut self, bytes: u64) -> bool {
        let sum = self.viewed.saturating_add(bytes);
        let room = sum <= self.limits.total_bytes && bytes <= self.limits.member_bytes;
        if room {
            self.viewed = sum;
        }
        room
    }

    /// Counts bytes that a decoder reads; `false` if they are too many, for the same reason.
    pub(super) fn charge(&mut self, bytes: u64) -> bool {
        self.charged = self.charged.saturating_add(bytes);
        self.charged <= self.limits.total_bytes
    }

    /// Whether a decoder may take `workspace` bytes for itself.
    pub(super) fn has_workspace(&self, workspace: u64) -> bool {
        workspace <= WORKSPACE && self.held.saturating_add(workspace) < MEMORY
    }

    /// Whether nothing more may come out of any decoder.
    pub(super) fn is_spent(&self) -> bool {
        self.unpacked >= self.unpacked_limit
    }

    /// The most that one member, packed into `packed` bytes, may unpack to.
    pub(super) fn room(&self, packed: u64) -> u64 {
        let by_ratio = packed.saturating_mul(u64::from(self.limits.ratio)).max(RATIO_FREE);
        self.limits
            .member_bytes
            .min(by_ratio)
            .min(self.unpacked_limit.saturating_sub(self.unpacked))
            .min(MEMORY.saturating_sub(self.held))
    }

    /// Takes memory, or more of it. Waits while another thread of this worker holds much.
    pub(super) fn hold(&mut self, bytes: u64) {
        self.held = self.held.saturating_add(bytes);
        if self.held > LIGHT && self.heavy.is_none() {
            self.heavy = Some(HEAVY.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Counts what has come out of a decoder.
    pub(super) fn unpacked(&mut self, bytes: u64) {
        self.unpacked = self.unpacked.saturating_add(bytes);
    }

    /// Gives memory back.
    pub(super) fn release(&mut self, bytes: u64) {
        self.held = self.held.saturating_sub(bytes);
        if self.held <= LIGHT {
            self.heavy = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_for_the_whole_tree() {
        let limits = ScanLimits { members: 2, total_bytes: 100, ..ScanLimits::default() };
        let mut budget = Budget::new(&limits, 1000, Instant::now());
        assert!(budget.count_member() && budget.count_member() && !budget.count_member());
        assert!(budget.view(60) && !budget.view(60) && budget.view(40));
        budget.unpacked(60);
        assert_eq!(budget.room(1000), 40);
        assert!(!budget.is_spent());
        budget.unpacked(40);
        assert_eq!(budget.room(1000), 0);
        assert!(budget.is_spent());
    }

    #[test]
    fn memory_is_limited_and_given_back() {
        let limits = ScanLimits::default();
        let mut budget = Budget::new(&limits, 1 << 30, Instant::now());
        assert!(budget.has_workspace(WORKSPACE) && !budget.has_workspace(WORKSPACE + 1));
        assert!(!budget.has_workspace(4 << 30));
        budget.hold(200 << 20);
        assert!(!budget.has_workspace(WORKSPACE), "members and decoders share it");
        assert_eq!(budget.room(1 << 30), 184 << 20);
        assert!(budget.heavy.is_some());
        budget.release(200 << 20);
        assert!(budget.heavy.is_none());
    }

    #[test]
    fn layers_that_multiply_are_one_bomb() {
        let limits = ScanLimits::default();
        let mut budget = Budget::new(&limits, 1000, Instant::now());
        budget.unpacked(TREE_RATIO_FREE - 10);
        assert_eq!(budget.room(1 << 20), 10);
    }
}
