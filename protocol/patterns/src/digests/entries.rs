//! A compiled list as a row of entries, of which everything else in it follows.
//!
//! One more entry changes the whole filter of a compiled list and the numbers of names all over it; of the rows it
//! changes one. So it is the rows that two versions are compared by ([`crate::delta`]).
//!
//! The form, for MD5, SHA-1 and SHA-256 in turn: the number of rows (8 bytes, little-endian); each row: flags (1 it
//! has a size, 2 it has a name), the digest, with flag 1 the size (8 bytes), with flag 2 the length of the name
//! (2 bytes) and the name. Rows are in order, none comes twice.
//!
//! **Invariant:** [`fold`] makes out of [`unfold`]'s rows the bytes that they came from, if these were made by
//! [`super::List`]; whoever relies on it compares digests.

use std::collections::HashMap;

use super::{
    Algorithm, Compiled,
    layout::{ANY_SIZE, MAX_COMPILED},
    parse::MAX_NAME,
    write::{Rows, write},
};

const SIZED: u8 = 1;
const NAMED: u8 = 2;

/// The rows of a compiled list; `None` if it is none, or they come to more than `most` bytes (a name stands in every
/// row that has it).
pub(crate) fn unfold(compiled: &[u8], most: usize) -> Option<Vec<u8>> {
    let list = Compiled::open(compiled).ok()?;
    let mut rows = Vec::with_capacity(compiled.len().min(most));
    for algorithm in Algorithm::ALL {
        let count = usize::try_from(list.counts().of(algorithm)).ok()?;
        rows.extend_from_slice(&list.counts().of(algorithm).to_le_bytes());
        for index in 0..count {
            let (digest, size, name) = list.row(algorithm, index)?;
            let sized = if size == ANY_SIZE { 0 } else { SIZED };
            rows.push(if name.is_empty() { sized } else { sized | NAMED });
            rows.extend_from_slice(digest);
            if sized > 0 {
                rows.extend_from_slice(&size.to_le_bytes());
            }
            if !name.is_empty() {
                rows.extend_from_slice(&u16::try_from(name.len()).ok()?.to_le_bytes());
                rows.extend_from_slice(name.as_bytes());
            }
            if rows.len() > most {
                return None;
            }
        }
    }
    (rows.len() <= most).then_some(rows)
}

/// The compiled list of these rows, of at most [`MAX_COMPILED`] bytes; `None` if that is not what they are.
pub(crate) fn fold(rows: &[u8]) -> Option<Vec<u8>> {
    let mut cursor = Cursor { left: rows, names: HashMap::new() };
    let md5 = cursor.table::<16>()?;
    let sha1 = cursor.table::<20>()?;
    let sha256 = cursor.table::<32>()?;
    if !cursor.left.is_empty() {
        return None;
    }
    let mut names = vec![""; cursor.names.len()];
    for (name, number) in &cursor.names {
        *names.get_mut(usize::try_from(*number).ok()?)? = name;
    }
    let bytes = write((md5, sha1, sha256), &names);
    (bytes.len() <= MAX_COMPILED).then_some(bytes)
}

struct Cursor<'a> {
    left: &'a [u8],
    names: HashMap<&'a str, u32>,
}

impl<'a> Cursor<'a> {
    fn table<const N: usize>(&mut self) -> Option<Rows<N>> {
        let count = u64::from_le_bytes(self.field()?);
        // Each takes its place: a number that lies ends the table before it costs anything.
        let mut rows = Rows::new();
        for _ in 0..count {
            let [flags] = self.field()?;
            let digest = self.field::<N>()?;
            if flags & !(SIZED | NAMED) != 0 {
                return None;
            }
            let size = if flags & SIZED > 0 { Some(u64::from_le_bytes(self.field()?)) } else { None };
            let name = if flags & NAMED > 0 { Some(self.name()?) } else { None };
            rows.push(digest, size, name);
        }
        Some(rows)
    }

    fn name(&mut self) -> Option<u32> {
        let length = usize::from(u16::from_le_bytes(self.field()?));
        let (name, rest) = self.left.split_at_checked(length)?;
        if name.is_empty() || length > MAX_NAME {
            return None;
        }
        self.left = rest;
        let next = u32::try_from(self.names.len()).ok()?;
        Some(*self.names.entry(std::str::from_utf8(name).ok()?).or_insert(next))
    }

    fn field<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.left.split_first_chunk()?;
        self.left = rest;
        Some(*field)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::List, *};

    fn compile(text: &str) -> Vec<u8> {
        let mut list = List::new();
        list.feed(text.as_bytes()).unwrap();
        list.finish().unwrap().0
    }

    fn sample() -> Vec<u8> {
        let mut text = format!("{}:10:Win.A\n{}:*:Win.B\n", "01".repeat(16), "02".repeat(16));
        text += &format!("{}:20:X\n{}:30:Y\n", "03".repeat(20), "04".repeat(20));
        for n in 0..90u8 {
            let name = if n % 3 == 0 { String::new() } else { format!(",näme{}", n % 7) };
            text += &format!("{n:02x}{}{name}\n", "55".repeat(31));
        }
        compile(&text)
    }

    #[test]
    fn rows_are_all_that_a_list_is_made_of() {
        for text in [sample(), compile(&"ab".repeat(32)), compile(&format!("{}:5:n", "0c".repeat(16)))] {
            let rows = unfold(&text, usize::MAX).unwrap();
            assert!(fold(&rows).unwrap() == text);
            assert!(unfold(&text, rows.len()).is_some() && unfold(&text, rows.len() - 1).is_none());
        }
        assert!(unfold(b"rule a { condition: true }", 1000).is_none());
    }

    #[test]
    fn rows_that_lie_are_no_list() {
        let rows = unfold(&sample(), usize::MAX).unwrap();
        for end in 0..rows.len() {
            assert!(fold(&rows[..end]).is_none(), "cut at {end}");
        }
        let mut longer = rows.clone();
        longer.push(0);
        assert!(fold(&longer).is_none());
        let mut flags = rows.clone();
        flags[8] = 4;
        assert!(fold(&flags).is_none());
        let mut count = rows.clone();
        count[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(fold(&count).is_none());
    }
}
