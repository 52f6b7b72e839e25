//! A pattern's bytes between the request that brings them and the thread that reads them.
//!
//! **Invariant:** a request that breaks off or is given up is an error for the reader, never an end.
//! **Invariant:** few pieces wait; a request that is faster than the reader waits itself.

use std::io::{self, Read};

use axum::body::Bytes;
use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;

/// Pieces that wait for the reader.
const WAITING: usize = 4;

enum Piece {
    Bytes(Bytes),
    End,
}

/// Where the request puts its bytes.
pub(super) struct Feeder(mpsc::Sender<Piece>);

/// Where the thread takes them from.
pub(super) struct Incoming {
    pieces: mpsc::Receiver<Piece>,
    piece: Bytes,
    is_ended: bool,
}

/// Both ends.
pub(super) fn pipe() -> (Feeder, Incoming) {
    let (sender, pieces) = mpsc::channel(WAITING);
    (Feeder(sender), Incoming { pieces, piece: Bytes::new(), is_ended: false })
}

impl Feeder {
    /// Hands over what `body` brings, until it ends, breaks off, or the reader has had enough.
    pub(super) async fn feed<E>(self, body: impl Stream<Item = Result<Bytes, E>>) {
        let mut body = std::pin::pin!(body);
        while let Some(bytes) = body.next().await {
            // Dropped without an end, the reader's side sees that it broke off.
            let Ok(bytes) = bytes else { return };
            if self.0.send(Piece::Bytes(bytes)).await.is_err() {
                return;
            }
        }
        // It fails only if the reader has had enough.
        let _ = self.0.send(Piece::End).await;
    }
}

impl Read for Incoming {
    /// Blocks; for threads that may.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.is_ended {
            match self.pieces.blocking_recv() {
                Some(Piece::Bytes(bytes)) => self.piece = bytes,
                Some(Piece::End) => self.is_ended = true,
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let length = buffer.len().min(self.piece.len());
        let piece = self.piece.split_to(length);
        buffer.get_mut(..length).unwrap_or_default().copy_from_slice(&piece);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    async fn read(pieces: Vec<Result<&'static [u8], ()>>) -> io::Result<Vec<u8>> {
        let (feeder, mut incoming) = pipe();
        let reader = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            incoming.read_to_end(&mut bytes).map(|_| bytes)
        });
        let pieces = pieces.into_iter().map(|piece| piece.map(Bytes::from_static));
        feeder.feed(stream::iter(pieces)).await;
        reader.await.unwrap()
    }

    #[tokio::test]
    async fn what_comes_whole_is_read_and_what_breaks_off_is_an_error() {
        assert_eq!(read(vec![Ok(b"ab"), Ok(b""), Ok(b"c")]).await.unwrap(), b"abc");
        assert_eq!(read(vec![]).await.unwrap(), b"");
        let broken = read(vec![Ok(b"ab"), Err(()), Ok(b"c")]).await.unwrap_err();
        assert_eq!(broken.kind(), io::ErrorKind::UnexpectedEof);
        let (feeder, mut incoming) = pipe();
        drop(feeder);
        let given_up = tokio::task::spawn_blocking(move || incoming.read(&mut [0; 9])).await.unwrap();
        assert!(given_up.is_err());
    }

    #[tokio::test]
    async fn a_reader_that_has_had_enough_ends_an_endless_body() {
        let (feeder, mut incoming) = pipe();
        let reader = tokio::task::spawn_blocking(move || incoming.read(&mut [0; 9]));
        let endless = stream::repeat_with(|| Ok::<_, ()>(Bytes::from_static(b"0123456789")));
        feeder.feed(endless).await;
        assert_eq!(reader.await.unwrap().unwrap(), 9);
    }
}
