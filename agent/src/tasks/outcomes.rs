//! How long ended tasks are remembered, and how the newest of them ended, for a manager that was set back to an earlier state and asks again. Pure.
//!
//! **Invariant:** at most [`MOST`] bytes are kept, and the oldest go first.

use std::collections::VecDeque;

use tm_protocol::{
    ids::TaskId,
    message::{Outcome, ReportBody},
    report::Failure,
};

use super::journal::decode_report;

/// The shortest time for which an ended task is remembered after the manager has stored its end, in milliseconds:
/// until it has, it hands the task out again.
///
/// A manager that was restored from an older copy hands out again what it does not know to have ended: a day is for
/// copies of every night.
pub(super) const REMEMBER_MS: u64 = 26 * 3_600_000;
/// Bytes of last reports that are kept, and the longest of them.
const MOST: usize = 4 << 20;
const LONGEST: usize = 64 << 10;

/// Frames of last reports, oldest first.
#[derive(Debug, Default)]
pub(super) struct Outcomes {
    frames: VecDeque<(TaskId, Vec<u8>)>,
    bytes: usize,
}

impl Outcomes {
    /// Keeps a last report as long as there is room; the tasks of those that there is no room for.
    pub(super) fn keep(&mut self, task: TaskId, frame: Vec<u8>) -> Vec<TaskId> {
        if frame.len() > LONGEST {
            return vec![task];
        }
        self.forget(task);
        self.bytes += frame.len();
        self.frames.push_back((task, frame));
        let mut forgotten = Vec::new();
        while self.bytes > MOST
            && let Some((oldest, frame)) = self.frames.pop_front()
        {
            self.bytes -= frame.len();
            forgotten.push(oldest);
        }
        forgotten
    }

    /// Forgets one.
    pub(super) fn forget(&mut self, task: TaskId) {
        if let Some(at) = self.frames.iter().position(|(of, _)| *of == task)
            && let Some((_, frame)) = self.frames.remove(at)
        {
            self.bytes -= frame.len();
        }
    }

    /// What tells the end of a task once more; without details where they are not kept.
    pub(super) fn tell(&self, task: TaskId) -> ReportBody {
        let frame = self.frames.iter().find(|(of, _)| *of == task);
        frame.and_then(|(_, frame)| decode_report(frame)).map_or_else(
            || {
                let why = "the task ended before; how is not remembered here any more";
                ReportBody::Finished { task, outcome: Outcome::Failed(Failure::new("ended-before", why)) }
            },
            |report| report.body,
        )
    }
}

/// An order is recognised for twice the time for which it may wait.
pub(super) fn remember_ms(expires_in_ms: u64) -> u64 {
    expires_in_ms.saturating_mul(2).max(REMEMBER_MS)
}

#[cfg(test)]
mod tests {
    use tm_protocol::message::Report;
    use uuid::Uuid;

    use super::*;
    use crate::tasks::journal::encode_report;

    fn id(n: u128) -> TaskId {
        TaskId::new(Uuid::from_u128(n))
    }

    fn frame(task: TaskId) -> Vec<u8> {
        let body = ReportBody::Finished { task, outcome: Outcome::Expired };
        encode_report(&Report { sequence: 9, at_ms: 1, body }).unwrap()
    }

    #[test]
    fn an_end_is_told_again_as_it_was_and_where_it_is_not_kept_that_is_said() {
        let mut outcomes = Outcomes::default();
        assert!(outcomes.keep(id(1), frame(id(1))).is_empty());
        let expired =
            |body: &ReportBody| matches!(body, ReportBody::Finished { outcome: Outcome::Expired, .. });
        assert!(expired(&outcomes.tell(id(1))));
        let other = outcomes.tell(id(2));
        let ReportBody::Finished { task, outcome: Outcome::Failed(failure) } = other else {
            panic!("{other:?}")
        };
        assert_eq!((task, failure.code.as_str()), (id(2), "ended-before"));
        outcomes.forget(id(1));
        assert!(!expired(&outcomes.tell(id(1))));
        assert_eq!(outcomes.bytes, 0);
    }

    #[test]
    fn the_oldest_go_first_and_none_is_too_long() {
        let mut outcomes = Outcomes::default();
        assert_eq!(outcomes.keep(id(1), vec![0; LONGEST + 1]), [id(1)]);
        let fit = u128::try_from(MOST / LONGEST).unwrap();
        for n in 1..=fit {
            assert!(outcomes.keep(id(n), vec![0; LONGEST]).is_empty());
        }
        assert!(outcomes.keep(id(1), vec![0; LONGEST]).is_empty(), "the same again takes no more room");
        assert_eq!(outcomes.keep(id(99), vec![0; LONGEST]), [id(2)], "the first is younger by now");
        assert_eq!(outcomes.bytes, MOST);
    }
}
