//! Reads digest lists as people have them: one digest a line with or without a name, CSV with names, MISP CSV,
//! ClamAV `.hdb` and `.hsb`. Each line is read for itself, so that formats may be mixed.
//!
//! **Invariant:** a line is an entry, empty, a comment, a header, or junk that is counted: none vanishes.

use super::{Digest, Entry};

/// Junk lines that are named; more are only counted.
pub const MAX_JUNK: usize = 200;

/// What a list holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed<'a> {
    /// Its entries, in the order of their lines.
    pub entries: Vec<Entry<'a>>,
    /// Numbers of the first junk lines, from 1; at most [`MAX_JUNK`].
    pub junk: Vec<usize>,
    /// How many lines are junk.
    pub junk_lines: usize,
}

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
        junk: usize,
        /// Lines that hold one.
        entries: usize,
        /// The first line that holds none, from 1.
        first: usize,
    },
}

/// Reads `text`. Takes time and memory in proportion to its length.
///
/// # Errors
/// If no line holds a digest, or more lines are junk than hold one.
pub fn parse(text: &str) -> Result<Parsed<'_>, InvalidList> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut parsed = Parsed { entries: Vec::new(), junk: Vec::new(), junk_lines: 0 };
    let mut at_start = true;
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let is_first = std::mem::replace(&mut at_start, false);
        match entry(line) {
            Some(entry) => parsed.entries.push(entry),
            None if is_first && is_header(line) => {}
            None => {
                parsed.junk_lines += 1;
                if parsed.junk.len() < MAX_JUNK {
                    parsed.junk.push(number);
                }
            }
        }
    }
    match (parsed.entries.len(), parsed.junk.first()) {
        (entries, Some(first)) if parsed.junk_lines > entries => {
            Err(InvalidList::MostlyJunk { junk: parsed.junk_lines, entries, first: *first })
        }
        (0, _) => Err(InvalidList::Empty),
        _ => Ok(parsed),
    }
}

/// Column names: words with commas between them, one of which speaks of digests.
fn is_header(line: &str) -> bool {
    line.contains(',')
        && line.split(',').map(unquoted).any(|column| {
            ["md5", "sha1", "sha-1", "sha256", "sha-256", "hash", "digest", "value", "type"]
                .iter()
                .any(|word| column.to_ascii_lowercase().split(['_', ' ']).any(|part| part == *word))
        })
}

fn entry(line: &str) -> Option<Entry<'_>> {
    clamav(line).or_else(|| if line.contains(',') { csv(line) } else { plain(line) })
}

/// `digest:size:name` and what ClamAV allows after it; a size of `*` is any.
fn clamav(line: &str) -> Option<Entry<'_>> {
    let mut fields = line.split(':');
    let digest = Digest::from_hex(fields.next()?)?;
    let size = match fields.next()? {
        "*" => None,
        number => Some(number.parse().ok()?),
    };
    Some(Entry { digest, size, name: fields.next()? })
}

/// A digest, then a name after blanks (`sha256sum` puts a `*` before names of binary files).
fn plain(line: &str) -> Option<Entry<'_>> {
    let (digest, name) = line.split_once([' ', '\t', ';']).unwrap_or((line, ""));
    let name = name.trim_start();
    Some(Entry {
        digest: Digest::from_hex(digest)?,
        size: None,
        name: name.strip_prefix('*').unwrap_or(name),
    })
}

/// The first column that is a digest (for MISP also the part of it after `|`), and as its name the part before
/// the `|`, else the first column after it that says something, else the first before it that is no number.
fn csv(line: &str) -> Option<Entry<'_>> {
    let columns: Vec<&str> = columns(line).collect();
    let found = columns.iter().enumerate().find_map(|(at, column)| {
        let (name, digest) = column.rsplit_once('|').unwrap_or(("", column));
        Some((at, name, Digest::from_hex(digest.trim())?))
    });
    let (at, name, digest) = found?;
    if !name.is_empty() {
        return Some(Entry { digest, size: None, name });
    }
    let says = |column: &&&str| !column.is_empty() && Digest::from_hex(column).is_none() && !is_kind(column);
    let after = columns.iter().skip(at + 1).find(says);
    let name = after.or_else(|| columns.iter().take(at).rev().find(says)).copied().unwrap_or_default();
    Some(Entry { digest, size: None, name })
}

