//! Durations as people write them: a whole number and one unit.

use std::time::Duration;

/// A text that is not a duration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a duration (a number from 1 and one of the units s, m, h, d is expected, as in `30s` or `1h`)")]
pub(crate) struct InvalidDuration;

/// Reads `30s`, `5m`, `1h`, `7d`; nothing else, so that no typing error means another time.
///
/// # Errors
/// If `text` is of another form, zero, or longer than can be counted.
pub(crate) fn parse(text: &str) -> Result<Duration, InvalidDuration> {
    let unit = text.chars().next_back().ok_or(InvalidDuration)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        _ => return Err(InvalidDuration),
    };
    let digits = text.strip_suffix(unit).ok_or(InvalidDuration)?;
    // `parse` alone would take a sign; a leading zero would also let in zero itself.
    if !digits.starts_with(|c: char| matches!(c, '1'..='9')) || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(InvalidDuration);
    }
    let count: u64 = digits.parse().map_err(|_| InvalidDuration)?;
    // A deadline of more than a century is a typing error, and adding it to a clock could overflow.
    let total = count.checked_mul(seconds).filter(|total| *total <= 100 * 366 * 24 * 60 * 60);
    total.map(Duration::from_secs).ok_or(InvalidDuration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_one_strict_form() {
        for (text, seconds) in [("30s", 30), ("5m", 300), ("1h", 3600), ("24h", 86_400), ("7d", 604_800)] {
            assert_eq!(parse(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in [
            "",
            "s",
            "5",
            "0s",
            "00s",
            "05m",
            "+5m",
            "-5m",
            " 5m",
            "5 m",
            "5m ",
            "5M",
            "5min",
            "1h30m",
            "1.5h",
            "5µ",
            "٥m",
            "99999999999999999999s",
            "18446744073709551615d",
            "999999999d",
        ] {
            assert_eq!(parse(bad), Err(InvalidDuration), "{bad:?}");
        }
    }
}
