//! The directories at the end of a zip (APPNOTE 4.3.12 to 4.3.16), all of them.

use super::LOCAL;
use crate::archive::field::{self, index, len};

/// The end record's length without its comment, and that of the longest comment.
const END: u64 = 22;
const LONGEST_COMMENT: u64 = 65_535;
/// Length of an entry's fixed part, in bytes.
const FIXED: u64 = 46;
/// Entries above this number are not read.
const MAX_ENTRIES: usize = 200_000;
/// Directories above this number are not read; there should be one.
const MAX_DIRECTORIES: usize = 4;

/// What a directory says about an entry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry<'b> {
    /// Where the local header stands.
    pub(super) local_at: u64,
    pub(super) packed: u64,
    pub(super) size: u64,
    pub(super) crc: u32,
    pub(super) flags: u64,
    pub(super) method: u64,
    pub(super) name: &'b [u8],
}

impl Entry<'_> {
    /// Whether it is a folder: no data, and a name that says so.
    pub(super) fn is_folder(&self) -> bool {
        self.name.ends_with(b"/") && self.packed == 0
    }
}

/// Every directory of a file.
#[derive(Debug, Default)]
pub(super) struct Directories<'b> {
    /// Entries of all directories, by the place of their data. The same entry of two is there once.
    pub(super) entries: Vec<Entry<'b>>,
    /// Bytes that directories and end records cover: start and end.
    pub(super) covered: Vec<(u64, u64)>,
    /// How many directories there are.
    pub(super) count: usize,
    /// There is one, and it agrees with its end record.
    pub(super) sound: bool,
    /// There are more entries than are read.
    pub(super) truncated: bool,
}

/// Finds directories by their end records.
pub(super) fn find(bytes: &[u8]) -> Directories<'_> {
    let mut found = Directories { sound: true, ..Directories::default() };
    let tail_at = len(bytes).saturating_sub(END + LONGEST_COMMENT);
    let tail = bytes.get(index(tail_at)..).unwrap_or_default();
    let mut starts = Vec::new();
    let mut nested: Vec<(u64, u64)> = Vec::new();
    // From the last to the first: an end record within an entry's data is that of a zip in this zip.
    let ends: Vec<usize> = memchr::memmem::find_iter(tail, b"PK\x05\x06").collect();
    for end_at in ends.into_iter().rev().filter_map(|at| Some(tail_at + u64::try_from(at).ok()?)) {
        let inside = nested.partition_point(|(start, _)| *start <= end_at);
        if inside.checked_sub(1).and_then(|at| nested.get(at)).is_some_and(|(_, end)| end_at < *end) {
            continue;
        }
        let Some(end) = End::parse(bytes, end_at) else { continue };
        let before = found.entries.len();
        for (start, base) in end.starts(bytes) {
            if starts.contains(&start) {
                continue;
            }
            if starts.len() >= MAX_DIRECTORIES {
                found.sound = false;
                break;
            }
            starts.push(start);
            found.read(bytes, start, base, &end);
        }
        nested.extend(found.entries.get(before..).unwrap_or_default().iter().map(|entry| {
            let variable = |at| field::le(bytes, index(entry.local_at.saturating_add(at)), 2).unwrap_or(0);
            let data_at = entry.local_at.saturating_add(30 + variable(26) + variable(28));
            (entry.local_at, data_at.saturating_add(entry.packed))
        }));
        nested.sort_unstable();
    }
    found.sound &= found.count == 1;
    found.entries.sort_unstable();
    found.entries.dedup();
    found
}

impl<'b> Directories<'b> {
    /// Reads the directory that begins at `start`; offsets in it count from `base`.
    fn read(&mut self, bytes: &'b [u8], start: u64, base: u64, end: &End) {
        let mut at = start;
        let mut count = 0;
        while let Some((entry, next)) = entry(bytes, at, base) {
            if self.entries.len() >= MAX_ENTRIES {
                self.truncated = true;
                break;
            }
            self.entries.push(entry);
            count += 1;
            at = next;
        }
        self.count += 1;
        self.sound &= end.is_right(count, at - start) || self.truncated;
        self.covered.extend([(start, at), (end.at, end.at + END)]);
    }
}

/// An end record, with what the zip64 one in front of it says instead.
#[derive(Debug)]
struct End {
    at: u64,
    /// Where the directory must end: at this record, or at the zip64 one.
    directory_end: u64,
    count: u64,
    length: u64,
    offset: u64,
    /// The count has only 16 bits.
    short: bool,
}

