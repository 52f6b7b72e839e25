//! Those who have connected and not proven who they are: how many there may be, who of them has to go when there
//! are too many, and whose handshake is next.
//!
//! Places are counted by source: an IPv4 address, or the /64 network that one IPv6 host has for itself. When all are
//! taken, a newcomer gets the place of the one *that has kept us waiting* longest in the largest crowd, if that crowd is
//! larger than its own or the other one has had time enough to say something. Whoever waits for *us* loses its place
//! only to a newcomer of a smaller crowd. So who only holds connections loses them to who says something, and a fleet
//! that comes back, from one address or from many, is not thrown out by its own kind: the newest come again later.
//!
//! Handshakes are work, and done a few at a time: in the order of their coming within one source, and by turns among
//! the sources. The others wait, instead of all of them being served at once and too late.
//!
//! **Invariant:** there are never more places and turns taken than there are.
//! **Invariant:** a turn whose holder has gone is passed on; none is lost.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    future::pending,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::metrics::Held;

/// Crowds that are looked at to make room, the largest first.
const LOOKED_AT: usize = 16;
/// How long anybody may keep us waiting before one of its own kind gets its place: long enough for a client that is
/// one of thousands on a busy machine.
const GRACE: Duration = Duration::from_secs(5);
/// Turns for each processor: while one is passed on, another one is taken.
const TURNS: usize = 2;

/// The strangers of one port. Copies share them.
#[derive(Debug, Clone)]
pub(crate) struct Strangers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    places: usize,
    grace: Duration,
    hall: Mutex<Hall>,
}

/// A stranger's place. Dropped, it is free.
#[derive(Debug)]
pub(crate) struct Place {
    strangers: Strangers,
    source: Source,
    /// Of the last change; changes happen under the hall's lock.
    number: AtomicU64,
    out: CancellationToken,
    /// It is never read: it counts down when the place is free.
    counted: Option<Held>,
}

/// A stranger's turn. Dropped, it is the next one's.
#[derive(Debug)]
pub(crate) struct Turn(Option<Strangers>);

/// Where somebody comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Source(IpAddr);

impl Source {
    fn of(from: IpAddr) -> Self {
        Self(network(from))
    }
}

/// What counts as one source: an IPv4 address, or the /64 network of an IPv6 one.
pub(crate) fn network(from: IpAddr) -> IpAddr {
    match from.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}

#[derive(Debug)]
struct Hall {
    next: u64,
    /// Places taken, also by those who are known.
    taken: usize,
    known: BTreeSet<u64>,
    crowds: HashMap<Source, Crowd>,
    /// Sizes of crowds, the largest last; of equal ones, the one that has been here longest.
    ranks: BTreeSet<(usize, Reverse<u64>, Source)>,
    /// Turns that nobody has.
    turns: usize,
    /// Sources with somebody who waits for a turn, the next one first.
    order: VecDeque<Source>,
}

/// All who are here from one source and not known.
#[derive(Debug)]
struct Crowd {
    /// The number of its first place.
    since: u64,
    /// Those who keep us waiting, the longest first.
    slow: BTreeMap<u64, Slow>,
    /// Those who wait for us, the longest first.
    ready: BTreeMap<u64, CancellationToken>,
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

#[derive(Debug)]
struct Slow {
    out: CancellationToken,
    since: Instant,
}

impl Crowd {
    fn size(&self) -> usize {
        self.slow.len() + self.ready.len()
    }

