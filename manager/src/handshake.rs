//! The TLS handshake with a stranger, on either port.
//!
//! First the client has to say its first message whole; what that costs is a socket and a few KiB. Then it waits for
//! its turn, and only then its handshake's clock begins. A turn lasts as long as there is something to compute: while
//! the client's next message is on its way it is another one's, and when that message is there the client goes before
//! those who have not begun.
//!
//! **Invariant:** nothing is computed for a client before its first message is whole, and nothing but by turns, so that
//! however many come at once, what is done for agents with a session stands behind a few handshakes and not behind all.

use std::{future::poll_fn, io, sync::Arc, task::Poll, time::Duration};

use futures_util::FutureExt as _;
use rustls::{
    ServerConfig,
    server::{Accepted, Acceptor},
};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{Accept, StartHandshake, server::TlsStream};

use crate::strangers::{Place, Turn};

/// How long the first byte may take.
const FIRST_BYTE: Duration = Duration::from_secs(5);
/// How long the first message may.
const HELLO: Duration = Duration::from_secs(10);
/// Longest first message, in bytes. Our own programs say less than 2,000.
const LONGEST_HELLO: usize = 8 << 10;
/// What is read at a time.
const CHUNK: usize = 2 << 10;
/// How long a turn is waited for. Clients give up sooner.
const QUEUE: Duration = Duration::from_secs(20);
/// How long the handshake may take after the first turn.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Turns that one handshake may take: it needs two, and some more on a network that brings messages in pieces.
const TURNS: usize = 32;

/// A handshake of which the client's first message has been heard.
pub(crate) struct Begun {
    accepted: Accepted,
    stream: TcpStream,
}

impl Begun {
    /// On the runtime that watches `stream`.
    pub(crate) fn new(accepted: Accepted, stream: TcpStream) -> Self {
        Self { accepted, stream }
    }

    /// The protocols that the client names (ALPN).
    pub(crate) fn protocols(&self) -> Vec<Vec<u8>> {
        let hello = self.accepted.client_hello();
        hello.alpn().map(|names| names.map(<[u8]>::to_vec).collect()).unwrap_or_default()
    }

    fn has_left(&self) -> bool {
        self.stream.peek(&mut [0]).now_or_never().is_some_and(|peeked| peeked.is_ok_and(|bytes| bytes == 0))
    }
}

/// Hears a client's first message.
///
/// # Errors
/// If the client is too slow, leaves, or says something else.
pub(crate) async fn hear(stream: &TcpStream) -> io::Result<Accepted> {
    timeout(HELLO, async {
        timeout(FIRST_BYTE, stream.readable()).await??;
        first_message(stream).await
    })
    .await?
}

async fn first_message(stream: &TcpStream) -> io::Result<Accepted> {
    let mut acceptor = Acceptor::default();
    let mut taken = 0;
    loop {
        stream.readable().await?;
        // No buffer is kept while nothing comes.
        let mut chunk = [0; CHUNK];
        let read = match stream.try_read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        taken += read;
        if taken > LONGEST_HELLO {
            return Err(io::Error::other("the first message is too long"));
        }
        let mut bytes = chunk.get(..read).unwrap_or_default();
        while !bytes.is_empty() {
            acceptor.read_tls(&mut bytes)?;
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) if bytes.is_empty() => return Ok(accepted),
                Ok(Some(_)) => return Err(io::Error::other("more than a first message")),
                Err((error, mut alert)) => {
                    let mut said = Vec::new();
                    alert.write_all(&mut said)?;
                    let _ = stream.try_write(&said);
                    return Err(io::Error::other(error));
                }
            }
        }
    }
}

/// Does the handshake when it is the client's turn. Afterwards the stranger is one that keeps us waiting.
///
/// # Errors
/// If the client has left meanwhile, is too slow, or not who it has to be; or if its turn does not come.
pub(crate) async fn shake(
    begun: Begun,
    config: Arc<ServerConfig>,
    place: &Place,
) -> io::Result<Box<TlsStream<TcpStream>>> {
    place.is_ready();
    let turn = timeout(QUEUE, place.turn()).await?;
    // Whoever gave up while it waited is not worth the arithmetic.
    if begun.has_left() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // This is where most of it is done.
    let accept = StartHandshake::from_parts(begun.accepted, begun.stream).into_stream(config);
    let shaken = timeout(HANDSHAKE, by_turns(Box::new(accept), turn, place)).await?;
    place.is_slow();
    shaken.map(Box::new)
}

/// Goes on with a handshake whenever there is something to do for it and it is its turn.
async fn by_turns(
    mut accept: Box<Accept<TcpStream>>,
    mut turn: Turn,
    place: &Place,
) -> io::Result<TlsStream<TcpStream>> {
    for _ in 0..TURNS {
        let step = poll_fn(|context| Poll::Ready(accept.poll_unpin(context))).await;
        drop(turn);
        if let Poll::Ready(shaken) = step {
            return shaken;
        }
        place.is_slow();
        let Some(stream) = accept.get_ref() else { break };
        stream.readable().await?;
        place.is_ready();
        turn = place.next_turn().await;
    }
    Err(io::Error::other("the handshake comes in too many pieces"))
}
