//! Patterns: what to look for.
//!
//! A pattern is named by the SHA-256 of its bytes. It is YARA rule text or a digest list in its compiled form; the
//! list's own text is turned into that where it comes in, so that the same entries have the same name. Who may say
//! that a pattern is the fleet's is in [`trust`]; cleanup steps join it here.
//!
//! **Invariant:** a [`Pattern`] that exists is within its size limit. Whether rules compile is found out in a scan
//! worker, never in the process that holds them; of a compiled list header and digest are right, and the rest is
//! read where nothing in it can do harm.

pub mod delta;
pub mod digests;
mod kind;
pub mod trust;

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt as _,
    sync::Arc,
};

use rustix::io::Errno;
use tm_protocol::{ids::Sha256, task::PatternRef};

use self::{
    digests::{
        Compiled, Image, ImageError, InvalidCompiled, InvalidList, List, MAX_COMPILED, MAX_LIST, Summary,
        is_compiled,
    },
    kind::Kind,
};

/// Largest rule text accepted, in bytes.
pub const MAX_SIZE: usize = 64 << 20;
/// Largest pattern of any kind as it is kept and handed on, in bytes.
pub const MAX_STORED: usize = MAX_COMPILED;
/// Most that is read of a pattern as people have it, in bytes; only a list's text may be so long.
pub const MAX_IMPORT: u64 = MAX_LIST;
/// What is read to begin with, in bytes.
const FIRST: usize = 64 << 10;

/// A pattern's bytes and their name. A clone shares them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    name: String,
    sha256: Sha256,
    body: Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Body {
    Rules(Arc<str>),
    Digests(Image),
}

/// A pattern that came in, and what was in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The pattern.
    pub pattern: Pattern,
    /// What its text held, if it was a digest list's.
    pub list: Option<Summary>,
}

/// Why bytes are not a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    /// No rules can be in it.
    #[error("the pattern is empty")]
    Empty,
    /// Too large.
    #[error("the pattern has {size} bytes, {max} are allowed", max = MAX_SIZE)]
    TooLarge {
        /// Its size, or as much as was read of it.
        size: usize,
    },
    /// A list's text is too large.
    #[error("the digest list has more than the {} MiB that are allowed", MAX_LIST >> 20)]
    LongList,
    /// Compiled rules are never loaded: a forged set can make any engine misbehave.
    #[error("the file holds compiled rules; import their text instead")]
    Compiled,
    /// YARA text is UTF-8.
    #[error("the pattern is not UTF-8 text (line {line})")]
    NotText {
        /// The first line, from 1, that is not.
        line: usize,
    },
    /// A digest list's text is wrong.
    #[error("the pattern is no digest list: {0}")]
    List(InvalidList),
    /// A compiled digest list is wrong.
    #[error("the pattern cannot be used: {0}")]
    Digests(InvalidCompiled),
    /// There is no memory for a digest list.
    #[error("there is no memory for the digest list: {0}")]
    Memory(Errno),
    /// Its bytes are not the ones that were asked for.
    #[error("the pattern's digest is {found}, not {expected}")]
    Digest {
        /// What it should be.
        expected: Sha256,
        /// What it is.
        found: Sha256,
    },
}

