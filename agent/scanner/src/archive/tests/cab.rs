//! Cabinets: a writer whose every field can be made wrong, and what is particular to them.

use tm_protocol::report::SkipReason;

use super::{formats::deflate, look, matched, matched_within, samples, says, skipped};

pub(super) const STORED: u16 = 0;
pub(super) const MSZIP: u16 = 1;

/// Made by gcab.
pub(super) const FIXTURES: [(&str, &[u8], &str); 2] = [
    ("cab stored", include_bytes!("fixtures/stored.cab"), "b"),
    ("cab mszip", include_bytes!("fixtures/mszip.cab"), "a\\b"),
];

/// A folder as it is written.
struct Folder {
    method: u16,
    /// What each block unpacks to, in bytes, and the block.
    blocks: Vec<(usize, Vec<u8>)>,
}

/// A file as it is written: name, folder, offset and size.
type File<'n> = (&'n str, u16, usize, usize);

/// A cabinet of one folder.
pub(super) fn cab(files: &[(&str, &[u8])], method: u16) -> Vec<u8> {
    let whole: Vec<u8> = files.iter().flat_map(|(_, data)| data.iter().copied()).collect();
    let mut at = 0;
    let files: Vec<File<'_>> = files
        .iter()
        .map(|(name, data)| {
            at += data.len();
            (*name, 0, at - data.len(), data.len())
        })
        .collect();
    write(&files, &[folder(&whole, method)])
}

fn folder(whole: &[u8], method: u16) -> Folder {
    let block = |data: &[u8]| match method {
        MSZIP => [b"CK", &*deflate(data)].concat(),
        _ => data.to_vec(),
    };
    Folder { method, blocks: whole.chunks(32 << 10).map(|data| (data.len(), block(data))).collect() }
}

fn write(files: &[File<'_>], folders: &[Folder]) -> Vec<u8> {
    let names: usize = files.iter().map(|(name, ..)| 17 + name.len()).sum();
    let files_at = 36 + 8 * folders.len();
    let (mut heads, mut data) = (Vec::new(), Vec::new());
    for folder in folders {
        heads.extend(long(files_at + names + data.len()));
        heads.extend(short(folder.blocks.len()));
        heads.extend(folder.method.to_le_bytes());
        for (unpacked, block) in &folder.blocks {
            let fields = [short(block.len()), short(*unpacked)].concat();
            data.extend((sum(&fields) ^ sum(block)).to_le_bytes());
            data.extend(fields);
            data.extend(block);
        }
    }
    let mut out = b"MSCF\0\0\0\0".to_vec();
    for number in [files_at + names + data.len(), 0, files_at, 0] {
        out.extend(long(number));
    }
    out.extend([3, 1]);
    out.extend([short(folders.len()), short(files.len())].concat());
    out.extend([0; 6]);
    out.extend(heads);
    for (name, folder, offset, size) in files {
        out.extend([long(*size), long(*offset)].concat());
        out.extend(folder.to_le_bytes());
        out.extend([0; 6]);
        out.extend(name.as_bytes());
        out.push(0);
    }
    [out, data].concat()
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(4).fold(0, |sum, word| {
        sum ^ match *word {
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            ref rest => rest.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)),
        }
    })
}

fn long(number: usize) -> Vec<u8> {
    u32::try_from(number).unwrap().to_le_bytes().to_vec()
}

fn short(number: usize) -> Vec<u8> {
    u16::try_from(number).unwrap().to_le_bytes().to_vec()
}

#[test]
fn blocks_refer_back_to_the_blocks_before_them() {
    // The second block is a match of the whole first one, as no other compressor than MSZIP writes it.
    let first: Vec<u8> = (0..1 << 15).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut window = flate2::Compress::new(flate2::Compression::best(), false);
    window.set_dictionary(&first).unwrap();
    let mut again = Vec::with_capacity(1 << 16);
    let second = [&first[..32_000], b"needle-47 behind it"].concat();
    window.compress_vec(&second, &mut again, flate2::FlushCompress::Finish).unwrap();
    assert!(again.len() < 2000, "{}", again.len());
    let blocks =
        vec![(first.len(), [b"CK", &*deflate(&first)].concat()), (second.len(), [b"CK", &*again].concat())];
    let files = [("a", 0, 0, first.len()), ("b", 0, first.len(), second.len())];
    let found = look(&write(&files, &[Folder { method: MSZIP, blocks }]));
    assert_eq!((matched_within(&found), skipped(&found)), (["b".to_owned()].into(), Vec::new()));
}

