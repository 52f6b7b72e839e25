//! Decoders that several containers share, each behind one interface.
//!
//! **Invariant:** a decoder's working memory is known before it is built. One that a limit forbids is never
//! built.

use std::io::{self, Read};

use lzma_rust2::{Lzma2Reader, LzmaReader};
use ppmd_rust::{Ppmd7Decoder, Ppmd8Decoder, RestoreMethod};
use ruzstd::decoding::{
    FrameDecoder, StreamingDecoder,
    errors::{FrameDecoderError, FrameHeaderError},
};
use tm_protocol::report::SkipReason;

use super::field;

/// What deflate, bzip2 and their like need at most, in bytes.
const SMALL: u64 = 8 << 20;
/// Largest window of a zstd frame, and dictionary of an LZMA stream, in bytes.
pub(super) const WINDOW: u64 = 256 << 20;

/// A decoder and what it needs.
pub(super) struct Decoder<'a> {
    /// Where its output is read from.
    pub(super) reader: Box<dyn Read + 'a>,
    /// Its working memory, in bytes.
    pub(super) workspace: u64,
}

impl<'a> Decoder<'a> {
    fn small(reader: impl Read + 'a) -> Self {
        Self { reader: Box::new(reader), workspace: SMALL }
    }

    /// A decoder that takes `memory` bytes as it is built, which is when it is first read from: until then it may
    /// turn out to be too large.
    fn late<R: Read + 'a>(memory: u32, build: impl FnOnce() -> ppmd_rust::Result<R> + 'a) -> Self {
        let reader = Late { build: Some(build), built: None };
        Self { reader: Box::new(reader), workspace: memory.into() }
    }

    /// Compares what comes out with what a header tells, where it does: CRC-32 and size. What differs is an
    /// error at the end.
    pub(super) fn checked(self, crc: Option<u32>, size: Option<u64>) -> Self {
        Self { reader: Box::new(Checked::new(self.reader, crc, size)), workspace: self.workspace }
    }
}

/// Compares the length of what comes out of `reader`, and its CRC-32, with what is told, where it is told. What
/// differs is an error at the end.
pub(super) fn checked<'a>(reader: impl Read + 'a, crc: Option<u32>, size: Option<u64>) -> impl Read + 'a {
    Checked::new(reader, crc, size)
}

/// An error that says why something was not looked at.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.word())]
struct Because(SkipReason);

/// Makes a decoder's error of a reason.
pub(super) fn because(reason: SkipReason) -> io::Error {
    io::Error::other(Because(reason))
}

/// Why a decoder gave up.
pub(super) fn reason(error: &io::Error) -> SkipReason {
    if let Some(Because(reason)) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
        return *reason;
    }
    if error.kind() == io::ErrorKind::OutOfMemory {
        SkipReason::Limit
    } else if error.kind() == io::ErrorKind::Unsupported {
        SkipReason::Unsupported
    } else {
        SkipReason::Malformed
    }
}

/// Deflate (RFC 1951).
pub(super) fn deflate<'a>(input: impl Read + 'a) -> Decoder<'a> {
    Decoder::small(flate2::read::DeflateDecoder::new(input))
}

/// Deflate with a window of 64 KiB (APPNOTE method 9).
pub(super) fn deflate64<'a>(input: impl Read + 'a) -> Decoder<'a> {
    Decoder::small(deflate64::Deflate64Decoder::new(input))
}

/// bzip2, several streams in a row.
pub(super) fn bzip2<'a>(input: impl Read + 'a) -> Decoder<'a> {
    Decoder::small(bzip2::read::MultiBzDecoder::new(input))
}

/// LZMA behind five bytes of properties; `size` is what comes out, if that is known.
pub(super) fn lzma<'a>(
    input: impl Read + 'a,
    properties: &[u8],
    size: Option<u64>,
) -> Result<Decoder<'a>, SkipReason> {
    let (Some(first), Some(dictionary)) = (properties.first(), field::le(properties, 1, 4)) else {
        return Err(SkipReason::Malformed);
    };
    let workspace = dictionary_memory(dictionary)?;
    let dictionary = u32::try_from(dictionary).map_err(|_| SkipReason::Malformed)?;
    let reader = LzmaReader::new_with_props(input, size.unwrap_or(u64::MAX), *first, dictionary, None);
    Ok(Decoder { reader: Box::new(reader.map_err(|error| reason(&error))?), workspace })
}

/// LZMA2 behind the one byte that gives the dictionary's size.
pub(super) fn lzma2<'a>(input: impl Read + 'a, property: u8) -> Result<Decoder<'a>, SkipReason> {
    let dictionary = match property {
        40 => u32::MAX,
        0..40 => (2 | u32::from(property) & 1) << (property / 2 + 11),
        41.. => return Err(SkipReason::Malformed),
    };
    let workspace = dictionary_memory(dictionary.into())?;
    Ok(Decoder { reader: Box::new(Lzma2Reader::new(input, dictionary, None)), workspace })
}

/// A decoder of the LZMA kind out of which `size` bytes come: its dictionary grows with them, and no further.
pub(super) fn within(decoder: Decoder<'_>, size: u64) -> Decoder<'_> {
    Decoder { workspace: decoder.workspace.min(size.saturating_mul(2)).saturating_add(SMALL), ..decoder }
}

/// A filter, which needs next to nothing for itself.
pub(super) fn filtered<'a>(reader: impl Read + 'a) -> Decoder<'a> {
    Decoder { reader: Box::new(reader), workspace: 64 << 10 }
}

