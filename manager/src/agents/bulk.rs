//! Bulk transfers over `http/1.1`: for now, a pattern by its digest.

use std::{convert::Infallible, time::Duration};

use http_body_util::Full;
use hyper::{Method, Request, Response, StatusCode, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tm_protocol::ids::Sha256;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use crate::patterns::Blobs;

/// How long a request's header may take, and a whole link.
const HEADER: Duration = Duration::from_secs(10);
const LINK: Duration = Duration::from_secs(600);

/// Serves one link.
pub(crate) async fn run<L: AsyncRead + AsyncWrite + Unpin + Send + 'static>(link: L, blobs: Blobs) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let blobs = blobs.clone();
        async move { Ok::<_, Infallible>(answer(&request, &blobs).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .keep_alive(false)
        .serve_connection(TokioIo::new(link), service);
    // A link that breaks or is too slow is the agent's to try again.
    let _ = timeout(LINK, served).await;
}

async fn answer(request: &Request<hyper::body::Incoming>, blobs: &Blobs) -> Response<Full<Bytes>> {
    let wanted = request.uri().path().strip_prefix("/v1/patterns/").and_then(|d| d.parse::<Sha256>().ok());
    let (Some(wanted), &Method::GET) = (wanted, request.method()) else {
        return status(StatusCode::NOT_FOUND);
    };
    match tokio::fs::read(blobs.path(wanted)).await {
        Ok(bytes) => Response::new(Full::new(Bytes::from(bytes))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => status(StatusCode::NOT_FOUND),
        Err(error) => {
            tracing::error!(%error, pattern = %wanted, "Cannot read a pattern.");
            status(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

fn status(code: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = code;
    response
}
