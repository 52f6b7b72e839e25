//! Patterns, fetched by digest from the manager in use and kept.
//!
//! On disk, `patterns/<sha256>`: the bytes. Those used least recently go when there are too many.
//!
//! **Invariant:** bytes are used only if they are exactly those that the order names.
//! **Invariant:** the folder holds at most [`MAX_KEPT`] bytes, and the pattern that was kept last.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustls::ClientConfig;
use tm_patterns::{InvalidPattern, MAX_STORED, Pattern, ReadError};
use tm_protocol::{address::Address, ids::Sha256, report::Failure, task::PatternRef};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    time::timeout,
};

use crate::{
    connection,
    paths::{Paths, make_folder, replace},
};

/// Most bytes of patterns that are kept.
const MAX_KEPT: u64 = 512 << 20;
/// How long one pattern may take.
const TRANSFER: Duration = Duration::from_secs(300);
/// Longest header line and most lines of an answer.
const MAX_LINE: u64 = 8192;
const MAX_LINES: usize = 64;

/// The pattern that `wanted` names: from the folder, or else from the manager.
pub(crate) async fn pattern(
    paths: &Paths,
    address: Option<&Address>,
    config: &Arc<ClientConfig>,
    wanted: &PatternRef,
) -> Result<Pattern, Failure> {
    let failed = |why: String| {
        let from = address.map(|address| format!(" from {address}")).unwrap_or_default();
        Failure::new("pattern-fetch-failed", format!("cannot fetch pattern `{}`{from}: {why}", wanted.name))
    };
    // A kept file that was changed is no longer what its name says, and is fetched again.
    let (folder, order) = (paths.clone(), wanted.clone());
    if let Some(pattern) = aside(move || read(&folder, &order)).await.flatten() {
        return Ok(pattern);
    }
    let length = usize::try_from(wanted.size).ok().filter(|size| *size <= MAX_STORED);
    let length = length.ok_or_else(|| failed(format!("{} bytes are too many", wanted.size)))?;
    let address = address.ok_or_else(|| failed("no manager's address is known".to_owned()))?;
    let path = format!("/v1/patterns/{}", wanted.sha256);
    let bytes = match timeout(TRANSFER, get(address, config, &path, |announced| announced == length)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(why)) => return Err(failed(why)),
        Err(_) => return Err(failed(format!("not complete after {} s", TRANSFER.as_secs()))),
    };
    let (folder, order) = (paths.clone(), wanted.clone());
    let checked = aside(move || {
        let pattern = Pattern::verified(&order, bytes.as_slice())?;
        // It can be used without being kept: a full disk stands in the way of no scan.
        if let Err(error) = keep(&folder, &pattern, MAX_KEPT) {
            tracing::warn!(%error, sha256 = %order.sha256, "Cannot keep a pattern.");
        }
        Ok::<_, ReadError>(pattern)
    });
    match checked.await {
        Some(Ok(pattern)) => Ok(pattern),
        Some(Err(ReadError::Invalid(error @ InvalidPattern::Digest { .. }))) => {
            let message = format!(
                "the manager's bytes of pattern `{}` are not those that were signed: {error}",
                wanted.name
            );
            Err(Failure::new("pattern-altered", message))
        }
        Some(Err(error)) => Err(failed(error.to_string())),
        None => Err(failed("it could not be checked".to_owned())),
    }
}

/// A pattern that was fetched before and is kept whole; `None` if it is not. Blocks.
pub(crate) fn kept(paths: &Paths, sha256: Sha256) -> Option<Pattern> {
    let size = fs::metadata(place(paths, sha256)).ok()?.len();
    read(paths, &PatternRef { sha256, size, name: sha256.to_string() })
}

/// All patterns that are kept whole, those used last first, and how many there are besides because `most` bytes
/// are not enough for them. It leaves no mark of their use. Blocks.
pub(crate) fn all_kept(paths: &Paths, most: usize) -> (Vec<Pattern>, u32) {
    let entries = fs::read_dir(paths.patterns()).into_iter().flatten().flatten();
    let mut names: Vec<(SystemTime, Sha256)> = entries
        .filter_map(|entry| {
            let sha256 = entry.file_name().to_str()?.parse().ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, sha256))
        })
        .collect();
    names.sort_unstable_by_key(|(used, sha256)| (std::cmp::Reverse(*used), *sha256));
    let (mut patterns, mut left, mut left_out) = (Vec::new(), most, 0_u32);
    for (_, sha256) in names {
        let Ok(size) = fs::metadata(place(paths, sha256)).map(|file| file.len()) else { continue };
        if usize::try_from(size).is_ok_and(|size| size > left) {
            left_out = left_out.saturating_add(1);
            continue;
        }
        let wanted = PatternRef { sha256, size, name: sha256.to_string() };
        let file = File::open(place(paths, sha256)).ok();
        let whole = file.and_then(|file| Pattern::verified(&wanted, file).ok());
        if let Some(pattern) = whole {
            left = left.saturating_sub(usize::try_from(size).unwrap_or(usize::MAX));
            patterns.push(pattern);
        }
    }
    (patterns, left_out)
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
    let pattern = Pattern::verified(wanted, &file).ok()?;
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
    let mut others: Vec<(SystemTime, u64, PathBuf)> = fs::read_dir(paths.patterns())?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok()?;
            Some((metadata.modified().ok()?, metadata.len(), entry.path()))
        })
        .filter(|(_, _, other)| *other != path)
        .collect();
    others.sort_unstable();
    let mut bytes = others.iter().map(|(_, len, _)| len).sum::<u64>() + wide(pattern.size());
    for (_, len, other) in others {
        if bytes <= most {
            break;
        }
        fs::remove_file(other)?;
        bytes -= len;
    }
    replace(&path, &pattern.to_bytes()?)
}

/// Runs what blocks away from the threads that keep the link; `None` if it panics.
pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

/// What a manager has at `path`, if its announced length is a good one.
pub(super) async fn get(
    address: &Address,
    config: &Arc<ClientConfig>,
    path: &str,
    is_good: impl Fn(usize) -> bool,
) -> Result<Vec<u8>, String> {
    let link = connection::dial(address, config).await.map_err(|e| connection::chain(&e))?;
    let mut link = BufReader::new(link);
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    link.write_all(request.as_bytes()).await.map_err(|e| e.to_string())?;
    link.flush().await.map_err(|e| e.to_string())?;
    let status = line(&mut link).await?;
    if !status.starts_with("HTTP/1.1 200 ") {
        return Err(format!("the manager answers `{}`", tm_protocol::text::escape_for_display(&status)));
    }
    let mut announced = None;
    for _ in 0..MAX_LINES {
        let header = line(&mut link).await?;
        if header.is_empty() {
            let Some(length) = announced.filter(|length| is_good(*length)) else {
                return Err("its length is not the one that was ordered".to_owned());
            };
            let mut bytes = vec![0; length];
            link.read_exact(&mut bytes).await.map_err(|e| e.to_string())?;
            return Ok(bytes);
        }
        if let Some((name, value)) = header.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            announced = value.trim().parse().ok();
        }
    }
    Err("the answer's header does not end".to_owned())
}

async fn line(link: &mut BufReader<connection::Link>) -> Result<String, String> {
    let mut line = Vec::new();
    link.take(MAX_LINE).read_until(b'\n', &mut line).await.map_err(|e| e.to_string())?;
    let text = line.strip_suffix(b"\n").ok_or("the answer breaks off")?;
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    Ok(String::from_utf8_lossy(text).into_owned())
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
