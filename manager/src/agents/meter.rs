//! How fast one agent is read.
//!
//! A message is read whole and charged afterwards; whoever is in debt is read again when the debt is paid.
//! Accounts belong to endpoints and outlive sessions, so that a new link does not buy new credit.
//!
//! **Invariant:** a limit delays and never drops, and at least one message is read every [`LONGEST_PAUSE`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tm_protocol::ids::EndpointId;

use crate::limits::{Limits, Rate};

/// Longest wait before the next message: a link that breaks meanwhile is still noticed within a minute.
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// Sessions of one endpoint. A network that flaps needs fewer.
const SESSIONS: Rate = Rate { per_second: 5.0, burst: 50.0 };
/// Links of one endpoint that wait for their session to be opened; more are sent away.
const WAITING: u32 = 4;
/// Lines that one endpoint's sessions may write into the log at a level that people read.
const LINES: Rate = Rate { per_second: 0.1, burst: 20.0 };
/// How often an agent above its limits is warned of.
const WARN: Duration = Duration::from_secs(60);
/// A line is worth it once an agent has waited so long.
const WORTH_A_WARNING: Duration = Duration::from_secs(1);
/// Accounts kept without a look at whether they are needed.
const KEPT: usize = 1024;

/// The accounts of every endpoint that was connected lately.
#[derive(Debug, Clone)]
pub(crate) struct Meters {
    limits: Limits,
    accounts: Arc<Mutex<HashMap<EndpointId, Meter>>>,
}

/// One endpoint's account.
#[derive(Debug, Clone)]
pub(crate) struct Meter(Arc<Mutex<Account>>);

/// A link's place among the few that may wait for their session.
#[derive(Debug)]
pub(crate) struct Turn(Meter);

/// What a message costs besides being one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    /// Of its frame.
    pub(crate) bytes: usize,
    /// That it makes the store write.
    pub(crate) rows: usize,
}

/// An agent was held back; said once a minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeldBack {
    pub(crate) messages: u64,
    pub(crate) bytes: u64,
    pub(crate) rows: u64,
    pub(crate) paused: Duration,
}

#[derive(Debug)]
struct Account {
    messages: Bucket,
    bytes: Bucket,
    rows: Bucket,
    daily_rows: Bucket,
    sessions: Bucket,
    lines: Bucket,
    waiting: u32,
    warned: Option<Instant>,
    held: HeldBack,
}

/// Credit that grows with time up to the burst, and may fall below zero.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: Rate,
    credit: f64,
    at: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Self {
        Self { rate, credit: rate.burst, at: now }
    }

    fn refill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.rate.per_second;
        self.credit = (self.credit + gained).min(self.rate.burst);
        self.at = now;
    }

    /// Takes `amount`; how long until the account is even again.
    fn take(&mut self, amount: f64, now: Instant) -> Duration {
        self.refill(now);
        // Debt beyond the longest pause would never be waited for.
        let deepest = -LONGEST_PAUSE.as_secs_f64() * self.rate.per_second;
        self.credit = (self.credit - amount).max(deepest);
        Duration::from_secs_f64((-self.credit / self.rate.per_second).max(0.0))
    }
}

impl Meters {
    /// Accounts with these limits, all full.
    pub(crate) fn new(limits: Limits) -> Self {
        Self { limits, accounts: Arc::default() }
    }

    /// The account of `endpoint`.
    pub(crate) fn of(&self, endpoint: EndpointId, now: Instant) -> Meter {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        if accounts.len() >= KEPT && accounts.len().is_power_of_two() {
            // Whoever is not connected and owes nothing begins anew just as well.
            accounts.retain(|_, meter| Arc::strong_count(&meter.0) > 1 || !meter.lock().is_untouched(now));
        }
        let limits = &self.limits;
        accounts
            .entry(endpoint)
            .or_insert_with(|| {
                Meter(Arc::new(Mutex::new(Account {
                    messages: Bucket::full(limits.messages, now),
                    bytes: Bucket::full(limits.bytes, now),
                    rows: Bucket::full(limits.rows, now),
                    daily_rows: Bucket::full(limits.daily_rows, now),
                    sessions: Bucket::full(SESSIONS, now),
                    lines: Bucket::full(LINES, now),
                    waiting: 0,
                    warned: None,
                    held: HeldBack::NONE,
                })))
            })
            .clone()
    }
}

impl Meter {
    /// Charges one message; how long the next may not be read, and what to warn of.
    pub(crate) fn charge(&self, cost: Cost, now: Instant) -> (Duration, Option<HeldBack>) {
        let mut account = self.lock();
        let (bytes, rows) = (as_u32(cost.bytes), as_u32(cost.rows));
        let pause = [
            account.messages.take(1.0, now),
            account.bytes.take(f64::from(bytes), now),
            account.rows.take(f64::from(rows), now),
            account.daily_rows.take(f64::from(rows), now),
        ]
        .into_iter()
        .max()
        .unwrap_or_default();
        account.held.messages += 1;
        account.held.bytes += u64::from(bytes);
        account.held.rows += u64::from(rows);
        account.held.paused += pause;
        let due = account.warned.is_none_or(|at| now.saturating_duration_since(at) >= WARN)
            && account.held.paused >= WORTH_A_WARNING;
        let warning = due.then(|| {
            account.warned = Some(now);
            std::mem::replace(&mut account.held, HeldBack::NONE)
        });
        (pause, warning)
    }

    /// A place among the links that wait for a session, and how long to wait; `None` if all are taken.
    pub(crate) fn queue(&self, now: Instant) -> Option<(Turn, Duration)> {
        let mut account = self.lock();
        if account.waiting >= WAITING {
            return None;
        }
        account.waiting += 1;
        let wait = account.sessions.take(1.0, now);
        Some((Turn(self.clone()), wait))
    }

