//! Bytes from strangers, shown to people.
//!
//! A file name may hold anything but NUL and `/`. [`escape`] turns it into one line of harmless text from
//! which the exact bytes can be read back; JSON carries the bytes themselves in base64 beside it.

use std::fmt::Write as _;

/// Writes `bytes` as one line of text that no terminal, log or page can misread, without losing a byte.
///
/// Printable UTF-8 stays as it is. A backslash becomes `\\`; newline, tab and carriage return `\n`, `\t`,
/// `\r`; other control characters (C0, DEL, C1), line and paragraph separators, and the characters that
/// reorder or hide text (bidirectional controls, zero-width characters, the byte-order mark, tags) become
/// `\u{…}`; bytes that are not UTF-8 become `\xNN`. [`unescape`] gives the bytes back.
pub fn escape(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\t' => out.push_str("\\t"),
                '\r' => out.push_str("\\r"),
                c if is_treacherous(c) => {
                    let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
                }
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Reads back what [`escape`] wrote; `None` if the text is not of its making.
pub fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((plain, escaped)) = rest.split_once('\\') {
        out.extend_from_slice(plain.as_bytes());
        let kind = escaped.chars().next()?;
        rest = escaped.get(kind.len_utf8()..)?;
        match kind {
            '\\' => out.push(b'\\'),
            'n' => out.push(b'\n'),
            't' => out.push(b'\t'),
            'r' => out.push(b'\r'),
            'x' => {
                out.push(u8::from_str_radix(rest.get(..2)?, 16).ok()?);
                rest = rest.get(2..)?;
            }
            'u' => {
                let (digits, after) = rest.strip_prefix('{')?.split_once('}')?;
                let c = char::from_u32(u32::from_str_radix(digits, 16).ok()?)?;
                out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                rest = after;
            }
            _ => return None,
        }
    }
    out.extend_from_slice(rest.as_bytes());
    Some(out)
}

/// Makes one CSV cell (RFC 4180): quoted where needed, and never a formula. A cell that a spreadsheet
/// would run (it begins with `=`, `+`, `-`, `@`, or a blank before one of them) gets a leading `'`.
pub fn csv_cell(text: &str) -> String {
    let safe = escape_for_display(text);
    let formula = safe.trim_start().starts_with(['=', '+', '-', '@']) && safe.parse::<f64>().is_err();
    let safe = if formula { format!("'{safe}") } else { safe };
    if safe.contains([',', '"', '\n', '\r']) || safe.starts_with(' ') || safe.ends_with(' ') {
        format!("\"{}\"", safe.replace('"', "\"\""))
    } else {
        safe
    }
}

/// Makes text that may already be escaped harmless again: like [`escape`], but a backslash stays one.
/// For a sink that shows texts of unknown origin (a message from a peer, a label).
pub fn escape_for_display(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_treacherous(c) {
            let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out
}

/// The same for text that is JSON: within its strings such characters are written as JSON writes them, and outside
/// there are none but space. The value stays the same.
pub fn escape_in_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if is_treacherous(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    out
}

/// Characters that control, reorder or hide text. Unicode 16, UAX #9 and the `Default_Ignorable_Code_Point`
/// ranges that matter in names; the list errs on the side of showing the code point.
fn is_treacherous(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hostile_names_come_out_as_one_harmless_line() {
        for (bytes, shown) in [
            (&b"plain name.txt"[..], "plain name.txt"),
            ("größe 日本".as_bytes(), "größe 日本"),
            (b"a\nb\tc\r", r"a\nb\tc\r"),
            (b"\x1b[2J\x07", r"\u{1b}[2J\u{7}"),
            (b"back\\slash", r"back\\slash"),
            (b"\xff\xfe.bin", r"\xff\xfe.bin"),
            ("\u{202e}gpj.exe".as_bytes(), r"\u{202e}gpj.exe"),
            ("\u{9b}31m".as_bytes(), r"\u{9b}31m"),
        ] {
            assert_eq!(escape(bytes), shown);
        }
    }

    #[test]
    fn csv_cells_are_quoted_and_never_formulas() {
        for (text, cell) in [
            ("plain", "plain"),
            ("a,b", "\"a,b\""),
            ("say \"x\"", "\"say \"\"x\"\"\""),
            ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
            ("  @SUM(1)", "'  @SUM(1)"),
            ("trailing ", "\"trailing \""),
            ("-5", "-5"),
            ("+1+1", "'+1+1"),
            ("line\nbreak", "line\\u{a}break"),
        ] {
            assert_eq!(csv_cell(text), cell, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_byte_is_lost(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let text = escape(&bytes);
            prop_assert!(!text.chars().any(is_treacherous));
            prop_assert_eq!(unescape(&text), Some(bytes));
        }

        #[test]
        fn unescape_takes_any_text(text in ".{0,40}") {
            let _ = unescape(&text);
        }
    }
}
