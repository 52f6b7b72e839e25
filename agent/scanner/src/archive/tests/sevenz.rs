//! 7z: a writer whose every field can be made wrong, and what is particular to the format.

use tm_protocol::{report::SkipReason, task::ScanLimits};

use super::{
    formats::{bzip2, deflate},
    look, look_within, matched, matched_within,
    samples::{self, gzip, plain},
    says, skipped,
};

/// Made by 7-Zip.
pub(super) const FIXTURES: [(&str, &[u8]); 11] = [
    ("7z copy", include_bytes!("fixtures/copy.7z")),
    ("7z lzma", include_bytes!("fixtures/lzma.7z")),
    ("7z lzma2", include_bytes!("fixtures/lzma2.7z")),
    ("7z ppmd", include_bytes!("fixtures/ppmd.7z")),
    ("7z bzip2", include_bytes!("fixtures/bzip2.7z")),
    ("7z deflate", include_bytes!("fixtures/deflate.7z")),
    ("7z deflate64", include_bytes!("fixtures/deflate64.7z")),
    ("7z delta", include_bytes!("fixtures/delta.7z")),
    ("7z bcj", include_bytes!("fixtures/bcj.7z")),
    ("7z arm64", include_bytes!("fixtures/arm64.7z")),
    ("7z bcj2", include_bytes!("fixtures/bcj2.7z")),
];

const COPY: &[u8] = &[1, 0];
const DEFLATE: &[u8] = &[3, 4, 1, 8];
const BZIP2: &[u8] = &[3, 4, 2, 2];
const ZSTD: &[u8] = &[4, 4, 0xf7, 0x11, 1];

/// An archive of one folder of one coder.
#[derive(Clone)]
struct Archive<'n> {
    /// The coder as it is written.
    coder: Vec<u8>,
    packed: Vec<u8>,
    /// Names, sizes and checksums.
    files: Vec<(&'n str, u64, u32)>,
    /// What the folder is said to unpack to; what the files need if it is nothing.
    size: Option<u64>,
    /// What the packed stream is said to take.
    packed_size: Option<u64>,
    packed_at: u64,
}

