//! The header of a 7z archive: where packed streams stand, what folders unpack them, and which files the
//! outcome is cut into (7-Zip, `DOC/7zFormat.txt`).
//!
//! **Invariant:** memory for a header is a small multiple of its length; folders stay as they are written until
//! they are used.

use tm_protocol::report::SkipReason;

use super::cursor::{Cursor, bit};
use crate::archive::field::index;

/// More folders, packed streams, or pieces than this are not read.
const MOST: u64 = 200_000;
/// Coders of a folder, as 7-Zip has it.
const MOST_CODERS: u64 = 32;

/// What parts of a header are called.
mod id {
    pub(super) const END: u64 = 0;
    pub(super) const HEADER: u64 = 1;
    pub(super) const ARCHIVE_PROPERTIES: u64 = 2;
    pub(super) const ADDITIONAL_STREAMS: u64 = 3;
    pub(super) const MAIN_STREAMS: u64 = 4;
    pub(super) const FILES: u64 = 5;
    pub(super) const PACK_INFO: u64 = 6;
    pub(super) const UNPACK_INFO: u64 = 7;
    pub(super) const SUB_STREAMS: u64 = 8;
    pub(super) const SIZE: u64 = 9;
    pub(super) const CRC: u64 = 10;
    pub(super) const FOLDER: u64 = 11;
    pub(super) const UNPACK_SIZES: u64 = 12;
    pub(super) const PIECES: u64 = 13;
    pub(super) const EMPTY_STREAM: u64 = 14;
    pub(super) const NAMES: u64 = 17;
    pub(super) const ENCODED_HEADER: u64 = 23;
}

/// A header.
pub(super) enum Header<'h> {
    /// It is packed itself.
    Encoded(Streams<'h>),
    Plain(Contents<'h>),
}

/// What an archive holds.
pub(super) struct Contents<'h> {
    /// The streams of the files, and before them perhaps others.
    pub(super) streams: Vec<Streams<'h>>,
    pub(super) files: Files<'h>,
    /// All of the header could be read.
    pub(super) whole: bool,
}

/// Packed streams and what is to be made of them.
#[derive(Debug, Default)]
pub(super) struct Streams<'h> {
    /// Where the first packed stream begins, counted from the end of the archive's first 32 bytes.
    pub(super) packed_at: u64,
    /// Lengths of the packed streams, which stand one behind another.
    pub(super) packed: Vec<u64>,
    pub(super) folders: Vec<Folder<'h>>,
    /// Sizes of what each coder of each folder makes.
    pub(super) sizes: Vec<u64>,
    pub(super) pieces: Vec<Piece>,
    has_pieces: bool,
}

/// A chain of coders that unpacks some packed streams.
#[derive(Debug)]
pub(super) struct Folder<'h> {
    /// As it is written.
    written: Cursor<'h>,
    /// How many packed streams it takes, how many sizes it has, and how many pieces are in it.
    pub(super) packed: usize,
    pub(super) outputs: usize,
    pub(super) pieces: usize,
    pub(super) crc: Option<u32>,
}

/// A range of what a folder unpacks to: the content of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) size: u64,
    pub(super) crc: Option<u32>,
}

/// A coder and its place in the chain.
#[derive(Debug)]
pub(super) struct Coder<'h> {
    pub(super) method: &'h [u8],
    pub(super) properties: &'h [u8],
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

/// A folder's coders and how they are joined.
#[derive(Debug)]
pub(super) struct Chain<'h> {
    pub(super) coders: Vec<Coder<'h>>,
    /// Pairs of an input and the output that it takes.
    pub(super) bound: Vec<(usize, usize)>,
    /// The inputs that take packed streams.
    pub(super) packed: Vec<usize>,
}

/// Files that are not empty, in the order of their pieces.
#[derive(Debug, Default)]
pub(super) struct Files<'h> {
    count: u64,
    next: u64,
    empty: &'h [u8],
    /// Names in UTF-16, each ended by a zero.
    names: &'h [u8],
}

