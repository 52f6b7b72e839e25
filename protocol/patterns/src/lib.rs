//! Patterns: what to look for.
//!
//! A pattern is named by the SHA-256 of its bytes. In this version a pattern is YARA rule text; signatures,
//! versions, digest lists and cleanup steps join it here.
//!
//! **Invariant:** a [`Pattern`] that exists is within the size limit and is text; whether it compiles is
//! found out in a scan worker, never in the process that holds it.

pub mod digests;

use std::sync::Arc;

use tm_protocol::{ids::Sha256, task::PatternRef};

/// Largest pattern accepted, in bytes.
pub const MAX_SIZE: usize = 64 << 20;

/// A pattern's bytes and their name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    name: String,
    sha256: Sha256,
    text: Arc<str>,
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
        /// Its size.
        size: usize,
    },
    /// Compiled rules are never loaded: a forged set can make any engine misbehave.
    #[error("the file holds compiled rules; import their text instead")]
    Compiled,
    /// YARA text is UTF-8.
    #[error("the pattern is not UTF-8 text (line {line})")]
    NotText {
        /// The first line, from 1, that is not.
        line: usize,
    },
    /// Its bytes are not the ones that were asked for.
    #[error("the pattern's digest is {found}, not {expected}")]
    Digest {
        /// What it should be.
        expected: Sha256,
        /// What it is.
        found: Sha256,
    },
}

impl Pattern {
    /// Takes a pattern's bytes; `name` is what people call it.
    ///
    /// # Errors
    /// If they are empty, too many, compiled rules, or not text.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> Result<Self, InvalidPattern> {
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
        Ok(Self { name: name.into(), sha256, text: text.into() })
    }

    /// Takes bytes that must be exactly the pattern that `expected` names.
    ///
    /// # Errors
    /// As [`Pattern::new`], or if the digest differs.
    pub fn verified(expected: &PatternRef, bytes: Vec<u8>) -> Result<Self, InvalidPattern> {
        let found = Sha256::of(&bytes);
        if found != expected.sha256 {
            return Err(InvalidPattern::Digest { expected: expected.sha256, found });
        }
        Self::new(expected.name.clone(), bytes)
    }

    /// What people call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The digest of its bytes.
    pub fn sha256(&self) -> Sha256 {
        self.sha256
    }

    /// The YARA rule text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// How an order names it.
    pub fn reference(&self) -> PatternRef {
        PatternRef {
            sha256: self.sha256,
            size: u64::try_from(self.text.len()).unwrap_or(u64::MAX),
            name: self.name.clone(),
        }
    }
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
        assert_eq!(Pattern::verified(&reference, pattern.text().as_bytes().to_vec()), Ok(pattern));
        assert!(matches!(
            Pattern::verified(&reference, b"rule b { condition: true }".to_vec()),
            Err(InvalidPattern::Digest { .. })
        ));
    }
}
