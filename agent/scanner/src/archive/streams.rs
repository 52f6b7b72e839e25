//! Formats that hold one unnamed content in streams one after another: gzip (RFC 1952), bzip2, xz, lzip, zstd
//! (RFC 8878), and LZMA as `xz --format=lzma` writes it.
//!
//! As the unpackers of these formats do, streams in a row are one content, and zero bytes between and behind
//! them mean nothing. What else follows is no part of the content.

use std::io::{self, Read};

use bzip2::bufread::BzDecoder;
use flate2::bufread::GzDecoder;
use lzma_rust2::{LzipReader, XzReader};
use tm_protocol::report::SkipReason;

use super::{
    UNNAMED, Walk,
    codec::{self, WINDOW, ZstdFrame},
    field::{self, len},
};

/// Largest window of zstd, in bytes; the one that its own program allows.
const ZSTD_WINDOW: u64 = 128 << 20;
/// Window that every frame of a zstd stream may have, in bytes.
const ZSTD_COMMON_WINDOW: u64 = 8 << 20;
/// Memory of the other decoders, in bytes.
const SMALL: u64 = 8 << 20;

/// Streams in a row, read as one.
pub(super) struct Streams<'b, D, F> {
    rest: &'b [u8],
    current: Option<D>,
    open: F,
}

/// A decoder of one stream.
pub(super) trait Stream<'b>: Read {
    /// What stands behind the stream, once it has been read to its end.
    fn into_rest(self) -> &'b [u8];
}

impl<'b> Stream<'b> for GzDecoder<&'b [u8]> {
    fn into_rest(self) -> &'b [u8] {
        self.into_inner()
    }
}

impl<'b> Stream<'b> for BzDecoder<&'b [u8]> {
    fn into_rest(self) -> &'b [u8] {
        self.into_inner()
    }
}

impl<'b> Stream<'b> for XzReader<&'b [u8]> {
    fn into_rest(self) -> &'b [u8] {
        self.into_inner()
    }
}

impl<'b> Stream<'b> for ZstdFrame<'b> {
    fn into_rest(self) -> &'b [u8] {
        self.into_rest()
    }
}

impl<'b, D: Stream<'b>, F: FnMut(&mut &'b [u8]) -> io::Result<Option<D>>> Streams<'b, D, F> {
    /// `open` begins the stream that stands at the start, past what means nothing, or says that none does.
    fn new(bytes: &'b [u8], open: F) -> Self {
        Self { rest: bytes, current: None, open }
    }
}

impl<'b, D: Stream<'b>, F: FnMut(&mut &'b [u8]) -> io::Result<Option<D>>> Read for Streams<'b, D, F> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut stream = match self.current.take() {
                Some(stream) => stream,
                None => match (self.open)(&mut self.rest)? {
                    Some(stream) => {
                        // Until its end is known nothing stands behind it.
                        self.rest = &[];
                        stream
                    }
                    None => return Ok(0),
                },
            };
            match stream.read(out)? {
                0 => self.rest = field::after_zeros(stream.into_rest()),
                got => {
                    self.current = Some(stream);
                    return Ok(got);
                }
            }
        }
    }
}

