//! Bulk transfers over `http/1.1`: a pattern by its digest, and the signed metadata that say which are the fleet's.
//! Many agents may ask for a large pattern at once, so it is read while it is sent and never held whole.

use std::{convert::Infallible, io, time::Duration};

use futures_util::TryStreamExt as _;
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Frame},
    header::{CONTENT_LENGTH, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tm_protocol::ids::Sha256;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::io::ReaderStream;

use crate::{patterns::Blobs, store::Store};

/// How long a request's header may take, and a whole link.
const HEADER: Duration = Duration::from_secs(10);
const LINK: Duration = Duration::from_secs(600);
/// What is read of a pattern at a time, in bytes.
const PIECE: usize = 128 << 10;

/// Serves one link.
pub(crate) async fn run<L: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    link: L,
    blobs: Blobs,
    store: Store,
) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (blobs, store) = (blobs.clone(), store.clone());
        async move { Ok::<_, Infallible>(answer(&request, &blobs, &store).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .keep_alive(false)
        .serve_connection(TokioIo::new(link), service);
    // A link that breaks or is too slow is the agent's to try again.
    let _ = timeout(LINK, served).await;
}

type Answer = Response<BoxBody<Bytes, io::Error>>;

async fn answer(request: &Request<hyper::body::Incoming>, blobs: &Blobs, store: &Store) -> Answer {
    if (request.method(), request.uri().path()) == (&Method::GET, "/v1/trust") {
        return trust(store).await;
    }
    let wanted = request.uri().path().strip_prefix("/v1/patterns/").and_then(|d| d.parse::<Sha256>().ok());
    let (Some(wanted), &Method::GET) = (wanted, request.method()) else {
        return status(StatusCode::NOT_FOUND);
    };
    match open(blobs, wanted).await {
        Ok(response) => response,
        Err(error) if error.kind() == io::ErrorKind::NotFound => status(StatusCode::NOT_FOUND),
        Err(error) => {
            tracing::error!(%error, pattern = %wanted, "Cannot read a pattern.");
            status(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

/// The signed metadata in force, as they are stored.
async fn trust(store: &Store) -> Answer {
    match store.trust().await {
        Ok(Some(row)) => {
            Response::new(BodyExt::boxed(Full::from(row.bundle).map_err(|never| match never {})))
        }
        Ok(None) => status(StatusCode::NOT_FOUND),
        Err(error) => {
            tracing::error!(%error, "Cannot read the signed metadata.");
            status(StatusCode::SERVICE_UNAVAILABLE)
        }
    }
}

/// An answer that brings the pattern, of which agents want to know the length before.
async fn open(blobs: &Blobs, wanted: Sha256) -> io::Result<Answer> {
    let file = tokio::fs::File::open(blobs.path(wanted)).await?;
    let length = file.metadata().await?.len();
    let pieces = ReaderStream::with_capacity(file, PIECE).map_ok(Frame::data);
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(pieces)));
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    Ok(response)
}

fn status(code: StatusCode) -> Answer {
    let mut response = Response::new(BodyExt::boxed(Empty::new().map_err(|never| match never {})));
    *response.status_mut() = code;
    response
}
