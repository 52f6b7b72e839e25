//! Takes in a digest list's text, in whatever pieces it comes, and makes its compiled form.
//!
//! **Invariant:** what is held is the entries and one line, not the text.
//! **Invariant:** every line that is neither entry nor comment, nor the first one with column names, is counted as
//! junk; the first ones are named.

use std::collections::HashMap;

use super::{
    Compiled, Counts, Digest, Entry, MAX_COMPILED,
    parse::{Line, is_header, read_line},
    write::{Rows, write},
};
use crate::Problem;

/// Longest text of a list, in bytes.
pub const MAX_LIST: u64 = 512 << 20;
/// Most entries of a list, duplicates included.
pub const MAX_ENTRIES: usize = 4 << 20;
/// Junk lines that are named; more are only counted.
pub const MAX_JUNK: usize = 200;
/// Junk lines that are remarked upon one by one.
const MOST_REMARKS: usize = 10;
/// Most bytes of names, each counted once.
const MAX_NAMES: usize = 64 << 20;
/// Longest line that is looked at, in bytes; a longer one is junk.
const MAX_LINE: usize = 64 << 10;

/// Why text is not a digest list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidList {
    /// Nothing to look for is in it.
    #[error("there is no digest in it")]
    Empty,
    /// Most likely it is something else.
    #[error("{junk} lines hold no digest and only {entries} do, the first without is line {first}")]
    MostlyJunk {
        /// Lines that hold none.
        junk: u64,
        /// Lines that hold one.
        entries: u64,
        /// The first line that holds none, from 1.
        first: u64,
    },
    /// More than can be taken in.
    #[error("the list is too large: line {line} is beyond {MAX_ENTRIES} digests, or {} MiB of names", MAX_NAMES >> 20)]
    TooLarge {
        /// The first line that is too many, from 1.
        line: u64,
    },
    /// More than [`MAX_COMPILED`].
    #[error("the list is too large: it takes more than {} MiB", MAX_COMPILED >> 20)]
    TooLargeCompiled,
}

/// What was in a list's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Digests, each once.
    pub counts: Counts,
    /// Numbers of the first junk lines, from 1; at most [`MAX_JUNK`].
    pub junk: Vec<u64>,
    /// How many lines are junk.
    pub junk_lines: u64,
}

impl Summary {
    /// The junk lines as remarks: the first ten by their numbers, then how many more there are.
    pub fn remarks(&self) -> Vec<Problem> {
        let at = |line: u64, message: String| Problem {
            line: u32::try_from(line).unwrap_or(u32::MAX),
            column: 0,
            message,
        };
        let named = self.junk.iter().take(MOST_REMARKS);
        let mut remarks: Vec<_> =
            named.map(|line| at(*line, "there is no digest in this line".to_owned())).collect();
        match self.junk_lines.saturating_sub(u64::try_from(remarks.len()).unwrap_or(u64::MAX)) {
            0 => {}
            1 => remarks.push(at(0, "there is none in one more line".to_owned())),
            more => remarks.push(at(0, format!("there is none in {more} more lines"))),
        }
        remarks
    }
}

/// A list that is being taken in.
#[derive(Debug)]
pub struct List {
    md5: Rows<16>,
    sha1: Rows<20>,
    sha256: Rows<32>,
    names: HashMap<Box<str>, u32>,
    name_bytes: usize,
    /// The line that has begun.
    line: Vec<u8>,
    /// It is longer than [`MAX_LINE`].
    is_long: bool,
    /// The number of that line, from 1.
    number: u64,
    /// Nothing but comments came so far.
    at_start: bool,
    entries: u64,
    junk: Vec<u64>,
    junk_lines: u64,
}

impl Default for List {
    fn default() -> Self {
        Self::new()
    }
}

