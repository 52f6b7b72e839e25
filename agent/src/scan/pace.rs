//! Holds a scan to a share of one core.
//!
//! A bucket of CPU time fills at the allowed rate and is emptied by what the scan has used; the scan goes on only
//! while it is not empty. Pure; what is held, and how, is `hold`.
//!
//! **Invariant:** over any time the CPU used is at most the allowed share of it, one [`BURST`], and what is used
//! between two looks.

use std::time::Duration;

/// The wall time whose allowance may be saved up while the scan waits for something else.
const BURST: Duration = Duration::from_secs(1);

/// One core, in hundredths of a percent.
const WHOLE: u32 = 10_000;

/// The bucket.
#[derive(Debug)]
pub(super) struct Pace {
    /// Of one core, in hundredths of a percent.
    share: u32,
    /// Wall time since the start, as last told.
    elapsed: Duration,
    /// CPU time since the start, as last told.
    cpu: Duration,
    /// CPU time that was used and is not allowed yet.
    debt: Duration,
    /// CPU time that is allowed and not used yet.
    credit: Duration,
}

impl Pace {
    /// A bucket that is neither full nor in debt. `percent` of one core, at least 1.
    pub(super) fn new(percent: u8) -> Self {
        let zero = Duration::ZERO;
        Self { share: u32::from(percent.max(1)) * 100, elapsed: zero, cpu: zero, debt: zero, credit: zero }
    }

    /// How long to wait, when so much wall and CPU time has gone by since the start. `halvings`: how often the share
    /// was halved since the last look, and is now.
    pub(super) fn wait(&mut self, elapsed: Duration, cpu: Duration, halvings: u32) -> Duration {
        let share = self.share.checked_shr(halvings).unwrap_or(0).max(1);
        let allowed = elapsed.saturating_sub(self.elapsed) * share / WHOLE;
        let used = cpu.saturating_sub(self.cpu);
        // The worker's CPU time comes late and may seem to go back for a moment: what was counted stays counted.
        (self.elapsed, self.cpu) = (self.elapsed.max(elapsed), self.cpu.max(cpu));
        let (income, cost) = (self.credit + allowed, self.debt + used);
        self.credit = income.saturating_sub(cost).min(BURST * share / WHOLE);
        self.debt = cost.saturating_sub(income);
        self.debt * WHOLE / share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_was_used_is_waited_for() {
        let mut pace = Pace::new(10);
        assert_eq!(pace.wait(ms(0), ms(0), 0), ms(0));
        assert_eq!(pace.wait(ms(100), ms(100), 0), ms(900), "100 ms of CPU take a second");
        assert_eq!(pace.wait(ms(600), ms(100), 0), ms(400));
        assert_eq!(pace.wait(ms(1000), ms(100), 0), ms(0));
        assert_eq!(pace.wait(ms(1000), ms(90), 0), ms(0), "time that goes back changes nothing");
    }

    #[test]
    fn a_halved_share_takes_twice_as_long() {
        let mut pace = Pace::new(10);
        assert_eq!(pace.wait(ms(0), ms(100), 1), ms(2000));
        assert_eq!(pace.wait(ms(1000), ms(100), 1), ms(1000));
        assert_eq!(pace.wait(ms(1000), ms(100), 0), ms(500), "what is still to pay is paid faster again");
        assert_eq!(pace.wait(ms(1500), ms(100), 0), ms(0));
        let mut pace = Pace::new(1);
        assert_eq!(pace.wait(ms(0), ms(12), 3), ms(10_000), "an eighth of a percent, rounded to 0.12");
        assert_eq!(Pace::new(1).wait(ms(0), ms(1), 99), ms(10_000), "a hundredth of a percent is the least");
    }

    #[test]
    fn little_is_saved_up() {
        let mut pace = Pace::new(50);
        assert_eq!(pace.wait(ms(60_000), ms(0), 0), ms(0));
        assert_eq!(pace.wait(ms(60_500), ms(500), 0), ms(0), "half a second of credit");
        assert_eq!(pace.wait(ms(61_000), ms(1500), 0), ms(1000));
    }

    #[test]
    fn any_share_holds_over_a_long_time() {
        for percent in [1, 10, 33, 100] {
            let (mut pace, mut elapsed, mut cpu) = (Pace::new(percent), ms(0), ms(0));
            for n in 0..1000_u64 {
                elapsed += pace.wait(elapsed, cpu, 0);
                let file = ms(n * 7919 % 50);
                (elapsed, cpu) = (elapsed + file, cpu + file);
            }
            let allowed = elapsed * u32::from(percent) / 100 + ms(1050);
            assert!(cpu <= allowed, "{percent} %: {cpu:?} in {elapsed:?}");
        }
    }
}
