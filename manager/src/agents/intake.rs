//! What all sessions hand in, committed together, so that durability does not cost one disk flush per agent
//! and one agent cannot take the store's transactions one by one.
//!
//! Each session has a lane. The one writer goes round the lanes and takes a share of each, so that a lane
//! that is always full delays the others by no more than its share. There is no waiting for company: a lone
//! report is committed at once, and what arrives meanwhile is the next batch.
//!
//! **Invariant:** a lane's items are committed in order, and none after one that was not.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tm_protocol::{ids::EndpointId, message::Inventory};
use tokio::{
    sync::{Notify, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use super::now_ms;
use crate::limits::Limits;
use crate::metrics::METRICS;
use crate::store::{
    Store, StoreError,
    streams::{Counts, HandedIn, Parcel, Taken},
};

/// What one session may have handed in and not stored: its session reads no further then.
const LANE_ITEMS: usize = 32;
const LANE_BYTES: usize = 1 << 20;
/// Rows that one lane adds to one commit (or a single item, if that is more), and that one commit has.
const SHARE: usize = 64;
const BATCH: usize = 1024;
/// How long the writer rests when the store cannot be written for the moment, at first and at most.
const RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Where sessions hand in.
#[derive(Debug, Clone)]
pub(crate) struct Intake(Arc<Lanes>);

/// A session's end of its lane. Dropped, what was not taken yet is thrown away: the agent has it still.
#[derive(Debug)]
pub(crate) struct Lane {
    lanes: Arc<Lanes>,
    key: u64,
    progress: watch::Receiver<Progress>,
    handed: Handed,
}

/// How far the writer is with a lane.
#[derive(Debug, Clone, Default)]
struct Progress {
    stored: Counts,
    done: Handed,
    failure: Option<Failed>,
}

/// Items and bytes, counted from the lane's beginning.
#[derive(Debug, Clone, Copy, Default)]
struct Handed {
    items: usize,
    bytes: usize,
}

/// Why a lane takes nothing any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failed {
    /// A newer session of the endpoint was opened, here or at another manager.
    Superseded,
    /// The store cannot take an item; the log says why.
    Store,
}

#[derive(Debug, Default)]
struct Lanes {
    inner: Mutex<Inner>,
    ready: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    next_key: u64,
    lanes: HashMap<u64, Queue>,
    /// Lanes with something in them, each once.
    waiting: VecDeque<u64>,
}

#[derive(Debug)]
struct Queue {
    endpoint: EndpointId,
    epoch: i64,
    /// What is stored when everything taken so far is.
    taken: Counts,
    items: VecDeque<(HandedIn, usize)>,
    /// Only the newest is of interest.
    inventory: Option<Box<Inventory>>,
    progress: watch::Sender<Progress>,
}

/// A share of a lane on its way into the store.
#[derive(Debug)]
struct Load {
    key: u64,
    parcel: Parcel,
    size: Handed,
}

impl Intake {
    /// Starts the one writer; it ends with `ending`, or when nobody can hand in any more.
    pub(crate) fn start(store: Store, limits: &Limits, ending: CancellationToken) -> Self {
        let lanes = Arc::new(Lanes::default());
        let most_detections = i64::try_from(limits.detections_per_task).unwrap_or(i64::MAX);
        tokio::spawn(write(Writer { store, most_detections, ending }, Arc::clone(&lanes)));
        Self(lanes)
    }

    /// Opens a lane for a session whose numbers go on after `stored`.
    pub(crate) fn lane(&self, endpoint: EndpointId, epoch: i64, stored: Counts) -> Lane {
        let (sender, progress) = watch::channel(Progress { stored, ..Progress::default() });
        let mut inner = self.0.lock();
        inner.next_key += 1;
        let key = inner.next_key;
        let queue = Queue {
            endpoint,
            epoch,
            taken: stored,
            items: VecDeque::new(),
            inventory: None,
            progress: sender,
        };
        inner.lanes.insert(key, queue);
        drop(inner);
        Lane { lanes: Arc::clone(&self.0), key, progress, handed: Handed::default() }
    }
}

impl Lane {
    /// Whether there is room for one more item of any size.
    pub(crate) fn has_room(&self) -> bool {
        let done = self.progress.borrow().done;
        self.handed.items - done.items < LANE_ITEMS && self.handed.bytes - done.bytes < LANE_BYTES
    }

    /// Hands a report or notices in. The caller asks [`Lane::has_room`] first.
    pub(crate) fn hand_in(&mut self, item: HandedIn, bytes: usize) {
        self.handed.items += 1;
        self.handed.bytes += bytes;
        self.lanes.put(self.key, |queue| queue.items.push_back((item, bytes)));
    }

    /// Hands the endpoint's facts in; those that wait are replaced.
    pub(crate) fn inventory(&mut self, facts: Inventory) {
        self.lanes.put(self.key, |queue| queue.inventory = Some(Box::new(facts)));
    }

    /// Waits until more is stored than at the last call; what is. Safe to drop half-way.
    pub(crate) async fn advanced(&mut self) -> Result<Counts, Failed> {
        // The sender lives until this value is dropped, or the writer has ended and nothing will change.
        if self.progress.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        let progress = self.progress.borrow_and_update();
        match &progress.failure {
            Some(failed) => Err(*failed),
            None => Ok(progress.stored),
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // A key that still waits in the ring finds no lane there.
        self.lanes.lock().lanes.remove(&self.key);
    }
}

impl Lanes {
    fn put(&self, key: u64, put: impl FnOnce(&mut Queue)) {
        let mut inner = self.lock();
        let Some(queue) = inner.lanes.get_mut(&key) else { return };
        let idle = queue.is_empty();
        put(queue);
        if idle {
            inner.waiting.push_back(key);
            show(&inner);
            self.ready.notify_one();
        }
    }

    /// The next batch: a share of each lane, in turn, until it is full.
    fn take(&self) -> Vec<Load> {
        let mut inner = self.lock();
        let (mut batch, mut rows) = (Vec::new(), 0);
        // One round only: a lane has one share of a batch.
        for _ in 0..inner.waiting.len() {
            if rows >= BATCH {
                break;
            }
            let Some(key) = inner.waiting.pop_front() else { break };
            let Some(queue) = inner.lanes.get_mut(&key) else { continue };
            let (parcel, size, share) = queue.share();
            rows += share;
            batch.push(Load { key, parcel, size });
            if !queue.is_empty() {
                inner.waiting.push_back(key);
            }
        }
        show(&inner);
        batch
    }

    fn publish(&self, key: u64, change: impl FnOnce(&mut Progress)) {
        if let Some(queue) = self.lock().lanes.get(&key) {
            queue.progress.send_modify(change);
        }
    }

    /// Closes a lane: what is in it is not stored, and neither is what comes.
    fn fail(&self, key: u64, failed: Failed) {
        if let Some(queue) = self.lock().lanes.remove(&key) {
            queue.progress.send_modify(|progress| progress.failure = Some(failed));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // No holder can leave it half-changed in a way that matters: an item is in one place or another.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shows how many lanes wait.
fn show(inner: &Inner) {
    METRICS.queue("intake").set(i64::try_from(inner.waiting.len()).unwrap_or(i64::MAX));
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.items.is_empty() && self.inventory.is_none()
    }

    fn share(&mut self) -> (Parcel, Handed, usize) {
        let mut parcel = Parcel {
            endpoint: self.endpoint,
            epoch: self.epoch,
            after: self.taken,
            items: Vec::new(),
            inventory: self.inventory.take(),
        };
        let (mut size, mut rows) = (Handed::default(), parcel.inventory.as_deref().map_or(0, inventory_rows));
        while rows < SHARE
            && let Some((item, bytes)) = self.items.pop_front()
        {
            rows += item.rows();
            size.items += 1;
            size.bytes += bytes;
            self.taken = self.taken.after(&item);
            parcel.items.push(item);
        }
        (parcel, size, rows)
    }
}

/// Rows that an inventory makes the store write.
pub(crate) fn inventory_rows(facts: &Inventory) -> usize {
    2 + facts.addresses.len().min(crate::store::sessions::MOST_ADDRESSES)
}

/// What the writer works with.
struct Writer {
    store: Store,
    most_detections: i64,
    ending: CancellationToken,
}

async fn write(writer: Writer, lanes: Arc<Lanes>) {
    loop {
        let mut batch = lanes.take();
        if batch.is_empty() {
            tokio::select! {
                () = lanes.ready.notified() => continue,
                () = writer.ending.cancelled() => return,
            }
        }
        // Rows are locked in one order everywhere.
        batch.sort_by_key(|load| load.parcel.endpoint);
        let (parcels, places): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|load| (load.parcel, (load.key, load.size))).unzip();
        match writer.patiently(&parcels).await {
            Ok(taken) => {
                for (((key, size), parcel), taken) in places.into_iter().zip(&parcels).zip(taken) {
                    settle(&lanes, key, size, parcel, taken);
                }
            }
            Err(error) => {
                tracing::warn!(%error, sessions = parcels.len(), "Cannot commit together; trying each alone.");
                // What the store cannot take must not stand in the way of everybody else's.
                for ((key, size), parcel) in places.into_iter().zip(parcels) {
                    writer.singly(&lanes, key, parcel).await;
                    lanes.publish(key, |progress| progress.done.bytes += size.bytes);
                }
            }
        }
    }
}

impl Writer {
    /// Commits one lane's share item by item, up to the first that the store cannot take.
    async fn singly(&self, lanes: &Lanes, key: u64, parcel: Parcel) {
        for parcel in parcel.singles() {
            // Bytes are known of the whole share only, and are counted after it.
            let size = Handed { items: parcel.items.len(), bytes: 0 };
            match self.patiently(std::slice::from_ref(&parcel)).await {
                Ok(taken) => {
                    for taken in taken {
                        settle(lanes, key, size, &parcel, taken);
                    }
                }
                Err(error) => {
                    tracing::warn!(endpoint = %parcel.endpoint, %error, "Cannot store what an agent handed in.");
                    return lanes.fail(key, Failed::Store);
                }
            }
        }
    }

    /// Commits; tries again for as long as the store is locked, full or out of reach. Agents keep what they
    /// have, and their sessions live on meanwhile.
    async fn patiently(&self, parcels: &[Parcel]) -> Result<Vec<Taken>, StoreError> {
        let mut rest = RETRY;
        loop {
            match self.store.take_in(parcels, self.most_detections, now_ms()).await {
                Err(error) if error.is_passing() && !self.ending.is_cancelled() => {
                    tracing::warn!(%error, "The store cannot be written; agents wait.");
                    sleep(rest).await;
                    rest = (rest * 2).min(LONGEST_RETRY);
                }
                done => return done,
            }
        }
    }
}

fn settle(lanes: &Lanes, key: u64, size: Handed, parcel: &Parcel, taken: Taken) {
    match taken {
        Taken::Stored => lanes.publish(key, |progress| {
            progress.stored = parcel.items.iter().fold(progress.stored, |counts, item| counts.after(item));
            progress.done.items += size.items;
            progress.done.bytes += size.bytes;
        }),
        Taken::Superseded => lanes.fail(key, Failed::Superseded),
    }
}

#[cfg(test)]
mod tests {
    use tm_protocol::{
        ids::ManagerId,
        message::{Notices, Report, ReportBody},
        report::Notice,
    };
    use uuid::Uuid;

    use super::*;
    use crate::limits::tests::defaults;
    use crate::store::{
        streams::tests::{endpoint, hello, run},
        tests::scratch,
    };

    fn lost(sequence: u64) -> HandedIn {
        HandedIn::Report(Report { sequence, at_ms: 0, body: ReportBody::Lost { count: 0 } })
    }

    fn queue_of(lanes: &Lanes, key: u64, items: usize) {
        for n in 0..items {
            lanes.put(key, |queue| queue.items.push_back((lost(n as u64 + 1), 10)));
        }
    }

    /// Lanes that no writer empties.
    fn lanes(count: u64) -> (Arc<Lanes>, Vec<Lane>) {
        let intake = Intake(Arc::new(Lanes::default()));
        let open = |n| intake.lane(EndpointId::new(Uuid::from_u128(n)), 1, Counts::default());
        let open: Vec<Lane> = (0..count).map(|n| open(u128::from(n))).collect();
        (intake.0, open)
    }

    #[test]
    fn a_full_lane_gets_no_more_than_its_share_of_a_batch() {
        let (lanes, open) = lanes(3);
        queue_of(&lanes, open[0].key, 500);
        queue_of(&lanes, open[1].key, 1);
        let taken = |batch: &[Load]| -> Vec<_> {
            batch.iter().map(|load| (load.parcel.endpoint.uuid().as_u128(), load.size.items)).collect()
        };
        assert_eq!(taken(&lanes.take()), [(0, SHARE), (1, 1)]);
        queue_of(&lanes, open[2].key, 2);
        let batch = lanes.take();
        assert_eq!(taken(&batch), [(0, SHARE), (2, 2)]);
        assert_eq!(batch[0].parcel.after.reports, 64, "it goes on where the first batch ended");
        drop(open);
        assert!(lanes.take().is_empty(), "what waited goes with the lane");
    }

    #[test]
    fn a_batch_ends_and_the_next_begins_with_those_who_waited() {
        let (lanes, open) = lanes(40);
        for lane in &open {
            queue_of(&lanes, lane.key, 100);
        }
        let first: Vec<u64> = lanes.take().iter().map(|load| load.key).collect();
        assert_eq!(first.len(), BATCH / SHARE);
        let second: Vec<u64> = lanes.take().iter().map(|load| load.key).collect();
        assert!(second.iter().all(|key| !first.contains(key)), "{first:?} {second:?}");
    }

    #[tokio::test]
    async fn a_lane_has_room_for_so_much_and_again_when_it_is_stored() {
        let (store, _folder) = scratch().await;
        let (endpoint, epoch) = session(&store, 1).await;
        let ending = CancellationToken::new();
        let intake = Intake::start(store.clone(), &defaults(), ending.clone());
        let mut lane = intake.lane(endpoint, epoch, Counts::default());
        let mut handed = 0;
        while lane.has_room() {
            handed += 1;
            lane.hand_in(lost(handed), 100);
        }
        assert_eq!(handed, LANE_ITEMS as u64);
        while lane.progress.borrow().stored.reports < handed {
            lane.advanced().await.unwrap();
        }
        assert!(lane.has_room());
        lane.hand_in(lost(handed + 1), LANE_BYTES);
        assert!(!lane.has_room(), "bytes count, too");
        assert_eq!(lane.advanced().await.unwrap().reports, handed + 1);
    }

    #[tokio::test]
    async fn a_newer_session_closes_the_older_ones_lane_and_no_other() {
        let (store, _folder) = scratch().await;
        let (endpoint, epoch) = session(&store, 1).await;
        let intake = Intake::start(store.clone(), &defaults(), CancellationToken::new());
        let mut older = intake.lane(endpoint, epoch, Counts::default());
        let opened = store.open_session(endpoint, ManagerId::new(Uuid::nil()), &hello(1), 1).await.unwrap();
        let mut newer = intake.lane(endpoint, opened.epoch, opened.stored);
        older.hand_in(lost(1), 1);
        newer.hand_in(lost(1), 1);
        assert_eq!(older.advanced().await, Err(Failed::Superseded));
        older.hand_in(lost(2), 1);
        assert_eq!(newer.advanced().await.unwrap().reports, 1);
    }

    #[tokio::test]
    async fn what_the_store_cannot_take_stops_its_own_lane_only_and_at_its_place() {
        let (store, _folder) = scratch().await;
        let (endpoint, epoch) = session(&store, 1).await;
        let (other, other_epoch) = session(&store, 2).await;
        // The same code twice is what this store cannot take.
        run(&store, "CREATE UNIQUE INDEX once ON event (detail)").await;
        let intake = Intake::start(store.clone(), &defaults(), CancellationToken::new());
        let mut bad = intake.lane(endpoint, epoch, Counts::default());
        let mut good = intake.lane(other, other_epoch, Counts::default());
        bad.hand_in(notice(1, "fine"), 1);
        bad.hand_in(notice(2, "fine"), 1);
        bad.hand_in(notice(3, "after"), 1);
        good.hand_in(notice(1, "good"), 1);
        assert_eq!(good.advanced().await.unwrap().notices, 1);
        while bad.advanced().await.is_ok() {}
        assert_eq!(bad.progress.borrow().stored.notices, 1, "nothing after the one that was not stored");
    }

    fn notice(first: u64, code: &str) -> HandedIn {
        let notice = Notice { at_ms: 0, code: code.into(), message: String::new(), count: 0 };
        HandedIn::Notices(Notices { first, notices: vec![notice] })
    }

    async fn session(store: &Store, number: u128) -> (EndpointId, i64) {
        let endpoint = endpoint(store, number).await;
        let opened = store.open_session(endpoint, ManagerId::new(Uuid::nil()), &hello(1), 1).await.unwrap();
        (endpoint, opened.epoch)
    }
}