/// PPMd variant H, as 7z has it: order and memory in five bytes.
pub(super) fn ppmd7<'a>(input: impl Read + 'a, properties: &[u8]) -> Result<Decoder<'a>, SkipReason> {
    let (Some(order), Some(memory)) = (properties.first(), field::le(properties, 1, 4)) else {
        return Err(SkipReason::Malformed);
    };
    if memory > WINDOW {
        return Err(SkipReason::Limit);
    }
    let memory = u32::try_from(memory).map_err(|_| SkipReason::Malformed)?;
    let order = u32::from(*order);
    Ok(Decoder::late(memory, move || Ppmd7Decoder::new(input, order, memory)))
}

/// Memory of an LZMA decoder with a dictionary of this size, if it may be that large.
pub(super) fn dictionary_memory(dictionary: u64) -> Result<u64, SkipReason> {
    // Beside the dictionary: probabilities of at most 2^(4+8) contexts, and a buffer of 64 KiB.
    (dictionary <= WINDOW).then_some(dictionary).ok_or(SkipReason::Limit)
}

/// PPMd variant I, as zip has it: order, memory and method in the first two bytes (APPNOTE 5.10).
pub(super) fn ppmd8<'a>(mut input: impl Read + 'a) -> Result<Decoder<'a>, SkipReason> {
    let mut parameters = [0; 2];
    input.read_exact(&mut parameters).map_err(|_| SkipReason::Malformed)?;
    let parameters = u32::from(u16::from_le_bytes(parameters));
    let memory = ((parameters >> 4 & 0xff) + 1) << 20;
    let method = match parameters >> 12 {
        0 => RestoreMethod::Restart,
        1 => RestoreMethod::CutOff,
        _ => return Err(SkipReason::Unsupported),
    };
    let order = (parameters & 15) + 1;
    Ok(Decoder::late(memory, move || Ppmd8Decoder::new(input, order, memory, method)))
}

/// Zstandard (RFC 8878), several frames in a row.
pub(super) fn zstd(input: &[u8]) -> Result<Decoder<'_>, SkipReason> {
    let (reader, workspace) = super::streams::zstd_frames(input)?;
    Ok(Decoder { reader: Box::new(reader), workspace })
}

/// One frame of zstd. Its checksum, where it has one, is compared.
pub(super) struct ZstdFrame<'b>(StreamingDecoder<&'b [u8], FrameDecoder>);

impl<'b> ZstdFrame<'b> {
    /// Begins a frame whose window is at most `window` bytes.
    pub(super) fn new(input: &'b [u8], window: u64) -> io::Result<Self> {
        StreamingDecoder::new_with_max_window_size(input, window).map(Self).map_err(|error| {
            let too_big = matches!(
                error,
                FrameDecoderError::WindowSizeTooBig { .. }
                    | FrameDecoderError::FrameHeaderError(FrameHeaderError::WindowTooBig { .. })
            );
            because(if too_big {
                SkipReason::Limit
            } else if matches!(error, FrameDecoderError::DictNotProvided { .. }) {
                SkipReason::Unsupported
            } else {
                SkipReason::Malformed
            })
        })
    }

    /// The window that a frame at the start of `input` asks for, in bytes (RFC 8878, 3.1.1.1).
    pub(super) fn window(input: &[u8]) -> Option<u64> {
        let descriptor = *input.get(4)?;
        if descriptor & 0x20 == 0 {
            let window = *input.get(5)?;
            let base = 1u64 << (10 + (window >> 3));
            return Some(base + base / 8 * u64::from(window & 7));
        }
        let at = 5 + usize::from([0u8, 1, 2, 4][usize::from(descriptor & 3)]);
        match descriptor >> 6 {
            0 => field::le(input, at, 1),
            1 => Some(field::le(input, at, 2)? + 256),
            2 => field::le(input, at, 4),
            _ => field::le(input, at, 8),
        }
    }

    /// What follows the frame once it has been read.
    pub(super) fn into_rest(self) -> &'b [u8] {
        self.0.into_inner()
    }
}

impl Read for ZstdFrame<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let got = self.0.read(out)?;
        if got == 0 && !out.is_empty() {
            let told = self.0.decoder.get_checksum_from_data();
            if told.is_some() && told != self.0.decoder.get_calculated_checksum() {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(got)
    }
}

/// See [`Decoder::late`].
struct Late<R, F> {
    build: Option<F>,
    built: Option<R>,
}

impl<R: Read, F: FnOnce() -> ppmd_rust::Result<R>> Read for Late<R, F> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if let Some(build) = self.build.take() {
            let built = build().map_err(|error| {
                let no_memory = matches!(error, ppmd_rust::Error::MemoryAllocation);
                because(if no_memory { SkipReason::Limit } else { SkipReason::Malformed })
            })?;
            self.built = Some(built);
        }
        // What could not be built stays broken.
        self.built.as_mut().ok_or(io::ErrorKind::InvalidData)?.read(out)
    }
}

/// See [`Decoder::checked`].
struct Checked<R> {
    inner: R,
    crc: Option<u32>,
    size: Option<u64>,
    hasher: crc32fast::Hasher,
    got: u64,
}

impl<R: Read> Checked<R> {
    fn new(inner: R, crc: Option<u32>, size: Option<u64>) -> Self {
        Self { inner, crc, size, hasher: crc32fast::Hasher::new(), got: 0 }
    }
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(out)?;
        self.got = self.got.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
        if self.crc.is_some() {
            self.hasher.update(out.get(..got).unwrap_or_default());
        }
        if got == 0 && !out.is_empty() {
            let wrong_size = self.size.is_some_and(|size| size != self.got);
            let wrong_crc = self.crc.is_some_and(|crc| crc != self.hasher.clone().finalize());
            if wrong_size || wrong_crc {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(got)
    }
}
