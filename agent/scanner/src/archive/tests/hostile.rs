//! What is made to be hard to read, in every format of the table: cut, changed, endless, huge, many, lying.

use std::time::Duration;

use tm_protocol::{report::SkipReason, task::ScanLimits};

use super::{
    cpu, engine,
    formats::{Format, Maker, good, makers},
    look, matched_within,
    samples::{self, Entry, end_zip, gzip, plain, zip},
    says,
};
use crate::{archive::kind, item::Findings, judge::Judge};

/// A gzip file that holds itself (after R. Cox, "Zip Files All The Way Down").
const GZIP_QUINE: &str = concat!(
    "1f8b0800000000000003000f00f0ff1f8b0800000000000003000f00f0ff8272615c00000500faff8272615c00000500",
    "faff000500faff001400ebff8272615c00000500faff000500faff001400ebff428821c400001400ebff428821c40000",
    "1400ebff428821c400001400ebff428821c400001400ebff428821c400000000ffff000000ffff000d00f2ff428821c4",
    "00000000ffff000000ffff000d00f2ff020c8503005ea11b9dba000000020c8503005ea11b9dba000000",
);
/// The same of zip.
const ZIP_QUINE: &str = concat!(
    "504b0304140000000800000021001af4ab2dfc000000600100000100000072002400dbff504b03041400000008000000",
    "21001af4ab2dfc000000600100000100000072002400dbff0288183500000500faff0288183500000500faff000500fa",
    "ff001400ebff0288183500000500faff000500faff001400ebff428821c400001400ebff428821c400001400ebff4288",
    "21c400001400ebff428821c400001400ebff428821c400000000ffff000000ffff004b00b4ff428821c400000000ffff",
    "000000ffff004b00b4ff028c8a460100504b01021400140000000800000021001af4ab2dfc0000006001000001000000",
    "000000000000000000000000000072504b050600000000010001002f0000001b0100000000028c8a460100504b010214",
    "00140000000800000021001af4ab2dfc0000006001000001000000000000000000000000000000000072504b05060000",
    "0000010001002f0000001b0100000000",
);

/// No file may take longer, in CPU time.
const LONGEST: Duration = Duration::from_secs(20);
/// Changed archives of each format.
const CHANGES: u64 = 400;

fn looked(engine: &mut Judge, bytes: &[u8]) -> Findings {
    let begun = cpu();
    let found = super::super::look(engine, &ScanLimits::default(), bytes);
    assert!(cpu() - begun < LONGEST, "{:?}", cpu() - begun);
    assert!(found.skips.len() + found.matches.len() < 50_000);
    found
}

/// The marker was found, or it is said that something was not looked at.
fn is_silent(found: &Findings) -> bool {
    found.matches.is_empty() && found.skips.is_empty()
}

/// Whether any program would still look into what the good archive was, down to the marker.
fn is_still_one(good: &Format, bytes: &[u8]) -> bool {
    let kinds =
        |bytes: &[u8]| kind::containers(bytes).into_iter().map(|found| found.kind).collect::<Vec<_>>();
    let magic: &[u8] = b"\x1f\x8b\x08";
    // A member that does not begin as a gzip file any longer is none.
    let member = memchr::memmem::find(&good.bytes, magic);
    let begins = |at| bytes.get(at..).is_some_and(|rest| rest.starts_with(magic));
    kinds(bytes) == kinds(&good.bytes) && member.is_none_or(begins)
}

#[test]
fn an_archive_that_is_cut_anywhere_is_never_clean() {
    let mut engine = engine();
    for format in good() {
        for end in 0..format.bytes.len() {
            let bytes = &format.bytes[..end];
            let found = looked(&mut engine, bytes);
            // LZMA alone tells neither its length nor a sum, and what stands behind the end of a tar, of a cpio
            // archive or of the last member of an ar means nothing.
            let told = format.kind != "lzma" && is_still_one(&format, bytes);
            assert!(!told || !is_silent(&found), "{} cut at {end}", format.kind);
        }
    }
}

#[test]
fn an_archive_that_is_changed_anywhere_is_never_clean() {
    let mut engine = engine();
    for (format, seed) in good().iter().zip(1..) {
        let mut random = Random(seed);
        let mut still = 0;
        for number in 0..CHANGES {
            let bytes = random.change(&format.bytes);
            let found = looked(&mut engine, &bytes);
            let told = format.kind != "lzma" && is_still_one(format, &bytes);
            still += u64::from(told);
            assert!(
                !told || !is_silent(&found),
                "{} changed, {number}: {}",
                format.kind,
                differences(&format.bytes, &bytes)
            );
        }
        assert!(still > CHANGES / 20 || format.kind == "lzma", "{}: {still}", format.kind);
    }
}

