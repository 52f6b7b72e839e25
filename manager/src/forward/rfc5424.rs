//! One event as a message of RFC 5424, framed by octet counting (RFC 6587, 3.4.1; RFC 5425, 4.3).
//!
//! `<PRI>1 TIME HOST tm-manager - KIND [event@32473 id="…" …] BOM MESSAGE`
//!
//! The structured data has every field of the event. 32473 is the enterprise number that IANA keeps for whoever has
//! none. Text from endpoints is escaped as everywhere (`\n`, `\u{202e}`, …) before it is escaped for the format: no
//! receiver that splits at line feeds sees two messages.
//!
//! **Invariant:** a message is at most [`LONGEST`] bytes, what RFC 5425 asks every receiver to take; what is too long
//! of the sentence is cut off, the structured data never.

use tm_protocol::text;

use super::settings::Severity;
use crate::store::events::EventRow;

/// Longest message, in bytes.
const LONGEST: usize = 8192;
/// Longest host name in the header.
const LONGEST_HOST: usize = 255;
/// Longest value in the structured data, in bytes before the format's escapes.
const LONGEST_VALUE: usize = 1024;
/// Marks what follows as UTF-8.
const BOM: &str = "\u{feff}";

/// Appends a framed message.
pub(super) fn append(out: &mut Vec<u8>, event: &EventRow, facility: u8) {
    let message = message(event, facility);
    out.extend_from_slice(format!("{} ", message.len()).as_bytes());
    out.extend_from_slice(message.as_bytes());
}

fn message(event: &EventRow, facility: u8) -> String {
    let severity = Severity::of(event.status);
    let priority = u16::from(facility) * 8 + u16::from(severity.number());
    let mut out = format!(
        "<{priority}>1 {} {} tm-manager - {} [event@32473",
        timestamp(event.at_ms),
        host(&event.host),
        event.kind.word()
    );
    let id = event.id.to_string();
    let values = [
        ("id", id.as_str()),
        ("kind", event.kind.word()),
        ("status", event.status.word()),
        ("severity", severity.word()),
        ("detail", &event.detail),
        ("endpoint", &event.endpoint),
        ("host", &event.host),
        ("task", event.task.as_deref().unwrap_or_default()),
        ("incident", event.incident.as_deref().unwrap_or_default()),
    ];
    for (name, value) in values.into_iter().filter(|(_, value)| !value.is_empty()) {
        out.push(' ');
        out.push_str(name);
        out.push_str("=\"");
        for c in cut(&text::escape(value.as_bytes()), LONGEST_VALUE).chars() {
            if matches!(c, '"' | '\\' | ']') {
                out.push('\\');
            }
            out.push(c);
        }
        out.push('"');
    }
    out.push(']');
    if !event.message.is_empty() {
        out.push(' ');
        out.push_str(BOM);
        let said = text::escape_for_display(&event.message);
        out.push_str(cut(&said, LONGEST.saturating_sub(out.len())));
    }
    out
}

