//! Finds in an old pattern what a new one repeats.
//!
//! Blocks of the old one are found again at any place of the new one, as in rsync (Tridgell, "Efficient Algorithms
//! for Sorting and Synchronization", 1999), and then stretched byte by byte, because here both are at hand.
//!
//! **Invariant:** the time taken is in proportion to both lengths, whatever they hold.

use std::io::{self, Write as _};

use flate2::{Compression, write::DeflateEncoder};
use tm_protocol::ids::Sha256;

use super::{Form, MAGIC, VERSION, compared, wide};

/// Length of a block, in bytes. Two changes that are nearer to each other are one.
const BLOCK: usize = 32;
/// How many places of the table are looked at for one block.
const PROBES: usize = 8;

/// What turns the pattern `old` into the pattern `new`; `None` if they cannot be compared: one is a digest list and
/// the other is not, or one is too large.
pub fn make(old: &[u8], new: &[u8]) -> Option<Vec<u8>> {
    let ((form, base), (new_form, wanted)) = (compared(old)?, compared(new)?);
    if form != new_form {
        return None;
    }
    let mut delta = Vec::new();
    delta.extend_from_slice(MAGIC);
    delta.extend_from_slice(&[VERSION, if form == Form::Bytes { 0 } else { 1 }]);
    delta.extend_from_slice(Sha256::of(old).as_bytes());
    delta.extend_from_slice(Sha256::of(new).as_bytes());
    delta.extend_from_slice(&wide(base.len()).to_le_bytes());
    delta.extend_from_slice(&wide(wanted.len()).to_le_bytes());
    let mut ops = Ops { out: DeflateEncoder::new(delta, Compression::default()), taken: 0 };
    // Writing into memory does not fail.
    compare(&base, &wanted, &mut ops).ok()?;
    ops.out.finish().ok()
}

struct Ops {
    out: DeflateEncoder<Vec<u8>>,
    /// Where in the old one the bytes ended that were taken last.
    taken: usize,
}

impl Ops {
    fn put(&mut self, fresh: &[u8], at: usize, copied: usize) -> io::Result<()> {
        self.number(wide(fresh.len()))?;
        self.out.write_all(fresh)?;
        self.number(wide(copied))?;
        if copied > 0 {
            let (ahead, back) = (wide(at.saturating_sub(self.taken)), wide(self.taken.saturating_sub(at)));
            self.number(if back > 0 { 2 * back - 1 } else { 2 * ahead })?;
            self.taken = at + copied;
        }
        Ok(())
    }

    fn number(&mut self, mut value: u64) -> io::Result<()> {
        loop {
            let [low, ..] = (value & 0x7f).to_le_bytes();
            value >>= 7;
            self.out.write_all(&[if value > 0 { low | 0x80 } else { low }])?;
            if value == 0 {
                return Ok(());
            }
        }
    }
}

fn compare(base: &[u8], wanted: &[u8], ops: &mut Ops) -> io::Result<()> {
    let table = Table::new(base);
    // Everything before `done` is said; nothing from there to `at` was found.
    let (mut done, mut at) = (0, 0);
    while let Some(block) = wanted.get(at..).and_then(|rest| rest.first_chunk::<BLOCK>()) {
        // Most changes leave the rest in its place, or push it on by as much as is new.
        let expected = ops.taken + (at - done);
        let found = [expected, ops.taken]
            .into_iter()
            .find(|place| base.get(*place..).is_some_and(|rest| rest.starts_with(block)))
            .or_else(|| table.find(base, block));
        let Some(place) = found else {
            at += 1;
            continue;
        };
        let before =
            same_end(base.get(..place).unwrap_or_default(), wanted.get(done..at).unwrap_or_default());
        let (from, begin) = (place - before, at - before);
        let length =
            same_begin(base.get(from..).unwrap_or_default(), wanted.get(begin..).unwrap_or_default());
        ops.put(wanted.get(done..begin).unwrap_or_default(), from, length)?;
        done = begin + length;
        at = done;
    }
    match wanted.get(done..) {
        None | Some([]) => Ok(()),
        Some(rest) => ops.put(rest, 0, 0),
    }
}

fn same_begin(a: &[u8], b: &[u8]) -> usize {
    let chunks = a.chunks_exact(64).zip(b.chunks_exact(64)).take_while(|(a, b)| a == b).count() * 64;
    let rest = a.iter().skip(chunks).zip(b.iter().skip(chunks)).take_while(|(a, b)| a == b).count();
    chunks + rest
}

fn same_end(a: &[u8], b: &[u8]) -> usize {
    a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count()
}

/// The blocks of the old one, by what they hash to. Of those that are alike the first ones are kept.
struct Table {
    /// The number of a block, from 1; 0 for none.
    places: Vec<u32>,
}

impl Table {
    fn new(base: &[u8]) -> Self {
        let blocks = base.len() / BLOCK;
        let mut places = vec![0_u32; (blocks * 2).next_power_of_two().max(16)];
        for (number, block) in (1..).zip(base.chunks_exact(BLOCK)) {
            let Some(block) = block.first_chunk() else { continue };
            let first = hash(block);
            for probe in 0..PROBES {
                let slot = slot(first, probe, places.len());
                if let Some(place @ 0) = places.get_mut(slot) {
                    *place = number;
                    break;
                }
            }
        }
        Self { places }
    }

    fn find(&self, base: &[u8], block: &[u8; BLOCK]) -> Option<usize> {
        let first = hash(block);
        for probe in 0..PROBES {
            let number = *self.places.get(slot(first, probe, self.places.len()))?;
            let place = usize::try_from(number.checked_sub(1)?).ok()? * BLOCK;
            if base.get(place..)?.starts_with(block) {
                return Some(place);
            }
        }
        None
    }
}

fn slot(hash: u64, probe: usize, places: usize) -> usize {
    // `places` is a power of two.
    usize::try_from(hash >> 20).unwrap_or_default().wrapping_add(probe) & (places - 1)
}

/// Equal blocks have equal ones; nobody gains anything by blocks that share one.
fn hash(block: &[u8; BLOCK]) -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in block.chunks_exact(8) {
        let word = word.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        state = (state ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        state ^= state >> 32;
    }
    state
}
