//! Good archives to look into, written by hand so that every field can be made wrong.

use std::io::Write as _;

/// What every packed sample holds.
pub(super) fn plain() -> Vec<u8> {
    b"hay needle-47 hay\n".repeat(4)
}

/// `zlib.compressobj(9, DEFLATED, -15)` of Python; no match is as long as 258, so it is deflate64 as well.
pub(super) const DEFLATE: &str = "cb48ac54c84b4d4dc949d5353157c848ace4ca204b0400";
/// `bz2.compress`.
pub(super) const BZIP2: &str = concat!(
    "425a68393141592653592304c9d000001bd9800010400204802645002020005440d03402aa68069a51a20e9a3648",
    "c1e20a24928b943c5dc914e142408c132740"
);
/// `lzma.compress`.
pub(super) const XZ: &str = concat!(
    "fd377a585a000004e6d6b4460200210116000000742fe5a3e0004700185d0034184b9420be5aab6a7df87f99327e",
    "b423fb8904313a000000ea971df50d7efddd000134487e8fabe31fb6f37d010000000004595a"
);
/// `lzma.compress(format=FORMAT_ALONE)`: size not told, end marked.
pub(super) const LZMA: &str =
    "5d00008000ffffffffffffffff0034184b9420be5aab6a7df87f99327eb423fb890441acb9fffff8086000";
/// `zstd -19 --check -c`.
pub(super) const ZSTD: &str = "28b52ffd0468cd000090686179206e6565646c652d3437206861790a010056e70c03dcb901ad";

pub(super) fn packed(sample: &str) -> Vec<u8> {
    hex::decode(sample).unwrap()
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// An entry of a zip.
#[derive(Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) flags: u16,
    pub(super) method: u16,
    pub(super) data: Vec<u8>,
    pub(super) crc: u32,
    pub(super) size: u32,
}

impl Entry {
    /// An entry whose data unpacks to [`plain`].
    pub(super) fn of_plain(name: &str, method: u16, data: &[u8]) -> Self {
        Self::of(name, method, data, &plain())
    }

    /// An entry whose data unpacks to `plain`.
    pub(super) fn of(name: &str, method: u16, data: &[u8], plain: &[u8]) -> Self {
        Self {
            name: name.to_owned(),
            flags: 0,
            method,
            data: data.to_vec(),
            crc: crc32fast::hash(plain),
            size: number(plain.len()),
        }
    }

    fn fields(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for short in [20, self.flags, self.method, 0, 0x21] {
            out.extend(u16::to_le_bytes(short));
        }
        for long in [self.crc, number(self.data.len()), self.size] {
            out.extend(u32::to_le_bytes(long));
        }
        out.extend(short(self.name.len()).to_le_bytes());
        out.extend([0, 0]);
        out
    }

    pub(super) fn local(&self) -> Vec<u8> {
        [b"PK\x03\x04", &*self.fields(), self.name.as_bytes(), &self.data].concat()
    }

    pub(super) fn central(&self, at: u32) -> Vec<u8> {
        let mut out = [b"PK\x01\x02\x14\0", &*self.fields(), &[0; 10]].concat();
        out.extend(at.to_le_bytes());
        out.extend(self.name.as_bytes());
        out
    }
}

pub(super) fn zip(entries: &[Entry]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        directory.extend(entry.central(number(out.len())));
        out.extend(entry.local());
    }
    end_zip(out, &directory, entries.len())
}

/// Puts a directory and the end record behind what is there.
pub(super) fn end_zip(mut out: Vec<u8>, directory: &[u8], entries: usize) -> Vec<u8> {
    let at = number(out.len());
    let count = u16::try_from(entries & 0xffff).unwrap();
    out.extend(directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend(count.to_le_bytes());
    out.extend(count.to_le_bytes());
    out.extend(number(directory.len()).to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend([0, 0]);
    out
}

/// LZMA as a zip has it: version, length of the properties, the properties, the stream.
pub(super) fn zip_lzma() -> Vec<u8> {
    let alone = packed(LZMA);
    [&[9, 4, 5, 0], &alone[..5], &alone[13..]].concat()
}

pub(super) fn tar(name: &str, data: &[u8], change: impl FnOnce(&mut tar::Header)) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(u64::from(number(data.len())));
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_path(name).unwrap();
    change(&mut header);
    header.set_cksum();
    builder.append(&header, data).unwrap();
    builder.into_inner().unwrap()
}

pub(super) fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = b"!<arch>\n".to_vec();
    for (name, data) in members {
        writeln!(out, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, data.len()).unwrap();
        out.extend_from_slice(data);
        if data.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    out
}

fn pad(out: &mut Vec<u8>, to: usize) {
    out.resize(out.len().next_multiple_of(to), 0);
}

pub(super) fn cpio_new(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, data) in members.iter().copied().chain([("TRAILER!!!", &b""[..])]) {
        let fields = [0, 0o100_644, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        out.extend(b"070701");
        for field in fields {
            write!(out, "{field:08X}").unwrap();
        }
        out.extend(name.as_bytes());
        out.push(0);
        pad(&mut out, 4);
        out.extend(data);
        pad(&mut out, 4);
    }
    out
}

pub(super) fn cpio_portable(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, data) in members.iter().copied().chain([("TRAILER!!!", &b""[..])]) {
        let (name_length, size) = (name.len() + 1, data.len());
        write!(out, "070707{:06o}{:06o}{:06o}", 0, 0, 0o100_644).unwrap();
        write!(out, "{:06o}{:06o}{:06o}{:06o}{:011o}{name_length:06o}{size:011o}", 0, 0, 1, 0, 0).unwrap();
        out.extend(name.as_bytes());
        out.push(0);
        out.extend(data);
    }
    out
}

