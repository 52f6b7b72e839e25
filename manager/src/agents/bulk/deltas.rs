//! Deltas between versions of a pattern, made when the first agent asks and kept for the others.
//!
//! On disk, `deltas/<sha256>`: the bytes of a delta (`tm_patterns::delta`). The folder is emptied at each start:
//! what was in it can be made again, byte for byte.
//!
//! **Invariant:** one delta is made at a time, each once, and only between patterns of the same name.
//! **Invariant:** the folder holds at most [`MAX_KEPT`] bytes and one delta.

use std::{
    collections::VecDeque,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tm_patterns::delta;
use tm_protocol::ids::Sha256;
use tokio::{
    sync::{OnceCell, Semaphore},
    time::timeout,
};

use crate::{patterns::Blobs, store::Store};

/// How many of the patterns that an agent names are looked at.
pub(super) const MOST_KNOWN: usize = 16;
/// Most bytes of deltas that are kept.
const MAX_KEPT: u64 = 256 << 20;
/// Most pairs of patterns of which is known what came of them.
const MAX_PAIRS: usize = 256;
/// Larger patterns are sent whole: two of them and what is made of them are held in memory.
const MAX_PATTERN: u64 = 96 << 20;
/// How long an agent waits for a delta before it takes the whole.
const PATIENCE: Duration = Duration::from_secs(50);

/// What an agent is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offer {
    /// What the delta begins with.
    pub(super) old: Sha256,
    /// The delta's own digest.
    pub(super) sha256: Sha256,
    /// Its length, in bytes.
    pub(super) size: u64,
}

/// The folder of deltas.
#[derive(Debug)]
pub(super) struct Deltas {
    folder: PathBuf,
    store: Store,
    blobs: Blobs,
    /// Those made last at the end.
    pairs: Mutex<VecDeque<Pair>>,
    making: Arc<Semaphore>,
}

#[derive(Debug, Clone)]
struct Pair {
    old: Sha256,
    new: Sha256,
    offer: Arc<OnceCell<Option<Offer>>>,
}

impl Deltas {
    /// Opens `folder`, creating it where it is missing, and empties it.
    ///
    /// # Errors
    /// If it cannot be made or read.
    pub(super) fn open(folder: PathBuf, store: Store, blobs: Blobs) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        for entry in fs::read_dir(&folder)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(Self { folder, store, blobs, pairs: Mutex::default(), making: Arc::new(Semaphore::new(1)) })
    }

    /// Where a delta is, if it is here.
    pub(super) fn path(&self, sha256: Sha256) -> PathBuf {
        self.folder.join(sha256.to_string())
    }

    /// A delta to the pattern `new` from one of those that are `known` to the agent: of the same name, imported
    /// last. `None` if there is none that is worth it.
    pub(super) async fn offer(&self, new: Sha256, known: &[Sha256]) -> Option<Offer> {
        let old = self.base(new, known).await?;
        let pair = self.pair(old, new);
        let made = pair.offer.get_or_try_init(|| async {
            let _one = self.making.acquire().await.map_err(io::Error::other)?;
            self.make(old, new).await
        });
        match timeout(PATIENCE, made).await {
            Ok(Ok(offer)) => *offer,
            Ok(Err(error)) => {
                tracing::warn!(%error, %old, %new, "Cannot make a delta between patterns.");
                None
            }
            Err(_) => None,
        }
    }

    /// The best of those that are known to begin with.
    async fn base(&self, new: Sha256, known: &[Sha256]) -> Option<Sha256> {
        let wanted = self.store.pattern(new).await.ok()??;
        let mut best: Option<(i64, Sha256)> = None;
        for digest in known.iter().take(MOST_KNOWN).filter(|digest| **digest != new) {
            let Some(row) = self.store.pattern(*digest).await.ok()? else { continue };
            let fits = row.reference.name == wanted.reference.name
                && row.reference.size.max(wanted.reference.size) <= MAX_PATTERN;
            if fits && best.is_none_or(|(imported, _)| imported < row.imported_ms) {
                best = Some((row.imported_ms, *digest));
            }
        }
        Some(best?.1)
    }

    fn pair(&self, old: Sha256, new: Sha256) -> Pair {
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pair) = pairs.iter().find(|pair| (pair.old, pair.new) == (old, new)) {
            return pair.clone();
        }
        let pair = Pair { old, new, offer: Arc::default() };
        pairs.push_back(pair.clone());
        while pairs.len() > MAX_PAIRS {
            let gone = pairs.pop_front();
            self.forget(gone.as_ref());
        }
        pair
    }

    fn forget(&self, pair: Option<&Pair>) {
        if let Some(Some(offer)) = pair.and_then(|pair| pair.offer.get()) {
            // Whoever reads it has it open.
            let _ = fs::remove_file(self.path(offer.sha256));
        }
    }

    async fn make(&self, old: Sha256, new: Sha256) -> io::Result<Option<Offer>> {
        let (from, to) = (self.blobs.path(old), self.blobs.path(new));
        let folder = self.folder.clone();
        let made = tokio::task::spawn_blocking(move || {
            let (from, to) = (fs::read(from)?, fs::read(to)?);
            let Some(delta) = delta::make(&from, &to).filter(|delta| delta.len() < to.len() / 2) else {
                return Ok::<_, io::Error>(None);
            };
            let sha256 = Sha256::of(&delta);
            let size = u64::try_from(delta.len()).unwrap_or(u64::MAX);
            let beside = folder.join("new");
            // A crash in between leaves what the next start removes.
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
            let written =
                file.write_all(&delta).and_then(|()| fs::rename(&beside, folder.join(sha256.to_string())));
            if let Err(error) = written {
                let _ = fs::remove_file(&beside);
                return Err(error);
            }
            Ok(Some(Offer { old, sha256, size }))
        });
        let offer = made.await.map_err(io::Error::other)??;
        if let Some(offer) = offer {
            self.make_room(offer.size);
        }
        Ok(offer)
    }

    /// Lets the oldest go, so that all and one of `size` bytes are not too many.
    fn make_room(&self, size: u64) {
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = |pair: &Pair| pair.offer.get().copied().flatten().map_or(0, |offer| offer.size);
        while size + pairs.iter().map(bytes).sum::<u64>() > MAX_KEPT {
            let Some(at) = pairs.iter().position(|pair| bytes(pair) > 0) else { return };
            let gone = pairs.remove(at);
            self.forget(gone.as_ref());
        }
    }
}
