//! Digest lists: files that are known by what they hash to.
//!
//! A list comes as text ([`parse`]), is turned into its compiled form once ([`List`], [`Compiled`]) and is kept and
//! handed on as such, in memory that can no longer be changed ([`Image`]).
//!
//! **Invariant:** an [`Entry`] holds a digest of the exact length of its algorithm; nothing here panics,
//! whatever the bytes are.

mod compiled;
mod entries;
mod filter;
mod image;
mod layout;
mod list;
mod parse;
mod write;

use std::fmt;

pub use self::{
    compiled::{Compiled, Hit},
    image::{Image, ImageError},
    layout::{InvalidCompiled, MAGIC, MAX_COMPILED, is_compiled},
    list::{InvalidList, List, MAX_ENTRIES, MAX_JUNK, MAX_LIST, Summary},
};
pub(crate) use self::{
    entries::{fold, unfold},
    parse::is_entry,
};

/// How digests of a list are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// RFC 1321.
    Md5,
    /// FIPS 180-4.
    Sha1,
    /// FIPS 180-4.
    Sha256,
}

impl Algorithm {
    /// All of them, in the order of the compiled form.
    pub const ALL: [Self; 3] = [Self::Md5, Self::Sha1, Self::Sha256];

    /// Length of a digest, in bytes.
    pub const fn length(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
        }
    }

    /// Its name for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "MD5",
            Self::Sha1 => "SHA-1",
            Self::Sha256 => "SHA-256",
        }
    }

    /// Its place in [`Self::ALL`].
    const fn index(self) -> usize {
        match self {
            Self::Md5 => 0,
            Self::Sha1 => 1,
            Self::Sha256 => 2,
        }
    }
}

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

    /// How it was computed.
    pub const fn algorithm(&self) -> Algorithm {
        match self {
            Self::Md5(_) => Algorithm::Md5,
            Self::Sha1(_) => Algorithm::Sha1,
            Self::Sha256(_) => Algorithm::Sha256,
        }
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Md5(bytes) => bytes,
            Self::Sha1(bytes) => bytes,
            Self::Sha256(bytes) => bytes,
        }
    }
}

/// `sha256:` (`sha1:`, `md5:`) and lower-case digits.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Md5(_) => "md5:",
            Self::Sha1(_) => "sha1:",
            Self::Sha256(_) => "sha256:",
        })?;
        self.as_bytes().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
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

/// How many entries a list has, by algorithm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts([u64; 3]);

impl Counts {
    /// So many of each.
    pub const fn new(md5: u64, sha1: u64, sha256: u64) -> Self {
        Self([md5, sha1, sha256])
    }

    /// Those of one algorithm.
    pub const fn of(&self, algorithm: Algorithm) -> u64 {
        self.0[algorithm.index()]
    }

    /// All of them.
    pub const fn total(&self) -> u64 {
        self.0[0].saturating_add(self.0[1]).saturating_add(self.0[2])
    }
}

/// `3 SHA-256, 1 MD5`: what there is, the strongest first.
impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut is_first = true;
        for algorithm in Algorithm::ALL.into_iter().rev().filter(|algorithm| self.of(*algorithm) > 0) {
            let comma = if std::mem::take(&mut is_first) { "" } else { ", " };
            write!(f, "{comma}{} {}", self.of(algorithm), algorithm.name())?;
        }
        if is_first { f.write_str("no digests") } else { Ok(()) }
    }
}
