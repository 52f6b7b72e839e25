//! Files as they are sent: opened once for all who want them, and read in pieces.
//!
//! What stands in the kernel's cache is read at once; what does not is fetched away from the threads that serve
//! links.
//!
//! **Invariant:** a transfer holds one piece, and pieces are used again.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, IoSliceMut},
    ops::Range,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use futures_util::stream::try_unfold;
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::{Moved, turns::Turn};
use crate::metrics::METRICS;

/// What is read of a file at a time and written to a link at a time, in bytes.
pub(crate) const PIECE: usize = 256 << 10;
/// Pieces that are kept for later.
const KEPT: usize = 32;

/// The files that are open.
#[derive(Debug, Default)]
pub(super) struct Files {
    open: Mutex<HashMap<PathBuf, Weak<Shared>>>,
    pool: Arc<Pool>,
}

#[derive(Debug, Default)]
struct Pool(Mutex<Vec<Vec<u8>>>);

/// A file that is open. It closes when nobody sends it any more.
#[derive(Debug)]
pub(super) struct Shared {
    file: File,
    length: u64,
    pool: Arc<Pool>,
}

impl Shared {
    /// In bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }
}

impl Files {
    /// The file at `path`, opened if it is not yet. Its content never changes.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub(super) async fn open(&self, path: &Path) -> io::Result<Arc<Shared>> {
        if let Some(shared) = self.lock().get(path).and_then(Weak::upgrade) {
            return Ok(shared);
        }
        let file = tokio::fs::File::open(path).await?.into_std().await;
        let length = file.metadata()?.len();
        let shared = Arc::new(Shared { file, length, pool: Arc::clone(&self.pool) });
        let mut open = self.lock();
        open.retain(|_, file| file.strong_count() > 0);
        // Another link may have opened it meanwhile.
        if let Some(first) = open.get(path).and_then(Weak::upgrade) {
            return Ok(first);
        }
        open.insert(path.to_path_buf(), Arc::downgrade(&shared));
        Ok(shared)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, Weak<Shared>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was read, lent to whoever sends it.
struct Piece {
    bytes: Vec<u8>,
    length: usize,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut pool = self.pool.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < KEPT {
            pool.push(std::mem::take(&mut self.bytes));
        }
    }
}

/// The bytes in `part`, at the pace that `turn` allows, and ended early when it is over.
pub(super) fn body(
    file: Arc<Shared>,
    part: Range<u64>,
    turn: Turn,
    moved: Arc<super::Moved>,
) -> UnsyncBoxBody<Bytes, io::Error> {
    let sending = Sending { open: Open::new(moved), file, turn };
    let pieces = try_unfold((sending, part), |(sending, part)| async move {
        let left = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
        if left == 0 {
            return Ok::<_, io::Error>(None);
        }
        if sending.turn.is_over() {
            return Err(io::Error::other("it is another's turn"));
        }
        let most = left.min(PIECE);
        sending.turn.pay(most).await;
        let piece = piece(&sending.file, part.start, most).await?;
        sending.open.0.add(piece.len());
        METRICS.bulk_down(piece.len());
        let next = part.start + u64::try_from(piece.len()).unwrap_or(u64::MAX);
        Ok(Some((Frame::data(piece), (sending, next..part.end))))
    });
    StreamBody::new(pieces).boxed_unsync()
}

struct Sending {
    open: Open,
    file: Arc<Shared>,
    turn: Turn,
}

/// A request that has begun. Dropped, it has ended.
pub(super) struct Open(Arc<Moved>);

impl Open {
    pub(super) fn new(moved: Arc<Moved>) -> Self {
        moved.open.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self(moved)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Up to `most` bytes from `at`, at least one.
async fn piece(shared: &Arc<Shared>, at: u64, most: usize) -> io::Result<Bytes> {
    let kept = shared.pool.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let mut piece =
        Piece { bytes: kept.unwrap_or_else(|| vec![0; PIECE]), length: 0, pool: Arc::clone(&shared.pool) };
    let Some(room) = piece.bytes.get_mut(..most) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let at_once = preadv2(&shared.file, &mut [IoSliceMut::new(room)], at, ReadWriteFlags::NOWAIT);
    match at_once {
        Ok(read @ 1..) => piece.length = read,
        // Not in the cache, a file system that cannot tell, or the end: the plain way says which.
        Ok(0) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::INTR) => {
            let shared = Arc::clone(shared);
            let read = tokio::task::spawn_blocking(move || {
                let room = piece.bytes.get_mut(..most).ok_or(io::ErrorKind::InvalidInput)?;
                piece.length = shared.file.read_at(room, at)?;
                Ok::<_, io::Error>(piece)
            });
            piece = read.await.map_err(io::Error::other)??;
        }
        Err(error) => return Err(error.into()),
    }
    if piece.length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Bytes::from_owner(piece))
}

#[cfg(test)]
mod tests {
    use tm_protocol::ids::EndpointId;
    use uuid::Uuid;

    use super::{super::turns::Turns, *};
    use crate::limits::Rate;

    #[tokio::test]
    async fn any_part_of_a_file_is_sent_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&path, &bytes).unwrap();
        let (files, turns) = (Files::default(), Turns::new(Rate { per_second: 1e9, burst: 1e9 }));
        let moved = Arc::new(Moved::default());
        let length = u64::try_from(bytes.len()).unwrap();
        let file = files.open(&path).await.unwrap();
        assert!(Arc::ptr_eq(&file, &files.open(&path).await.unwrap()), "it is opened once");
        for part in [0..length, 0..1, 1..131_073, length - 1..length, 131_072..393_216] {
            let turn = turns.take(EndpointId::new(Uuid::nil())).await.unwrap();
            let body = body(Arc::clone(&file), part.clone(), turn, Arc::clone(&moved));
            assert_eq!(moved.open.load(std::sync::atomic::Ordering::Relaxed), 1);
            let (mut body, mut sent) = (body, Vec::new());
            while let Some(frame) = body.frame().await {
                sent.extend_from_slice(frame.unwrap().data_ref().unwrap());
            }
            let range = usize::try_from(part.start).unwrap()..usize::try_from(part.end).unwrap();
            assert!(sent == bytes[range], "{part:?}");
        }
        assert_eq!(moved.open.load(std::sync::atomic::Ordering::Relaxed), 0);
        assert_eq!(files.pool.0.lock().unwrap().len(), 1, "pieces are used again");
        // A file that is shorter than it was ends in an error, not in fewer bytes.
        File::options().write(true).open(&path).unwrap().set_len(1000).unwrap();
        let turn = turns.take(EndpointId::new(Uuid::nil())).await.unwrap();
        assert!(body(Arc::clone(&file), 0..length, turn, moved).collect().await.is_err());
        drop(file);
        assert_eq!(files.open(&path).await.unwrap().length(), 1000, "it was closed");
        assert!(files.open(&folder.path().join("none")).await.is_err());
    }
}
