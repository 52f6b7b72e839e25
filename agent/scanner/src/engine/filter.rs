//! The filter: one pass over the data that finds the needles that are in it.
//!
//! Each needle is entered under its rarest four bytes. The pass looks at every four bytes of the data: a bit map
//! rules out nearly all of them, a table names the needles that may stand there, and a comparison decides.
//!
//! **Invariant:** every needle that is in the data is told of. Case is dropped by setting bit 5 in data
//! and needle alike, which confuses bytes but never loses one; the comparison at the end is exact.

use std::time::Instant;

use super::needles::{Literal, SHORTEST, best_window};

/// Data between two looks at the clock, in bytes.
const STRETCH: usize = 1 << 20;
/// Multiplier of the hash (2^32 divided by the golden ratio).
const MIX: u32 = 0x9e37_79b1;
/// Bit 5 of four bytes.
const FOLD: u32 = 0x2020_2020;

/// A needle in the table.
#[derive(Debug)]
struct Needle {
    literal: Literal,
    /// Where its window starts within it.
    offset: usize,
    /// What is told when it is found.
    tells: Vec<u32>,
}

/// A window, and a needle that has it.
#[derive(Debug, Clone, Copy)]
struct Entry {
    window: u32,
    needle: u32,
    /// Another window of the needle: most data that has the first does not have this one, and nothing else of the
    /// needle needs to be fetched to see it.
    other: u32,
    /// Where the other starts, counted from the first.
    other_at: isize,
}

/// All needles of a set of rules.
#[derive(Debug)]
pub(super) struct Filter {
    needles: Vec<Needle>,
    /// Sorted by slot.
    entries: Vec<Entry>,
    /// Where the entries of each slot start, and the end.
    slots: Vec<u32>,
    slot_shift: u32,
    map: Vec<u64>,
    map_shift: u32,
}

/// Needles that were found in the data at hand: each is told of once.
#[derive(Debug, Clone, Default)]
pub(super) struct Met {
    bits: Vec<u64>,
    /// Words that are not zero.
    touched: Vec<u32>,
}

impl Met {
    fn clear(&mut self, needles: usize) {
        self.bits.resize(needles.div_ceil(64), 0);
        for at in self.touched.drain(..) {
            if let Some(word) = self.bits.get_mut(at as usize) {
                *word = 0;
            }
        }
    }

    fn has(&self, needle: u32) -> bool {
        self.bits.get(needle as usize / 64).is_some_and(|word| word & (1 << (needle % 64)) != 0)
    }

    fn add(&mut self, needle: u32) {
        if let Some(word) = self.bits.get_mut(needle as usize / 64) {
            if *word == 0 {
                self.touched.push(needle / 64);
            }
            *word |= 1 << (needle % 64);
        }
    }
}

/// What the pass should do after a needle was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Look on.
    Go,
    /// Enough is known.
    Stop,
}

impl Filter {
    /// Builds the table from needles and what is to be told of each.
    pub(super) fn new(wanted: impl Iterator<Item = (Literal, Vec<u32>)>) -> Self {
        let needles: Vec<Needle> = wanted
            .map(|(literal, tells)| Needle {
                offset: best_window(literal.bytes.as_slice()).0,
                literal,
                tells,
            })
            .collect();
        let mut entries: Vec<Entry> =
            needles.iter().zip(0u32..).filter_map(|(needle, at)| entry(needle, at)).collect();
        // About one slot an entry, and 64 bits of the map.
        let slot_bits = bits(entries.len(), 1).clamp(4, 20);
        let map_bits = bits(entries.len(), 64).clamp(12, 23);
        let (slot_shift, map_shift) = (32 - slot_bits, 32 - map_bits);
        entries.sort_by_key(|entry| (hash(entry.window) >> slot_shift, entry.window));
        let mut slots = vec![0u32; (1 << slot_bits) + 1];
        let mut map = vec![0u64; (1 << map_bits) / 64];
        for entry in &entries {
            let hash = hash(entry.window);
            if let Some(count) = slots.get_mut((hash >> slot_shift) as usize + 1) {
                *count += 1;
            }
            let bit = (hash >> map_shift) as usize;
            if let Some(word) = map.get_mut(bit / 64) {
                *word |= 1 << (bit % 64);
            }
        }
        let mut sum = 0;
        for slot in &mut slots {
            sum += *slot;
            *slot = sum;
        }
        Self { needles, entries, slots, slot_shift, map, map_shift }
    }

