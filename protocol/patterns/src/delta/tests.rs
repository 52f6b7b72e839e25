//! Deltas: their size, and what becomes of those that lie.

use std::io::Write as _;

use flate2::{Compression, write::DeflateEncoder};
use proptest::prelude::*;
use sha2::Digest as _;

use super::*;
use crate::digests::List;

fn both(old: &[u8], new: &[u8]) -> Vec<u8> {
    let delta = make(old, new).unwrap();
    let made = apply(Sha256::of(old), old.to_vec(), Sha256::of(new), &delta).unwrap();
    assert!(made == new);
    delta
}

/// A digest list of so many entries, without those and with those more.
fn list(entries: u64, without: impl Fn(u64) -> bool, more: u64) -> Vec<u8> {
    let mut list = List::new();
    let digest = |n: u64| hex(&sha2::Sha256::digest(n.to_le_bytes()));
    for n in (0..entries).filter(|n| !without(*n)).chain(1 << 40..(1 << 40) + more) {
        list.feed(digest(n).as_bytes()).unwrap();
        list.feed(b"\n").unwrap();
    }
    list.finish().unwrap().0
}

fn hex(bytes: &[u8]) -> String {
    let digit = |n: u8| char::from(b"0123456789abcdef"[usize::from(n)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Rule text; the bodies of rules for which `other` holds are other ones.
fn rules(count: u64, other: impl Fn(u64) -> bool) -> Vec<u8> {
    let mut text = Vec::new();
    for n in 0..count {
        let seed = if other(n) { n + (1 << 32) } else { n };
        writeln!(text, "rule r{n} {{\n  meta:\n    author = \"somebody\"\n  strings:").unwrap();
        for s in 0..20_u64 {
            let bytes = sha2::Sha256::digest((seed * 100 + s).to_le_bytes());
            writeln!(text, "    $s{s} = {{ {} }}", hex(&bytes)).unwrap();
        }
        writeln!(text, "  condition:\n    3 of them\n}}\n").unwrap();
    }
    text
}

#[test]
fn one_percent_of_a_large_pattern_costs_little() {
    // 1,500,000 entries are 50 MB; one in a hundred is new, and one in two hundred is gone.
    let (old, new) = (list(1_500_000, |_| false, 0), list(1_500_000, |n| n % 200 == 7, 15_000));
    let delta = both(&old, &new).len();
    println!("list: {} bytes, delta {delta}, {}x", new.len(), new.len() / delta);
    assert!(new.len() > 49_000_000 && delta * 50 < new.len(), "{delta} of {}", new.len());

    // One rule in fifty is another one, all over the text.
    let (old, new) = (rules(31_000, |_| false), rules(31_000, |n| n % 50 == 3));
    let delta = both(&old, &new).len();
    println!("rules: {} bytes, delta {delta}, {}x", new.len(), new.len() / delta);
    assert!(new.len() > 49_000_000 && delta * 50 < new.len(), "{delta} of {}", new.len());
}

#[test]
fn names_may_come_and_go() {
    let text = |more: &str| {
        let mut list = List::new();
        for n in 0..2000_u32 {
            let name = hex(&n.wrapping_mul(2_654_435_761).to_be_bytes());
            let digest = hex(&sha2::Sha256::digest(n.to_le_bytes()));
            list.feed(format!("{digest},{name}\n").as_bytes()).unwrap();
        }
        list.feed(more.as_bytes()).unwrap();
        list.finish().unwrap().0
    };
    // A new name in the middle of all others changes the numbers of half of them.
    let delta = both(&text(""), &text(&format!("{},7fff\n", "ab".repeat(32))));
    assert!(delta.len() < 1000, "{}", delta.len());
}

#[test]
fn patterns_that_have_nothing_in_common_can_be_compared_all_the_same() {
    for (old, new) in [
        (&b""[..], &b"rule a { condition: true }"[..]),
        (b"rule a { condition: true }", b""),
        (b"rule a { condition: true }", b"rule a { condition: true }"),
        (&[0; 100_000], &[0; 99_999]),
        (&[b'a'; 100_000], &[b'b'; 100_000]),
    ] {
        both(old, new);
    }
    let compiled = list(100, |_| false, 0);
    assert!(make(&compiled, b"rule a { condition: true }").is_none());
    assert!(make(b"rule a { condition: true }", &compiled).is_none());
}

proptest! {
    #[test]
    fn any_two_texts_can_be_compared(
        parts in prop::collection::vec((0_usize..60, 0_usize..200), 0..40),
        bytes in prop::collection::vec(0_u8..4, 60 + 200),
    ) {
        let old = &bytes;
        let new: Vec<u8> = parts.iter().flat_map(|(at, length)| &bytes[*at..*at + *length]).copied().collect();
        both(old, &new);
        both(&new, old);
    }

    #[test]
    fn a_damaged_delta_makes_nothing_else(flips in prop::collection::vec((0_usize..10_000, 1_u8..=255), 1..4)) {
        let (old, new) = (rules(6, |_| false), rules(6, |n| n == 2));
        let mut delta = make(&old, &new).unwrap();
        for (at, flip) in flips {
            let length = delta.len();
            delta[at % length] ^= flip;
        }
        if let Ok(made) = apply(Sha256::of(&old), old, Sha256::of(&new), &delta) {
            assert!(made == new);
        }
    }
}

/// A delta from `old` to `new` that says what is given.
fn crafted(old: &[u8], new: &[u8], lengths: (u64, u64), ops: &[u8]) -> Vec<u8> {
    let mut delta = MAGIC.to_vec();
    delta.extend_from_slice(&[VERSION, 0]);
    delta.extend_from_slice(Sha256::of(old).as_bytes());
    delta.extend_from_slice(Sha256::of(new).as_bytes());
    delta.extend_from_slice(&lengths.0.to_le_bytes());
    delta.extend_from_slice(&lengths.1.to_le_bytes());
    let mut out = DeflateEncoder::new(delta, Compression::default());
    out.write_all(ops).unwrap();
    out.finish().unwrap()
}

#[test]
fn deltas_that_lie_are_refused() {
    let (old, new) = (&b"0123456789"[..], &b"01234abc"[..]);
    let right = (10, 8);
    let tried = |delta: &[u8]| apply(Sha256::of(old), old.to_vec(), Sha256::of(new), delta);
    // Five bytes of the old one from its beginning, then three new ones.
    let good = b"\0\x05\0\x03abc\0";
    assert!(tried(&crafted(old, new, right, good)).is_ok(), "the control");
    let damaged: &[((u64, u64), &[u8])] = &[
        (right, b"\0\0"),
        (right, b"\0\x00\0\x00\0\x05\0\x03abc\0"),
        (right, b"\0\x0b\0"),
        (right, b"\0\x09\0"),
        (right, b"\0\x05\x01"),
        (right, b"\0\x05\x0e"),
        (right, b"\0\x05\0\x04abcd\0"),
        (right, b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        (right, b"\0\xff\xff\xff\xff\xff\xff\xff\xff\x7f\0"),
        (right, b"\0\x05\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        (right, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        (right, b"\0\x05\0\x03abc\0more"),
        ((9, 8), good),
        ((10, u64::MAX), good),
        ((10, 257 << 20), good),
    ];
    for (lengths, ops) in damaged {
        let found = tried(&crafted(old, new, *lengths, ops));
        assert!(matches!(found, Err(InvalidDelta::Damaged(_))), "{lengths:?} {ops:?}: {found:?}");
    }
    for (lengths, ops) in [(right, &b"\0\x05\0\x03ab"[..]), ((10, 9), good), ((10, 255 << 20), good)] {
        let found = tried(&crafted(old, new, lengths, ops));
        assert!(matches!(found, Err(InvalidDelta::Read(_))), "{ops:?}: {found:?}");
    }
    let other = tried(&crafted(old, new, right, b"\0\x05\0\x03abd\0"));
    assert!(matches!(other, Err(InvalidDelta::Digest)), "{other:?}");
    let swapped = tried(&crafted(new, old, right, good));
    assert!(matches!(swapped, Err(InvalidDelta::Other)), "{swapped:?}");
    let whole = crafted(old, new, right, good);
    for end in 0..whole.len() {
        assert!(tried(&whole[..end]).is_err(), "cut at {end}");
    }
    // What would be a gigabyte of zeros is no more than was announced.
    let bomb = crafted(old, new, right, &[0; 1 << 20]);
    assert!(matches!(tried(&bomb), Err(InvalidDelta::Damaged(_))));
    // The list of another kind: rows where there are bytes.
    let mut rows = crafted(old, new, right, good);
    rows[13] = 1;
    assert!(matches!(tried(&rows), Err(InvalidDelta::Damaged(_))));
}
