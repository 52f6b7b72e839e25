//! Bulk transfers over `http/1.1`: patterns and deltas of patterns down, in parts where wanted, and files up.
//!
//! | request | answer |
//! |---|---|
//! | `GET`, `HEAD /v1/patterns/SHA256` | the bytes; `Range` and `If-Range` as in RFC 9110, the `ETag` is the digest; 410 if its rollout was stopped |
//! | `GET /v1/patterns/SHA256/deltas?from=SHA256,…` | of those that the agent has, the one to begin with, and digest and length of the delta: one line; 404 if there is none worth it |
//! | `GET`, `HEAD /v1/deltas/SHA256` | a delta's bytes, as a pattern's |
//! | `GET /v1/trust` | the signed metadata in force, which say what patterns are the fleet's; 304 if their digest stands in `If-None-Match`, 404 if there are none |
//! | `/v1/uploads…` | see [`intake`] |
//!
//! Whoever is told 503 comes again after the seconds in `Retry-After`, or somewhat later.
//!
//! **Invariant:** a link costs a bounded amount of memory, whatever is transferred: bytes are read while they are
//! sent, from one open file for all, and what is read once stands in the kernel's cache for the others.
//! **Invariant:** a certificate is looked at before every request and while bytes move, so that a revoked one begins no
//! transfer, and goes on with none for longer than some seconds.

mod deltas;
mod files;
mod intake;
mod range;
mod turns;
mod uploads;

