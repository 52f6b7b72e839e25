//! An agent that came with the identity of another one that answers: it is held, says what it is, and gets nothing, until
//! an administrator makes it an endpoint of its own or shuts the identity out.
//!
//! Once the held one has an identity of its own, the first one is told to make a new key: the one that both have is then
//! good for nothing.
//!
//! **Invariant:** a held agent gets no order, no pattern of this link, and nothing of what it hands in is stored but a few
//! of its facts.
//! **Invariant:** of one identity at most [`MOST`] are held here at a time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::BytesMut;
use tm_protocol::{
    ids::{EndpointId, Sha256},
    message::{Held, Inventory, NewIdentity, Ping, Pong, Renew, RenewNow, ToManager},
    report::Failure,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    LinkError, now_ms, read,
    registry::Registry,
    session::{self, Shared},
    write,
};
use crate::store::{Store, conflicts::Standing};

/// Agents of one identity that are held here at a time.
const MOST: usize = 4;
/// How long a held agent may take to say what it is.
const FACTS: Duration = Duration::from_secs(30);
/// How often it is looked whether somebody has decided.
const LOOK: Duration = Duration::from_secs(3);
/// How often agents whose keys were copied are reminded.
const REMIND: Duration = Duration::from_secs(3);
/// Messages that one may send between two looks; there is nothing to say but pings and facts.
const CHATTER: u32 = 64;

/// Who is held here, by the identity that he came with. Copies share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places(Arc<Mutex<HashMap<EndpointId, usize>>>);

/// A held agent's place. It is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    places: Places,
    endpoint: EndpointId,
}

impl Places {
    /// A place, if there is one left.
    pub(crate) fn take(&self, endpoint: EndpointId) -> Option<Place> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = places.entry(endpoint).or_default();
        if *count >= MOST {
            return None;
        }
        *count += 1;
        Some(Place { places: self.clone(), endpoint })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.places.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = places.get_mut(&self.endpoint) {
            *count -= 1;
            if *count == 0 {
                places.remove(&self.endpoint);
            }
        }
    }
}

/// Holds an agent until somebody decides about it; how the link ended.
pub(crate) async fn run<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    buffer: &mut BytesMut,
    endpoint: EndpointId,
    shared: &Shared,
) -> LinkError {
    match hold(link, buffer, endpoint, shared).await {
        Ok(()) => LinkError::Replaced,
        Err(error) => error,
    }
}

async fn hold<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    buffer: &mut BytesMut,
    endpoint: EndpointId,
    shared: &Shared,
) -> Result<(), LinkError> {
    let Some(_place) = shared.held.take(endpoint) else {
        let failure = Failure::new("identity-in-use", "several agents with this identity are held already");
        return Err(session::goodbye(link, failure, 300_000).await);
    };
    let heartbeat_ms = u32::try_from(shared.heartbeat.as_millis()).unwrap_or(u32::MAX);
    write(link, &Held { clock_ms: now_ms(), heartbeat_ms }.into()).await?;
    let said = timeout(FACTS, introduction(link, buffer)).await.map_err(|_| LinkError::Silent)?;
    let (mut facts, request) = said?;
    // Whether it is a request is found out now, and not when somebody has decided.
    let Ok(probe) = shared.authorities.now().certify(endpoint, &request.csr) else {
        let failure = Failure::new("csr-invalid", "the certificate request is not one");
        return Err(session::goodbye(link, failure, 300_000).await);
    };
    let key = Sha256::of(&probe.public_key);
    // A manager that waits for its database hears nobody meanwhile.
    let silence = (shared.heartbeat * 2).max(LOOK * 5);
    let (mut last_heard, mut next_look, mut said) = (Instant::now(), Instant::now(), 0_u32);
    loop {
        tokio::select! {
            message = read(link, buffer), if said < CHATTER => {
                (last_heard, said) = (Instant::now(), said + 1);
                match message? {
                    ToManager::Ping(Ping { nonce }) => write(link, &Pong { nonce }.into()).await?,
                    ToManager::Pong(_) => {}
                    ToManager::Inventory(fresh) => facts = fresh,
                    ToManager::Hello(_)
                    | ToManager::Report(_)
                    | ToManager::Notices(_)
                    | ToManager::Progress(_)
                    | ToManager::Renew(_)
                    | ToManager::EnrollRequest(_) => {
                        return Err(LinkError::Protocol("a held agent hands something in"));
                    }
                }
            }
            () = sleep_until(next_look) => {
                said = 0;
                match shared.store.hold(endpoint, key, &facts, now_ms()).await.map_err(LinkError::Store)? {
                    Standing::Held => {}
                    Standing::Approved(new) => return admit(link, new, &request, shared).await,
                    Standing::ShutOut => return Err(session::shut_out(link).await),
                }
                next_look = Instant::now() + LOOK;
                write(link, &Ping { nonce: rand::random() }.into()).await?;
            }
            () = sleep_until(last_heard + silence) => return Err(LinkError::Silent),
            () = shared.ending.cancelled() => {
                let failure = Failure::new("manager-ending", "the manager ends");
                return Err(session::goodbye(link, failure, 0).await);
            }
        }
    }
}

