//! The other managers on this database: that this one lives, who of them does, and what they call.
//!
//! Every [`BEAT`] this manager counts its beat up and looks at the others'. One whose beat stands still for
//! [`PATIENCE`], by this manager's own clock, is given up: its sessions are nobody's, and what was sent in them is
//! sent again by whoever its agents go to. A manager that wakes up after it was given up keeps those of its sessions
//! that no newer one has replaced, and ends the others.
//!
//! **Invariant:** what a call says is only ever a reason to look, or to end a session older than the caller's.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tm_protocol::{
    address::Address,
    ids::{EndpointId, ManagerId},
};
use tokio::{
    sync::{Notify, oneshot},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    now_ms,
    registry::{Command, Registry},
};
use crate::{
    addresses::Addresses,
    store::{
        Store, StoreError,
        calls::{Call, Ear},
        managers::ManagerRow,
    },
};

/// How often a manager says that it lives.
const BEAT: Duration = Duration::from_secs(2);
/// How long another's beat may stand still.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long the addresses of a manager that is gone are still told: it may come back.
const REMEMBERED_MS: i64 = 30 * 86_400_000;
/// How long a session has to prove that it is alive when its identity appears elsewhere.
const PROOF: Duration = Duration::from_secs(5);
/// Questions of other managers that are looked into at a time; more are not answered.
const QUESTIONS: usize = 256;
/// How long to wait before listening again after the database was out of reach.
const RETRY: Duration = Duration::from_secs(2);

/// This manager among the others.
#[derive(Debug, Clone)]
pub(crate) struct Peers {
    store: Store,
    registry: Registry,
    manager: ManagerId,
    own: Arc<Vec<Address>>,
    addresses: Addresses,
    /// What was asked here and waits for an answer.
    asked: Arc<Mutex<HashMap<u64, oneshot::Sender<()>>>>,
}

impl Peers {
    pub(crate) fn new(store: Store, registry: Registry, manager: ManagerId, own: Vec<Address>) -> Self {
        let addresses = Addresses::new(own.clone());
        Self { store, registry, manager, own: Arc::new(own), addresses, asked: Arc::default() }
    }

