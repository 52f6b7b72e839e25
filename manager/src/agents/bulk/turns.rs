//! Whose turn it is to take bytes, and how fast all may together.
//!
//! Those who come when all places are taken wait in the order of their coming; when too many wait already, or the
//! wait is too long, they are told to come again. Whoever has held a place for long gives it up when others wait,
//! and goes on later where it stood.
//!
//! **Invariant:** at most [`Rules::places`] transfers run, at most [`Rules::own`] of one endpoint, and together they are no faster
//! than the rate: what agents and tasks say on their control channels waits for a few pieces at most.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tm_protocol::ids::EndpointId;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep_until, timeout},
};

use crate::{
    limits::Rate,
    metrics::{Held, METRICS},
};

/// How many, and how long.
const RULES: Rules = Rules {
    places: 32,
    own: 2,
    waiting: 512,
    patience: Duration::from_secs(30),
    slice: Duration::from_secs(20),
};
/// After how many seconds those come again who are sent away.
pub(super) const RETRY_AFTER: u64 = 5;

#[derive(Debug, Clone, Copy)]
struct Rules {
    /// Transfers at once.
    places: usize,
    /// Those of one endpoint, waiting or running.
    own: u32,
    /// Links that may wait for a place.
    waiting: usize,
    /// How long one may wait.
    patience: Duration,
    /// How long a place is held while others wait.
    slice: Duration,
}

/// All places.
#[derive(Debug)]
pub(super) struct Turns {
    places: Arc<Semaphore>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    rules: Rules,
    waiting: AtomicUsize,
    own: Mutex<HashMap<EndpointId, u32>>,
    pace: Pace,
}

/// No place is free, and none will be soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Busy;

/// A place. Dropped, it is free.
#[derive(Debug)]
pub(super) struct Turn {
    _place: OwnedSemaphorePermit,
    own: Own,
    since: Instant,
}

/// One of an endpoint's transfers.
#[derive(Debug)]
struct Own {
    shared: Arc<Shared>,
    endpoint: EndpointId,
}

impl Drop for Own {
    fn drop(&mut self) {
        let mut own = self.shared.own.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = own.get_mut(&self.endpoint) {
            *count -= 1;
            if *count == 0 {
                own.remove(&self.endpoint);
            }
        }
    }
}

/// One of those that wait.
struct Wait<'a>(&'a AtomicUsize);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Turns {
    /// All together are no faster than `rate`, in bytes.
    pub(super) fn new(rate: Rate) -> Self {
        Self::with(RULES, rate)
    }

    fn with(rules: Rules, rate: Rate) -> Self {
        let (waiting, own) = (AtomicUsize::new(0), Mutex::default());
        let shared = Arc::new(Shared { rules, waiting, own, pace: Pace::new(rate) });
        Self { places: Arc::new(Semaphore::new(rules.places)), shared }
    }

    /// Waits for a place.
    ///
    /// # Errors
    /// If too many wait already, this endpoint has enough, or it takes too long.
    pub(super) async fn take(&self, endpoint: EndpointId) -> Result<Turn, Busy> {
        let own = self.own(endpoint).ok_or(Busy)?;
        let place = match Arc::clone(&self.places).try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                let wait = Wait(&self.shared.waiting);
                // Whoever is counted and turned away is uncounted by its end.
                if wait.0.fetch_add(1, Ordering::Relaxed) >= self.shared.rules.waiting {
                    return Err(Busy);
                }
                let _waits = Held::one(METRICS.queue("bulk"));
                let place =
                    timeout(self.shared.rules.patience, Arc::clone(&self.places).acquire_owned()).await;
                place.map_err(|_| Busy)?.map_err(|_| Busy)?
            }
        };
        Ok(Turn { _place: place, own, since: Instant::now() })
    }

    fn own(&self, endpoint: EndpointId) -> Option<Own> {
        let mut own = self.shared.own.lock().unwrap_or_else(PoisonError::into_inner);
        let count = own.entry(endpoint).or_default();
        if *count >= self.shared.rules.own {
            return None;
        }
        *count += 1;
        drop(own);
        Some(Own { shared: Arc::clone(&self.shared), endpoint })
    }
}

impl Turn {
    /// Whether it is somebody else's turn now.
    pub(super) fn is_over(&self) -> bool {
        self.since.elapsed() >= self.own.shared.rules.slice
            && self.own.shared.waiting.load(Ordering::Relaxed) > 0
    }

    /// Waits until `bytes` more may be sent.
    pub(super) async fn pay(&self, bytes: usize) {
        self.own.shared.pace.pay(bytes).await;
    }
}

/// A steady rate for all.
#[derive(Debug)]
struct Pace {
    rate: Rate,
    /// When all that was allowed will have been sent at that rate.
    paid_until: Mutex<Instant>,
}

impl Pace {
    fn new(rate: Rate) -> Self {
        Self { rate, paid_until: Mutex::new(Instant::now()) }
    }

