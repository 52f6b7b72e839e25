//! What a container is, told by its content.

use std::sync::LazyLock;

use aho_corasick::{AhoCorasick, MatchKind};
use memchr::memmem;

use super::{
    ar, cpio,
    field::{self, index},
    tar, zip,
};

/// How far from the end a zip's end record may begin: its own 22 bytes and the longest comment.
const ZIP_TAIL: usize = 22 + 65_535;

/// A format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Zip,
    Gzip,
    Bzip2,
    Xz,
    Lzma,
    Lzip,
    Zstd,
    Tar,
    SevenZip,
    Ar,
    Cpio,
    Rpm,
    Cab,
    /// A container that this version has no reader for.
    Other,
}

/// A container in some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Its format.
    pub(super) kind: Kind,
    /// Where it begins. A zip is read from its end, so what is in front belongs to it.
    pub(super) at: usize,
}

/// Signatures at the start. Those of [`Kind::Other`]: RAR, `compress`, LZ4, lzop, ARJ, xar, WIM, squashfs, old
/// zstd.
const SIGNATURES: [(&[u8], Kind); 25] = [
    (b"PK\x03\x04", Kind::Zip),
    (b"PK\x05\x06", Kind::Zip),
    (b"\x1f\x8b", Kind::Gzip),
    (b"\xfd7zXZ\0", Kind::Xz),
    (b"LZIP\x01", Kind::Lzip),
    (b"\x28\xb5\x2f\xfd", Kind::Zstd),
    (b"7z\xbc\xaf\x27\x1c", Kind::SevenZip),
    (ar::MAGIC, Kind::Ar),
    (b"\xed\xab\xee\xdb", Kind::Rpm),
    (b"MSCF\0\0\0\0", Kind::Cab),
    (b"Rar!\x1a\x07", Kind::Other),
    (b"RE~^", Kind::Other),
    (b"\x04\x22\x4d\x18", Kind::Other),
    (b"\x02\x21\x4c\x18", Kind::Other),
    (b"\x89LZO\0\r\n\x1a\n", Kind::Other),
    (b"\x60\xea", Kind::Other),
    (b"xar!", Kind::Other),
    (b"MSWIM\0\0\0", Kind::Other),
    (b"hsqs", Kind::Other),
    (b"sqsh", Kind::Other),
    (b"\x25\xb5\x2f\xfd", Kind::Other),
    (b"\x26\xb5\x2f\xfd", Kind::Other),
    (b"\x27\xb5\x2f\xfd", Kind::Other),
    (b"07070X", Kind::Other),
    (b"!<bout>\n", Kind::Other),
];

/// The containers that readers of one format or another would find in `bytes`: mostly none or one.
pub(super) fn containers(bytes: &[u8]) -> Vec<Found> {
    let mut found: Vec<Found> = first(bytes).map(|kind| Found { kind, at: 0 }).into_iter().collect();
    if found.is_empty() {
        found.extend(embedded(bytes));
    }
    // Self-extracting archives have a program in front, and tricks a picture.
    let tail = bytes.get(bytes.len().saturating_sub(ZIP_TAIL)..).unwrap_or_default();
    let has_zip = found.iter().any(|found| found.kind == Kind::Zip);
    if !has_zip && memmem::find(tail, b"PK\x05\x06").is_some() && zip::opens(bytes) {
        found.push(Found { kind: Kind::Zip, at: 0 });
    }
    found
}

/// Whether [`containers`] could find any in bytes of which only the first and the last ones are here.
pub(super) fn may_be(head: &[u8], tail: &[u8]) -> bool {
    let carries = [&b"#!"[..], b"MZ", b"\x7fELF"].iter().any(|start| head.starts_with(start));
    carries || first(head).is_some() || memmem::find(tail, b"PK\x05\x06").is_some()
}

/// Whether the zip that an unzipper finds in `bytes`, by its last end of a central directory, is the one that begins
/// and ends in memory with `member`. Not where a size or an offset is told elsewhere (zip64).
pub(super) fn is_zip_at(bytes: &[u8], member: (usize, usize)) -> bool {
    let begin = bytes.as_ptr().addr();
    let Some((from, to)) = member.0.checked_sub(begin).zip(member.1.checked_sub(begin)) else { return false };
    let Some(end) = memmem::rfind(bytes, b"PK\x05\x06") else { return false };
    let field =
        |at: usize| field::le(bytes, end.saturating_add(at), 4).and_then(|value| usize::try_from(value).ok());
    let (Some(size), Some(offset)) = (field(12), field(16)) else { return false };
    let base = end.checked_sub(size).and_then(|directory| directory.checked_sub(offset));
    base == Some(from) && end < to && to <= bytes.len() && bytes.get(from..from + 4) == Some(b"PK\x03\x04")
}

fn first(bytes: &[u8]) -> Option<Kind> {
    let signature = SIGNATURES.iter().find(|(signature, _)| bytes.starts_with(signature));
    if let Some((signature, kind)) = signature
        && (*signature != b"\x60\xea" || is_arj(bytes))
    {
        return Some(*kind);
    }
    if bytes.starts_with(b"BZh") && matches!(bytes.get(4..10), Some(BZIP2_BLOCK | BZIP2_END)) {
        return Some(Kind::Bzip2);
    }
    let compress = bytes.starts_with(b"\x1f\x9d")
        && bytes.get(2).is_some_and(|flags| flags & 0x60 == 0 && (9..=16).contains(&(flags & 0x1f)));
    if compress || is_lzh(bytes) || bytes.get(0x8001..0x8006) == Some(b"CD001") {
        return Some(Kind::Other);
    }
    // A skippable frame may stand in front of zstd.
    if bytes.get(1..4) == Some(b"\x2a\x4d\x18") && bytes.first().is_some_and(|first| first & 0xf0 == 0x50) {
        return Some(Kind::Zstd);
    }
    if cpio::begins(bytes) {
        return Some(Kind::Cpio);
    }
    if tar::begins(bytes) {
        return Some(Kind::Tar);
    }
    is_lzma(bytes).then_some(Kind::Lzma)
}

