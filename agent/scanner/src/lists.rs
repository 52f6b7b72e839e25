//! Digest lists inside a worker: which digests a file needs, and what they are found in.
//!
//! A list is mapped where its parent made it, so all workers share it and it takes none of their own memory.
//!
//! **Invariant:** a digest is computed only if a list has an entry by that algorithm that the file's size allows.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::Arc,
    time::{Duration, Instant},
};

use memmap2::Mmap;
use sha2::Digest as _;
use tm_patterns::digests::{Algorithm, Compiled, Digest, InvalidCompiled};
use tm_protocol::{ids::Sha256, report::SkipReason};

/// What is hashed at a time, in bytes, so that every algorithm finds it in the processor's cache.
const CHUNK: usize = 128 << 10;

/// The lists of a worker. A clone shares them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lists(Arc<Vec<List>>);

#[derive(Debug)]
struct List {
    pattern: Sha256,
    compiled: Compiled<Mmap>,
}

/// What was found, and what kept some of it from being looked for.
#[derive(Debug, Default)]
pub(crate) struct Streamed {
    /// Pattern and entry of each hit.
    pub(crate) hits: Vec<(Sha256, String)>,
    /// Digest of the file; present if there are hits.
    pub(crate) sha256: Option<Sha256>,
    /// Why it was not read to its end.
    pub(crate) skip: Option<SkipReason>,
}

/// Maps a list that came as an open file.
pub(crate) fn map(file: &impl std::os::fd::AsFd) -> io::Result<Mmap> {
    #[expect(unsafe_code, reason = "lists are shared between workers")]
    // SAFETY: the file is sealed by the parent that made it: nobody can change or cut it. The map is private and
    // read-only because older kernels allow no other one of a sealed file; its pages are shared all the same.
    unsafe {
        memmap2::MmapOptions::new().map_copy_read_only(&file.as_fd())
    }
}