impl Files<'_> {
    /// How many files have content.
    pub(super) fn with_content(&self) -> u64 {
        let ones: u64 = self.empty.iter().map(|byte| u64::from(byte.count_ones())).sum();
        self.count.saturating_sub(ones)
    }

    /// The next file's name, in UTF-8.
    pub(super) fn next_name(&mut self) -> Option<Vec<u8>> {
        while self.next < self.count {
            let at = self.next;
            self.next += 1;
            let names = std::mem::take(&mut self.names);
            let end = names.chunks_exact(2).position(|unit| unit == [0, 0])?;
            let (name, rest) = names.split_at_checked(end * 2)?;
            self.names = rest.get(2..).unwrap_or_default();
            if !bit(self.empty, at) {
                let units = name.as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit));
                let name: String =
                    char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
                return Some(name.into_bytes());
            }
        }
        None
    }
}

/// Reads a header.
pub(super) fn parse(bytes: &[u8]) -> Result<Header<'_>, SkipReason> {
    let mut cursor = Cursor(bytes);
    match cursor.number() {
        Some(id::ENCODED_HEADER) => Streams::parse(&mut cursor).map(Header::Encoded),
        Some(id::HEADER) => {
            let mut contents = Contents { streams: Vec::new(), files: Files::default(), whole: false };
            match contents.fill(&mut cursor) {
                Ok(()) => contents.whole = cursor.0.is_empty(),
                // What was read until there can be unpacked.
                Err(SkipReason::Malformed) => {}
                Err(reason) => return Err(reason),
            }
            Ok(Header::Plain(contents))
        }
        Some(_) | None => Err(SkipReason::Malformed),
    }
}

impl<'h> Contents<'h> {
    fn fill(&mut self, cursor: &mut Cursor<'h>) -> Result<(), SkipReason> {
        let mut step = 0;
        loop {
            let part = cursor.number().ok_or(SkipReason::Malformed)?;
            if part == id::END {
                return Ok(());
            }
            // Each at most once, in this order.
            if part <= step {
                return Err(SkipReason::Malformed);
            }
            step = part;
            match part {
                id::ARCHIVE_PROPERTIES => {
                    while cursor.number().ok_or(SkipReason::Malformed)? != id::END {
                        pass(cursor).ok_or(SkipReason::Malformed)?;
                    }
                }
                id::ADDITIONAL_STREAMS | id::MAIN_STREAMS => self.streams.push(Streams::parse(cursor)?),
                id::FILES => self.files.fill(cursor).ok_or(SkipReason::Malformed)?,
                _ => return Err(SkipReason::Malformed),
            }
        }
    }
}

fn pass(cursor: &mut Cursor<'_>) -> Option<()> {
    let length = cursor.number()?;
    cursor.bytes(length).map(drop)
}

impl<'h> Files<'h> {
    fn fill(&mut self, cursor: &mut Cursor<'h>) -> Option<()> {
        self.count = cursor.number()?;
        loop {
            let part = cursor.number()?;
            if part == id::END {
                return Some(());
            }
            let length = cursor.number()?;
            let mut content = Cursor(cursor.bytes(length)?);
            match part {
                id::EMPTY_STREAM => self.empty = content.bits(self.count)?,
                // Names that stand elsewhere are not looked for: the files are judged without them.
                id::NAMES => self.names = if content.byte()? == 0 { content.0 } else { &[] },
                _ => {}
            }
        }
    }
}

