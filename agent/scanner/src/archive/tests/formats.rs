//! One table of the formats. What stands in it goes through every test of good, cut and changed archives, and
//! what can be made in any size through those of bombs and of very many members.

use std::io::Write as _;

use super::{
    cab::{self, cab},
    samples::{
        BZIP2, DEFLATE, Entry, LZMA, XZ, ZSTD, ar, cpio_binary, cpio_new, cpio_portable, gzip, packed, plain,
        rpm, tar, zip, zip_lzma,
    },
    sevenz,
};

/// A good archive whose only marker is in `member`.
pub(super) struct Format {
    pub(super) kind: &'static str,
    pub(super) bytes: Vec<u8>,
    pub(super) member: &'static str,
}

pub(super) fn good() -> Vec<Format> {
    let zipped = |method, data: &[u8]| zip(&[Entry::of_plain("a/b", method, data)]);
    let inner = gzip(&plain());
    let files: &[(&str, &[u8])] = &[("./first", b"hay"), ("usr/bin/x", &inner)];
    let lzma_in_zip = Entry { flags: 2, ..Entry::of_plain("a/b", 14, &zip_lzma()) };
    let mut good = vec![
        ("zip stored", zipped(0, &plain()), "a/b"),
        ("zip deflate", zipped(8, &packed(DEFLATE)), "a/b"),
        ("zip deflate64", zipped(9, &packed(DEFLATE)), "a/b"),
        ("zip bzip2", zipped(12, &packed(BZIP2)), "a/b"),
        ("zip zstd", zipped(93, &packed(ZSTD)), "a/b"),
        ("zip xz", zipped(95, &packed(XZ)), "a/b"),
        ("zip lzma", zip(&[lzma_in_zip]), "a/b"),
        ("gzip", inner.clone(), "content"),
        ("bzip2", packed(BZIP2), "content"),
        ("xz", packed(XZ), "content"),
        ("lzma", packed(LZMA), "content"),
        ("zstd", packed(ZSTD), "content"),
        ("tar", tar("x.gz", &inner, |_| ()), "x.gz > content"),
        ("ar", ar(&[("control/", b"hay"), ("x/", &inner)]), "x > content"),
        ("cpio new", cpio_new(files), "usr/bin/x > content"),
        ("cpio portable", cpio_portable(files), "usr/bin/x > content"),
        ("cpio binary", cpio_binary(files, u16::to_le_bytes), "usr/bin/x > content"),
        ("cpio binary, swapped", cpio_binary(files, u16::to_be_bytes), "usr/bin/x > content"),
        ("rpm", rpm(&gzip(&cpio_new(files))), "payload > content > usr/bin/x > content"),
        ("cab, own", cab(&[("x", &inner)], cab::STORED), "x > content"),
        ("cab, own, mszip", cab(&[("first", b"hay"), ("x", &inner)], cab::MSZIP), "x > content"),
        ("7z, own", sevenz::copied(&[("first", b"hay"), ("x", &inner)]), "x > content"),
    ];
    good.extend(cab::FIXTURES.iter().map(|(kind, bytes, member)| (*kind, bytes.to_vec(), *member)));
    good.extend(sevenz::FIXTURES.iter().map(|(kind, bytes)| (*kind, bytes.to_vec(), "a/b")));
    good.into_iter().map(|(kind, bytes, member)| Format { kind, bytes, member }).collect()
}

/// A format that can be made in any size.
pub(super) struct Maker {
    pub(super) kind: &'static str,
    /// One member with this content.
    pub(super) wrap: fn(&[u8]) -> Vec<u8>,
    /// That many members, each a byte long, if the format has names for them.
    pub(super) many: Option<fn(usize) -> Vec<u8>>,
    /// Zeros take much less room in it.
    pub(super) packs: bool,
}

pub(super) fn makers() -> Vec<Maker> {
    fn maker(
        kind: &'static str,
        wrap: fn(&[u8]) -> Vec<u8>,
        many: Option<fn(usize) -> Vec<u8>>,
        packs: bool,
    ) -> Maker {
        Maker { kind, wrap, many, packs }
    }
    vec![
        maker("gzip", gzip, None, true),
        maker("bzip2", bzip2, None, true),
        maker("zstd", zstd, None, true),
        maker("zip", |data| zip(&[deflated("x", data)]), Some(many_zipped), true),
        maker("tar", |data| tar("x", data, |_| ()), Some(many_tarred), false),
        maker("ar", |data| ar(&[("x/", data)]), Some(|count| ar(&vec![("x/", &b"-"[..]); count])), false),
        maker(
            "cpio",
            |data| cpio_new(&[("x", data)]),
            Some(|count| cpio_new(&vec![("x", &b"-"[..]); count])),
            false,
        ),
        maker("rpm", |data| rpm(&gzip(&cpio_new(&[("x", data)]))), None, true),
        maker(
            "cab",
            |data| cab(&[("x", data)], cab::MSZIP),
            // The format has 16 bits for their number.
            Some(|count| cab(&vec![("x", &b"-"[..]); count.min(65_535)], cab::MSZIP)),
            true,
        ),
        maker("7z", |data| sevenz::deflated(&[("x", data)]), Some(sevenz::many), true),
    ]
}

fn many_zipped(count: usize) -> Vec<u8> {
    let entries: Vec<Entry> = (0..count).map(|n| Entry::of(&format!("{n:06}"), 0, b"-", b"-")).collect();
    zip(&entries)
}

fn many_tarred(count: usize) -> Vec<u8> {
    let one = tar("x", b"-", |_| ());
    let mut all = one.get(..1024).unwrap().repeat(count);
    all.extend([0; 1024]);
    all
}

fn deflated(name: &str, data: &[u8]) -> Entry {
    Entry::of(name, 8, &deflate(data), data)
}

pub(super) fn deflate(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

pub(super) fn bzip2(data: &[u8]) -> Vec<u8> {
    let mut out = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest)
}
