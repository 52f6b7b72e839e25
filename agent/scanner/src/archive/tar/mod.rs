//! tar in all its dialects: v7, ustar and pax (POSIX.1-2001), old and new GNU.
//!
//! A tar archive is not compressed, so the raw look at it has seen all bytes; members matter for what is
//! compressed in them and for rules about a file's beginning. After the two blocks of zeros that end an
//! archive there may be another one, which `tar -i` reads; it is read here.

mod header;
mod sparse;

use tm_protocol::report::SkipReason;

use self::header::{Header, Size};
use super::{
    Walk,
    field::{self, index, len},
};

/// Length of a block, in bytes.
const BLOCK: u64 = 512;
/// Longest extended header or long name that is read, in bytes.
const MAX_EXTENDED: u64 = 1 << 20;

/// Whether the first block is a header.
pub(super) fn begins(bytes: &[u8]) -> bool {
    bytes.get(257..262) == Some(b"ustar")
        || Header::parse(bytes).is_some_and(|header| !header.name.is_empty())
}

/// What extended headers say about the member that follows them.
#[derive(Debug, Default)]
struct Extended {
    long_name: Option<Vec<u8>>,
    pax: header::Pax,
}

/// Judges the members of an archive.
pub(super) fn members(walk: &mut Walk<'_>, bytes: &[u8]) -> Result<(), SkipReason> {
    let mut at = 0;
    let mut extended = Extended::default();
    let mut global = header::Pax::default();
    let mut ended = false;
    let mut sound = true;
    loop {
        let rest = bytes.get(index(at)..).unwrap_or_default();
        if rest.first() == Some(&0) || rest.is_empty() {
            let zeros = len(rest) - len(field::after_zeros(rest));
            if zeros == len(rest) {
                break;
            }
            if zeros >= BLOCK {
                ended = true;
                at += zeros / BLOCK * BLOCK;
                continue;
            }
        }
        let Some(header) = Header::parse(rest) else {
            if ended {
                // The archive is over: what follows is not its own.
                walk.behind(rest)?;
                break;
            }
            sound = false;
            // Unpackers skip to the next header, and so may what is hidden.
            match next_header(bytes, at + BLOCK) {
                Some(next) => at = next,
                None => break,
            }
            continue;
        };
        let (size, agreed) = size_of(&header, &extended.pax, &global);
        sound &= agreed;
        let Some(size) = size else {
            sound = false;
            at += BLOCK;
            continue;
        };
        let data_at = at + BLOCK;
        let (data, whole) = field::part(bytes, data_at, size);
        let next = data_at.saturating_add(size.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX));
        match header.kind {
            b'x' | b'X' | b'g' if size <= MAX_EXTENDED => {
                let pax = header::Pax::parse(data);
                sound &= pax.sound;
                if header.kind == b'g' {
                    global = pax;
                } else {
                    // Two in a row: readers differ in which one holds.
                    sound &= !extended.pax.present;
                    extended.pax = pax;
                }
                at = next;
            }
            b'L' if size <= MAX_EXTENDED => {
                extended.long_name = Some(field::until_zero(data).to_vec());
                at = next;
            }
            b'K' if size <= MAX_EXTENDED => at = next,
            b'x' | b'X' | b'g' | b'L' | b'K' => return Err(SkipReason::Limit),
            b'1'..=b'6' => {
                // Links, devices, folders, fifos. Some readers pass over a size that is told, others do not
                // believe it; what has a header's checksum where data would be is a header.
                sound &= size == 0;
                at = if Header::parse(data).is_some() || header.kind == b'5' { data_at } else { next };
                extended = Extended::default();
            }
            kind => {
                let name = extended.long_name.take().unwrap_or_else(|| {
                    extended.pax.path().or(global.path()).unwrap_or(&header.name).to_vec()
                });
                let map = match kind {
                    b'S' => Some(sparse::old_gnu(rest, bytes, data_at, size)),
                    _ => sparse::of_pax(&extended.pax, data),
                };
                let mut next = next;
                match map {
                    None => drop(walk.member(&name, data)?),
                    Some(Ok(map)) => {
                        next = next.saturating_add(map.header_blocks * BLOCK);
                        let mut reader = map.reader();
                        let taken = walk.take_out(&name, map.stored(), 0, &mut reader)?;
                        walk.judge_taken(&name, taken);
                    }
                    Some(Err(())) => {
                        walk.member(&name, data)?;
                        sound = false;
                    }
                }
                at = next;
                extended = Extended::default();
            }
        }
        sound &= whole;
        if !whole {
            break;
        }
    }
    if sound { Ok(()) } else { Err(SkipReason::Malformed) }
}

/// The size of a member's data, and whether its headers agree about it.
fn size_of(header: &Header, extended: &header::Pax, global: &header::Pax) -> (Option<u64>, bool) {
    if matches!(header.kind, b'x' | b'X' | b'g' | b'L' | b'K') {
        return (header.size.number(), true);
    }
    let Some(pax) = extended.size.or(global.size) else { return (header.size.number(), true) };
    let agreed = match header.size {
        // What has no room in the field is told by pax alone.
        Size::Octal(size) => size == pax || size == 0 && pax > Size::MAX_OCTAL,
        Size::Binary(size) => size == pax,
        Size::Invalid => pax > Size::MAX_OCTAL,
    };
    (Some(pax), agreed)
}

/// The next block at or after `at` that is a header.
fn next_header(bytes: &[u8], mut at: u64) -> Option<u64> {
    while let Some(block) = field::piece(bytes, at, BLOCK) {
        if Header::parse(block).is_some() {
            return Some(at);
        }
        at += BLOCK;
    }
    None
}
