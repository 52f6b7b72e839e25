//! Numbers and pieces of hostile bytes. Nothing here can run past an end; what is not there is `None`.

/// An unsigned number of `width` (at most 8) bytes at `at`, the lowest byte first.
pub(super) fn le(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(width)?)?;
    Some(field.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// The same, the highest byte first.
pub(super) fn be(bytes: &[u8], at: usize, width: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(width)?)?;
    Some(field.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// A number written in digits of `radix`, with blanks or zero bytes around it. An empty field is 0; anything
/// else that is no number, or is above 64 bits, is `None`.
pub(super) fn digits(field: &[u8], radix: u32) -> Option<u64> {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    let text = field.get(..end)?.trim_ascii();
    text.iter().try_fold(0u64, |number, byte| {
        let digit = char::from(*byte).to_digit(radix)?;
        number.checked_mul(u64::from(radix))?.checked_add(u64::from(digit))
    })
}

/// As an index; a number that no slice can be indexed by becomes the largest one.
pub(super) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// `length` bytes at `at`.
pub(super) fn piece(bytes: &[u8], at: u64, length: u64) -> Option<&[u8]> {
    bytes.get(index(at)..index(at.checked_add(length)?))
}

/// What there is of `length` bytes at `at`, and whether that is all of them.
pub(super) fn part(bytes: &[u8], at: u64, length: u64) -> (&[u8], bool) {
    let rest = bytes.get(index(at)..).unwrap_or_default();
    match rest.get(..index(length)) {
        Some(piece) => (piece, true),
        None => (rest, false),
    }
}

/// The length of a slice.
pub(super) fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// `bytes` up to the first zero byte.
pub(super) fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// `bytes` from the first byte that is not zero.
pub(super) fn after_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
    bytes.get(zeros..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_or_missing_and_never_wrong() {
        assert_eq!(le(b"\x01\x02\x03", 1, 2), Some(0x302));
        assert_eq!(be(b"\x01\x02\x03", 1, 2), Some(0x203));
        assert_eq!(le(b"\x01", 0, 2), None);
        assert_eq!(le(b"\x01", usize::MAX, 2), None);
        for (field, radix, number) in [
            (&b"0000644\0"[..], 8, Some(0o644)),
            (b"  12 ", 10, Some(12)),
            (b"", 8, Some(0)),
            (b"\0\0", 8, Some(0)),
            (b"9", 8, None),
            (b"-1", 10, None),
            (b"1 2", 10, None),
            (b"ffFF", 16, Some(0xffff)),
            (b"99999999999999999999", 10, None),
        ] {
            assert_eq!(digits(field, radix), number, "{field:?}");
        }
        assert_eq!(piece(b"abc", 1, 2), Some(&b"bc"[..]));
        assert_eq!(piece(b"abc", 1, 3), None);
        assert_eq!(piece(b"abc", u64::MAX, 2), None);
        assert_eq!(part(b"abc", 1, u64::MAX), (&b"bc"[..], false));
        assert_eq!(part(b"abc", 9, 1), (&b""[..], false));
    }
}