    fn take_out(&mut self, number: u64) -> Option<CancellationToken> {
        self.slow.remove(&number).map(|slow| slow.out).or_else(|| self.ready.remove(&number))
    }
}

impl Hall {
    /// Does something to a crowd and ranks it anew; a crowd of nobody is none.
    fn change<T>(&mut self, source: Source, change: impl FnOnce(&mut Crowd) -> T) -> Option<T> {
        let crowd = self.crowds.get_mut(&source)?;
        self.ranks.remove(&(crowd.size(), Reverse(crowd.since), source));
        let done = change(crowd);
        if crowd.size() == 0 {
            self.crowds.remove(&source);
        } else {
            self.ranks.insert((crowd.size(), Reverse(crowd.since), source));
        }
        Some(done)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn enter(&mut self, source: Source) -> (u64, CancellationToken) {
        let number = self.number();
        self.taken += 1;
        self.crowds.entry(source).or_insert_with(|| Crowd {
            since: number,
            slow: BTreeMap::new(),
            ready: BTreeMap::new(),
            waiting: VecDeque::new(),
        });
        let out = CancellationToken::new();
        let slow = Slow { out: out.clone(), since: Instant::now() };
        self.change(source, |crowd| crowd.slow.insert(number, slow));
        (number, out)
    }

    /// Shows somebody out for a newcomer from `source`; `false` if nobody has to go for that one.
    fn make_room(&mut self, source: Source, grace: Duration) -> bool {
        let own = self.crowds.get(&source).map_or(0, Crowd::size);
        let victim = self.ranks.iter().rev().take(LOOKED_AT).find_map(|(size, _, from)| {
            let crowd = self.crowds.get(from)?;
            let is_larger = *size > own + 1;
            let oldest =
                crowd.slow.iter().next().filter(|(_, slow)| is_larger || slow.since.elapsed() >= grace);
            let newest = || crowd.ready.keys().next_back().filter(|_| is_larger);
            let number = oldest.map(|(number, _)| number).or_else(newest)?;
            Some((*from, *number))
        });
        let Some((from, number)) = victim else { return false };
        if let Some(out) = self.take_out(from, number) {
            self.taken -= 1;
            out.cancel();
        }
        true
    }

    /// Takes somebody out of its crowd; `None` if it is not there.
    fn take_out(&mut self, source: Source, number: u64) -> Option<CancellationToken> {
        self.change(source, |crowd| crowd.take_out(number)).flatten()
    }

    /// Whose turn it is now, or nobody's.
    fn next_in_turn(&mut self) -> Option<oneshot::Sender<Turn>> {
        while let Some(source) = self.order.pop_front() {
            let Some(crowd) = self.crowds.get_mut(&source) else { continue };
            let next = loop {
                match crowd.waiting.pop_front() {
                    Some(waiting) if waiting.is_closed() => {}
                    other => break other,
                }
            };
            if !crowd.waiting.is_empty() {
                self.order.push_back(source);
            }
            if next.is_some() {
                return next;
            }
        }
        None
    }
}

impl Strangers {
    /// Room for `places` strangers.
    pub(crate) fn new(places: usize) -> Self {
        Self::with(places, thread::available_parallelism().map_or(1, usize::from) * TURNS, GRACE)
    }

    fn with(places: usize, turns: usize, grace: Duration) -> Self {
        let hall = Hall {
            next: 0,
            taken: 0,
            known: BTreeSet::new(),
            crowds: HashMap::new(),
            ranks: BTreeSet::new(),
            turns,
            order: VecDeque::new(),
        };
        Self(Arc::new(Inner { places, grace, hall: Mutex::new(hall) }))
    }

    fn lock(&self) -> MutexGuard<'_, Hall> {
        self.0.hall.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives somebody a place, for now as one who keeps us waiting; `None` if there is none for it.
    pub(crate) fn enter(&self, from: IpAddr) -> Option<Place> {
        let source = Source::of(from);
        let mut hall = self.lock();
        if hall.taken >= self.0.places && !hall.make_room(source, self.0.grace) {
            return None;
        }
        let (number, out) = hall.enter(source);
        let number = AtomicU64::new(number);
        Some(Place { strangers: self.clone(), source, number, out, counted: None })
    }

    /// Gives a turn to the next one who waits.
    fn pass_on(&self) {
        loop {
            let next = {
                let mut hall = self.lock();
                let Some(next) = hall.next_in_turn() else {
                    hall.turns += 1;
                    return;
                };
                next
            };
            match next.send(Turn(Some(self.clone()))) {
                Ok(()) => return,
                // It has gone this moment; this turn's end must not pass on another one.
                Err(mut turn) => turn.0 = None,
            }
        }
    }
}

impl Place {
    /// Counts it for as long as it is held.
    pub(crate) fn count(&mut self, counted: Held) {
        self.counted = Some(counted);
    }

    /// Ends when the place is another's: whoever held it has to go.
    pub(crate) async fn is_lost(&self) {
        self.out.cancelled().await;
    }