use std::{
    convert::Infallible,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{
        ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderValue, IF_NONE_MATCH, IF_RANGE,
        RANGE, RETRY_AFTER,
    },
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tm_protocol::ids::Sha256;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::CancellationToken;

pub(crate) use self::files::PIECE;
use self::{
    deltas::Deltas,
    files::Files,
    range::Wanted,
    turns::{Busy, Turns},
    uploads::Uploads,
};
use super::tls::Peer;
use crate::{
    limits::Limits,
    patterns::Blobs,
    store::{Store, enrollments::CertificateStatus},
};

/// How long a request's header may take, and the next one's.
const HEADER: Duration = Duration::from_secs(10);
/// How long a whole link may; what is not done by then goes on over another.
const LINK: Duration = Duration::from_secs(600);
/// How often is looked whether a request goes on and its certificate still holds, and how many looks in vain end its
/// link.
const LOOK: Duration = Duration::from_secs(2);
const LOOKS: u32 = 15;
/// Bytes that have to move between two looks, or one of them was in vain: any network moves more.
const SLOWEST: u64 = 1024;
/// How often is looked for uploads that are too old.
const SWEEP: Duration = Duration::from_secs(600);
/// What is kept of a link's bytes before they are taken up, at most.
const BUFFER: usize = 64 << 10;

/// What every link works with. A clone is the same one.
#[derive(Debug, Clone)]
pub(crate) struct Bulk(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    blobs: Blobs,
    files: Files,
    turns: Turns,
    deltas: Deltas,
    uploads: Uploads,
}

impl Bulk {
    /// Opens what lies in the manager's folder `data`.
    ///
    /// # Errors
    /// If the folders of deltas and uploads cannot be made or read.
    pub(crate) fn open(data: &Path, store: Store, blobs: Blobs, limits: &Limits) -> io::Result<Self> {
        Ok(Self(Arc::new(Inner {
            files: Files::default(),
            turns: Turns::new(limits.bulk),
            deltas: Deltas::open(data.join("deltas"), store.clone(), blobs.clone())?,
            uploads: Uploads::open(data.join("uploads"), uploads::Quotas::default())?,
            store,
            blobs,
        })))
    }

    /// Removes uploads that nobody goes on with, now and then until the manager ends.
    pub(crate) async fn sweep(self, ending: CancellationToken) {
        let mut turns = interval(SWEEP);
        loop {
            tokio::select! {
                _ = turns.tick() => {}
                () = ending.cancelled() => return,
            }
            let bulk = self.clone();
            let _ = tokio::task::spawn_blocking(move || bulk.0.uploads.sweep(SystemTime::now())).await;
        }
    }
}

/// How a link's requests go on, told by those who move bytes and asked by whoever watches.
#[derive(Debug, Default)]
struct Moved {
    bytes: AtomicU64,
    /// Requests that have begun and not ended; more than one only for a moment.
    open: AtomicUsize,
}

impl Moved {
    fn add(&self, bytes: usize) {
        self.bytes.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// Serves one link of `peer`.
pub(crate) async fn run<L: AsyncRead + AsyncWrite + Unpin + Send + 'static>(link: L, peer: Peer, bulk: Bulk) {
    let (peer, moved) = (Arc::new(peer), Arc::new(Moved::default()));
    let inner = Arc::clone(&bulk.0);
    let (shared, asker) = (Arc::clone(&moved), Arc::clone(&peer));
    let service = service_fn(move |request: Request<Incoming>| {
        let (bulk, peer, moved) = (bulk.clone(), Arc::clone(&asker), Arc::clone(&shared));
        async move { Ok::<_, Infallible>(bulk.0.answer(request, &peer, moved).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(link), service);
    tokio::pin!(served);
    let (mut looks, end) = (interval(LOOK), Instant::now() + LINK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut seen, mut in_vain) = (0, 0);
    loop {
        tokio::select! {
            // A link that breaks or is too slow is the agent's to try again.
            _ = &mut served => return,
            () = sleep_until(end) => return,
            _ = looks.tick() => {
                let bytes = moved.bytes.load(Ordering::Relaxed);
                let is_idle = moved.open.load(Ordering::Relaxed) == 0;
                in_vain = if is_idle || bytes - seen >= SLOWEST { 0 } else { in_vain + 1 };
                seen = bytes;
                if in_vain > LOOKS || !is_idle && inner.certified(&peer).await == Certified::No {
                    return;
                }
            }
        }
    }
}

/// What is known of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Certified {
    Yes,
    No,
    /// The store does not say; nothing is begun.
    Unknown,
}

type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

impl Inner {
    async fn answer(self: &Arc<Self>, request: Request<Incoming>, peer: &Peer, moved: Arc<Moved>) -> Answer {
        match self.certified(peer).await {
            Certified::Yes => {}
            Certified::No => return status_only(StatusCode::FORBIDDEN),
            Certified::Unknown => return busy(),
        }
        let path = request.uri().path().to_owned();
        let mut parts = path.strip_prefix("/v1/").unwrap_or_default().split('/');
        let route = [parts.next(), parts.next(), parts.next(), parts.next()];
        let reads = matches!(*request.method(), Method::GET | Method::HEAD);
        match route {
            [Some("patterns"), Some(digest), None, None] => match digest.parse() {
                Ok(digest) if reads => match self.held_back(digest).await {
                    Some(refusal) => refusal,
                    None => self.file(&request, &self.blobs.path(digest), digest, peer, moved).await,
                },
                Ok(_) => method("GET, HEAD"),
                Err(_) => status_only(StatusCode::NOT_FOUND),
            },
            [Some("deltas"), Some(digest), None, None] => match digest.parse() {
                Ok(digest) if reads => {
                    self.file(&request, &self.deltas.path(digest), digest, peer, moved).await
                }
                Ok(_) => method("GET, HEAD"),
                Err(_) => status_only(StatusCode::NOT_FOUND),
            },
            [Some("patterns"), Some(digest), Some("deltas"), None] => match digest.parse() {
                Ok(digest) if reads => match self.held_back(digest).await {
                    Some(refusal) => refusal,
                    None => self.delta(digest, request.uri().query().unwrap_or_default()).await,
                },
                Ok(_) => method("GET, HEAD"),
                Err(_) => status_only(StatusCode::NOT_FOUND),
            },
            [Some("trust"), None, None, None] if reads => self.trust(&request).await,
            [Some("uploads"), id, None, None] => {
                intake::answer(self, request, id, peer.endpoint, &moved).await
            }
            _ => status_only(StatusCode::NOT_FOUND),
        }
    }

    /// The answer to whoever wants a version whose rollout was stopped; also to one who was sent an order with it
    /// before that.
    async fn held_back(&self, digest: Sha256) -> Option<Answer> {
        match self.store.is_stopped(digest).await {
            Ok(true) => Some(status_only(StatusCode::GONE)),
            Ok(false) => None,
            Err(error) => {
                tracing::error!(%error, "Cannot look up whether a pattern was stopped.");
                Some(busy())
            }
        }
    }

    /// Whether the certificate that a link came in with still holds.
    async fn certified(&self, peer: &Peer) -> Certified {
        match self.store.certificate_status(peer.endpoint, &peer.serial).await {
            Ok(CertificateStatus::Enrolled | CertificateStatus::Fresh) => Certified::Yes,
            Ok(status) => {
                tracing::warn!(endpoint = %peer.endpoint, ?status, "A certificate is refused.");
                Certified::No
            }
            Err(error) => {
                tracing::error!(%error, "Cannot look a certificate up.");
                Certified::Unknown
            }
        }
    }

    /// A file, or the part of it that is wanted.
    async fn file(
        &self,
        request: &Request<Incoming>,
        path: &Path,
        digest: Sha256,
        peer: &Peer,
        moved: Arc<Moved>,
    ) -> Answer {
        let file = match self.files.open(path).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return status_only(StatusCode::NOT_FOUND);
            }
            Err(error) => {
                tracing::error!(%error, sha256 = %digest, "Cannot read what an agent asks for.");
                return status_only(StatusCode::INTERNAL_SERVER_ERROR);
            }
        };
        let header = |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let tag = format!("\"{digest}\"");
        let wanted = match header(RANGE).filter(|_| header(IF_RANGE).is_none_or(|known| known == tag)) {
            Some(range) => range::read(range, file.length()),
            None => Wanted::Whole,
        };
        let length = file.length();
        let (status, part) = match wanted {
            Wanted::Whole => (StatusCode::OK, 0..length),
            Wanted::Part(part) => (StatusCode::PARTIAL_CONTENT, part),
            Wanted::Nothing => (StatusCode::RANGE_NOT_SATISFIABLE, 0..0),
        };
        let range = match status {
            StatusCode::PARTIAL_CONTENT => Some(format!("bytes {}-{}/{length}", part.start, part.end - 1)),
            StatusCode::RANGE_NOT_SATISFIABLE => Some(format!("bytes */{length}")),
            _ => None,
        };
        let has_body = *request.method() == Method::GET && !part.is_empty();
        let count = part.end - part.start;
        let mut answer = if has_body {
            match self.turns.take(peer.endpoint).await {
                Ok(turn) => Response::new(files::body(file, part, turn, moved)),
                Err(Busy) => return busy(),
            }
        } else {
            status_only(status)
        };
        *answer.status_mut() = status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_LENGTH, HeaderValue::from(count));
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        headers.extend(
            [(ETAG, tag)].into_iter().filter_map(|(k, v)| Some((k, HeaderValue::from_str(&v).ok()?))),
        );
        headers.extend(range.and_then(|range| Some((CONTENT_RANGE, HeaderValue::from_str(&range).ok()?))));
        answer
    }

    /// The signed metadata in force, as they are stored, unless the agent has just these.
    async fn trust(&self, request: &Request<Incoming>) -> Answer {
        match self.store.trust().await {
            Ok(Some(row)) => {
                let known = request.headers().get(IF_NONE_MATCH).map(HeaderValue::as_bytes);
                if known == Some(format!("\"{}\"", Sha256::of(row.bundle.as_bytes())).as_bytes()) {
                    return status_only(StatusCode::NOT_MODIFIED);
                }
                let body = Full::new(Bytes::from(row.bundle)).map_err(|never| match never {});
                Response::new(body.boxed_unsync())
            }
            Ok(None) => status_only(StatusCode::NOT_FOUND),
            Err(error) => {
                tracing::error!(%error, "Cannot read the signed metadata.");
                busy()
            }
        }
    }

    /// Which delta to take, to come to the pattern `new`.
    async fn delta(&self, new: Sha256, query: &str) -> Answer {
        let from = query.strip_prefix("from=").unwrap_or_default().split(',');
        let known: Vec<Sha256> =
            from.take(deltas::MOST_KNOWN).filter_map(|digest| digest.parse().ok()).collect();
        match self.deltas.offer(new, &known).await {
            Some(offer) => text(StatusCode::OK, format!("{} {} {}\n", offer.old, offer.sha256, offer.size)),
            None => status_only(StatusCode::NOT_FOUND),
        }
    }
}

/// An answer without a body.
fn status_only(status: StatusCode) -> Answer {
    text(status, String::new())
}

fn text(status: StatusCode, text: String) -> Answer {
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {});
    let mut answer = Response::new(body.boxed_unsync());
    *answer.status_mut() = status;
    answer
}

/// Somebody else's turn first.
fn busy() -> Answer {
    let mut answer = status_only(StatusCode::SERVICE_UNAVAILABLE);
    answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from(turns::RETRY_AFTER));
    answer
}

fn method(allowed: &'static str) -> Answer {
    let mut answer = status_only(StatusCode::METHOD_NOT_ALLOWED);
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    answer
}