    /// Where agents reach the managers, as it is known at any moment.
    pub(crate) fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    /// This manager is there, with nobody connected.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn enter(&self) -> Result<(), StoreError> {
        self.store.enter_manager(self.manager, &self.own, now_ms()).await?;
        self.look(&self.store.managers().await?);
        Ok(())
    }

    /// This manager ends.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn leave(&self) -> Result<(), StoreError> {
        self.store.leave_manager(self.manager).await
    }

    /// Beats and watches until the manager ends.
    pub(crate) async fn beat(self, ending: CancellationToken) {
        let mut watched = Watched::default();
        loop {
            tokio::select! {
                () = sleep(BEAT) => {}
                () = ending.cancelled() => return,
            }
            if let Err(error) = self.round(&mut watched).await {
                tracing::warn!(%error, "Cannot say that this manager lives.");
            }
        }
    }

    async fn round(&self, watched: &mut Watched) -> Result<(), StoreError> {
        if !self.store.beat(self.manager, now_ms()).await? {
            let sessions = self.registry.sessions();
            let lost = self.store.reenter_manager(self.manager, &self.own, &sessions, now_ms()).await?;
            tracing::warn!(sessions = sessions.len(), lost = lost.len(), "This manager had been given up.");
            for endpoint in lost {
                self.registry.give_way(endpoint, i64::MAX);
            }
        }
        let managers = self.store.managers().await?;
        self.look(&managers);
        for (manager, beat) in watched.silent(&managers, self.manager, Instant::now()) {
            if self.store.give_manager_up(manager, beat).await? {
                tracing::warn!(%manager, "Another manager is silent and given up.");
            }
        }
        Ok(())
    }

    /// Tells agents of the managers that there are.
    fn look(&self, managers: &[ManagerRow]) {
        let since = now_ms().saturating_sub(REMEMBERED_MS);
        let others = managers.iter().filter(|row| row.id != self.manager && row.seen_ms >= since);
        let (up, away): (Vec<_>, Vec<_>) = others.partition(|row| row.is_up);
        self.addresses.set(&self.own, up.into_iter().chain(away).flat_map(|row| row.addresses.clone()));
    }

    /// Hears the others until the manager ends, and wakes the dispatcher through `nudge`.
    pub(crate) async fn listen(self, nudge: Arc<Notify>, ending: CancellationToken) {
        if !self.store.is_shared() {
            return;
        }
        loop {
            let done = async {
                if let Some(ear) = self.store.ear(self.manager).await? {
                    self.hear(ear, &nudge).await?;
                }
                Ok::<(), StoreError>(())
            };
            tokio::select! {
                heard = done => {
                    if let Err(error) = heard {
                        tracing::warn!(%error, "The other managers cannot be heard.");
                    }
                }
                () = ending.cancelled() => return,
            }
            sleep(RETRY).await;
        }
    }

    async fn hear(&self, mut ear: Ear, nudge: &Notify) -> Result<(), StoreError> {
        // Whatever was called before there was an ear.
        nudge.notify_one();
        let turns = Arc::new(tokio::sync::Semaphore::new(QUESTIONS));
        loop {
            match ear.hear().await? {
                None | Some(Call::Ordered) => nudge.notify_one(),
                Some(Call::Moved { endpoint, epoch }) => self.registry.give_way(endpoint, epoch),
                Some(Call::Asked { endpoint, nonce, question }) => {
                    let Ok(turn) = Arc::clone(&turns).try_acquire_owned() else { continue };
                    let peers = self.clone();
                    tokio::spawn(async move {
                        if answers(&peers.registry, endpoint, nonce).await {
                            peers.store.call(peers.manager, Call::Answers { question }).await;
                        }
                        drop(turn);
                    });
                }
                Some(Call::Answers { question }) => {
                    if let Some(waiting) = self.lock().remove(&question) {
                        let _ = waiting.send(());
                    }
                }
            }
        }
    }

    /// Passes on that something was ordered here, to the dispatcher and to the other managers, until the manager ends.
    pub(crate) async fn pass_on(self, ordered: Arc<Notify>, nudge: Arc<Notify>, ending: CancellationToken) {
        loop {
            tokio::select! {
                () = ordered.notified() => {}
                () = ending.cancelled() => return,
            }
            nudge.notify_one();
            self.store.call(self.manager, Call::Ordered).await;
        }
    }

    /// Whether another process than the one of `nonce` holds this identity, here or at another manager, and answers.
    ///
    /// # Errors
    /// If the database cannot be read.
    pub(crate) async fn is_held(&self, endpoint: EndpointId, nonce: u64) -> Result<bool, StoreError> {
        if answers(&self.registry, endpoint, nonce).await {
            return Ok(true);
        }
        if !self.store.is_shared() || !self.store.held_elsewhere(endpoint, self.manager).await? {
            return Ok(false);
        }
        let (sender, answered) = oneshot::channel();
        let question = rand::random();
        self.lock().insert(question, sender);
        self.store.call(self.manager, Call::Asked { endpoint, nonce, question }).await;
        // Longer than the other manager asks.
        let held = matches!(timeout(PROOF + BEAT / 2, answered).await, Ok(Ok(())));
        self.lock().remove(&question);
        Ok(held)
    }

    /// An endpoint has a new session here: an older one elsewhere ends.
    pub(crate) async fn moved(&self, endpoint: EndpointId, epoch: i64) {
        self.store.call(self.manager, Call::Moved { endpoint, epoch }).await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<()>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether another process holds this identity here and answers. The same process coming back is never another.
async fn answers(registry: &Registry, endpoint: EndpointId, nonce: u64) -> bool {
    let Some((older, standing)) = registry.standing(endpoint) else { return false };
    if standing == nonce {
        return false;
    }
    let (answer, answered) = oneshot::channel();
    if older.try_send(Command::AreYouThere(answer)).is_err() {
        return false;
    }
    matches!(timeout(PROOF, answered).await, Ok(Ok(())))
}

/// When the others' beats last grew.
#[derive(Debug, Default)]
struct Watched(HashMap<ManagerId, (i64, Instant)>);

impl Watched {
    /// The managers that claim to be up and whose beats stand still for too long, with those beats.
    fn silent(&mut self, managers: &[ManagerRow], own: ManagerId, now: Instant) -> Vec<(ManagerId, i64)> {
        let mut silent = Vec::new();
        for row in managers.iter().filter(|row| row.id != own) {
            if !row.is_up {
                self.0.remove(&row.id);
                continue;
            }
            let (beat, since) = self.0.entry(row.id).or_insert((row.beat, now));
            if *beat != row.beat {
                (*beat, *since) = (row.beat, now);
            } else if now.duration_since(*since) >= PATIENCE {
                silent.push((row.id, row.beat));
            }
        }
        silent
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        streams::tests::{endpoint, hello},
        tests::scratch,
    };

    fn id(n: u128) -> ManagerId {
        ManagerId::new(Uuid::from_u128(n))
    }

    #[test]
    fn a_manager_is_silent_when_its_beat_stands_still_for_long_and_only_then() {
        let row = |n, beat, is_up| ManagerRow { id: id(n), addresses: vec![], beat, is_up, seen_ms: 0 };
        let mut watched = Watched::default();
        let start = Instant::now();
        let mut after =
            |seconds, rows: &[ManagerRow]| watched.silent(rows, id(1), start + Duration::from_secs(seconds));
        assert_eq!(after(0, &[row(1, 5, true), row(2, 5, true), row(3, 5, false)]), []);
        assert_eq!(after(14, &[row(1, 5, true), row(2, 5, true), row(3, 5, false)]), []);
        assert_eq!(after(15, &[row(1, 5, true), row(2, 6, true), row(3, 5, false)]), [], "it beats");
        assert_eq!(after(29, &[row(2, 6, true), row(3, 6, true)]), [], "one came back");
        assert_eq!(after(30, &[row(2, 6, true), row(3, 6, true)]), [(id(2), 6)]);
        assert_eq!(after(44, &[row(2, 6, false), row(3, 6, true)]), [(id(3), 6)], "one is gone already");
    }

    #[tokio::test]
    async fn who_was_given_up_takes_up_what_is_still_his_and_ends_the_rest() {
        let (store, _folder) = scratch().await;
        let registry = Registry::new(Arc::default());
        let own: Address = "one.example:1".parse().unwrap();
        let peers = Peers::new(store.clone(), registry.clone(), id(1), vec![own.clone()]);
        let other: Address = "two.example:2".parse().unwrap();
        peers.enter().await.unwrap();
        store.enter_manager(id(2), std::slice::from_ref(&other), now_ms()).await.unwrap();
        let (one, two) = (endpoint(&store, 1).await, endpoint(&store, 2).await);
        let mut outboxes = Vec::new();
        for endpoint in [one, two] {
            let opened = store.open_session(endpoint, id(1), &hello(1), 1).await.unwrap();
            outboxes.push(registry.enter(endpoint, opened.epoch, 7));
        }
        let beat = store.managers().await.unwrap()[0].beat;
        assert!(store.give_manager_up(id(1), beat).await.unwrap());
        let newer = store.open_session(two, id(2), &hello(1), 2).await.unwrap();
        assert!(newer.was_elsewhere.is_none(), "the manager that held it is given up");

        let mut watched = Watched::default();
        peers.round(&mut watched).await.unwrap();
        assert!(outboxes[0].try_recv().is_err(), "its session goes on");
        assert!(matches!(outboxes[1].try_recv(), Ok(Command::GiveWay)));
        assert!(store.endpoint(one).await.unwrap().unwrap().connected);
        assert_eq!(peers.addresses().get(), [own, other]);
        peers.leave().await.unwrap();
        assert!(!store.managers().await.unwrap()[0].is_up);
    }
}