/// What MISP calls the kind of a value and the flags beside it; no name.
fn is_kind(column: &str) -> bool {
    let kinds = ["md5", "sha1", "sha256", "payload delivery", "artifacts dropped", "payload installation"];
    kinds.iter().any(|kind| column.eq_ignore_ascii_case(kind))
        || column.bytes().all(|b| b.is_ascii_digit() || b == b'-')
}

/// Columns, quoted or not; a quoted one may hold commas. Quotes that do not close reach to the end.
fn columns(line: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(line);
    std::iter::from_fn(move || {
        let text = rest?;
        let mut quoted = false;
        let end = text.bytes().position(|byte| {
            quoted ^= byte == b'"';
            byte == b',' && !quoted
        });
        let (column, after) = match end {
            Some(end) => (text.get(..end)?, text.get(end + 1..)),
            None => (text, None),
        };
        rest = after;
        Some(unquoted(column))
    })
}

fn unquoted(column: &str) -> &str {
    let column = column.trim();
    column.strip_prefix('"').and_then(|inner| inner.strip_suffix('"')).unwrap_or(column)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_gives_digest_size_and_name() {
        let (md5, sha1, sha256) = ("aB".repeat(16), "01".repeat(20), "f0".repeat(32));
        for (text, size, name) in [
            (format!("\u{feff}# list\r\n{sha256}\r\n"), None, ""),
            (format!("{sha1}  some tool\n"), None, "some tool"),
            (format!("{md5} *evil.exe"), None, "evil.exe"),
            (format!("name,sha256\n\"Evil, the tool\",{sha256}"), None, "Evil, the tool"),
            (format!("{sha1},dropper"), None, "dropper"),
            (
                format!(
                    "uuid,event_id,category,type,value\nu,7,Payload delivery,filename|sha256,\"a.exe|{sha256}\""
                ),
                None,
                "a.exe",
            ),
            (format!("{md5}:1234:Win.Evil-1"), Some(1234), "Win.Evil-1"),
            (format!("{sha256}:*:Win.Evil-2:73"), None, "Win.Evil-2"),
        ] {
            let parsed = parse(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((parsed.entries.len(), parsed.junk_lines), (1, 0), "{text}");
            assert_eq!((parsed.entries[0].size, parsed.entries[0].name), (size, name), "{text}");
        }
        assert_eq!(Digest::from_hex(&md5), Some(Digest::Md5([0xab; 16])));
        assert_eq!(Digest::from_hex(&sha1), Some(Digest::Sha1([1; 20])));
        assert_eq!(Digest::from_hex(&sha256[1..]), None);
    }

    #[test]
    fn junk_is_named_by_line_and_a_list_of_junk_is_refused() {
        let good = format!("{}\n", "0".repeat(64));
        let text = format!("{good}\nnot a digest\n{good}{}:x:name\n{good}", "0".repeat(32));
        let parsed = parse(&text).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((parsed.entries.len(), parsed.junk, parsed.junk_lines), (3, vec![3, 5], 2));
        let junk = format!("{good}{}", "x\n".repeat(1000));
        let refused = InvalidList::MostlyJunk { junk: 1000, entries: 1, first: 2 };
        assert_eq!(parse(&junk), Err(refused));
        assert_eq!(parse("# only this\n\n"), Err(InvalidList::Empty));
        let many = format!("{}{}", good.repeat(1000), "x\n".repeat(1000));
        assert!(parse(&many).is_ok_and(|p| (p.junk.len(), p.junk_lines) == (MAX_JUNK, 1000)));
    }
}
