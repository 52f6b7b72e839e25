//! Patterns, fetched by digest from the manager in use and kept.
//!
//! On disk, `patterns/<sha256>`: the bytes, and `<sha256>.part`: what has arrived of a pattern or a delta. Those used
//! least recently go when there are too many. Of a pattern whose older version is kept only what has changed is
//! fetched, if the manager can say it in fewer bytes.
//!
//! **Invariant:** bytes are used only if they are exactly those that the order names.
//! **Invariant:** the folder holds at most [`MAX_KEPT`] bytes, and the pattern that was kept last.

mod client;
mod download;

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use tm_patterns::{InvalidPattern, MAX_STORED, Pattern, ReadError, delta};
use tm_protocol::{address::Address, ids::Sha256, report::Failure, task::PatternRef};
use tokio::{sync::Mutex, time::timeout};

use self::{client::Client, download::Arrived};
use crate::{
    connection::Dialler,
    paths::{Paths, make_folder, replace},
};

/// Most bytes of patterns that are kept.
const MAX_KEPT: u64 = 512 << 20;
/// How long one pattern may take; meanwhile something has to arrive now and then.
const TRANSFER: Duration = Duration::from_secs(3600);
/// Patterns of fewer bytes are fetched whole, and of more: what is changed is put together in memory.
const DELTAS: std::ops::RangeInclusive<u64> = 32 << 10..=96 << 20;
/// How many kept patterns the manager is told of.
const MOST_KNOWN: usize = 16;
/// Longest answer to what deltas there are, in bytes.
const MAX_OFFER: u64 = 1024;

/// One is fetched at a time: a second task that needs the same one finds it kept.
static FETCHING: Mutex<()> = Mutex::const_new(());

/// The pattern that `wanted` names: from the folder, or else from the manager.
pub(crate) async fn pattern(
    paths: &Paths,
    address: Option<&Address>,
    dialler: &Dialler,
    wanted: &PatternRef,
) -> Result<Pattern, Failure> {
    let failed = |why: String| {
        let from = address.map(|address| format!(" from {address}")).unwrap_or_default();
        Failure::new("pattern-fetch-failed", format!("cannot fetch pattern `{}`{from}: {why}", wanted.name))
    };
    if let Some(pattern) = look(paths, wanted).await {
        return Ok(pattern);
    }
    if usize::try_from(wanted.size).ok().is_none_or(|size| size > MAX_STORED) {
        return Err(failed(format!("{} bytes are too many", wanted.size)));
    }
    let address = address.ok_or_else(|| failed("no manager's address is known".to_owned()))?;
    let _one = FETCHING.lock().await;
    if let Some(pattern) = look(paths, wanted).await {
        return Ok(pattern);
    }
    // Without it everything is held in memory.
    if let Err(error) = make_folder(&paths.patterns()) {
        tracing::warn!(%error, "Cannot make the folder of patterns.");
    }
    let mut client = Client::new(address, dialler);
    let fetched = async {
        match changed(paths, &mut client, wanted).await {
            Some(pattern) => Ok(pattern),
            None => whole(paths, &mut client, wanted).await,
        }
    };
    match timeout(TRANSFER, fetched).await {
        Ok(Ok(pattern)) => Ok(pattern),
        Ok(Err(NotFetched::Failed(why))) => Err(failed(why)),
        Ok(Err(NotFetched::Altered(error))) => {
            let name = &wanted.name;
            let message =
                format!("the manager's bytes of pattern `{name}` are not those that were signed: {error}");
            Err(Failure::new("pattern-altered", message))
        }
        Err(_) => Err(failed(format!("not complete after {} s", TRANSFER.as_secs()))),
    }
}

/// What a manager has at `path`, if that is not more than `most` bytes.
///
/// # Errors
/// If it has nothing there, or not all of it arrives.
pub(super) async fn small(
    address: &Address,
    dialler: &Dialler,
    path: &str,
    most: u64,
    known: Option<Sha256>,
) -> Result<Option<Vec<u8>>, String> {
    let mut client = Client::new(address, dialler);
    let unless = known.map(|known| format!("If-None-Match: \"{known}\"\r\n")).unwrap_or_default();
    let head = client.get(path, &unless).await?;
    if head.status == 304 && known.is_some() {
        return Ok(None);
    }
    if head.status != 200 {
        return Err(format!("the manager answers {}", head.status));
    }
    let length = head.length.filter(|length| *length <= most).ok_or("its length is not one that can be")?;
    let bytes = client.rest(&head, most).await;
    if wide(bytes.len()) == length { Ok(Some(bytes)) } else { Err("the answer breaks off".to_owned()) }
}