fn differences(good: &[u8], bytes: &[u8]) -> String {
    let changed = good.iter().zip(bytes).enumerate().filter(|(_, (good, byte))| good != byte);
    let list: Vec<String> =
        changed.take(40).map(|(at, (good, byte))| format!("{at}: {good:02x} {byte:02x}")).collect();
    format!("{} bytes for {}, {}", bytes.len(), good.len(), list.join(", "))
}

/// Changes that are the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % below.max(1)
    }

    fn byte(&mut self) -> u8 {
        u8::try_from(self.next(256)).unwrap()
    }

    /// One to four changes, each of a bit, a byte, a number, or a range that is lost, doubled or moved.
    fn change(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.next(4) {
            let at = self.next(bytes.len());
            let end = (at + 1 + self.next(16)).min(bytes.len());
            match self.next(8) {
                0 | 1 => bytes[at] ^= 1 << self.next(8),
                2 | 3 => bytes[at] = self.byte(),
                4 => bytes[at..end].fill(0xff),
                5 => drop(bytes.drain(at..end)),
                6 => {
                    let piece = bytes[at..end].to_vec();
                    let to = self.next(bytes.len());
                    bytes.splice(to..to, piece);
                }
                _ => {
                    for place in &mut bytes[at..end] {
                        *place = 0;
                    }
                }
            }
            if bytes.is_empty() {
                return bytes;
            }
        }
        bytes
    }
}

#[test]
fn what_holds_itself_ends_by_depth() {
    for quine in [GZIP_QUINE, ZIP_QUINE] {
        let bytes = samples::packed(quine);
        let found = look(&bytes);
        says(&found, SkipReason::Limit);
        let depth = usize::try_from(ScanLimits::default().depth).unwrap();
        assert!(found.skips.iter().all(|skip| skip.member.len() <= depth), "{found:?}");
        // It does hold itself: with one more member around it, it goes as deep.
        let within = look(&samples::tar("quine", &bytes, |_| ()));
        assert_eq!(within.skips.iter().map(|skip| skip.member.len()).max(), Some(depth));
    }
}

#[test]
fn bombs_of_every_format_are_limited() {
    let mut engine = engine();
    let zeros = vec![0; 40 << 20];
    let packed = gzip(&zeros);
    for Maker { kind, wrap, packs, .. } in makers() {
        // One layer that unpacks to very much.
        let flat = if packs { wrap(&zeros) } else { wrap(&packed) };
        // The blocks of a cabinet do not pack better than 1 : 500.
        let limits = ScanLimits { ratio: 100, ..ScanLimits::default() };
        let found = super::super::look(&mut engine, &limits, &flat);
        assert!(found.skips.iter().any(|skip| skip.reason == SkipReason::Limit), "{kind}: {found:?}");
        // Layers that multiply, and layers without end.
        let mut nested = flat;
        let mut deep = plain();
        for _ in 0..12 {
            nested = wrap(&nested);
            deep = wrap(&deep);
        }
        for bytes in [nested, deep] {
            let found = looked(&mut engine, &bytes);
            assert!(found.skips.iter().any(|skip| skip.reason == SkipReason::Limit), "{kind}: {found:?}");
        }
    }
}

#[test]
fn two_hundred_thousand_members_of_every_format_take_seconds_and_are_said() {
    let mut engine = engine();
    for (kind, many) in makers().into_iter().filter_map(|maker| Some((maker.kind, maker.many?))) {
        let bytes = many(200_000);
        let found = looked(&mut engine, &bytes);
        assert!(found.skips.iter().any(|skip| skip.reason == SkipReason::Limit), "{kind}: {:?}", found.skips);
        // Where each may be read, each is.
        let limits = ScanLimits { members: 1_000_000, ..ScanLimits::default() };
        let begun = cpu();
        let found = super::super::look(&mut engine, &limits, &bytes);
        assert!(cpu() - begun < LONGEST, "{kind}: {:?}", cpu() - begun);
        assert!(
            found.skips.iter().all(|skip| skip.member.is_empty() && skip.reason == SkipReason::Limit),
            "{kind}: {:?}",
            found.skips.first()
        );
    }
}

#[test]
fn members_of_every_format_that_are_one_too_many_are_told_and_those_before_found() {
    let mut engine = engine();
    let limits = ScanLimits { members: 3, ..ScanLimits::default() };
    for (kind, many) in makers().into_iter().filter_map(|maker| Some((maker.kind, maker.many?))) {
        for (count, is_whole) in [(3, true), (4, false)] {
            let found = super::super::look(&mut engine, &limits, &many(count));
            assert_eq!(found.skips.is_empty(), is_whole, "{kind} of {count}: {found:?}");
        }
    }
}

