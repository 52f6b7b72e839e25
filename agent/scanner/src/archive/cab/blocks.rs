//! What the blocks (CFDATA) of a folder unpack to: stored, MSZIP or LZX.

use std::io::{self, Read};

use flate2::{Decompress, FlushDecompress, Status};
use tm_protocol::report::SkipReason;

use super::lzx::Lzx;
use crate::archive::{
    codec,
    field::{self, index, len},
};

/// Most that a block unpacks to, in bytes; what MSZIP can refer back to.
const BLOCK: usize = 32 << 10;
/// Length of a block's header without what is reserved, in bytes.
const HEADER: u64 = 8;
/// Memory of a reader, in bytes: the largest window of LZX and its trees.
pub(super) const WORKSPACE: u64 = 4 << 20;

/// How blocks are packed.
enum Method {
    Stored,
    /// The end of what came before, up to [`BLOCK`] bytes.
    MsZip(Vec<u8>),
    Lzx(Box<Lzx>),
}

/// A folder that is read.
pub(super) struct Blocks<'b> {
    start: u64,
    rest: &'b [u8],
    /// Blocks that have not been read.
    left: u64,
    method: Method,
    /// What is added to a block's header, in bytes.
    reserve: u64,
    at: u64,
    /// The last block, unpacked, and how much of it has been read.
    block: Vec<u8>,
    taken: usize,
    sums_are_right: bool,
    failed: Option<SkipReason>,
}

impl<'b> Blocks<'b> {
    /// Begins the folder whose header is at `at`; its blocks have `reserve` bytes more in their headers.
    pub(super) fn open(bytes: &'b [u8], at: usize, reserve: u64) -> Result<Self, SkipReason> {
        let number = |offset: usize, width| {
            at.checked_add(offset).and_then(|at| field::le(bytes, at, width)).ok_or(SkipReason::Malformed)
        };
        let (start, left, method) = (number(0, 4)?, number(4, 2)?, number(6, 2)?);
        let method = match method & 15 {
            0 => Method::Stored,
            1 => Method::MsZip(Vec::new()),
            3 => Method::Lzx(Box::new(Lzx::new(method >> 8 & 0x1f).ok_or(SkipReason::Malformed)?)),
            _ => return Err(SkipReason::Unsupported),
        };
        Ok(Self {
            start,
            rest: bytes.get(index(start)..).ok_or(SkipReason::Malformed)?,
            left,
            method,
            reserve,
            at: 0,
            block: Vec::new(),
            taken: 0,
            sums_are_right: true,
            failed: None,
        })
    }

    /// How much has been read.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The most that the folder's blocks can take, in bytes.
    pub(super) fn packed(&self) -> u64 {
        len(self.rest)
    }

    /// Where in the cabinet the blocks that have been read begin and end.
    pub(super) fn covered(&self, bytes: &[u8]) -> (u64, u64) {
        (self.start, len(bytes) - len(self.rest))
    }

    /// Why nothing more can be read.
    pub(super) fn failed(&self) -> Option<SkipReason> {
        self.failed
    }

    /// Whether all of it has been read.
    pub(super) fn is_at_end(&self) -> bool {
        self.left == 0 && self.taken == self.block.len()
    }

    /// Whether every block so far had the checksum that it tells.
    pub(super) fn sums_are_right(&self) -> bool {
        self.sums_are_right
    }

    fn next(&mut self) -> io::Result<()> {
        let wrong = || io::Error::from(io::ErrorKind::InvalidData);
        let header = field::piece(self.rest, 0, HEADER + self.reserve).ok_or_else(wrong)?;
        let number = |at, width| field::le(header, at, width).ok_or_else(wrong);
        let (told, packed, unpacked) = (number(0, 4)?, number(4, 2)?, index(number(6, 2)?));
        let data = field::piece(self.rest, len(header), packed).ok_or_else(wrong)?;
        // A block that goes on in the next cabinet tells 0.
        if unpacked == 0 || unpacked > BLOCK {
            return Err(wrong());
        }
        self.left -= 1;
        self.rest = self.rest.get(header.len() + data.len()..).unwrap_or_default();
        self.sums_are_right &= told == 0 || is_sum(told, header, data);
        self.taken = 0;
        match &mut self.method {
            Method::Stored => {
                self.block.clear();
                self.block.extend_from_slice(data);
            }
            Method::MsZip(before) => {
                self.block = inflate(data, before, unpacked)?;
                keep_end(before, &self.block);
            }
            Method::Lzx(lzx) => lzx.unpack(data, unpacked, &mut self.block).ok_or_else(wrong)?,
        }
        if self.block.len() == unpacked { Ok(()) } else { Err(wrong()) }
    }
}

impl Read for Blocks<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if let Some(reason) = self.failed {
            return Err(codec::because(reason));
        }
        while !out.is_empty() && self.taken == self.block.len() && self.left > 0 {
            if let Err(error) = self.next() {
                // What did come out of the block is judged; nothing can follow it.
                self.failed = Some(codec::reason(&error));
                self.left = 0;
                if self.block.len() == self.taken {
                    return Err(error);
                }
            }
        }
        let got = self.block.get(self.taken..).unwrap_or_default().read(out)?;
        self.taken += got;
        self.at += u64::try_from(got).unwrap_or(u64::MAX);
        Ok(got)
    }
}

/// One block of MSZIP: `CK` and a deflate stream, which may refer back to what is `before` it.
fn inflate(data: &[u8], before: &[u8], unpacked: usize) -> io::Result<Vec<u8>> {
    let stream = data.strip_prefix(b"CK").ok_or(io::ErrorKind::InvalidData)?;
    let mut inflate = Decompress::new(false);
    if !before.is_empty() {
        inflate.set_dictionary(before).map_err(io::Error::other)?;
    }
    let mut out = Vec::with_capacity(unpacked + 1);
    let status = inflate.decompress_vec(stream, &mut out, FlushDecompress::Finish);
    match status {
        Ok(Status::StreamEnd) => Ok(out),
        Ok(Status::Ok | Status::BufError) | Err(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn keep_end(before: &mut Vec<u8>, block: &[u8]) {
    before.extend_from_slice(block);
    before.drain(..before.len().saturating_sub(BLOCK));
}

/// Whether `told` is a block's checksum. Writers differ in whether what is reserved in its header counts.
fn is_sum(told: u64, header: &[u8], data: &[u8]) -> bool {
    let data = checksum(data);
    [header.get(4..8), header.get(4..)]
        .into_iter()
        .flatten()
        .any(|fields| told == u64::from(checksum(fields) ^ data))
}

/// Numbers of four bytes combined by exclusive or; of what is left over the last byte is the lowest one.
fn checksum(bytes: &[u8]) -> u32 {
    let (numbers, rest) = bytes.as_chunks::<4>();
    let sum = numbers.iter().fold(0, |sum, number| sum ^ u32::from_le_bytes(*number));
    sum ^ rest.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}