impl End {
    fn parse(bytes: &[u8], at: u64) -> Option<Self> {
        let record = bytes.get(index(at)..)?;
        let comment = field::le(record, 20, 2)?;
        if END + comment > len(record) {
            return None;
        }
        let mut end = Self {
            at,
            directory_end: at,
            count: field::le(record, 10, 2)?,
            length: field::le(record, 12, 4)?,
            offset: field::le(record, 16, 4)?,
            short: true,
        };
        if let Some(wide) = at.checked_sub(20).and_then(|locator| Self::parse_wide(bytes, at, locator)) {
            end = wide;
        }
        Some(end)
    }

    /// The zip64 record that a locator in front of the end record points to.
    fn parse_wide(bytes: &[u8], at: u64, locator: u64) -> Option<Self> {
        let locator_bytes = bytes.get(index(locator)..index(at))?;
        if !locator_bytes.starts_with(b"PK\x06\x07") {
            return None;
        }
        let told = field::le(locator_bytes, 8, 8)?;
        // With something in front of the archive it stands later than told, mostly right before the locator.
        [told, locator.saturating_sub(56)].into_iter().find_map(|record_at| {
            let record = bytes.get(index(record_at)..)?;
            record.starts_with(b"PK\x06\x06").then_some(())?;
            Some(Self {
                at,
                directory_end: record_at,
                count: field::le(record, 32, 8)?,
                length: field::le(record, 40, 8)?,
                offset: field::le(record, 48, 8)?,
                short: false,
            })
        })
    }

    /// Where its directory may begin, and what offsets in that one count from.
    fn starts(&self, bytes: &[u8]) -> Vec<(u64, u64)> {
        let mut starts = Vec::new();
        let begins = |at: u64| bytes.get(index(at)..).is_some_and(|rest| rest.starts_with(b"PK\x01\x02"));
        // Backward from the record, which is right whatever stands in front of the archive; else as told.
        if let Some(start) = self.directory_end.checked_sub(self.length).filter(|start| begins(*start)) {
            let base = start.saturating_sub(self.offset);
            let first = entry(bytes, start, base);
            let shifted = first.is_some_and(|(first, _)| is_local(bytes, first.local_at));
            starts.push((start, if shifted { base } else { 0 }));
        }
        if begins(self.offset) && !starts.iter().any(|(start, _)| *start == self.offset) {
            starts.push((self.offset, 0));
        }
        starts
    }

    fn is_right(&self, count: u64, length: u64) -> bool {
        let told = if self.short { count & 0xffff == self.count } else { count == self.count };
        told && length == self.length
    }
}

fn is_local(bytes: &[u8], at: u64) -> bool {
    bytes.get(index(at)..).is_some_and(|rest| rest.starts_with(LOCAL))
}

/// The entry at `at`, and where the next one begins.
fn entry(bytes: &[u8], at: u64, base: u64) -> Option<(Entry<'_>, u64)> {
    let header = bytes.get(index(at)..)?;
    if !header.starts_with(b"PK\x01\x02") {
        return None;
    }
    let name_length = field::le(header, 28, 2)?;
    let extra_length = field::le(header, 30, 2)?;
    let comment_length = field::le(header, 32, 2)?;
    let name = field::piece(header, FIXED, name_length)?;
    let extra = field::piece(header, FIXED + name_length, extra_length)?;
    let mut size = field::le(header, 24, 4)?;
    let mut packed = field::le(header, 20, 4)?;
    let mut local_at = field::le(header, 42, 4)?;
    widen(extra, &mut [&mut size, &mut packed, &mut local_at]);
    let entry = Entry {
        local_at: local_at.saturating_add(base),
        packed,
        size,
        crc: u32::try_from(field::le(header, 16, 4)?).ok()?,
        flags: field::le(header, 8, 2)?,
        method: field::le(header, 10, 2)?,
        name,
    };
    Some((entry, at + FIXED + name_length + extra_length + comment_length))
}

/// Puts the numbers of the zip64 field (APPNOTE 4.5.3) in the place of those that have no room in 32 bits.
pub(super) fn widen(mut extra: &[u8], numbers: &mut [&mut u64]) {
    while let (Some(tag), Some(length)) = (field::le(extra, 0, 2), field::le(extra, 2, 2)) {
        let (content, _) = field::part(extra, 4, length);
        if tag == 1 {
            let mut at = 0;
            for number in numbers.iter_mut().filter(|number| ***number == 0xffff_ffff) {
                let Some(wide) = field::le(content, at, 8) else { return };
                **number = wide;
                at += 8;
            }
            return;
        }
        extra = extra.get(index(4 + length)..).unwrap_or_default();
    }
}