/// Why a pattern was not fetched.
enum NotFetched {
    Failed(String),
    /// All bytes came, and they are not those that the order names.
    Altered(InvalidPattern),
}

impl<T: Into<String>> From<T> for NotFetched {
    fn from(why: T) -> Self {
        Self::Failed(why.into())
    }
}

/// A kept one. A kept file that was changed is no longer what its name says, and is fetched again.
async fn look(paths: &Paths, wanted: &PatternRef) -> Option<Pattern> {
    let (folder, order) = (paths.clone(), wanted.clone());
    aside(move || read(&folder, &order)).await.flatten()
}

/// Fetches all of it.
async fn whole(paths: &Paths, client: &mut Client<'_>, wanted: &PatternRef) -> Result<Pattern, NotFetched> {
    let at = format!("/v1/patterns/{}", wanted.sha256);
    let mut first = true;
    loop {
        let arrived = download::download(client, &at, &paths.patterns(), wanted.sha256, wanted.size).await?;
        let (folder, order) = (paths.clone(), wanted.clone());
        let checked = aside(move || settle(&folder, &order, arrived)).await;
        match checked.ok_or("it could not be checked")? {
            Ok(pattern) => return Ok(pattern),
            // What an earlier link brought, or what somebody did to the file since, may be what is wrong.
            Err(error) if first => {
                tracing::warn!(%error, sha256 = %wanted.sha256, "A pattern is fetched anew.")
            }
            Err(ReadError::Invalid(error @ InvalidPattern::Digest { .. })) => {
                return Err(NotFetched::Altered(error));
            }
            Err(error) => return Err(error.to_string().into()),
        }
        first = false;
    }
}

/// Looks at what has arrived, and keeps it, or throws it away. Blocks.
fn settle(paths: &Paths, order: &PatternRef, arrived: Arrived) -> Result<Pattern, ReadError> {
    let verified =
        arrived.reader().map_err(ReadError::Read).and_then(|bytes| Pattern::verified(order, bytes));
    let pattern = match verified {
        Ok(pattern) => pattern,
        Err(error) => {
            arrived.discard();
            return Err(error);
        }
    };
    // It can be used without being kept: a full disk stands in the way of no scan.
    let path = place(paths, order.sha256);
    let kept = arrived.place(&path).and_then(|placed| {
        if placed {
            make_room(paths, &path, wide(pattern.size()), MAX_KEPT)
        } else {
            keep(paths, &pattern, MAX_KEPT)
        }
    });
    if let Err(error) = kept {
        tracing::warn!(%error, sha256 = %order.sha256, "Cannot keep a pattern.");
        arrived.discard();
    }
    Ok(pattern)
}

/// What the manager offers to turn a kept pattern into the wanted one.
#[derive(Debug, PartialEq, Eq)]
struct Offer {
    old: Sha256,
    delta: Sha256,
    size: u64,
}

impl Offer {
    /// Reads it; `None` for one that is not to be taken.
    fn read(text: &[u8], known: &[Sha256], wanted: &PatternRef) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?.strip_suffix('\n')?;
        let mut words = text.split(' ');
        let offer = Self {
            old: words.next()?.parse().ok()?,
            delta: words.next()?.parse().ok()?,
            size: words.next()?.parse().ok()?,
        };
        let is_good = words.next().is_none() && known.contains(&offer.old) && offer.size <= wanted.size / 2;
        is_good.then_some(offer)
    }
}

/// Fetches what has changed since a version that is kept; `None` if that is not possible, for whatever reason.
async fn changed(paths: &Paths, client: &mut Client<'_>, wanted: &PatternRef) -> Option<Pattern> {
    if !DELTAS.contains(&wanted.size) {
        return None;
    }
    let (folder, order) = (paths.clone(), wanted.clone());
    let known = aside(move || known(&folder, &order)).await?;
    if known.is_empty() {
        return None;
    }
    let names = known.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let head = client.get(&format!("/v1/patterns/{}/deltas?from={names}", wanted.sha256), "").await.ok()?;
    let offer = client.rest(&head, MAX_OFFER).await;
    let offer =
        Some(offer).filter(|_| head.status == 200).and_then(|text| Offer::read(&text, &known, wanted))?;
    let at = format!("/v1/deltas/{}", offer.delta);
    let fetched = download::download(client, &at, &paths.patterns(), offer.delta, offer.size).await;
    let made = match fetched {
        Ok(arrived) => {
            let (folder, order) = (paths.clone(), wanted.clone());
            aside(move || rebuild(&folder, &order, &offer, arrived)).await?
        }
        Err(why) => Err(why),
    };
    made.map_err(|why| tracing::warn!(%why, sha256 = %wanted.sha256, "A pattern is fetched whole.")).ok()
}

