//! Sparse members of GNU tar: the old form (type `S`) and those of pax, 0.0, 0.1 and 1.0.

use std::io::{self, Read};

use super::{
    BLOCK,
    header::{Pax, number},
};
use crate::archive::field::{self, index, len};

/// Most pieces of one member.
const MAX_PIECES: usize = 100_000;

/// Where a member's data belongs in the file that it was.
#[derive(Debug)]
pub(super) struct Map<'b> {
    /// Offset in the file and length, in order, without overlaps.
    pieces: Vec<(u64, u64)>,
    /// The file's size.
    size: u64,
    data: &'b [u8],
    /// Blocks of the map that stand between the header and the data and are not in the header's size.
    pub(super) header_blocks: u64,
}

impl<'b> Map<'b> {
    fn new(pieces: Vec<(u64, u64)>, size: u64, data: &'b [u8], header_blocks: u64) -> Result<Self, ()> {
        let mut end = 0u64;
        let mut stored = 0u64;
        for (offset, length) in &pieces {
            if *offset < end {
                return Err(());
            }
            end = offset.checked_add(*length).filter(|end| *end <= size).ok_or(())?;
            stored = stored.checked_add(*length).ok_or(())?;
        }
        if stored > len(data) {
            return Err(());
        }
        Ok(Self { pieces, size, data, header_blocks })
    }

    /// Length of the data, in bytes.
    pub(super) fn stored(&self) -> u64 {
        len(self.data)
    }

    /// Reads the file that the member was.
    pub(super) fn reader(&self) -> impl Read + '_ {
        Expanded { map: self, piece: 0, at: 0, data_at: 0 }
    }
}

/// Pieces and zeros between them.
struct Expanded<'m, 'b> {
    map: &'m Map<'b>,
    piece: usize,
    at: u64,
    data_at: u64,
}

impl Read for Expanded<'_, '_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let (offset, length) = self.map.pieces.get(self.piece).copied().unwrap_or((self.map.size, 0));
            let (end, hole) = if self.at < offset { (offset, true) } else { (offset + length, false) };
            let want = index(end - self.at).min(out.len());
            if want == 0 && self.piece >= self.map.pieces.len() || out.is_empty() {
                return Ok(0);
            }
            if want == 0 {
                self.piece += 1;
                continue;
            }
            let step = u64::try_from(want).unwrap_or(u64::MAX);
            let target = out.get_mut(..want).unwrap_or_default();
            if hole {
                target.fill(0);
            } else {
                let source =
                    field::piece(self.map.data, self.data_at, step).ok_or(io::ErrorKind::UnexpectedEof)?;
                target.copy_from_slice(source);
                self.data_at += step;
            }
            self.at += step;
            return Ok(want);
        }
    }
}

/// The old form: four pieces in the header, 21 in each block that continues it. `data_at` and `size` are
/// those of the header.
pub(super) fn old_gnu<'b>(header: &[u8], bytes: &'b [u8], data_at: u64, size: u64) -> Result<Map<'b>, ()> {
    let real_size = header.get(483..495).and_then(|field| number(field).number()).ok_or(())?;
    let mut pieces = Vec::new();
    let mut read = |block: &[u8], at: usize, count: usize| {
        for entry in block.get(at..at + count * 24).unwrap_or_default().chunks_exact(24) {
            let (offset, length) = entry.split_at(12);
            if offset.first() == Some(&0) && length.first() == Some(&0) {
                break;
            }
            pieces.push((number(offset).number().ok_or(())?, number(length).number().ok_or(())?));
        }
        if pieces.len() > MAX_PIECES { Err(()) } else { Ok(()) }
    };
    read(header, 386, 4)?;
    let mut more = header.get(482).is_some_and(|flag| *flag != 0);
    let mut blocks = 0;
    while more {
        if index(blocks) > MAX_PIECES / 21 {
            return Err(());
        }
        let block = field::piece(bytes, data_at + blocks * BLOCK, BLOCK).ok_or(())?;
        read(block, 0, 21)?;
        more = block.get(504).is_some_and(|flag| *flag != 0);
        blocks += 1;
    }
    let (data, _) = field::part(bytes, data_at + blocks * BLOCK, size);
    Map::new(pieces, real_size, data, blocks)
}

/// The forms of pax; `None` if the member is not sparse.
pub(super) fn of_pax<'b>(pax: &Pax, data: &'b [u8]) -> Option<Result<Map<'b>, ()>> {
    if pax.sparse.is_empty() {
        return None;
    }
    if pax.sparse_number("major") == Some(1) {
        return Some(map_in_data(pax, data));
    }
    Some((|| {
        let size = pax.sparse_number("size").or(pax.sparse_number("realsize")).ok_or(())?;
        let numbers = match pax.sparse("map") {
            Some(map) => map
                .split(|byte| *byte == b',')
                .map(|number| field::digits(number, 10).ok_or(()))
                .collect::<Result<Vec<_>, ()>>()?,
            None => pax
                .sparse
                .iter()
                .filter(|(key, _)| matches!(key.as_slice(), b"offset" | b"numbytes"))
                .map(|(_, value)| field::digits(value, 10).ok_or(()))
                .collect::<Result<Vec<_>, ()>>()?,
        };
        Map::new(paired(&numbers)?, size, data, 0)
    })())
}

/// Form 1.0: the map stands in front of the data, in decimal lines, padded to a block.
fn map_in_data<'b>(pax: &Pax, data: &'b [u8]) -> Result<Map<'b>, ()> {
    let size = pax.sparse_number("realsize").ok_or(())?;
    let mut at = 0;
    let mut line = || {
        let rest = data.get(at..).unwrap_or_default();
        let end = rest.iter().take(24).position(|byte| *byte == b'\n').ok_or(())?;
        at += end + 1;
        field::digits(rest.get(..end).unwrap_or_default(), 10).ok_or(())
    };
    let count = index(line()?);
    if count > MAX_PIECES {
        return Err(());
    }
    let numbers = (0..count * 2).map(|_| line()).collect::<Result<Vec<_>, ()>>()?;
    let at = at.next_multiple_of(index(BLOCK));
    Map::new(paired(&numbers)?, size, data.get(at..).unwrap_or_default(), 0)
}

fn paired(numbers: &[u64]) -> Result<Vec<(u64, u64)>, ()> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    if rest.is_empty() && pairs.len() <= MAX_PIECES {
        Ok(pairs.iter().map(|[offset, length]| (*offset, *length)).collect())
    } else {
        Err(())
    }
}
