//! Sizes and times with their units.

/// Reads `1GiB`, `256MiB`, `4KiB`, `512B` or plain bytes.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let factor = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err("expected a size such as 512B, 64KiB, 256MiB or 1GiB".to_owned()),
    };
    multiply(number, factor)
}

/// Reads `500ms`, `120s`, `2m` or `1h`, as milliseconds. A bare number is refused: its unit would be a guess.
pub(super) fn parse_duration_ms(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let factor = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("expected a time such as 500ms, 120s or 2m".to_owned()),
    };
    match multiply(number, factor)? {
        0 => Err("must be longer than nothing".to_owned()),
        ms => Ok(ms),
    }
}

/// Reads `10%` or `10`: 1 to 100.
pub(super) fn parse_percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text);
    let percent = number.parse().ok().filter(|percent| (1..=100).contains(percent));
    percent.ok_or_else(|| "expected a share of one core from 1% to 100%".to_owned())
}

fn split(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at_checked(end).unwrap_or((text, ""))
}

fn multiply(number: &str, factor: u64) -> Result<u64, String> {
    let number: u64 = number.parse().map_err(|_| "expected a whole number before the unit".to_owned())?;
    number.checked_mul(factor).ok_or_else(|| "too large".to_owned())
}

/// `bytes` for people: two or three digits and a unit.
#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
pub(super) fn show_size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
    let mut unit = "B";
    while value >= 1024.0
        && let Some(next) = units.next()
    {
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_and_nonsense_is_refused() {
        for (text, expected) in [
            ("0", Some(0)),
            ("1024", Some(1024)),
            ("512B", Some(512)),
            ("64KiB", Some(64 << 10)),
            ("1GiB", Some(1 << 30)),
            ("GiB", None),
            ("1GB", None),
            ("-1", None),
            ("1.5GiB", None),
            ("99999999999TiB", None),
            ("", None),
        ] {
            assert_eq!(parse_size(text).ok(), expected, "{text}");
        }
        for (text, expected) in [
            ("500ms", Some(500)),
            ("120s", Some(120_000)),
            ("2m", Some(120_000)),
            ("0s", None),
            ("5", None),
            ("ö", None),
            ("", None),
        ] {
            assert_eq!(parse_duration_ms(text).ok(), expected, "{text}");
        }
        for (bytes, shown) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (u64::MAX, "16.0 EiB")] {
            assert_eq!(show_size(bytes), shown);
        }
    }
}