    fn number(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    /// The stranger has said what there is to say, and waits for us.
    pub(crate) fn is_ready(&self) {
        let (old, mut hall) = (self.number(), self.strangers.lock());
        let new = hall.number();
        hall.change(self.source, |crowd| {
            if let Some(slow) = crowd.slow.remove(&old) {
                crowd.ready.insert(new, slow.out);
                self.number.store(new, Ordering::Relaxed);
            }
        });
    }

    /// We wait for the stranger (again).
    pub(crate) fn is_slow(&self) {
        let (old, mut hall) = (self.number(), self.strangers.lock());
        let new = hall.number();
        hall.change(self.source, |crowd| {
            if let Some(out) = crowd.ready.remove(&old) {
                crowd.slow.insert(new, Slow { out, since: Instant::now() });
                self.number.store(new, Ordering::Relaxed);
            }
        });
    }

    /// It is no stranger any more: nobody takes its place, which it keeps.
    pub(crate) fn is_known(&self) {
        let mut hall = self.strangers.lock();
        if hall.take_out(self.source, self.number()).is_some() {
            hall.known.insert(self.number());
        }
    }

    /// Whether nobody knows who it is.
    pub(crate) fn is_stranger(&self) -> bool {
        !self.strangers.lock().known.contains(&self.number())
    }

    /// Waits for a turn. (One who has lost its place waits for ever.)
    pub(crate) async fn turn(&self) -> Turn {
        self.turn_behind(VecDeque::push_back).await
    }

    /// Waits for a turn before those of its source who have had none.
    pub(crate) async fn next_turn(&self) -> Turn {
        self.turn_behind(VecDeque::push_front).await
    }

    async fn turn_behind(
        &self,
        queue: fn(&mut VecDeque<oneshot::Sender<Turn>>, oneshot::Sender<Turn>),
    ) -> Turn {
        let turn = {
            let mut hall = self.strangers.lock();
            if hall.turns > 0 {
                hall.turns -= 1;
                return Turn(Some(self.strangers.clone()));
            }
            let (sender, turn) = oneshot::channel();
            let is_first = hall.crowds.get_mut(&self.source).map(|crowd| {
                queue(&mut crowd.waiting, sender);
                crowd.waiting.len() == 1
            });
            if is_first == Some(true) {
                hall.order.push_back(self.source);
            }
            turn
        };
        match turn.await {
            Ok(turn) => turn,
            Err(_) => pending().await,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut hall = self.strangers.lock();
        let number = self.number();
        if hall.take_out(self.source, number).is_some() || hall.known.remove(&number) {
            hall.taken -= 1;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(strangers) = self.0.take() {
            strangers.pass_on();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const LONG: Duration = Duration::from_secs(3600);

    fn from(n: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, n])
    }

    fn is_lost(place: &Place) -> bool {
        place.is_lost().now_or_never().is_some()
    }

    #[test]
    fn a_newcomer_takes_the_place_of_the_oldest_idler_of_the_largest_crowd() {
        let strangers = Strangers::with(6, 1, LONG);
        let crowd: Vec<Place> = (0..4).map(|_| strangers.enter(from(1)).unwrap()).collect();
        let others: Vec<Place> = (2..4).map(|n| strangers.enter(from(n)).unwrap()).collect();
        crowd[0].is_ready();
        let newcomer = strangers.enter(from(9)).unwrap();
        assert!(is_lost(&crowd[1]), "the oldest that keeps us waiting");
        assert!(
            [&crowd[0], &crowd[2], &crowd[3], &others[0], &others[1]].iter().all(|place| !is_lost(place))
        );
        assert!(strangers.enter(from(1)).is_none(), "its own kind has to wait");
        assert!(!is_lost(&newcomer) && strangers.lock().taken == 6);
        drop((crowd, others, newcomer));
        let hall = strangers.lock();
        assert_eq!((hall.taken, hall.crowds.len(), hall.ranks.len()), (0, 0, 0), "nothing is left behind");
    }

    #[test]
    fn who_waits_for_us_stays_before_its_own_kind_and_goes_for_a_smaller_crowd() {
        let strangers = Strangers::with(3, 1, LONG);
        let crowd: Vec<Place> = (0..3).map(|_| strangers.enter(from(1)).unwrap()).collect();
        crowd.iter().for_each(Place::is_ready);
        assert!(strangers.enter(from(1)).is_none(), "a fleet does not throw out its own");
        let other = strangers.enter(from(2)).expect("one of a smaller crowd is let in");
        assert!(is_lost(&crowd[2]) && !is_lost(&crowd[0]) && !is_lost(&crowd[1]), "for the newest");
        other.is_ready();
        assert!(strangers.enter(from(2)).is_none(), "crowds of two and one: none is much smaller");
        crowd[0].is_slow();
        assert!(strangers.enter(from(2)).is_none(), "also if it keeps us waiting");
    }

    #[test]
    fn who_has_had_time_enough_goes_for_anybody_and_who_waits_for_us_does_not() {
        let strangers = Strangers::with(3, 1, Duration::ZERO);
        let crowd: Vec<Place> = (0..3).map(|_| strangers.enter(from(1)).unwrap()).collect();
        crowd[0].is_ready();
        crowd[1].is_ready();
        crowd[1].is_slow();
        let own = strangers.enter(from(1)).unwrap();
        assert!(is_lost(&crowd[2]), "the one that has kept us waiting longest");
        own.is_ready();
        let last = strangers.enter(from(1)).unwrap();
        assert!(is_lost(&crowd[1]) && !is_lost(&crowd[0]) && !is_lost(&own));
        last.is_ready();
        assert!(strangers.enter(from(1)).is_none(), "all wait for us");
    }

    #[test]
    fn a_fleet_of_many_addresses_does_not_throw_out_its_own() {
        let strangers = Strangers::with(100, 1, LONG);
        let fleet: Vec<Place> = (0..100).map(|n| strangers.enter(from(n)).unwrap()).collect();
        assert!((100..=200).all(|n| strangers.enter(from(n)).is_none()));
        assert!(!fleet.iter().any(is_lost));
    }

    #[test]
    fn the_known_keep_their_places_and_are_counted() {
        let strangers = Strangers::with(2, 1, LONG);
        let known: Vec<Place> = (0..2).map(|_| strangers.enter(from(1)).unwrap()).collect();
        known.iter().for_each(Place::is_known);
        assert!(strangers.enter(from(2)).is_none() && !known.iter().any(is_lost));
        drop(known);
        assert_eq!(strangers.lock().taken, 0);
        assert!(strangers.enter(from(2)).is_some());
    }

    #[test]
    fn one_network_of_ipv6_is_one_source() {
        let of = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1:2:3"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[tokio::test]
    async fn sources_take_turns_and_no_turn_is_lost() {
        let strangers = Strangers::with(100, 1, LONG);
        let enter = |n| {
            let place = strangers.enter(from(n)).unwrap();
            place.is_ready();
            place
        };
        let holder = enter(1);
        let held = holder.turn().await;
        let crowd: Vec<Place> = (0..5).map(|_| enter(1)).collect();
        let late = enter(2);
        let mut turns: Vec<_> = crowd.iter().map(|place| Box::pin(place.turn())).collect();
        for turn in &mut turns {
            assert!(turn.as_mut().now_or_never().is_none());
        }
        let mut other = Box::pin(late.turn());
        assert!(other.as_mut().now_or_never().is_none());
        // The first of the crowd goes; the second one has its turn.
        drop(turns.remove(0));
        drop(held);
        let second = turns[0].as_mut().now_or_never().expect("the first that is still there");
        assert!(other.as_mut().now_or_never().is_none());
        drop(second);
        assert!(turns[1].as_mut().now_or_never().is_none(), "another source is next");
        // Who has had one goes before its kind.
        let mut begun = Box::pin(holder.next_turn());
        assert!(begun.as_mut().now_or_never().is_none());
        // It has been given its turn and goes without ever looking: it is passed on.
        drop(other);
        let begun = begun.as_mut().now_or_never().expect("it is passed on");
        assert!(turns[1].as_mut().now_or_never().is_none());
        drop(begun);
        let third = turns[1].as_mut().now_or_never().expect("the order goes on");
        drop((turns, third));
        assert_eq!(strangers.lock().turns, 1, "nobody waits");
    }
}
