//! How a new agent is let in: one request, one answer, on a link without a client certificate.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use tm_protocol::{
    ids::{EndpointId, Sha256},
    message::{EnrollReply, EnrollRequest, ToManager},
    report::Failure,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use uuid::Uuid;

use super::{LinkError, now_ms, read, session::Shared, write};
use crate::{
    metrics::METRICS,
    store::enrollments::{NewEndpoint, TokenRefusal},
    strangers::{Place, network},
};

/// How long the request may take to arrive.
const REQUEST: Duration = Duration::from_secs(10);
/// Failures that one address may have in a minute.
const FAILURES: u32 = 10;
/// After how many it is not even told.
const FLOOD: u32 = 100;
const MINUTE: Duration = Duration::from_secs(60);
/// Addresses remembered; beyond it the oldest minute is forgotten.
const REMEMBERED: usize = 10_000;

/// Who has failed lately, by address (of IPv6, by the /64 network).
#[derive(Debug, Clone, Default)]
pub(crate) struct Guard(Arc<Mutex<HashMap<IpAddr, (Instant, u32)>>>);

impl Guard {
    fn is_blocked(&self, from: IpAddr, now: Instant) -> bool {
        self.failures(from, now) >= FAILURES
    }

    /// Whether an address has failed so often that no handshake is done for it.
    pub(crate) fn is_flooding(&self, from: IpAddr, now: Instant) -> bool {
        self.failures(from, now) >= FLOOD
    }

    fn failures(&self, from: IpAddr, now: Instant) -> u32 {
        let failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        failures
            .get(&network(from))
            .filter(|(since, _)| now.duration_since(*since) < MINUTE)
            .map_or(0, |(_, count)| *count)
    }

    fn failed(&self, from: IpAddr, now: Instant) {
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() >= REMEMBERED {
            failures.retain(|_, (since, _)| now.duration_since(*since) < MINUTE);
        }
        if failures.len() >= REMEMBERED {
            failures.clear();
        }
        let entry = failures.entry(network(from)).or_insert((now, 0));
        if now.duration_since(entry.0) >= MINUTE {
            *entry = (now, 0);
        }
        entry.1 = entry.1.saturating_add(1);
    }
}

/// Reads the request and answers it.
pub(crate) async fn run<L: AsyncRead + AsyncWrite + Unpin>(
    link: &mut L,
    from: IpAddr,
    place: &Place,
    guard: &Guard,
    shared: &Shared,
) -> Result<(), LinkError> {
    let mut buffer = BytesMut::new();
    let request = match timeout(REQUEST, read(link, &mut buffer)).await.map_err(|_| LinkError::Silent)?? {
        ToManager::EnrollRequest(request) => request,
        ToManager::Hello(_)
        | ToManager::Inventory(_)
        | ToManager::Ping(_)
        | ToManager::Pong(_)
        | ToManager::Report(_)
        | ToManager::Notices(_)
        | ToManager::Progress(_)
        | ToManager::Renew(_) => return Err(LinkError::Protocol("no enrollment request")),
    };
    // A token is not used up for somebody who is shown out meanwhile.
    place.is_ready();
    let reply = if guard.is_blocked(from, Instant::now()) {
        guard.failed(from, Instant::now());
        refuse("too-many", "too many failed attempts from this address; try again in a minute")
    } else {
        let reply = decide(&request, shared).await?;
        if matches!(reply, EnrollReply::Refused(_)) {
            guard.failed(from, Instant::now());
        }
        reply
    };
    METRICS.enrollment(matches!(reply, EnrollReply::Enrolled { .. }));
    match &reply {
        EnrollReply::Refused(failure) => {
            tracing::info!(%from, code = failure.code, "An enrollment is refused.");
        }
        EnrollReply::Enrolled { endpoint, .. } => {
            tracing::info!(%from, %endpoint, host = request.host, "An endpoint is enrolled.");
        }
    }
    write(link, &reply.into()).await
}

async fn decide(request: &EnrollRequest, shared: &Shared) -> Result<EnrollReply, LinkError> {
    if request.host.len() > 256 || request.agent_version.len() > 64 {
        return Ok(refuse("invalid", "the request is too long"));
    }
    // A bad token costs a look, and neither a signature nor anybody's turn to write.
    let token = Sha256::of(&request.secret);
    if let Some(refusal) = shared.store.token_refusal(token, now_ms()).await.map_err(LinkError::Store)? {
        return Ok(refused(refusal));
    }
    let endpoint = EndpointId::new(Uuid::now_v7());
    let authorities = shared.authorities.now();
    let Ok(issued) = authorities.certify(endpoint, &request.csr) else {
        return Ok(refuse("csr-invalid", "the certificate request is not one"));
    };
    let new = NewEndpoint {
        id: endpoint,
        host: &request.host,
        agent_version: &request.agent_version,
        certificate: issued.row(),
    };
    Ok(match shared.store.use_token(token, new, now_ms()).await.map_err(LinkError::Store)? {
        Ok(()) => EnrollReply::Enrolled {
            endpoint,
            certificate: issued.der,
            ca: authorities.issuing().certificate().to_vec(),
            addresses: shared.addresses.get(),
        },
        Err(refusal) => refused(refusal),
    })
}

fn refused(refusal: TokenRefusal) -> EnrollReply {
    match refusal {
        TokenRefusal::Unknown => refuse("token-unknown", "this manager knows no such enrollment token"),
        TokenRefusal::Revoked => refuse("token-revoked", "the enrollment token has been revoked"),
        TokenRefusal::Expired => refuse("token-expired", "the enrollment token has expired"),
        TokenRefusal::UsedUp => refuse("token-used-up", "the enrollment token has been used up"),
    }
}

fn refuse(code: &str, message: &str) -> EnrollReply {
    EnrollReply::Refused(Failure::new(code, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_failures_a_minute_and_no_more() {
        let (guard, from, start) = (Guard::default(), IpAddr::from([192, 0, 2, 1]), Instant::now());
        for _ in 0..FAILURES {
            assert!(!guard.is_blocked(from, start));
            guard.failed(from, start);
        }
        assert!(guard.is_blocked(from, start));
        assert!(!guard.is_blocked(IpAddr::from([192, 0, 2, 2]), start));
        for last in 1..=10_u8 {
            guard.failed(format!("2001:db8::{last:x}").parse().unwrap(), start);
        }
        assert!(guard.is_blocked("2001:db8::ffff".parse().unwrap(), start), "one network is one source");
        assert!(!guard.is_blocked("2001:db8:0:1::1".parse().unwrap(), start));
        assert!(!guard.is_flooding(from, start));
        for _ in FAILURES..FLOOD {
            guard.failed(from, start);
        }
        assert!(guard.is_flooding(from, start));
        assert!(!guard.is_blocked(from, start + MINUTE) && !guard.is_flooding(from, start + MINUTE));
    }
}
