//! The agents' port: strangers are kept few, short and apart from those who are known.
//!
//! **Invariant:** until a client has proven who it is it holds a stranger's permit and a time limit; agents
//! with a session hold none, so strangers can never use up their places.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::server::Acceptor;
use tm_protocol::{ALPN_BULK, ALPN_CONTROL, ALPN_ENROLL, ALPN_RENEW, ids::EndpointId};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{LazyConfigAcceptor, server::TlsStream};

use super::{
    LinkError, bulk,
    enrollment::{self, Guard},
    now_ms, renewal,
    session::{self, Shared},
    tls::{Peer, Ports, peer},
};
use crate::{
    metrics::{Held, METRICS},
    store::enrollments::CertificateStatus,
};

/// Links that have not proven who they are. The oldest of them is at most [`HANDSHAKE`] old.
const STRANGERS: usize = 4096;
/// How long the first byte may take.
const FIRST_BYTE: Duration = Duration::from_secs(5);
/// How long the whole handshake may.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What the port works with.
#[derive(Clone)]
pub(crate) struct Port {
    pub(crate) tls: Arc<Ports>,
    pub(crate) bulk: bulk::Bulk,
    pub(crate) guard: Guard,
    pub(crate) shared: Shared,
}

/// Accepts until the manager ends.
pub(crate) async fn run(listener: TcpListener, port: Port) {
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    let _listening = Listening;
    loop {
        // Whoever only waits for links is listening, however the last attempt ended.
        METRICS.agent_port_listening.set(1);
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = port.shared.ending.cancelled() => return,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                METRICS.agent_port_listening.set(0);
                // Out of descriptors, mostly: whoever waits in the backlog is served when some are free.
                tracing::warn!(%error, "Cannot accept.");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Full: the newest stranger is turned away, and an agent among them tries again with jitter.
        let Ok(permit) = Arc::clone(&strangers).try_acquire_owned() else {
            METRICS.handshake("turned-away");
            continue;
        };
        let permit = Stranger { _permit: permit, _held: Held::one(METRICS.links_unproven.clone()) };
        let port = port.clone();
        tokio::spawn(async move {
            match timeout(HANDSHAKE, greet(stream, &port)).await {
                Ok(Ok(known)) => serve(known, from, permit, &port).await,
                Ok(Err(error)) => {
                    METRICS.handshake(if error.kind() == io::ErrorKind::TimedOut {
                        "timeout"
                    } else {
                        "failed"
                    });
                    tracing::debug!(%from, %error, "No handshake.");
                }
                Err(_) => {
                    METRICS.handshake("timeout");
                    tracing::debug!(%from, "A handshake takes too long.");
                }
            }
        });
    }
}

/// Says, when it is dropped, that the port is not listened on any more.
struct Listening;

impl Drop for Listening {
    fn drop(&mut self) {
        METRICS.agent_port_listening.set(0);
    }
}

/// A stranger's permit.
struct Stranger {
    _permit: OwnedSemaphorePermit,
    _held: Held,
}

/// A link after its handshake.
enum Greeted {
    Control(Box<TlsStream<TcpStream>>),
    Bulk(Box<TlsStream<TcpStream>>),
    Enroll(Box<TlsStream<TcpStream>>),
    Renew(Box<TlsStream<TcpStream>>),
}

async fn greet(stream: TcpStream, port: &Port) -> io::Result<Greeted> {
    let _ = stream.set_nodelay(true);
    timeout(FIRST_BYTE, stream.peek(&mut [0])).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let offered: Vec<Vec<u8>> =
        start.client_hello().alpn().map(|names| names.map(<[u8]>::to_vec).collect()).unwrap_or_default();
    let tls = port.tls.now();
    let offers = |name: &[u8]| offered.iter().any(|offer| offer == name);
    if offers(ALPN_CONTROL) {
        Ok(Greeted::Control(Box::new(start.into_stream(Arc::clone(&tls.control)).await?)))
    } else if offers(ALPN_BULK) {
        Ok(Greeted::Bulk(Box::new(start.into_stream(Arc::clone(&tls.bulk)).await?)))
    } else if offers(ALPN_ENROLL) {
        Ok(Greeted::Enroll(Box::new(start.into_stream(Arc::clone(&tls.enroll)).await?)))
    } else if offers(ALPN_RENEW) {
        Ok(Greeted::Renew(Box::new(start.into_stream(Arc::clone(&tls.renew)).await?)))
    } else {
        Err(io::Error::other("it names no protocol of ours"))
    }
}

async fn serve(greeted: Greeted, from: SocketAddr, permit: Stranger, port: &Port) {
    match greeted {
        Greeted::Control(mut link) => {
            let peer = match judge(&link, port).await {
                Judged::Good(peer) => peer,
                // It is told, so that whoever looks at the endpoint sees why it stays away.
                Judged::Revoked => {
                    session::shut_out(&mut *link).await;
                    let _ =
                        timeout(Duration::from_secs(1), tokio::io::AsyncWriteExt::shutdown(&mut *link)).await;
                    return;
                }
                Judged::Bad => return,
            };
            drop(permit);
            let error = session::run(&mut *link, peer.endpoint, &port.shared).await;
            log_end(peer.endpoint, &error, port);
            // The end is said properly, so that the agent sees it at once.
            let _ = timeout(Duration::from_secs(1), tokio::io::AsyncWriteExt::shutdown(&mut *link)).await;
        }
        Greeted::Bulk(link) => {
            if let Judged::Good(peer) = judge(&link, port).await {
                drop(permit);
                let place = port.shared.registry.enter_bulk(peer.endpoint);
                tokio::select! {
                    () = bulk::run(*link, peer, port.bulk.clone()) => {}
                    () = place.cut() => {}
                }
            }
        }
        Greeted::Enroll(mut link) => {
            METRICS.handshake("completed");
            let done = enrollment::run(&mut *link, from.ip(), &port.guard, &port.shared).await;
            if let Err(error) = done {
                tracing::debug!(%from, %error, "An enrollment ended.");
            }
            let _ = timeout(Duration::from_secs(1), tokio::io::AsyncWriteExt::shutdown(&mut *link)).await;
            drop(permit);
        }
        Greeted::Renew(mut link) => {
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
            let _ = timeout(Duration::from_secs(1), tokio::io::AsyncWriteExt::shutdown(&mut *link)).await;
            drop(permit);
        }
    }
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
    match port.shared.store.certificate_status(peer.endpoint, &peer.serial).await {
        Ok(CertificateStatus::Enrolled) => Judged::Good(peer),
        Ok(CertificateStatus::Fresh) => {
            // From here on the older ones are good for nothing, also in the hands of whoever copied them.
            match port.shared.store.certificate_used(peer.endpoint, &peer.serial, now_ms()).await {
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
