//! The administrators' port: HTTPS links, each with limits of time, and places that nobody holds for nothing.
//!
//! **Invariant:** a link whose requests bring no good token ends after some of them, and at any time for somebody else;
//! one that has brought one is kept.
//! **Invariant:** no link stands still for ever: not in its handshake, not in a request's header, not while an answer
//! is read. (A request's body has its route's patience.)

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{Router, body::Body as AxumBody, extract::Request};
use hyper::{
    body::Incoming,
    header::{CONNECTION, HeaderValue},
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
    time::{Sleep, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    handshake::{self, Begun},
    lobby::Heard,
    strangers::Place,
};

/// Links at a time, of administrators and of those who may be some.
pub(crate) const LINKS: usize = 512;
/// Requests without a good token after which a link is closed.
const IN_VAIN: usize = 16;
/// How long a request's header may take, and the next one's.
const HEADER: Duration = Duration::from_secs(10);
/// How long a client may leave an answer unread.
const UNREAD: Duration = Duration::from_secs(30);

/// Serves `router` to whoever comes out of the lobby, until the manager ends.
pub(crate) async fn serve(
    mut lobby: mpsc::Receiver<Heard>,
    tls: Arc<ServerConfig>,
    router: Router,
    ending: CancellationToken,
) {
    loop {
        let heard = tokio::select! {
            heard = lobby.recv() => heard,
            () = ending.cancelled() => return,
        };
        let Some(heard) = heard else { return };
        let (tls, router, ending) = (Arc::clone(&tls), router.clone(), ending.clone());
        tokio::spawn(async move {
            let (begun, from, place) = match heard.start().await {
                Ok((begun, from, place)) => (begun, from, Arc::new(place)),
                Err(error) => return tracing::warn!(%error, "Cannot take a link over."),
            };
            tokio::select! {
                () = link(begun, tls, router, Arc::clone(&place)) => {}
                () = place.is_lost() => tracing::debug!(%from, "Another one needs the place."),
                () = ending.cancelled() => {}
            }
        });
    }
}

async fn link(begun: Begun, tls: Arc<ServerConfig>, router: Router, place: Arc<Place>) {
    let Ok(link) = handshake::shake(begun, tls, &place).await else { return };
    let routes = TowerToHyperService::new(router);
    let asked = AtomicUsize::new(0);
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(AxumBody::new);
        request.extensions_mut().insert(Arc::clone(&place));
        let (answer, place) = (routes.call(request), Arc::clone(&place));
        let is_much = asked.fetch_add(1, Ordering::Relaxed) + 1 >= IN_VAIN;
        async move {
            let mut answer = answer.await?;
            if is_much && place.is_stranger() {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(answer)
        }
    });
    // A link that breaks is its client's to try again.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .serve_connection(TokioIo::new(Read::new(*link, UNREAD)), service)
        .await;
}

/// A link that ends when what is written to it is not read.
struct Read<L> {
    link: L,
    patience: Duration,
    /// Since something could not be written.
    unread: Option<Pin<Box<Sleep>>>,
}

impl<L> Read<L> {
    fn new(link: L, patience: Duration) -> Self {
        Self { link, patience, unread: None }
    }

    fn judge<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.unread = None;
            return written;
        }
        let patience = self.patience;
        let unread = self.unread.get_or_insert_with(|| Box::pin(sleep(patience)));
        unread.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<L: AsyncRead + Unpin> AsyncRead for Read<L> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.link).poll_read(context, buffer)
    }
}

impl<L: AsyncWrite + Unpin> AsyncWrite for Read<L> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.link).poll_write(context, bytes);
        self.judge(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.link).poll_flush(context);
        self.judge(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.link).poll_shutdown(context);
        self.judge(context, shut)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::Instant,
    };

    use super::*;

    #[tokio::test]
    async fn an_answer_that_nobody_reads_ends_its_link() {
        let (near, far) = tokio::io::duplex(64);
        let patience = Duration::from_millis(50);
        let mut link = Read::new(near, patience);
        let begin = Instant::now();
        let error = link.write_all(&[7; 65]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begin.elapsed() >= patience);
        drop(far);
    }

    #[tokio::test]
    async fn an_answer_that_is_read_slowly_is_written() {
        let (near, mut far) = tokio::io::duplex(64);
        let patience = Duration::from_secs(2);
        let mut link = Read::new(near, patience);
        let begin = Instant::now();
        let reads = tokio::spawn(async move {
            let mut all = 0;
            loop {
                sleep(Duration::from_millis(200)).await;
                match far.read(&mut [0; 16]).await {
                    Ok(0) | Err(_) => return all,
                    Ok(read) => all += read,
                }
            }
        });
        link.write_all(&[7; 256]).await.unwrap();
        assert!(begin.elapsed() > patience, "longer than one write may be unread");
        drop(link);
        assert_eq!(reads.await.unwrap(), 256);
    }
}