/// Why no pattern came in.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It could not be read.
    #[error("cannot read it")]
    Read(#[source] io::Error),
    /// It is not a pattern.
    #[error(transparent)]
    Invalid(#[from] InvalidPattern),
}

impl From<ImageError> for ReadError {
    fn from(error: ImageError) -> Self {
        Self::Invalid(match error {
            ImageError::Read(error) => return Self::Read(error),
            ImageError::Memory(error) => InvalidPattern::Memory(error),
            ImageError::Invalid(error) => InvalidPattern::Digests(error),
        })
    }
}

impl Pattern {
    /// Takes a pattern as people have it: rule text, a digest list's text, a compiled list. `name` is what people
    /// call it. Of a list's text no more than its entries is held in memory.
    ///
    /// # Errors
    /// If it cannot be read, is empty, too large, compiled rules, or neither rules nor a list.
    pub fn read(name: impl Into<String>, mut source: impl Read) -> Result<Imported, ReadError> {
        let (mut bytes, mut step) = (Vec::new(), FIRST);
        let kind = loop {
            let got = take(&mut source, step, &mut bytes)?;
            let is_whole = got < step || bytes.len() > MAX_SIZE;
            if let Some(kind) = kind::of(&bytes, is_whole) {
                break kind;
            }
            // Twice as much each time: what was seen is looked at again.
            step = bytes.len().min((MAX_SIZE + 1).saturating_sub(bytes.len()));
        };
        let pattern = match kind {
            Kind::Compiled => Self::compiled(name.into(), Image::read(bytes.as_slice().chain(source))?),
            Kind::Rules => {
                let room = (MAX_SIZE + 1).saturating_sub(bytes.len());
                take(&mut source, room, &mut bytes)?;
                Self::rules(name.into(), bytes)?
            }
            Kind::List => return Self::list(name.into(), bytes, source),
        };
        Ok(Imported { pattern, list: None })
    }

    /// As [`Self::read`], from the start of `file`. A compiled list of one's own is not copied ([`Image::of_file`]).
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_file(name: impl Into<String>, file: File) -> Result<Imported, ReadError> {
        if begins_compiled(&file) {
            let pattern = Self::compiled(name.into(), Image::of_file(file)?);
            return Ok(Imported { pattern, list: None });
        }
        Self::read(name, file)
    }

    /// As [`Self::read`], out of memory.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> Result<Self, InvalidPattern> {
        let imported = match kind::of(&bytes, true) {
            Some(Kind::Rules) | None => return Self::rules(name.into(), bytes),
            Some(Kind::List | Kind::Compiled) => Self::read(name, bytes.as_slice()),
        };
        match imported {
            Ok(imported) => Ok(imported.pattern),
            Err(ReadError::Invalid(error)) => Err(error),
            Err(ReadError::Read(error)) => {
                Err(InvalidPattern::Memory(Errno::from_io_error(&error).unwrap_or(Errno::IO)))
            }
        }
    }

    /// As [`Self::verified`], from the start of `file`. A compiled list of one's own is not copied
    /// ([`Image::of_file`]).
    ///
    /// # Errors
    /// As [`Self::verified`].
    pub fn verified_file(expected: &PatternRef, file: File) -> Result<Self, ReadError> {
        if !begins_compiled(&file) {
            return Self::verified(expected, file);
        }
        let image = Image::of_file(file)?;
        expect(expected, image.sha256())?;
        Ok(Self::compiled(expected.name.clone(), image))
    }

    /// Takes bytes that must be exactly the pattern that `expected` names: rule text or a compiled list.
    ///
    /// # Errors
    /// As [`Pattern::read`], or if the digest differs.
    pub fn verified(expected: &PatternRef, mut source: impl Read) -> Result<Self, ReadError> {
        let mut bytes = Vec::new();
        let got = take(&mut source, FIRST, &mut bytes)?;
        let name = expected.name.clone();
        if is_compiled(&bytes) {
            let image = Image::read(bytes.as_slice().chain(source))?;
            expect(expected, image.sha256())?;
            return Ok(Self::compiled(name, image));
        }
        if got == FIRST {
            take(&mut source, MAX_SIZE + 1 - FIRST, &mut bytes)?;
        }
        expect(expected, Sha256::of(&bytes))?;
        // A list's text has no name of its own, so nobody can mean it; as rules it is refused.
        Ok(Self::rules(name, bytes)?)
    }

    fn rules(name: String, bytes: Vec<u8>) -> Result<Self, InvalidPattern> {
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Err(InvalidPattern::Empty);
        }
        if bytes.len() > MAX_SIZE {
            return Err(InvalidPattern::TooLarge { size: bytes.len() });
        }
        // The first bytes of rules compiled by libyara and by yara-x.
        if bytes.starts_with(b"YARA\0")
            || bytes.starts_with(b"YARA-X")
            || bytes.get(..4) == Some(b"YARA") && bytes.contains(&0)
        {
            return Err(InvalidPattern::Compiled);
        }
        let sha256 = Sha256::of(&bytes);
        let text = String::from_utf8(bytes).map_err(|e| {
            let valid = e.utf8_error().valid_up_to();
            let line = 1 + e.as_bytes().iter().take(valid).filter(|b| **b == b'\n').count();
            InvalidPattern::NotText { line }
        })?;
        Ok(Self { name, sha256, body: Body::Rules(text.into()) })
    }

    fn compiled(name: String, image: Image) -> Self {
        Self { name, sha256: image.sha256(), body: Body::Digests(image) }
    }

    /// A list whose text begins with `bytes` and goes on in `source`.
    fn list(name: String, bytes: Vec<u8>, mut source: impl Read) -> Result<Imported, ReadError> {
        let invalid = InvalidPattern::List;
        let mut list = List::new();
        list.feed(&bytes).map_err(invalid)?;
        let mut length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let mut chunk = bytes;
        loop {
            chunk.clear();
            let got = take(&mut source, FIRST, &mut chunk)?;
            length = length.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
            if length > MAX_LIST {
                return Err(InvalidPattern::LongList.into());
            }
            list.feed(&chunk).map_err(invalid)?;
            if got < FIRST {
                break;
            }
        }
        let (bytes, summary) = list.finish().map_err(invalid)?;
        let image = Image::read(bytes.as_slice())?;
        Ok(Imported { pattern: Self::compiled(name, image), list: Some(summary) })
    }

    /// What people call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The digest of its bytes.
    pub fn sha256(&self) -> Sha256 {
        self.sha256
    }

    /// The YARA rule text; empty for a digest list.
    pub fn text(&self) -> &str {
        match &self.body {
            Body::Rules(text) => text,
            Body::Digests(_) => "",
        }
    }

    /// The digest list, if it is one.
    pub fn digests(&self) -> Option<&Image> {
        match &self.body {
            Body::Rules(_) => None,
            Body::Digests(image) => Some(image),
        }
    }

    /// A copy of its bytes, whose digest names it.
    ///
    /// # Errors
    /// If the kernel does not give back what it holds.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        match &self.body {
            Body::Rules(text) => Ok(text.as_bytes().to_vec()),
            Body::Digests(image) => image.to_vec(),
        }
    }

    /// Its length, in bytes.
    pub fn size(&self) -> usize {
        match &self.body {
            Body::Rules(text) => text.len(),
            Body::Digests(image) => image.size(),
        }
    }

    /// Looks at every entry of a digest list that came compiled. Rules are tried in a worker instead.
    ///
    /// # Errors
    /// If anything in it is wrong.
    pub fn check_digests(&self) -> Result<(), InvalidPattern> {
        let Some(image) = self.digests() else { return Ok(()) };
        let bytes = image
            .to_vec()
            .map_err(|error| InvalidPattern::Memory(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        Compiled::open(bytes).and_then(|list| list.check()).map_err(InvalidPattern::Digests)
    }

    /// How an order names it.
    pub fn reference(&self) -> PatternRef {
        PatternRef {
            sha256: self.sha256,
            size: u64::try_from(self.size()).unwrap_or(u64::MAX),
            name: self.name.clone(),
        }
    }
}

/// Whether `file` is a compiled list; one that cannot be read at a place, like a pipe, is read as it comes.
fn begins_compiled(file: &File) -> bool {
    let mut start = [0; 64];
    let got = file.read_at(&mut start, 0).unwrap_or(0);
    is_compiled(start.get(..got).unwrap_or_default())
}

/// Whether a digest is the one that was asked for.
fn expect(expected: &PatternRef, found: Sha256) -> Result<(), InvalidPattern> {
    let differs = InvalidPattern::Digest { expected: expected.sha256, found };
    if found == expected.sha256 { Ok(()) } else { Err(differs) }
}

/// Appends up to `most` bytes of `source`; fewer only at its end.
fn take(source: &mut impl Read, most: usize, bytes: &mut Vec<u8>) -> Result<usize, ReadError> {
    let most = u64::try_from(most).unwrap_or(u64::MAX);
    source.by_ref().take(most).read_to_end(bytes).map_err(ReadError::Read)
}

/// A pattern that was compiled, and what the compiler remarked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// How many rules it holds.
    pub rules: u32,
    /// Remarks that do not stand in its way.
    pub warnings: Vec<Problem>,
}

