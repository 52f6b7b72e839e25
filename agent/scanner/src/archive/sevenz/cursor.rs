//! Numbers of a 7z header, read one after another.

use crate::archive::field::{self, index};

/// What has not been read yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'h>(pub(super) &'h [u8]);

impl<'h> Cursor<'h> {
    pub(super) fn byte(&mut self) -> Option<u8> {
        self.bytes(1)?.first().copied()
    }

    pub(super) fn bytes(&mut self, count: u64) -> Option<&'h [u8]> {
        let (bytes, rest) = self.0.split_at_checked(index(count))?;
        self.0 = rest;
        Some(bytes)
    }

    /// A number of one to nine bytes: the ones that begin the first byte say how many follow it.
    pub(super) fn number(&mut self) -> Option<u64> {
        let first = self.byte()?;
        let more = first.leading_ones();
        let low = field::le(self.bytes(more.into())?, 0, usize::try_from(more).ok()?)?;
        let high = u64::from(first) & (0x7f_u64 >> more.min(7));
        // Eight more bytes leave no bit of the first one.
        Some(low | high.checked_shl(8 * more).unwrap_or(0))
    }

    /// A list of checksums, of which some may be missing.
    pub(super) fn checksums(&mut self, count: u64) -> Option<Vec<Option<u32>>> {
        let defined = self.all_or_bits(count)?;
        (0..count)
            .map(|at| {
                let is_there = defined.is_none_or(|bits| bit(bits, at));
                is_there
                    .then(|| field::le(self.bytes(4)?, 0, 4)?.try_into().ok())
                    .map_or(Some(None), |sum: Option<u32>| sum.map(Some))
            })
            .collect()
    }

    /// `count` bits, or nothing where all are set.
    fn all_or_bits(&mut self, count: u64) -> Option<Option<&'h [u8]>> {
        if self.byte()? == 0 { self.bits(count).map(Some) } else { Some(None) }
    }

    /// `count` bits, the highest of each byte first.
    pub(super) fn bits(&mut self, count: u64) -> Option<&'h [u8]> {
        self.bytes(count.div_ceil(8))
    }
}

/// One of some bits; what is not there is not set.
pub(super) fn bit(bits: &[u8], at: u64) -> bool {
    bits.get(index(at / 8)).is_some_and(|byte| byte & 0x80 >> (at % 8) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_one_to_nine_bytes() {
        for (bytes, number) in [
            (&b"\x00"[..], Some(0)),
            (b"\x7f", Some(0x7f)),
            (b"\x80\x80", Some(0x80)),
            (b"\xbf\xff", Some(0x3fff)),
            (b"\xc0\x01\x02", Some(0x0201)),
            (b"\xdf\x01\x02", Some(0x1f_0201)),
            (b"\xfe\x01\x02\x03\x04\x05\x06\x07", Some(0x07_0605_0403_0201)),
            (b"\xff\x01\x02\x03\x04\x05\x06\x07\x88", Some(0x8807_0605_0403_0201)),
            (b"\xff\x01\x02\x03\x04\x05\x06\x07", None),
            (b"", None),
        ] {
            assert_eq!(Cursor(bytes).number(), number, "{bytes:?}");
        }
        assert_eq!(Cursor(b"\x01\x01\0\0\0").checksums(1), Some(vec![Some(1)]));
        assert_eq!(Cursor(b"\x00\x40\x01\0\0\0").checksums(2), Some(vec![None, Some(1)]));
        assert_eq!(Cursor(b"\x01").checksums(u64::MAX), None);
    }
}