impl<'n> Archive<'n> {
    fn new(coder: &[u8], packed: Vec<u8>, files: &[(&'n str, &[u8])]) -> Self {
        let files = files.iter().map(|(name, data)| (*name, length(data), crc32fast::hash(data))).collect();
        Self { coder: coder.to_vec(), packed, files, size: None, packed_size: None, packed_at: 0 }
    }

    fn header(&self) -> Vec<u8> {
        let mut out = vec![1, 4];
        out.extend(self.streams());
        // Sub-streams: how many, the sizes of all but the last, all sums.
        out.extend([8, 13]);
        out.extend(number(self.files.len() as u64));
        out.push(9);
        for (_, size, _) in self.files.iter().rev().skip(1).rev() {
            out.extend(number(*size));
        }
        out.extend([10, 1]);
        out.extend(self.files.iter().flat_map(|(.., crc)| crc.to_le_bytes()));
        out.extend([0, 0, 5]);
        out.extend(number(self.files.len() as u64));
        let mut names = vec![0];
        for (name, ..) in &self.files {
            names.extend(name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes));
        }
        out.push(17);
        out.extend(number(names.len() as u64));
        out.extend(names);
        out.extend([0, 0]);
        out
    }

    /// Packed streams and folders, without the end.
    fn streams(&self) -> Vec<u8> {
        let mut out = vec![6];
        out.extend(number(self.packed_at));
        out.extend([1, 9]);
        out.extend(number(self.packed_size.unwrap_or(length(&self.packed))));
        out.extend([0, 7, 11, 1, 0, 1]);
        out.extend(&self.coder);
        out.push(12);
        out.extend(number(self.size.unwrap_or(self.files.iter().map(|(_, size, _)| size).sum())));
        out.push(0);
        out
    }

    fn write(&self) -> Vec<u8> {
        end(&self.packed, &self.header())
    }
}

/// Puts the start in front of packed streams and a header behind them.
fn end(packed: &[u8], header: &[u8]) -> Vec<u8> {
    let mut fields = length(packed).to_le_bytes().to_vec();
    fields.extend(length(header).to_le_bytes());
    fields.extend(crc32fast::hash(header).to_le_bytes());
    let mut out = b"7z\xbc\xaf\x27\x1c\0\x04".to_vec();
    out.extend(crc32fast::hash(&fields).to_le_bytes());
    out.extend(fields);
    [&out, packed, header].concat()
}

/// Shorter forms exist for most numbers; this one is as good.
fn number(value: u64) -> Vec<u8> {
    match u8::try_from(value) {
        Ok(byte @ 0..0x80) => vec![byte],
        _ => [&[0xff], &value.to_le_bytes()[..]].concat(),
    }
}

fn length(bytes: &[u8]) -> u64 {
    bytes.len().try_into().unwrap()
}

fn whole(files: &[(&str, &[u8])]) -> Vec<u8> {
    files.iter().flat_map(|(_, data)| data.iter().copied()).collect()
}

pub(super) fn copied(files: &[(&str, &[u8])]) -> Vec<u8> {
    Archive::new(COPY, whole(files), files).write()
}

pub(super) fn deflated(files: &[(&str, &[u8])]) -> Vec<u8> {
    Archive::new(DEFLATE, deflate(&whole(files)), files).write()
}

pub(super) fn many(count: usize) -> Vec<u8> {
    copied(&vec![("x", &b"-"[..]); count])
}

#[test]
fn solid_archives_are_cut_into_their_files() {
    let gz = gzip(&plain());
    let files: [(&str, &[u8]); 4] = [("a", b"hay"), ("d/ä", &plain()), ("b.gz", &gz), ("c", b"")];
    for (coder, packed) in
        [(COPY, whole(&files)), (DEFLATE, deflate(&whole(&files))), (BZIP2, bzip2(&whole(&files)))]
    {
        let found = look(&Archive::new(coder, packed, &files).write());
        assert_eq!(
            matched_within(&found),
            ["d/ä".to_owned(), "b.gz > content".to_owned()].into(),
            "{coder:?}"
        );
        assert_eq!(skipped(&found), [], "{coder:?}");
    }
    let zstd = Archive::new(ZSTD, samples::packed(samples::ZSTD), &[("z", &plain())]);
    let found = look(&zstd.write());
    assert_eq!((matched_within(&found), skipped(&found)), (["z".to_owned()].into(), Vec::new()));
}

#[test]
fn what_is_encrypted_or_has_no_reader_is_said_of_each_file() {
    let aes: &[u8] = include_bytes!("fixtures/aes.7z");
    assert_eq!(skipped(&look(aes)), [("a/b".to_owned(), SkipReason::Encrypted)]);
    let hidden: &[u8] = include_bytes!("fixtures/aesh.7z");
    assert_eq!(skipped(&look(hidden)), [(String::new(), SkipReason::Encrypted)]);
    let odd = Archive::new(&[4, 4, 0xf7, 0x11, 2], b"brotli".to_vec(), &[("a", b"hay"), ("b", b"hay")]);
    let said = ["a", "b"].map(|name| (name.to_owned(), SkipReason::Unsupported));
    assert_eq!(skipped(&look(&odd.write())), said);
}

#[test]
fn an_archive_that_contradicts_itself_is_read_and_said() {
    let good = Archive::new(COPY, plain(), &[("x", &plain())]);
    let bytes = good.write();
    assert_eq!(skipped(&look(&bytes)), []);
    let gz = gzip(&plain());
    // Sums: of the start, of the header, of the file.
    let mut wrong_sum = good.clone();
    wrong_sum.files[0].2 ^= 1;
    let changed = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        bytes
    };
    for bytes in [changed(8), changed(28), wrong_sum.write()] {
        let found = look(&bytes);
        assert!(matched(&found).contains("x"), "{found:?}");
        says(&found, SkipReason::Malformed);
    }
    // Bytes behind the end, and between the streams and the header.
    let found = look(&[&bytes, &*gz].concat());
    assert!(matched(&found).contains("appended > content"), "{found:?}");
    says(&found, SkipReason::Malformed);
    let found = look(&end(&[plain(), gz.clone()].concat(), &good.header()));
    assert!(matched(&found).contains("appended > content"), "{found:?}");
    says(&found, SkipReason::Malformed);
    let zeros = look(&[&bytes, &[0; 512][..]].concat());
    assert_eq!(skipped(&zeros), []);
    // Streams within the start or the header, and lying sizes.
    for wrong in [
        Archive { packed_at: u64::MAX - 31, ..good.clone() },
        Archive { packed_at: 20, ..good.clone() },
        Archive { packed_size: Some(1 << 40), ..good.clone() },
        Archive { packed_size: Some(3), ..good.clone() },
        Archive { size: Some(1 << 60), ..good.clone() },
        Archive { size: Some(plain().len() as u64 - 1), ..good.clone() },
        Archive { packed: [plain(), plain()].concat(), ..good.clone() },
        Archive { files: Vec::new(), ..good.clone() },
    ] {
        let found = look(&wrong.write());
        says(&found, SkipReason::Malformed);
    }
    // A header that is not there, or beyond everything.
    for (at, value) in [(12, u64::MAX), (12, 1 << 40), (20, u64::MAX), (20, 1 << 40)] {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        says(&look(&bytes), SkipReason::Malformed);
    }
    // No files and no header is an archive all the same.
    assert_eq!(skipped(&look(&end(b"", b""))), []);
}