    /// Tells `found` of every needle that is in `data`, once. Returns false if `deadline` came before the end.
    pub(super) fn find(
        &self,
        data: &[u8],
        deadline: Option<Instant>,
        met: &mut Met,
        mut found: impl FnMut(u32) -> Next,
    ) -> bool {
        met.clear(self.needles.len());
        if self.entries.is_empty() {
            return true;
        }
        let (map, shift) = (self.map.as_slice(), self.map_shift);
        let mut start = 0;
        while let Some(stretch) = data.get(start..data.len().min(start + STRETCH + SHORTEST - 1))
            && stretch.len() >= SHORTEST
        {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return false;
            }
            for (at, window) in stretch.windows(SHORTEST).enumerate() {
                let Some(window) = window.first_chunk::<SHORTEST>() else { continue };
                let window = u32::from_le_bytes(*window) | FOLD;
                let hash = hash(window);
                let bit = (hash >> shift) as usize;
                let word = map.get(bit / 64).copied().unwrap_or_default();
                if word & (1 << (bit % 64)) != 0
                    && self.confirm(data, start + at, (window, hash), met, &mut found) == Next::Stop
                {
                    return true;
                }
            }
            start += STRETCH;
        }
        true
    }

    #[inline(never)]
    fn confirm(
        &self,
        data: &[u8],
        at: usize,
        (window, hash): (u32, u32),
        met: &mut Met,
        found: &mut impl FnMut(u32) -> Next,
    ) -> Next {
        let slot = (hash >> self.slot_shift) as usize;
        let (Some(from), Some(to)) = (self.slots.get(slot), self.slots.get(slot + 1)) else {
            return Next::Go;
        };
        for entry in self.entries.get(*from as usize..*to as usize).unwrap_or_default() {
            if entry.window != window {
                continue;
            }
            let other = at.checked_add_signed(entry.other_at).and_then(|at| window_at(data, at));
            if other != Some(entry.other) || met.has(entry.needle) {
                continue;
            }
            let Some(needle) = self.needles.get(entry.needle as usize) else { continue };
            let bytes = needle.literal.bytes.as_slice();
            let Some(there) = at.checked_sub(needle.offset).and_then(|at| data.get(at..at + bytes.len()))
            else {
                continue;
            };
            if there == bytes || (needle.literal.nocase && there.eq_ignore_ascii_case(bytes)) {
                met.add(entry.needle);
                if needle.tells.iter().any(|tell| found(*tell) == Next::Stop) {
                    return Next::Stop;
                }
            }
        }
        Next::Go
    }
}

/// The entry of a needle: its rarest window, and the one that shares least with it.
fn entry(needle: &Needle, number: u32) -> Option<Entry> {
    let (bytes, at) = (needle.literal.bytes.as_slice(), needle.offset);
    let last = bytes.len().checked_sub(SHORTEST)?;
    let other = if at > last - at { 0 } else { last };
    let other_at = isize::try_from(other).ok()? - isize::try_from(at).ok()?;
    let (window, other) = (window_at(bytes, at)?, window_at(bytes, other)?);
    Some(Entry { window, needle: number, other, other_at })
}

/// The four bytes at `at`, case dropped.
fn window_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk::<SHORTEST>().map(|window| u32::from_le_bytes(*window) | FOLD)
}

fn hash(window: u32) -> u32 {
    window.wrapping_mul(MIX)
}

/// The bits that count `each` times `count`.
fn bits(count: usize, each: usize) -> u32 {
    count.saturating_mul(each).max(1).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::{super::needles::Piece, *};

    fn found(filter: &Filter, data: &[u8]) -> Vec<u32> {
        let mut units = Vec::new();
        assert!(filter.find(data, None, &mut Met::default(), |unit| {
            units.push(unit);
            Next::Go
        }));
        units.sort_unstable();
        units.dedup();
        units
    }

    #[test]
    fn a_needle_is_told_of_once_in_each_data() {
        let literal = Literal { bytes: Piece::new(*b"abcd"), nocase: false, rarity: 0 };
        let filter = Filter::new([(literal, vec![7])].into_iter());
        let (mut met, mut told) = (Met::default(), 0);
        for _ in 0..3 {
            let mut found = |_| {
                told += 1;
                Next::Go
            };
            assert!(filter.find(b"abcd abcd abcd", None, &mut met, &mut found));
        }
        assert_eq!(told, 3);
    }

    #[test]
    fn needles_are_found_wherever_they_stand() {
        let literal = |text: &str, nocase| Literal { bytes: Piece::new(text.bytes()), nocase, rarity: 0 };
        let filter = Filter::new(
            [
                (literal("abcd", false), vec![0]),
                (literal("The Needle 47", false), vec![1, 2]),
                (literal("nOcAsE", true), vec![3]),
            ]
            .into_iter(),
        );
        assert_eq!(found(&filter, b"abcd"), [0]);
        assert_eq!(found(&filter, b"ABCD abc"), [0; 0]);
        assert_eq!(found(&filter, b"xThe Needle 47"), [1, 2]);
        assert_eq!(found(&filter, b"NoCaSe"), [3]);
        assert_eq!(found(&filter, b"abc"), [0; 0]);
        // Across and around the places where the clock is looked at.
        for before in (STRETCH - 20..STRETCH + 20).chain(2 * STRETCH - 20..2 * STRETCH + 20) {
            let mut data = vec![b'.'; before];
            data.extend(b"The Needle 47");
            assert_eq!(found(&filter, &data), [1, 2], "{before}");
        }
    }
}