fn content<'b, D: Stream<'b>>(
    walk: &mut Walk<'_>,
    name: &[u8],
    bytes: &'b [u8],
    workspace: u64,
    mut open: impl FnMut(&'b [u8]) -> Option<D>,
) -> Result<(), SkipReason> {
    let mut streams = Streams::new(bytes, |rest: &mut &'b [u8]| Ok(open(rest)));
    let taken = walk.take_out(name, len(bytes), workspace, &mut streams)?;
    let rest = if streams.current.is_none() { streams.rest } else { &[] };
    drop(streams);
    walk.judge_taken(name, taken);
    walk.behind(rest)
}

/// gzip.
pub(super) fn gzip(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let name = {
        let first = GzDecoder::new(bytes);
        first.header().and_then(|header| header.filename()).unwrap_or(UNNAMED).to_vec()
    };
    content(walk, &name, bytes, SMALL, |rest| rest.starts_with(b"\x1f\x8b").then(|| GzDecoder::new(rest)))
}

/// bzip2.
pub(super) fn bzip2(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    content(walk, UNNAMED, bytes, SMALL, |rest| rest.starts_with(b"BZh").then(|| BzDecoder::new(rest)))
}

/// xz.
pub(super) fn xz(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    content(walk, UNNAMED, bytes, xz_window(bytes), xz_stream)
}

/// xz in a container that has a name for it.
pub(super) fn xz_decoder(bytes: &[u8]) -> codec::Decoder<'_> {
    let streams = Streams::new(bytes, |rest: &mut &[u8]| Ok(xz_stream(rest)));
    codec::Decoder { reader: Box::new(streams), workspace: xz_window(bytes) }
}

fn xz_stream(rest: &[u8]) -> Option<XzReader<&[u8]>> {
    // The dictionary is told in each block; memory grows with what comes out, up to it.
    let kilobytes = u32::try_from(WINDOW >> 10).unwrap_or(u32::MAX) + 200;
    rest.starts_with(b"\xfd7zXZ\0").then(|| XzReader::new_mem_limit(rest, false, kilobytes))
}

/// Dictionary of the first block, in bytes (xz file format, 3.1 and 5.3.1); all of an archive's blocks have
/// the same one, unless somebody made it by hand, and then it is [`WINDOW`] at most.
fn xz_window(bytes: &[u8]) -> u64 {
    let header = bytes.get(12..).unwrap_or_default();
    let length = header.first().map_or(0, |size| usize::from(*size) * 4 + 4);
    let header = header.get(..length).unwrap_or_default();
    let lzma2 = header.windows(3).find(|window| window.starts_with(b"\x21\x01"));
    let window = match lzma2 {
        Some([_, _, property @ 0..40]) => (2 | u64::from(property & 1)) << (property / 2 + 11),
        Some(_) => u64::from(u32::MAX),
        None => 0,
    };
    window.max(SMALL)
}

/// lzip: its reader knows of several members itself.
pub(super) fn lzip(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    // The fifth byte after the version gives the dictionary: a power of two less some sixteenths.
    let coded = bytes.get(5).copied().unwrap_or_default();
    let window = 1u64.checked_shl(u32::from(coded & 0x1f)).unwrap_or(u64::MAX);
    let decoder = codec::dictionary_memory(window)
        .map(|workspace| codec::Decoder { reader: Box::new(LzipReader::new(bytes)), workspace });
    walk.unpack(UNNAMED, len(bytes), decoder)
}

/// LZMA alone.
pub(super) fn lzma(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    walk.unpack(UNNAMED, len(bytes), lzma_alone(bytes))
}

/// The decoder of what stands behind the 13 bytes of an LZMA header.
pub(super) fn lzma_alone(bytes: &[u8]) -> Result<codec::Decoder<'_>, SkipReason> {
    let (Some(properties), Some(size), Some(data)) =
        (bytes.get(..5), field::le(bytes, 5, 8), bytes.get(13..))
    else {
        return Err(SkipReason::Malformed);
    };
    codec::lzma(data, properties, (size != u64::MAX).then_some(size))
}

/// zstd.
pub(super) fn zstd(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let decoder = codec::zstd(bytes);
    walk.unpack(UNNAMED, len(bytes), decoder)
}

/// Frames of zstd, skippable ones among them, and the memory that reading them takes.
pub(super) fn zstd_frames(bytes: &[u8]) -> Result<(impl Read + '_, u64), SkipReason> {
    let mut first = bytes;
    pass_skippable(&mut first);
    let window = ZstdFrame::window(first).unwrap_or(0).max(ZSTD_COMMON_WINDOW);
    if window > ZSTD_WINDOW {
        return Err(SkipReason::Limit);
    }
    let frames = Streams::new(bytes, move |rest: &mut &[u8]| {
        pass_skippable(rest);
        rest.starts_with(b"\x28\xb5\x2f\xfd").then(|| ZstdFrame::new(rest, window)).transpose()
    });
    // Its ring is copied when it grows.
    Ok((frames, window * 2))
}

/// Passes over skippable frames (RFC 8878, 3.1.2).
fn pass_skippable(rest: &mut &[u8]) {
    while rest.get(1..4) == Some(b"\x2a\x4d\x18") && rest.first().is_some_and(|byte| byte & 0xf0 == 0x50) {
        let length = field::le(rest, 4, 4).unwrap_or(u64::MAX);
        *rest = rest.get(field::index(length.saturating_add(8))..).unwrap_or_default();
    }
}