/// The numbers of an entry in 64 bits, and what stands for them in 32.
fn zip64(size: u64, packed: u64, at: u64, count: u64) -> Vec<u8> {
    let entry = Entry::of("wide", 0, &plain(), &plain());
    let extra = |numbers: &[u64]| {
        let content: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        [&[1, 0][..], &u16::try_from(content.len()).unwrap().to_le_bytes(), &content].concat()
    };
    let widened = |header: Vec<u8>, sizes_at: usize, extra: &[u8]| {
        let mut header = header;
        header[sizes_at..sizes_at + 8].fill(0xff);
        let length_at = sizes_at + 10;
        header[length_at..length_at + 2].copy_from_slice(&u16::try_from(extra.len()).unwrap().to_le_bytes());
        header
    };
    let local_extra = extra(&[size, packed]);
    let local = widened(entry.local(), 18, &local_extra);
    let (local, data) = local.split_at(local.len() - plain().len());
    let mut body = [local, &local_extra, data].concat();
    let central_extra = extra(&[size, packed, at]);
    let mut central = widened(entry.central(0), 20, &central_extra);
    central[42..46].fill(0xff);
    let directory = [&central[..], &central_extra].concat();
    let directory_at = body.len();
    body.extend(&directory);
    let record_at = body.len();
    body.extend(b"PK\x06\x06\x2c\0\0\0\0\0\0\0\x2d\0\x2d\0\0\0\0\0\0\0\0\0");
    for number in [count, count, directory.len() as u64, directory_at as u64] {
        body.extend(number.to_le_bytes());
    }
    body.extend(b"PK\x06\x07\0\0\0\0");
    body.extend((record_at as u64).to_le_bytes());
    body.extend([1, 0, 0, 0]);
    let mut bytes = end_zip(body, &[], 0xffff);
    let end = bytes.len() - 22;
    bytes[end + 12..end + 20].fill(0xff);
    bytes
}

#[test]
fn wide_zips_are_read_and_their_lies_said() {
    let size = plain().len() as u64;
    let good = look(&zip64(size, size, 0, 1));
    assert_eq!((matched_within(&good), good.skips), (["wide".to_owned()].into(), Vec::new()));
    for (size, packed, at, count) in [
        (u64::MAX, size, 0, 1),
        (size, u64::MAX, 0, 1),
        (1 << 40, 1 << 40, 0, 1),
        (size, size, u64::MAX, 1),
        (size, size, 1 << 40, 1),
        (size, size, 0, u64::MAX),
        (size, size, 0, 0),
        (0, 0, 0, 1),
    ] {
        let found = look(&zip64(size, packed, at, count));
        says(&found, SkipReason::Malformed);
    }
}

#[test]
fn sizes_that_lie_are_said() {
    let data = gzip(&plain());
    let hay = Entry::of("x", 8, &super::formats::deflate(&plain()), &plain());
    for size in [0, 1, 71, 73, u32::MAX - 1] {
        says(&look(&zip(&[Entry { size, ..hay.clone() }])), SkipReason::Malformed);
    }
    // gzip tells its size at the end.
    let mut lying = data.clone();
    let at = lying.len() - 4;
    lying[at..].copy_from_slice(&7_u32.to_le_bytes());
    says(&look(&lying), SkipReason::Malformed);
    for (good, field, lie) in [
        (samples::ar(&[("x/", &data)]), 8 + 48..8 + 58, &b"9999999999"[..]),
        (samples::cpio_new(&[("x", &data)]), 54..62, b"FFFFFFFF"),
        (samples::cpio_portable(&[("x", &data)]), 65..76, b"77777777777"),
        (super::cab::cab(&[("x", &data)], super::cab::MSZIP), 52..56, &[0xff; 4]),
    ] {
        let mut lying = good.clone();
        lying[field].copy_from_slice(lie);
        let found = look(&lying);
        says(&found, SkipReason::Malformed);
    }
}

#[test]
fn a_package_with_an_lzma_payload_is_looked_into() {
    let cpio = samples::cpio_new(&[("usr/bin/x", &gzip(&plain()))]);
    let good = look(&samples::rpm_of(b"lzma", &samples::lzma_literal(&cpio)));
    assert_eq!(
        (matched_within(&good), good.skips),
        (["payload > usr/bin/x > content".to_owned()].into(), Vec::new())
    );
    // What no reader can tell is said.
    says(&look(&samples::rpm_of(b"unknown", b"whatever it is")), SkipReason::Unsupported);
    says(&look(&samples::rpm_of(b"lzma", b"\x5d\xff\xff\xff\xff and no more")), SkipReason::Limit);
}