    async fn pay(&self, bytes: usize) {
        let now = Instant::now();
        let at = {
            let mut paid = self.paid_until.lock().unwrap_or_else(PoisonError::into_inner);
            // What was not used in a quiet time may be made up for, up to the burst.
            let burst = Duration::from_secs_f64(self.rate.burst / self.rate.per_second);
            let from = (*paid).max(now.checked_sub(burst).unwrap_or(now));
            let cost = f64::from(u32::try_from(bytes).unwrap_or(u32::MAX)) / self.rate.per_second;
            *paid = from + Duration::from_secs_f64(cost);
            from
        };
        if at > now {
            sleep_until(at).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const RATE: Rate = Rate { per_second: 1e7, burst: 1e6 };

    fn endpoint(n: u128) -> EndpointId {
        EndpointId::new(Uuid::from_u128(n))
    }

    fn turns(patience: Duration, slice: Duration) -> Arc<Turns> {
        Arc::new(Turns::with(Rules { places: 4, own: 2, waiting: 3, patience, slice }, RATE))
    }

    async fn fill(turns: &Turns) -> Vec<Turn> {
        let mut held = Vec::new();
        for n in 0..4 {
            held.push(turns.take(endpoint(n)).await.unwrap());
        }
        held
    }

    async fn wait_for_waiting(turns: &Turns, count: usize) {
        while turns.shared.waiting.load(Ordering::Relaxed) != count {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn places_are_given_in_the_order_of_coming() {
        let turns = turns(Duration::from_secs(600), Duration::ZERO);
        let mut held = fill(&turns).await;
        assert!(!held[0].is_over(), "nobody waits");
        let (tell, mut told) = tokio::sync::mpsc::channel(10);
        for (already, n) in (100..103).enumerate() {
            let (mine, tell) = (Arc::clone(&turns), tell.clone());
            tokio::spawn(async move {
                let turn = mine.take(endpoint(n)).await.unwrap();
                tell.send((n, turn)).await.unwrap();
            });
            wait_for_waiting(&turns, already + 1).await;
        }
        assert!(told.try_recv().is_err(), "nobody has given a place up");
        assert!(held[0].is_over());
        let mut taken = Vec::new();
        for expected in 100..103 {
            held.pop();
            let (n, turn) = told.recv().await.unwrap();
            assert_eq!(n, expected);
            taken.push(turn);
        }
        assert!(!held[0].is_over(), "nobody waits any more");
    }

    #[tokio::test]
    async fn a_place_is_kept_while_its_time_lasts() {
        let turns = turns(Duration::from_secs(600), Duration::from_secs(600));
        let held = fill(&turns).await;
        let waiting = Arc::clone(&turns);
        let waits = tokio::spawn(async move { waiting.take(endpoint(9)).await.is_ok() });
        wait_for_waiting(&turns, 1).await;
        assert!(!held[0].is_over());
        drop(held);
        assert!(waits.await.unwrap());
    }

    #[tokio::test]
    async fn those_who_are_too_many_are_sent_away() {
        let turns = turns(Duration::from_millis(50), Duration::ZERO);
        let held = fill(&turns).await;
        assert_eq!(turns.take(endpoint(9)).await.err(), Some(Busy), "it waited too long");
        let waiting: Vec<_> = (0..3)
            .map(|n| {
                // Long, so that they wait while others come.
                let turns = Arc::clone(&turns);
                tokio::spawn(async move { turns.take(endpoint(1000 + n)).await.err() })
            })
            .collect();
        for wait in waiting {
            assert_eq!(wait.await.unwrap(), Some(Busy));
        }
        assert_eq!(turns.shared.waiting.load(Ordering::Relaxed), 0);
        drop(held);
        assert!(turns.take(endpoint(9)).await.is_ok());
        assert!(turns.shared.own.lock().unwrap().is_empty(), "nothing is left of those who came");
    }

    #[tokio::test]
    async fn the_queue_and_each_endpoint_have_their_limits() {
        let turns = turns(Duration::from_secs(600), Duration::ZERO);
        let held = fill(&turns).await;
        let waits: Vec<_> = [1, 1000, 1001]
            .map(|n| {
                let turns = Arc::clone(&turns);
                tokio::spawn(async move { turns.take(endpoint(n)).await })
            })
            .into();
        wait_for_waiting(&turns, 3).await;
        assert_eq!(
            turns.take(endpoint(1)).await.err(),
            Some(Busy),
            "one has a place, one waits: that is two"
        );
        assert_eq!(turns.take(endpoint(9)).await.err(), Some(Busy), "three wait");
        assert_eq!(turns.shared.waiting.load(Ordering::Relaxed), 3);
        for wait in waits {
            wait.abort();
            assert!(wait.await.is_err());
        }
        assert_eq!(turns.shared.waiting.load(Ordering::Relaxed), 0, "those who leave do not wait");
        drop(held);
        let both = [turns.take(endpoint(1)).await, turns.take(endpoint(1)).await];
        assert!(both.iter().all(Result::is_ok));
        assert_eq!(turns.take(endpoint(1)).await.err(), Some(Busy));
    }

    #[tokio::test]
    async fn all_together_keep_to_the_rate() {
        let turns = turns(Duration::from_secs(600), Duration::from_secs(600));
        let (one, two) = (turns.take(endpoint(1)).await.unwrap(), turns.take(endpoint(2)).await.unwrap());
        let begin = Instant::now();
        for _ in 0..10 {
            one.pay(500_000).await;
            two.pay(500_000).await;
        }
        // 10 MB at 10 MB/s; the first 1 MB are free after a quiet time, and the last piece goes before it is paid.
        let took = begin.elapsed();
        assert!(took >= Duration::from_millis(800), "{took:?}");
    }
}
