//! Times as people write them.

use std::{str::FromStr, time::Duration};

use jiff::{Timestamp, ToSpan as _, Zoned, civil::Date};

use crate::duration;

/// A time, as far as it is known without a clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// Exactly then.
    At(Timestamp),
    /// So long ago.
    Ago(Duration),
    /// The midnight that began this day.
    Day(Date),
    /// The midnight that began today.
    Today,
    /// The midnight that began yesterday.
    Yesterday,
}

/// A text that is not a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a time (RFC 3339 as in `2026-01-31T08:00:00Z`, a date, `today`, `yesterday`, or how long ago as in \
     `2h` or `7d` is expected)"
)]
pub(crate) struct InvalidTime;

impl FromStr for When {
    type Err = InvalidTime;

    fn from_str(text: &str) -> Result<Self, InvalidTime> {
        match text {
            "today" => return Ok(Self::Today),
            "yesterday" => return Ok(Self::Yesterday),
            _ => {}
        }
        if let Ok(ago) = duration::parse(text) {
            return Ok(Self::Ago(ago));
        }
        // A date alone also parses as other forms that jiff knows; only this one is a day here.
        if text.len() == "2026-01-31".len()
            && let Ok(day) = text.parse()
        {
            return Ok(Self::Day(day));
        }
        text.parse().map(Self::At).map_err(|_| InvalidTime)
    }
}

impl When {
    /// In milliseconds since 1970. `now` also says where midnight is.
    pub(crate) fn milliseconds(self, now: &Zoned) -> i64 {
        let midnight = |day: Date| day.to_zoned(now.time_zone().clone()).map(|at| at.timestamp());
        let at = match self {
            Self::At(at) => Ok(at),
            Self::Ago(ago) => now.timestamp().checked_sub(ago),
            Self::Day(day) => midnight(day),
            Self::Today => midnight(now.date()),
            Self::Yesterday => now.date().checked_sub(1.day()).and_then(midnight),
        };
        // What lies before all that jiff can count lies before every event.
        at.unwrap_or(Timestamp::MIN).as_millisecond()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_what_people_mean() {
        let now: Zoned = "2026-03-29T12:30:00+02:00[Europe/Berlin]".parse().unwrap();
        for (text, at) in [
            ("2026-01-31T08:00:00Z", "2026-01-31T08:00:00Z"),
            ("2026-01-31T08:00:00.5+01:00", "2026-01-31T07:00:00.5Z"),
            ("2h", "2026-03-29T08:30:00Z"),
            ("7d", "2026-03-22T10:30:00Z"),
            // The clock went forward in the night: midnight had another offset than now.
            ("today", "2026-03-28T23:00:00Z"),
            ("yesterday", "2026-03-27T23:00:00Z"),
            ("2026-07-01", "2026-06-30T22:00:00Z"),
        ] {
            let when: When = text.parse().unwrap();
            let expected: Timestamp = at.parse().unwrap();
            assert_eq!(when.milliseconds(&now), expected.as_millisecond(), "{text}");
        }
        for bad in
            ["", "now", "Today", "2h ago", "-2h", "0d", "2026-13-01", "2026-01-32", "12:30", "20260131"]
        {
            assert_eq!(bad.parse::<When>(), Err(InvalidTime), "{bad:?}");
        }
    }

    #[test]
    fn the_longest_time_ago_is_no_panic() {
        let now: Zoned = "-009990-01-01T00:00:00Z[UTC]".parse().unwrap();
        let when: When = "36600d".parse().unwrap();
        assert_eq!(when.milliseconds(&now), Timestamp::MIN.as_millisecond());
    }
}