/// What a held agent says of itself, and its request for a certificate, in either order.
async fn introduction<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    buffer: &mut BytesMut,
) -> Result<(Inventory, Renew), LinkError> {
    let (mut facts, mut request) = (None, None);
    loop {
        match read(link, buffer).await? {
            ToManager::Inventory(said) => facts = Some(said),
            ToManager::Renew(said) => request = Some(said),
            ToManager::Ping(Ping { nonce }) => write(link, &Pong { nonce }.into()).await?,
            ToManager::Pong(_) => {}
            ToManager::Hello(_)
            | ToManager::Report(_)
            | ToManager::Notices(_)
            | ToManager::Progress(_)
            | ToManager::EnrollRequest(_) => {
                return Err(LinkError::Protocol("a held agent hands something in"));
            }
        }
        if let (Some(_), Some(_)) = (&facts, &request)
            && let (Some(facts), Some(request)) = (facts.take(), request.take())
        {
            return Ok((facts, request));
        }
    }
}

/// Gives an approved agent its own identity.
async fn admit<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    new: EndpointId,
    request: &Renew,
    shared: &Shared,
) -> Result<(), LinkError> {
    let Ok(issued) = shared.authorities.now().certify(new, &request.csr) else {
        return Err(LinkError::Protocol("a request that was one is none"));
    };
    if !shared.store.renew(new, &issued.row(), now_ms()).await.map_err(LinkError::Store)? {
        return Err(session::shut_out(link).await);
    }
    tracing::info!(endpoint = %new, serial = issued.serial, "A held agent is an endpoint of its own.");
    write(link, &NewIdentity { endpoint: new, certificate: issued.der }.into()).await
}

/// Tells agents whose keys were copied to make new ones, until they have, or the manager ends.
pub(crate) async fn remind(store: Store, registry: Registry, ending: CancellationToken) {
    loop {
        tokio::select! {
            () = sleep(REMIND) => {}
            () = ending.cancelled() => return,
        }
        match store.with_copied_key(now_ms()).await {
            Ok(endpoints) => {
                endpoints.into_iter().for_each(|endpoint| registry.tell(endpoint, &RenewNow.into()))
            }
            Err(error) => tracing::warn!(%error, "Cannot look for copied keys."),
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_few_of_each_identity_are_held_and_places_come_back() {
        let places = Places::default();
        let (one, two) = (EndpointId::new(Uuid::from_u128(1)), EndpointId::new(Uuid::from_u128(2)));
        let held: Vec<Place> = (0..MOST).filter_map(|_| places.take(one)).collect();
        assert_eq!(held.len(), MOST);
        assert!(places.take(one).is_none());
        assert!(places.take(two).is_some(), "another's places are its own");
        drop(held);
        assert!(places.take(one).is_some());
        assert!(places.0.lock().unwrap().is_empty(), "nobody is remembered");
    }
}