    /// Whether a line about this endpoint may be logged: one agent must not fill the log.
    pub(crate) fn may_log(&self, now: Instant) -> bool {
        let mut account = self.lock();
        account.lines.refill(now);
        let may = account.lines.credit >= 1.0;
        if may {
            account.lines.credit -= 1.0;
        }
        may
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Account> {
        // Sums of numbers; none can be left half-changed in a way that matters.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Account {
    fn is_untouched(&mut self, now: Instant) -> bool {
        [&mut self.messages, &mut self.bytes, &mut self.rows, &mut self.daily_rows, &mut self.sessions]
            .into_iter()
            .all(|bucket| {
                bucket.refill(now);
                bucket.credit >= bucket.rate.burst
            })
    }
}

impl HeldBack {
    const NONE: Self = Self { messages: 0, bytes: 0, rows: 0, paused: Duration::ZERO };
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.lock().waiting -= 1;
    }
}

fn as_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::tests::defaults;

    fn meter(start: Instant) -> Meter {
        Meters::new(defaults()).of(EndpointId::new(uuid::Uuid::nil()), start)
    }

    #[test]
    fn an_honest_agent_is_never_paused() {
        let start = Instant::now();
        let meter = meter(start);
        // A backlog of 2,000 small reports at once, then 400 a second for an hour.
        for n in 0..1_442_000_u64 {
            let now = start + Duration::from_micros(n.saturating_sub(1999) * 2500);
            let (pause, warning) = meter.charge(Cost { bytes: 300, rows: 1 }, now);
            assert!(pause.is_zero() && warning.is_none(), "message {n}: {pause:?}");
        }
    }

    #[test]
    fn each_limit_holds_over_time() {
        for (cost, per_message_ms) in [
            (Cost { bytes: 0, rows: 0 }, 2.0),
            (Cost { bytes: 256 << 10, rows: 0 }, 62.5),
            (Cost { bytes: 0, rows: 500 }, 500.0),
        ] {
            let start = Instant::now();
            let (meter, mut now) = (meter(start), start);
            // The burst first, so that only the steady rate is left.
            while meter.charge(cost, now).0.is_zero() {}
            now += meter.charge(cost, now).0;
            let begin = now;
            for _ in 0..1000 {
                now += meter.charge(cost, now).0;
            }
            let each = (now - begin).as_secs_f64();
            assert!((each - per_message_ms).abs() < per_message_ms / 100.0, "{cost:?}: {each}");
        }
    }

    #[test]
    fn a_day_has_its_own_limit_and_a_pause_has_an_end() {
        let start = Instant::now();
        let (meter, mut now) = (meter(start), start);
        let mut rows = 0_u64;
        while now < start + Duration::from_secs(86_400) {
            let (pause, _) = meter.charge(Cost { bytes: 0, rows: 512 }, now);
            assert!(pause <= LONGEST_PAUSE, "{pause:?}");
            now += pause;
            rows += 512;
        }
        assert!((2_000_000..=4_300_000).contains(&rows), "the burst and a day's share: {rows}");
    }

    #[test]
    fn new_sessions_buy_no_credit_and_are_counted_themselves() {
        let start = Instant::now();
        let meters = Meters::new(defaults());
        let endpoint = EndpointId::new(uuid::Uuid::nil());
        while meters.of(endpoint, start).charge(Cost::default(), start).0.is_zero() {}
        assert!(!meters.of(endpoint, start).charge(Cost::default(), start).0.is_zero());
        let other = EndpointId::new(uuid::Uuid::from_u128(1));
        assert!(meters.of(other, start).charge(Cost::default(), start).0.is_zero(), "others have their own");

        let meter = meters.of(other, start);
        for _ in 0..50 {
            assert!(meter.queue(start).unwrap().1.is_zero());
        }
        let turns: Vec<_> = (0..4).map(|_| meter.queue(start).unwrap()).collect();
        assert!(turns[3].1 > Duration::from_millis(700), "{:?}", turns[3].1);
        assert!(meter.queue(start).is_none(), "four wait");
        drop(turns);
        assert!(meter.queue(start).is_some());
    }

    #[test]
    fn an_agent_above_its_limits_is_warned_of_once_a_minute() {
        let start = Instant::now();
        let (meter, mut now) = (meter(start), start);
        let mut warnings = Vec::new();
        while now < start + Duration::from_secs(150) {
            let (pause, warning) = meter.charge(Cost { bytes: 100, rows: 0 }, now);
            now += pause;
            warnings.extend(warning);
        }
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(
            warnings[1].messages > 29_000 && warnings[1].paused > Duration::from_secs(50),
            "{warnings:?}"
        );
    }

    #[test]
    fn one_agent_does_not_fill_the_log() {
        let start = Instant::now();
        let meter = meter(start);
        let minute = |n: u64| start + Duration::from_secs(60) * u32::try_from(n).unwrap();
        let lines = |at: Instant| (0..1000).filter(|_| meter.may_log(at)).count();
        assert_eq!((lines(start), lines(minute(1)), lines(minute(60))), (20, 6, 20));
    }

    #[test]
    fn accounts_that_owe_nothing_are_forgotten() {
        let start = Instant::now();
        let meters = Meters::new(defaults());
        for n in 0..3000 {
            let meter = meters.of(EndpointId::new(uuid::Uuid::from_u128(n)), start);
            if n < 100 {
                meter.charge(Cost { bytes: 0, rows: 10 }, start);
            }
        }
        let kept = meters.accounts.lock().unwrap().len();
        assert!((100..=2000).contains(&kept), "{kept}");
        assert!(meters.accounts.lock().unwrap().contains_key(&EndpointId::new(uuid::Uuid::nil())));
    }
}
