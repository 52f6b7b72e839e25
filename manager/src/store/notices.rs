//! What agents tell of themselves, in the Threat Event Log.
//!
//! **Invariant:** an agent's word is kept short and printable; what else it sends here changes nothing.

use tm_api::event::{EventKind, EventStatus};
use tm_protocol::{ids::EndpointId, report::Notice, text};

use super::{
    StoreError, Tx,
    events::{self, NewEvent},
};

/// Longest code, and longest message before it is escaped, in bytes.
const MAX_CODE: usize = 64;
const MAX_MESSAGE: usize = 1024;
/// How far a notice's time may be from now before it is worth saying.
const SAME_TIME_MS: u64 = 60_000;

/// Writes one notice down.
pub(super) async fn note(
    tx: &mut Tx,
    endpoint: EndpointId,
    notice: &Notice,
    now_ms: i64,
) -> Result<(), StoreError> {
    let detail = code(&notice.code);
    // Something is gone that a person may have to look after; everything else is for the record.
    let bad = detail.ends_with("-lost") || detail.ends_with("-damaged");
    let event = NewEvent {
        endpoint,
        kind: EventKind::Agent,
        status: if bad { EventStatus::Unsuccessful } else { EventStatus::Noted },
        detail: &detail,
        message: &message(notice, now_ms),
        task: None,
        incident: None,
        at_ms: now_ms,
    };
    events::append(tx, event).await
}

/// A stable word: lower-case letters, digits and dashes. Anything else was not written by an agent of ours.
fn code(said: &str) -> String {
    let word = !said.is_empty()
        && said.len() <= MAX_CODE
        && said.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if word { said.to_owned() } else { "unreadable".to_owned() }
}

/// The notice's own words on one line, with what they count and when it was, if that was not just now.
fn message(notice: &Notice, now_ms: i64) -> String {
    let end = (0..=MAX_MESSAGE.min(notice.message.len()))
        .rev()
        .find(|at| notice.message.is_char_boundary(*at))
        .unwrap_or(0);
    let mut message = text::escape(&notice.message.as_bytes()[..end]);
    if notice.count > 0 {
        message.push_str(&format!(" (count: {})", notice.count));
    }
    if notice.at_ms.abs_diff(now_ms) > SAME_TIME_MS
        && let Ok(at) = jiff::Timestamp::from_millisecond(notice.at_ms)
    {
        message.push_str(&format!(" (at {at:.0} by the endpoint's clock)"));
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(code: &str, message: &str, count: u64, at_ms: i64) -> Notice {
        Notice { at_ms, code: code.into(), message: message.into(), count }
    }

    #[test]
    fn what_is_kept_is_short_and_printable() {
        assert_eq!(code("journal-damaged"), "journal-damaged");
        for odd in ["", "Big", "a b", "a\u{1b}[31m", "ä", &"a".repeat(65), &"a".repeat(60_000)] {
            assert_eq!(code(odd), "unreadable", "{odd:.20}");
        }
        let now = 1_750_000_000_000;
        assert_eq!(message(&notice("c", "a\n\u{1b}[31mb\u{202e}", 0, now), now), "a\\n\\u{1b}[31mb\\u{202e}");
        assert_eq!(message(&notice("c", "x", 3, now - 60_000), now), "x (count: 3)");
        assert_eq!(
            message(&notice("c", "x", 0, 0), now),
            "x (at 1970-01-01T00:00:00Z by the endpoint's clock)"
        );
        for at_ms in [i64::MIN, i64::MAX] {
            assert_eq!(message(&notice("c", "x", 0, at_ms), now), "x");
        }
        let long = message(&notice("c", &"ä".repeat(30_000), 0, now), now);
        assert_eq!(long.len(), MAX_MESSAGE);
        assert!(message(&notice("c", &"\u{1b}".repeat(60_000), 0, now), now).len() < 8 * MAX_MESSAGE);
    }
}
