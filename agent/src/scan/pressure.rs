//! How a scan that is held to a share makes room when others wait: pure.
//!
//! The share is halved every two seconds while the pressure is high, down to a quarter, and doubled back while it is
//! low. It never comes to a stop: where somebody always waits, a scan would never end, and what is never looked at
//! helps nobody.

use std::time::Duration;

/// How often the pressure is asked for. The kernel works it out anew every two seconds.
const EVERY: Duration = Duration::from_secs(2);
/// Pressure from which on room is made, in hundredths of a percent.
const HIGH: u32 = 4_000;
/// Pressure below which room is taken back.
const LOW: u32 = 2_000;
/// How often the share may be halved.
const MOST: u32 = 2;

/// How much room is made.
#[derive(Debug, Default)]
pub(super) struct Ease {
    halvings: u32,
    /// When the pressure is asked for next, since the start.
    next: Duration,
}

impl Ease {
    /// How often the share is halved now, when so much time has gone by since the start. `pressure` is asked at most
    /// every two seconds; it answers in hundredths of a percent, and nothing if no pressure is known.
    pub(super) fn halvings(&mut self, elapsed: Duration, pressure: impl FnOnce() -> Option<u32>) -> u32 {
        if elapsed >= self.next {
            self.next = elapsed + EVERY;
            self.halvings = step(self.halvings, pressure());
        }
        self.halvings
    }
}

/// Between the two marks nothing changes, so that the share does not swing.
fn step(halvings: u32, pressure: Option<u32>) -> u32 {
    match pressure {
        Some(pressure) if pressure >= HIGH => (halvings + 1).min(MOST),
        Some(pressure) if pressure >= LOW => halvings,
        Some(_) | None => halvings.saturating_sub(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_halved_under_pressure_and_comes_back() {
        let mut ease = Ease::default();
        let mut now = Duration::ZERO;
        for (pressure, expected) in [
            (Some(0), 0),
            (Some(3_999), 0),
            (Some(4_000), 1),
            (Some(10_000), 2),
            (Some(3_000), 2),
            (Some(10_000), 2),
            (Some(2_000), 2),
            (Some(1_999), 1),
            (Some(0), 0),
            (Some(0), 0),
            (Some(10_000), 1),
            (None, 0),
            (None, 0),
        ] {
            assert_eq!(ease.halvings(now, || pressure), expected, "{now:?}: {pressure:?}");
            now += EVERY;
        }
    }

    #[test]
    fn the_pressure_is_not_asked_for_all_the_time() {
        let mut ease = Ease::default();
        let mut asked = 0;
        for tenth in 0..100 {
            ease.halvings(Duration::from_millis(tenth * 100), || {
                asked += 1;
                Some(10_000)
            });
        }
        assert_eq!(asked, 5);
    }
}
