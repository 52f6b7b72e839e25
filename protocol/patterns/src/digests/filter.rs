//! The filter in front of a table: most digests that are not in it are told by three bytes of it.
//!
//! A key is eight bytes of a digest and a salt that depends on all of the table, so that nobody can choose digests
//! for which no filter can be built.
//!
//! **Invariant:** asking a [`Shape`] that [`Shape::is_sound`] never reaches beyond its bytes.

use sha2::{Digest as _, Sha256};
use xorf::{BinaryFuse8, BinaryFuse8Ref, Descriptor, DmaSerializable as _, Filter as _, FilterRef as _};

/// Tables that are smaller are only searched.
const FEWEST: usize = 64;

/// What is known of a filter beside its bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) salt: u64,
    pub(super) seed: u64,
    pub(super) segment: u32,
    pub(super) segments: u32,
    /// 0: there is none.
    pub(super) length: usize,
}

impl Shape {
    /// Whether all places that a key can stand for are within the filter.
    pub(super) fn is_sound(&self) -> bool {
        if self.length == 0 {
            return self.segment == 0 && self.segments == 0;
        }
        let reach = u64::from(self.segments) + 2 * u64::from(self.segment);
        self.segment.is_power_of_two()
            && self.segments > 0
            && self.segments.is_multiple_of(self.segment)
            && u64::try_from(self.length) == Ok(reach)
            && u32::try_from(reach).is_ok()
    }

    /// Whether `digest` may be in the table; `bytes` are the filter's.
    pub(super) fn may_hold(&self, bytes: &[u8], digest: &[u8]) -> bool {
        if self.length == 0 || bytes.len() != self.length || !self.is_sound() {
            return true;
        }
        let mut form = [0; Descriptor::DMA_LEN];
        form[..8].copy_from_slice(&self.seed.to_le_bytes());
        form[8..12].copy_from_slice(&self.segment.to_le_bytes());
        form[12..16].copy_from_slice(&(self.segment - 1).to_le_bytes());
        form[16..20].copy_from_slice(&self.segments.to_le_bytes());
        BinaryFuse8Ref::from_dma(&form, bytes).contains(&key(self.salt, digest))
    }
}

/// Builds the filter for digests of `N` bytes each, sorted, and its bytes.
pub(super) fn build<const N: usize>(digests: &[[u8; N]]) -> (Shape, Vec<u8>) {
    let none = (Shape::default(), Vec::new());
    if digests.len() < FEWEST {
        return none;
    }
    let mut hash = Sha256::new();
    digests.iter().for_each(|digest| hash.update(digest));
    let salt = first_eight(&hash.finalize());
    let mut keys: Vec<u64> = digests.iter().map(|digest| key(salt, digest)).collect();
    keys.sort_unstable();
    keys.dedup();
    let Ok(filter) = BinaryFuse8::try_from(&keys) else { return none };
    let Descriptor { seed, segment_length, segment_count_length, .. } = filter.descriptor;
    let bytes = filter.dma_fingerprints().to_vec();
    let shape =
        Shape { salt, seed, segment: segment_length, segments: segment_count_length, length: bytes.len() };
    // Without a filter that can be asked the table is searched each time.
    if shape.is_sound() { (shape, bytes) } else { none }
}

fn key(salt: u64, digest: &[u8]) -> u64 {
    first_eight(digest) ^ salt
}

fn first_eight(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |first| u64::from_le_bytes(*first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_it_is_found_and_most_else_is_not() {
        for count in [0u32, 1, 63, 64, 65, 1000, 20_000] {
            let digests: Vec<[u8; 32]> = (0..count).map(|n| Sha256::digest(n.to_le_bytes()).into()).collect();
            let (shape, bytes) = build(&digests);
            assert_eq!(shape.length > 0, count >= 64, "{count}");
            assert!(digests.iter().all(|digest| shape.may_hold(&bytes, digest)), "{count}");
            let others = (0..10_000u32).filter(|n| {
                let other: [u8; 32] = Sha256::digest((n + 1_000_000).to_le_bytes()).into();
                shape.may_hold(&bytes, &other)
            });
            assert!(others.count() < 100 || count < 64, "{count}");
        }
    }

    #[test]
    fn digests_that_begin_alike_are_borne() {
        let digests: Vec<[u8; 16]> = (0..300u128).map(u128::to_be_bytes).collect();
        let (shape, bytes) = build(&digests);
        assert!(digests.iter().all(|digest| shape.may_hold(&bytes, digest)));
    }

    #[test]
    fn a_shape_that_reaches_beyond_its_bytes_is_not_sound() {
        let sound = Shape { salt: 1, seed: 2, segment: 8, segments: 16, length: 32 };
        assert!(sound.is_sound());
        for shape in [
            Shape { length: 31, ..sound },
            Shape { segment: 7, length: 30, ..sound },
            Shape { segments: 12, length: 28, ..sound },
            Shape { segment: 0, length: 16, ..sound },
            Shape { segments: 0, length: 16, ..sound },
            Shape { segment: 1 << 31, segments: 1 << 31, length: 3 << 31, ..sound },
            Shape { length: 0, ..sound },
        ] {
            assert!(!shape.is_sound(), "{shape:?}");
        }
        assert!(sound.may_hold(&[1; 31], &[0; 16]), "it is asked with its own bytes only");
    }
}
