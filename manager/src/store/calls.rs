//! What managers on one PostgreSQL call to each other (`LISTEN`, `NOTIFY`). SQLite has one manager and no calls.
//!
//! A call is a hint: it may get lost, and whoever misses one finds out at his next look at the database.
//!
//! **Invariant:** a call carries ids and numbers only, and what it says is checked against what is known here.

use sqlx::{PgPool, postgres::PgListener};
use tm_protocol::ids::{EndpointId, ManagerId};

use super::{Store, StoreError};

const CHANNEL: &str = "tm_calls";

/// What one manager calls to all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// Something was ordered or called off.
    Ordered,
    /// An endpoint has a newer session, of this number, at the caller's.
    Moved { endpoint: EndpointId, epoch: i64 },
    /// Does another process than this hold the endpoint's session with you, and does it answer?
    Asked { endpoint: EndpointId, nonce: u64, question: u64 },
    /// It does.
    Answers { question: u64 },
}

impl Call {
    fn text(self) -> String {
        match self {
            Self::Ordered => "ordered".to_owned(),
            Self::Moved { endpoint, epoch } => format!("moved {endpoint} {epoch}"),
            Self::Asked { endpoint, nonce, question } => format!("asked {endpoint} {nonce} {question}"),
            Self::Answers { question } => format!("answers {question}"),
        }
    }

    /// Reads a call; `None` for one of another version's.
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let call = match words.next()? {
            "ordered" => Self::Ordered,
            "moved" => {
                Self::Moved { endpoint: words.next()?.parse().ok()?, epoch: words.next()?.parse().ok()? }
            }
            "asked" => Self::Asked {
                endpoint: words.next()?.parse().ok()?,
                nonce: words.next()?.parse().ok()?,
                question: words.next()?.parse().ok()?,
            },
            "answers" => Self::Answers { question: words.next()?.parse().ok()? },
            _ => return None,
        };
        words.next().is_none().then_some(call)
    }
}

/// Hears what others call.
#[derive(Debug)]
pub(crate) struct Ear {
    listener: PgListener,
    own: ManagerId,
}

impl Ear {
    /// The next call of another manager; `None` if the connection was lost meanwhile and calls may have been too.
    ///
    /// # Errors
    /// If the database is out of reach.
    pub(crate) async fn hear(&mut self) -> Result<Option<Call>, StoreError> {
        loop {
            let heard = self.listener.try_recv().await.map_err(StoreError::query("hear other managers"))?;
            let Some(heard) = heard else { return Ok(None) };
            let Some((caller, text)) = heard.payload().split_once(' ') else { continue };
            if caller.parse::<ManagerId>().is_ok_and(|caller| caller != self.own)
                && let Some(call) = Call::parse(text)
            {
                return Ok(Some(call));
            }
        }
    }
}

impl Store {
    /// Listens as `own`; `None` where there are no other managers to hear.
    ///
    /// # Errors
    /// If the database is out of reach.
    pub(crate) async fn ear(&self, own: ManagerId) -> Result<Option<Ear>, StoreError> {
        let Some(pool) = &self.calls else { return Ok(None) };
        let refused = StoreError::query;
        let mut listener =
            PgListener::connect_with(pool).await.map_err(refused("listen to other managers"))?;
        listener.listen(CHANNEL).await.map_err(refused("listen to other managers"))?;
        Ok(Some(Ear { listener, own }))
    }

    /// Calls to all other managers, if there can be any. A call that fails is only logged: it is a hint.
    pub(crate) async fn call(&self, own: ManagerId, call: Call) {
        let Some(pool) = &self.calls else { return };
        let sent = sqlx::query("SELECT pg_notify($1, $2)")
            .bind(CHANNEL)
            .bind(format!("{own} {}", call.text()))
            .execute(pool)
            .await;
        if let Err(error) = sent {
            tracing::warn!(%error, "Cannot call the other managers.");
        }
    }

    /// Whether other managers may work on this database.
    pub(crate) fn is_shared(&self) -> bool {
        self.calls.is_some()
    }
}

/// Connections for calls: one to listen, one to speak.
pub(super) fn pool(url: &str) -> Result<PgPool, sqlx::Error> {
    sqlx::postgres::PgPoolOptions::new().max_connections(2).acquire_timeout(super::PATIENCE).connect_lazy(url)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use uuid::Uuid;

    use super::*;
    use crate::store::tests::{is_sqlite, scratch};

    fn all() -> [Call; 4] {
        let endpoint = EndpointId::new(Uuid::from_u128(7));
        [
            Call::Ordered,
            Call::Moved { endpoint, epoch: 3 },
            Call::Asked { endpoint, nonce: u64::MAX, question: 9 },
            Call::Answers { question: 9 },
        ]
    }

    #[test]
    fn calls_are_read_as_they_are_written_and_nothing_else_is() {
        for call in all() {
            assert_eq!(Call::parse(&call.text()), Some(call));
            assert_eq!(Call::parse(&format!("{} more", call.text())), None);
        }
        for text in ["", "shutdown", "moved", "moved x 1", "answers -1", "answers 99999999999999999999999"] {
            assert_eq!(Call::parse(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn others_are_heard_and_oneself_is_not() {
        let (store, _folder) = scratch().await;
        let (one, two) = (ManagerId::new(Uuid::from_u128(1)), ManagerId::new(Uuid::from_u128(2)));
        let ear = store.ear(one).await.unwrap();
        assert_eq!((ear.is_none(), store.is_shared()), (is_sqlite(&store), !is_sqlite(&store)));
        let Some(mut ear) = ear else { return };
        for call in all() {
            store.call(one, call).await;
            store.call(two, call).await;
            let heard = tokio::time::timeout(Duration::from_secs(20), ear.hear()).await;
            assert_eq!(heard.expect("it is heard").unwrap(), Some(call));
        }
    }
}
