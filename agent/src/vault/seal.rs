//! A stream of bytes, encrypted and authenticated in chunks.
//!
//! This is STREAM (Hoang, Reyhanitabar, Rogaway and Vizár, "Online Authenticated-Encryption and its
//! Nonce-Reuse Misuse-Resistance", 2015) over AES-256-GCM: chunks of 64 KiB, each followed by its tag of 16
//! bytes; the nonce is seven zero bytes, the chunk's number (`u32`, big-endian) and one byte that is 1 for
//! the last chunk and 0 else. Each chunk is bound to a header by its associated data. A chunk that was
//! altered, moved, left out, repeated or cut off does not open. The key must serve one stream only.
//!
//! **Invariant:** no byte is given out before its chunk was authenticated.
//! **Invariant:** memory does not grow with the stream.

use std::io::{self, Read, Write};

use aes_gcm::{Aes256Gcm, KeyInit as _, aead::AeadInOut as _};

/// Plain bytes in a chunk.
pub(super) const CHUNK: usize = 64 << 10;
/// Bytes of a tag.
const TAG: usize = 16;

/// How many bytes a stream of `plain` bytes takes when sealed.
pub(super) fn sealed_len(plain: u64) -> u64 {
    let chunks = plain.div_ceil(wide(CHUNK)).max(1);
    plain.saturating_add(chunks.saturating_mul(wide(TAG)))
}

/// Seals what is written to it.
pub(super) struct Sealer<W> {
    out: W,
    cipher: Aes256Gcm,
    bound: Vec<u8>,
    number: u32,
    chunk: Vec<u8>,
}

impl<W: Write> Sealer<W> {
    /// Seals to `out` with a key that serves nothing else, bound to `bound`.
    pub(super) fn new(out: W, key: &[u8; 32], bound: &[u8]) -> Self {
        let chunk = Vec::with_capacity(CHUNK + TAG);
        Self { out, cipher: Aes256Gcm::new(key.into()), bound: bound.to_vec(), number: 0, chunk }
    }

    /// Takes more bytes.
    ///
    /// # Errors
    /// If they cannot be written, or the stream is longer than 2^32 chunks.
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // A full chunk waits until it is known not to be the last.
            if self.chunk.len() == CHUNK {
                self.flush_chunk(false)?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK - self.chunk.len()));
            self.chunk.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    /// Ends the stream.
    ///
    /// # Errors
    /// As for [`Sealer::push`].
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.flush_chunk(true)?;
        Ok(self.out)
    }

    fn flush_chunk(&mut self, last: bool) -> io::Result<()> {
        let nonce = nonce(self.number, last);
        self.cipher
            .encrypt_in_place(&nonce.into(), &self.bound, &mut self.chunk)
            .map_err(|_| io::Error::other("a chunk cannot be encrypted"))?;
        self.out.write_all(&self.chunk)?;
        self.chunk.clear();
        self.number =
            self.number.checked_add(1).ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?;
        Ok(())
    }
}

/// Opens what a [`Sealer`] made.
pub(super) struct Opener<R> {
    input: R,
    /// Sealed bytes that are not read yet.
    left: u64,
    cipher: Aes256Gcm,
    bound: Vec<u8>,
    number: u32,
    chunk: Vec<u8>,
    /// How much of `chunk` was given out.
    used: usize,
    ended: bool,
}

impl<R: Read> Opener<R> {
    /// Opens `len` bytes of `input`.
    pub(super) fn new(input: R, len: u64, key: &[u8; 32], bound: &[u8]) -> Self {
        let cipher = Aes256Gcm::new(key.into());
        Self {
            input,
            left: len,
            cipher,
            bound: bound.to_vec(),
            number: 0,
            chunk: Vec::with_capacity(CHUNK + TAG),
            used: 0,
            ended: false,
        }
    }