impl<'h> Streams<'h> {
    fn parse(cursor: &mut Cursor<'h>) -> Result<Self, SkipReason> {
        let mut streams = Self::default();
        let mut step = 0;
        loop {
            let part = cursor.number().ok_or(SkipReason::Malformed)?;
            if part != id::END && part <= step {
                return Err(SkipReason::Malformed);
            }
            step = part;
            match part {
                id::END => break,
                id::PACK_INFO => streams.packed(cursor)?,
                id::UNPACK_INFO => streams.folders(cursor)?,
                id::SUB_STREAMS => streams.pieces(cursor)?,
                _ => return Err(SkipReason::Malformed),
            }
        }
        if !streams.has_pieces {
            streams.pieces = whole_folders(&streams)?;
        }
        Ok(streams)
    }

    fn packed(&mut self, cursor: &mut Cursor<'h>) -> Result<(), SkipReason> {
        let malformed = SkipReason::Malformed;
        self.packed_at = cursor.number().ok_or(malformed)?;
        let count = counted(cursor)?;
        loop {
            match cursor.number().ok_or(malformed)? {
                id::END => return Ok(()),
                id::SIZE => {
                    self.packed =
                        (0..count).map(|_| cursor.number()).collect::<Option<_>>().ok_or(malformed)?;
                }
                // They are those of packed bytes; what comes out has sums of its own.
                id::CRC => drop(cursor.checksums(count).ok_or(malformed)?),
                _ => pass(cursor).ok_or(malformed)?,
            }
        }
    }

    fn folders(&mut self, cursor: &mut Cursor<'h>) -> Result<(), SkipReason> {
        let malformed = SkipReason::Malformed;
        if cursor.number() != Some(id::FOLDER) {
            return Err(malformed);
        }
        let count = counted(cursor)?;
        if cursor.byte().ok_or(malformed)? != 0 {
            // Folders that stand in a stream of their own: no program writes that.
            return Err(SkipReason::Unsupported);
        }
        for _ in 0..count {
            let written = *cursor;
            let chain = Chain::parse(cursor).ok_or(malformed)?;
            self.folders.push(Folder {
                written,
                packed: chain.packed.len(),
                outputs: chain.outputs(),
                pieces: 1,
                crc: None,
            });
        }
        if cursor.number() != Some(id::UNPACK_SIZES) {
            return Err(malformed);
        }
        for folder in &self.folders {
            for _ in 0..folder.outputs {
                self.sizes.push(cursor.number().ok_or(malformed)?);
            }
        }
        loop {
            match cursor.number().ok_or(malformed)? {
                id::END => return Ok(()),
                id::CRC => {
                    let sums = cursor.checksums(count).ok_or(malformed)?;
                    for (folder, crc) in self.folders.iter_mut().zip(sums) {
                        folder.crc = crc;
                    }
                }
                _ => pass(cursor).ok_or(malformed)?,
            }
        }
    }

    fn pieces(&mut self, cursor: &mut Cursor<'h>) -> Result<(), SkipReason> {
        let malformed = SkipReason::Malformed;
        let mut part = cursor.number().ok_or(malformed)?;
        if part == id::PIECES {
            for folder in &mut self.folders {
                folder.pieces = index(counted(cursor)?);
            }
            part = cursor.number().ok_or(malformed)?;
        }
        let told = part == id::SIZE;
        let mut pieces = Vec::new();
        let mut sizes = self.sizes.as_slice();
        for folder in &self.folders {
            let (own, others) = sizes.split_at_checked(folder.outputs).ok_or(malformed)?;
            sizes = others;
            let mut left = folder.size(own).ok_or(malformed)?;
            for at in (0..folder.pieces).rev() {
                // The last one is what is left.
                let size = match at {
                    0 => left,
                    _ if told => cursor.number().ok_or(malformed)?,
                    _ => return Err(malformed),
                };
                left = left.checked_sub(size).ok_or(malformed)?;
                let crc = folder.crc.filter(|_| folder.pieces == 1);
                pieces.push(Piece { size, crc });
            }
            if pieces.len() > index(MOST) {
                return Err(SkipReason::Limit);
            }
        }
        if told {
            part = cursor.number().ok_or(malformed)?;
        }
        loop {
            match part {
                id::END => break,
                id::CRC => {
                    let missing = pieces.iter_mut().filter(|piece| piece.crc.is_none());
                    let missing: Vec<&mut Piece> = missing.collect();
                    let count = u64::try_from(missing.len()).unwrap_or(u64::MAX);
                    let sums = cursor.checksums(count).ok_or(malformed)?;
                    for (piece, crc) in missing.into_iter().zip(sums) {
                        piece.crc = crc;
                    }
                }
                _ => pass(cursor).ok_or(malformed)?,
            }
            part = cursor.number().ok_or(malformed)?;
        }
        self.pieces = pieces;
        self.has_pieces = true;
        Ok(())
    }
}

