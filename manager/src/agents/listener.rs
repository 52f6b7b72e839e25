//! The agents' port: strangers are kept few, short and apart from those who are known.
//!
//! **Invariant:** until a client has proven who it is it holds a stranger's place and a time limit; agents
//! with a session hold none, so strangers can never use up their places.
//! **Invariant:** one endpoint never has more than a few links, whether it says anything over them or not.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tm_protocol::{ALPN_BULK, ALPN_CONTROL, ALPN_ENROLL, ALPN_RENEW, ids::EndpointId};
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_rustls::server::TlsStream;

use super::{
    LinkError, bulk,
    enrollment::{self, Guard},
    links::{Held, Kind, Links},
    renewal,
    session::{self, Shared},
    tls::{Peer, Ports, peer},
};
use crate::{
    handshake::{self, Begun},
    lobby::Heard,
    metrics::METRICS,
    store::enrollments::CertificateStatus,
    strangers::Place,
};

/// Links that have not proven who they are, at most.
const STRANGERS: usize = 4096;
/// What the port works with.
#[derive(Clone)]
pub(crate) struct Port {
    pub(crate) tls: Arc<Ports>,
    pub(crate) bulk: bulk::Bulk,
    pub(crate) guard: Guard,
    pub(crate) links: Links,
    pub(crate) shared: Shared,
}

/// Serves whoever comes out of the lobby, until the manager ends.
pub(crate) async fn run(mut lobby: mpsc::Receiver<Heard>, port: Port) {
    loop {
        let heard = tokio::select! {
            heard = lobby.recv() => heard,
            () = port.shared.ending.cancelled() => return,
        };
        let Some(heard) = heard else { return };
        let port = port.clone();
        tokio::spawn(async move {
            let (begun, from, place) = match heard.start().await {
                Ok(started) => started,
                Err(error) => return tracing::warn!(%error, "Cannot take a link over."),
            };
            let greeted = tokio::select! {
                greeted = greet(begun, from, &place, &port) => greeted,
                () = place.is_lost() => {
                    Err(io::Error::new(io::ErrorKind::Interrupted, "another one needs the place"))
                }
            };
            match greeted {
                Ok(greeted) => serve(greeted, from, place, &port).await,
                Err(error) => {
                    METRICS.handshake(if error.kind() == io::ErrorKind::TimedOut {
                        "timeout"
                    } else if error.kind() == io::ErrorKind::Interrupted {
                        "turned-away"
                    } else {
                        "failed"
                    });
                    tracing::debug!(%from, %error, "No handshake.");
                }
            }
        });
    }
}

/// How many strangers there may be. They take a quarter of the descriptors at most: the others are for those who are
/// known.
pub(crate) fn places() -> usize {
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let quarter = descriptors.map_or(usize::MAX, |most| usize::try_from(most / 4).unwrap_or(usize::MAX));
    STRANGERS.min(quarter)
}

/// A link after its handshake.
enum Greeted {
    Control(Box<TlsStream<TcpStream>>),
    Bulk(Box<TlsStream<TcpStream>>),
    Enroll(Box<TlsStream<TcpStream>>),
    Renew(Box<TlsStream<TcpStream>>),
}

async fn greet(begun: Begun, from: SocketAddr, place: &Place, port: &Port) -> io::Result<Greeted> {
    let offered = begun.protocols();
    let tls = port.tls.now();
    let offers = |name: &[u8]| offered.iter().any(|offer| offer == name);
    if offers(ALPN_CONTROL) {
        Ok(Greeted::Control(handshake::shake(begun, tls.control, place).await?))
    } else if offers(ALPN_BULK) {
        Ok(Greeted::Bulk(handshake::shake(begun, tls.bulk, place).await?))
    } else if offers(ALPN_ENROLL) {
        if port.guard.is_flooding(from.ip(), Instant::now().into_std()) {
            return Err(io::Error::other("it has failed to enroll far too often"));
        }
        Ok(Greeted::Enroll(handshake::shake(begun, tls.enroll, place).await?))
    } else if offers(ALPN_RENEW) {
        Ok(Greeted::Renew(handshake::shake(begun, tls.renew, place).await?))
    } else {
        Err(io::Error::other("it names no protocol of ours"))
    }
}

/// Counts one more link of an endpoint, which is no stranger any more; `None` if it has enough.
fn admit(endpoint: EndpointId, kind: Kind, place: Place, port: &Port) -> Option<Held> {
    drop(place);
    let held = port.links.enter(endpoint, kind);
    let now = Instant::now().into_std();
    if held.is_none() && port.shared.meters.of(endpoint, now).may_log(now) {
        tracing::warn!(%endpoint, ?kind, "An endpoint opens more links than any agent needs; the newest is closed.");
    }
    held
}