#[test]
fn lzx_is_read_and_quantum_is_said() {
    // `test_files/cabd` of libmspack has one like it: an LZX block of stored bytes, two files.
    let text = b"hay needle-47 hay\r\nhay\r\n\n";
    let mut block = vec![0, 0x30];
    // Three bits of the kind behind the bit of translated calls, 24 bits of the size, and then whole words.
    let size = u32::try_from(text.len()).unwrap();
    let bits = 0b0011 << 28 | size << 4;
    block.clear();
    for word in [bits >> 16, bits & 0xffff] {
        block.extend(u16::try_from(word).unwrap().to_le_bytes());
    }
    block.extend([1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    block.extend(text);
    let files = [("a", 0, 0, 19), ("b", 0, 19, text.len() - 19)];
    let found = look(&write(&files, &[Folder { method: 0x0f03, blocks: vec![(text.len(), block.clone())] }]));
    assert_eq!((matched_within(&found), skipped(&found)), (["a".to_owned()].into(), Vec::new()));
    let quantum = Folder { method: 0x0602, blocks: vec![(text.len(), block)] };
    let found = look(&write(&files, &[quantum]));
    let said = ["a", "b"].map(|name| (name.to_owned(), SkipReason::Unsupported));
    assert_eq!(skipped(&found), said);
}

/// Bits of 16-bit numbers, the lower byte first, the highest bit first.
#[derive(Default)]
struct Bits(Vec<bool>);

impl Bits {
    fn put(&mut self, value: u32, count: u32) {
        self.0.extend((0..count).rev().map(|at| value >> at & 1 == 1));
    }

    /// Lengths of a tree's codes, all of them 0 before and `length` now.
    fn lengths(&mut self, length: u32, count: usize) {
        // A tree with one code, of one bit: the change from 0 to `length`.
        let change = (17 - length) % 17;
        for code in 0..20 {
            self.put(u32::from(code == change), 4);
        }
        (0..count).for_each(|_| self.put(0, 1));
    }

    fn words(&self) -> Vec<u8> {
        let word = |bits: &[bool]| {
            (0..16).fold(0_u16, |word, at| word << 1 | u16::from(bits.get(at) == Some(&true)))
        };
        self.0.chunks(16).flat_map(|bits| word(bits).to_le_bytes()).collect()
    }
}

#[test]
fn lzx_matches_refer_back_and_calls_are_translated() {
    // Every code of the main tree (256 bytes, 30 slots of 8 lengths) has 9 bits, and is its own number.
    let block = |aligned: bool, size: u32, calls: bool, body: &dyn Fn(&mut Bits)| {
        let mut bits = Bits::default();
        bits.put(u32::from(calls), 1);
        if calls {
            // The size of the program whose calls were made absolute.
            bits.put(0x7fff, 16);
            bits.put(0xffff, 16);
        }
        bits.put(if aligned { 2 } else { 1 }, 3);
        bits.put(size >> 8, 16);
        bits.put(size & 0xff, 8);
        if aligned {
            (0..8).for_each(|_| bits.put(3, 3));
        }
        bits.lengths(9, 256);
        bits.lengths(9, 240);
        bits.lengths(0, 249);
        body(&mut bits);
        bits.words()
    };
    let literals = |bits: &mut Bits, text: &[u8]| text.iter().for_each(|byte| bits.put(u32::from(*byte), 9));
    let look_at = |block: Vec<u8>, size: usize| {
        look(&write(&[("x", 0, 0, size)], &[Folder { method: 0x0f03, blocks: vec![(size, block)] }]))
    };
    for aligned in [false, true] {
        // 6 bytes from 15 back: slot 8 begins at 16 - 2 and has three bits more, aligned or not.
        let bytes = block(aligned, 21, false, &|bits| {
            literals(bits, b"dle-47 --- hnee");
            bits.put(256 + 8 * 8 + 4, 9);
            bits.put(1, 3);
        });
        let found = look_at(bytes, 21);
        assert_eq!(
            (matched_within(&found), skipped(&found)),
            (["x".to_owned()].into(), Vec::new()),
            "{aligned}"
        );
        // 5 bytes from 10 back (slot 7: 12 - 2, two bits more), and 4 from as far (slot 0).
        let bytes = block(aligned, 19, false, &|bits| {
            literals(bits, b"dle-47-nee");
            bits.put(256 + 7 * 8 + 3, 9);
            bits.put(0, 2);
            bits.put(256 + 2, 9);
        });
        let found = look_at(bytes, 19);
        assert_eq!(
            (matched_within(&found), skipped(&found)),
            (["x".to_owned()].into(), Vec::new()),
            "{aligned}"
        );
    }
    // A call at 3 to `need`, told as `need` + 3.
    let bytes = block(false, 24, true, &|bits| literals(bits, b"abc\xe8qeedle-47 hay hay ha"));
    let found = look_at(bytes, 24);
    assert_eq!((matched_within(&found), skipped(&found)), (["x".to_owned()].into(), Vec::new()));
    // A match from before the start.
    let bytes = block(false, 4, false, &|bits| {
        literals(bits, b"ab");
        bits.put(256 + 7 * 8, 9);
        bits.put(0, 2);
    });
    says(&look_at(bytes, 4), SkipReason::Malformed);
}

#[test]
fn a_cabinet_that_contradicts_itself_is_read_and_said() {
    let gz = samples::gzip(&samples::plain());
    let length = gz.len();
    let hay = [b'-'; 100];
    let whole = [&hay[..], &gz, &hay].concat();
    let one = |files: &[File<'_>]| look(&write(files, &[folder(&whole, MSZIP)]));
    // What no file names, in front, between and behind.
    for (files, whole) in [
        (&[("x", 0, 0, 100)][..], &whole[..]),
        (&[("x", 0, 0, 100), ("y", 0, 100 + length, 100)], &whole),
        (&[("x", 0, length, 100)], &whole[100..]),
        (&[], &whole[100..]),
    ] {
        let found = look(&write(files, &[folder(whole, MSZIP)]));
        assert!(!matched(&found).is_empty(), "{files:?}: {found:?}");
        says(&found, SkipReason::Malformed);
    }
    // Files that share bytes, and one that ends beyond the end.
    let found = one(&[("a", 0, 0, 100 + length), ("b", 0, 100, length + 7), ("c", 0, 100, 9999)]);
    assert!(matched(&found).contains("b > content"), "{found:?}");
    says(&found, SkipReason::Malformed);
    // A folder that is not there, and one that no file is in.
    let found = look(&write(&[("a", 7, 0, 10)], &[folder(&samples::plain(), MSZIP)]));
    assert!(matched(&found).contains("gap"), "{found:?}");
    says(&found, SkipReason::Malformed);
    // A file that goes on in the next cabinet is judged as far as it is here; one from the one before is not.
    let found = look(&write(&[("a", 0xfffe, 0, 1 << 20)], &[folder(&samples::plain(), MSZIP)]));
    assert_eq!(matched_within(&found), ["a".to_owned()].into());
    says(&found, SkipReason::Malformed);
    says(&look(&write(&[("a", 0xffff, 9000, 10)], &[folder(&hay, MSZIP)])), SkipReason::Malformed);
    // A wrong sum, and something behind the end.
    let good = cab(&[("x", &samples::plain())], STORED);
    let mut wrong = good.clone();
    let at = wrong.len() - samples::plain().len() - 8;
    wrong[at] ^= 1;
    let found = look(&wrong);
    assert!(matched(&found).contains("x"), "{found:?}");
    says(&found, SkipReason::Malformed);
    let found = look(&[good, gz].concat());
    assert!(matched(&found).contains("appended > content"), "{found:?}");
}

#[test]
fn files_that_share_a_folder_again_and_again_end_by_a_limit() {
    let whole = vec![0; 8 << 20];
    let names: Vec<String> = (0..60_000).map(|n| n.to_string()).collect();
    let file = |(n, name)| (name, 0, n % 7, whole.len() - 7);
    let files: Vec<File<'_>> = names.iter().map(String::as_str).enumerate().map(file).collect();
    let found = look(&write(&files, &[folder(&whole, MSZIP)]));
    says(&found, SkipReason::Limit);
}