impl List {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            md5: Rows::new(),
            sha1: Rows::new(),
            sha256: Rows::new(),
            names: HashMap::new(),
            name_bytes: 0,
            line: Vec::new(),
            is_long: false,
            number: 1,
            at_start: true,
            entries: 0,
            junk: Vec::new(),
            junk_lines: 0,
        }
    }

    /// Takes the next piece of its text; it may end anywhere.
    ///
    /// # Errors
    /// If it is too large by now.
    pub fn feed(&mut self, mut text: &[u8]) -> Result<(), InvalidList> {
        while let Some(end) = memchr::memchr(b'\n', text) {
            let (line, rest) = text.split_at(end);
            text = rest.get(1..).unwrap_or_default();
            if self.line.is_empty() && !self.is_long && line.len() <= MAX_LINE {
                self.take(line)?;
            } else {
                self.keep(line);
                let line = std::mem::take(&mut self.line);
                if self.is_long { self.note_junk() } else { self.take(&line)? }
            }
            self.is_long = false;
            self.number += 1;
        }
        self.keep(text);
        Ok(())
    }

    /// Its compiled form, and what was in it.
    ///
    /// # Errors
    /// If no line holds a digest, more lines are junk than hold one, or it is too large.
    pub fn finish(mut self) -> Result<(Vec<u8>, Summary), InvalidList> {
        let line = std::mem::take(&mut self.line);
        if self.is_long {
            self.note_junk()
        } else {
            self.take(&line)?
        }
        match (self.entries, self.junk.first()) {
            (entries, Some(first)) if self.junk_lines > entries => {
                return Err(InvalidList::MostlyJunk { junk: self.junk_lines, entries, first: *first });
            }
            (0, _) => return Err(InvalidList::Empty),
            _ => {}
        }
        let mut names = vec![""; self.names.len()];
        for (name, number) in &self.names {
            if let Some(place) = usize::try_from(*number).ok().and_then(|number| names.get_mut(number)) {
                *place = name;
            }
        }
        let bytes = write((self.md5, self.sha1, self.sha256), &names);
        let list = Compiled::open(&bytes).map_err(|_| InvalidList::TooLargeCompiled)?;
        let counts = list.counts();
        Ok((bytes, Summary { counts, junk: self.junk, junk_lines: self.junk_lines }))
    }

    fn keep(&mut self, part: &[u8]) {
        if self.is_long || self.line.len() + part.len() > MAX_LINE {
            self.is_long = true;
            self.line.clear();
        } else {
            self.line.extend_from_slice(part);
        }
    }

    fn take(&mut self, line: &[u8]) -> Result<(), InvalidList> {
        // Names of files are not always UTF-8; digests are.
        let line = String::from_utf8_lossy(line);
        let line = if self.number == 1 { line.strip_prefix('\u{feff}').unwrap_or(&line) } else { &line };
        match read_line(line) {
            Line::Nothing => return Ok(()),
            Line::Entry(entry) => self.push(&entry)?,
            Line::Junk if self.at_start && is_header(line) => {}
            Line::Junk => self.note_junk(),
        }
        self.at_start = false;
        Ok(())
    }

    fn push(&mut self, entry: &Entry<'_>) -> Result<(), InvalidList> {
        let name = (!entry.name.is_empty()).then(|| self.number_of(entry.name));
        if self.name_bytes > MAX_NAMES || self.md5.len() + self.sha1.len() + self.sha256.len() >= MAX_ENTRIES
        {
            return Err(InvalidList::TooLarge { line: self.number });
        }
        match entry.digest {
            Digest::Md5(digest) => self.md5.push(digest, entry.size, name),
            Digest::Sha1(digest) => self.sha1.push(digest, entry.size, name),
            Digest::Sha256(digest) => self.sha256.push(digest, entry.size, name),
        }
        self.entries += 1;
        Ok(())
    }

    fn number_of(&mut self, name: &str) -> u32 {
        if let Some(number) = self.names.get(name) {
            return *number;
        }
        // There are at most as many names as entries.
        let number = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        self.name_bytes += name.len();
        self.names.insert(name.into(), number);
        number
    }

    fn note_junk(&mut self) {
        self.junk_lines += 1;
        if self.junk.len() < MAX_JUNK {
            self.junk.push(self.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8], piece: usize) -> Result<(Vec<u8>, Summary), InvalidList> {
        let mut list = List::new();
        for piece in text.chunks(piece) {
            list.feed(piece)?;
        }
        list.finish()
    }

    #[test]
    fn junk_is_named_by_line_and_a_list_of_junk_is_refused() {
        let good = format!("{}\n", "0".repeat(64));
        let text = format!("{good}\nnot a digest\n{good}{}:x:name\n{good}", "0".repeat(32));
        let (_, summary) = read(text.as_bytes(), 1000).unwrap();
        assert_eq!((summary.counts.total(), summary.junk, summary.junk_lines), (1, vec![3, 5], 2));
        let junk = format!("{good}{}", "x\n".repeat(1000));
        let refused = InvalidList::MostlyJunk { junk: 1000, entries: 1, first: 2 };
        assert_eq!(read(junk.as_bytes(), 1000), Err(refused));
        assert_eq!(read(b"# only this\n\n", 5), Err(InvalidList::Empty));
        let many = format!("{}{}", good.repeat(1000), "x\n".repeat(1000));
        let (_, summary) = read(many.as_bytes(), 1000).unwrap();
        assert_eq!((summary.junk.len(), summary.junk_lines), (MAX_JUNK, 1000));
        let remarks = summary.remarks();
        assert_eq!(
            remarks.iter().map(|remark| remark.line).collect::<Vec<_>>(),
            [1001, 1002, 1003, 1004, 1005, 1006, 1007, 1008, 1009, 1010, 0]
        );
        assert_eq!(remarks[10].message, "there is none in 990 more lines");
    }

    #[test]
    fn it_does_not_matter_in_which_pieces_the_text_comes() {
        let hex = |byte: &str, count| byte.repeat(count);
        let text = format!(
            "\u{feff}# list\r\nuuid,value,sha256\r\n{},a\r\nwrong\r\n{} b\r\n{}:7:c\n{}",
            hex("aa", 32),
            hex("bb", 20),
            hex("cc", 16),
            hex("dd", 32)
        );
        let whole = read(text.as_bytes(), usize::MAX).unwrap();
        assert_eq!(whole.1.counts.to_string(), "2 SHA-256, 1 SHA-1, 1 MD5");
        assert_eq!(whole.1.junk, [4]);
        for piece in 1..100 {
            assert_eq!(read(text.as_bytes(), piece).unwrap(), whole, "{piece}");
        }
    }

    #[test]
    fn column_names_are_no_junk_at_the_start_only() {
        let line = format!("name,sha256\n{},x\n", "0".repeat(64));
        assert_eq!(read(line.as_bytes(), 99).unwrap().1.junk_lines, 0);
        assert_eq!(read(line.repeat(2).as_bytes(), 99).unwrap().1.junk, [3]);
    }

    #[test]
    fn endless_lines_take_no_memory_and_are_junk() {
        let mut list = List::new();
        list.feed(format!("{}\n", "0".repeat(64)).as_bytes()).unwrap();
        for _ in 0..1000 {
            list.feed(&[b'0'; 4096]).unwrap();
            assert!(list.line.capacity() < 2 * MAX_LINE);
        }
        list.feed(b"\n").unwrap();
        let (_, summary) = list.finish().unwrap();
        assert_eq!((summary.counts.total(), summary.junk), (1, vec![2]));
    }

    #[test]
    fn a_name_that_is_not_utf8_costs_no_entry() {
        let text = [b"ab".repeat(16).as_slice(), b"  caf\xe9\n"].concat();
        let (bytes, summary) = read(&text, 99).unwrap();
        assert_eq!(summary.junk_lines, 0);
        let list = Compiled::open(bytes).unwrap();
        assert_eq!(list.find(&Digest::Md5([0xab; 16]), 0).unwrap().name, "caf\u{fffd}");
    }
}
