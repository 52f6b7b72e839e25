//! How long to wait before the next attempt: full jitter, so that a fleet does not come back all at once.
//!
//! Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015 ("full jitter").

use std::time::Duration;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(300);

/// The wait after `failures` failed attempts in a row; `chance` is drawn evenly from 0 to 1.
pub(crate) fn wait(failures: u32, chance: f64) -> Duration {
    let ceiling = FIRST.saturating_mul(2u32.saturating_pow(failures.saturating_add(1))).min(LONGEST);
    FIRST.max(ceiling.mul_f64(chance.clamp(0.0, 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_five_minutes_and_are_spread_evenly() {
        for failures in 0..64 {
            for chance in [0.0, 0.3, 1.0] {
                let wait = wait(failures, chance);
                assert!(wait >= FIRST && wait <= LONGEST, "{failures} {chance} {wait:?}");
            }
        }
        assert_eq!((wait(0, 0.0), wait(0, 1.0)), (Duration::from_secs(1), Duration::from_secs(2)));
        assert_eq!(wait(4, 0.5), Duration::from_secs(16));
        assert_eq!(wait(30, 1.0), LONGEST);
    }
}
