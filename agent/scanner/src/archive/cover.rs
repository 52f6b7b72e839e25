//! Which bytes of a container belong to something that its directory tells of.

use tm_protocol::report::SkipReason;

use super::{
    Walk,
    field::{self, len},
};

/// Ranges, each with its start and its end.
#[derive(Debug, Default)]
pub(super) struct Cover(Vec<(u64, u64)>);

impl Cover {
    /// Adds a range.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        if end > start {
            self.0.push((start, end));
        }
    }

    /// Looks at what nothing covers as at members. Says whether that is nothing but zeros, and nothing is
    /// covered twice or is beyond the end. `Err` ends the container.
    pub(super) fn close(mut self, walk: &mut Walk<'_>, bytes: &[u8]) -> Result<bool, SkipReason> {
        self.0.sort_unstable();
        let mut sound = true;
        let mut at = 0;
        let all = len(bytes);
        for (start, end) in self.0.into_iter().chain([(all, all)]) {
            if start > at {
                let gap = field::after_zeros(field::part(bytes, at, start - at).0);
                sound &= gap.is_empty();
                walk.behind(gap)?;
            }
            sound &= end <= all && (start >= at || start == end);
            at = at.max(end);
        }
        Ok(sound)
    }
}
