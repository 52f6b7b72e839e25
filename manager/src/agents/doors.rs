//! Sessions are opened and closed here, all that wait in one commit, so that a fleet that comes back does not pay one
//! disk flush for each of its agents.
//!
//! There is no waiting for company: a lone agent is let in at once, and who comes meanwhile is the next batch.
//!
//! **Invariant:** a session is opened only after that was committed.
//! **Invariant:** comings and goings of one endpoint are written in the order in which they were asked for.

use tm_protocol::{
    ids::{EndpointId, ManagerId},
    message::Hello,
};
use tokio::sync::{mpsc, oneshot};

use super::now_ms;
use crate::metrics::{Held, METRICS};
use crate::store::{
    Store, StoreError,
    sessions::{Opened, Passage, writer_ended},
};

/// Comings and goings that wait; more wait with their sessions.
const WAITING: usize = 1024;
/// Comings and goings in one commit.
const BATCH: usize = 256;

/// Where sessions are opened and closed.
#[derive(Debug, Clone)]
pub(crate) struct Doors(mpsc::Sender<Asked>);

type Passed = Result<Option<Opened>, StoreError>;

#[derive(Debug)]
struct Asked {
    passage: Passage,
    answer: oneshot::Sender<Passed>,
}

impl Doors {
    /// Starts the one writer; it ends when nobody can ask any more.
    pub(crate) fn start(store: Store) -> Self {
        let (sender, asked) = mpsc::channel(WAITING);
        tokio::spawn(write(store, asked));
        Self(sender)
    }

    /// Opens a session.
    ///
    /// # Errors
    /// If the database refuses, or does not hold the endpoint.
    pub(crate) async fn open(
        &self,
        endpoint: EndpointId,
        manager: ManagerId,
        hello: &Hello,
    ) -> Result<Opened, StoreError> {
        let passage = Passage::Open { endpoint, manager, hello: Box::new(hello.clone()) };
        self.ask(passage).await?.ok_or_else(writer_ended)
    }

    /// Notes a session's end, unless a newer one has begun.
    ///
    /// # Errors
    /// If the database refuses.
    pub(crate) async fn close(&self, endpoint: EndpointId, epoch: i64) -> Result<(), StoreError> {
        self.ask(Passage::Close { endpoint, epoch }).await.map(drop)
    }

    async fn ask(&self, passage: Passage) -> Passed {
        let _waits = Held::one(METRICS.queue("doors"));
        let (answer, answered) = oneshot::channel();
        self.0.send(Asked { passage, answer }).await.map_err(|_| writer_ended())?;
        answered.await.map_err(|_| writer_ended())?
    }
}

async fn write(store: Store, mut asked: mpsc::Receiver<Asked>) {
    let mut batch = Vec::with_capacity(BATCH);
    while asked.recv_many(&mut batch, BATCH).await > 0 {
        // Rows are locked in one order everywhere; what concerns one endpoint stays in its order.
        batch.sort_by_key(|asked| asked.passage.endpoint());
        let (passages, answers): (Vec<Passage>, Vec<_>) =
            batch.drain(..).map(|asked| (asked.passage, asked.answer)).unzip();
        match store.pass(&passages, now_ms()).await {
            Ok(passed) => {
                for (answer, passed) in answers.into_iter().zip(passed) {
                    // Whoever asked may have gone meanwhile.
                    let _ = answer.send(passed);
                }
            }
            // What the store cannot take of one must not keep the others out.
            Err(_) => {
                for (answer, passage) in answers.into_iter().zip(passages) {
                    let _ = answer.send(alone(&store, passage).await);
                }
            }
        }
    }
}

async fn alone(store: &Store, passage: Passage) -> Passed {
    match passage {
        Passage::Open { endpoint, manager, hello } => {
            store.open_session(endpoint, manager, &hello, now_ms()).await.map(Some)
        }
        Passage::Close { endpoint, epoch } => {
            store.close_session(endpoint, epoch, now_ms()).await.map(|()| None)
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use uuid::Uuid;

    use super::*;
    use crate::store::{
        streams::tests::{endpoint, hello, run},
        tests::scratch,
    };

    #[tokio::test]
    async fn all_who_come_at_once_are_let_in_and_the_unknown_alone_is_not() {
        let (store, _folder) = scratch().await;
        let doors = Doors::start(store.clone());
        let mut known = Vec::new();
        for n in 1..=40 {
            known.push(endpoint(&store, n).await);
        }
        let manager = ManagerId::new(Uuid::from_u128(7));
        let stranger = EndpointId::new(Uuid::from_u128(99));
        let hello = hello(1);
        let all = known.iter().copied().chain([stranger]).chain(known.iter().copied());
        let opened = join_all(all.map(|endpoint| doors.open(endpoint, manager, &hello))).await;
        let epochs: Vec<Option<i64>> = opened.iter().map(|o| o.as_ref().ok().map(|o| o.epoch)).collect();
        assert!(epochs[..40].iter().all(|epoch| *epoch == Some(1)), "{epochs:?}");
        assert!(epochs[40].is_none(), "{epochs:?}");
        assert!(epochs[41..].iter().all(|epoch| *epoch == Some(2)), "{epochs:?}");
    }

    #[tokio::test]
    async fn what_the_store_refuses_of_one_keeps_nobody_else_out() {
        let (store, _folder) = scratch().await;
        let doors = Doors::start(store.clone());
        let mut known = Vec::new();
        for n in 1..=3 {
            known.push(endpoint(&store, n).await);
        }
        // No two may have the same boot: that is what this store cannot take.
        run(&store, "CREATE UNIQUE INDEX boots ON endpoint (boot_id)").await;
        let manager = ManagerId::new(Uuid::from_u128(7));
        let boot = |id: &str| Hello { boot_id: id.into(), ..hello(1) };
        let hellos = [boot("a"), boot("a"), boot("b")];
        let asked = known.iter().zip(&hellos).map(|(endpoint, hello)| doors.open(*endpoint, manager, hello));
        let opened: Vec<bool> = join_all(asked).await.iter().map(Result::is_ok).collect();
        assert_eq!(opened, [true, false, true]);
    }
}