    fn next_chunk(&mut self) -> io::Result<()> {
        let len = self.left.min(wide(CHUNK + TAG));
        let last = len == self.left;
        self.chunk.clear();
        self.used = 0;
        let got = (&mut self.input).take(len).read_to_end(&mut self.chunk)?;
        if wide(got) != len {
            return Err(damaged());
        }
        self.left -= len;
        let opened =
            self.cipher.decrypt_in_place(&nonce(self.number, last).into(), &self.bound, &mut self.chunk);
        if opened.is_err() {
            self.chunk.clear();
            return Err(damaged());
        }
        self.number = self.number.checked_add(1).ok_or_else(damaged)?;
        self.ended = last;
        Ok(())
    }
}

impl<R: Read> Read for Opener<R> {
    /// `InvalidData` if the stream is not whole and unaltered up to here.
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.used == self.chunk.len() && !self.ended {
            self.next_chunk()?;
        }
        let ready = self.chunk.get(self.used..).unwrap_or_default();
        let n = ready.len().min(out.len());
        if let (Some(out), Some(ready)) = (out.get_mut(..n), ready.get(..n)) {
            out.copy_from_slice(ready);
        }
        self.used += n;
        Ok(n)
    }
}

fn nonce(number: u32, last: bool) -> [u8; 12] {
    let mut nonce = [0; 12];
    let (_, end) = nonce.split_at_mut(7);
    let (count, flag) = end.split_at_mut(4);
    count.copy_from_slice(&number.to_be_bytes());
    flag.fill(u8::from(last));
    nonce
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it was altered or cut off")
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn seal(plain: &[u8]) -> Vec<u8> {
        let mut sealer = Sealer::new(Vec::new(), &KEY, b"head");
        for part in plain.chunks(10_007) {
            sealer.push(part).unwrap();
        }
        sealer.finish().unwrap()
    }

    fn open_with(sealed: &[u8], key: &[u8; 32], bound: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Opener::new(sealed, wide(sealed.len()), key, bound).read_to_end(&mut out)?;
        Ok(out)
    }

    fn open(sealed: &[u8]) -> io::Result<Vec<u8>> {
        open_with(sealed, &KEY, b"head")
    }

    fn plain(len: usize) -> Vec<u8> {
        (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect()
    }

    #[test]
    fn what_was_sealed_opens_at_every_length() {
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5] {
            let plain = plain(len);
            let sealed = seal(&plain);
            assert_eq!(wide(sealed.len()), sealed_len(wide(len)), "{len}");
            assert_eq!(open(&sealed).unwrap(), plain, "{len}");
        }
    }

    #[test]
    fn nothing_that_was_altered_opens() {
        let sealed = seal(&plain(2 * CHUNK + 100));
        for at in (0..sealed.len()).step_by(997).chain([sealed.len() - 1]) {
            let mut bad = sealed.clone();
            bad[at] ^= 0x10;
            assert!(open(&bad).is_err(), "flip at {at}");
        }
        // Also where a chunk ends, as if the stream had ended there.
        let edges = [0, 1, CHUNK + TAG, 2 * (CHUNK + TAG), 2 * (CHUNK + TAG) + TAG];
        for cut in edges.into_iter().chain((0..sealed.len()).step_by(4999)) {
            assert!(open(&sealed[..cut]).is_err(), "cut at {cut}");
        }
        let (first, rest) = sealed.split_at(CHUNK + TAG);
        let (second, third) = rest.split_at(CHUNK + TAG);
        for (case, parts) in [
            ("swapped", vec![second, first, third]),
            ("left out", vec![first, third]),
            ("repeated", vec![first, first, second, third]),
            ("longer", vec![first, second, third, &[0]]),
        ] {
            assert!(open(&parts.concat()).is_err(), "{case}");
        }
        assert!(open_with(&sealed, &[8; 32], b"head").is_err(), "another key");
        assert!(open_with(&sealed, &KEY, b"tail").is_err(), "another header");
    }
}