fn counted(cursor: &mut Cursor<'_>) -> Result<u64, SkipReason> {
    let count = cursor.number().ok_or(SkipReason::Malformed)?;
    if count > MOST { Err(SkipReason::Limit) } else { Ok(count) }
}

/// Every folder is one piece where nothing else is said.
fn whole_folders(streams: &Streams<'_>) -> Result<Vec<Piece>, SkipReason> {
    let mut sizes = streams.sizes.as_slice();
    let piece = |folder: &Folder<'_>| {
        let (own, others) = sizes.split_at_checked(folder.outputs)?;
        sizes = others;
        Some(Piece { size: folder.size(own)?, crc: folder.crc })
    };
    streams.folders.iter().map(piece).collect::<Option<_>>().ok_or(SkipReason::Malformed)
}

impl<'h> Folder<'h> {
    /// Its coders.
    pub(super) fn chain(&self) -> Option<Chain<'h>> {
        Chain::parse(&mut self.written.clone())
    }

    /// What comes out at the end, of the sizes that its coders make.
    pub(super) fn size(&self, sizes: &[u64]) -> Option<u64> {
        sizes.get(self.chain()?.last()?).copied()
    }
}

impl<'h> Chain<'h> {
    fn parse(cursor: &mut Cursor<'h>) -> Option<Self> {
        let count = cursor.number().filter(|count| (1..=MOST_CODERS).contains(count))?;
        let mut coders = Vec::new();
        for _ in 0..count {
            let flags = cursor.byte()?;
            let method = cursor.bytes(u64::from(flags & 0x0f))?;
            let (inputs, outputs) = if flags & 0x10 != 0 {
                (cursor.number().filter(few)?, cursor.number().filter(few)?)
            } else {
                (1, 1)
            };
            let length = if flags & 0x20 != 0 { cursor.number()? } else { 0 };
            let properties = cursor.bytes(length)?;
            // An alternative of the same coder, which no program writes.
            if flags & 0xc0 != 0 {
                return None;
            }
            coders.push(Coder { method, properties, inputs: index(inputs), outputs: index(outputs) });
        }
        let mut chain = Self { coders, bound: Vec::new(), packed: Vec::new() };
        let inputs = chain.coders.iter().map(|coder| coder.inputs).sum::<usize>();
        let pairs = chain.outputs().checked_sub(1)?;
        for _ in 0..pairs {
            chain.bound.push((index(cursor.number()?), index(cursor.number()?)));
        }
        let packed = inputs.checked_sub(pairs)?;
        chain.packed = match packed {
            1 => vec![(0..inputs).find(|input| chain.bound.iter().all(|(bound, _)| bound != input))?],
            _ => (0..packed).map(|_| cursor.number().map(index)).collect::<Option<_>>()?,
        };
        Some(chain)
    }

    fn outputs(&self) -> usize {
        self.coders.iter().map(|coder| coder.outputs).sum()
    }

    /// The output that no coder takes.
    pub(super) fn last(&self) -> Option<usize> {
        (0..self.outputs()).find(|output| self.bound.iter().all(|(_, bound)| bound != output))
    }
}

/// Inputs and outputs of one coder.
fn few(count: &u64) -> bool {
    (1..=MOST_CODERS).contains(count)
}