#[test]
fn packed_headers_are_read_and_do_not_go_on_for_ever() {
    let good = Archive::new(COPY, plain(), &[("x", &plain())]);
    let encode = |packed: &[u8], header: &[u8]| {
        let inner = Archive {
            packed: Vec::new(),
            packed_at: length(packed),
            packed_size: Some(length(&deflate(header))),
            size: Some(length(header)),
            ..Archive::new(DEFLATE, Vec::new(), &[])
        };
        let outer = [&[23], &*inner.streams(), &[0]].concat();
        ([packed, &deflate(header)].concat(), outer)
    };
    let (packed, outer) = encode(&plain(), &good.header());
    let found = look(&end(&packed, &outer));
    assert_eq!((matched_within(&found), skipped(&found)), (["x".to_owned()].into(), Vec::new()));
    let (mut packed, mut header) = (plain(), good.header());
    for _ in 0..9 {
        (packed, header) = encode(&packed, &header);
    }
    says(&look(&end(&packed, &header)), SkipReason::Limit);
    // A header that unpacks to very much more than a header can be.
    let (packed, outer) = encode(b"", &vec![1; 40 << 20]);
    says(&look(&end(&packed, &outer)), SkipReason::Limit);
}

#[test]
fn counts_that_nothing_bears_out_take_no_memory() {
    for header in [
        // Packed streams, folders, pieces, files: 2^56 of each.
        &[1, 4, 6, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 9][..],
        &[1, 4, 7, 11, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        &[1, 4, 7, 11, 1, 0, 1, 1, 0, 12, 1, 0, 8, 13, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 9],
        &[1, 5, 0xff, 0, 0, 0, 0, 0, 0, 0, 1, 14, 0xff, 0, 0, 0, 0, 0, 0, 0, 1],
    ] {
        let found = look(&end(b"", header));
        assert!(
            found.skips.iter().any(|skip| matches!(skip.reason, SkipReason::Limit | SkipReason::Malformed)),
            "{header:?}: {found:?}"
        );
    }
    // An input that takes its own coder's output.
    let looped = [1, 4, 6, 0, 1, 9, 1, 0, 7, 11, 1, 0, 2, 1, 0, 1, 0, 1, 0, 0, 12, 1, 1, 0, 0, 0];
    says(&look(&end(b"-", &looped)), SkipReason::Malformed);
}

#[test]
fn dictionaries_and_models_of_gigabytes_are_refused_before_they_are_taken() {
    let lzma = &[0x23, 3, 1, 1, 5, 0x5d, 0xff, 0xff, 0xff, 0xff][..];
    let lzma2 = &[0x21, 0x21, 1, 40][..];
    let ppmd = &[0x23, 3, 4, 1, 5, 6, 0, 0, 0, 0xff][..];
    let large = &[0x23, 3, 4, 1, 5, 6, 0, 0, 0, 0x10][..];
    // A chain of models, each of which would be allowed.
    let chain = |count: usize| {
        let binds: Vec<u8> =
            (1..count).flat_map(|n| [u8::try_from(n).unwrap(), u8::try_from(n - 1).unwrap()]).collect();
        let count = u8::try_from(count).unwrap();
        let sizes = number(9).repeat(usize::from(count));
        [
            &[1, 4, 6, 0, 1, 9, 64, 0, 7, 11, 1, 0, count][..],
            &large.repeat(count.into()),
            &binds,
            &[12],
            &sizes,
            &[0, 0, 0],
        ]
        .concat()
    };
    says(&look(&end(&[0; 64], &chain(3))), SkipReason::Limit);
    for coder in [lzma, lzma2, ppmd] {
        let archive = Archive { size: Some(1 << 33), ..Archive::new(coder, vec![0; 64], &[("a", b"")]) };
        says(&look(&archive.write()), SkipReason::Limit);
    }
}

#[test]
fn a_file_above_a_limit_hides_none_behind_it() {
    let limits = ScanLimits { member_bytes: 1 << 20, ..ScanLimits::default() };
    let noise: Vec<u8> = (0..3 << 20).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 23) as u8).collect();
    let files: [(&str, &[u8]); 2] = [("big", &noise), ("small", &plain())];
    for archive in [deflated(&files), super::cab::cab(&files, super::cab::MSZIP)] {
        let found = look_within(&limits, &archive);
        assert!(matched(&found).contains("small"), "{found:?}");
        assert_eq!(skipped(&found), [("big".to_owned(), SkipReason::Limit)]);
    }
}
