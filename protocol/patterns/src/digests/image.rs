//! A compiled list in memory that nobody can change any more, to be mapped by scan workers.
//!
//! **Invariant:** the file has no name, is sealed against every change, and its header was read: its parts lie within
//! it, and the digest at its end is right.

use std::{
    fs::File,
    io::{self, Read, Write as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt as _,
    },
    sync::Arc,
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
};
use sha2::Digest as _;
use tm_protocol::ids::Sha256;

use super::{
    Counts, InvalidCompiled, MAX_COMPILED,
    layout::{HEADER, Layout, TRAILER},
};

/// What is read at a time, in bytes.
const CHUNK: usize = 256 << 10;

/// A compiled list that can be handed to other processes. A clone is the same one.
#[derive(Debug, Clone)]
pub struct Image {
    file: Arc<File>,
    size: usize,
    sha256: Sha256,
    counts: Counts,
}

impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        self.sha256 == other.sha256
    }
}

impl Eq for Image {}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It could not be read.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// There is no memory for it.
    #[error("there is no memory for the digest list")]
    Memory(#[source] Errno),
    /// It is not a compiled list.
    #[error(transparent)]
    Invalid(#[from] InvalidCompiled),
}

impl Image {
    /// Takes a compiled list out of `source`, in one pass.
    ///
    /// # Errors
    /// If it cannot be read, is no compiled list or not whole, or there is no memory.
    pub fn read(mut source: impl Read) -> Result<Self, ImageError> {
        let memory =
            |error: io::Error| ImageError::Memory(Errno::from_io_error(&error).unwrap_or(Errno::NOMEM));
        let fd = memfd_create("tm-digests", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let mut file = File::from(fd.map_err(ImageError::Memory)?);
        let (mut header, mut size, mut digests) = (Vec::with_capacity(HEADER), 0usize, Tail::default());
        let mut chunk = vec![0; CHUNK];
        loop {
            let got = match source.read(&mut chunk) {
                Ok(0) => break,
                Ok(got) => chunk.get(..got).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ImageError::Read(error)),
            };
            header.extend(got.iter().take(HEADER.saturating_sub(header.len())));
            size = size.saturating_add(got.len());
            if size > MAX_COMPILED {
                return Err(InvalidCompiled::TooLarge.into());
            }
            digests.update(got);
            file.write_all(got).map_err(memory)?;
        }
        let layout = Layout::read(&header, size)?;
        let sha256 = digests.finish().ok_or(InvalidCompiled::Damaged("its digest differs"))?;
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        fcntl_add_seals(&file, seals).map_err(ImageError::Memory)?;
        Ok(Self { file: Arc::new(file), size, sha256, counts: layout.counts() })
    }

    /// How many entries there are.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// SHA-256 of its bytes.
    pub fn sha256(&self) -> Sha256 {
        self.sha256
    }

    /// Its length, in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// A copy of its bytes.
    ///
    /// # Errors
    /// If the kernel refuses, which it has no reason to.
    pub fn to_vec(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.size];
        self.file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Digests of all bytes, and of all but the last ones, which hold the latter.
#[derive(Default)]
struct Tail {
    hash: sha2::Sha256,
    last: Vec<u8>,
}

impl Tail {
    fn update(&mut self, bytes: &[u8]) {
        if let Some(ahead) = bytes.len().checked_sub(TRAILER) {
            let (bytes, last) = bytes.split_at(ahead);
            self.hash.update(&self.last);
            self.hash.update(bytes);
            self.last.clear();
            self.last.extend_from_slice(last);
        } else {
            self.last.extend_from_slice(bytes);
            let ahead = self.last.len().saturating_sub(TRAILER);
            self.hash.update(self.last.get(..ahead).unwrap_or_default());
            self.last.drain(..ahead);
        }
    }

    /// The digest of all bytes, if the last ones are the digest of those before.
    fn finish(mut self) -> Option<Sha256> {
        if self.hash.clone().finalize().as_slice() != self.last {
            return None;
        }
        self.hash.update(&self.last);
        Some(Sha256::new(self.hash.finalize().into()))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::List, *};

    /// Gives a few bytes at a time.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let most = self.1.min(buffer.len());
            self.0.read(&mut buffer[..most])
        }
    }

    fn compiled() -> Vec<u8> {
        let mut list = List::new();
        for n in 0..100 {
            list.feed(format!("{n:064x} name {n}\n").as_bytes()).unwrap();
        }
        list.finish().unwrap().0
    }

    #[test]
    fn an_image_is_what_was_read_and_stays_so() {
        let bytes = compiled();
        for piece in [1, 7, 31, 32, 33, 100, usize::MAX] {
            let image = Image::read(Slow(&bytes, piece)).unwrap();
            assert_eq!(image.sha256(), Sha256::of(&bytes), "{piece}");
            assert_eq!((image.size(), image.counts().total()), (bytes.len(), 100));
            assert_eq!(image.to_vec().unwrap(), bytes);
            assert!(image.file.write_all_at(b"x", 0).is_err());
            assert!(image.file.set_len(0).is_err() && image.file.set_len(1 << 20).is_err());
        }
    }

    #[test]
    fn bytes_that_are_no_list_give_no_image() {
        let good = compiled();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let mut newer = good.clone();
        newer[14] = 2;
        for (bytes, expected) in [
            (&b""[..], InvalidCompiled::Magic),
            (b"rule a { condition: true }", InvalidCompiled::Magic),
            (&good[..good.len() - 1], InvalidCompiled::Length),
            (&good[..20], InvalidCompiled::Length),
            (&flipped, InvalidCompiled::Damaged("its digest differs")),
            (&newer, InvalidCompiled::Version(2)),
        ] {
            match Image::read(bytes) {
                Err(ImageError::Invalid(found)) => assert_eq!(found, expected),
                other => panic!("{other:?}"),
            }
        }
        let endless = Image::read(good.chain(io::repeat(0)));
        assert!(matches!(endless, Err(ImageError::Invalid(InvalidCompiled::TooLarge))));
    }
}