/// Which patterns are kept that may be older versions, those used last first; none if much of the whole has arrived
/// already. Blocks.
fn known(paths: &Paths, wanted: &PatternRef) -> Vec<Sha256> {
    let part = fs::metadata(download::part_of(&paths.patterns(), wanted.sha256));
    if part.is_ok_and(|part| part.len() > wanted.size / 4) {
        return Vec::new();
    }
    let mut names = names(paths);
    names.retain(|(_, size, sha256)| DELTAS.contains(size) && *sha256 != wanted.sha256);
    names.truncate(MOST_KNOWN);
    names.into_iter().map(|(_, _, sha256)| sha256).collect()
}

/// Makes the wanted pattern out of a kept one and a delta, and keeps it. Blocks.
fn rebuild(paths: &Paths, order: &PatternRef, offer: &Offer, arrived: Arrived) -> Result<Pattern, String> {
    let mut bytes = Vec::new();
    let read = arrived.reader().and_then(|mut reader| reader.read_to_end(&mut bytes));
    arrived.discard();
    read.map_err(|error| error.to_string())?;
    if Sha256::of(&bytes) != offer.delta {
        return Err("the delta's digest is another".to_owned());
    }
    let old = kept(paths, offer.old).ok_or("the older version is no longer kept")?;
    let old = old.to_bytes().map_err(|error| error.to_string())?;
    let made = delta::apply(offer.old, old, order.sha256, &bytes).map_err(|error| error.to_string())?;
    drop(bytes);
    let pattern = Pattern::verified(order, made.as_slice()).map_err(|error| error.to_string())?;
    // Of the whole nothing is needed any more.
    let _ = fs::remove_file(download::part_of(&paths.patterns(), order.sha256));
    if let Err(error) = keep(paths, &pattern, MAX_KEPT) {
        tracing::warn!(%error, sha256 = %order.sha256, "Cannot keep a pattern.");
    }
    Ok(pattern)
}

/// A pattern that was fetched before and is kept whole; `None` if it is not. Blocks.
pub(crate) fn kept(paths: &Paths, sha256: Sha256) -> Option<Pattern> {
    let size = fs::metadata(place(paths, sha256)).ok()?.len();
    read(paths, &PatternRef { sha256, size, name: sha256.to_string() })
}

/// All patterns that are kept whole, those used last first, and how many there are besides because `most` bytes
/// are not enough for them. It leaves no mark of their use. Blocks.
pub(crate) fn all_kept(paths: &Paths, most: usize) -> (Vec<Pattern>, u32) {
    let (mut patterns, mut left, mut left_out) = (Vec::new(), most, 0_u32);
    for (_, size, sha256) in names(paths) {
        if usize::try_from(size).is_ok_and(|size| size > left) {
            left_out = left_out.saturating_add(1);
            continue;
        }
        let wanted = PatternRef { sha256, size, name: sha256.to_string() };
        let file = File::open(place(paths, sha256)).ok();
        let whole = file.and_then(|file| Pattern::verified_file(&wanted, file).ok());
        if let Some(pattern) = whole {
            left = left.saturating_sub(usize::try_from(size).unwrap_or(usize::MAX));
            patterns.push(pattern);
        }
    }
    (patterns, left_out)
}

/// When each kept pattern was used last, its length, and its name; those used last first. Blocks.
fn names(paths: &Paths) -> Vec<(SystemTime, u64, Sha256)> {
    let entries = fs::read_dir(paths.patterns()).into_iter().flatten().flatten();
    let mut names: Vec<(SystemTime, u64, Sha256)> = entries
        .filter_map(|entry| {
            let sha256 = entry.file_name().to_str()?.parse().ok()?;
            let file = entry.metadata().ok()?;
            Some((file.modified().ok()?, file.len(), sha256))
        })
        .collect();
    names.sort_unstable_by_key(|(used, _, sha256)| (std::cmp::Reverse(*used), *sha256));
    names
}

fn place(paths: &Paths, sha256: Sha256) -> PathBuf {
    paths.patterns().join(sha256.to_string())
}