async fn serve(greeted: Greeted, from: SocketAddr, place: Place, port: &Port) {
    match greeted {
        Greeted::Control(mut link) => {
            place.is_ready();
            let peer = match judge(&link, port).await {
                Judged::Good(peer) => peer,
                // It is told, so that whoever looks at the endpoint sees why it stays away.
                Judged::Revoked => {
                    session::shut_out(&mut *link).await;
                    end(&mut link).await;
                    return;
                }
                Judged::Bad => return,
            };
            let Some(_held) = admit(peer.endpoint, Kind::Control, place, port) else { return };
            let error = session::run(&mut *link, peer.endpoint, &port.shared).await;
            log_end(peer.endpoint, &error, port);
            end(&mut link).await;
        }
        Greeted::Bulk(mut link) => {
            place.is_ready();
            if let Judged::Good(peer) = judge(&link, port).await {
                let Some(_held) = admit(peer.endpoint, Kind::Bulk, place, port) else { return };
                link.get_mut().1.set_buffer_limit(Some(bulk::PIECE));
                let cut = port.shared.registry.enter_bulk(peer.endpoint);
                tokio::select! {
                    () = bulk::run(*link, peer, port.bulk.clone()) => {}
                    () = cut.cut() => {}
                }
            }
        }
        Greeted::Enroll(mut link) => {
            METRICS.handshake("completed");
            let done = tokio::select! {
                done = enrollment::run(&mut *link, from.ip(), &place, &port.guard, &port.shared) => done,
                () = place.is_lost() => Err(LinkError::Replaced),
            };
            if let Err(error) = done {
                tracing::debug!(%from, %error, "An enrollment ended.");
            }
            end(&mut link).await;
        }
        Greeted::Renew(mut link) => {
            place.is_ready();
            match judge(&link, port).await {
                Judged::Good(peer) => {
                    if let Err(error) = renewal::run(&mut *link, peer.endpoint, &port.shared).await {
                        tracing::debug!(endpoint = %peer.endpoint, %error, "A renewal ended.");
                    }
                }
                Judged::Revoked => {
                    session::shut_out(&mut *link).await;
                }
                Judged::Bad => {}
            }
            end(&mut link).await;
        }
    }
}

/// The end is said properly, so that the client sees it at once.
async fn end(link: &mut TlsStream<TcpStream>) {
    let _ = timeout(Duration::from_secs(1), tokio::io::AsyncWriteExt::shutdown(link)).await;
}

/// Says that a session ended, unless this endpoint has filled enough of the log.
fn log_end(endpoint: EndpointId, error: &LinkError, port: &Port) {
    let now = Instant::now().into_std();
    if !port.shared.meters.of(endpoint, now).may_log(now) {
        tracing::debug!(%endpoint, %error, "A session ended.");
        return;
    }
    match error {
        LinkError::Frame(_) | LinkError::Protocol(_) | LinkError::Store(_) | LinkError::Unstorable => {
            tracing::warn!(%endpoint, %error, "A session ended.");
        }
        LinkError::Broken(_)
        | LinkError::Closed
        | LinkError::Silent
        | LinkError::Replaced
        | LinkError::Ending => tracing::info!(%endpoint, %error, "A session ended."),
    }
}

/// What a client's certificate is.
enum Judged {
    /// An agent's of ours, enrolled and not revoked.
    Good(Peer),
    /// One that was ours, and proven to be the client's.
    Revoked,
    Bad,
}

/// Who the client is, and whether it may come in.
async fn judge(link: &TlsStream<TcpStream>, port: &Port) -> Judged {
    let judged = look_at(link, port).await;
    METRICS.handshake(if matches!(judged, Judged::Good(_)) { "completed" } else { "refused" });
    judged
}

async fn look_at(link: &TlsStream<TcpStream>, port: &Port) -> Judged {
    let certificate = link.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let Some(peer) =
        certificate.and_then(|certificate| peer(certificate, port.shared.authorities.now().fleet()))
    else {
        return Judged::Bad;
    };
    match port.shared.lookups.status(&peer).await {
        Ok(CertificateStatus::Enrolled) => Judged::Good(peer),
        Ok(CertificateStatus::Fresh) => {
            // From here on the older ones are good for nothing, also in the hands of whoever copied them.
            match port.shared.lookups.used(&peer).await {
                Ok(()) => Judged::Good(peer),
                Err(error) => {
                    tracing::error!(%error, "Cannot note that a certificate is used.");
                    Judged::Bad
                }
            }
        }
        Ok(status) => {
            let now = Instant::now().into_std();
            if port.shared.meters.of(peer.endpoint, now).may_log(now) {
                tracing::warn!(endpoint = %peer.endpoint, ?status, "A certificate is refused.");
            }
            if status == CertificateStatus::Revoked { Judged::Revoked } else { Judged::Bad }
        }
        // Not knowing is no reason to let anybody in.
        Err(error) => {
            tracing::error!(%error, "Cannot look a certificate up.");
            Judged::Bad
        }
    }
}
