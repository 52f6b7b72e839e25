//! The compiled form of a digest list, and where its parts lie.
//!
//! All numbers are little-endian. In this order:
//!
//! | bytes | what |
//! |---|---|
//! | 14, 2 | [`MAGIC`], version 1 |
//! | 8 | length of the whole |
//! | 8, 8 | number of names, length of their text |
//! | 3 × 56 | for MD5, SHA-1, SHA-256: number of entries; flags (1 there are sizes, 2 there are names, 4 every entry has a size); number of distinct sizes; salt; seed of the filter; its segment length (4 bytes) and segments' total length (4 bytes); length of the filter |
//! | … | for each algorithm: the filter; the digests, sorted; with flag 1 a size for each (8 bytes, all ones for any); with flag 2 the number of a name for each (4 bytes, 0 for none); with flag 4 the distinct sizes, sorted (8 bytes each) |
//! | … | where each name ends in the text (4 bytes each), the text (UTF-8) |
//! | 32 | SHA-256 of all before it |
//!
//! **Invariant:** a [`Layout`] that exists describes parts that lie within the length it was read for, and filters
//! that can be asked without reaching beyond them.

use super::{Algorithm, Counts, filter::Shape};

/// First bytes of the compiled form: never text.
pub const MAGIC: &[u8; 14] = b"\x89tm-digests\r\n\0";
/// Largest compiled list, in bytes.
pub const MAX_COMPILED: usize = 256 << 20;
/// Version of the form.
pub(super) const VERSION: u16 = 1;
/// Length of a table's part of the header.
pub(super) const TABLE: usize = 56;
/// Length of the header.
pub(super) const HEADER: usize = 40 + 3 * TABLE;
/// Length of the digest at the end.
pub(super) const TRAILER: usize = 32;

/// There is a size for each entry (or for none).
pub(super) const SIZES: u64 = 1;
/// There is the number of a name for each entry.
pub(super) const NAMES: u64 = 2;
/// No entry is for any size.
pub(super) const ALL_SIZED: u64 = 4;
/// Stands for any size.
pub(super) const ANY_SIZE: u64 = u64::MAX;

/// Why bytes are not a compiled digest list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCompiled {
    /// They begin otherwise.
    #[error("this is no compiled digest list")]
    Magic,
    /// Made by a program that is newer.
    #[error("the digest list has form {0}, only form 1 is known")]
    Version(u16),
    /// There are fewer or more of them than they say.
    #[error("the digest list is not whole")]
    Length,
    /// More than [`MAX_COMPILED`].
    #[error("the compiled digest list is too large")]
    TooLarge,
    /// Its parts contradict each other.
    #[error("the digest list is damaged: {0}")]
    Damaged(&'static str),
}

/// Whether `bytes`, the first of a file, begin a compiled list.
pub fn is_compiled(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Where the parts of one algorithm lie.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) count: usize,
    pub(super) filter: Shape,
    pub(super) filter_at: usize,
    pub(super) digests_at: usize,
    pub(super) sizes_at: Option<usize>,
    pub(super) names_at: Option<usize>,
    pub(super) distinct_at: Option<usize>,
    pub(super) distinct: usize,
}

/// Where everything lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) tables: [Table; 3],
    pub(super) names: usize,
    pub(super) name_ends_at: usize,
    pub(super) text_at: usize,
    pub(super) text: usize,
    /// Length of all but the digest at the end.
    pub(super) body: usize,
}

impl Layout {
    /// Reads the header of a list of `length` bytes, of which `header` are the first (at least [`HEADER`]).
    pub(super) fn read(header: &[u8], length: usize) -> Result<Self, InvalidCompiled> {
        let mut fields = Fields(header);
        if fields.0.split_off(..MAGIC.len()) != Some(MAGIC) {
            return Err(InvalidCompiled::Magic);
        }
        let version = fields.bytes().map(u16::from_le_bytes).ok_or(InvalidCompiled::Length)?;
        if version != VERSION {
            return Err(InvalidCompiled::Version(version));
        }
        if length > MAX_COMPILED {
            return Err(InvalidCompiled::TooLarge);
        }
        if fields.size()? != length {
            return Err(InvalidCompiled::Length);
        }
        let (names, text) = (fields.size()?, fields.size()?);
        let mut place = Place(HEADER);
        let mut tables = [Table::default(); 3];
        for (table, algorithm) in tables.iter_mut().zip(Algorithm::ALL) {
            *table = fields.table(&mut place, algorithm)?;
        }
        let name_ends_at = place.take(names, 4)?;
        let text_at = place.take(text, 1)?;
        let body = place.0;
        place.take(TRAILER, 1)?;
        if place.0 != length {
            return Err(InvalidCompiled::Length);
        }
        Ok(Self { tables, names, name_ends_at, text_at, text, body })
    }

    pub(super) fn counts(&self) -> Counts {
        Counts(self.tables.map(|table| u64::try_from(table.count).unwrap_or(u64::MAX)))
    }
}

/// How far the parts reach.
struct Place(usize);

impl Place {
    /// Where a part of `count` times `each` bytes begins.
    fn take(&mut self, count: usize, each: usize) -> Result<usize, InvalidCompiled> {
        let begin = self.0;
        let end = count.checked_mul(each).and_then(|length| length.checked_add(begin));
        self.0 = end.ok_or(InvalidCompiled::Length)?;
        Ok(begin)
    }
}

/// What is left of the header.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn long(&mut self) -> Result<u64, InvalidCompiled> {
        self.bytes().map(u64::from_le_bytes).ok_or(InvalidCompiled::Length)
    }

    fn word(&mut self) -> Result<u32, InvalidCompiled> {
        self.bytes().map(u32::from_le_bytes).ok_or(InvalidCompiled::Length)
    }

    fn size(&mut self) -> Result<usize, InvalidCompiled> {
        usize::try_from(self.long()?).map_err(|_| InvalidCompiled::Length)
    }

    fn table(&mut self, place: &mut Place, algorithm: Algorithm) -> Result<Table, InvalidCompiled> {
        let (count, flags, distinct) = (self.size()?, self.long()?, self.size()?);
        let (salt, seed) = (self.long()?, self.long()?);
        let (segment, segments) = (self.word()?, self.word()?);
        let filter = Shape { salt, seed, segment, segments, length: self.size()? };
        if flags & !(SIZES | NAMES | ALL_SIZED) != 0 || flags & (SIZES | ALL_SIZED) == ALL_SIZED {
            return Err(InvalidCompiled::Damaged("flags"));
        }
        if flags & ALL_SIZED == 0 && distinct != 0 {
            return Err(InvalidCompiled::Damaged("sizes"));
        }
        if !filter.is_sound() {
            return Err(InvalidCompiled::Damaged("filter"));
        }
        let filter_at = place.take(filter.length, 1)?;
        let digests_at = place.take(count, algorithm.length())?;
        let mut column = |flag, rows, each| (flags & flag != 0).then(|| place.take(rows, each)).transpose();
        let sizes_at = column(SIZES, count, 8)?;
        let names_at = column(NAMES, count, 4)?;
        let distinct_at = column(ALL_SIZED, distinct, 8)?;
        Ok(Table { count, filter, filter_at, digests_at, sizes_at, names_at, distinct_at, distinct })
    }
}
