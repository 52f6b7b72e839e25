//! What turns one pattern into another, in few bytes.
//!
//! Both versions lie where the delta is made, so no list of chunks has to travel: of a sorted digest list with 1 %
//! new entries nearly every chunk of 4 KiB is another one, and an index of smaller ones would be larger than what
//! has changed. Lists are compared by their rows ([`crate::digests`]), other patterns by their bytes.
//!
//! The form; numbers are little-endian, a *varint* is LEB128 of at most nine bytes:
//!
//! | bytes | what |
//! |---|---|
//! | 12, 1 | [`MAGIC`], version 1 |
//! | 1 | what is compared: 0 the bytes, 1 the rows of a compiled list |
//! | 32, 32 | SHA-256 of the old pattern, of the new one |
//! | 8, 8 | length of what is compared, old and new |
//! | … | deflated (RFC 1951), until the new length is reached: a varint, so many new bytes, and they; a varint, so many bytes of the old; if not 0, a varint (zigzag), how far they are from the end of those that were taken last |
//!
//! **Invariant:** [`apply`] returns exactly the bytes that were asked for, or an error; whatever a delta says, it
//! costs no more memory than [`MAX_COMPARED`] allows for.

mod make;

use std::io::{self, Read};

use flate2::read::DeflateDecoder;
use tm_protocol::ids::Sha256;

pub use self::make::make;
use crate::digests::{MAX_COMPILED, fold, is_compiled, unfold};

/// The first bytes of a delta.
pub const MAGIC: &[u8; 12] = b"\x89tm-delta\r\n\0";
/// Most bytes of what is compared, of either version.
pub const MAX_COMPARED: usize = MAX_COMPILED;
const VERSION: u8 = 1;
const HEADER: usize = 12 + 1 + 1 + 32 + 32 + 8 + 8;
/// What new bytes are read by.
const PIECE: usize = 64 << 10;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Bytes,
    Rows,
}

/// Why a delta was not applied.
#[derive(Debug, thiserror::Error)]
pub enum InvalidDelta {
    /// It begins otherwise, or is of a form that is not known.
    #[error("this is no delta")]
    Form,
    /// It is for other patterns.
    #[error("the delta is for other patterns")]
    Other,
    /// What it says contradicts itself or what it is applied to.
    #[error("the delta is damaged: {0}")]
    Damaged(&'static str),
    /// It ends too early, or is not compressed as it should be.
    #[error("the delta cannot be read")]
    Read(#[source] io::Error),
    /// What it makes is something else.
    #[error("the delta makes another pattern")]
    Digest,
}

/// What is compared of a pattern.
fn compared(pattern: &[u8]) -> Option<(Form, std::borrow::Cow<'_, [u8]>)> {
    if is_compiled(pattern) {
        return Some((Form::Rows, unfold(pattern, MAX_COMPARED)?.into()));
    }
    (pattern.len() <= MAX_COMPARED).then_some((Form::Bytes, pattern.into()))
}

/// The pattern whose digest is `new`, made out of `pattern`, whose digest is `old`, and a delta.
///
/// # Errors
/// With what is wrong with the delta.
pub fn apply(old: Sha256, pattern: Vec<u8>, new: Sha256, delta: &[u8]) -> Result<Vec<u8>, InvalidDelta> {
    let (header, ops) = delta.split_first_chunk::<HEADER>().ok_or(InvalidDelta::Form)?;
    let mut header = Fields(header);
    if header.take::<12>() != Some(*MAGIC) || header.take() != Some([VERSION]) {
        return Err(InvalidDelta::Form);
    }
    let form = match header.take() {
        Some([0]) => Form::Bytes,
        Some([1]) => Form::Rows,
        _ => return Err(InvalidDelta::Form),
    };
    if header.take() != Some(*old.as_bytes()) || header.take() != Some(*new.as_bytes()) {
        return Err(InvalidDelta::Other);
    }
    let length = |bytes: Option<[u8; 8]>| {
        let length = bytes.and_then(|bytes| usize::try_from(u64::from_le_bytes(bytes)).ok());
        length.filter(|length| *length <= MAX_COMPARED).ok_or(InvalidDelta::Damaged("its lengths"))
    };
    let (old_length, new_length) = (length(header.take())?, length(header.take())?);
    let base = compared(&pattern).ok_or(InvalidDelta::Other)?;
    if base.0 != form || base.1.len() != old_length {
        return Err(InvalidDelta::Damaged("the old length"));
    }
    let made = rebuild(&base.1, new_length, ops)?;
    // Of the old one nothing is needed any more, and the compiled form takes its room.
    drop(base);
    drop(pattern);
    let made = match form {
        Form::Bytes => made,
        Form::Rows => fold(&made).ok_or(InvalidDelta::Damaged("rows"))?,
    };
    if Sha256::of(&made) == new { Ok(made) } else { Err(InvalidDelta::Digest) }
}

fn rebuild(base: &[u8], length: usize, ops: &[u8]) -> Result<Vec<u8>, InvalidDelta> {
    let damaged = InvalidDelta::Damaged;
    let mut ops = io::BufReader::with_capacity(PIECE, DeflateDecoder::new(ops));
    // What is there grows by what has arrived, not by what was promised.
    let mut made = Vec::new();
    let mut at = 0_usize;
    while made.len() < length {
        let left = length - made.len();
        let fresh = number(&mut ops)?;
        if fresh > wide(left) {
            return Err(damaged("too many new bytes"));
        }
        let got = ops.by_ref().take(fresh).read_to_end(&mut made).map_err(InvalidDelta::Read)?;
        if wide(got) != fresh {
            return Err(InvalidDelta::Read(io::ErrorKind::UnexpectedEof.into()));
        }
        let copied = usize::try_from(number(&mut ops)?).map_err(|_| damaged("a length"))?;
        if copied == 0 {
            if fresh == 0 {
                return Err(damaged("a step that does nothing"));
            }
            continue;
        }
        if copied > length - made.len() {
            return Err(damaged("too many old bytes"));
        }
        at = at.checked_add_signed(signed(number(&mut ops)?)?).ok_or(damaged("a place"))?;
        let end = at.checked_add(copied).ok_or(damaged("a place"))?;
        made.extend_from_slice(base.get(at..end).ok_or(damaged("a place"))?);
        at = end;
    }
    match ops.read(&mut [0]) {
        Ok(0) => Ok(made),
        Ok(_) => Err(damaged("it does not end")),
        Err(error) => Err(InvalidDelta::Read(error)),
    }
}

fn number(ops: &mut impl Read) -> Result<u64, InvalidDelta> {
    let mut value = 0_u64;
    for shift in (0..63).step_by(7) {
        let mut byte = [0];
        ops.read_exact(&mut byte).map_err(InvalidDelta::Read)?;
        value |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(InvalidDelta::Damaged("a number"))
}

fn signed(zigzag: u64) -> Result<isize, InvalidDelta> {
    let half = i64::try_from(zigzag >> 1).map_err(|_| InvalidDelta::Damaged("a place"))?;
    let value = if zigzag & 1 == 0 { half } else { -half - 1 };
    isize::try_from(value).map_err(|_| InvalidDelta::Damaged("a place"))
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }
}

fn wide(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
