//! Digest lists: files that are known by what they hash to.
//!
//! **Invariant:** an [`Entry`] holds a digest of the exact length of its algorithm; nothing here panics,
//! whatever the bytes are.

mod parse;

pub use self::parse::{InvalidList, MAX_JUNK, Parsed, parse};

/// A digest of a whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Digest {
    /// MD5 (RFC 1321).
    Md5([u8; 16]),
    /// SHA-1 (FIPS 180-4).
    Sha1([u8; 20]),
    /// SHA-256 (FIPS 180-4).
    Sha256([u8; 32]),
}

impl Digest {
    /// Reads 32, 40 or 64 hexadecimal digits of either case; the length tells the algorithm.
    pub fn from_hex(text: &str) -> Option<Self> {
        match text.len() {
            32 => fixed(text).map(Self::Md5),
            40 => fixed(text).map(Self::Sha1),
            64 => fixed(text).map(Self::Sha256),
            _ => None,
        }
    }
}

/// Exactly `2 * N` hexadecimal digits.
fn fixed<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut digits = text.bytes();
    for byte in &mut bytes {
        *byte = nibble(digits.next()?)? << 4 | nibble(digits.next()?)?;
    }
    digits.next().is_none().then_some(bytes)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// One line of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'a> {
    /// What a file must hash to.
    pub digest: Digest,
    /// How long it must be, in bytes; `None` for any length.
    pub size: Option<u64>,
    /// What people call it; may be empty. Hostile text: escape it where it is shown.
    pub name: &'a str,
}