pub(super) fn cpio_binary(members: &[(&str, &[u8])], bytes: fn(u16) -> [u8; 2]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, data) in members.iter().copied().chain([("TRAILER!!!", &b""[..])]) {
        let fields =
            [0o070_707, 0, 0, 0o100_644, 0, 0, 1, 0, 0, 0, short(name.len() + 1), 0, short(data.len())];
        out.extend(fields.into_iter().flat_map(bytes));
        out.extend(name.as_bytes());
        out.push(0);
        pad(&mut out, 2);
        out.extend(data);
        pad(&mut out, 2);
    }
    out
}

pub(super) fn rpm(payload: &[u8]) -> Vec<u8> {
    rpm_of(b"gzip", payload)
}

/// A package that names its payload's compressor.
pub(super) fn rpm_of(compressor: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut lead = vec![0; 96];
    lead[..6].copy_from_slice(b"\xed\xab\xee\xdb\x03\0");
    let magic = b"\x8e\xad\xe8\x01\0\0\0\0";
    let store = [compressor, b"\0"].concat();
    let mut header = magic.to_vec();
    for field in [1, number(store.len()), 1125, 6, 0, 1] {
        header.extend(field.to_be_bytes());
    }
    [&lead, &magic[..], &[0; 8], &header, &store, payload].concat()
}

/// LZMA alone (13 bytes of header) that packs each byte as itself.
pub(super) fn lzma_literal(bytes: &[u8]) -> Vec<u8> {
    let mut coder = RangeCoder { low: 0, range: u32::MAX, out: Vec::new(), held: 0, cache: 0 };
    let (mut is_match, mut literals) = (1024_u16, vec![1024_u16; 0x300]);
    for byte in bytes {
        coder.bit(&mut is_match, 0);
        let mut node = 1;
        for at in (0..8).rev() {
            let bit = usize::from(byte >> at & 1);
            coder.bit(&mut literals[node], bit);
            node = node << 1 | bit;
        }
    }
    // Properties without contexts (lc, lp and pb of 0), a dictionary of 64 KiB, and the size.
    let mut out = vec![0, 0, 0, 1, 0];
    out.extend(u64::from(number(bytes.len())).to_le_bytes());
    out.extend(coder.end());
    out
}

/// The encoder of LZMA.
struct RangeCoder {
    low: u64,
    range: u32,
    out: Vec<u8>,
    held: usize,
    cache: u8,
}

impl RangeCoder {
    fn bit(&mut self, odds: &mut u16, bit: usize) {
        let bound = (self.range >> 11) * u32::from(*odds);
        if bit == 0 {
            self.range = bound;
            *odds += (2048 - *odds) >> 5;
        } else {
            self.low += u64::from(bound);
            self.range -= bound;
            *odds -= *odds >> 5;
        }
        while self.range < 1 << 24 {
            self.range <<= 8;
            self.shift();
        }
    }

    fn shift(&mut self) {
        if self.low < 0xff00_0000 || self.low > 0xffff_ffff {
            let carry = u8::try_from(self.low >> 32).unwrap();
            self.out.push(self.cache.wrapping_add(carry));
            self.out.extend(std::iter::repeat_n(0xff_u8.wrapping_add(carry), self.held));
            self.held = 0;
            self.cache = u8::try_from(self.low >> 24 & 0xff).unwrap();
        } else {
            self.held += 1;
        }
        self.low = (self.low & 0x00ff_ffff) << 8;
    }

    fn end(mut self) -> Vec<u8> {
        for _ in 0..5 {
            self.shift();
        }
        self.out
    }
}

fn number(length: usize) -> u32 {
    u32::try_from(length).unwrap()
}

fn short(length: usize) -> u16 {
    u16::try_from(length).unwrap()
}