/// Pi and the square root of pi, which begin a block of bzip2 and its end.
const BZIP2_BLOCK: &[u8] = b"\x31\x41\x59\x26\x53\x59";
const BZIP2_END: &[u8] = b"\x17\x72\x45\x38\x50\x90";

/// LZMA has no signature. This is what `xz` takes for it: usual properties, a dictionary of 2^n or 2^n +
/// 2^(n-1) bytes, a length that is not told or is below 256 GiB, and a coder that begins with zero.
fn is_lzma(bytes: &[u8]) -> bool {
    let (Some(dictionary), Some(size)) = (field::le(bytes, 1, 4), field::le(bytes, 5, 8)) else {
        return false;
    };
    let round = dictionary.is_power_of_two() || (dictionary / 3).is_power_of_two() && dictionary % 3 == 0;
    bytes.first() == Some(&0x5d)
        && bytes.get(13) == Some(&0)
        && (round && dictionary >= 4096 || dictionary == 0xffff_ffff)
        && (size == u64::MAX || size < 1 << 38)
}

/// ARJ: a header of 30 to 2600 bytes, whose first header is of type 2.
fn is_arj(bytes: &[u8]) -> bool {
    field::le(bytes, 2, 2).is_some_and(|size| (30..=2600).contains(&size)) && bytes.get(10) == Some(&2)
}

/// LHA: the method is spelt out.
fn is_lzh(bytes: &[u8]) -> bool {
    matches!(bytes.get(2..7), Some([b'-', b'l', b'h' | b'z', b'0'..=b'9' | b'd' | b's', b'-']))
}

/// What a self-extracting program carries: behind `MZ` and ELF a 7z, cab or RAR archive with a right header,
/// behind a script a compressed stream that begins a line.
fn embedded(bytes: &[u8]) -> Option<Found> {
    if bytes.starts_with(b"#!") {
        let marks: [(&[u8], Kind); 4] = [
            (b"\n\x1f\x8b\x08", Kind::Gzip),
            (b"\nBZh91AY&SY", Kind::Bzip2),
            (b"\n\xfd7zXZ\0", Kind::Xz),
            (b"\n\x28\xb5\x2f\xfd", Kind::Zstd),
        ];
        return marks
            .into_iter()
            .filter_map(|(mark, kind)| Some(Found { kind, at: memmem::find(bytes, mark)? + 1 }))
            .min_by_key(|found| found.at);
    }
    if !bytes.starts_with(b"MZ") && !bytes.starts_with(b"\x7fELF") {
        return None;
    }
    let mut first: [Option<usize>; CARRIED.len()] = [None; CARRIED.len()];
    for mark in MARKS.find_iter(bytes) {
        let kind = mark.pattern().as_usize();
        let (Some((_, _, is_right)), Some(first)) = (CARRIED.get(kind), first.get_mut(kind)) else {
            continue;
        };
        if first.is_none() && is_right(bytes.get(mark.start()..).unwrap_or_default()) {
            *first = Some(mark.start());
            if kind == 0 {
                break;
            }
        }
    }
    first.into_iter().zip(CARRIED).find_map(|(at, (_, kind, _))| Some(Found { kind, at: at? }))
}

/// How a container begins, and whether its header is right.
type Carried = (&'static [u8], Kind, fn(&[u8]) -> bool);

/// What [`embedded`] looks for in programs. If there are several, the first one here counts.
const CARRIED: [Carried; 3] = [
    (b"7z\xbc\xaf\x27\x1c", Kind::SevenZip, is_sevenz),
    (b"MSCF\0\0\0\0", Kind::Cab, is_cab),
    (b"Rar!\x1a\x07", Kind::Other, is_rar),
];

/// Finds the beginnings of all of [`CARRIED`] in one pass, which costs a program's digest a twentieth of itself;
/// three passes cost a third. None of them can overlap another.
static MARKS: LazyLock<AhoCorasick> = LazyLock::new(|| {
    AhoCorasick::builder()
        // The kind that has a vectorized search.
        .match_kind(MatchKind::LeftmostFirst)
        .build(CARRIED.map(|(mark, _, _)| mark))
        .expect("three short marks make a small automaton")
});

/// A start header with a right checksum.
fn is_sevenz(bytes: &[u8]) -> bool {
    let crc = bytes.get(12..32).map(|header| u64::from(crc32fast::hash(header)));
    crc.is_some() && field::le(bytes, 8, 4) == crc
}

/// Version 1.1 or later ones, and a length that is there.
fn is_cab(bytes: &[u8]) -> bool {
    bytes.get(25) == Some(&1)
        && field::le(bytes, 8, 4).is_some_and(|length| length >= 36 && bytes.get(..index(length)).is_some())
}

/// A main header with a right checksum, of version 4 or 5.
fn is_rar(bytes: &[u8]) -> bool {
    if let Some(header) = bytes.strip_prefix(b"Rar!\x1a\x07\0") {
        let crc = header.get(2..13).map(|main| u64::from(crc32fast::hash(main) & 0xffff));
        return header.get(2) == Some(&0x73) && field::le(header, 0, 2) == crc;
    }
    let Some(header) = bytes.strip_prefix(b"Rar!\x1a\x07\x01\0") else { return false };
    let length = header.get(4).map_or(0, |length| usize::from(*length));
    field::le(header, 0, 4) == header.get(4..5 + length).map(|main| u64::from(crc32fast::hash(main)))
}
