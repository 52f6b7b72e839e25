//! The incident's state machine (product words, section 3.1), as far as scans, cleanups and restores move it.

use tm_api::event::IncidentState;

/// What can happen to an incident.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Happened {
    /// A cleanup of it was ordered that is no dry run.
    Ordered,
    /// No cleanup works on it (any more).
    Ended {
        /// Detections of it that are not settled, each counted once.
        open: u64,
        /// Of these, those that a cleanup tried to settle and could or would not.
        stubborn: u64,
        /// The state that the cleanup found it in.
        before: IncidentState,
    },
    /// A file of it is back in its place by order.
    Restored,
    /// A file of it was to be put back and could not.
    NotRestored,
}

/// The state that follows; `None` if it stays what it is.
///
/// An incident that was put back is cleaned again only if somebody names its detections.
pub(crate) const fn step(state: IncidentState, happened: Happened) -> Option<IncidentState> {
    match happened {
        Happened::Ordered => match state {
            IncidentState::AwaitingCleanup
            | IncidentState::Unresolved
            | IncidentState::RolledBack
            | IncidentState::RollbackFailed => Some(IncidentState::Cleaning),
            IncidentState::Cleaning | IncidentState::Resolved => None,
        },
        Happened::Ended { open: 0, .. } => match state {
            IncidentState::Cleaning | IncidentState::AwaitingCleanup | IncidentState::Unresolved => {
                Some(IncidentState::Resolved)
            }
            IncidentState::Resolved | IncidentState::RolledBack | IncidentState::RollbackFailed => None,
        },
        Happened::Ended { stubborn: 1.., .. } => match state {
            // Also where it seemed resolved and a file of it came back.
            IncidentState::Cleaning | IncidentState::AwaitingCleanup | IncidentState::Resolved => {
                Some(IncidentState::Unresolved)
            }
            IncidentState::Unresolved | IncidentState::RolledBack | IncidentState::RollbackFailed => None,
        },
        // Nothing that remains was tried: it waits as it did.
        Happened::Ended { before, .. } => match (state, before) {
            (IncidentState::Cleaning, IncidentState::Cleaning | IncidentState::Resolved) => {
                Some(IncidentState::AwaitingCleanup)
            }
            (
                IncidentState::Cleaning,
                IncidentState::AwaitingCleanup
                | IncidentState::Unresolved
                | IncidentState::RolledBack
                | IncidentState::RollbackFailed,
            ) => Some(before),
            (
                IncidentState::AwaitingCleanup
                | IncidentState::Unresolved
                | IncidentState::Resolved
                | IncidentState::RolledBack
                | IncidentState::RollbackFailed,
                _,
            ) => None,
        },
        Happened::Restored => match state {
            IncidentState::Resolved | IncidentState::RollbackFailed => Some(IncidentState::RolledBack),
            IncidentState::AwaitingCleanup
            | IncidentState::Cleaning
            | IncidentState::Unresolved
            | IncidentState::RolledBack => None,
        },
        Happened::NotRestored => match state {
            IncidentState::Resolved | IncidentState::RolledBack => Some(IncidentState::RollbackFailed),
            IncidentState::AwaitingCleanup
            | IncidentState::Cleaning
            | IncidentState::Unresolved
            | IncidentState::RollbackFailed => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use IncidentState::{AwaitingCleanup, Cleaning, Resolved, RollbackFailed, RolledBack, Unresolved};

    const fn ended(open: u64, stubborn: u64, before: IncidentState) -> Happened {
        Happened::Ended { open, stubborn, before }
    }

    #[test]
    fn an_incident_moves_as_the_words_say() {
        for (state, happened, next) in [
            (AwaitingCleanup, Happened::Ordered, Some(Cleaning)),
            (Unresolved, Happened::Ordered, Some(Cleaning)),
            (RolledBack, Happened::Ordered, Some(Cleaning)),
            // A second task of the same order.
            (Cleaning, Happened::Ordered, None),
            (Resolved, Happened::Ordered, None),
            (Cleaning, ended(0, 0, AwaitingCleanup), Some(Resolved)),
            (Cleaning, ended(2, 1, AwaitingCleanup), Some(Unresolved)),
            // Called off, expired or failed before anything happened; or only a part was asked for.
            (Cleaning, ended(2, 0, AwaitingCleanup), Some(AwaitingCleanup)),
            (Cleaning, ended(2, 0, Unresolved), Some(Unresolved)),
            (Cleaning, ended(1, 0, RolledBack), Some(RolledBack)),
            // An item that is told after its task has ended.
            (AwaitingCleanup, ended(0, 0, AwaitingCleanup), Some(Resolved)),
            (AwaitingCleanup, ended(1, 1, AwaitingCleanup), Some(Unresolved)),
            (Unresolved, ended(0, 0, AwaitingCleanup), Some(Resolved)),
            (Unresolved, ended(1, 0, AwaitingCleanup), None),
            (Resolved, ended(1, 1, AwaitingCleanup), Some(Unresolved)),
            (Resolved, ended(0, 0, AwaitingCleanup), None),
            (Resolved, Happened::Restored, Some(RolledBack)),
            (Resolved, Happened::NotRestored, Some(RollbackFailed)),
            (RollbackFailed, Happened::Restored, Some(RolledBack)),
            (Unresolved, Happened::Restored, None),
        ] {
            assert_eq!(step(state, happened), next, "{state} {happened:?}");
        }
    }

    #[test]
    fn nothing_stays_cleaning_when_no_cleanup_works_on_it() {
        for before in IncidentState::ALL {
            for open in 0..3 {
                for stubborn in 0..=open {
                    let next = step(Cleaning, ended(open, stubborn, *before));
                    assert!(next.is_some_and(|next| next != Cleaning), "{before} {open} {stubborn}");
                    assert_eq!(next == Some(Resolved), open == 0, "{before} {open} {stubborn}");
                }
            }
        }
    }

    #[test]
    fn a_step_that_is_one_changes_something_and_settles() {
        let mut all = vec![Happened::Ordered, Happened::Restored, Happened::NotRestored];
        all.extend(IncidentState::ALL.iter().map(|before| ended(1, 1, *before)));
        for state in IncidentState::ALL {
            for happened in &all {
                let next = step(*state, *happened);
                assert_ne!(next, Some(*state), "{state} {happened:?}");
                if let Some(next) = next {
                    assert_eq!(step(next, *happened), None, "{state} {happened:?} twice");
                }
            }
        }
    }
}
