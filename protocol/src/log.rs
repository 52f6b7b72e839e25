//! One line for each event that a program logs, whatever is in it.
//!
//! Text from endpoints (names, paths) stands in what is logged. Here, behind whatever formats events, every character
//! that controls, reorders or hides text is replaced by its code point: as a line of its own nothing gets out but
//! what was logged as one.
//!
//! **Invariant:** one event is one line, ended by the only line feed in it; in [`Format::Json`] a line that came in as
//! JSON stays the same JSON.

use std::io::{self, Write};

use crate::text;

/// How events are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line: `timestamp`, `level`, `target`, `fields` (with `message`).
    Json,
}

impl Format {
    /// What [`Format::from_word`] takes.
    pub const WORDS: &'static str = "`text` or `json`";

    /// Reads `text` or `json`.
    pub fn from_word(word: &str) -> Option<Self> {
        match word {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// Writes events to `W`. Each call of `write` brings one whole event, as `tracing-subscriber` does it.
#[derive(Debug)]
pub struct Lines<W> {
    to: W,
    format: Format,
}

impl<W: Write> Lines<W> {
    /// Writes to `to`.
    pub fn new(to: W, format: Format) -> Self {
        Self { to, format }
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let said = String::from_utf8_lossy(event);
        let said = said.strip_suffix('\n').unwrap_or(&said);
        let mut line = match self.format {
            Format::Text => text::escape_for_display(said),
            Format::Json => text::escape_in_json(said),
        };
        line.push('\n');
        // At once, so that lines of several threads and processes do not mix.
        self.to.write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a\nINFO b\r\u{1b}[2J\u{85}\u{2028}\u{202e}\u{e0041}\u{feff}é";

    fn written(format: Format, event: &str) -> String {
        let mut out = Vec::new();
        assert_eq!(Lines::new(&mut out, format).write(event.as_bytes()).unwrap(), event.len());
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn nothing_that_is_said_makes_a_line_of_its_own() {
        let text = written(Format::Text, &format!("INFO host={HOSTILE}\n"));
        assert_eq!(
            text,
            "INFO host=a\\u{a}INFO b\\u{d}\\u{1b}[2J\\u{85}\\u{2028}\\u{202e}\\u{e0041}\\u{feff}é\n"
        );
        assert_eq!(written(Format::Text, "plain"), "plain\n");
    }

    #[test]
    fn json_stays_the_same_json_on_one_line() {
        let value = serde_json::json!({ "host": HOSTILE, "n": 1 });
        let line = written(Format::Json, &format!("{value}\n"));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), value);
        assert!(line.ends_with("}\n") && line.matches('\n').count() == 1, "{line}");
        let body = line.trim_end();
        assert!(
            !body.chars().any(|c| c.is_control() || "\u{2028}\u{202e}\u{e0041}\u{feff}".contains(c)),
            "{body}"
        );
        assert!(body.contains("\\udb40\\udc41") && body.contains('é'), "{body}");
    }

    #[test]
    fn there_are_two_formats() {
        assert_eq!(Format::from_word("json"), Some(Format::Json));
        assert_eq!(Format::from_word("text"), Some(Format::default()));
        assert_eq!(Format::from_word("JSON"), None);
    }
}
