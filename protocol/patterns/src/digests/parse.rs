//! Reads lines of digest lists as people have them: one digest a line with or without a name, CSV with names, MISP
//! CSV, ClamAV `.hdb` and `.hsb`. Each line is read for itself, so that formats may be mixed.
//!
//! **Invariant:** a line is an entry, empty, a comment, a header, or junk that is counted: none vanishes.

use super::{Digest, Entry};

/// Longest name that is kept, in bytes.
pub(super) const MAX_NAME: usize = 256;

/// What a line is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// It names a digest.
    Entry(Entry<'a>),
    /// Empty, or a comment.
    Nothing,
    /// Neither.
    Junk,
}

/// Reads one line, without its end.
pub(super) fn read_line(line: &str) -> Line<'_> {
    let line = line.trim();
    if line.is_empty() || ["#", "//", ";"].iter().any(|mark| line.starts_with(mark)) {
        return Line::Nothing;
    }
    entry(line).map_or(Line::Junk, Line::Entry)
}

/// Column names: words with commas between them, one of which speaks of digests.
pub(super) fn is_header(line: &str) -> bool {
    line.contains(',')
        && line.split(',').map(unquoted).any(|column| {
            ["md5", "sha1", "sha-1", "sha256", "sha-256", "hash", "digest", "value", "type"]
                .iter()
                .any(|word| column.to_ascii_lowercase().split(['_', ' ']).any(|part| part == *word))
        })
}

/// Whether a line is an entry.
pub(crate) fn is_entry(line: &str) -> bool {
    matches!(read_line(line), Line::Entry(_))
}

fn entry(line: &str) -> Option<Entry<'_>> {
    let found = clamav(line).or_else(|| if line.contains(',') { csv(line) } else { plain(line) })?;
    let end = (0..=MAX_NAME.min(found.name.len())).rev().find(|end| found.name.is_char_boundary(*end))?;
    Some(Entry { name: found.name.get(..end)?, ..found })
}

/// `digest:size:name` and what ClamAV allows after it; a size of `*` is any.
fn clamav(line: &str) -> Option<Entry<'_>> {
    let mut fields = line.split(':');
    let digest = Digest::from_hex(fields.next()?)?;
    let size = match fields.next()? {
        "*" => None,
        // The largest number stands for any size in the compiled form.
        number => Some(number.parse().ok().filter(|size| *size != u64::MAX)?),
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

/// What MISP calls the kind of a value, its numbers and the flags beside it; no name.
fn is_kind(column: &str) -> bool {
    let kinds = ["md5", "sha1", "sha256", "payload delivery", "artifacts dropped", "payload installation"];
    kinds.iter().any(|kind| column.eq_ignore_ascii_case(kind))
        || column.bytes().all(|b| b.is_ascii_digit() || b == b'-')
        || column.len() == 36 && column.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
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
        for (line, size, name) in [
            (format!("  {sha256}\r"), None, ""),
            (format!("{sha1}  some tool"), None, "some tool"),
            (format!("{md5} *evil.exe"), None, "evil.exe"),
            (format!("\"Evil, the tool\",{sha256}"), None, "Evil, the tool"),
            (format!("{sha1},dropper"), None, "dropper"),
            (format!("u,7,Payload delivery,filename|sha256,\"a.exe|{sha256}\""), None, "a.exe"),
            (format!("5e6a2f10-7c1c-4f2a-9d5e-4a3c950d2101,7,Payload delivery,md5,{md5},,1"), None, ""),
            (format!("5e6a2f10-7c1c-4f2a-9d5e-4a3c950d2101,7,md5,{md5},seen in May,1"), None, "seen in May"),
            (format!("{md5}:1234:Win.Evil-1"), Some(1234), "Win.Evil-1"),
            (format!("{sha256}:*:Win.Evil-2:73"), None, "Win.Evil-2"),
        ] {
            let Line::Entry(entry) = read_line(&line) else { panic!("{line}") };
            assert_eq!((entry.size, entry.name), (size, name), "{line}");
        }
        assert_eq!(Digest::from_hex(&md5), Some(Digest::Md5([0xab; 16])));
        assert_eq!(Digest::from_hex(&sha1), Some(Digest::Sha1([1; 20])));
        assert_eq!(Digest::from_hex(&sha256[1..]), None);
        for nothing in ["", " \t\r", "# x", "// x", "; x"] {
            assert_eq!(read_line(nothing), Line::Nothing, "{nothing:?}");
        }
        let zeros = "0".repeat(32);
        for junk in
            ["not a digest", &zeros[1..], &format!("{zeros}:x:name"), &format!("{zeros}:{}:n", u64::MAX)]
        {
            assert_eq!(read_line(junk), Line::Junk, "{junk}");
        }
    }

    #[test]
    fn a_long_name_is_cut_between_characters() {
        let line = format!("{} x{}", "0".repeat(32), "\u{e4}".repeat(1000));
        let Line::Entry(entry) = read_line(&line) else { panic!("it is an entry") };
        assert_eq!(entry.name.len(), MAX_NAME - 1);
    }
}