impl Lists {
    /// Opens lists, each with the digest of its pattern; on error says which one it is.
    pub(crate) fn open(maps: Vec<(Sha256, Mmap)>) -> Result<Self, (usize, InvalidCompiled)> {
        let open = |(index, (pattern, map))| {
            let compiled = Compiled::open(map).map_err(|error| (index, error))?;
            Ok(List { pattern, compiled })
        };
        maps.into_iter().enumerate().map(open).collect::<Result<_, _>>().map(|lists| Self(Arc::new(lists)))
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What `bytes` are found in; nothing is computed if their length cannot be in any list.
    pub(crate) fn look(&self, bytes: &[u8]) -> Vec<(Sha256, String)> {
        let size = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let Some(mut hashes) = self.hashes(size) else { return Vec::new() };
        bytes.chunks(CHUNK).for_each(|chunk| hashes.update(chunk));
        self.hits(&hashes.finish(), size)
    }

    /// The same for a file of `size` bytes that is read piece by piece, in at most `time`. One that turns out to have
    /// another length was changed, which the caller sees.
    pub(crate) fn stream(
        &self,
        file: &File,
        size: u64,
        buffer: &mut Vec<u8>,
        time: Duration,
    ) -> io::Result<Streamed> {
        let begun = Instant::now();
        let Some(mut hashes) = self.hashes(size) else { return Ok(Streamed::default()) };
        let late = Streamed { skip: Some(SkipReason::Timeout), ..Streamed::default() };
        let is_late = || begun.elapsed() > time;
        if !each_chunk(file, buffer, |chunk| (!is_late()).then(|| hashes.update(chunk)).is_some())? {
            return Ok(late);
        }
        let digests = hashes.finish();
        let hits = self.hits(&digests, size);
        if hits.is_empty() {
            return Ok(Streamed::default());
        }
        let known = digests.iter().find_map(|digest| match digest {
            Digest::Sha256(bytes) => Some(Sha256::new(*bytes)),
            Digest::Md5(_) | Digest::Sha1(_) => None,
        });
        if known.is_some() {
            return Ok(Streamed { hits, sha256: known, skip: None });
        }
        // A detection names its file by SHA-256, which no list needed so far.
        let mut hash = sha2::Sha256::new();
        if !each_chunk(file, buffer, |chunk| (!is_late()).then(|| hash.update(chunk)).is_some())? {
            return Ok(late);
        }
        Ok(Streamed { hits, sha256: Some(Sha256::new(hash.finalize().into())), skip: None })
    }

    /// The computations that a file of this size needs; nothing if there are none.
    fn hashes(&self, size: u64) -> Option<Hashes> {
        let wanted = |algorithm| self.0.iter().any(|list| list.compiled.wants(algorithm, size)).then_some(());
        let hashes = Hashes {
            md5: wanted(Algorithm::Md5).map(|()| md5::Md5::new()),
            sha1: wanted(Algorithm::Sha1).map(|()| sha1::Sha1::new()),
            sha256: wanted(Algorithm::Sha256).map(|()| sha2::Sha256::new()),
        };
        (hashes.md5.is_some() || hashes.sha1.is_some() || hashes.sha256.is_some()).then_some(hashes)
    }

    fn hits(&self, digests: &[Digest], size: u64) -> Vec<(Sha256, String)> {
        let mut hits = Vec::new();
        for list in self.0.iter() {
            for digest in digests {
                let Some(found) = list.compiled.find(digest, size) else { continue };
                let rule = if found.name.is_empty() { digest.to_string() } else { found.name.to_owned() };
                let hit = (list.pattern, rule);
                // A list may name one file by several digests.
                if !hits.contains(&hit) {
                    hits.push(hit);
                }
            }
        }
        hits
    }
}

/// Reads `file` from its start, piece by piece, until `take` has enough; whether it was read to its end.
fn each_chunk(file: &File, buffer: &mut Vec<u8>, mut take: impl FnMut(&[u8]) -> bool) -> io::Result<bool> {
    if buffer.len() < CHUNK {
        buffer.resize(CHUNK, 0);
    }
    let chunk = buffer.get_mut(..CHUNK).unwrap_or_default();
    let mut at = 0u64;
    loop {
        match file.read_at(chunk, at) {
            Ok(0) => return Ok(true),
            Ok(got) => {
                if !take(chunk.get(..got).unwrap_or_default()) {
                    return Ok(false);
                }
                at = at.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The digests that are being computed.
struct Hashes {
    md5: Option<md5::Md5>,
    sha1: Option<sha1::Sha1>,
    sha256: Option<sha2::Sha256>,
}

impl Hashes {
    fn update(&mut self, bytes: &[u8]) {
        if let Some(hash) = &mut self.md5 {
            hash.update(bytes);
        }
        if let Some(hash) = &mut self.sha1 {
            hash.update(bytes);
        }
        if let Some(hash) = &mut self.sha256 {
            hash.update(bytes);
        }
    }

    /// The strongest first: its entry is told first.
    fn finish(self) -> Vec<Digest> {
        let sha256 = self.sha256.map(|hash| Digest::Sha256(hash.finalize().into()));
        let sha1 = self.sha1.map(|hash| Digest::Sha1(hash.finalize().into()));
        let md5 = self.md5.map(|hash| Digest::Md5(hash.finalize().into()));
        [sha256, sha1, md5].into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tm_patterns::Pattern;

    use super::*;

    fn lists(texts: &[String]) -> Lists {
        let maps = texts.iter().map(|text| {
            let pattern = Pattern::new("l", text.clone().into_bytes()).unwrap();
            (pattern.sha256(), map(pattern.digests().unwrap()).unwrap())
        });
        Lists::open(maps.collect()).unwrap()
    }

    fn hex(bytes: impl AsRef<[u8]>) -> String {
        hex::encode(bytes)
    }

    fn rules(hits: Vec<(Sha256, String)>) -> Vec<String> {
        hits.into_iter().map(|(_, rule)| rule).collect()
    }

    #[test]
    fn each_algorithm_is_looked_up_and_computed_only_where_needed() {
        let content = b"some content";
        let (md5, sha1) = (hex(md5::Md5::digest(content)), hex(sha1::Sha1::digest(content)));
        let sha256 = hex(sha2::Sha256::digest(content));
        for (text, found) in [
            (md5.clone(), vec![format!("md5:{md5}")]),
            (sha1.to_uppercase(), vec![format!("sha1:{sha1}")]),
            (sha256.clone(), vec![format!("sha256:{sha256}")]),
            (format!("{md5}:12:Twelve"), vec!["Twelve".to_owned()]),
            (format!("{md5}:13:Thirteen"), vec![]),
            (format!("{md5}:*:Any"), vec!["Any".to_owned()]),
            (format!("{md5} One\n{sha1} Two\n{sha256} One"), vec!["One".to_owned(), "Two".to_owned()]),
            ("00".repeat(32), vec![]),
        ] {
            assert_eq!(rules(lists(std::slice::from_ref(&text)).look(content)), found, "{text}");
        }
        let sized = lists(&[format!("{md5}:13:x"), format!("{sha1}:12:x")]);
        let hashes = sized.hashes(12).unwrap();
        assert!(hashes.md5.is_none() && hashes.sha1.is_some() && hashes.sha256.is_none());
        assert!(sized.hashes(14).is_none(), "nothing has this size");
        assert!(Lists::default().hashes(1).is_none());
        // The digests of nothing, which every textbook names.
        let empty = lists(&["d41d8cd98f00b204e9800998ecf8427e:0:Empty".to_owned()]);
        assert_eq!(rules(empty.look(b"")), ["Empty"]);
    }

    #[test]
    fn a_file_that_is_streamed_gives_the_same() {
        let content: Vec<u8> = (0..3 * CHUNK + 17).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&content).unwrap();
        let (size, sha256) = (content.len() as u64, Sha256::of(&content));
        let (mut buffer, minute) = (Vec::new(), Duration::from_secs(60));
        for (text, hits) in [
            (format!("{sha256} x"), 1),
            (hex(md5::Md5::digest(&content)), 1),
            (format!("{}:{}:x", hex(sha1::Sha1::digest(&content)), size), 1),
            (format!("{}:{}:x", hex(sha1::Sha1::digest(&content)), size + 1), 0),
        ] {
            let lists = lists(&[text]);
            let streamed = lists.stream(&file, size, &mut buffer, minute).unwrap();
            assert_eq!(streamed.hits, lists.look(&content));
            assert_eq!(streamed.hits.len(), hits);
            assert_eq!((streamed.sha256, streamed.skip), ((hits > 0).then_some(sha256), None));
        }
        let late = lists(&[sha256.to_string()]).stream(&file, size, &mut buffer, Duration::ZERO).unwrap();
        assert_eq!((late.hits.len(), late.skip), (0, Some(SkipReason::Timeout)));
    }
}