fn read(paths: &Paths, wanted: &PatternRef) -> Option<Pattern> {
    let path = place(paths, wanted.sha256);
    let file = File::open(&path).ok()?;
    if usize::try_from(file.metadata().ok()?.len()).ok()? > MAX_STORED {
        return None;
    }
    let pattern = Pattern::verified_file(wanted, file.try_clone().ok()?).ok()?;
    // By this it is known which are in use; without it one is fetched again some day.
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let as_it_is = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    let _ = rustix::fs::futimens(&file, &Timestamps { last_access: as_it_is, last_modification: now });
    Some(pattern)
}

/// Keeps a pattern, and lets others go so that there are no more than `most` bytes.
fn keep(paths: &Paths, pattern: &Pattern, most: u64) -> io::Result<()> {
    make_folder(&paths.patterns())?;
    let path = place(paths, pattern.sha256());
    make_room(paths, &path, wide(pattern.size()), most)?;
    replace(&path, &pattern.to_bytes()?)
}

/// Lets others than the file at `path`, which has `size` bytes, go so that there are no more than `most` bytes.
fn make_room(paths: &Paths, path: &Path, size: u64, most: u64) -> io::Result<()> {
    let mut others: Vec<(SystemTime, u64, PathBuf)> = fs::read_dir(paths.patterns())?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok()?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        })
        .filter(|(_, _, other)| *other != path)
        .collect();
    others.sort_unstable();
    let mut bytes = others.iter().map(|(_, len, _)| len).sum::<u64>() + size;
    for (_, len, other) in others {
        if bytes <= most {
            break;
        }
        fs::remove_file(other)?;
        bytes -= len;
    }
    Ok(())
}

/// Runs what blocks away from the threads that keep the link; `None` if it panics.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(n: usize) -> Pattern {
        Pattern::new(format!("p{n}"), format!("{n:0100}").into_bytes()).unwrap()
    }

    #[test]
    fn the_folder_of_patterns_does_not_grow_for_ever_and_keeps_what_is_used() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path().to_path_buf());
        let used = pattern(0);
        keep(&paths, &used, 1000).unwrap();
        fs::write(paths.patterns().join("left-over.new"), [0; 300]).unwrap();
        for n in 1..50 {
            let new = pattern(n);
            keep(&paths, &new, 1000).unwrap();
            assert_eq!(kept(&paths, new.sha256()).unwrap().text(), new.text());
            assert!(kept(&paths, used.sha256()).is_some(), "after {n}");
            // Times of files are no finer than some milliseconds.
            std::thread::sleep(Duration::from_millis(12));
        }
        let files = fs::read_dir(paths.patterns()).unwrap().map(|entry| entry.unwrap());
        assert_eq!(files.map(|file| file.metadata().unwrap().len()).sum::<u64>(), 1000);
        assert!(kept(&paths, pattern(1).sha256()).is_none(), "the oldest went");
        // One that is larger than all that is kept is kept alone.
        keep(&paths, &pattern(99), 10).unwrap();
        assert!(kept(&paths, pattern(99).sha256()).is_some());
        assert_eq!(fs::read_dir(paths.patterns()).unwrap().count(), 1);
    }

    #[test]
    fn all_that_are_whole_and_fit_are_listed_newest_first() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path().to_path_buf());
        assert_eq!(all_kept(&paths, 1000), (vec![], 0), "there is no folder");
        for n in 1..=4 {
            keep(&paths, &pattern(n), 1000).unwrap();
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(n).unwrap());
            File::open(place(&paths, pattern(n).sha256())).unwrap().set_modified(at).unwrap();
        }
        fs::write(paths.patterns().join("left-over.new"), "x").unwrap();
        fs::write(place(&paths, pattern(3).sha256()), "other").unwrap();
        let listed = |most| {
            let (patterns, left_out) = all_kept(&paths, most);
            (patterns.iter().map(Pattern::sha256).collect::<Vec<_>>(), left_out)
        };
        let expected = |numbers: &[usize]| numbers.iter().map(|n| pattern(*n).sha256()).collect::<Vec<_>>();
        // The changed one is the newest.
        assert_eq!(listed(1000), (expected(&[4, 2, 1]), 0));
        assert_eq!(listed(200), (expected(&[4, 2]), 1));
        assert_eq!(listed(99), (expected(&[]), 3));
    }

    #[test]
    fn what_was_changed_or_is_too_large_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path().to_path_buf());
        let good = pattern(1);
        keep(&paths, &good, 1000).unwrap();
        assert!(kept(&paths, good.sha256()).is_some(), "the control");
        let path = place(&paths, good.sha256());
        fs::write(&path, "other").unwrap();
        assert!(kept(&paths, good.sha256()).is_none());
        File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        assert!(kept(&paths, good.sha256()).is_none());
    }
}
