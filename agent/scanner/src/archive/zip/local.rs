//! A local header (APPNOTE 4.3.7): what stands in front of an entry's data.

use super::{ENCRYPTED, LOCAL, SIZES_BEHIND, directory::Entry};
use crate::archive::field::{self, index};

/// Length of the fixed part, in bytes.
const FIXED: u64 = 30;
/// Versions of the format are below this.
const VERSIONS: u64 = 64;

/// A local header.
#[derive(Debug)]
pub(super) struct Local<'b> {
    pub(super) name: &'b [u8],
    pub(super) flags: u64,
    pub(super) method: u64,
    pub(super) crc: u32,
    pub(super) packed: u64,
    pub(super) size: u64,
    /// Where the data begins.
    pub(super) data_at: u64,
    version: u64,
    date: u64,
}

impl<'b> Local<'b> {
    /// Reads the header that begins at `at`.
    pub(super) fn parse(bytes: &'b [u8], at: u64) -> Option<Self> {
        let header = bytes.get(index(at)..)?;
        if !header.starts_with(LOCAL) {
            return None;
        }
        let name_length = field::le(header, 26, 2)?;
        let extra_length = field::le(header, 28, 2)?;
        let name = field::piece(header, FIXED, name_length)?;
        let extra = field::piece(header, FIXED + name_length, extra_length)?;
        let mut size = field::le(header, 22, 4)?;
        let mut packed = field::le(header, 18, 4)?;
        super::directory::widen(extra, &mut [&mut size, &mut packed]);
        Some(Self {
            name,
            flags: field::le(header, 6, 2)?,
            method: field::le(header, 8, 2)?,
            crc: u32::try_from(field::le(header, 14, 4)?).ok()?,
            packed,
            size,
            data_at: at + FIXED + name_length + extra_length,
            version: field::le(header, 4, 2)? & 0xff,
            date: field::le(header, 12, 2)?,
        })
    }

    /// Whether sizes and checksum, if it tells them, are those of the directory.
    pub(super) fn agrees(&self, entry: &Entry<'_>) -> bool {
        let told = self.flags & SIZES_BEHIND == 0 || self.packed != 0 || self.size != 0;
        let sizes = !told || self.packed == entry.packed && self.size == entry.size && self.crc == entry.crc;
        sizes && !self.differs(entry)
    }

    /// Whether its data, read as it says, may be something else than what the directory says.
    pub(super) fn differs(&self, entry: &Entry<'_>) -> bool {
        let behind = self.flags & SIZES_BEHIND != 0 && self.packed == 0;
        self.method != entry.method
            || (self.flags ^ entry.flags) & ENCRYPTED != 0
            || !behind && self.packed != entry.packed
    }

    /// Whether it looks like a header and not like four bytes that happen to stand somewhere; its data may
    /// not reach past `until`, or else it is not believed either.
    pub(super) fn is_plausible(&self, until: u64) -> bool {
        let (day, month) = (self.date & 31, self.date >> 5 & 15);
        let dated = self.date == 0 || (1..=31).contains(&day) && (1..=12).contains(&month);
        let method = matches!(self.method, 0..=20 | 93..=99);
        self.version < VERSIONS
            && dated
            && method
            && !self.name.is_empty()
            && !self.name.iter().any(|byte| byte.is_ascii_control())
            && self.data_at <= until
    }

    /// Whether it is a folder: no data, and a name that says so.
    pub(super) fn is_folder(&self) -> bool {
        self.name.ends_with(b"/") && self.packed == 0 && self.flags & SIZES_BEHIND == 0
    }
}
