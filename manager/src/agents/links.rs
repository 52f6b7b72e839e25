//! How many links one endpoint has, so that a certificate in the wrong hands does not open all that there are.
//!
//! **Invariant:** an endpoint never has more than [`MOST`] links of a kind.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tm_protocol::ids::EndpointId;

/// Links of one kind. An agent needs one, and while its network flaps some more that are already dead.
const MOST: usize = 16;

/// What a link is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Sessions.
    Control,
    /// Transfers.
    Bulk,
}

/// The links of all endpoints. Copies share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Links(Arc<Mutex<HashMap<(EndpointId, Kind), usize>>>);

/// One link. Dropped, it is none.
#[derive(Debug)]
pub(crate) struct Held {
    links: Links,
    of: (EndpointId, Kind),
}

impl Links {
    /// Counts one more; `None` if the endpoint has enough.
    pub(crate) fn enter(&self, endpoint: EndpointId, kind: Kind) -> Option<Held> {
        let of = (endpoint, kind);
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = links.entry(of).or_default();
        if *count >= MOST {
            return None;
        }
        *count += 1;
        drop(links);
        Some(Held { links: self.clone(), of })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut links = self.links.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = links.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                links.remove(&self.of);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn one_endpoint_has_a_few_links_and_leaves_nothing_behind() {
        let (links, id) = (Links::default(), |n| EndpointId::new(Uuid::from_u128(n)));
        let held: Vec<Held> = (0..MOST).map(|_| links.enter(id(1), Kind::Control).unwrap()).collect();
        assert!(links.enter(id(1), Kind::Control).is_none());
        assert!(links.enter(id(1), Kind::Bulk).is_some() && links.enter(id(2), Kind::Control).is_some());
        drop(held);
        assert!(links.enter(id(1), Kind::Control).is_some());
        assert!(links.0.lock().unwrap().is_empty());
    }
}