/// With milliseconds, in UTC; `-` for a time that the format cannot say.
fn timestamp(at_ms: i64) -> String {
    let at =
        jiff::Timestamp::from_millisecond(at_ms).map(|at| at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string());
    at.ok()
        .filter(|at| at.len() == 24 && at.starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or_else(|| "-".to_owned())
}

/// A header's field has printable ASCII only; the name as it is stands in the structured data.
fn host(host: &str) -> String {
    let plain: String =
        host.chars().take(LONGEST_HOST).map(|c| if c.is_ascii_graphic() { c } else { '?' }).collect();
    if plain.is_empty() { "-".to_owned() } else { plain }
}

/// The longest beginning of at most `most` bytes.
fn cut(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use tm_api::event::{EventKind, EventStatus};

    use super::*;

    fn event() -> EventRow {
        EventRow {
            id: 42,
            at_ms: 1_750_000_000_007,
            endpoint: "018f3c1e-6b5a-7000-8000-0123456789ab".to_owned(),
            host: "web-07".to_owned(),
            kind: EventKind::ScanAdministrator,
            status: EventStatus::Assessed,
            detail: "manual-cleanup-needed".to_owned(),
            message: "1 détection".to_owned(),
            task: Some("t".to_owned()),
            incident: None,
        }
    }

    #[test]
    fn every_byte_of_a_message_is_as_the_standard_has_it() {
        assert_eq!(
            message(&event(), 16),
            "<132>1 2025-06-15T15:06:40.007Z web-07 tm-manager - scan-administrator [event@32473 id=\"42\" \
             kind=\"scan-administrator\" status=\"assessed\" severity=\"warning\" detail=\"manual-cleanup-needed\" \
             endpoint=\"018f3c1e-6b5a-7000-8000-0123456789ab\" host=\"web-07\" task=\"t\"] \u{feff}1 détection"
        );
        let mut framed = Vec::new();
        append(&mut framed, &event(), 16);
        append(&mut framed, &event(), 16);
        let text = String::from_utf8(framed).unwrap();
        let length = message(&event(), 16).len();
        assert!(text.starts_with(&format!("{length} <132>1 ")), "bytes are counted, not characters");
        assert_eq!(text.len(), 2 * (length + length.to_string().len() + 1));
        let silent = EventRow { message: String::new(), ..event() };
        assert!(message(&silent, 0).starts_with("<4>1 ") && message(&silent, 0).ends_with("\"t\"]"));
    }

    /// Reads structured data back by the rules of RFC 5424, 6.3.3.
    fn values(message: &str) -> Vec<(String, String)> {
        let mut rest = &message[message.find("[event@32473").unwrap() + 12..];
        let mut found = Vec::new();
        while let Some(after) = rest.strip_prefix(' ') {
            let (name, quoted) = after.split_once("=\"").unwrap();
            let (mut value, mut chars, mut end) = (String::new(), quoted.char_indices(), 0);
            while let Some((at, c)) = chars.next() {
                match c {
                    '\\' => value.push(chars.next().unwrap().1),
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    ']' => panic!("a bare bracket ends it: {message}"),
                    c => value.push(c),
                }
            }
            found.push((name.to_owned(), value));
            rest = &quoted[end..];
        }
        assert!(rest.starts_with(']'), "{rest}");
        found
    }

    #[test]
    fn hostile_text_stays_where_it_belongs() {
        let hostile = "a\"]\\ x=\"1\n<0>1 - - - - - -\r\u{1b}[2J\u{202e}é\0";
        let event = EventRow {
            host: hostile.to_owned(),
            detail: hostile.to_owned(),
            message: format!("{hostile}{BOM}"),
            ..event()
        };
        let said = message(&event, 23);
        assert!(!said.trim_start_matches(|_| false).contains(|c: char| c.is_control()), "{said:?}");
        let back: std::collections::BTreeMap<String, String> = values(&said).into_iter().collect();
        for name in ["host", "detail"] {
            assert_eq!(text::unescape(&back[name]).unwrap(), hostile.as_bytes());
        }
        assert_eq!(back.len(), 8, "{back:?}");
        let header: Vec<&str> = said.split(' ').take(7).collect();
        assert_eq!(header[2], "a\"]\\?x=\"1?<0>1?-?-?-?-?-?-??[2J???");
        assert_eq!((header[3], header[5]), ("tm-manager", "scan-administrator"));
        assert_eq!(said.matches(BOM).count(), 1, "the one before the message");
    }

    #[test]
    fn nothing_is_longer_than_every_receiver_takes() {
        let long = EventRow {
            message: "\u{202e}é".repeat(2000),
            host: "h\u{1}".repeat(2000),
            detail: "]".repeat(5000),
            ..event()
        };
        let said = message(&long, 16);
        assert!(said.len() <= LONGEST && said.len() > LONGEST - 16, "{}", said.len());
        assert_eq!(values(&said).len(), 8, "the structured data is whole");
        for at in [i64::MIN, i64::MAX, -1] {
            let shown = timestamp(at);
            assert!(shown == "-" || shown.len() == 24, "{shown}");
        }
        assert_eq!(host(""), "-");
    }
}
