//! What a manager last said that the time is, and what follows from it.
//!
//! `clock.json`: the boot in which it was said, the manager's wall time, and how long the machine had run by then.
//!
//! **Invariant:** what is kept is a lower bound of the true time, whatever this machine's own clock says.

use std::{fs, io};

use serde::{Deserialize, Serialize};

use crate::paths::{Paths, replace};

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    manager_ms: i64,
    elapsed_ms: i64,
}

/// The manager's wall time less elapsed time (which counts suspend), in milliseconds, as far as is known: exact if
/// the machine has not been restarted since, and too small by the time that it was off otherwise.
pub(crate) fn last_known(paths: &Paths, boot_id: &str) -> Option<i64> {
    let kept: Kept = serde_json::from_slice(&fs::read(paths.clock()).ok()?).ok()?;
    if kept.boot_id == boot_id { kept.manager_ms.checked_sub(kept.elapsed_ms) } else { Some(kept.manager_ms) }
}

/// Keeps what a manager said, as an offset to elapsed time.
///
/// # Errors
/// If the disk does not take it.
pub(crate) fn keep(paths: &Paths, boot_id: &str, offset_ms: i64, elapsed_ms: i64) -> io::Result<()> {
    let manager_ms = offset_ms.saturating_add(elapsed_ms);
    let kept = Kept { boot_id: boot_id.to_owned(), manager_ms, elapsed_ms };
    replace(&paths.clock(), &serde_json::to_vec(&kept)?)
}

/// Whether a certificate that is good from `begin` to `end` is to be renewed at `now` (all in milliseconds since 1970
/// by the manager's clock): after two thirds of its time and up to a twentieth more (`spread`, 0 to 1), or, while
/// something `is_busy`, after five sixths.
pub(crate) fn is_renewal_due(now: i64, begin: i64, end: i64, spread: f64, is_busy: bool) -> bool {
    let life = end.saturating_sub(begin).max(0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "any moment nearby will do"
    )]
    let later = (life as f64 / 20.0 * spread.clamp(0.0, 1.0)) as i64;
    let after = if is_busy { life / 6 * 5 } else { life / 3 * 2 };
    now >= begin.saturating_add(after).saturating_add(later)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_said_outlives_restarts_of_the_agent_and_of_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path().to_path_buf());
        assert_eq!(last_known(&paths, "a"), None);
        keep(&paths, "a", 1_000_000, 5_000).unwrap();
        assert_eq!(last_known(&paths, "a"), Some(1_000_000));
        assert_eq!(last_known(&paths, "b"), Some(1_005_000));
        fs::write(paths.clock(), "{").unwrap();
        assert_eq!(last_known(&paths, "a"), None);
    }

    #[test]
    fn renewal_is_due_after_two_thirds_and_later_while_busy() {
        for (now, spread, busy, due) in [
            (659, 0.0, false, false),
            (666, 0.0, false, true),
            (690, 1.0, false, false),
            (717, 1.0, false, true),
            (800, 0.0, true, false),
            (840, 0.0, true, true),
            (2000, 1.0, true, true),
        ] {
            assert_eq!(is_renewal_due(now, 0, 1000, spread, busy), due, "{now} {spread} {busy}");
        }
        assert!(is_renewal_due(5, 9, 3, 0.5, false) || !is_renewal_due(5, 9, 3, 0.5, false), "no panic");
    }
}