/// A place in a pattern's text and what is wrong there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1; 0 if it concerns the whole.
    pub line: u32,
    /// Column in characters, from 1; 0 if it concerns the whole line.
    pub column: u32,
    /// What is wrong, in one line.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_pattern_are_refused_with_the_reason() {
        for (bytes, expected) in [
            (&b" \n\t"[..], InvalidPattern::Empty),
            (b"YARA\x00\x01\x02", InvalidPattern::Compiled),
            (b"rule a\n{ \xff }", InvalidPattern::NotText { line: 2 }),
        ] {
            assert_eq!(Pattern::new("p", bytes.to_vec()), Err(expected));
        }
    }

    #[test]
    fn only_the_named_bytes_are_accepted() {
        let pattern = Pattern::new("p", b"rule a { condition: true }".to_vec()).unwrap();
        let reference = pattern.reference();
        assert_eq!(Pattern::verified(&reference, pattern.text().as_bytes()).unwrap(), pattern);
        assert!(matches!(
            Pattern::verified(&reference, &b"rule b { condition: true }"[..]),
            Err(ReadError::Invalid(InvalidPattern::Digest { .. }))
        ));

        let text = "0a".repeat(32);
        let list = Pattern::new("l", text.clone().into_bytes()).unwrap();
        let bytes = list.to_bytes().unwrap();
        assert_eq!(Pattern::new("l", bytes.clone()).unwrap(), list, "what was compiled stays so");
        assert_eq!(Pattern::verified(&list.reference(), bytes.as_slice()).unwrap(), list);
        assert_eq!((list.text(), list.size(), list.sha256()), ("", bytes.len(), Sha256::of(&bytes)));
        let other = PatternRef { sha256: Sha256::of(b""), ..list.reference() };
        let refused = Pattern::verified(&other, bytes.as_slice());
        assert!(matches!(refused, Err(ReadError::Invalid(InvalidPattern::Digest { .. }))));
        // A list's text that an order names is not compiled: it would be another pattern than the one ordered.
        let order = PatternRef { sha256: Sha256::of(text.as_bytes()), size: 64, name: "l".to_owned() };
        assert!(Pattern::verified(&order, text.as_bytes()).unwrap().digests().is_none());
    }

    #[test]
    fn a_list_is_taken_in_whatever_its_length_and_says_what_was_in_it() {
        let lines: String = (0..5000).map(|n| format!("{n:064x},name {}\r\n", n % 100)).collect();
        let comments = "# x\r\n".repeat(20_000);
        let text = format!("\u{feff}# comment\r\n{comments}sha256,name\r\n{lines}bad line\r\n");
        let imported = Pattern::read("l", text.as_bytes()).unwrap();
        let summary = imported.list.unwrap();
        assert_eq!((summary.counts.total(), summary.junk_lines), (5000, 1));
        assert_eq!(summary.junk, [1 + 20_000 + 1 + 5000 + 1]);
        imported.pattern.check_digests().unwrap();
        assert_eq!(imported.pattern.digests().unwrap().counts(), summary.counts);
        assert_eq!(Pattern::new("l", text.into_bytes()).unwrap(), imported.pattern);
        let again = Pattern::read("l", imported.pattern.to_bytes().unwrap().as_slice()).unwrap();
        assert_eq!(again, Imported { pattern: imported.pattern, list: None });
    }

    #[test]
    fn a_source_without_an_end_is_not_read_to_it() {
        let too_large = InvalidPattern::TooLarge { size: MAX_SIZE + 1 };
        for (start, expected) in [
            (&b"rule a { condition: true }\n"[..], too_large.clone()),
            (b"", too_large),
            (b"0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a\n", InvalidPattern::LongList),
        ] {
            match Pattern::read("p", start.chain(io::repeat(b'x'))) {
                Err(ReadError::Invalid(found)) => assert_eq!(found, expected),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_forged_list_is_refused_when_it_is_checked() {
        let good = Pattern::new("l", format!("{:064x}\n{:064x}\n", 1, 2).into_bytes()).unwrap();
        good.check_digests().unwrap();
        let mut bytes = good.to_bytes().unwrap();
        // The first digest becomes larger than the second, and the digest over all is made right again.
        let body = bytes.len() - 32;
        bytes[body - 64] = 0xff;
        let digest = Sha256::of(&bytes[..body]);
        bytes[body..].copy_from_slice(digest.as_bytes());
        let forged = Pattern::new("l", bytes).unwrap();
        assert!(matches!(forged.check_digests(), Err(InvalidPattern::Digests(InvalidCompiled::Damaged(_)))));
    }
}
